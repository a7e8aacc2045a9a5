//! Every route of the API.

use std::sync::Arc;

use axum::Router;
use cvault_types::ErrorCode;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use super::middleware::InFlight;
use super::{Problem, middleware, openapi, routes};
use crate::app::App;

/// About a second's work of the database; those that wait for an activation hold no connection.
pub(crate) const MAX_IN_FLIGHT: usize = 2_000;

/// The routes with their descriptions: one that is not described cannot be added.
pub fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(openapi::Description::openapi())
        .merge(routes::health::router()) // GET /health /health/ready /metrics /.well-known/jwks.json /api/v1/openapi.json
        .merge(routes::admin::router()) // /admin/tenants
        .merge(routes::admin_servers::router()) // /admin/servers
        .merge(routes::admin_pools::router()) // /admin/pools
        .merge(routes::admin_audit::router()) // GET /admin/audit
        .merge(routes::auth::router()) // POST /api/v1/auth/{register,login,refresh,logout}
        .merge(routes::portal::router()) // /api/v1/tenant/auth /api/v1/tenant/me
        .merge(routes::portal_account::router()) // /api/v1/tenant/{auth/password…, auth/verify-email, sessions, step-up}
        .merge(routes::portal_email::router()) // POST /api/v1/tenant/auth/email[/confirm]
        .merge(routes::devices::router()) // /api/v1/devices
        .merge(routes::vpn::router()) // /api/v1/vpn/{connect,disconnect,status}
        .merge(routes::servers::router()) // GET /api/v1/servers
        .merge(routes::usage::router()) // GET /api/v1/usage
        .merge(routes::users::router()) // /api/v1/users
        .merge(routes::tenant_api_keys::router()) // /api/v1/tenant/api-keys
        .merge(routes::tenant_settings::router()) // /api/v1/tenant/settings
        .merge(routes::tenant_dashboard::router()) // GET /api/v1/tenant/dashboard/{stats,usage,activity}
        .merge(routes::tenant_lists::router()) // GET /api/v1/tenant/{audit,users,devices}
        .merge(routes::tenant_request_logs::router()) // GET /api/v1/tenant/request-logs
}

/// The whole API, ready to be served.
pub fn api(app: App) -> Router {
    let over_tls = app.config.tls.is_some() || app.config.public_url.starts_with("https://");
    let in_flight = InFlight::at_most(MAX_IN_FLIGHT).noted_in(Arc::clone(&app.request_log));
    let (router, _) = routes().split_for_parts();
    let router = router.fallback(async || Problem::new(ErrorCode::NotFound));
    let router = if app.config.public_url.starts_with("https://") {
        router.layer(axum::middleware::from_fn(middleware::protected))
    } else {
        router
    };
    // each layer costs every request a few allocations; bodies are bounded by `extract::Json`, the only one that reads them
    let router = router.layer(axum::middleware::from_fn_with_state(in_flight, middleware::own_task)).with_state(app);
    if over_tls { router.layer(axum::middleware::map_response(middleware::only_tls)) } else { router }
}
