//! `/api/v1/tenant/api-keys`: the tenant's keys, in the portal.

use axum::extract::State;
use axum::response::Response;
use cvault_types::api_key::{ApiKey, ApiKeyList, CreateApiKey, CreatedApiKey, RegenerateApiKey, UpdateApiKey};
use cvault_types::{ApiKeyId, ErrorCode, Secret, TenantRole};
use http::StatusCode;
use rand::SeedableRng;
use rand::rngs::StdRng;
use time::Duration;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::auth::api_keys::{self, KeyChange, KeySettings, MAX_GRACE, ManageError};
use crate::http::{Json, Path, Portal, Problem, idempotency};
use crate::step_up;
use crate::tenancy::TenantTx;
use crate::tenants::Actor;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list_keys, create_key))
        .routes(routes!(get_key, update_key, revoke_key))
        .routes(routes!(regenerate_key))
}

/// The tenant's keys that are not revoked, oldest first. Role developer.
#[utoipa::path(get, path = "/api/v1/tenant/api-keys", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    responses((status = 200, body = ApiKeyList),
              (status = 403, description = "INSUFFICIENT_SCOPE")))]
async fn list_keys(State(app): State<App>, portal: Portal) -> Result<Json<ApiKeyList>, Problem> {
    portal.require(TenantRole::Developer)?;
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let data = api_keys::list(&mut tx).await?;
    tx.commit().await?;
    Ok(Json(ApiKeyList { data }))
}

/// Create a key. The answer is the only one that ever holds its secret. Role admin; asks for a challenge.
#[utoipa::path(post, path = "/api/v1/tenant/api-keys", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("X-Challenge-Token" = Option<String>, Header, description = "Of the answered challenge."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = CreateApiKey,
    responses((status = 201, body = CreatedApiKey),
              (status = 403, description = "INSUFFICIENT_SCOPE, TENANT_SUSPENDED"),
              (status = 428, description = "CHALLENGE_REQUIRED")))]
async fn create_key(
    State(app): State<App>,
    portal: Portal,
    Json(body): Json<CreateApiKey>,
) -> Result<Response, Problem> {
    portal.require(TenantRole::Admin)?;
    let now = app.clock.now();
    let settings = KeySettings::parse(body, now)?;
    step_up::require(&app, &portal, "api_key.create").await?;
    once(&app, &portal, StatusCode::CREATED, async |tx, rng| {
        api_keys::add(tx, &app.secrets, &settings, &actor(&portal), now, rng).await
    })
    .await
}

/// One key. Role developer.
#[utoipa::path(get, path = "/api/v1/tenant/api-keys/{api_key_id}", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("api_key_id" = ApiKeyId, Path)),
    responses((status = 200, body = ApiKey),
              (status = 403, description = "INSUFFICIENT_SCOPE")))]
async fn get_key(State(app): State<App>, portal: Portal, Path(id): Path<ApiKeyId>) -> Result<Json<ApiKey>, Problem> {
    portal.require(TenantRole::Developer)?;
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let key = api_keys::find_key(&mut tx, id).await?;
    tx.commit().await?;
    key.map(Json).ok_or_else(|| Problem::new(ErrorCode::NotFound))
}

/// Change a key's name, scopes or expiry. Absent fields stay; `null` takes the expiry away. Role admin; asks for a challenge.
#[utoipa::path(patch, path = "/api/v1/tenant/api-keys/{api_key_id}", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("api_key_id" = ApiKeyId, Path), ("X-Challenge-Token" = Option<String>, Header, description = "Of the answered challenge."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = UpdateApiKey,
    responses((status = 200, body = ApiKey),
              (status = 403, description = "INSUFFICIENT_SCOPE, TENANT_SUSPENDED"),
              (status = 428, description = "CHALLENGE_REQUIRED")))]
async fn update_key(
    State(app): State<App>,
    portal: Portal,
    Path(id): Path<ApiKeyId>,
    Json(body): Json<UpdateApiKey>,
) -> Result<Response, Problem> {
    portal.require(TenantRole::Admin)?;
    let change = KeyChange::parse(body, app.clock.now())?;
    exists(&app, &portal, id).await?;
    step_up::require(&app, &portal, "api_key.update").await?;
    idempotency::once(&app, portal.tenant, portal.actor(), StatusCode::OK, async |tx| {
        Ok(api_keys::update(tx, id, change, &actor(&portal)).await?)
    })
    .await
}

