//! What changes an account: its address verified, its password chosen anew, its sessions ended. Each in one transaction with
//! its audit entry, its mail, and the answer that is kept for a retry.

use std::net::IpAddr;

use cvault_types::{PortalSessionId, RequestId, Secret, TenantAdminId, TenantId};
use rand::CryptoRng;
use serde_json::json;
use time::Duration;

use super::accounts;
use super::links::{self, Purpose};
use super::sessions::{self, End};
use crate::app::App;
use crate::audit;
use crate::auth::email::Email;
use crate::auth::events::{self, AdminEvent, AuthKind, Outcome};
use crate::db::DbError;
use crate::http::Portal;
use crate::mail::{self, Data, EnqueueError, Kind, Mail};
use crate::tenancy::TenantTx;

/// How long the news of a changed password is news.
const NEWS_FOR: Duration = Duration::days(3);

/// Who asks, as far as it is known.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    pub ip: Option<IpAddr>,
    pub request_id: RequestId,
}

/// Mails a link to choose a new password, if the address has an account that may log in.
///
/// # Errors
/// [`EnqueueError::Full`] when the mail server has been away for long.
pub async fn send_reset(
    app: &App,
    email: &Email,
    caller: Caller,
    rng: &mut impl CryptoRng,
) -> Result<(), EnqueueError> {
    let Some(owner) = accounts::find(&app.db.sys, email).await? else { return Ok(()) };
    let mut tx = app.db.tenancy.begin(owner.tenant).await?;
    let work = async {
        if accounts::load(&mut tx, owner.admin).await?.is_some_and(|account| account.active) {
            links::send(&mut tx, app, owner.admin, email, Purpose::ResetPassword, rng).await?;
            note(&mut tx, "anonymous", "password.reset_request", owner.admin, caller.request_id).await?;
        }
        Ok(())
    }
    .await;
    tx.finish(work).await
}

/// # Errors
/// As [`send_reset`].
pub async fn resend_verification(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    rng: &mut impl CryptoRng,
) -> Result<(), EnqueueError> {
    let account = accounts::load(tx, portal.admin).await?.filter(|account| !account.email_verified);
    if let Some(email) = account.and_then(|account| Email::parse(&account.email)) {
        links::send(tx, app, portal.admin, &email, Purpose::VerifyEmail, rng).await?;
        note(tx, &portal.actor(), "email.verify_request", portal.admin, portal.request_id).await?;
    }
    Ok(())
}

/// `false`: the link is of no use.
///
/// # Errors
/// Those of the database.
pub async fn verify_email(app: &App, tenant: TenantId, token: &Secret, caller: Caller) -> Result<bool, DbError> {
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let Some(link) = links::take(&mut tx, app, token, Purpose::VerifyEmail).await? else {
        tx.rollback().await?;
        return Ok(false);
    };
    let done = accounts::set_email_verified(&mut tx, link.admin, &link.email, app.clock.now()).await?;
    let outcome = if done { Outcome::Success } else { Outcome::Failure };
    event(&mut tx, AuthKind::PortalEmailVerify, outcome, link.admin, caller).await?;
    note(&mut tx, &link.admin.to_string(), "email.verify", link.admin, caller.request_id).await?;
    tx.commit().await?;
    Ok(done)
}

/// Ends every session too. `false`: the link is of no use.
///
/// # Errors
/// As [`send_reset`].
pub async fn reset_password(
    app: &App,
    tenant: TenantId,
    token: &Secret,
    password_hash: &str,
    caller: Caller,
) -> Result<bool, EnqueueError> {
    let now = app.clock.now();
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let work = async {
        let Some(link) = links::take(&mut tx, app, token, Purpose::ResetPassword).await? else { return Ok(false) };
        accounts::set_password(&mut tx, link.admin, password_hash, now).await?;
        // whoever opened the link reads the address
        accounts::set_email_verified(&mut tx, link.admin, &link.email, now).await?;
        links::use_up(&mut tx, link.admin, Purpose::ChangeEmail, now).await?;
        sessions::end_all(&mut tx, link.admin, None, End::PasswordChanged, now).await?;
        event(&mut tx, AuthKind::PortalPasswordReset, Outcome::Success, link.admin, caller).await?;
        note(&mut tx, &link.admin.to_string(), "password.reset", link.admin, caller.request_id).await?;
        tell(&mut tx, app, link.admin).await?;
        Ok(true)
    }
    .await;
    tx.finish(work).await
}

