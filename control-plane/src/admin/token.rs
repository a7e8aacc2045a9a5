//! `admin token …` and `admin approve`: bearer tokens of staff, and the second proof that some operations ask for.

use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::{AdminError, ApproveArgs, TokenArgs, TokenCommand};
use crate::app::App;
use crate::auth::admin_tokens::{self, StaffName};
use crate::auth::{approvals, tokens};

pub(super) async fn run(app: &App, args: TokenArgs) -> Result<Value, AdminError> {
    match args.command {
        None => {
            let name = StaffName::parse(&args.name).ok_or_else(|| {
                AdminError::Refused("--name must be 1 to 64 letters, digits and any of . @ _ -".to_owned())
            })?;
            let made = admin_tokens::issue(app, &name, "cli").await?;
            Ok(json!({"token": made.token.expose(), "token_id": made.id, "name": name.as_str(),
                      "expires_in": tokens::ADMIN_SECONDS}))
        }
        Some(TokenCommand::Revoke { id }) => {
            let newly = admin_tokens::revoke(app, id, "cli").await?;
            Ok(json!({"token_id": id, "status": "revoked", "was_revoked": !newly}))
        }
    }
}

pub(super) async fn approve(app: &App, args: ApproveArgs) -> Result<Value, AdminError> {
    let target = args.target.to_string();
    let token = approvals::issue(app, args.action, &target, "cli", &mut StdRng::from_os_rng()).await?;
    Ok(json!({"challenge_token": token.expose(), "action": args.action.as_str(), "target": target,
              "expires_in": approvals::LIFETIME.whole_seconds()}))
}
