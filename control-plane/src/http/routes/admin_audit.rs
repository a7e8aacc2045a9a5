//! `/admin/audit`: who changed what, across tenants.

use axum::extract::State;
use cvault_types::admin::AuditRecordList;
use cvault_types::{AuditId, TenantId};
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::admin::page_size;
use crate::app::App;
use crate::audit::{self, Filter};
use crate::http::{Admin, Json, Problem, Query, cursor};

const LIST: &str = "audit";

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list_audit))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct AuditQuery {
    /// 1 to 200; 50 when absent.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
    cursor: Option<String>,
    tenant_id: Option<TenantId>,
    /// A whole action such as `device.register`, or its noun, `device`.
    action: Option<String>,
    /// `usr_…`, `key_…`, `admin:…`, `cli`.
    actor: Option<String>,
    /// RFC 3339; included.
    from: Option<String>,
    /// RFC 3339; excluded.
    to: Option<String>,
}

/// The audit log of every tenant and of the platform itself, newest first. A cursor goes with the filters it was given for.
#[utoipa::path(get, path = "/admin/audit", tag = "admin", security(("admin" = [])), params(AuditQuery),
    responses((status = 200, body = AuditRecordList)))]
async fn list_audit(
    State(app): State<App>,
    _admin: Admin,
    Query(query): Query<AuditQuery>,
) -> Result<Json<AuditRecordList>, Problem> {
    let limit = page_size(query.limit)?;
    let before = query.cursor.map(|text| cursor::decode(&app.secrets, LIST, &text)).transpose()?;
    let filter = Filter {
        tenant: query.tenant_id,
        action: searchable("?action", query.action)?,
        actor: searchable("?actor", query.actor)?,
        from: moment("?from", query.from.as_deref())?,
        to: moment("?to", query.to.as_deref())?,
    };
    let rows = audit::search(&app.db.sys, &filter, before.map(AuditId::from_uuid), limit.to_fetch()).await?;
    let (data, has_more) = limit.cut(rows);
    let next = data.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, LIST, last.id.uuid()));
    Ok(Json(AuditRecordList { data, has_more, next_cursor: next }))
}

/// PostgreSQL takes no NUL in a text.
fn searchable(pointer: &str, text: Option<String>) -> Result<Option<String>, Problem> {
    match text {
        Some(text) if text.len() > 255 || text.contains('\0') => {
            Err(Problem::validation().field(pointer, "invalid_format", "must be at most 255 bytes without NUL"))
        }
        text => Ok(text),
    }
}

fn moment(pointer: &str, text: Option<&str>) -> Result<Option<OffsetDateTime>, Problem> {
    text.map(|text| OffsetDateTime::parse(text, &Rfc3339)).transpose().map_err(|_| {
        Problem::validation().field(pointer, "invalid_format", "must be an RFC 3339 time such as 2026-11-01T00:00:00Z")
    })
}