/// Ends every other session, and every link to choose yet another password or address.
///
/// # Errors
/// As [`send_reset`].
pub async fn change_password(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    password_hash: &str,
    ip: Option<IpAddr>,
) -> Result<(), EnqueueError> {
    let now = app.clock.now();
    let caller = Caller { ip, request_id: portal.request_id };
    accounts::set_password(tx, portal.admin, password_hash, now).await?;
    links::use_up(tx, portal.admin, Purpose::ResetPassword, now).await?;
    links::use_up(tx, portal.admin, Purpose::ChangeEmail, now).await?;
    sessions::end_all(tx, portal.admin, Some(portal.session), End::PasswordChanged, now).await?;
    event(tx, AuthKind::PortalPasswordChange, Outcome::Success, portal.admin, caller).await?;
    note(tx, &portal.actor(), "password.change", portal.admin, caller.request_id).await?;
    tell(tx, app, portal.admin).await
}

/// `false`: the caller has no such session.
///
/// # Errors
/// Those of the database.
pub async fn revoke_session(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    session: PortalSessionId,
) -> Result<bool, DbError> {
    if !sessions::belongs_to(tx, session.uuid(), portal.admin).await? {
        return Ok(false);
    }
    if sessions::end(tx, session.uuid(), End::Revoked, app.clock.now()).await? {
        let (actor, target) = (portal.actor(), session.to_string());
        audit::record(
            tx,
            audit::Entry {
                actor: &actor,
                action: "portal_session.revoke",
                target: &target,
                details: json!({}),
                request_id: Some(portal.request_id),
            },
        )
        .await?;
    }
    Ok(true)
}

/// # Errors
/// Those of the database.
pub async fn revoke_others(tx: &mut TenantTx, app: &App, portal: &Portal) -> Result<(), DbError> {
    sessions::end_all(tx, portal.admin, Some(portal.session), End::Revoked, app.clock.now()).await?;
    note(tx, &portal.actor(), "portal_session.revoke_others", portal.admin, portal.request_id).await
}

/// Mails somebody that their password is another one now, and where to change that.
async fn tell(tx: &mut TenantTx, app: &App, admin: TenantAdminId) -> Result<(), EnqueueError> {
    let account = accounts::load(tx, admin).await?;
    let Some(to) = account.and_then(|account| Email::parse(&account.email)) else { return Ok(()) };
    let now = app.clock.now();
    let link = Secret::new(format!("{}/portal/reset-password", app.config.public_url));
    let mail = Mail { to, kind: Kind::PasswordChanged, data: Data { link, valid_until: now + NEWS_FOR } };
    mail::enqueue(tx, &app.keys, &mail, now).await.map(drop)
}

pub(super) async fn event(
    tx: &mut TenantTx,
    kind: AuthKind,
    outcome: Outcome,
    admin: TenantAdminId,
    caller: Caller,
) -> Result<(), DbError> {
    let Caller { ip, request_id } = caller;
    events::record_admin(tx, AdminEvent { kind, outcome, admin: Some(admin), client_ip: ip, request_id }).await
}

pub(super) async fn note(
    tx: &mut TenantTx,
    actor: &str,
    action: &'static str,
    admin: TenantAdminId,
    request_id: RequestId,
) -> Result<(), DbError> {
    let target = admin.to_string();
    let entry = audit::Entry { actor, action, target: &target, details: json!({}), request_id: Some(request_id) };
    audit::record(tx, entry).await
}
