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
    #[schema(example = 45_200_000_000_i64)]
    pub bandwidth_bytes: i64,
    /// From the devices.
    #[schema(example = 9_000_000_000_i64)]
    pub rx_bytes: i64,
    /// To the devices.
    #[schema(example = 36_200_000_000_i64)]
    pub tx_bytes: i64,
    /// Users with a session or traffic.
    #[schema(example = 20)]
    pub active_users: i64,
    #[schema(example = 31)]
    pub active_devices: i64,
    #[schema(example = 5430.0)]
    pub connection_hours: f64,
    #[schema(example = 19_548_000)]
    pub connection_seconds: i64,
}

/// The tenant's limits; null: none.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct UsageLimits {
    #[schema(example = 500_000_000_000_i64)]
    pub bandwidth_limit_bytes: Option<i64>,
    #[schema(example = 1000)]
    pub user_limit: Option<i64>,
    #[schema(example = 5)]
    pub max_devices_per_user: i64,
}

/// One day, UTC.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct UsageDay {
    /// `YYYY-MM-DD`
    #[schema(example = "2026-11-20", format = "date")]
    pub date: String,
    #[schema(example = 300_000_000)]
    pub rx_bytes: i64,
    #[schema(example = 1_200_000_000)]
    pub tx_bytes: i64,
    #[schema(example = 86_400)]
    pub connection_seconds: i64,
    #[schema(example = 12)]
    pub active_users: i64,
}
