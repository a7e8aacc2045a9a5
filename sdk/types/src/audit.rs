//! `GET /api/v1/tenant/audit`: what was changed in a tenant, by whom.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::{AuditId, RequestId};

/// One change.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AuditEntry {
    pub id: AuditId,
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// `usr_…`, `adm_…`, `key_…`, `admin:…`, `cli`, `signup`, `system`.
    #[schema(example = "usr_01kaz3r6e8f4s9w2v5m7n0q1tb")]
    pub actor: String,
    /// `noun.verb`
    #[schema(example = "device.register")]
    pub action: String,
    #[schema(example = "dev_01kaz3r6e8f4s9w2v5m7n0q1tb")]
    pub target: String,
    #[schema(value_type = Object, example = json!({"device_name": "MacBook Pro"}))]
    pub details: serde_json::Value,
    pub request_id: Option<RequestId>,
    /// Its place in the tenant's hash chain, from a few seconds after it was written.
    #[schema(example = 17)]
    pub chain_sequence: Option<i64>,
}

/// Newest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AuditPage {
    pub data: Vec<AuditEntry>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}
