//! The catalogue audit: what must hold of the database's own catalogue before anything is served. `catalogue.sql` lists
//! violations, one object per row; the same audit runs in the tests after planting faults.

use cvault_types::TenantId;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::db::{Db, DbError};

/// Why this program must not serve from this database.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    #[error("tenants are not safely separated in this database: {}", .0.join("; "))]
    Violations(Vec<String>),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Passes when the catalogue has no violation, both pools log in as the roles they are meant for, and a tenant that does
/// not exist sees nothing.
///
/// # Errors
/// [`CatalogueError::Violations`] names each object.
pub async fn check(db: &Db) -> Result<(), CatalogueError> {
    let mut sys = db.sys.acquire().await.map_err(DbError::from)?;
    let mut found = violations(&mut sys).await?;
    found.extend(wrong_role(&mut sys, "CVAULT_DATABASE_SYS_URL", "cvault_sys").await?);
    let mut tx = db.tenancy.begin(TenantId::from_uuid(Uuid::new_v4())).await?;
    found.extend(wrong_role(tx.conn(), "DATABASE_URL", "cvault_app").await?);
    if found.is_empty() && strangers_see_rows(tx.conn()).await? {
        found.push("a tenant that does not exist sees rows".to_owned());
    }
    tx.rollback().await?;
    if found.is_empty() { Ok(()) } else { Err(CatalogueError::Violations(found)) }
}

/// The audit alone, on any connection that may read the catalogue and `platform.context_keys`.
///
/// # Errors
/// Those of the database.
pub async fn violations(conn: &mut PgConnection) -> Result<Vec<String>, DbError> {
    // not a checked query: the statement is shared with psql, and its only column is text
    Ok(sqlx::query_scalar(include_str!("catalogue.sql")).fetch_all(conn).await?)
}

async fn wrong_role(conn: &mut PgConnection, variable: &str, wanted: &str) -> Result<Option<String>, DbError> {
    let role = sqlx::query_scalar!(r#"select session_user::text as "role!""#).fetch_one(conn).await?;
    Ok((role != wanted).then(|| format!("{variable} logs in as {role}, not as {wanted}")))
}

async fn strangers_see_rows(conn: &mut PgConnection) -> Result<bool, DbError> {
    Ok(sqlx::query_scalar!(
        r#"select exists (select from cvault.tenants) or exists (select from cvault.devices) or cvault.tenant_id() is null as "sees!""#
    )
    .fetch_one(conn)
    .await?)
}

#[cfg(test)]
mod tests;
