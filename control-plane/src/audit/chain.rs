//! The hash chain over each tenant's audit log: `hash(n) = SHA-256(hash(n − 1) ‖ canonical row)`. Rows enter unchained, in
//! the write's own transaction; this task numbers and chains them afterwards, so that the chain never makes a tenant's
//! writes wait for each other. A row changed or removed later breaks every hash behind it.

use std::time::Instant;

use sha2::{Digest as _, Sha256};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::{DbError, Tx};
use crate::tasks;

/// Rows chained for one tenant in one transaction.
const BATCH: i64 = 500;
/// Batches of one tenant in one run, so that those of others who write meanwhile are not kept waiting.
const ROUNDS: usize = 100;
/// Tenants whose batches take turns.
const TENANTS: i64 = 1_000;
/// Rows of one chain read at a time.
const VERIFIED_AT_ONCE: i64 = if cfg!(test) { 3 } else { 10_000 };
/// A row younger than this may have an older one beside it that is not committed yet.
const SETTLED_SECONDS: f64 = 1.0;

struct Row {
    audit_id: Uuid,
    at: OffsetDateTime,
    actor: String,
    action: String,
    target: String,
    details: serde_json::Value,
    request_id: Option<Uuid>,
}

/// A place where the chain is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    pub sequence: i64,
}

/// Chains the rows of every tenant that has new ones; returns how many.
///
/// # Errors
/// Those of the database.
pub async fn chain_new(sys: &PgPool) -> Result<u64, DbError> {
    let (mut chained, mut after) = (0, None);
    loop {
        let tenants = tenants_with_new(sys, after, TENANTS).await?;
        let Some(last) = tenants.last() else { return Ok(chained) };
        after = Some(*last);
        chained += chain_in_turns(sys, tenants).await?;
    }
}

/// Up to `limit` tenants that have new rows, by id, those after the one named.
async fn tenants_with_new(sys: &PgPool, after: Option<Uuid>, limit: i64) -> Result<Vec<Uuid>, DbError> {
    // from one tenant to the next in the index of what is unchained: right after many writes the statistics say that this is
    // most of the table, and the table would be read instead
    let found = sqlx::query_scalar!(
        r#"with recursive next (tenant_id) as (
               (select tenant_id from cvault.audit_log
                where chain_sequence is null and ($1::uuid is null or tenant_id > $1) order by tenant_id, at limit 1)
               union all
               select (select tenant_id from cvault.audit_log a
                       where chain_sequence is null and a.tenant_id > next.tenant_id order by a.tenant_id, a.at limit 1)
               from next where next.tenant_id is not null)
           select tenant_id as "tenant_id!" from next where tenant_id is not null limit $2"#,
        after,
        limit
    );
    Ok(found.fetch_all(sys).await?)
}

/// A batch of each tenant, and again of those that had more.
async fn chain_in_turns(sys: &PgPool, mut tenants: Vec<Uuid>) -> Result<u64, DbError> {
    let mut chained = 0;
    for _ in 0..ROUNDS {
        let mut more = Vec::new();
        for tenant in tenants {
            let began = Instant::now();
            let mut tx = Tx::begin(sys).await?;
            let work = chain_tenant(&mut tx, tenant).await;
            let rows = tx.finish(work).await?;
            chained += rows;
            if i64::try_from(rows).is_ok_and(|rows| rows >= BATCH) {
                more.push(tenant);
                tasks::pause_after(began).await;
            }
        }
        tenants = more;
    }
    Ok(chained)
}

