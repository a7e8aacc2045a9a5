//! Health, metrics, public keys and the API's own description: no credentials needed.

use axum::extract::State;
use axum::response::IntoResponse;
use cvault_types::health::{Health, HealthStatus};
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderName, StatusCode};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::auth::tokens;
use crate::http::{Json, openapi};
use crate::metrics;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(ready))
        .routes(routes!(metrics_text))
        .routes(routes!(jwks))
        .routes(routes!(description))
}

/// Whether the platform works.
#[utoipa::path(get, path = "/health", tag = "platform", security(()),
    responses((status = 200, body = Health), (status = 503, body = Health, example = json!({"status": "unhealthy", "timestamp": "2026-11-21T09:30:00Z", "db": false}))))]
async fn health(State(app): State<App>) -> (StatusCode, Json<Health>) {
    let db = app.health.database(&app.db).await;
    answer(&app, db, db)
}

/// Whether this replica should get requests: the database answers and the process is not shutting down.
#[utoipa::path(get, path = "/health/ready", tag = "platform", security(()),
    responses((status = 200, body = Health), (status = 503, body = Health, example = json!({"status": "unhealthy", "timestamp": "2026-11-21T09:30:00Z", "db": false}))))]
async fn ready(State(app): State<App>) -> (StatusCode, Json<Health>) {
    let db = app.health.database(&app.db).await;
    answer(&app, db && !app.draining.is_cancelled(), db)
}

fn answer(app: &App, healthy: bool, db: bool) -> (StatusCode, Json<Health>) {
    let (code, status) = if healthy {
        (StatusCode::OK, HealthStatus::Healthy)
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, HealthStatus::Unhealthy)
    };
    (code, Json(Health { status, timestamp: app.clock.now(), db }))
}

/// Metrics in the Prometheus text format.
#[utoipa::path(get, path = "/metrics", tag = "platform", security(()),
    responses((status = 200, body = String, content_type = "text/plain",
        example = "cvault_http_requests_total{route=\"/health\",method=\"GET\",status=\"200\"} 12\n")))]
async fn metrics_text(State(app): State<App>) -> impl IntoResponse {
    metrics::pool("sys", app.db.sys.size(), app.db.sys.num_idle());
    let (size, idle) = app.db.tenancy.connections();
    metrics::pool("app", size, idle);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics::render())
}

/// The public keys that verify access tokens (JSON Web Key Set): the one that signs, the next one, and earlier ones.
#[utoipa::path(get, path = "/.well-known/jwks.json", tag = "platform", security(()),
    responses((status = 200, body = serde_json::Value,
        example = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "…", "x": "…"}]}))))]
async fn jwks(State(app): State<App>) -> impl IntoResponse {
    (PUBLIC, Json(tokens::jwks(&app.token_keys.last())))
}

/// This document.
#[utoipa::path(get, path = "/api/v1/openapi.json", tag = "platform", security(()),
    responses((status = 200, body = serde_json::Value, example = json!({"openapi": "3.1.0"}))))]
async fn description() -> impl IntoResponse {
    let [public] = PUBLIC;
    ([public, (CONTENT_TYPE, "application/json")], openapi::document_text())
}

/// Five minutes: a new signing key has to be known before it signs.
const PUBLIC: [(HeaderName, &str); 1] = [(CACHE_CONTROL, "public, max-age=300")];
