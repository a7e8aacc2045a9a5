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

/// All that is told of a period.
#[derive(Clone, Debug)]
pub struct Report {
    pub totals: Totals,
    /// Those on which something happened, in order.
    pub days: Vec<Day>,
    pub limits: Limits,
}

/// The tenant's limits; `None`: none.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub bandwidth_bytes: Option<i64>,
    pub users: Option<i32>,
    pub devices_per_user: i32,
}

struct Row {
    bandwidth_limit_bytes: Option<i64>,
    user_limit: Option<i32>,
    max_devices_per_user: i32,
    day: Option<Date>,
    rx: i64,
    tx: i64,
    seconds: i64,
    users: i64,
    devices: i64,
}

/// The statement for those of whom `$of` is true: planned apart for one user and for all, because other indexes serve them.
macro_rules! rows {
    ($of:literal, $($parameter:expr),+) => {
        sqlx::query_as!(
            Row,
            r#"select r.* from cvault.enter($1) as tenant
            cross join lateral (
                with bytes as materialized (
                    select (hour at time zone 'UTC')::date as day, user_id, device_id, rx_bytes, tx_bytes from cvault.usage_hourly
                    where tenant_id = tenant and hour >= date_trunc('hour', $2::timestamptz, 'UTC') and hour < $3 and "# + $of + r#"
                ), spans as materialized (
                    select user_id, device_id, greatest(connected_at, $2) as since, least(coalesce(disconnected_at, $3), $3) as until
                    from cvault.sessions
                    where tenant_id = tenant and connected_at < $3
                      and coalesce(disconnected_at, 'infinity') >= $2 and "# + $of + r#"
                ), parts as materialized (
                    select day, user_id, device_id, rx_bytes as rx, tx_bytes as tx, 0 as seconds from bytes
                    union all
                    select d.day::date, user_id, device_id, 0, 0,
                           extract(epoch from least(until, (d.day + interval '1 day') at time zone 'UTC')
                                              - greatest(since, d.day at time zone 'UTC'))
                    from spans cross join lateral generate_series(
                        date_trunc('day', since at time zone 'UTC'), until at time zone 'UTC', interval '1 day') as d (day)
                ), days as (
                    -- the sums of all days stand in the line without one
                    select day, sum(rx)::bigint as rx, sum(tx)::bigint as tx, sum(seconds)::bigint as seconds,
                           count(distinct user_id) as users, count(distinct device_id) as devices
                    from parts group by grouping sets ((day), ())
                )
                select t.bandwidth_limit_bytes, t.user_limit, t.max_devices_per_user, d.day,
                       coalesce(d.rx, 0) as "rx!", coalesce(d.tx, 0) as "tx!", coalesce(d.seconds, 0) as "seconds!",
                       d.users as "users!", d.devices as "devices!"
                from cvault.tenants t cross join days d where t.tenant_id = tenant
                offset 0) as r
            order by r.day nulls first"#,
            $($parameter),+
        )
    };
}

/// Sums over the period and its days, of one user or of all, and the limits in force. One statement: `tx` need not have begun.
///
/// # Errors
/// Those of the database.
pub async fn report(tx: &mut TenantTx, user: Option<UserId>, period: Period) -> Result<Report, DbError> {
    let (conn, context) = tx.entering();
    let Period { from, to } = period;
    let rows = match user {
        Some(user) => rows!("user_id = $4", context, from, to, user.uuid()).fetch_all(conn).await?,
        None => rows!("true", context, from, to).fetch_all(conn).await?,
    };
    let (first, rest) = rows.split_first().ok_or(DbError::Other(sqlx::Error::RowNotFound))?;
    Ok(Report {
        totals: Totals {
            rx_bytes: first.rx,
            tx_bytes: first.tx,
            connection_seconds: first.seconds,
            active_users: first.users,
            active_devices: first.devices,
        },
        days: rest
            .iter()
            .filter_map(|row| {
                Some(Day {
                    date: row.day?,
                    rx_bytes: row.rx,
                    tx_bytes: row.tx,
                    connection_seconds: row.seconds,
                    active_users: row.users,
                })
            })
            .collect(),
        limits: Limits {
            bandwidth_bytes: first.bandwidth_limit_bytes,
            users: first.user_limit,
            devices_per_user: first.max_devices_per_user,
        },
    })
}
