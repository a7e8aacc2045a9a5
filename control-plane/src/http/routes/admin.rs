//! `/admin/tenants`: platform staff and the platform's own back office.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use cvault_types::tenant::{CreateTenantRequest, CreatedTenant, Tenant, TenantList, TenantStatus, UpdateTenantRequest};
use cvault_types::{ErrorCode, TenantId};
use http::StatusCode;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::app::App;
use crate::auth::approvals::Action;
use crate::http::idempotency::{self, Claim};
use crate::http::{Admin, Json, Path, Problem, Query, cursor, staff};
use crate::tenants::{self, Settings, Stage};

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

/// Rows of one page.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageSize(i64);

pub(super) fn page_size(limit: Option<i64>) -> Result<PageSize, Problem> {
    match limit.unwrap_or(50) {
        limit @ 1..=200 => Ok(PageSize(limit)),
        _ => Err(Problem::validation().field("?limit", "out_of_range", "must be from 1 to 200")),
    }
}

impl PageSize {
    /// One more tells whether there is another page.
    pub(super) fn to_fetch(self) -> i64 {
        self.0 + 1
    }

    /// The page, and whether there is another one.
    pub(super) fn cut<T>(self, mut rows: Vec<T>) -> (Vec<T>, bool) {
        let wanted = usize::try_from(self.0).unwrap_or(usize::MAX);
        let has_more = rows.len() > wanted;
        rows.truncate(wanted);
        (rows, has_more)
    }
}

/// Create a tenant. The answer is the only one that ever holds the API secret.
#[utoipa::path(post, path = "/admin/tenants", tag = "admin", security(("admin" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = CreateTenantRequest,
    responses((status = 201, body = CreatedTenant)))]
async fn create(
    State(app): State<App>,
    admin: Admin,
    Json(body): Json<CreateTenantRequest>,
) -> Result<Response, Problem> {
    let settings = Settings::for_new(body)?;
    let actor = admin.actor();
    if let Some(replay) = staff::earlier(&app, &actor).await? {
        return Ok(replay);
    }
    let mut tx = app.db.tenancy.begin(TenantId::from_uuid(Uuid::now_v7())).await?;
    let work = async {
        let mut rng = StdRng::from_os_rng();
        let (tenant, key) = tenants::create_in(&mut tx, &app, settings, &actor, &mut rng).await?;
        let answer = CreatedTenant { tenant, api_key: key.key, api_secret: key.secret };
        if let Claim::Proceed(place) = idempotency::claim(&mut tx, &app, actor.name.clone()).await? {
            idempotency::keep(&mut tx, &app.keys, place, StatusCode::CREATED, &answer).await?;
        }
        Ok::<_, Problem>(answer)
    }
    .await;
    match tx.finish(work).await {
        Ok(answer) => Ok((StatusCode::CREATED, Json(answer)).into_response()),
        // another request with the same key was faster
        Err(problem) if problem.code() == ErrorCode::IdempotencyKeyReused => {
            staff::earlier(&app, &actor).await?.ok_or(problem)
        }
        Err(problem) => Err(problem),
    }
}

/// List tenants, oldest first.
#[utoipa::path(get, path = "/admin/tenants", tag = "admin", security(("admin" = [])), params(Page),
    responses((status = 200, body = TenantList)))]
async fn list(State(app): State<App>, _admin: Admin, Query(page): Query<Page>) -> Result<Json<TenantList>, Problem> {
    let limit = page_size(page.limit)?;
    let after = page.cursor.map(|text| cursor::decode(&app.secrets, "tenants", &text)).transpose()?;
    let data = tenants::list(&app.db.sys, after.map(TenantId::from_uuid), limit.to_fetch()).await?;
    let (data, has_more) = limit.cut(data);
    let next = data.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, "tenants", last.id.uuid()));
    Ok(Json(TenantList { data, has_more, next_cursor: next }))
}

/// One tenant.
#[utoipa::path(get, path = "/admin/tenants/{tenant_id}", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path)),
    responses((status = 200, body = Tenant)))]
async fn get(State(app): State<App>, _admin: Admin, Path(id): Path<TenantId>) -> Result<Json<Tenant>, Problem> {
    Ok(Json(tenants::get(&app, id).await?))
}

/// Change a tenant. Absent fields stay; `null` takes a limit away.
#[utoipa::path(patch, path = "/admin/tenants/{tenant_id}", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path),
           ("X-Challenge-Token" = Option<String>, Header, description = "From `admin approve`; asked for with 428."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")), request_body = UpdateTenantRequest,
    responses((status = 200, body = Tenant),
              (status = 401, description = "SESSION_TERMINATED: the token was used too fast, or with five wrong approvals in a row, and is revoked"),
              (status = 428, description = "CHALLENGE_REQUIRED: it has to be approved with `admin approve`")))]
