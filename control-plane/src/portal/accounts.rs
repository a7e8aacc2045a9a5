//! Accounts of people who use the portal. An address belongs to one account of the whole platform.

use cvault_types::{TenantAdminId, TenantId, TenantRole};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::auth::email::Email;
use crate::db::DbError;
use crate::tenancy::TenantTx;

/// An account as its own tenant sees it.
#[derive(Debug)]
pub struct Account {
    pub id: TenantAdminId,
    pub email: String,
    pub email_verified: bool,
    pub role: TenantRole,
    pub active: bool,
    pub password_hash: Option<String>,
    pub password_changed_at: Option<OffsetDateTime>,
}

/// Whose an address is.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    pub tenant: TenantId,
    pub admin: TenantAdminId,
}

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("somebody has an account with this e-mail address")]
    EmailTaken,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// The accounts of the transaction's tenant, oldest first.
///
/// # Errors
/// Those of the database.
pub async fn list(tx: &mut TenantTx) -> Result<Vec<Account>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query_scalar!(
        "select admin_id from cvault.tenant_admins where tenant_id = $1 order by admin_id limit 1000",
        tenant
    )
    .fetch_all(tx.conn())
    .await?;
    let mut accounts = Vec::new();
    for admin in rows {
        accounts.extend(load(tx, TenantAdminId::from_uuid(admin)).await?);
    }
    Ok(accounts)
}

/// Lets somebody log in again, or no more. Their sessions are the caller's to end.
///
/// # Errors
/// Those of the database.
pub async fn set_active(tx: &mut TenantTx, admin: TenantAdminId, active: bool) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.tenant_admins set status = case when $3 then 'active' else 'disabled' end
         where tenant_id = $1 and admin_id = $2",
        tenant,
        admin.uuid(),
        active
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Looks across tenants, with role `cvault_sys`.
///
/// # Errors
/// Those of the database.
pub async fn find(sys: &PgPool, email: &Email) -> Result<Option<Owner>, DbError> {
    let row = sqlx::query!("select tenant_id, admin_id from cvault.tenant_admins where email = $1", email.as_str())
        .fetch_optional(sys)
        .await?;
    Ok(row
        .map(|row| Owner { tenant: TenantId::from_uuid(row.tenant_id), admin: TenantAdminId::from_uuid(row.admin_id) }))
}

/// # Errors
/// Those of the database.
pub async fn load(tx: &mut TenantTx, admin: TenantAdminId) -> Result<Option<Account>, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select email, email_verified_at is not null as "email_verified!", role, status, password_hash,
                  password_changed_at
           from cvault.tenant_admins where tenant_id = $1 and admin_id = $2"#,
        tenant,
        admin.uuid()
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(|row| Account {
        id: admin,
        email: row.email,
        email_verified: row.email_verified,
        role: TenantRole::parse(&row.role).unwrap_or(TenantRole::Viewer),
        active: row.status == "active",
        password_hash: row.password_hash,
        password_changed_at: row.password_changed_at,
    }))
}

/// Whether the account is still as it was when its password was checked. Until the transaction ends nobody changes that
/// password, so that a change of it meets every login made with the old one.
///
/// # Errors
/// Those of the database.
pub async fn still_is(tx: &mut TenantTx, account: &Account) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        "select admin_id from cvault.tenant_admins
         where tenant_id = $1 and admin_id = $2 and status = 'active' and password_changed_at is not distinct from $3
         for no key update",
        tenant,
        account.id.uuid(),
        account.password_changed_at
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.is_some())
}

/// Adds an account to the transaction's tenant. Without a password nobody can log in to it until one is set.
///
/// # Errors
/// [`CreateError::EmailTaken`], also by another tenant's account.
pub async fn create(
    tx: &mut TenantTx,
    email: &Email,
    password_hash: Option<&str>,
    role: TenantRole,
    now: OffsetDateTime,
) -> Result<TenantAdminId, CreateError> {
    let admin = TenantAdminId::from_uuid(Uuid::now_v7());
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "insert into cvault.tenant_admins (tenant_id, admin_id, email, password_hash, role, password_changed_at, created_at)
         values ($1, $2, $3, $4, $5, $6, $6)",
        tenant,
        admin.uuid(),
        email.as_str(),
        password_hash,
        role.as_str(),
        now
    )
    .execute(tx.conn())
    .await
    .map_err(taken)?;
    Ok(admin)
}