/// Revoke a key: from the next request on it is refused everywhere. Cannot be undone. Role admin; asks for a challenge.
/// A repetition without an `Idempotency-Key` answers NOT_FOUND.
#[utoipa::path(delete, path = "/api/v1/tenant/api-keys/{api_key_id}", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("api_key_id" = ApiKeyId, Path), ("X-Challenge-Token" = Option<String>, Header, description = "Of the answered challenge."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 204, description = "Revoked."),
              (status = 403, description = "INSUFFICIENT_SCOPE, TENANT_SUSPENDED"),
              (status = 428, description = "CHALLENGE_REQUIRED")))]
async fn revoke_key(State(app): State<App>, portal: Portal, Path(id): Path<ApiKeyId>) -> Result<Response, Problem> {
    portal.require(TenantRole::Admin)?;
    // nothing is in it, and the key that a challenge would be about is gone
    if let Some(replay) = idempotency::earlier(&app, portal.tenant, portal.actor()).await? {
        return Ok(replay);
    }
    exists(&app, &portal, id).await?;
    step_up::require(&app, &portal, "api_key.revoke").await?;
    idempotency::once(&app, portal.tenant, portal.actor(), StatusCode::NO_CONTENT, async |tx| {
        Ok(api_keys::revoke(tx, id, &actor(&portal), app.clock.now()).await?)
    })
    .await
}

/// Give a key another secret; its public part stays. The old secret works for the grace period more, if one is asked for. The
/// answer is the only one that ever holds the new one. Role admin; asks for a challenge.
#[utoipa::path(post, path = "/api/v1/tenant/api-keys/regenerate", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("X-Challenge-Token" = Option<String>, Header, description = "Of the answered challenge."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = RegenerateApiKey,
    responses((status = 200, body = CreatedApiKey),
              (status = 403, description = "INSUFFICIENT_SCOPE, TENANT_SUSPENDED"),
              (status = 404, description = "NOT_FOUND"),
              (status = 428, description = "CHALLENGE_REQUIRED")))]
async fn regenerate_key(
    State(app): State<App>,
    portal: Portal,
    Json(body): Json<RegenerateApiKey>,
) -> Result<Response, Problem> {
    portal.require(TenantRole::Admin)?;
    let grace = Duration::seconds(body.grace_period_seconds.into());
    if grace > MAX_GRACE {
        return Err(Problem::validation().field("/grace_period_seconds", "out_of_range", "must be from 0 to 604800"));
    }
    if let Some(id) = body.api_key_id {
        exists(&app, &portal, id).await?;
    }
    step_up::require(&app, &portal, "api_key.regenerate").await?;
    let now = app.clock.now();
    once(&app, &portal, StatusCode::OK, async |tx, rng| {
        api_keys::regenerate(tx, &app.secrets, body.api_key_id, grace, &actor(&portal), now, rng).await
    })
    .await
}

/// Nobody is asked for a password for the sake of a key that is not there.
async fn exists(app: &App, portal: &Portal, id: ApiKeyId) -> Result<(), Problem> {
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let found = api_keys::find_key(&mut tx, id).await?;
    tx.commit().await?;
    found.map(drop).ok_or_else(|| Problem::new(ErrorCode::NotFound))
}

/// Does the work once for an `Idempotency-Key`, and answers with the key and its secret.
async fn once(
    app: &App,
    portal: &Portal,
    status: StatusCode,
    work: impl AsyncFnOnce(&mut TenantTx, &mut StdRng) -> Result<(ApiKey, Secret), ManageError>,
) -> Result<Response, Problem> {
    idempotency::once(app, portal.tenant, portal.actor(), status, async |tx| {
        let (key, api_secret) = work(tx, &mut StdRng::from_os_rng()).await?;
        Ok(CreatedApiKey { key, api_secret })
    })
    .await
}

pub(super) fn actor(portal: &Portal) -> Actor {
    Actor { name: portal.actor(), request_id: Some(portal.request_id) }
}
