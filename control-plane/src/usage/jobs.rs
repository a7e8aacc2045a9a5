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
               select device_id, sum(rx) as rx, sum(tx) as tx
               from (select device_id, rx_bytes::numeric as rx, tx_bytes::numeric as tx from platform.usage_counters
                     union all
                     select device_id, rx_bytes, tx_bytes from platform.usage_settled) as c
               group by device_id
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

/// Recomputes yesterday and today of every tenant's `usage_daily` from hours and sessions.
///
/// # Errors
/// Those of the database.
pub async fn refresh_daily(sys: &PgPool) -> Result<u64, DbError> {
    refresh(sys, 1).await
}

/// Recomputes all days that a window told late can belong to: agents keep them for 7 days.
///
/// # Errors
/// Those of the database.
pub async fn refresh_week(sys: &PgPool) -> Result<u64, DbError> {
    refresh(sys, 8).await
}

async fn refresh(sys: &PgPool, days: i32) -> Result<u64, DbError> {
    Ok(sqlx::query_file!("src/usage/refresh_daily.sql", days).execute(sys).await?.rows_affected())
}
