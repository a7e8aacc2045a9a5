//! The second proof of staff: before a tenant is suspended, deleted or given other limits over HTTP, somebody with a shell
//! on the control plane's host approves it. The token is good once, for five minutes, for one action on one tenant.
//!
//! An approval that was taken is used up, whatever comes of the request. Other ways to approve would issue the same token.

use cvault_types::Secret;
use rand::CryptoRng;
use serde_json::json;
use time::Duration;

use super::opaque;
use crate::app::App;
use crate::audit;
use crate::db::{DbError, Tx};

/// How long an approval waits for its request.
pub const LIFETIME: Duration = Duration::minutes(5);

/// What can be approved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Action {
    /// Suspend it, by `…/suspend` or by its status
    #[value(name = "tenant.suspend")]
    Suspend,
    /// Delete it
    #[value(name = "tenant.delete")]
    Delete,
    /// Change its limits
    #[value(name = "tenant.limits")]
    Limits,
}

impl Action {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Suspend => "tenant.suspend",
            Self::Delete => "tenant.delete",
            Self::Limits => "tenant.limits",
        }
    }
}

/// Approves `action` on `target`; `by` says so.
///
/// # Errors
/// Those of the database.
pub async fn issue(
    app: &App,
    action: Action,
    target: &str,
    by: &str,
    rng: &mut impl CryptoRng,
) -> Result<Secret, DbError> {
    let token = opaque::CHALLENGE_TOKEN.draw(rng);
    let (hash, now) = (hash(app, token.expose()), app.clock.now());
    let mut tx = Tx::begin(&app.db.sys).await?;
    let work = async {
        sqlx::query!(
            "insert into platform.admin_approvals (token_hash, action, target, approved_by, created_at, expires_at)
             values ($1, $2, $3, $4, $5, $6)",
            hash.as_slice(),
            action.as_str(),
            target,
            by,
            now,
            now + LIFETIME
        )
        .execute(tx.conn())
        .await?;
        let details = json!({"action": action.as_str()});
        let entry = audit::Entry { actor: by, action: "approval.create", target, details, request_id: None };
        audit::record_platform(tx.conn(), entry).await
    }
    .await;
    tx.finish(work).await?;
    Ok(token)
}

/// Uses an approval up; `false` when it is none, for something else, expired or used.
///
/// # Errors
/// Those of the database.
pub async fn take(app: &App, action: Action, target: &str, token: &str, by: &str) -> Result<bool, DbError> {
    if !opaque::CHALLENGE_TOKEN.is_well_formed(token) {
        return Ok(false);
    }
    let hash = hash(app, token);
    let done = sqlx::query!(
        "update platform.admin_approvals set used_at = $4, used_by = $5
         where token_hash = $1 and action = $2 and target = $3 and used_at is null and expires_at > $4",
        hash.as_slice(),
        action.as_str(),
        target,
        app.clock.now(),
        by
    )
    .execute(&app.db.sys)
    .await?;
    Ok(done.rows_affected() == 1)
}

fn hash(app: &App, token: &str) -> [u8; 32] {
    app.secrets.peppered("admin_approval", token)
}
