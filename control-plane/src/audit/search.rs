//! Reading the log across tenants, newest first.

use cvault_types::admin::AuditRecord;
use cvault_types::{AuditId, RequestId, TenantId};
use sqlx::PgPool;
use time::{Duration, OffsetDateTime};
use uuid::{NoContext, Timestamp, Uuid};

use super::PLATFORM;
use crate::db::DbError;

/// What to look for; absent: everything.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub tenant: Option<TenantId>,
    /// The whole action, or a noun: `device` finds `device.register`.
    pub action: Option<String>,
    pub actor: Option<String>,
    pub from: Option<OffsetDateTime>,
    pub to: Option<OffsetDateTime>,
}

/// An id is drawn while its transaction runs, by this machine's clock; `at` is the transaction's beginning by the
/// database's. Both differ by less.
const SLACK: Duration = Duration::minutes(2);

/// Up to `limit` rows before `before`.
///
/// # Errors
/// Those of the database.
pub async fn search(
    sys: &PgPool,
    filter: &Filter,
    before: Option<AuditId>,
    limit: i64,
) -> Result<Vec<AuditRecord>, DbError> {
    let rows = sqlx::query!(
        // along the index of ids, from the newest that is wanted
        "select tenant_id, audit_id, at, actor, action, target, details, request_id, chain_sequence
         from cvault.audit_log
         where audit_id < $1 and audit_id >= $2
           and ($3::uuid is null or tenant_id = $3)
           and ($4::text is null or action = $4 or split_part(action, '.', 1) = $4)
           and ($5::text is null or actor = $5)
           and ($6::timestamptz is null or at >= $6) and ($7::timestamptz is null or at < $7)
         order by audit_id desc limit $8",
        upper(filter, before),
        filter.from.map_or(Uuid::nil(), |from| at(from - SLACK)),
        filter.tenant.map(TenantId::uuid),
        filter.action,
        filter.actor,
        filter.from,
        filter.to,
        limit
    )
    .fetch_all(sys)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| AuditRecord {
            id: AuditId::from_uuid(row.audit_id),
            at: row.at,
            tenant_id: (row.tenant_id != PLATFORM).then(|| TenantId::from_uuid(row.tenant_id)),
            actor: row.actor,
            action: row.action,
            target: row.target,
            details: row.details,
            request_id: row.request_id.map(RequestId::from_uuid),
            chain_sequence: row.chain_sequence,
        })
        .collect())
}

fn upper(filter: &Filter, before: Option<AuditId>) -> Uuid {
    let before = before.map_or(Uuid::max(), AuditId::uuid);
    filter.to.map_or(before, |to| before.min(at(to + SLACK)))
}

/// The time's place among UUIDv7.
fn at(time: OffsetDateTime) -> Uuid {
    let seconds = u64::try_from(time.unix_timestamp()).unwrap_or_default();
    let bytes = *Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, 0)).as_bytes();
    let mut lowest = [0; 16];
    lowest[..6].copy_from_slice(&bytes[..6]);
    Uuid::from_bytes(lowest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_time_lies_between_the_ids_drawn_before_and_after_it() {
        let moment = datetime!(2026-11-21 12:00 UTC);
        let drawn = |time: OffsetDateTime| {
            Uuid::new_v7(Timestamp::from_unix(NoContext, u64::try_from(time.unix_timestamp()).unwrap(), 0))
        };
        assert!(drawn(moment - Duration::SECOND) < at(moment) && at(moment) <= drawn(moment));
    }
}
