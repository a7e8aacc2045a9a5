//! The audit log: one row for each write, in the write's own transaction; chained afterwards by a periodic task.

mod chain;
mod of_tenant;
mod search;

use cvault_types::{RequestId, TenantId};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::db::DbError;
use crate::tenancy::TenantTx;

pub use chain::{Broken, chain_new, chains, verify_chain};
pub use of_tenant::{Wanted, list};
pub use search::{Filter, search};

/// What happened. Never put a secret, a key or a token into it.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// Who: `usr_…`, `key_…`, `admin:…`, `system`.
    pub actor: &'a str,
    /// What, as `noun.verb`: `device.register`.
    pub action: &'static str,
    /// To what: `dev_…`.
    pub target: &'a str,
    pub details: Value,
    pub request_id: Option<RequestId>,
}

/// Appends to the tenant's audit log.
///
/// # Errors
/// Those of the database.
pub async fn record(tx: &mut TenantTx, entry: Entry<'_>) -> Result<(), DbError> {
    let tenant = tx.tenant();
    record_for(tx.conn(), tenant, entry).await
}

/// The same in a transaction of role `cvault_sys`, which sees all tenants.
///
/// # Errors
/// Those of the database.
pub async fn record_for(conn: &mut PgConnection, tenant: TenantId, entry: Entry<'_>) -> Result<(), DbError> {
    sqlx::query!(
        "insert into cvault.audit_log (tenant_id, audit_id, actor, action, target, details, request_id)
         values ($1, $2, $3, $4, $5, $6, $7)",
        tenant.uuid(),
        Uuid::now_v7(),
        entry.actor,
        entry.action,
        entry.target,
        entry.details,
        entry.request_id.map(RequestId::uuid),
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What belongs to the platform and to no tenant is logged, and chained, under the id of none.
pub(crate) const PLATFORM: Uuid = Uuid::nil();

/// Appends to the platform's own log, in a transaction of role `cvault_sys`.
///
/// # Errors
/// Those of the database.
pub async fn record_platform(sys: &mut PgConnection, entry: Entry<'_>) -> Result<(), DbError> {
    sqlx::query!(
        "insert into cvault.audit_log (tenant_id, audit_id, actor, action, target, details, request_id)
         values ($1, $2, $3, $4, $5, $6, $7)",
        PLATFORM,
        Uuid::now_v7(),
        entry.actor,
        entry.action,
        entry.target,
        entry.details,
        entry.request_id.map(RequestId::uuid),
    )
    .execute(sys)
    .await?;
    Ok(())
}
