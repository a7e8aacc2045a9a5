//! When keys were last used, and how many calls each tenant has made: noted in memory by requests, written by a periodic
//! task, so that no request waits for a row that its neighbours write too.
//!
//! What a process that is killed had not written is lost, a quarter of a minute at most; nothing is billed by it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use cvault_types::{ApiKeyId, TenantId};
use sqlx::PgPool;
use time::{Date, OffsetDateTime};
use uuid::Uuid;

use crate::db::DbError;

/// One for the process. Bounded by the keys that exist: only calls that were let in are noted.
#[derive(Debug, Default)]
pub struct Uses {
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    last: HashMap<(TenantId, ApiKeyId), OffsetDateTime>,
    calls: HashMap<(TenantId, Date), i64>,
}

impl Uses {
    /// Notes one call.
    pub fn note(&self, tenant: TenantId, key: ApiKeyId, now: OffsetDateTime) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.last.insert((tenant, key), now);
        *pending.calls.entry((tenant, now.date())).or_default() += 1;
    }

    /// Writes what was noted: the time of each key at most once a minute, whatever the number of replicas.
    ///
    /// # Errors
    /// Those of the database. Times are kept for the next run; calls are not, as they may have been counted.
    pub async fn flush(&self, sys: &PgPool) -> Result<u64, DbError> {
        let Pending { last, calls } = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        let written = write_times(sys, &last).await;
        if written.is_err() {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            for (key, at) in last {
                pending.last.entry(key).or_insert(at);
            }
        }
        Ok(written? + write_calls(sys, calls).await?)
    }
}

async fn write_times(sys: &PgPool, last: &HashMap<(TenantId, ApiKeyId), OffsetDateTime>) -> Result<u64, DbError> {
    if last.is_empty() {
        return Ok(0);
    }
    let tenants: Vec<Uuid> = last.keys().map(|(tenant, _)| tenant.uuid()).collect();
    let keys: Vec<Uuid> = last.keys().map(|(_, key)| key.uuid()).collect();
    let times: Vec<OffsetDateTime> = last.values().copied().collect();
    // a row that another replica or a regeneration holds is left to the next call's note
    let done = sqlx::query!(
        "with used as (
             select u.tenant_id, u.api_key_id, u.at from unnest($1::uuid[], $2::uuid[], $3::timestamptz[]) as u (tenant_id, api_key_id, at)
         ), due as (
             select k.tenant_id, k.api_key_id, used.at
             from cvault.api_keys k join used using (tenant_id, api_key_id)
             where k.last_used_at is null or k.last_used_at <= used.at - interval '1 minute'
             order by k.tenant_id, k.api_key_id
             for no key update of k skip locked
         )
         update cvault.api_keys k set last_used_at = due.at
         from due where k.tenant_id = due.tenant_id and k.api_key_id = due.api_key_id",
        &tenants,
        &keys,
        &times
    )
    .execute(sys)
    .await?;
    Ok(done.rows_affected())
}

async fn write_calls(sys: &PgPool, calls: HashMap<(TenantId, Date), i64>) -> Result<u64, DbError> {
    if calls.is_empty() {
        return Ok(0);
    }
    let tenants: Vec<Uuid> = calls.keys().map(|(tenant, _)| tenant.uuid()).collect();
    let days: Vec<Date> = calls.keys().map(|(_, day)| *day).collect();
    let counts: Vec<i64> = calls.values().copied().collect();
    let done = sqlx::query!(
        "insert into cvault.usage_daily (tenant_id, day, api_calls)
         select c.tenant_id, c.day, c.calls from unnest($1::uuid[], $2::date[], $3::bigint[]) as c (tenant_id, day, calls)
         -- one order for all replicas
         order by c.tenant_id, c.day
         on conflict on constraint usage_daily_pkey do update set api_calls = usage_daily.api_calls + excluded.api_calls",
        &tenants,
        &days,
        &counts
    )
    .execute(sys)
    .await?;
    Ok(done.rows_affected())
}
