//! Self-service: a tenant with its data key and first API key, the account of its owner, and a first login, in one
//! transaction. Nobody of the platform is needed between the form and a working tunnel.

use cvault_types::tenant::Tenant;
use cvault_types::{TenantAdminId, TenantId, TenantRole};
use rand::CryptoRng;
use serde_json::json;
use uuid::Uuid;

use super::accounts::{self, CreateError};
use super::links::{self, Purpose};
use super::sessions::{self, How, NewSession, Seen};
use crate::app::App;
use crate::audit;
use crate::auth::api_keys::NewKey;
use crate::auth::email::Email;
use crate::auth::events::{self, AdminEvent, AuthKind, Outcome};
use crate::db::DbError;
use crate::http::context;
use crate::mail::EnqueueError;
use crate::tenants::{self, Actor, Settings, TenantError};

/// A form that has been checked.
#[derive(Debug)]
pub struct Form {
    pub settings: Settings,
    pub email: Email,
    pub password_hash: String,
}

/// What was made.
#[derive(Debug)]
pub struct SignedUp {
    pub tenant: Tenant,
    pub key: NewKey,
    pub admin: TenantAdminId,
    pub session: NewSession,
}

#[derive(Debug, thiserror::Error)]
pub enum SignupError {
    #[error(transparent)]
    Account(#[from] CreateError),
    #[error(transparent)]
    Tenant(#[from] TenantError),
    #[error(transparent)]
    Mail(#[from] EnqueueError),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Its address is verified by a mailed link, which nothing waits for.
///
/// # Errors
/// [`CreateError::EmailTaken`], or the database's.
pub async fn sign_up(
    app: &App,
    form: Form,
    how: How,
    seen: &Seen,
    rng: &mut impl CryptoRng,
) -> Result<SignedUp, SignupError> {
    let request_id = context::request_id();
    let mut tx = app.db.tenancy.begin(TenantId::from_uuid(Uuid::now_v7())).await?;
    let work = async {
        let actor = Actor { name: "signup".to_owned(), request_id: Some(request_id) };
        let (tenant, key) = tenants::create_in(&mut tx, app, form.settings, &actor, rng).await?;
        let now = app.clock.now();
        let admin = accounts::create(&mut tx, &form.email, Some(&form.password_hash), TenantRole::Owner, now).await?;
        let target = admin.to_string();
        let details = json!({"role": TenantRole::Owner});
        let entry = audit::Entry {
            actor: &actor.name,
            action: "tenant_admin.create",
            target: &target,
            details,
            request_id: actor.request_id,
        };
        audit::record(&mut tx, entry).await?;
        let event = AdminEvent {
            kind: AuthKind::PortalSignup,
            outcome: Outcome::Success,
            admin: Some(admin),
            client_ip: seen.ip,
            request_id,
        };
        events::record_admin(&mut tx, event).await?;
        links::send(&mut tx, app, admin, &form.email, Purpose::VerifyEmail, rng).await?;
        let session = sessions::open(&mut tx, app, admin, how, seen, rng).await?;
        Ok(SignedUp { tenant, key, admin, session })
    }
    .await;
    tx.finish(work).await
}
