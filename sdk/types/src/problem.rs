//! The body of every error answer: RFC 9457 problem details with CVault's code.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::portal::Challenge;
use crate::{ErrorCode, RequestId};

/// Why a request was refused (`application/problem+json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProblemBody {
    /// A page that explains the code.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub detail: String,
    pub code: ErrorCode,
    pub request_id: RequestId,
    /// Whether the same request may succeed later without being changed.
    pub retryable: bool,
    /// Every fault of the request's fields.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldFault>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
    /// With `CHALLENGE_REQUIRED`: what to answer before the request is sent again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub challenge: Option<Challenge>,
}

/// One fault of one field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldFault {
    /// JSON pointer into the body, or `?name` for a query parameter.
    pub pointer: String,
    /// `missing`, `unknown`, `invalid_type`, `invalid_format`, `too_short`, `too_long`, `out_of_range`, …
    pub code: String,
    pub detail: String,
}

/// The limit that was reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Limit {
    pub name: String,
    pub max: i64,
    pub used: i64,
    #[serde(with = "time::serde::rfc3339::option")]
    pub resets_at: Option<OffsetDateTime>,
}
