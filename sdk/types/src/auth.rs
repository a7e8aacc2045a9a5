//! `/api/v1/auth/*`: registering and logging in a tenant's users.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::UserId;
use crate::secret::Secret;

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterRequest {
    #[schema(example = "user@example.com", max_length = 254)]
    pub email: String,
    #[schema(value_type = String, min_length = 8, max_length = 128)]
    pub password: Secret,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoginRequest {
    #[schema(example = "user@example.com")]
    pub email: String,
    #[schema(value_type = String)]
    pub password: Secret,
}

/// For refresh and logout.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RefreshRequest {
    #[schema(value_type = String)]
    pub refresh_token: Secret,
}

/// A login: the access token goes into `Authorization: Bearer`, the refresh token gets the next pair, once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenResponse {
    pub user_id: UserId,
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
