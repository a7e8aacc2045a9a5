//! `/api/v1/tenant/api-keys`: the keys a tenant's programs call with.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::{ApiKeyId, Secret};

/// What a key may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// `/api/v1/auth/…`
    Auth,
    /// `/api/v1/users…`
    Users,
    /// `/api/v1/usage`
    Usage,
    /// `/api/v1/devices…`, `/api/v1/vpn/…`, `/api/v1/servers`
    Devices,
}

impl Scope {
    pub const ALL: [Self; 4] = [Self::Auth, Self::Users, Self::Usage, Self::Devices];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auth => "auth",
            Self::Users => "users",
            Self::Usage => "usage",
            Self::Devices => "devices",
        }
    }

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == text)
    }
}

/// A key, without its secret.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ApiKey {
    pub id: ApiKeyId,
    #[schema(example = "backend")]
    pub name: String,
    /// The public part, for `X-API-Key`.
    #[schema(example = "cvk_4f0c7c1f6f7b4b0a8a2f0d3f5e6a7b8c9d0e1f2a1b2c3d4e")]
    pub api_key: String,
    pub scopes: Vec<Scope>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// From then on the key is refused; null: never.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// Known to the minute; null: never used.
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_used_at: Option<OffsetDateTime>,
    /// When the secret was last replaced; null: never.
    #[serde(with = "time::serde::rfc3339::option")]
    pub regenerated_at: Option<OffsetDateTime>,
    /// Until then the secret before the last regeneration works too; null: it does not.
    #[serde(with = "time::serde::rfc3339::option")]
    pub previous_secret_valid_until: Option<OffsetDateTime>,
}

/// The only answer that ever holds the secret.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreatedApiKey {
    #[serde(flatten)]
    pub key: ApiKey,
    #[schema(value_type = String, example = "cvs_…")]
    pub api_secret: Secret,
}

/// All keys that are not revoked, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ApiKeyList {
    pub data: Vec<ApiKey>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateApiKey {
    /// 1 to 255 printable characters.
    #[schema(example = "backend", min_length = 1, max_length = 255)]
    pub name: String,
    /// Absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 4)]
    pub scopes: Option<Vec<Scope>>,
    /// Absent or null: never.
    #[serde(default, with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<OffsetDateTime>,
}

/// Absent fields stay as they are; `null` takes the expiry away.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateApiKey {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 255)]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 4)]
    pub scopes: Option<Vec<Scope>>,
    #[serde(default, with = "present_time", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = "date-time")]
    pub expires_at: Option<Option<OffsetDateTime>>,
}

/// `POST /api/v1/tenant/api-keys/regenerate`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegenerateApiKey {
    /// Absent: the tenant's only key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_id: Option<ApiKeyId>,
    /// How long the old secret goes on working, at most seven days; 0 when absent.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 604_800)]
    pub grace_period_seconds: u32,
}

/// Tells `null` from an absent field.
mod present_time {
    use serde::{Deserializer, Serializer};
    use time::OffsetDateTime;
    use time::serde::rfc3339::option;

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<OffsetDateTime>>, D::Error> {
        option::deserialize(from).map(Some)
    }

    pub(super) fn serialize<S: Serializer>(at: &Option<Option<OffsetDateTime>>, to: S) -> Result<S::Ok, S::Error> {
        option::serialize(&at.flatten(), to)
    }
}
