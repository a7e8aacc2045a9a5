//! `GET /api/v1/usage`: a tenant's usage for its backend, a user's own for the user.

use axum::body::Body;
use axum::extract::{FromRequestParts, State};
use axum::response::{IntoResponse, Response};
use cvault_types::usage::{Usage, UsageDay, UsageLimits, UsagePeriod};
use cvault_types::{TenantId, UserId};
use futures::stream::{self, StreamExt as _};
use http::HeaderMap;
use http::header::{AUTHORIZATION, CONTENT_DISPOSITION, CONTENT_TYPE, VARY};
use http::request::Parts;
use serde::Deserialize;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use time::{Date, OffsetDateTime};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::db::DbError;
use crate::http::{Caller, Json, Problem, Query, TenantKey, csv};
use crate::usage::{self, Period, Place};

/// The longest period of one answer; `daily` has at most this many entries.
const MAX_DAYS: i64 = 400;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(show))
}

/// Whose usage is asked for: with a user token the user's own, with key and secret the whole tenant's.
#[derive(Clone, Copy)]
struct Subject {
    tenant: TenantId,
    user: Option<UserId>,
}

impl FromRequestParts<App> for Subject {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        if parts.headers.contains_key(AUTHORIZATION) && !parts.headers.contains_key("x-api-secret") {
            let caller = Caller::from_request_parts(parts, app).await?;
            Ok(Self { tenant: caller.tenant, user: Some(caller.user) })
        } else {
            let key = TenantKey::from_request_parts(parts, app).await?;
            Ok(Self { tenant: key.tenant, user: None })
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeriodQuery {
    from: Option<String>,
    to: Option<String>,
}

/// Bytes and connection time of a period, as JSON or (with `Accept: text/csv`) as RFC 4180 lines; without `from` and `to`: this month, UTC.
///
/// `from` is taken down to the hour.
#[utoipa::path(get, path = "/api/v1/usage", tag = "usage",
    security(("api_key" = [], "api_secret" = []), ("api_key" = [], "user_token" = [])),
    params(("from" = Option<String>, Query, description = "RFC 3339 time, or date (UTC); included."),
           ("to" = Option<String>, Query, description = "RFC 3339 time, or date (UTC); excluded.")),
    responses((status = 200, description = "The sums; with `Accept: text/csv` a line for each day and device.",
               content((Usage = "application/json"),
                   (String = "text/csv", example = "date,user_id,email,external_user_id,device_id,device_name,rx_bytes,tx_bytes,connection_seconds\r\n")))))]
async fn show(
    State(app): State<App>,
    subject: Subject,
    Query(query): Query<PeriodQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let period = period(&query, app.clock.now())?;
    if csv::is_wanted(&headers) {
        return export(app, subject, period).await;
    }
    let usage::Report { totals, days, limits } = match subject.user {
        Some(user) => app.usage_reports.of_user(&app.db.tenancy, subject.tenant, user, period).await?,
        None => {
            let mut tx = app.db.tenancy.single(subject.tenant).await?;
            let report = usage::report(&mut tx, period).await;
            tx.finish(report).await?
        }
    };
    let answer = Usage {
        current_period: sums(period, totals),
        limits: self::limits(limits),
        daily: days
            .into_iter()
            .map(|day| UsageDay {
                date: day.date.to_string(),
                rx_bytes: day.rx_bytes,
                tx_bytes: day.tx_bytes,
                connection_seconds: day.connection_seconds,
                active_users: day.active_users,
            })
            .collect(),
    };
    Ok(([(VARY, "accept")], Json(answer)).into_response())
}

const COLUMNS: [&str; 9] = [
    "date",
    "user_id",
    "email",
    "external_user_id",
    "device_id",
    "device_name",
    "rx_bytes",
    "tx_bytes",
    "connection_seconds",
];

/// What is still to be sent.
struct Export {
    app: App,
    subject: Subject,
    rest: Option<Place>,
}

