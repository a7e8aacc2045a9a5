//! `admin portal …`: the people of a tenant who use the portal.

use cvault_types::{TenantAdminId, TenantId, TenantRole};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use super::{AdminError, PortalCommand};
use crate::app::App;
use crate::audit;
use crate::auth::email::Email;
use crate::db::DbError;
use crate::mail::EnqueueError;
use crate::portal::accounts::{self, Owner};
use crate::portal::links::{self, Purpose};
use crate::portal::sessions::{self, End};
use crate::tenancy::TenantTx;
use crate::tenants::{self, TenantError};

pub(super) async fn run(app: &App, command: PortalCommand) -> Result<Value, AdminError> {
    match command {
        PortalCommand::List { tenant } => list(app, tenant).await,
        PortalCommand::Create { tenant, email } => {
            let to = parse(&email)?;
            let mut tx = app.db.tenancy.begin(tenant).await?;
            let work = create(&mut tx, app, &to).await;
            let admin = tx.finish(work).await?;
            Ok(json!({"admin_id": admin, "role": TenantRole::Owner, "mail": "waiting"}))
        }
        PortalCommand::Disable { email } => {
            let (owner, mut tx) = open(app, &email).await?;
            let work = async {
                accounts::set_active(&mut tx, owner.admin, false).await?;
                let ended = sessions::end_all(&mut tx, owner.admin, None, End::Revoked, app.clock.now()).await?;
                note(&mut tx, "tenant_admin.disable", owner.admin, json!({"sessions_ended": ended})).await?;
                Ok::<_, DbError>(ended)
            }
            .await;
            let ended = tx.finish(work).await?;
            Ok(json!({"admin_id": owner.admin, "status": "disabled", "sessions_ended": ended}))
        }
        PortalCommand::Enable { email } => {
            let (owner, mut tx) = open(app, &email).await?;
            let work = async {
                accounts::set_active(&mut tx, owner.admin, true).await?;
                note(&mut tx, "tenant_admin.enable", owner.admin, json!({})).await
            }
            .await;
            tx.finish(work).await?;
            Ok(json!({"admin_id": owner.admin, "status": "active"}))
        }
        PortalCommand::Reset { email } => {
            let (owner, mut tx) = open(app, &email).await?;
            let to = parse(&email)?;
            let work = async {
                let mut rng = StdRng::from_os_rng();
                links::send(&mut tx, app, owner.admin, &to, Purpose::ResetPassword, &mut rng).await?;
                note(&mut tx, "password.reset_request", owner.admin, json!({})).await?;
                Ok::<_, EnqueueError>(())
            }
            .await;
            tx.finish(work).await?;
            Ok(json!({"admin_id": owner.admin, "mail": "waiting"}))
        }
        PortalCommand::EndSessions { email } => {
            let (owner, mut tx) = open(app, &email).await?;
            let work = async {
                let ended = sessions::end_all(&mut tx, owner.admin, None, End::Revoked, app.clock.now()).await?;
                note(&mut tx, "portal_session.revoke_all", owner.admin, json!({"sessions_ended": ended})).await?;
                Ok::<_, DbError>(ended)
            }
            .await;
            Ok(json!({"admin_id": owner.admin, "sessions_ended": tx.finish(work).await?}))
        }
    }
}

/// An owner that has no password yet.
async fn create(tx: &mut TenantTx, app: &App, email: &Email) -> Result<TenantAdminId, AdminError> {
    if !tenants::hold(tx).await? {
        return Err(TenantError::NotFound.into());
    }
    let admin = accounts::create(tx, email, None, TenantRole::Owner, app.clock.now()).await?;
    links::send(tx, app, admin, email, Purpose::ResetPassword, &mut StdRng::from_os_rng()).await?;
    note(tx, "tenant_admin.create", admin, json!({"role": TenantRole::Owner})).await?;
    Ok(admin)
}

async fn list(app: &App, tenant: TenantId) -> Result<Value, AdminError> {
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let found = accounts::list(&mut tx).await;
    let rows: Vec<Value> = tx
        .finish(found)
        .await?
        .into_iter()
        .map(|account| {
            json!({"id": account.id, "email": account.email, "email_verified": account.email_verified,
                   "role": account.role, "status": if account.active { "active" } else { "disabled" }})
        })
        .collect();
    Ok(json!({"accounts": rows}))
}

fn parse(email: &str) -> Result<Email, AdminError> {
    Email::parse(email).ok_or_else(|| AdminError::Refused("this is no e-mail address".to_owned()))
}

/// The account of an address, and a transaction of its tenant.
async fn open(app: &App, email: &str) -> Result<(Owner, TenantTx), AdminError> {
    let owner = accounts::find(&app.db.sys, &parse(email)?).await?.ok_or(AdminError::NoAccount)?;
    Ok((owner, app.db.tenancy.begin(owner.tenant).await?))
}

async fn note(tx: &mut TenantTx, action: &'static str, admin: TenantAdminId, details: Value) -> Result<(), DbError> {
    let target = admin.to_string();
    audit::record(tx, audit::Entry { actor: "cli", action, target: &target, details, request_id: None }).await
}
