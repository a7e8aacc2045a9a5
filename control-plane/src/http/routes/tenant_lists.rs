//! `/api/v1/tenant/{audit,users,devices}`: what there is and what was changed, for the tenant's people. Role developer.

use axum::extract::State;
use cvault_types::audit::AuditPage;
use cvault_types::dashboard::{TenantDevice, TenantDevicePage};
use cvault_types::user::UserPage;
use cvault_types::{AuditId, DeviceId, TenantRole, UserId};
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::users::filter;
use crate::app::App;
use crate::audit::{self, Wanted};
use crate::devices::{self, OwnedDevice};
use crate::http::{Json, Portal, Problem, Query, cursor};
use crate::servers::{self, Server};
use crate::users;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list_audit)).routes(routes!(list_users)).routes(routes!(list_devices))
}

/// Which part of a list.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PageQuery {
    pub(super) limit: Option<u32>,
    pub(super) cursor: Option<String>,
}

impl PageQuery {
    pub(super) fn limit(&self) -> Result<u32, Problem> {
        let limit = self.limit.unwrap_or(50);
        if (1..=200).contains(&limit) {
            Ok(limit)
        } else {
            Err(Problem::validation().field("?limit", "out_of_range", "must be from 1 to 200"))
        }
    }

    pub(super) fn after(&self, app: &App, list: &str) -> Result<Option<Uuid>, Problem> {
        self.cursor.as_deref().map(|text| cursor::decode(&app.secrets, list, text)).transpose()
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AuditQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    action: Option<String>,
    actor: Option<String>,
    target: Option<String>,
}

/// What was changed in the tenant, newest first.
#[utoipa::path(get, path = "/api/v1/tenant/audit", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "Default 50."),
           ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before."),
           ("action" = Option<String>, Query, description = "`device.register`, or `device` for all of them."),
           ("actor" = Option<String>, Query, description = "Only by this one, as `adm_…`."),
           ("target" = Option<String>, Query, description = "Only to this one, as `dev_…`.")),
    responses((status = 200, body = AuditPage),
              (status = 403, description = "INSUFFICIENT_SCOPE")))]
async fn list_audit(
    State(app): State<App>,
    portal: Portal,
    Query(query): Query<AuditQuery>,
) -> Result<Json<AuditPage>, Problem> {
    portal.require(TenantRole::Developer)?;
    let page = PageQuery { limit: query.limit, cursor: query.cursor };
    let limit = page.limit()?;
    let name = format!("audit:{}", portal.tenant);
    let before = page.after(&app, &name)?;
    let wanted = Wanted { action: query.action, actor: query.actor, target: query.target };
    if [&wanted.action, &wanted.actor, &wanted.target].into_iter().flatten().any(|text| text.contains('\0')) {
        return Err(Problem::validation().field("?action", "invalid_format", "must not contain NUL"));
    }
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let mut data = audit::list(&mut tx, &wanted, before.map(AuditId::from_uuid), limit + 1).await?;
    tx.commit().await?;
    let has_more = data.len() > limit as usize;
    data.truncate(limit as usize);
    let next_cursor = data.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, &name, last.id.uuid()));
    Ok(Json(AuditPage { data, has_more, next_cursor }))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct UsersQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    email: Option<String>,
    external_id: Option<String>,
}

/// The tenant's users, oldest first.
#[utoipa::path(get, path = "/api/v1/tenant/users", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "Default 50."),
           ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before."),
           ("email" = Option<String>, Query, description = "Only the user with this e-mail address."),
           ("external_id" = Option<String>, Query, description = "Only the user with this external id.")),
    responses((status = 200, body = UserPage),
              (status = 403, description = "INSUFFICIENT_SCOPE")))]
async fn list_users(
    State(app): State<App>,
    portal: Portal,
    Query(query): Query<UsersQuery>,
) -> Result<Json<UserPage>, Problem> {
    portal.require(TenantRole::Developer)?;
    let filter = filter(query.email.as_deref(), query.external_id.as_deref())?;
    let page = PageQuery { limit: query.limit, cursor: query.cursor };
    let limit = page.limit()?;
    let name = format!("users:{}", portal.tenant);
    let after = page.after(&app, &name)?;
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let mut data = users::list(&mut tx, &filter, after.map(UserId::from_uuid), limit + 1).await?;
    tx.commit().await?;
    let has_more = data.len() > limit as usize;
    data.truncate(limit as usize);
    let next_cursor =
        data.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, &name, last.user_id.uuid()));
    Ok(Json(UserPage { data, has_more, next_cursor }))
}

/// The devices of all users, oldest first.
#[utoipa::path(get, path = "/api/v1/tenant/devices", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "Default 50."),
           ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before.")),
    responses((status = 200, body = TenantDevicePage),
              (status = 403, description = "INSUFFICIENT_SCOPE")))]
async fn list_devices(
    State(app): State<App>,
    portal: Portal,
    Query(query): Query<PageQuery>,
) -> Result<Json<TenantDevicePage>, Problem> {
    portal.require(TenantRole::Developer)?;
    let limit = query.limit()?;
    let name = format!("devices:{}", portal.tenant);
    let after = query.after(&app, &name)?;
    let now = app.clock.now();
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let mut found = devices::list_all(&mut tx, after.map(DeviceId::from_uuid), limit + 1).await?;
    let servers = servers::list(&mut tx).await?;
    tx.commit().await?;
    let has_more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_cursor =
        found.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, &name, last.device.id.uuid()));
    let data = found.into_iter().map(|owned| shown(owned, &servers, now)).collect();
    Ok(Json(TenantDevicePage { data, has_more, next_cursor }))
}

fn shown(owned: OwnedDevice, servers: &[Server], now: time::OffsetDateTime) -> TenantDevice {
    let OwnedDevice { user, device, suspended } = owned;
    let server = servers.iter().find(|server| server.id == device.server);
    TenantDevice {
        device_id: device.id,
        user_id: user,
        tunnel_up: device.tunnel_up(now),
        device_name: device.name,
        platform: device.platform,
        assigned_ip: device.addresses.ipv4,
        assigned_ipv6: device.addresses.ipv6,
        server_id: device.server,
        server_region: server.map(|server| server.region.clone()).unwrap_or_default(),
        suspended,
        last_handshake_at: device.last_handshake_at,
        created_at: device.created_at,
    }
}
