//! When keys were last used, and how many calls each tenant has made: noted in memory by requests, written by a periodic
//! task, so that no request waits for a row that its neighbours write too.
//!
//! What a process that is killed had not written is lost, a quarter of a minute at most; nothing is billed by it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use cvault_types::{ApiKeyId, TenantId};
use sqlx::{PgConnection, PgPool};
use time::{Date, OffsetDateTime};
use uuid::Uuid;

use crate::db::{DbError, Tx};

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
    /// Those of the database. What was not written is kept for the next run; what may have been written is not.
    pub async fn flush(&self, sys: &PgPool) -> Result<u64, DbError> {
        let noted = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        let written = noted.write(sys).await;
        if let Err(error) = &written
            && !matches!(error, DbError::CommitUnknown(_))
        {
            self.pending.lock().unwrap_or_else(PoisonError::into_inner).add(noted);
        }
        written
    }
}

impl Pending {
    fn add(&mut self, earlier: Self) {
        for (key, at) in earlier.last {
            self.last.entry(key).or_insert(at);
        }
        for (day, calls) in earlier.calls {
            *self.calls.entry(day).or_default() += calls;
        }
    }

    async fn write(&self, sys: &PgPool) -> Result<u64, DbError> {
        if self.calls.is_empty() {
            return Ok(0);
        }
        let mut tx = Tx::begin(sys).await?;
        let work =
            async { Ok(write_times(tx.conn(), &self.last).await? + write_calls(tx.conn(), &self.calls).await?) }.await;
        tx.finish(work).await
    }
}

async fn write_times(
    conn: &mut PgConnection,
    last: &HashMap<(TenantId, ApiKeyId), OffsetDateTime>,
) -> Result<u64, DbError> {
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
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

async fn write_calls(conn: &mut PgConnection, calls: &HashMap<(TenantId, Date), i64>) -> Result<u64, DbError> {
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
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;

    #[tokio::test]
    async fn calls_that_could_not_be_written_are_written_later() {
        let world = World::new().await;
        let (person, key) = (world.person().await, ApiKeyId::from_uuid(Uuid::now_v7()));
        let (uses, now, sys) = (Uses::default(), world.app.clock.now(), &world.app.db.sys);
        let mut superuser = world.superuser().await;
        for refused in ["update (last_used_at) on cvault.api_keys", "insert on cvault.usage_daily"] {
            let (object, right) = (refused.split_once(" on ").unwrap().1, refused.split_once(" on ").unwrap().0);
            uses.note(person.tenant, key, now);
            let sql = format!("revoke {right} on {object} from cvault_sys");
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut superuser).await.unwrap();
            uses.flush(sys).await.unwrap_err();
            uses.note(person.tenant, key, now);
            let sql = format!("grant {right} on {object} to cvault_sys");
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut superuser).await.unwrap();
            uses.flush(sys).await.unwrap();
        }
        let calls: i64 = sqlx::query_scalar("select sum(api_calls)::bigint from cvault.usage_daily")
            .fetch_one(&mut superuser)
            .await
            .unwrap();
        assert_eq!(calls, 4);
        assert_eq!(uses.flush(sys).await.unwrap(), 0);
    }
}
