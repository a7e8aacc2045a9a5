//! `/api/v1/tenant/request-logs`: what was asked with the tenant's keys lately. Role developer.

use axum::extract::State;
use cvault_types::request_log::RequestLogPage;
use cvault_types::{ApiKeyId, ErrorCode, RequestId, TenantRole, UserId};
use serde::Deserialize;
use time::OffsetDateTime;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::tenant_lists::PageQuery;
use crate::app::App;
use crate::http::{Json, Portal, Problem, Query, cursor};
use crate::request_logs::{self, Wanted};

/// Longer than any route of ours.
const MAX_ROUTE: usize = 200;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestLogQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    status: Option<String>,
    code: Option<ErrorCode>,
    method: Option<Verb>,
    route: Option<String>,
    api_key_id: Option<ApiKeyId>,
    user_id: Option<UserId>,
    request_id: Option<RequestId>,
    #[serde(default, with = "time::serde::rfc3339::option")]
    from: Option<OffsetDateTime>,
    #[serde(default, with = "time::serde::rfc3339::option")]
    to: Option<OffsetDateTime>,
}

#[derive(Debug, Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "UPPERCASE")]
enum Verb {
    Get,
    Head,
    Post,
    Patch,
    Put,
    Delete,
}

impl Verb {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::Post => "POST",
            Self::Patch => "PATCH",
            Self::Put => "PUT",
            Self::Delete => "DELETE",
        }
    }
}

/// Requests made with the tenant's keys, newest first.
///
/// Those that were let in or refused by the tenant's own limits and settings; a wrong key is nobody's. They appear within
/// seconds and are kept for some days. Of more than 500 in a second, some are missing.
#[utoipa::path(get, path = "/api/v1/tenant/request-logs", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "Default 50."),
           ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before."),
           ("status" = Option<String>, Query, pattern = "^[1-5]([0-9][0-9]|xx)$", description = "`403`, or `4xx` for all of them."),
           ("code" = Option<ErrorCode>, Query, description = "Only errors with this code."),
           ("method" = Option<Verb>, Query),
           ("route" = Option<String>, Query, max_length = 200, description = "The template, such as `/api/v1/devices/{device_id}`."),
           ("api_key_id" = Option<ApiKeyId>, Query),
           ("user_id" = Option<UserId>, Query),
           ("request_id" = Option<RequestId>, Query, description = "`X-Request-Id` of an answer."),
           ("from" = Option<String>, Query, format = DateTime, description = "RFC 3339, such as `2026-11-21T09:00:00Z`."),
           ("to" = Option<String>, Query, format = DateTime, description = "Exclusive.")),
    responses((status = 200, body = RequestLogPage),
              (status = 403, description = "INSUFFICIENT_SCOPE")))]
async fn list(
    State(app): State<App>,
    portal: Portal,
    Query(query): Query<RequestLogQuery>,
) -> Result<Json<RequestLogPage>, Problem> {
    portal.require(TenantRole::Developer)?;
    let (page, wanted) = query.parse()?;
    let limit = page.limit()?;
    let name = format!("request-logs:{}", portal.tenant);
    let before = page.after(&app, &name)?;
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let found = request_logs::list(&mut tx, &wanted, before, limit).await?;
    tx.commit().await?;
    let next_cursor = found.next.map(|last| cursor::encode(&app.secrets, &name, last));
    Ok(Json(RequestLogPage { data: found.entries, has_more: next_cursor.is_some(), next_cursor }))
}

impl RequestLogQuery {
    fn parse(self) -> Result<(PageQuery, Wanted), Problem> {
        let statuses = self.status.as_deref().map(|text| {
            statuses(text).ok_or_else(|| {
                Problem::validation().field("?status", "invalid_format", "must be a status such as 403, or 4xx")
            })
        });
        if self.route.as_ref().is_some_and(|route| route.len() > MAX_ROUTE || route.contains('\0')) {
            return Err(Problem::validation().field("?route", "invalid_format", "must be the template of a path"));
        }
        let wanted = Wanted {
            statuses: statuses.transpose()?,
            code: self.code,
            method: self.method.map(Verb::as_str),
            route: self.route,
            api_key: self.api_key_id,
            user: self.user_id,
            request: self.request_id,
            from: self.from,
            to: self.to,
        };
        Ok((PageQuery { limit: self.limit, cursor: self.cursor }, wanted))
    }
}

/// `403`, or `4xx`.
fn statuses(text: &str) -> Option<(i16, i16)> {
    let (class, rest) = text.split_at_checked(1)?;
    let hundreds = class.parse::<i16>().ok().filter(|class| (1..=5).contains(class))? * 100;
    if rest == "xx" {
        return Some((hundreds, hundreds + 99));
    }
    let digits = rest.len() == 2 && rest.bytes().all(|byte| byte.is_ascii_digit());
    let status = hundreds + rest.parse::<i16>().ok().filter(|_| digits)?;
    Some((status, status))
}

#[cfg(test)]
mod tests {
    use super::statuses;

    #[test]
    fn a_status_or_a_class_of_them() {
        assert_eq!(statuses("403"), Some((403, 403)));
        assert_eq!(statuses("4xx"), Some((400, 499)));
        for other in ["", "4", "40", "4x", "4XX", "4+1", "600", "099", "4033", "é00"] {
            assert_eq!(statuses(other), None, "{other}");
        }
    }
}
