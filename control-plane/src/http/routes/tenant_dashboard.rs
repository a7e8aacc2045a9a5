//! `/api/v1/tenant/dashboard/*`: a tenant's figures, for its people. Every role.

use std::collections::HashMap;

use axum::extract::State;
use cvault_types::ServerId;
use cvault_types::dashboard::{
    Activity, ActivityPage, DashboardDay, DashboardNow, DashboardStats, DashboardUsage, HourUsage, RegionUsage,
    ServerIndicator,
};
use serde::Deserialize;
use time::{Duration, OffsetDateTime};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::tenant_lists::PageQuery;
use super::usage::{limits, sums};
use crate::app::App;
use crate::dashboard;
use crate::http::{Json, Portal, Problem, Query, cursor};
use crate::servers::{self, SILENT_AFTER_SECONDS, Server};
use crate::tenants;
use crate::usage::{self, Day, Period};

const MAX_DAYS: u16 = 400;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(stats)).routes(routes!(show_usage)).routes(routes!(activity))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DaysQuery {
    days: Option<u16>,
}

impl DaysQuery {
    fn period(&self, now: OffsetDateTime) -> Result<Period, Problem> {
        let days = self.days.unwrap_or(30);
        if (1..=MAX_DAYS).contains(&days) {
            Ok(dashboard::last_days(days, now))
        } else {
            Err(Problem::validation().field("?days", "out_of_range", "must be from 1 to 400"))
        }
    }
}

/// Sums over the last days, UTC, today included; and what there is now.
#[utoipa::path(get, path = "/api/v1/tenant/dashboard/stats", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("days" = Option<u16>, Query, minimum = 1, maximum = 400, description = "Default 30.")),
    responses((status = 200, body = DashboardStats)))]
async fn stats(
    State(app): State<App>,
    portal: Portal,
    Query(query): Query<DaysQuery>,
) -> Result<Json<DashboardStats>, Problem> {
    let now = app.clock.now();
    let period = query.period(now)?;
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let usage::Report { totals, limits: tenant_limits, .. } = usage::report(&mut tx, period).await?;
    let settings = tenants::settings(&mut tx, app.config.rate_limit_per_minute).await?;
    let calls = dashboard::api_calls(&mut tx, period).await?;
    let present = dashboard::present(&mut tx).await?;
    let servers = servers::list(&mut tx).await?;
    tx.commit().await?;
    Ok(Json(DashboardStats {
        usage: sums(period, totals),
        api_calls: calls.iter().map(|(_, calls)| calls).sum(),
        now: DashboardNow {
            users: present.users,
            devices: present.devices,
            connected_devices: present.connected_devices,
            servers: servers.iter().map(|server| indicator(server, now)).collect(),
        },
        limits: limits(tenant_limits),
        rate_limit_per_minute: settings.limits.rate_limit_per_minute,
    }))
}

fn indicator(server: &Server, now: OffsetDateTime) -> ServerIndicator {
    let silent = |at: OffsetDateTime| (now - at).whole_seconds() >= SILENT_AFTER_SECONDS;
    ServerIndicator {
        id: server.id,
        region: server.region.clone(),
        online: server.last_seen_at.is_some_and(|at| !silent(at)),
        available: server.takes_devices(now),
        load: server.load_percent(),
    }
}

/// Bytes, connections and calls by day, region and hour of the day, UTC.
#[utoipa::path(get, path = "/api/v1/tenant/dashboard/usage", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("days" = Option<u16>, Query, minimum = 1, maximum = 400, description = "Default 30.")),
    responses((status = 200, body = DashboardUsage)))]
async fn show_usage(
    State(app): State<App>,
    portal: Portal,
    Query(query): Query<DaysQuery>,
) -> Result<Json<DashboardUsage>, Problem> {
    let period = query.period(app.clock.now())?;
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let usage::Report { days, .. } = usage::report(&mut tx, period).await?;
    let calls = dashboard::api_calls(&mut tx, period).await?;
    let by_server = dashboard::by_server(&mut tx, period).await?;
    let hours = dashboard::by_hour(&mut tx, period).await?;
    let servers = servers::list(&mut tx).await?;
    tx.commit().await?;
    Ok(Json(DashboardUsage {
        from: period.from,
        to: period.to,
        daily: daily(period, &days, &calls.into_iter().collect()),
        regions: regions(&by_server, &servers),
        hours: (0..24).zip(hours).map(|(hour, bandwidth_bytes)| HourUsage { hour, bandwidth_bytes }).collect(),
    }))
}

/// Every day of the period.
fn daily(period: Period, days: &[Day], calls: &HashMap<time::Date, i64>) -> Vec<DashboardDay> {
    let mut filled = Vec::new();
    let mut date = period.from.date();
    while date <= period.to.date() {
        let day = days.iter().find(|day| day.date == date);
        let (rx_bytes, tx_bytes) = day.map_or((0, 0), |day| (day.rx_bytes, day.tx_bytes));
        filled.push(DashboardDay {
            date: date.to_string(),
            bandwidth_bytes: rx_bytes + tx_bytes,
            rx_bytes,
            tx_bytes,
            connection_seconds: day.map_or(0, |day| day.connection_seconds),
            active_users: day.map_or(0, |day| day.active_users),
            api_calls: calls.get(&date).copied().unwrap_or_default(),
        });
        date += Duration::days(1);
    }
    filled
}

fn regions(by_server: &[(ServerId, i64)], servers: &[Server]) -> Vec<RegionUsage> {
    let mut sums: HashMap<&str, i64> = HashMap::new();
    for (id, bytes) in by_server {
        let region = servers.iter().find(|server| server.id == *id).map_or("", |server| server.region.as_str());
        *sums.entry(region).or_default() += bytes;
    }
    let mut regions: Vec<_> = sums
        .into_iter()
        .map(|(region, bandwidth_bytes)| RegionUsage { region: region.to_owned(), bandwidth_bytes })
        .collect();
    regions.sort_by(|a, b| (b.bandwidth_bytes, &a.region).cmp(&(a.bandwidth_bytes, &b.region)));
    regions
}

/// What happened lately, newest first: connections and changes.
#[utoipa::path(get, path = "/api/v1/tenant/dashboard/activity", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "Default 50."),
           ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before.")),
    responses((status = 200, body = ActivityPage)))]
async fn activity(
    State(app): State<App>,
    portal: Portal,
    Query(query): Query<PageQuery>,
) -> Result<Json<ActivityPage>, Problem> {
    let limit = query.limit()?;
    let name = format!("activity:{}", portal.tenant);
    let before = query.after(&app, &name)?;
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let mut events = dashboard::activity(&mut tx, before, limit + 1).await?;
    let servers = servers::list(&mut tx).await?;
    tx.commit().await?;
    let has_more = events.len() > limit as usize;
    events.truncate(limit as usize);
    let next_cursor = events.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, &name, last.place));
    let region = |id: ServerId| servers.iter().find(|server| server.id == id).map(|server| server.region.clone());
    let data = events
        .into_iter()
        .map(|event| Activity {
            at: event.at,
            action: event.action,
            actor: event.actor,
            target: event.target,
            region: event.server.and_then(region),
        })
        .collect();
    Ok(Json(ActivityPage { data, has_more, next_cursor }))
}
