//! The catalogue audit: what must hold of the database's own catalogue before anything is served. `catalogue.sql` lists
//! violations of rules, one object per row; `catalogue/surface.txt` is the exact list of functions (with the sum of their
//! text) and grants. The same audit runs in the tests after planting faults.
//!
//! After a change of a migration, `CVAULT_BLESS=1 cargo test -p cvault-control-plane catalogue` writes `surface.txt` anew;
//! its difference is what a reviewer reads.

use std::collections::BTreeSet;

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
    found.extend(activity_is_shown(tx.conn()).await?);
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
    // not checked queries: the statements are shared with psql, and their only column is text
    let mut found: Vec<String> = sqlx::query_scalar(include_str!("catalogue.sql")).fetch_all(&mut *conn).await?;
    let present = surface(conn).await?;
    let present: BTreeSet<&str> = present.iter().map(String::as_str).collect();
    let wanted: BTreeSet<&str> = include_str!("catalogue/surface.txt").lines().collect();
    found.extend(present.difference(&wanted).map(|line| format!("not known: {line}")));
    found.extend(wanted.difference(&present).map(|line| format!("missing: {line}")));
    Ok(found)
}

/// Every function and grant, one line each.
async fn surface(conn: &mut PgConnection) -> Result<Vec<String>, DbError> {
    // names of objects are shown as seen from the search path
    sqlx::raw_sql("set search_path = public, pg_catalog").execute(&mut *conn).await?;
    let lines = sqlx::query_scalar(include_str!("catalogue/surface.sql")).fetch_all(&mut *conn).await?;
    sqlx::raw_sql("reset search_path").execute(conn).await?;
    Ok(lines)
}

/// Other sessions of the same role would see what a tenant's transaction is running.
async fn activity_is_shown(conn: &mut PgConnection) -> Result<Option<String>, DbError> {
    let setting =
        sqlx::query_scalar!(r#"select current_setting('track_activities') as "setting!""#).fetch_one(conn).await?;
    Ok((setting != "off").then(|| {
        "track_activities is on for DATABASE_URL: as a superuser, `alter role cvault_app set track_activities = off`".to_owned()
    }))
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
