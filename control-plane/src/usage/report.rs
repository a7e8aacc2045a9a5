//! What a tenant, or one of its users, has used.

use cvault_types::UserId;
use time::{Date, OffsetDateTime};

use crate::db::DbError;
use crate::tenancy::TenantTx;

/// From the beginning of an hour, included, to `to`, excluded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period {
    pub from: OffsetDateTime,
    pub to: OffsetDateTime,
}

impl Period {
    /// From the first of this month, UTC, until now.
    #[must_use]
    pub fn current(now: OffsetDateTime) -> Self {
        let first = now.date().replace_day(1).expect("every month has a first day");
        Self { from: first.midnight().assume_utc(), to: now }
    }
}

/// Sums over a period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub rx_bytes: i64,
    pub tx_bytes: i64,
    pub connection_seconds: i64,
    pub active_users: i64,
    pub active_devices: i64,
}

/// Sums over one day, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Day {
    pub date: Date,
    pub rx_bytes: i64,
    pub tx_bytes: i64,
    pub connection_seconds: i64,
    pub active_users: i64,
}

/// The tenant's limits; `None`: none.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub bandwidth_bytes: Option<i64>,
    pub users: Option<i32>,
    pub devices_per_user: i32,
}

/// Sums over the period, of one user or of all.
///
/// # Errors
/// Those of the database.
pub async fn totals(tx: &mut TenantTx, user: Option<UserId>, period: Period) -> Result<Totals, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"with bytes as (
               select user_id, device_id, rx_bytes, tx_bytes from cvault.usage_hourly
               where tenant_id = $1 and hour >= date_trunc('hour', $2::timestamptz, 'UTC') and hour < $3
                 and ($4::uuid is null or user_id = $4)
           ), spans as (
               select user_id, device_id,
                      extract(epoch from least(coalesce(disconnected_at, $3), $3) - greatest(connected_at, $2)) as seconds
               from cvault.sessions
               where tenant_id = $1 and connected_at < $3 and coalesce(disconnected_at, $3) >= $2
                 and ($4::uuid is null or user_id = $4)
           )
           select coalesce((select sum(rx_bytes) from bytes), 0)::bigint as "rx!",
                  coalesce((select sum(tx_bytes) from bytes), 0)::bigint as "tx!",
                  coalesce((select sum(seconds) from spans), 0)::bigint as "seconds!",
                  (select count(distinct user_id) from (select user_id from bytes union select user_id from spans) u) as "users!",
                  (select count(distinct device_id) from (select device_id from bytes union select device_id from spans) d)
                      as "devices!""#,
        tenant,
        period.from,
        period.to,
        user.map(UserId::uuid),
    )
    .fetch_one(tx.conn())
    .await?;
    Ok(Totals {
        rx_bytes: row.rx,
        tx_bytes: row.tx,
        connection_seconds: row.seconds,
        active_users: row.users,
        active_devices: row.devices,
    })
}

/// The days of the period on which something happened, in order.
///
/// # Errors
/// Those of the database.
pub async fn days(tx: &mut TenantTx, user: Option<UserId>, period: Period) -> Result<Vec<Day>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        r#"with bytes as (
               select (hour at time zone 'UTC')::date as day, user_id, sum(rx_bytes) as rx, sum(tx_bytes) as tx
               from cvault.usage_hourly
               where tenant_id = $1 and hour >= date_trunc('hour', $2::timestamptz, 'UTC') and hour < $3
                 and ($4::uuid is null or user_id = $4)
               group by 1, 2
           ), spans as (
               select d.day::date as day, s.user_id,
                      sum(extract(epoch from
                          least(coalesce(s.disconnected_at, $3), $3, (d.day + interval '1 day') at time zone 'UTC')
                          - greatest(s.connected_at, $2, d.day at time zone 'UTC'))) as seconds
               from cvault.sessions s
               cross join lateral generate_series(
                   date_trunc('day', greatest(s.connected_at, $2) at time zone 'UTC'),
                   least(coalesce(s.disconnected_at, $3), $3) at time zone 'UTC', interval '1 day') as d (day)
               where s.tenant_id = $1 and s.connected_at < $3 and coalesce(s.disconnected_at, $3) >= $2
                 and ($4::uuid is null or s.user_id = $4)
               group by 1, 2
           )
           select day as "day!", coalesce(sum(b.rx), 0)::bigint as "rx!", coalesce(sum(b.tx), 0)::bigint as "tx!",
                  coalesce(sum(s.seconds), 0)::bigint as "seconds!", count(distinct user_id) as "users!"
           from bytes b full join spans s using (day, user_id)
           group by day order by day"#,
        tenant,
        period.from,
        period.to,
        user.map(UserId::uuid),
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Day {
            date: row.day,
            rx_bytes: row.rx,
            tx_bytes: row.tx,
            connection_seconds: row.seconds,
            active_users: row.users,
        })
        .collect())
}

/// The limits in force.
///
/// # Errors
/// Those of the database.
pub async fn limits(tx: &mut TenantTx) -> Result<Limits, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        "select bandwidth_limit_bytes, user_limit, max_devices_per_user from cvault.tenants where tenant_id = $1",
        tenant
    )
    .fetch_one(tx.conn())
    .await?;
    Ok(Limits {
        bandwidth_bytes: row.bandwidth_limit_bytes,
        users: row.user_limit,
        devices_per_user: row.max_devices_per_user,
    })
}
