//! What a tenant, or one of its users, has used.

use cvault_types::{ErrorCode, TenantId, UserId};
use time::{Date, Duration, OffsetDateTime};
use uuid::Uuid;

use crate::db::DbError;
use crate::http::Problem;
use crate::tenancy::{Tenancy, TenantTx};
use crate::together::{Serve, Together, Waiting, answer_each};

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
    place: i64,
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

/// For each period: a line with the sums, then one for each day. Of those rows for which `$of` is true, where `w.who` is who
/// was asked for: planned apart for one user and for all, because other indexes serve them.
macro_rules! rows {
    ($of:literal, $context:expr, $who:expr, $from:expr, $to:expr) => {
        sqlx::query_as!(
            Row,
            r#"select r.* from cvault.enter($1) as tenant
               cross join lateral (
                   with wanted as materialized (
                       select * from unnest($2::uuid[], $3::timestamptz[], $4::timestamptz[]) with ordinality
                                         as w (who, since, until, place)
                   ), bytes as materialized (
                       select w.place, h.* from wanted w cross join lateral (
                           select (hour at time zone 'UTC')::date as day, user_id, device_id, rx_bytes, tx_bytes
                           from cvault.usage_hourly
                           where tenant_id = tenant and hour >= date_trunc('hour', w.since, 'UTC') and hour < w.until and "# + $of + r#"
                           offset 0) as h
                   ), spans as materialized (
                       select w.place, s.* from wanted w cross join lateral (
                           select user_id, device_id, greatest(connected_at, w.since) as since,
                                  least(coalesce(disconnected_at, w.until), w.until) as until
                           from cvault.sessions
                           where tenant_id = tenant and connected_at < w.until
                             and coalesce(disconnected_at, 'infinity') >= w.since and "# + $of + r#"
                           offset 0) as s
                   ), parts as materialized (
                       select place, day, user_id, device_id, rx_bytes as rx, tx_bytes as tx, 0 as seconds from bytes
                       union all
                       select place, d.day::date, user_id, device_id, 0, 0,
                              extract(epoch from least(until, (d.day + interval '1 day') at time zone 'UTC')
                                                 - greatest(since, d.day at time zone 'UTC'))
                       from spans cross join lateral generate_series(
                           date_trunc('day', since at time zone 'UTC'), until at time zone 'UTC', interval '1 day') as d (day)
                   ), days as (
                       -- the sums of all days stand in the line without one
                       select place, day, sum(rx)::bigint as rx, sum(tx)::bigint as tx, sum(seconds)::bigint as seconds,
                              count(distinct user_id) as users, count(distinct device_id) as devices
                       from parts group by grouping sets ((place, day), (place))
                   )
                   select w.place as "place!", t.bandwidth_limit_bytes, t.user_limit, t.max_devices_per_user, d.day,
                          coalesce(d.rx, 0) as "rx!", coalesce(d.tx, 0) as "tx!", coalesce(d.seconds, 0) as "seconds!",
                          coalesce(d.users, 0) as "users!", coalesce(d.devices, 0) as "devices!"
                   from cvault.tenants t cross join wanted w left join days d using (place) where t.tenant_id = tenant
                   offset 0) as r
               order by r."place!", r.day nulls first"#,
            $context,
            $who,
            $from,
            $to
        )
    };
}

/// Sums over the period and its days, of the whole tenant, and the limits in force. One statement: `tx` need not have begun.
///
/// # Errors
/// Those of the database.
pub async fn report(tx: &mut TenantTx, period: Period) -> Result<Report, DbError> {
    let (conn, context) = tx.entering();
    let rows =
        rows!("w.who is not null", context, &[Uuid::nil()], &[period.from], &[period.to]).fetch_all(conn).await?;
    reports(rows, 1)?.pop().ok_or(DbError::Other(sqlx::Error::RowNotFound))
}

/// As [`report`], of one user each, in the order of `asked`.
///
/// # Errors
/// Those of the database.
pub async fn of_users(tx: &mut TenantTx, asked: &[(UserId, Period)]) -> Result<Vec<Report>, DbError> {
    let users: Vec<Uuid> = asked.iter().map(|(user, _)| user.uuid()).collect();
    let from: Vec<OffsetDateTime> = asked.iter().map(|(_, period)| period.from).collect();
    let to: Vec<OffsetDateTime> = asked.iter().map(|(_, period)| period.to).collect();
    let (conn, context) = tx.entering();
    let rows = rows!("user_id = w.who", context, &users, &from, &to).fetch_all(conn).await?;
    reports(rows, asked.len())
}

fn reports(rows: Vec<Row>, wanted: usize) -> Result<Vec<Report>, DbError> {
    let reports: Vec<Report> = rows
        .chunk_by(|one, next| one.place == next.place)
        .filter_map(|rows| {
            let (sums, days) = rows.split_first()?;
            Some(Report {
                totals: Totals {
                    rx_bytes: sums.rx,
                    tx_bytes: sums.tx,
                    connection_seconds: sums.seconds,
                    active_users: sums.users,
                    active_devices: sums.devices,
                },
                days: days.iter().filter_map(Row::of_day).collect(),
                limits: Limits {
                    bandwidth_bytes: sums.bandwidth_limit_bytes,
                    users: sums.user_limit,
                    devices_per_user: sums.max_devices_per_user,
                },
            })
        })
        .collect();
    // no line at all: no tenant
    if reports.len() == wanted { Ok(reports) } else { Err(DbError::Other(sqlx::Error::RowNotFound)) }
}

impl Row {
    fn of_day(&self) -> Option<Day> {
        Some(Day {
            date: self.day?,
            rx_bytes: self.rx,
            tx_bytes: self.tx,
            connection_seconds: self.seconds,
            active_users: self.users,
        })
    }
}

/// A month.
const SHORT: Duration = Duration::days(31);

/// Users of a tenant who ask at the same time are answered by one statement. One for the process.
#[derive(Debug, Default, Clone)]
pub struct Reports(Together<Reading>);

struct Reading(Tenancy);

impl Reports {
    /// As [`of_users`], for one. A long period is not read together with others: they would wait for it.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn of_user(&self, tenancy: &Tenancy, tenant: TenantId, user: UserId, period: Period) -> Answer {
        if period.to - period.from > SHORT {
            let mut report = Reading(tenancy.clone()).read(tenant, &[(user, period)]).await?;
            return report.pop().ok_or_else(|| DbError::Other(sqlx::Error::RowNotFound).into());
        }
        let answer = self.0.ask(tenant, (user, period), || Reading(tenancy.clone())).await;
        answer.unwrap_or_else(|| Err(Problem::new(ErrorCode::DatabaseUnavailable).retry_after(1)))
    }
}

type Answer = Result<Report, Problem>;

impl Reading {
    async fn read(&self, tenant: TenantId, asked: &[(UserId, Period)]) -> Result<Vec<Report>, DbError> {
        let mut tx = self.0.single(tenant).await?;
        let found = of_users(&mut tx, asked).await;
        tx.finish(found).await
    }
}

impl Serve for Reading {
    type Line = TenantId;
    type Item = (UserId, Period);
    type Answer = Answer;

    const MOST: usize = 32;

    async fn serve(&mut self, tenant: &TenantId, batch: Vec<Waiting<Self>>) {
        let asked: Vec<_> = batch.iter().map(|waiting| waiting.item).collect();
        answer_each(batch, self.read(*tenant, &asked).await.map_err(Problem::from));
    }
}