/// The first page is read before the answer begins, so that a database that is away is answered as such.
async fn export(app: App, subject: Subject, period: Period) -> Result<Response, Problem> {
    let mut export = Export { app, subject, rest: Some(Place::beginning(period)) };
    let mut head = String::new();
    csv::push_line(&mut head, &COLUMNS);
    head.push_str(&export.next().await?.unwrap_or_default());
    let rest = stream::try_unfold(export, async |mut export| {
        Ok::<_, DbError>(export.next().await?.map(|text| (text, export)))
    });
    let body = Body::from_stream(stream::once(async { Ok(head) }).chain(rest));
    let headers = [
        (CONTENT_TYPE, "text/csv; charset=utf-8; header=present"),
        (CONTENT_DISPOSITION, "attachment; filename=\"usage.csv\""),
        (VARY, "accept"),
    ];
    Ok((headers, body).into_response())
}

impl Export {
    /// The lines of the next page; `None` after the last.
    async fn next(&mut self) -> Result<Option<String>, DbError> {
        let Some(place) = self.rest.take() else { return Ok(None) };
        let mut tx = self.app.db.tenancy.begin(self.subject.tenant).await?;
        let (rows, rest) = usage::page(&mut tx, self.subject.user, place).await?;
        tx.commit().await?;
        self.rest = rest;
        let mut text = String::new();
        for row in rows {
            let (email, external) = (row.email.unwrap_or_default(), row.external_id.unwrap_or_default());
            let numbers = [row.rx_bytes, row.tx_bytes, row.connection_seconds].map(|number| number.to_string());
            let [rx, tx, seconds] = &numbers;
            let (date, user, device) = (row.date.to_string(), row.user.to_string(), row.device.to_string());
            let name = row.device_name.unwrap_or_default();
            csv::push_line(&mut text, &[&date, &user, &email, &external, &device, &name, rx, tx, seconds]);
        }
        Ok(Some(text))
    }
}

pub(super) fn sums(period: Period, totals: usage::Totals) -> UsagePeriod {
    let bytes = totals.rx_bytes + totals.tx_bytes;
    UsagePeriod {
        from: period.from,
        to: period.to,
        bandwidth_gb: rounded(bytes, 1_000_000_000.0),
        bandwidth_bytes: bytes,
        rx_bytes: totals.rx_bytes,
        tx_bytes: totals.tx_bytes,
        active_users: totals.active_users,
        active_devices: totals.active_devices,
        connection_hours: rounded(totals.connection_seconds, 3600.0),
        connection_seconds: totals.connection_seconds,
    }
}

pub(super) fn limits(limits: usage::Limits) -> UsageLimits {
    UsageLimits {
        bandwidth_limit_bytes: limits.bandwidth_bytes,
        user_limit: limits.users.map(i64::from),
        max_devices_per_user: limits.devices_per_user.into(),
    }
}

/// For people; programs have the integer beside it. The one place where bytes are rounded.
fn rounded(value: i64, unit: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "three decimals are asked for, 2^53 bytes are 9 petabytes")]
    let value = value as f64;
    (value / unit * 1000.0).round() / 1000.0
}

fn period(query: &PeriodQuery, now: OffsetDateTime) -> Result<Period, Problem> {
    let month = Period::current(now);
    let mut problem = Problem::validation();
    let mut read = |pointer: &str, text: Option<&String>, default| match text.map(|text| moment(text)) {
        None => default,
        Some(Some(at)) => at,
        Some(None) => {
            let taken = std::mem::replace(&mut problem, Problem::validation());
            problem = taken.field(pointer, "invalid_format", "must be an RFC 3339 time or a date, such as 2026-11-01");
            default
        }
    };
    let to = read("?to", query.to.as_ref(), month.to);
    let from = read("?from", query.from.as_ref(), month.from.min(to));
    let problem = if to < from || (to - from).whole_days() > MAX_DAYS {
        problem.field("?from", "out_of_range", "must be before `to`, by at most 400 days")
    } else {
        problem
    };
    problem.or_ok(Period { from, to })
}

fn moment(text: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok().or_else(|| {
        let day = Date::parse(text, format_description!("[year]-[month]-[day]")).ok()?;
        Some(day.midnight().assume_utc())
    })
}
