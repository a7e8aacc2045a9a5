//! Links mailed to people: verify an address, choose a new password, change the address. Each is good once, for a while.
//!
//! The token stands behind a `#`: browsers do not send it to servers, so that it is in no log on the way.

use cvault_types::{ErrorCode, Secret, TenantAdminId, TenantId};
use rand::CryptoRng;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::app::App;
use crate::auth::email::Email;
use crate::auth::opaque;
use crate::db::DbError;
use crate::http::{Portal, Problem};
use crate::keys::PlatformSecrets;
use crate::mail::{self, Data, EnqueueError, Kind, Mail};
use crate::tenancy::TenantTx;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    VerifyEmail,
    ResetPassword,
    /// The address that the account is to have.
    ChangeEmail,
}

/// Whom a link was mailed to.
#[derive(Debug)]
pub struct Used {
    pub admin: TenantAdminId,
    pub email: String,
    /// The session that asked for another address.
    pub session: Option<Uuid>,
}

impl Purpose {
    const fn as_str(self) -> &'static str {
        match self {
            Self::VerifyEmail => "verify_email",
            Self::ResetPassword => "reset_password",
            Self::ChangeEmail => "change_email",
        }
    }

    const fn lifetime(self) -> Duration {
        match self {
            Self::VerifyEmail => Duration::days(7),
            Self::ResetPassword | Self::ChangeEmail => Duration::hours(1),
        }
    }

    const fn page(self) -> &'static str {
        match self {
            Self::VerifyEmail => "verify-email",
            Self::ResetPassword => "reset-password",
            Self::ChangeEmail => "change-email",
        }
    }

    const fn mail(self) -> Kind {
        match self {
            Self::VerifyEmail => Kind::VerifyEmail,
            Self::ResetPassword => Kind::ResetPassword,
            Self::ChangeEmail => Kind::ChangeEmail,
        }
    }
}

/// Mails a link when the transaction is committed. Earlier links of the same purpose are worth nothing from then on.
///
/// # Errors
/// [`EnqueueError::Full`] when the mail server has been away for long.
pub async fn send(
    tx: &mut TenantTx,
    app: &App,
    admin: TenantAdminId,
    email: &Email,
    purpose: Purpose,
    rng: &mut impl CryptoRng,
) -> Result<(), EnqueueError> {
    send_for(tx, app, admin, email, purpose, None, rng).await
}

/// Mails the link that gives the account of `asking` another address, as [`send`] does.
///
/// # Errors
/// As [`send`].
pub async fn send_change(
    tx: &mut TenantTx,
    app: &App,
    asking: &Portal,
    email: &Email,
    rng: &mut impl CryptoRng,
) -> Result<(), EnqueueError> {
    send_for(tx, app, asking.admin, email, Purpose::ChangeEmail, Some(asking.session), rng).await
}

async fn send_for(
    tx: &mut TenantTx,
    app: &App,
    admin: TenantAdminId,
    email: &Email,
    purpose: Purpose,
    session: Option<Uuid>,
    rng: &mut impl CryptoRng,
) -> Result<(), EnqueueError> {
    let (tenant, now) = (tx.tenant().uuid(), app.clock.now());
    use_up(tx, admin, purpose, now).await?;
    let token = opaque::LINK.draw(rng);
    let hash = hash(&app.secrets, &token);
    let valid_until = now + purpose.lifetime();
    sqlx::query!(
        "insert into cvault.portal_links
             (tenant_id, token_hash, admin_id, purpose, email, created_at, expires_at, session_id)
         values ($1, $2, $3, $4, $5, $6, $7, $8)",
        tenant,
        hash.as_slice(),
        admin.uuid(),
        purpose.as_str(),
        email.as_str(),
        now,
        valid_until,
        session
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    let link = Secret::new(format!("{}/portal/{}#token={}", app.config.public_url, purpose.page(), token.expose()));
    let mail = Mail { to: email.clone(), kind: purpose.mail(), data: Data { link, valid_until } };
    mail::enqueue(tx, &app.keys, &mail, now).await.map(drop)
}

/// Ends the links of one purpose that somebody has been mailed.
///
/// # Errors
/// Those of the database.
pub async fn use_up(
    tx: &mut TenantTx,
    admin: TenantAdminId,
    purpose: Purpose,
    now: OffsetDateTime,
) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.portal_links set used_at = $4
         where tenant_id = $1 and admin_id = $2 and purpose = $3 and used_at is null",
        tenant,
        admin.uuid(),
        purpose.as_str(),
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// What is answered to a link that is good for nothing.
#[must_use]
pub fn invalid() -> Problem {
    Problem::new(ErrorCode::InvalidToken)
        .detail("The link is used, replaced by a newer one, or expired. Ask for a new one.")
}

/// The tenant whose link this is, with role `cvault_sys`.
///
/// # Errors
/// Those of the database.
pub async fn tenant_of(app: &App, token: &Secret) -> Result<Option<TenantId>, DbError> {
    if !opaque::LINK.is_well_formed(token.expose()) {
        return Ok(None);
    }
    let hash = hash(&app.secrets, token);
    let tenant =
        sqlx::query_scalar!("select tenant_id from cvault.portal_links where token_hash = $1 limit 1", hash.as_slice())
            .fetch_optional(&app.db.sys)
            .await?;
    Ok(tenant.map(TenantId::from_uuid))
}

/// Uses the link up. `None`: used, replaced or expired.
///
/// # Errors
/// Those of the database.
pub async fn take(tx: &mut TenantTx, app: &App, token: &Secret, purpose: Purpose) -> Result<Option<Used>, DbError> {
    let tenant = tx.tenant().uuid();
    let hash = hash(&app.secrets, token);
    let row = sqlx::query!(
        "update cvault.portal_links set used_at = $4
         where tenant_id = $1 and token_hash = $2 and purpose = $3 and used_at is null and expires_at > $4
         returning admin_id, email, session_id",
        tenant,
        hash.as_slice(),
        purpose.as_str(),
        app.clock.now()
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(|row| Used { admin: TenantAdminId::from_uuid(row.admin_id), email: row.email, session: row.session_id }))
}

fn hash(secrets: &PlatformSecrets, token: &Secret) -> [u8; 32] {
    secrets.peppered("portal_link", token.expose())
}
