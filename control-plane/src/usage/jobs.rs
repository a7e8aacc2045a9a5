//! Periodic work on the ledger, and its own proof. Runs as role `cvault_sys`.

use sqlx::PgPool;

use crate::db::{DbError, Tx};

/// Outcome of a comparison of the whole ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Devices compared.
    pub checked: u64,
    /// Devices whose counters do not add up to their billed and orphaned bytes.
    pub mismatches: u64,
}

/// Compares, for each device, the greatest counters known with what was entered: both must be the same sum.
///
/// # Errors
/// Those of the database.
pub async fn verify_ledger(sys: &PgPool) -> Result<Verified, DbError> {
    let mut tx = Tx::snapshot(sys).await?;
    let work = compare(&mut tx).await;
    tx.finish(work).await
}

async fn compare(tx: &mut Tx) -> Result<Verified, DbError> {
    // reads the whole ledger, and nobody waits for it
    sqlx::query!("set local statement_timeout = '10min'").execute(tx.conn()).await?;
    let row = sqlx::query!(
        r#"with counted as (
               select device_id, sum(rx_bytes) as rx, sum(tx_bytes) as tx from platform.usage_counters group by device_id
           ), entered as (
               select device_id, sum(rx) as rx, sum(tx) as tx
               from (select device_id, rx_bytes as rx, tx_bytes as tx from cvault.usage_hourly
                     union all
                     select device_id, rx_bytes, tx_bytes from platform.usage_orphans) as e
               group by device_id
           )
           select count(*) as "checked!",
                  count(*) filter (where (coalesce(c.rx, 0), coalesce(c.tx, 0)) <> (coalesce(e.rx, 0), coalesce(e.tx, 0)))
                      as "mismatches!"
           from counted c full join entered e using (device_id)"#
    )
    .fetch_one(tx.conn())
    .await?;
    let count = |count: i64| u64::try_from(count).unwrap_or_default();
    Ok(Verified { checked: count(row.checked), mismatches: count(row.mismatches) })
}

/// Makes the partitions of the next months.
///
/// # Errors
/// Those of the database.
pub async fn ensure_partitions(sys: &PgPool) -> Result<u64, DbError> {
    let made = sqlx::query_scalar!(r#"select platform.ensure_usage_partitions(3) as "made!""#).fetch_one(sys).await?;
    Ok(u64::try_from(made).unwrap_or_default())
}

/// Forgets windows that no agent still keeps (agents keep acknowledged windows for 7 days). A window that came again
/// later would change nothing: its counters have been entered.
///
/// # Errors
/// Those of the database.
pub async fn trim_windows(sys: &PgPool) -> Result<u64, DbError> {
    let done = sqlx::query!("delete from platform.usage_windows where received_at < now() - interval '8 days'")
        .execute(sys)
        .await?;
    Ok(done.rows_affected())
}

/// Recomputes yesterday and today of every tenant's `usage_daily` from hours and sessions.
///
/// # Errors
/// Those of the database.
pub async fn refresh_daily(sys: &PgPool) -> Result<u64, DbError> {
    let done = sqlx::query!(
        "with days as (
             select d::date as day, d at time zone 'UTC' as begins, (d + interval '1 day') at time zone 'UTC' as ends
             from generate_series(date_trunc('day', now() at time zone 'UTC') - interval '1 day',
                                  date_trunc('day', now() at time zone 'UTC'), interval '1 day') as d
         ), bytes as (
             select h.tenant_id, d.day, h.user_id, sum(h.rx_bytes) as rx, sum(h.tx_bytes) as tx
             from days d join cvault.usage_hourly h on h.hour >= d.begins and h.hour < d.ends
             group by 1, 2, 3
         ), spans as (
             select s.tenant_id, d.day, s.user_id,
                    sum(extract(epoch from least(coalesce(s.disconnected_at, now()), d.ends)
                                           - greatest(s.connected_at, d.begins))) as seconds
             from days d
             join cvault.sessions s on s.connected_at < d.ends and coalesce(s.disconnected_at, now()) >= d.begins
             group by 1, 2, 3
         )
         insert into cvault.usage_daily (tenant_id, day, rx_bytes, tx_bytes, connection_seconds, active_users)
         select tenant_id, day, coalesce(sum(rx), 0)::bigint, coalesce(sum(tx), 0)::bigint,
                greatest(coalesce(sum(seconds), 0), 0)::bigint, count(distinct user_id)::integer
         from bytes full join spans using (tenant_id, day, user_id)
         group by tenant_id, day
         -- one order for all replicas
         order by tenant_id, day
         on conflict on constraint usage_daily_pkey do update
         set rx_bytes = excluded.rx_bytes, tx_bytes = excluded.tx_bytes,
             connection_seconds = excluded.connection_seconds, active_users = excluded.active_users"
    )
    .execute(sys)
    .await?;
    Ok(done.rows_affected())
}
