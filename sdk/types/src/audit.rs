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
    pub actor: String,
    /// `noun.verb`
    #[schema(example = "device.register")]
    pub action: String,
    pub target: String,
    #[schema(value_type = Object)]
    pub details: serde_json::Value,
    pub request_id: Option<RequestId>,
    /// Its place in the tenant's hash chain, from a few seconds after it was written.
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
