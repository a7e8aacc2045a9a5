//! `/admin/tenants`: platform staff and the platform's own back office.

use axum::extract::State;
use cvault_types::TenantId;
use cvault_types::problem::ProblemBody;
use cvault_types::tenant::{CreateTenantRequest, CreatedTenant, Tenant, TenantList, TenantStatus, UpdateTenantRequest};
use http::StatusCode;
use rand::SeedableRng;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::{Admin, Json, Path, Problem, Query, cursor};
use crate::tenants::{self, Actor, Settings};

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(get, update, delete))
        .routes(routes!(suspend))
        .routes(routes!(resume))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct Page {
    /// 1 to 200; 50 when absent.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<i64>,
    cursor: Option<String>,
}

/// Create a tenant. The answer is the only one that ever holds the API secret.
#[utoipa::path(post, path = "/admin/tenants", tag = "admin", security(("admin" = [])),
    request_body = CreateTenantRequest,
    responses((status = 201, body = CreatedTenant), (status = "4XX", body = ProblemBody, content_type = "application/problem+json")))]
async fn create(
    State(app): State<App>,
    admin: Admin,
    Json(body): Json<CreateTenantRequest>,
) -> Result<(StatusCode, Json<CreatedTenant>), Problem> {
    let settings = Settings::for_new(body)?;
    let mut rng = rand::rngs::StdRng::from_os_rng();
    let (tenant, key) = tenants::create(&app, settings, &actor(&admin), &mut rng).await?;
    Ok((StatusCode::CREATED, Json(CreatedTenant { tenant, api_key: key.key, api_secret: key.secret })))
}

/// List tenants, oldest first.
#[utoipa::path(get, path = "/admin/tenants", tag = "admin", security(("admin" = [])), params(Page),
    responses((status = 200, body = TenantList), (status = "4XX", body = ProblemBody, content_type = "application/problem+json")))]
async fn list(State(app): State<App>, _admin: Admin, Query(page): Query<Page>) -> Result<Json<TenantList>, Problem> {
    let limit = page.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(Problem::validation().field("?limit", "out_of_range", "must be from 1 to 200"));
    }
    let after = page.cursor.map(|text| cursor::decode(&app.secrets, "tenants", &text)).transpose()?;
    let mut data = tenants::list(&app.db.sys, after.map(TenantId::from_uuid), limit + 1).await?;
    let wanted = usize::try_from(limit).unwrap_or(usize::MAX);
    let has_more = data.len() > wanted;
    data.truncate(wanted);
    let next = data.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, "tenants", last.id.uuid()));
    Ok(Json(TenantList { data, has_more, next_cursor: next }))
}

/// One tenant.
#[utoipa::path(get, path = "/admin/tenants/{tenant_id}", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path)),
    responses((status = 200, body = Tenant), (status = "4XX", body = ProblemBody, content_type = "application/problem+json")))]
async fn get(State(app): State<App>, _admin: Admin, Path(id): Path<TenantId>) -> Result<Json<Tenant>, Problem> {
    Ok(Json(tenants::get(&app, id).await?))
}

/// Change a tenant. Absent fields stay; `null` takes a limit away.
#[utoipa::path(patch, path = "/admin/tenants/{tenant_id}", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path)), request_body = UpdateTenantRequest,
    responses((status = 200, body = Tenant), (status = "4XX", body = ProblemBody, content_type = "application/problem+json")))]
async fn update(
    State(app): State<App>,
    admin: Admin,
    Path(id): Path<TenantId>,
    Json(body): Json<UpdateTenantRequest>,
) -> Result<Json<Tenant>, Problem> {
    Ok(Json(tenants::update(&app, id, body, &actor(&admin)).await?))
}

/// Delete a tenant: its keys are revoked, its devices taken off the servers, its data key destroyed. Cannot be undone.
#[utoipa::path(delete, path = "/admin/tenants/{tenant_id}", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path)),
    responses((status = 204), (status = "4XX", body = ProblemBody, content_type = "application/problem+json")))]
async fn delete(State(app): State<App>, admin: Admin, Path(id): Path<TenantId>) -> Result<StatusCode, Problem> {
    tenants::delete(&app, id, &actor(&admin)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Suspend a tenant: its API calls are refused with TENANT_SUSPENDED.
#[utoipa::path(post, path = "/admin/tenants/{tenant_id}/suspend", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path)),
    responses((status = 200, body = Tenant), (status = "4XX", body = ProblemBody, content_type = "application/problem+json")))]
async fn suspend(State(app): State<App>, admin: Admin, Path(id): Path<TenantId>) -> Result<Json<Tenant>, Problem> {
    set_status(&app, &admin, id, TenantStatus::Suspended).await
}

/// Take a suspension back.
#[utoipa::path(post, path = "/admin/tenants/{tenant_id}/resume", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path)),
    responses((status = 200, body = Tenant), (status = "4XX", body = ProblemBody, content_type = "application/problem+json")))]
async fn resume(State(app): State<App>, admin: Admin, Path(id): Path<TenantId>) -> Result<Json<Tenant>, Problem> {
    set_status(&app, &admin, id, TenantStatus::Active).await
}

async fn set_status(app: &App, admin: &Admin, id: TenantId, status: TenantStatus) -> Result<Json<Tenant>, Problem> {
    let request = UpdateTenantRequest { status: Some(status), ..UpdateTenantRequest::default() };
    Ok(Json(tenants::update(app, id, request, &actor(admin)).await?))
}

fn actor(admin: &Admin) -> Actor {
    Actor { name: format!("admin:{}", admin.subject), request_id: Some(admin.request_id) }
}
