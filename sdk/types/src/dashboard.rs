//! `/api/v1/tenant/dashboard/*` and the lists beside it: what a tenant's people see of its users, devices and traffic.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::usage::{UsageLimits, UsagePeriod};
use crate::{DeviceId, ServerId, UserId};

/// `GET /api/v1/tenant/dashboard/stats`: sums over a period, and what there is now.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DashboardStats {
    #[serde(flatten)]
    pub usage: UsagePeriod,
    /// Calls with the tenant's keys on the days of the period; known to a quarter of a minute.
    #[schema(example = 102_000)]
    pub api_calls: i64,
    pub now: DashboardNow,
    pub limits: UsageLimits,
    #[schema(example = 100)]
    pub rate_limit_per_minute: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DashboardNow {
    #[schema(example = 20)]
    pub users: i64,
    #[schema(example = 50)]
    pub devices: i64,
    /// Devices with an open session.
    #[schema(example = 31)]
    pub connected_devices: i64,
    pub servers: Vec<ServerIndicator>,
}

/// Whether a server of the platform is there.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ServerIndicator {
    pub id: ServerId,
    #[schema(example = "us-east")]
    pub region: String,
    /// It has reported lately.
    #[schema(example = true)]
    pub online: bool,
    /// It takes devices.
    #[schema(example = true)]
    pub available: bool,
    /// Percent of its capacity.
    #[schema(example = 45)]
    pub load: u8,
}

/// `GET /api/v1/tenant/dashboard/usage`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DashboardUsage {
    #[serde(with = "time::serde::rfc3339")]
    pub from: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub to: OffsetDateTime,
    /// Every day of the period, UTC, also those on which nothing happened.
    pub daily: Vec<DashboardDay>,
    /// Bytes by the region of the server that carried them, most first.
    pub regions: Vec<RegionUsage>,
    /// 24 entries: bytes by the hour of the day, UTC, over all days.
    pub hours: Vec<HourUsage>,
}

/// One day, UTC.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DashboardDay {
    /// `YYYY-MM-DD`
    #[schema(example = "2026-11-20", format = "date")]
    pub date: String,
    #[schema(example = 1_500_000_000)]
    pub bandwidth_bytes: i64,
    #[schema(example = 300_000_000)]
    pub rx_bytes: i64,
    #[schema(example = 1_200_000_000)]
    pub tx_bytes: i64,
    #[schema(example = 86_400)]
    pub connection_seconds: i64,
    #[schema(example = 12)]
    pub active_users: i64,
    #[schema(example = 3400)]
    pub api_calls: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RegionUsage {
    /// Empty: of a server that was removed.
    #[schema(example = "us-east")]
    pub region: String,
    #[schema(example = 1_500_000_000)]
    pub bandwidth_bytes: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HourUsage {
    /// 0 to 23.
    #[schema(example = 9)]
    pub hour: u8,
    #[schema(example = 62_500_000)]
    pub bandwidth_bytes: i64,
}

/// `GET /api/v1/tenant/dashboard/activity`: what happened lately, newest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ActivityPage {
    pub data: Vec<Activity>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Activity {
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// `session.open` for a connection, however it began; otherwise as in the audit log.
    #[schema(example = "session.open")]
    pub action: String,
    #[schema(example = "usr_01kaz3r6e8f4s9w2v5m7n0q1tb")]
    pub actor: String,
    #[schema(example = "ses_01kaz3r6e8f4s9w2v5m7n0q1tb")]
    pub target: String,
    /// Where, if a server had to do with it.
    #[schema(example = "us-east")]
    pub region: Option<String>,
}

/// `GET /api/v1/tenant/devices`: all devices of the tenant, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantDevicePage {
    pub data: Vec<TenantDevice>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantDevice {
    pub device_id: DeviceId,
    pub user_id: UserId,
    #[schema(example = "MacBook Pro")]
    pub device_name: String,
    #[schema(example = "macos")]
    pub platform: Option<String>,
    #[schema(value_type = String, format = "ipv4", example = "10.8.0.45")]
    pub assigned_ip: Ipv4Addr,
    #[schema(value_type = String, format = "ipv6", example = "fd00:cafe::2d")]
    pub assigned_ipv6: Ipv6Addr,
    pub server_id: ServerId,
    #[schema(example = "us-east")]
    pub server_region: String,
    /// Off its server, because the tenant or its user is.
    pub suspended: bool,
    #[schema(example = true)]
    pub tunnel_up: bool,
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_handshake_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}