async fn chain_tenant(tx: &mut Tx, tenant: Uuid) -> Result<u64, DbError> {
    // two replicas take turns; the constraint on the sequence is the backstop
    sqlx::query!("select pg_advisory_xact_lock(731992417, hashtext($1::uuid::text))", tenant)
        .execute(tx.conn())
        .await?;
    let last = sqlx::query!(
        r#"select chain_sequence as "sequence!", chain_hash as "hash!" from cvault.audit_log
           where tenant_id = $1 and chain_sequence is not null order by chain_sequence desc limit 1"#,
        tenant
    )
    .fetch_optional(tx.conn())
    .await?;
    let (mut sequence, mut hash) = last.map_or((0, genesis(tenant)), |last| (last.sequence, last.hash));
    let rows = sqlx::query_as!(
        Row,
        "select audit_id, at, actor, action, target, details, request_id from cvault.audit_log
         where tenant_id = $1 and chain_sequence is null and at < now() - make_interval(secs => $2)
         order by at, audit_id limit $3",
        tenant,
        SETTLED_SECONDS,
        BATCH
    )
    .fetch_all(tx.conn())
    .await?;
    let (mut ids, mut sequences, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    for row in &rows {
        sequence += 1;
        hash = next_hash(&hash, tenant, sequence, row);
        ids.push(row.audit_id);
        sequences.push(sequence);
        hashes.push(hash.clone());
    }
    sqlx::query!(
        "update cvault.audit_log a set chain_sequence = c.sequence, chain_hash = c.hash
         from unnest($2::uuid[], $3::bigint[], $4::bytea[]) as c (audit_id, sequence, hash)
         where a.tenant_id = $1 and a.audit_id = c.audit_id",
        tenant,
        &ids,
        &sequences,
        &hashes
    )
    .execute(tx.conn())
    .await?;
    Ok(ids.len() as u64)
}

/// Whose chains there are: those of tenants, deleted ones included, and the platform's under the id of none.
///
/// # Errors
/// Those of the database.
pub async fn chains(sys: &PgPool) -> Result<Vec<Uuid>, DbError> {
    // from one tenant to the next in an index, and not through all entries
    let found = sqlx::query_scalar!(
        r#"with recursive next (tenant_id) as (
               (select tenant_id from cvault.audit_log order by tenant_id limit 1)
               union all
               select (select a.tenant_id from cvault.audit_log a where a.tenant_id > next.tenant_id
                       order by a.tenant_id limit 1)
               from next where next.tenant_id is not null)
           select tenant_id as "tenant_id!" from next where tenant_id is not null order by tenant_id"#
    );
    Ok(found.fetch_all(sys).await?)
}

/// Recomputes a tenant's chain; `None` when it holds. It holds without its newest rows, too: nothing else says how long it was.
///
/// # Errors
/// Those of the database.
pub async fn verify_chain(sys: &PgPool, tenant: Uuid) -> Result<Option<Broken>, DbError> {
    let (mut hash, mut expected, mut from) = (genesis(tenant), 0, i64::MIN);
    loop {
        let rows = sqlx::query!(
            r#"select audit_id, at, actor, action, target, details, request_id, chain_sequence as "sequence!",
                      chain_hash as "hash!"
               from cvault.audit_log where tenant_id = $1 and chain_sequence >= $2 order by chain_sequence limit $3"#,
            tenant,
            from,
            VERIFIED_AT_ONCE
        )
        .fetch_all(sys)
        .await?;
        if rows.is_empty() {
            return Ok(None);
        }
        for stored in rows {
            expected += 1;
            let row = Row {
                audit_id: stored.audit_id,
                at: stored.at,
                actor: stored.actor,
                action: stored.action,
                target: stored.target,
                details: stored.details,
                request_id: stored.request_id,
            };
            hash = next_hash(&hash, tenant, expected, &row);
            if stored.sequence != expected || stored.hash != hash {
                return Ok(Some(Broken { sequence: expected }));
            }
        }
        from = expected + 1;
    }
}

fn genesis(tenant: Uuid) -> Vec<u8> {
    Sha256::digest(tenant.as_bytes()).to_vec()
}

/// Every field with its length in front, so that no two rows have the same bytes. `jsonb` keeps one order of keys and
/// serde_json sorts them again.
fn next_hash(previous: &[u8], tenant: Uuid, sequence: i64, row: &Row) -> Vec<u8> {
    let mut hash = Sha256::new_with_prefix(previous);
    let micros = row.at.unix_timestamp_nanos() / 1_000;
    let details = row.details.to_string();
    let fields: [&[u8]; 9] = [
        tenant.as_bytes(),
        &sequence.to_be_bytes(),
        row.audit_id.as_bytes(),
        &micros.to_be_bytes(),
        row.actor.as_bytes(),
        row.action.as_bytes(),
        row.target.as_bytes(),
        details.as_bytes(),
        row.request_id.as_ref().map_or(&[], |id| id.as_bytes().as_slice()),
    ];
    for field in fields {
        hash.update((field.len() as u64).to_be_bytes());
        hash.update(field);
    }
    hash.finalize().to_vec()
}
