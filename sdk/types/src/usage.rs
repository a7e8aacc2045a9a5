//! Usage: bytes and connections of a tenant.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

/// `GET /api/v1/usage`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    pub current_period: UsagePeriod,
    pub limits: UsageLimits,
    /// One entry for each day of the period on which something happened, UTC.
    pub daily: Vec<UsageDay>,
}

/// Sums over a period. Bytes are inner IP bytes that passed authentication and policy.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct UsagePeriod {
    #[serde(with = "time::serde::rfc3339")]
    pub from: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub to: OffsetDateTime,
    /// `bandwidth_bytes` in units of 10⁹ bytes.
    #[schema(example = 45.2)]
    pub bandwidth_gb: f64,
    /// `rx_bytes` and `tx_bytes` together.
    pub bandwidth_bytes: i64,
    /// From the devices.
    pub rx_bytes: i64,
    /// To the devices.
    pub tx_bytes: i64,
    /// Users with a session or traffic.
    pub active_users: i64,
    pub active_devices: i64,
    #[schema(example = 5430.0)]
    pub connection_hours: f64,
    pub connection_seconds: i64,
}

/// The tenant's limits; null: none.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct UsageLimits {
    pub bandwidth_limit_bytes: Option<i64>,
    pub user_limit: Option<i64>,
    pub max_devices_per_user: i64,
}

/// One day, UTC.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct UsageDay {
    /// `YYYY-MM-DD`
    #[schema(example = "2026-11-20", format = "date")]
    pub date: String,
    pub rx_bytes: i64,
    pub tx_bytes: i64,
    pub connection_seconds: i64,
    pub active_users: i64,
}
