//! `/admin/servers…`: the platform's WireGuard servers, for its staff.

use axum::extract::State;
use axum::response::Response;
use cvault_node_protocol::token::EnrolToken;
use cvault_types::admin::{
    AdminServer, AdminServerList, CreateServerRequest, CreatedServer, EnrolmentToken, ServerStatus,
};
use cvault_types::{ErrorCode, PoolId, Secret, ServerId};
use http::StatusCode;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Deserialize;
use sqlx::PgExecutor;
use time::OffsetDateTime;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::admin::page_size;
use crate::app::App;
use crate::http::{Admin, Json, Path, Problem, Query, cursor, staff};
use crate::ipam;
use crate::servers::{
    self, CreateServerError, NewServer, Removal, RemoveServerError, ServerDetails, ServerFilter, TOKEN_LIFETIME_SECONDS,
};

const LIST: &str = "servers";
const DEFAULT_POOL: &str = "default";
const DEFAULT_PORT: u16 = 51820;
const DEFAULT_CAPACITY: u32 = 65_000;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create_server, list_servers))
        .routes(routes!(get_server, remove_server))
        .routes(routes!(enrol_token))
        .routes(routes!(drain))
        .routes(routes!(maintenance))
        .routes(routes!(activate))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct ServerQuery {
    /// 1 to 200; 50 when absent.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
    cursor: Option<String>,
    region: Option<String>,
    #[param(inline)]
    status: Option<ServerStatus>,
    pool_id: Option<PoolId>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct RemoveQuery {
    /// `true`: do not wait for what the server still has to tell; for a server that is lost.
    force: Option<bool>,
}

/// Create a server. The answer holds its enrolment token, once.
///
/// New devices are placed on the least loaded server, by peers and capacity, of the region that is asked for.
#[utoipa::path(post, path = "/admin/servers", tag = "admin", security(("admin" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = CreateServerRequest,
    responses((status = 201, body = CreatedServer),
              (status = 409, description = "CONFLICT: the name, or address and port, is another server's; IDEMPOTENCY_KEY_IN_USE")))]
async fn create_server(
    State(app): State<App>,
    admin: Admin,
    Json(body): Json<CreateServerRequest>,
) -> Result<Response, Problem> {
    staff::once(&app, &admin, StatusCode::CREATED, move |tx, app, actor| {
        Box::pin(async move {
            let pool = match body.pool_id {
                None => DEFAULT_POOL.to_owned(),
                Some(id) => {
                    let found = ipam::list_details(tx.conn(), Some(id), None, 1).await?.pop();
                    found.ok_or_else(|| no_pool("There is no such pool."))?.name
                }
            };
            let server = NewServer {
                name: body.name,
                region: body.region,
                public_ip: body.public_ip,
                endpoint_port: body.port.unwrap_or(DEFAULT_PORT),
                pool,
                capacity: body.capacity.unwrap_or(DEFAULT_CAPACITY),
            };
            let (pin, mut rng) = (app.secrets.node_identity.pin(), StdRng::from_os_rng());
            let (id, token) = servers::create_with_token(tx, &server, pin, &actor, &mut rng).await?;
            let server = find(tx.conn(), id, app.clock.now()).await?;
            Ok(CreatedServer { server, enrolment: enrolment(&app, id, &token) })
        })
    })
    .await
}

/// List servers, oldest first.
#[utoipa::path(get, path = "/admin/servers", tag = "admin", security(("admin" = [])), params(ServerQuery),
    responses((status = 200, body = AdminServerList)))]
