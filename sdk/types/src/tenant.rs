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
    Deleted,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub whitelabel_config: Option<serde_json::Map<String, serde_json::Value>>,
    /// `active` (default) or `trial`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<TenantStatus>,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub whitelabel_config: Option<serde_json::Map<String, serde_json::Value>>,
    /// `active`, `trial` or `suspended`; a tenant is deleted with DELETE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<TenantStatus>,
}

/// Tells `null` from an absent field.
fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Tenant {
    pub id: TenantId,
    pub name: String,
    pub status: TenantStatus,
    pub bandwidth_limit_gb: Option<i64>,
    pub user_limit: Option<i32>,
    pub max_devices_per_user: i32,
    pub rate_limit_per_minute: Option<i32>,
    #[schema(value_type = Object)]
    pub whitelabel_config: serde_json::Map<String, serde_json::Value>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// The only answer that ever holds the secret.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreatedTenant {
    #[serde(flatten)]
    pub tenant: Tenant,
    pub api_key: String,
    #[schema(value_type = String)]
    pub api_secret: Secret,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantList {
    pub data: Vec<Tenant>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}
