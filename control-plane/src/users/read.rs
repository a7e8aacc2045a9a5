//! Reading a tenant's users. Those that are deleted, or being so, are not there.

use cvault_types::UserId;
use cvault_types::user::{User, UserStatus};
use time::OffsetDateTime;
use uuid::Uuid;

use super::ExternalId;
use crate::auth::email::Email;
use crate::db::DbError;
use crate::tenancy::TenantTx;

/// Which users are asked for; `None`: any.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub email: Option<Email>,
    pub external_id: Option<ExternalId>,
}

struct Row {
    user_id: Uuid,
    external_user_id: Option<String>,
    email: Option<String>,
    status: String,
    created_at: OffsetDateTime,
    devices: i64,
}

impl From<Row> for User {
    fn from(row: Row) -> Self {
        Self {
            user_id: UserId::from_uuid(row.user_id),
            external_id: row.external_user_id,
            email: row.email,
            status: if row.status == "active" { UserStatus::Active } else { UserStatus::Disabled },
            devices: row.devices,
            created_at: row.created_at,
        }
    }
}

/// Up to `limit` users after the one named, oldest first.
///
/// # Errors
/// Those of the database.
pub async fn list(tx: &mut TenantTx, filter: &Filter, after: Option<UserId>, limit: u32) -> Result<Vec<User>, DbError> {
    let tenant = tx.tenant().uuid();
    let after = after.map_or(Uuid::nil(), UserId::uuid);
    if filter.email.is_some() || filter.external_id.is_some() {
        return named(tx, filter, after).await;
    }
    let rows = sqlx::query_as!(
        Row,
        r#"select u.user_id, u.external_user_id, u.email, u.status, u.created_at,
                  (select count(*) from cvault.devices d
                   where d.tenant_id = u.tenant_id and d.user_id = u.user_id and d.status = 'active') as "devices!"
           from cvault.users u
           where u.tenant_id = $1 and u.status <> 'deleted' and u.deleting_since is null and u.user_id > $2
           order by u.user_id limit $3"#,
        tenant,
        after,
        i64::from(limit)
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(User::from).collect())
}

/// The one user that the filter names, if it comes after `after`.
async fn named(tx: &mut TenantTx, filter: &Filter, after: Uuid) -> Result<Vec<User>, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query_as!(
        Row,
        r#"select u.user_id, u.external_user_id, u.email, u.status, u.created_at,
                  (select count(*) from cvault.devices d
                   where d.tenant_id = u.tenant_id and d.user_id = u.user_id and d.status = 'active') as "devices!"
           from cvault.users u
           where u.tenant_id = $1 and (u.email = $3 or u.external_user_id = $4) and u.status <> 'deleted' and u.deleting_since is null and u.user_id > $2
             and ($3::text is null or u.email = $3) and ($4::text is null or u.external_user_id = $4)"#,
        tenant,
        after,
        filter.email.as_ref().map(Email::as_str),
        filter.external_id.as_ref().map(ExternalId::as_str),
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(User::from).into_iter().collect())
}

/// # Errors
/// Those of the database.
pub async fn find(tx: &mut TenantTx, id: UserId) -> Result<Option<User>, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query_as!(
        Row,
        r#"select u.user_id, u.external_user_id, u.email, u.status, u.created_at,
                  (select count(*) from cvault.devices d
                   where d.tenant_id = u.tenant_id and d.user_id = u.user_id and d.status = 'active') as "devices!"
           from cvault.users u
           where u.tenant_id = $1 and u.user_id = $2 and u.status <> 'deleted' and u.deleting_since is null"#,
        tenant,
        id.uuid()
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(User::from))
}