async fn list_servers(
    State(app): State<App>,
    _admin: Admin,
    Query(query): Query<ServerQuery>,
) -> Result<Json<AdminServerList>, Problem> {
    let limit = page_size(query.limit)?;
    let after = query.cursor.map(|text| cursor::decode(&app.secrets, LIST, &text)).transpose()?;
    // PostgreSQL takes no NUL in a text
    if query.region.as_ref().is_some_and(|region| region.contains('\0')) {
        return Err(Problem::validation().field("?region", "invalid_format", "must not contain NUL"));
    }
    let filter = ServerFilter { id: None, region: query.region, status: query.status, pool: query.pool_id };
    let rows = servers::list_details(&app.db.sys, &filter, after.map(ServerId::from_uuid), limit.to_fetch()).await?;
    let now = app.clock.now();
    let (rows, has_more) = limit.cut(rows);
    let next = rows.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, LIST, last.id.uuid()));
    let data = rows.into_iter().map(|server| shown(server, now)).collect();
    Ok(Json(AdminServerList { data, has_more, next_cursor: next }))
}

/// One server.
#[utoipa::path(get, path = "/admin/servers/{server_id}", tag = "admin", security(("admin" = [])),
    params(("server_id" = ServerId, Path)),
    responses((status = 200, body = AdminServer)))]
async fn get_server(
    State(app): State<App>,
    _admin: Admin,
    Path(id): Path<ServerId>,
) -> Result<Json<AdminServer>, Problem> {
    Ok(Json(find(&app.db.sys, id, app.clock.now()).await?))
}

/// Draw another enrolment token: for one that was lost or has expired, and for a machine that replaces the server's first.
#[utoipa::path(post, path = "/admin/servers/{server_id}/enrol-token", tag = "admin", security(("admin" = [])),
    params(("server_id" = ServerId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 201, body = EnrolmentToken)))]
async fn enrol_token(State(app): State<App>, admin: Admin, Path(id): Path<ServerId>) -> Result<Response, Problem> {
    staff::once(&app, &admin, StatusCode::CREATED, move |tx, app, actor| {
        Box::pin(async move {
            let (pin, mut rng) = (app.secrets.node_identity.pin(), StdRng::from_os_rng());
            let token = servers::renew_token(tx, id, pin, &actor, &mut rng).await?;
            Ok(enrolment(&app, id, &token.ok_or_else(|| Problem::new(ErrorCode::NotFound))?))
        })
    })
    .await
}

/// Place no new devices on a server. Those it has stay until they are moved or deleted.
#[utoipa::path(post, path = "/admin/servers/{server_id}/drain", tag = "admin", security(("admin" = [])),
    params(("server_id" = ServerId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 200, body = AdminServer)))]
async fn drain(State(app): State<App>, admin: Admin, Path(id): Path<ServerId>) -> Result<Response, Problem> {
    set_status(&app, &admin, id, ServerStatus::Draining).await
}

/// As drain, said of a server that somebody is working on.
#[utoipa::path(post, path = "/admin/servers/{server_id}/maintenance", tag = "admin", security(("admin" = [])),
    params(("server_id" = ServerId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 200, body = AdminServer)))]
async fn maintenance(State(app): State<App>, admin: Admin, Path(id): Path<ServerId>) -> Result<Response, Problem> {
    set_status(&app, &admin, id, ServerStatus::Maintenance).await
}

/// Place devices on a server again.
#[utoipa::path(post, path = "/admin/servers/{server_id}/activate", tag = "admin", security(("admin" = [])),
    params(("server_id" = ServerId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 200, body = AdminServer)))]
async fn activate(State(app): State<App>, admin: Admin, Path(id): Path<ServerId>) -> Result<Response, Problem> {
    set_status(&app, &admin, id, ServerStatus::Active).await
}

async fn set_status(app: &App, admin: &Admin, id: ServerId, status: ServerStatus) -> Result<Response, Problem> {
    staff::once(app, admin, StatusCode::OK, move |tx, app, actor| {
        Box::pin(async move {
            if !servers::set_status(tx, id, status, &actor).await? {
                return Err(Problem::new(ErrorCode::NotFound));
            }
            find(tx.conn(), id, app.clock.now()).await
        })
    })
    .await
}

