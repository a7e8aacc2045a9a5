//! `admin api-key …`: a tenant's keys, for the hour when it cannot do it itself.

use cvault_types::api_key::{ApiKey, CreateApiKey};
use cvault_types::{Secret, TenantId};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use time::Duration;
use time::format_description::well_known::Rfc3339;

use super::audit::moment;
use super::run::{cli, refused};
use super::{AdminError, ApiKeyCommand};
use crate::app::App;
use crate::auth::api_keys::{self, KeySettings};
use crate::tenants;

pub(super) async fn run(app: &App, command: ApiKeyCommand) -> Result<Value, AdminError> {
    match command {
        ApiKeyCommand::List { tenant } => {
            exists(app, tenant).await?;
            let mut tx = app.db.tenancy.begin(tenant).await?;
            let found = api_keys::list(&mut tx).await;
            Ok(json!({"api_keys": tx.finish(found).await?}))
        }
        ApiKeyCommand::Create { tenant, name, scopes, expires_at } => {
            let now = app.clock.now();
            let expires_at = moment(expires_at)?;
            let settings = KeySettings::parse(CreateApiKey { name, scopes, expires_at }, now).map_err(refused)?;
            let mut tx = app.db.tenancy.begin(tenant).await?;
            let mut rng = StdRng::from_os_rng();
            let work = api_keys::add(&mut tx, &app.secrets, &settings, &cli(), now, &mut rng).await;
            Ok(shown(tx.finish(work).await?))
        }
        ApiKeyCommand::Regenerate { tenant, id, grace } => {
            let (now, grace) = (app.clock.now(), Duration::seconds(grace.into()));
            let mut tx = app.db.tenancy.begin(tenant).await?;
            let mut rng = StdRng::from_os_rng();
            let work = api_keys::regenerate(&mut tx, &app.secrets, Some(id), grace, &cli(), now, &mut rng).await;
            Ok(shown(tx.finish(work).await?))
        }
        ApiKeyCommand::Revoke { tenant, id } => {
            let mut tx = app.db.tenancy.begin(tenant).await?;
            let work = api_keys::revoke(&mut tx, id, &cli(), app.clock.now()).await;
            tx.finish(work).await?;
            Ok(json!({"api_key_id": id, "status": "revoked"}))
        }
    }
}

fn shown((key, secret): (ApiKey, Secret)) -> Value {
    json!({"api_key_id": key.id, "name": key.name, "api_key": key.api_key, "api_secret": secret.expose(), "scopes": key.scopes,
           "expires_at": key.expires_at.and_then(|at| at.format(&Rfc3339).ok())})
}

async fn exists(app: &App, tenant: TenantId) -> Result<(), AdminError> {
    tenants::get(app, tenant).await?;
    Ok(())
}
