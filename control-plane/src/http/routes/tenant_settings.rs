//! `/api/v1/tenant/settings`: what a tenant decides for itself.

use axum::extract::State;
use axum::response::Response;
use cvault_types::TenantRole;
use cvault_types::settings::{TenantSettings, UpdateSettings};
use http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::tenant_api_keys::actor;
use crate::app::App;
use crate::http::{Json, Portal, Problem, idempotency};
use crate::step_up;
use crate::tenants::{self, SettingsChange};

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(show_settings, update_settings))
}

/// The tenant's settings. Every role.
#[utoipa::path(get, path = "/api/v1/tenant/settings", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    responses((status = 200, body = TenantSettings)))]
async fn show_settings(State(app): State<App>, portal: Portal) -> Result<Json<TenantSettings>, Problem> {
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let settings = tenants::settings(&mut tx, app.config.rate_limit_per_minute).await;
    Ok(Json(tx.finish(settings).await?))
}

/// Change settings. Absent fields stay; `null` goes back to the platform's value. Configurations of devices show new values
/// when they are next read. Role admin; may ask for a challenge.
#[utoipa::path(patch, path = "/api/v1/tenant/settings", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("X-Challenge-Token" = Option<String>, Header, description = "Of the answered challenge."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = UpdateSettings,
    responses((status = 200, body = TenantSettings),
              (status = 403, description = "INSUFFICIENT_SCOPE, TENANT_SUSPENDED"),
              (status = 428, description = "CHALLENGE_REQUIRED")))]
async fn update_settings(
    State(app): State<App>,
    portal: Portal,
    Json(body): Json<UpdateSettings>,
) -> Result<Response, Problem> {
    portal.require(TenantRole::Admin)?;
    let change = SettingsChange::parse(body)?;
    step_up::if_risky(&app, &portal, "tenant.settings").await?;
    idempotency::once(&app, portal.tenant, portal.actor(), StatusCode::OK, async |tx| {
        tenants::update_settings(tx, change, &actor(&portal), app.clock.now()).await?;
        Ok(tenants::settings(tx, app.config.rate_limit_per_minute).await?)
    })
    .await
}