/// Remove a server without devices: its identity and its tokens are worth nothing from then on.
#[utoipa::path(delete, path = "/admin/servers/{server_id}", tag = "admin", security(("admin" = [])),
    params(("server_id" = ServerId, Path), RemoveQuery,
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 204, description = "Removed."),
              (status = 409, description = "CONFLICT: it has devices, or bytes to tell; IDEMPOTENCY_KEY_IN_USE")))]
async fn remove_server(
    State(app): State<App>,
    admin: Admin,
    Path(id): Path<ServerId>,
    Query(query): Query<RemoveQuery>,
) -> Result<Response, Problem> {
    let removal = if query.force == Some(true) { Removal::Forced } else { Removal::Settled };
    staff::once(&app, &admin, StatusCode::NO_CONTENT, move |tx, _app, actor| {
        Box::pin(async move { Ok(servers::remove_server(tx, id, removal, &actor).await?) })
    })
    .await
}

async fn find(sys: impl PgExecutor<'_>, id: ServerId, now: OffsetDateTime) -> Result<AdminServer, Problem> {
    let filter = ServerFilter { id: Some(id), ..ServerFilter::default() };
    let found = servers::list_details(sys, &filter, None, 1).await?.pop();
    found.map(|server| shown(server, now)).ok_or_else(|| Problem::new(ErrorCode::NotFound))
}

fn shown(server: ServerDetails, now: OffsetDateTime) -> AdminServer {
    let percent = u64::from(server.peers) * 100 / u64::from(server.capacity.max(1));
    AdminServer {
        available: server.takes_devices(now),
        load: u8::try_from(percent.min(100)).expect("at most 100"),
        id: server.id,
        name: server.name,
        region: server.region,
        public_ip: server.public_ip,
        port: server.endpoint_port,
        pool_id: server.pool_id,
        pool: server.pool,
        status: servers::parse_status(&server.status),
        enrolled: server.enrolled,
        capacity: server.capacity,
        peers: server.peers,
        revision: server.revision,
        acked_revision: server.acked_revision,
        last_seen_at: server.last_seen_at,
        health: server.health,
        created_at: server.created_at,
    }
}

fn enrolment(app: &App, id: ServerId, token: &EnrolToken) -> EnrolmentToken {
    EnrolmentToken {
        server_id: id,
        token: Secret::new(token.expose().as_str()),
        command: servers::enrol_command(&app.config.node_endpoint),
        expires_in_seconds: TOKEN_LIFETIME_SECONDS,
    }
}

fn no_pool(detail: &str) -> Problem {
    Problem::validation().field("/pool_id", "not_found", detail)
}

impl From<CreateServerError> for Problem {
    fn from(error: CreateServerError) -> Self {
        let taken = |pointer, text| Self::new(ErrorCode::Conflict).detail(text).field(pointer, "taken", text);
        match error {
            CreateServerError::NameTaken(_) => taken("/name", "Another server has this name."),
            CreateServerError::EndpointTaken => taken("/public_ip", "Another server has this public address and port."),
            CreateServerError::NoSuchPool(_) => no_pool("There is no pool named `default`: say which one."),
            CreateServerError::Invalid { field, detail } => {
                Self::validation().field(format!("/{field}"), "invalid_value", detail)
            }
            CreateServerError::Db(error) => error.into(),
        }
    }
}

impl From<RemoveServerError> for Problem {
    fn from(error: RemoveServerError) -> Self {
        match error {
            RemoveServerError::NotFound => Self::new(ErrorCode::NotFound),
            RemoveServerError::InUse { peers } => Self::new(ErrorCode::Conflict)
                .detail(format!("{peers} devices are on this server. Move or delete them first.")),
            RemoveServerError::Unsettled => Self::new(ErrorCode::Conflict).detail(
                "The server has not told the last bytes of its devices. Wait a little, or remove a lost server with ?force=true.",
            ),
            RemoveServerError::Db(error) => error.into(),
        }
    }
}
