//! Reading a tenant's own log, newest first.

use cvault_types::audit::AuditEntry;
use cvault_types::{AuditId, RequestId};
use uuid::Uuid;

use crate::db::DbError;
use crate::tenancy::TenantTx;

/// What to look for; `None`: everything.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The whole action, or a noun: `device` finds `device.register`.
    pub action: Option<String>,
    pub actor: Option<String>,
    pub target: Option<String>,
}

/// Up to `limit` entries before the one named.
///
/// # Errors
/// Those of the database.
pub async fn list(
    tx: &mut TenantTx,
    wanted: &Wanted,
    before: Option<AuditId>,
    limit: u32,
) -> Result<Vec<AuditEntry>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        // along the primary key, from the newest that is wanted
        "select audit_id, at, actor, action, target, details, request_id, chain_sequence
         from cvault.audit_log
         where tenant_id = $1 and audit_id < $2
           and ($3::text is null or action = $3 or split_part(action, '.', 1) = $3)
           and ($4::text is null or actor = $4) and ($5::text is null or target = $5)
         order by audit_id desc limit $6",
        tenant,
        before.map_or(Uuid::max(), AuditId::uuid),
        wanted.action,
        wanted.actor,
        wanted.target,
        i64::from(limit)
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| AuditEntry {
            id: AuditId::from_uuid(row.audit_id),
            at: row.at,
            actor: row.actor,
            action: row.action,
            target: row.target,
            details: row.details,
            request_id: row.request_id.map(RequestId::from_uuid),
            chain_sequence: row.chain_sequence,
        })
        .collect())
}