async fn update(
    State(app): State<App>,
    admin: Admin,
    Path(id): Path<TenantId>,
    Json(body): Json<UpdateTenantRequest>,
) -> Result<Response, Problem> {
    change(&app, &admin, id, body).await
}

/// Delete a tenant: its keys are revoked, its devices taken off the servers, its data key destroyed. Cannot be undone.
#[utoipa::path(delete, path = "/admin/tenants/{tenant_id}", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path),
           ("X-Challenge-Token" = Option<String>, Header, description = "From `admin approve`; asked for with 428."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 204),
              (status = 401, description = "SESSION_TERMINATED: the token was used too fast, or with five wrong approvals in a row, and is revoked"),
              (status = 428, description = "CHALLENGE_REQUIRED: it has to be approved with `admin approve`")))]
async fn delete(State(app): State<App>, admin: Admin, Path(id): Path<TenantId>) -> Result<Response, Problem> {
    let actor = admin.actor();
    if let Some(replay) = staff::earlier(&app, &actor).await? {
        return Ok(replay);
    }
    // an approval is for what is there
    match tenants::stage(&app.db.sys, id).await? {
        None => return Err(Problem::new(ErrorCode::NotFound)),
        Some(Stage::There | Stage::Deleting) => {
            staff::approved(&app, &admin, Action::Delete, &id.to_string()).await?;
        }
        Some(Stage::Deleted) => {}
    }
    tenants::delete(&app, id, &actor).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Suspend a tenant: its API calls are refused with TENANT_SUSPENDED.
#[utoipa::path(post, path = "/admin/tenants/{tenant_id}/suspend", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path),
           ("X-Challenge-Token" = Option<String>, Header, description = "From `admin approve`; asked for with 428."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 200, body = Tenant),
              (status = 401, description = "SESSION_TERMINATED: the token was used too fast, or with five wrong approvals in a row, and is revoked"),
              (status = 428, description = "CHALLENGE_REQUIRED: it has to be approved with `admin approve`")))]
async fn suspend(State(app): State<App>, admin: Admin, Path(id): Path<TenantId>) -> Result<Response, Problem> {
    set_status(&app, &admin, id, TenantStatus::Suspended).await
}

/// Take a suspension back.
#[utoipa::path(post, path = "/admin/tenants/{tenant_id}/resume", tag = "admin", security(("admin" = [])),
    params(("tenant_id" = TenantId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 200, body = Tenant)))]
async fn resume(State(app): State<App>, admin: Admin, Path(id): Path<TenantId>) -> Result<Response, Problem> {
    set_status(&app, &admin, id, TenantStatus::Active).await
}

/// What of a change needs a second proof; one request brings one.
fn sensitive(request: &UpdateTenantRequest) -> Result<Option<Action>, Problem> {
    let limits = request.bandwidth_limit_gb.is_some()
        || request.user_limit.is_some()
        || request.max_devices_per_user.is_some()
        || request.rate_limit_per_minute.is_some()
        || request.user_rate_limit_per_minute.is_some()
        || request.policy.is_some();
    match (request.status == Some(TenantStatus::Suspended), limits) {
        (true, true) => Err(Problem::validation().field(
            "/status",
            "invalid_value",
            "must be changed in a request of its own: a suspension and other limits are approved one by one",
        )),
        (true, false) => Ok(Some(Action::Suspend)),
        (false, true) => Ok(Some(Action::Limits)),
        (false, false) => Ok(None),
    }
}

async fn set_status(app: &App, admin: &Admin, id: TenantId, status: TenantStatus) -> Result<Response, Problem> {
    change(app, admin, id, UpdateTenantRequest { status: Some(status), ..UpdateTenantRequest::default() }).await
}

async fn change(app: &App, admin: &Admin, id: TenantId, request: UpdateTenantRequest) -> Result<Response, Problem> {
    let actor = admin.actor();
    if let Some(replay) = staff::earlier(app, &actor).await? {
        return Ok(replay);
    }
    if tenants::stage(&app.db.sys, id).await? != Some(Stage::There) {
        return Err(Problem::new(ErrorCode::NotFound));
    }
    if app.config.admin_step_up
        && let Some(action) = sensitive(&request)?
    {
        staff::approved(app, admin, action, &id.to_string()).await?;
    }
    let mut tx = app.db.tenancy.begin(id).await?;
    let work = async {
        let place = match idempotency::claim(&mut tx, app, actor.name.clone()).await? {
            Claim::Proceed(place) => place,
            Claim::Replay(replay) => return Ok((replay.into_response(), Vec::new())),
        };
        let (tenant, servers) = tenants::update_in(&mut tx, request, &actor, app.clock.now()).await?;
        idempotency::keep(&mut tx, &app.keys, place, StatusCode::OK, &tenant).await?;
        Ok::<_, Problem>((Json(tenant).into_response(), servers))
    }
    .await;
    let (answer, servers) = tx.finish(work).await?;
    servers.into_iter().for_each(|server| app.nodes.policies_changed(server));
    Ok(answer)
}
