//! `/api/v1/tenant/settings`: what a tenant decides for itself.

use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::TenantId;
use crate::tenant::TenantStatus;

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantSettings {
    pub tenant_id: TenantId,
    #[schema(example = "Acme GmbH")]
    pub name: String,
    pub status: TenantStatus,
    #[schema(value_type = Object)]
    pub whitelabel_config: serde_json::Map<String, serde_json::Value>,
    /// Whether users may register and log in with the API key alone, from programs that cannot keep a secret.
    pub public_clients: bool,
    /// Pages of these origins may call the client API from a browser.
    #[schema(example = json!(["https://app.example.com"]))]
    pub allowed_origins: Vec<String>,
    /// Resolvers in device configurations; null: the platform's.
    #[schema(example = json!(["10.0.0.53"]))]
    pub client_dns: Option<Vec<String>>,
    /// What devices send through the tunnel; null: everything.
    #[schema(example = json!(["10.0.0.0/8", "fd00::/8"]))]
    pub client_allowed_ips: Option<Vec<String>>,
    /// MTU in device configurations; null: the platform's.
    pub client_mtu: Option<u16>,
    pub limits: TenantLimits,
}

/// Set by the platform; null: none.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantLimits {
    #[schema(example = 500)]
    pub bandwidth_limit_gb: Option<i64>,
    #[schema(example = 1000)]
    pub user_limit: Option<i32>,
    #[schema(example = 5)]
    pub max_devices_per_user: i32,
    #[schema(example = 100)]
    pub rate_limit_per_minute: u32,
}

/// Absent fields stay as they are; `null` goes back to the platform's value.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateSettings {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 255)]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub whitelabel_config: Option<serde_json::Map<String, serde_json::Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_clients: Option<bool>,
    /// As browsers write them in `Origin`: scheme, host, and port if it is not the usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_items = 100)]
    pub allowed_origins: Option<Vec<String>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>, min_items = 1, max_items = 4)]
    pub client_dns: Option<Option<Vec<String>>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>, min_items = 1, max_items = 32)]
    pub client_allowed_ips: Option<Option<Vec<String>>>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u16>, minimum = 1280, maximum = 1500)]
    pub client_mtu: Option<Option<u16>>,
}

/// Tells `null` from an absent field.
fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}
