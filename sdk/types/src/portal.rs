//! `/api/v1/tenant/*`: the people of a tenant who manage it, their logins, and step-up challenges.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::secret::Secret;
use crate::tenant::{Tenant, TenantStatus};
use crate::{ChallengeId, PortalSessionId, TenantAdminId, TenantId};

/// What somebody may do in the portal. Owner covers admin, admin covers developer and billing, and each covers viewer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TenantRole {
    /// Everything, deleting the tenant included.
    Owner,
    /// Keys, settings, people.
    Admin,
    /// What an integration needs: reads keys, users and logs.
    Developer,
    /// Usage and limits.
    Billing,
    /// Reads.
    Viewer,
}

impl TenantRole {
    /// Whether somebody of this role may do what `needed` may.
    #[must_use]
    pub const fn covers(self, needed: Self) -> bool {
        match needed {
            Self::Viewer => true,
            Self::Billing => matches!(self, Self::Owner | Self::Admin | Self::Billing),
            Self::Developer => matches!(self, Self::Owner | Self::Admin | Self::Developer),
            Self::Admin => matches!(self, Self::Owner | Self::Admin),
            Self::Owner => matches!(self, Self::Owner),
        }
    }

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::Developer => "developer",
            Self::Billing => "billing",
            Self::Viewer => "viewer",
        }
    }

    /// The role of this name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Owner, Self::Admin, Self::Developer, Self::Billing, Self::Viewer]
            .into_iter()
            .find(|role| role.as_str() == text)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SignupRequest {
    /// The tenant's name.
    #[schema(min_length = 1, max_length = 255, example = "Acme GmbH")]
    pub business_name: String,
    #[schema(example = "owner@example.com", max_length = 254)]
    pub email: String,
    #[schema(value_type = String, min_length = 8, max_length = 128)]
    pub password: Secret,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortalLoginRequest {
    #[schema(example = "owner@example.com")]
    pub email: String,
    #[schema(value_type = String)]
    pub password: Secret,
}

/// The only answer that ever holds the API secret.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SignupResponse {
    #[serde(flatten)]
    pub login: PortalLogin,
    pub tenant: Tenant,
    #[schema(example = "cvk_4f0c7c1f6f7b4b0a8a2f0d3f5e6a7b8c9d0e1f2a1b2c3d4e")]
    pub api_key: String,
    #[schema(value_type = String, example = "cvs_…")]
    pub api_secret: Secret,
}

/// A login. A browser gets its credential as a cookie that scripts cannot read, and no tokens.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PortalLogin {
    pub admin_id: TenantAdminId,
    pub tenant_id: TenantId,
    pub role: TenantRole,
    pub session_id: PortalSessionId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<PortalTokens>,
}

/// For programs: the access token goes into `Authorization: Bearer`, the refresh token gets the next pair, once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PortalTokens {
    #[schema(value_type = String, example = "eyJ…")]
    pub access_token: Secret,
    #[schema(value_type = String, example = "cvr_…")]
    pub refresh_token: Secret,
    #[schema(example = "Bearer")]
    pub token_type: String,
    /// Seconds until the access token expires.
    #[schema(example = 900)]
    pub expires_in: u64,
}

/// For refresh and logout. A browser leaves the token out: its cookie says which session is meant.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortalRefreshRequest {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub refresh_token: Option<Secret>,
}

/// Who is logged in.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PortalMe {
    pub admin_id: TenantAdminId,
    #[schema(example = "owner@example.com")]
    pub email: String,
    #[schema(example = true)]
    pub email_verified: bool,
    pub role: TenantRole,
    pub tenant_id: TenantId,
    #[schema(example = "Acme GmbH")]
    pub tenant_name: String,
    pub tenant_status: TenantStatus,
    pub session_id: PortalSessionId,
    #[serde(with = "time::serde::rfc3339")]
    pub session_expires_at: OffsetDateTime,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyEmailRequest {
    /// From the mailed link.
    #[schema(value_type = String)]
    pub token: Secret,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeEmailRequest {
    #[schema(example = "new@example.com", max_length = 254)]
    pub email: String,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeEmailConfirm {
    /// From the mailed link.
    #[schema(value_type = String)]
    pub token: Secret,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PasswordResetRequest {
    #[schema(example = "owner@example.com")]
    pub email: String,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PasswordResetConfirm {
    /// From the mailed link.
    #[schema(value_type = String)]
    pub token: Secret,
    #[schema(value_type = String, min_length = 8, max_length = 128)]
    pub password: Secret,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangePasswordRequest {
    #[schema(value_type = String, min_length = 8, max_length = 128)]
    pub password: Secret,
}

/// A login of the person who asks.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PortalSession {
    pub id: PortalSessionId,
    /// The session that asks.
    pub current: bool,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub last_seen_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    /// Where it was last seen.
    pub ip: Option<String>,
    /// What the browser or program calls itself.
    #[schema(example = "Mozilla/5.0")]
    pub user_agent: String,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PortalSessionList {
    pub data: Vec<PortalSession>,
}

/// How a challenge may be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepUpMethod {
    /// The password of the person who is logged in.
    Password,
}

/// In the body of a `CHALLENGE_REQUIRED`. Answer it at `verify_url`, then send the same request again, once, with the
/// token in `X-Challenge-Token`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Challenge {
    pub id: ChallengeId,
    /// What the request would do, as `noun.verb`.
    #[schema(example = "api_key.create")]
    pub action: String,
    pub methods: Vec<StepUpMethod>,
    #[serde(with = "time::serde::rfc3339")]
    pub expires_at: OffsetDateTime,
    pub verify_url: String,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(tag = "method", rename_all = "snake_case", deny_unknown_fields)]
pub enum StepUpAnswer {
    Password {
        #[schema(value_type = String)]
        password: Secret,
    },
}

/// Good for one request, the one that was challenged.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ChallengeToken {
    #[schema(value_type = String, example = "cvc_…")]
    pub challenge_token: Secret,
    #[schema(example = 60)]
    pub expires_in_seconds: u64,
}

#[cfg(test)]
mod tests {
    use super::TenantRole::{Admin, Billing, Developer, Owner, Viewer};
    use super::*;

    #[test]
    fn each_role_covers_what_its_line_says() {
        let table = [
            (Owner, vec![Owner, Admin, Developer, Billing, Viewer]),
            (Admin, vec![Admin, Developer, Billing, Viewer]),
            (Developer, vec![Developer, Viewer]),
            (Billing, vec![Billing, Viewer]),
            (Viewer, vec![Viewer]),
        ];
        for (role, covered) in table {
            for needed in [Owner, Admin, Developer, Billing, Viewer] {
                assert_eq!(role.covers(needed), covered.contains(&needed), "{role:?} {needed:?}");
            }
            assert_eq!(TenantRole::parse(role.as_str()), Some(role));
            assert_eq!(serde_json::to_value(role).unwrap(), role.as_str());
        }
        assert_eq!(TenantRole::parse("root"), None);
    }
}
