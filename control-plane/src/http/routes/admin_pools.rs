//! `/admin/pools…`: address pools, for platform staff.

use axum::extract::State;
use axum::response::Response;
use cvault_types::admin::{AddressPool, AddressPoolList, CreatePoolRequest, UpdatePoolRequest};
use cvault_types::{ErrorCode, PoolId};
use http::StatusCode;
use ipnet::{Ipv4Net, Ipv6Net};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Deserialize;
use sqlx::PgExecutor;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::admin::page_size;
use crate::app::App;
use crate::http::{Admin, Json, Path, Problem, Query, cursor, staff};
use crate::ipam::{self, CreatePoolError, DeletePoolError, NewPool, Pool, PoolChange};

const LIST: &str = "pools";

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(create_pool, list_pools)).routes(routes!(get_pool, update_pool, delete_pool))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct Page {
    /// 1 to 200; 50 when absent.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
    cursor: Option<String>,
}

/// Create an address pool.
#[utoipa::path(post, path = "/admin/pools", tag = "admin", security(("admin" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = CreatePoolRequest,
    responses((status = 201, body = AddressPool),
              (status = 409, description = "CONFLICT: the name is another pool's, or a prefix overlaps; IDEMPOTENCY_KEY_IN_USE")))]
async fn create_pool(
    State(app): State<App>,
    admin: Admin,
    Json(body): Json<CreatePoolRequest>,
) -> Result<Response, Problem> {
    let pool = parse(&app, body)?;
    staff::once(&app, &admin, StatusCode::CREATED, move |tx, _app, actor| {
        Box::pin(async move {
            let id = ipam::create_pool_noted(tx, &pool, &actor).await?;
            find(tx.conn(), id).await
        })
    })
    .await
}

fn parse(app: &App, body: CreatePoolRequest) -> Result<NewPool, Problem> {
    let mut problem = Problem::validation();
    let ipv4 = body.ipv4.parse::<Ipv4Net>().ok();
    if ipv4.is_none() {
        problem = problem.field("/ipv4", "invalid_format", "must be an IPv4 prefix such as 10.8.0.0/16");
    }
    let ipv6 = match body.ipv6 {
        None => Some(ipam::draw_ula(&mut StdRng::from_os_rng())),
        Some(text) => text.parse::<Ipv6Net>().ok(),
    };
    if ipv6.is_none() {
        problem = problem.field("/ipv6", "invalid_format", "must be an IPv6 prefix such as fd4c:9a17:30b2::/64");
    }
    match (ipv4, ipv6) {
        (Some(ipv4), Some(ipv6)) => {
            let quarantine_seconds = body.quarantine_seconds.unwrap_or(app.config.quarantine_seconds);
            let (name, reclaim) = (body.name.trim_matches(' ').to_owned(), body.reclaim);
            Ok(NewPool { name, ipv4, ipv6, quarantine_seconds, reclaim })
        }
        (None, _) | (_, None) => Err(problem),
    }
}

/// List pools, oldest first.
#[utoipa::path(get, path = "/admin/pools", tag = "admin", security(("admin" = [])), params(Page),
    responses((status = 200, body = AddressPoolList)))]
async fn list_pools(
    State(app): State<App>,
    _admin: Admin,
    Query(page): Query<Page>,
) -> Result<Json<AddressPoolList>, Problem> {
    let limit = page_size(page.limit)?;
    let after = page.cursor.map(|text| cursor::decode(&app.secrets, LIST, &text)).transpose()?;
    let rows = ipam::list_details(&app.db.sys, None, after.map(PoolId::from_uuid), limit.to_fetch()).await?;
    let (rows, has_more) = limit.cut(rows);
    let next = rows.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, LIST, last.id.uuid()));
    Ok(Json(AddressPoolList { data: rows.into_iter().map(shown).collect(), has_more, next_cursor: next }))
}

/// One pool, and how full it is.
#[utoipa::path(get, path = "/admin/pools/{pool_id}", tag = "admin", security(("admin" = [])),
    params(("pool_id" = PoolId, Path)),
    responses((status = 200, body = AddressPool)))]
async fn get_pool(State(app): State<App>, _admin: Admin, Path(id): Path<PoolId>) -> Result<Json<AddressPool>, Problem> {
    Ok(Json(find(&app.db.sys, id).await?))
}

