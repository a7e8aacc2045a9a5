//! `GET /api/v1/tenant/request-logs`: what was asked with a tenant's API keys lately, and what came of it.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::{ApiKeyId, RequestId, UserId};

/// One request. Never its path, query, headers or body.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RequestLogEntry {
    /// `X-Request-Id` of its answer.
    pub request_id: RequestId,
    /// When its head had arrived.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    #[schema(example = "POST")]
    pub method: String,
    /// The template of the path.
    #[schema(example = "/api/v1/devices/{device_id}")]
    pub route: String,
    #[schema(example = 403)]
    pub status: u16,
    /// Of an error.
    #[schema(example = "DEVICE_LIMIT_EXCEEDED")]
    pub code: Option<String>,
    /// Until the answer was ready to be sent.
    #[schema(example = 8.214)]
    pub duration_ms: f64,
    pub api_key_id: ApiKeyId,
    /// Of a call with a user's token.
    pub user_id: Option<UserId>,
    /// Where it came from: the address of the caller as the trusted proxies tell it.
    #[schema(example = "203.0.113.7")]
    pub client_ip: Option<String>,
}

/// Newest first. With filters a page may hold fewer than `limit`, or none, and have more after it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RequestLogPage {
    pub data: Vec<RequestLogEntry>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}
