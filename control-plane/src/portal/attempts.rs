//! Attempts at accounts that may not exist: the same row whether they do or not, so that neither the answer nor its time
//! tells. The address is kept as a digest: what is typed into that field is sometimes a password.

use std::net::IpAddr;

use cvault_types::{RequestId, TenantId};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::auth::events::Outcome;
use crate::auth::throttle::Account;
use crate::db::DbError;
use crate::portal::accounts::Owner;

#[derive(Debug, Clone, Copy)]
pub enum AttemptKind {
    Signup,
    Login,
    PasswordReset,
}

impl AttemptKind {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Signup => "signup",
            Self::Login => "login",
            Self::PasswordReset => "password_reset",
        }
    }
}

/// What was tried at an account, and how it ended.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    pub kind: AttemptKind,
    pub outcome: Outcome,
    pub account: Account,
    pub client_ip: Option<IpAddr>,
}

/// The account of an address, of whatever tenant.
#[must_use]
pub fn account(email: &str) -> Account {
    Account::of(TenantId::from_uuid(Uuid::nil()), email)
}

/// # Errors
/// Those of the database.
pub async fn record(sys: &PgPool, attempt: Attempt, request_id: RequestId, now: OffsetDateTime) -> Result<(), DbError> {
    let account = attempt.account.bytes();
    sqlx::query!(
        "insert into platform.portal_attempts (attempt_id, at, account, kind, outcome, client_ip, request_id)
         values ($1, $2, $3, $4, $5, $6, $7)",
        Uuid::now_v7(),
        now,
        account.as_slice(),
        attempt.kind.as_str(),
        attempt.outcome.as_str(),
        attempt.client_ip.map(ipnet::IpNet::from),
        request_id.uuid()
    )
    .execute(sys)
    .await?;
    Ok(())
}

/// Logins at somebody's account that have failed since `since`.
///
/// # Errors
/// Those of the database.
pub async fn recent_failures(sys: &PgPool, who: Owner, since: OffsetDateTime) -> Result<u32, DbError> {
    let email = sqlx::query_scalar!(
        "select email from cvault.tenant_admins where tenant_id = $1 and admin_id = $2",
        who.tenant.uuid(),
        who.admin.uuid()
    )
    .fetch_optional(sys)
    .await?;
    let Some(email) = email else { return Ok(0) };
    let account = account(&email).bytes();
    let count = sqlx::query_scalar!(
        r#"select count(*) as "count!" from platform.portal_attempts
           where account = $1 and at >= $2 and kind = 'login' and outcome = 'failure'"#,
        account.as_slice(),
        since
    )
    .fetch_one(sys)
    .await?;
    Ok(u32::try_from(count).unwrap_or(u32::MAX))
}