/// Change a pool's name, quarantine or reclaiming. Its prefixes stay: devices have addresses of them.
#[utoipa::path(patch, path = "/admin/pools/{pool_id}", tag = "admin", security(("admin" = [])),
    params(("pool_id" = PoolId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = UpdatePoolRequest,
    responses((status = 200, body = AddressPool),
              (status = 409, description = "CONFLICT: the name is another pool's; IDEMPOTENCY_KEY_IN_USE")))]
async fn update_pool(
    State(app): State<App>,
    admin: Admin,
    Path(id): Path<PoolId>,
    Json(body): Json<UpdatePoolRequest>,
) -> Result<Response, Problem> {
    let name = body.name.map(|name| name.trim_matches(' ').to_owned());
    let change = PoolChange { name, quarantine_seconds: body.quarantine_seconds, reclaim: body.reclaim };
    staff::once(&app, &admin, StatusCode::OK, move |tx, _app, actor| {
        Box::pin(async move {
            if !ipam::update_pool(tx, id, change, &actor).await? {
                return Err(Problem::new(ErrorCode::NotFound));
            }
            find(tx.conn(), id).await
        })
    })
    .await
}

/// Delete a pool that no server shares and of which no address is held or rests.
#[utoipa::path(delete, path = "/admin/pools/{pool_id}", tag = "admin", security(("admin" = [])),
    params(("pool_id" = PoolId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 204, description = "Deleted."),
              (status = 409, description = "CONFLICT: it is in use; IDEMPOTENCY_KEY_IN_USE")))]
async fn delete_pool(State(app): State<App>, admin: Admin, Path(id): Path<PoolId>) -> Result<Response, Problem> {
    staff::once(&app, &admin, StatusCode::NO_CONTENT, move |tx, app, actor| {
        Box::pin(async move { Ok(ipam::delete_pool(tx, id, app.clock.now(), &actor).await?) })
    })
    .await
}

async fn find(sys: impl PgExecutor<'_>, id: PoolId) -> Result<AddressPool, Problem> {
    let found = ipam::list_details(sys, Some(id), None, 1).await?.pop();
    found.map(shown).ok_or_else(|| Problem::new(ErrorCode::NotFound))
}

fn shown(pool: Pool) -> AddressPool {
    AddressPool {
        free: pool.size.saturating_sub(pool.allocated + pool.quarantined),
        id: pool.id,
        name: pool.name,
        ipv4: pool.ipv4.to_string(),
        ipv6: pool.ipv6.to_string(),
        quarantine_seconds: pool.quarantine_seconds,
        reclaim: pool.reclaim,
        servers: pool.servers,
        size: pool.size,
        used: pool.allocated,
        quarantined: pool.quarantined,
        created_at: pool.created_at,
    }
}

impl From<CreatePoolError> for Problem {
    fn from(error: CreatePoolError) -> Self {
        let taken = |pointer, text| Self::new(ErrorCode::Conflict).detail(text).field(pointer, "taken", text);
        match error {
            CreatePoolError::NameTaken(_) => taken("/name", "Another pool has this name."),
            CreatePoolError::Overlap { family: "IPv4" } => taken("/ipv4", "Another pool has a part of this prefix."),
            CreatePoolError::Overlap { .. } => taken("/ipv6", "Another pool has a part of this prefix."),
            CreatePoolError::Unusable { field, detail } => {
                Self::validation().field(format!("/{field}"), "invalid_value", detail)
            }
            CreatePoolError::Db(error) => error.into(),
        }
    }
}

impl From<DeletePoolError> for Problem {
    fn from(error: DeletePoolError) -> Self {
        match error {
            DeletePoolError::NotFound => Self::new(ErrorCode::NotFound),
            DeletePoolError::HasServers(servers) => Self::new(ErrorCode::Conflict)
                .detail(format!("{servers} servers share this pool. Remove them first.")),
            DeletePoolError::HasAddresses(addresses) => Self::new(ErrorCode::Conflict).detail(format!(
                "{addresses} addresses of this pool are held by devices or rest. Delete the devices, and wait for the end of the quarantine."
            )),
            DeletePoolError::Db(error) => error.into(),
        }
    }
}
