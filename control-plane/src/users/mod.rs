//! A tenant's end users: registering, finding, vouching for, disabling, deleting.

mod change;
mod delete;
mod read;
mod vouch;

use cvault_types::UserId;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::auth::email::Email;
use crate::db::DbError;
use crate::devices::{DeviceName, Fault};
use crate::tenancy::TenantTx;

pub use change::{UpdateError, UserChange, update};
pub use delete::{DeleteError, delete, finish_deletions};
pub use read::{Filter, find, list};
pub use vouch::{VouchError, Vouched, vouch};

#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    #[error("the tenant has a user with this e-mail address")]
    EmailTaken,
    #[error("the tenant has {used} of {max} users")]
    LimitExceeded { max: i64, used: i64 },
    #[error("the tenant is suspended or deleted")]
    TenantClosed,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Why there is no room for another user.
#[derive(Debug, thiserror::Error)]
enum RoomError {
    #[error("the tenant has {used} of {max} users")]
    LimitExceeded { max: i64, used: i64 },
    #[error("the tenant is suspended or deleted")]
    TenantClosed,
    #[error(transparent)]
    Db(#[from] DbError),
}

impl From<RoomError> for RegisterError {
    fn from(error: RoomError) -> Self {
        match error {
            RoomError::LimitExceeded { max, used } => Self::LimitExceeded { max, used },
            RoomError::TenantClosed => Self::TenantClosed,
            RoomError::Db(error) => Self::Db(error),
        }
    }
}

/// A tenant's own name for a user: 1 to 255 characters that a person can read, none of them space at the ends. Told apart
/// by every byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalId(String);

impl ExternalId {
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let name = DeviceName::parse(text)?;
        if name.as_str() == text {
            Ok(Self(text.to_owned()))
        } else {
            Err(Fault { code: "invalid_format", detail: "must not begin or end with space" })
        }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a login needs to know of a user.
#[derive(Debug)]
pub struct Login {
    pub user: UserId,
    pub password_hash: Option<String>,
    pub active: bool,
}

/// Adds a user. The tenant's row is locked until the transaction ends, so that racing registrations cannot pass the
/// limit together.
///
/// # Errors
/// By variant.
pub async fn register(
    tx: &mut TenantTx,
    email: &Email,
    password_hash: &str,
    now: OffsetDateTime,
) -> Result<UserId, RegisterError> {
    if email_exists(tx, email).await? {
        return Err(RegisterError::EmailTaken);
    }
    lock_for_new_user(tx).await?;
    let tenant = tx.tenant().uuid();
    let user = UserId::from_uuid(Uuid::now_v7());
    sqlx::query!(
        "insert into cvault.users (tenant_id, user_id, email, password_hash, created_at) values ($1, $2, $3, $4, $5)",
        tenant,
        user.uuid(),
        email.as_str(),
        password_hash,
        now
    )
    .execute(tx.conn())
    .await
    .map_err(|error| {
        let error = DbError::from(error);
        if error.constraint() == Some("users_email_unique") { RegisterError::EmailTaken } else { error.into() }
    })?;
    Ok(user)
}

/// Locks the tenant's row until the transaction ends, and checks that it is open and has room for one more user: it may have
/// been suspended or deleted since the request was let in, and nothing looks for users of a deleted one.
async fn lock_for_new_user(tx: &mut TenantTx) -> Result<(), RoomError> {
    // who would wait only to be refused is refused now
    check_room(tx).await?;
    let tenant = tx.tenant().uuid();
    // "no key": foreign keys of other transactions to this tenant do not wait
    sqlx::query!("select tenant_id from cvault.tenants where tenant_id = $1 for no key update", tenant)
        .fetch_one(tx.conn())
        .await
        .map_err(DbError::from)?;
    check_room(tx).await
}

async fn check_room(tx: &mut TenantTx) -> Result<(), RoomError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select t.status in ('active', 'trial') as "open!", t.user_limit, case when t.user_limit is not null then (
                      select count(*) from cvault.users u
                      where u.tenant_id = t.tenant_id and u.status <> 'deleted' and u.deleting_since is null) end as used
           from cvault.tenants t where t.tenant_id = $1"#,
        tenant
    )
    .fetch_one(tx.conn())
    .await
    .map_err(DbError::from)?;
    if !row.open {
        return Err(RoomError::TenantClosed);
    }
    match (row.user_limit.map(i64::from), row.used) {
        (Some(max), Some(used)) if used >= max => Err(RoomError::LimitExceeded { max, used }),
        _ => Ok(()),
    }
}

/// Whether the tenant has a user with this address.
///
/// # Errors
/// Those of the database.
pub async fn email_exists(tx: &mut TenantTx, email: &Email) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    Ok(sqlx::query_scalar!(
        r#"select exists (select from cvault.users where tenant_id = $1 and email = $2) as "exists!""#,
        tenant,
        email.as_str()
    )
    .fetch_one(tx.conn())
    .await?)
}

/// # Errors
/// Those of the database.
pub async fn find_login(tx: &mut TenantTx, email: &Email) -> Result<Option<Login>, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        "select user_id, password_hash, status from cvault.users where tenant_id = $1 and email = $2",
        tenant,
        email.as_str()
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(|row| Login {
        user: UserId::from_uuid(row.user_id),
        password_hash: row.password_hash,
        active: row.status == "active",
    }))
}

/// Stores a password's new hash, unless the password has been changed meanwhile.
///
/// # Errors
/// Those of the database.
pub async fn replace_hash(tx: &mut TenantTx, user: UserId, old: &str, new: &str) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.users set password_hash = $4 where tenant_id = $1 and user_id = $2 and password_hash = $3",
        tenant,
        user.uuid(),
        old,
        new
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Whether the user exists and may log in; it stays so until the transaction ends.
///
/// # Errors
/// Those of the database.
pub async fn hold_active(tx: &mut TenantTx, user: UserId) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    let found = sqlx::query!(
        "select user_id from cvault.users where tenant_id = $1 and user_id = $2 and status = 'active' for share",
        tenant,
        user.uuid()
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(found.is_some())
}

/// Whether the user exists and may log in.
///
/// # Errors
/// Those of the database.
pub async fn is_active(tx: &mut TenantTx, user: UserId) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    Ok(sqlx::query_scalar!(
        r#"select exists (select from cvault.users where tenant_id = $1 and user_id = $2 and status = 'active') as "active!""#,
        tenant,
        user.uuid()
    )
    .fetch_one(tx.conn())
    .await?)
}
