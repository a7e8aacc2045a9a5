//! `admin api-key …`: a tenant's keys, for the hour when it cannot do it itself.

use cvault_types::TenantId;
use serde_json::{Value, json};

use super::run::cli;
use super::{AdminError, ApiKeyCommand};
use crate::app::App;
use crate::auth::api_keys;
use crate::tenants;

pub(super) async fn run(app: &App, command: ApiKeyCommand) -> Result<Value, AdminError> {
    match command {
        ApiKeyCommand::List { tenant } => {
            exists(app, tenant).await?;
            let mut tx = app.db.tenancy.begin(tenant).await?;
            let found = api_keys::list(&mut tx).await;
            Ok(json!({"api_keys": tx.finish(found).await?}))
        }
        ApiKeyCommand::Revoke { tenant, id } => {
            let mut tx = app.db.tenancy.begin(tenant).await?;
            let work = api_keys::revoke(&mut tx, id, &cli(), app.clock.now()).await;
            tx.finish(work).await?;
            Ok(json!({"api_key_id": id, "status": "revoked"}))
        }
    }
}

async fn exists(app: &App, tenant: TenantId) -> Result<(), AdminError> {
    tenants::get(app, tenant).await?;
    Ok(())
}