fn taken(error: sqlx::Error) -> CreateError {
    let error = DbError::from(error);
    if error.constraint() == Some("tenant_admins_email") { CreateError::EmailTaken } else { error.into() }
}

/// # Errors
/// Those of the database.
pub async fn set_password(
    tx: &mut TenantTx,
    admin: TenantAdminId,
    password_hash: &str,
    now: OffsetDateTime,
) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.tenant_admins set password_hash = $3, password_changed_at = $4
         where tenant_id = $1 and admin_id = $2",
        tenant,
        admin.uuid(),
        password_hash,
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Gives an account that may log in another address, which somebody reads.
///
/// # Errors
/// [`CreateError::EmailTaken`], also by another tenant's account.
pub async fn set_email(
    tx: &mut TenantTx,
    admin: TenantAdminId,
    email: &str,
    now: OffsetDateTime,
) -> Result<(), CreateError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.tenant_admins set email = $3, email_verified_at = $4 where tenant_id = $1 and admin_id = $2",
        tenant,
        admin.uuid(),
        email,
        now
    )
    .execute(tx.conn())
    .await
    .map_err(taken)?;
    Ok(())
}

/// Stores a password's hash that was made anew, unless the password is another one by now.
///
/// # Errors
/// Those of the database.
pub async fn replace_hash(tx: &mut TenantTx, admin: TenantAdminId, old: &str, new: &str) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.tenant_admins set password_hash = $4
         where tenant_id = $1 and admin_id = $2 and password_hash = $3",
        tenant,
        admin.uuid(),
        old,
        new
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Whoever opened a link mailed to `email` reads it; an address that was changed meanwhile proves nothing.
///
/// # Errors
/// Those of the database.
pub async fn set_email_verified(
    tx: &mut TenantTx,
    admin: TenantAdminId,
    email: &str,
    now: OffsetDateTime,
) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    let done = sqlx::query!(
        "update cvault.tenant_admins set email_verified_at = coalesce(email_verified_at, $4)
         where tenant_id = $1 and admin_id = $2 and email = $3 and status = 'active'",
        tenant,
        admin.uuid(),
        email,
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Removes every account of the transaction's tenant, with its sessions.
///
/// # Errors
/// Those of the database.
pub async fn delete_all(tx: &mut TenantTx) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!("delete from cvault.tenant_admins where tenant_id = $1", tenant).execute(tx.conn()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{World, waiting};

    #[tokio::test]
    async fn logins_that_replace_an_old_hash_at_the_same_time_come_one_after_the_other() {
        let world = World::new().await;
        let person = world.person().await;
        let email = Email::parse("owner@example.com").unwrap();
        let begin = async || world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let mut tx = begin().await;
        let admin = create(&mut tx, &email, Some("old"), TenantRole::Owner, world.app.clock.now()).await.unwrap();
        let checked = load(&mut tx, admin).await.unwrap().unwrap();
        tx.commit().await.unwrap();
        let (mut first, mut second, mut superuser) = (begin().await, begin().await, world.superuser().await);
        assert!(still_is(&mut first, &checked).await.unwrap());
        let late = async {
            assert!(still_is(&mut second, &checked).await.unwrap());
            replace_hash(&mut second, admin, "old", "new").await.unwrap();
            second.commit().await.unwrap();
        };
        let early = async {
            waiting(&mut superuser, 1).await;
            replace_hash(&mut first, admin, "old", "new").await.unwrap();
            first.commit().await.unwrap();
        };
        tokio::join!(late, early);
    }

    #[tokio::test]
    async fn a_password_that_was_changed_meanwhile_logs_nobody_in() {
        let world = World::new().await;
        let person = world.person().await;
        let now = world.app.clock.now();
        let email = Email::parse("owner@example.com").unwrap();
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let admin = create(&mut tx, &email, Some("old"), TenantRole::Owner, now).await.unwrap();
        let checked = load(&mut tx, admin).await.unwrap().unwrap();
        replace_hash(&mut tx, admin, "old", "old in another scheme").await.unwrap();
        assert!(still_is(&mut tx, &checked).await.unwrap(), "made anew, it is the same password");
        replace_hash(&mut tx, admin, "old", "older").await.unwrap();
        set_password(&mut tx, admin, "new", now + time::Duration::SECOND).await.unwrap();
        assert!(!still_is(&mut tx, &checked).await.unwrap());
        assert_eq!(load(&mut tx, admin).await.unwrap().unwrap().password_hash.as_deref(), Some("new"));
        tx.rollback().await.unwrap();
    }
}
