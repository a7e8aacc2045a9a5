//! `/admin/tenants`: the platform's business customers.

use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::TenantId;
use crate::secret::Secret;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TenantStatus {
    Active,
    Trial,
    Suspended,
    /// For good: what is left of it is being erased.
    Deleting,
    Deleted,
}

/// What happens to a tenant's traffic when its month is used up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OverQuota {
    /// It stops at the byte.
    #[default]
    Block,
    /// It goes on at `throttle_kbps`, each device and direction.
    Throttle,
}

/// What a tenant's traffic may do. Addresses of the servers themselves and metadata services are always closed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TenantPolicy {
    /// All devices on one server together, Mbit/s from them; null: no limit.
    pub rate_up_mbps: Option<i32>,
    /// … and to them.
    pub rate_down_mbps: Option<i32>,
    /// Each device, Mbit/s from it; null: no limit.
    pub device_rate_up_mbps: Option<i32>,
    /// … and to it.
    pub device_rate_down_mbps: Option<i32>,
    /// The tenant's devices on a server reach each other.
    pub allow_intra_tenant: bool,
    /// Private prefixes that its devices reach behind the server, such as `10.20.0.0/16`.
    #[schema(example = json!(["10.20.0.0/16"]))]
    pub allow_private_destinations: Vec<String>,
    /// TCP port 25.
    pub allow_smtp: bool,
    pub over_quota: OverQuota,
    #[schema(example = 1000)]
    pub throttle_kbps: i32,
}

impl Default for TenantPolicy {
    fn default() -> Self {
        Self {
            rate_up_mbps: None,
            rate_down_mbps: None,
            device_rate_up_mbps: None,
            device_rate_down_mbps: None,
            allow_intra_tenant: false,
            allow_private_destinations: Vec::new(),
            allow_smtp: false,
            over_quota: OverQuota::Block,
            throttle_kbps: 1_000,
        }
    }
}

/// Absent fields stay as they are; `null` takes a limit away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateTenantPolicy {
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i32>, minimum = 1, maximum = 100_000)]
    pub rate_up_mbps: Option<Option<i32>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i32>, minimum = 1, maximum = 100_000)]
    pub rate_down_mbps: Option<Option<i32>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i32>, minimum = 1, maximum = 100_000)]
    pub device_rate_up_mbps: Option<Option<i32>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i32>, minimum = 1, maximum = 100_000)]
    pub device_rate_down_mbps: Option<Option<i32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_intra_tenant: Option<bool>,
    /// Replaces the list. At most 64 prefixes inside 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 100.64.0.0/10 or fc00::/7.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 64)]
    pub allow_private_destinations: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_smtp: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over_quota: Option<OverQuota>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 64, maximum = 100_000_000)]
    pub throttle_kbps: Option<i32>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTenantRequest {
    #[schema(min_length = 1, max_length = 255)]
    pub name: String,
    /// Per calendar month, UTC; 1 GB = 10⁹ bytes. Absent or null: unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit_gb: Option<i64>,
    /// Absent or null: unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_limit: Option<i32>,
    /// Absent: 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_devices_per_user: Option<i32>,
    /// Absent: the platform's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_per_minute: Option<i32>,
    /// What one of its users may send of that. Absent: half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_rate_limit_per_minute: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub whitelabel_config: Option<serde_json::Map<String, serde_json::Value>>,
    /// `active` (default) or `trial`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<TenantStatus>,
    /// What its traffic may do; absent fields have their defaults.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<UpdateTenantPolicy>,
}

/// Absent fields stay as they are; `null` takes a limit away.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateTenantRequest {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i64>)]
    pub bandwidth_limit_gb: Option<Option<i64>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i32>)]
    pub user_limit: Option<Option<i32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_devices_per_user: Option<i32>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i32>)]
    pub rate_limit_per_minute: Option<Option<i32>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i32>)]
    pub user_rate_limit_per_minute: Option<Option<i32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub whitelabel_config: Option<serde_json::Map<String, serde_json::Value>>,
    /// `active`, `trial` or `suspended`; a tenant is deleted with DELETE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<TenantStatus>,
    /// In force on all servers within a second, for traffic that flows too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<UpdateTenantPolicy>,
}

/// Tells `null` from an absent field.
fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Tenant {
    pub id: TenantId,
    #[schema(example = "Acme GmbH")]
    pub name: String,
    pub status: TenantStatus,
    #[schema(example = 500)]
    pub bandwidth_limit_gb: Option<i64>,
    #[schema(example = 1000)]
    pub user_limit: Option<i32>,
    #[schema(example = 5)]
    pub max_devices_per_user: i32,
    pub rate_limit_per_minute: Option<i32>,
    /// What one user may send; null: half of what the tenant may.
    pub user_rate_limit_per_minute: Option<i32>,
    #[schema(value_type = Object)]
    pub whitelabel_config: serde_json::Map<String, serde_json::Value>,
    pub policy: TenantPolicy,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// The only answer that ever holds the secret.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreatedTenant {
    #[serde(flatten)]
    pub tenant: Tenant,
    #[schema(example = "cvk_4f0c7c1f6f7b4b0a8a2f0d3f5e6a7b8c9d0e1f2a1b2c3d4e")]
    pub api_key: String,
    #[schema(value_type = String, example = "cvs_…")]
    pub api_secret: Secret,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantList {
    pub data: Vec<Tenant>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}
