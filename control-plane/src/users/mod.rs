//! A tenant's end users.

use cvault_types::UserId;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::auth::email::Email;
use crate::db::DbError;
use crate::tenancy::TenantTx;

#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    #[error("the tenant has a user with this e-mail address")]
    EmailTaken,
    #[error("the tenant has {used} of {max} users")]
    LimitExceeded { max: i64, used: i64 },
    #[error(transparent)]
    Db(#[from] DbError),
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
/// [`RegisterError::EmailTaken`], [`RegisterError::LimitExceeded`], or the database's.
pub async fn register(
    tx: &mut TenantTx,
    email: &Email,
    password_hash: &str,
    now: OffsetDateTime,
) -> Result<UserId, RegisterError> {
    let tenant = tx.tenant().uuid();
    // "no key": foreign keys of other transactions to this tenant do not wait
    let limit =
        sqlx::query_scalar!("select user_limit from cvault.tenants where tenant_id = $1 for no key update", tenant)
            .fetch_one(tx.conn())
            .await
            .map_err(DbError::from)?;
    if email_exists(tx, email).await? {
        return Err(RegisterError::EmailTaken);
    }
    if let Some(max) = limit.map(i64::from) {
        let used = sqlx::query_scalar!(r#"select count(*) as "count!" from cvault.users where tenant_id = $1"#, tenant)
            .fetch_one(tx.conn())
            .await
            .map_err(DbError::from)?;
        if used >= max {
            return Err(RegisterError::LimitExceeded { max, used });
        }
    }
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
