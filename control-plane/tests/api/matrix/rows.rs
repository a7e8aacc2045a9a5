//! Who asks for what, and the exact status of the answer.

/// Operations that need no credentials. Nothing else may be without.
pub(super) const PUBLIC: &[&str] = &[
    "GET /.well-known/jwks.json",
    "GET /api/v1/openapi.json",
    // what proves something here is in the body
    "POST /api/v1/tenant/auth/email/confirm",
    "POST /api/v1/tenant/auth/login",
    "POST /api/v1/tenant/auth/password-reset",
    "POST /api/v1/tenant/auth/password-reset/confirm",
    "POST /api/v1/tenant/auth/refresh",
    "POST /api/v1/tenant/auth/signup",
    "POST /api/v1/tenant/auth/verify-email",
    "GET /health",
    "GET /health/ready",
    "GET /metrics",
];

/// Who asks. To add one: a variant, its credentials in [`super::scene::Scene::sign`], a column in [`ROWS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    Anonymous,
    /// Well-formed credentials that nobody issued.
    WrongKey,
    /// The tenant's key with the token of another tenant's user.
    MixedTenants,
    /// A user of another tenant.
    ForeignUser,
    /// The backend of another tenant.
    ForeignBackend,
    /// Another user of the same tenant.
    Neighbour,
    /// The tenant's own backend, with a key for `/api/v1/usage` alone.
    NarrowKey,
    /// Of another tenant, in the portal.
    ForeignOwner,
    /// Of the same tenant, in the portal; so are the next three.
    Viewer,
    Billing,
    Developer,
    Admin,
    PlatformAdmin,
}

pub(super) const CALLERS: [Caller; N] = [
    Caller::Anonymous,
    Caller::WrongKey,
    Caller::MixedTenants,
    Caller::ForeignUser,
    Caller::ForeignBackend,
    Caller::Neighbour,
    Caller::NarrowKey,
    Caller::ForeignOwner,
    Caller::Viewer,
    Caller::Billing,
    Caller::Developer,
    Caller::Admin,
    Caller::PlatformAdmin,
];

const N: usize = 13;

type Statuses = [u16; N];

/// What an operation answers to each of [`CALLERS`], in their order. In the body `$device` is a device of the tenant under
/// attack, and so on: see [`super::scene::Scene::body`].
pub(super) struct Row {
    pub(super) operation: &'static str,
    pub(super) body: Option<&'static str>,
    pub(super) status: Statuses,
}

const fn row(operation: &'static str, body: Option<&'static str>, status: Statuses) -> Row {
    Row { operation, body, status }
}

const fn everybody(status: u16) -> Statuses {
    [status; N]
}

const fn staff(status: u16) -> Statuses {
    [401, 401, 401, 401, 401, 401, 401, 401, 401, 401, 401, 401, status]
}

/// A tenant's user; here always one whom nothing in the request belongs to.
const fn user(status: u16) -> Statuses {
    [401, 401, 401, status, 401, status, 403, 401, 401, 401, 401, 401, 401]
}

/// A tenant's backend; here always another's.
const fn backend(status: u16) -> Statuses {
    [401, 401, 401, 401, status, 401, 403, 401, 401, 401, 401, 401, 401]
}

/// In the portal: [`Caller::ForeignOwner`], then those of the tenant itself from viewer to admin.
const fn people(foreign: u16, viewer: u16, billing: u16, developer: u16, admin: u16) -> Statuses {
    [401, 401, 401, 401, 401, 401, 401, foreign, viewer, billing, developer, admin, 401]
}

const DEVICE: Option<&str> = Some(r#"{"device_id": "$device"}"#);
const NEW_PASSWORD: Option<&str> = Some(r#"{"password": "another fine password"}"#);

pub(super) const ROWS: &[Row] = &[
    row("GET /.well-known/jwks.json", None, everybody(200)),
    row("GET /api/v1/openapi.json", None, everybody(200)),
    row("GET /health", None, everybody(200)),
    row("GET /health/ready", None, everybody(200)),
    row("GET /metrics", None, everybody(200)),
    // the tenant's backend
    row("POST /api/v1/auth/register", Some(r#"{"email": "x@y.example", "password": "1"}"#), backend(422)),
    row("POST /api/v1/auth/login", Some(r#"{"email": "victim@example.com", "password": "$password"}"#), backend(401)),
    row("POST /api/v1/auth/refresh", Some(r#"{"refresh_token": "$refresh"}"#), backend(401)),
    row("POST /api/v1/auth/logout", Some(r#"{"refresh_token": "$refresh"}"#), backend(401)),
    row("GET /api/v1/users", None, backend(200)),
    row("GET /api/v1/users/{user_id}", None, backend(404)),
    row("PATCH /api/v1/users/{user_id}", Some(r#"{"status": "disabled"}"#), backend(404)),
    row("DELETE /api/v1/users/{user_id}", None, backend(404)),
    // the victim's name at its own tenant is a new one at another
    row("POST /api/v1/users/{external_id}/login-token", None, backend(201)),
    // a tenant's user
    row("GET /api/v1/devices", None, user(200)),
    row("POST /api/v1/devices", Some(r#"{"device_name": ""}"#), user(422)),
    row("GET /api/v1/devices/{device_id}", None, user(404)),
    row("DELETE /api/v1/devices/{device_id}", None, user(404)),
    row("GET /api/v1/devices/{device_id}/config", None, user(404)),
    row("POST /api/v1/devices/{device_id}/rotate-key", Some("{}"), user(404)),
    row("POST /api/v1/vpn/connect", DEVICE, user(404)),
    row("POST /api/v1/vpn/disconnect", DEVICE, user(404)),
    row("GET /api/v1/vpn/status", None, user(200)),
    row("GET /api/v1/servers", None, user(200)),
    // both
    row("GET /api/v1/usage", None, [401, 401, 401, 200, 200, 200, 200, 401, 401, 401, 401, 401, 401]),
    // getting into the portal
    row(
        "POST /api/v1/tenant/auth/signup",
        Some(r#"{"business_name": " ", "email": "x@y.example", "password": "$password"}"#),
        everybody(422),
    ),
    row(
        "POST /api/v1/tenant/auth/login",
        Some(r#"{"email": "owner@victim.example", "password": "wrong password"}"#),
        everybody(401),
    ),
    row("POST /api/v1/tenant/auth/refresh", Some(r#"{"refresh_token": "cvp_"}"#), everybody(401)),
    row("POST /api/v1/tenant/auth/verify-email", Some(r#"{"token": "cvl_"}"#), everybody(401)),
    row("POST /api/v1/tenant/auth/email/confirm", Some(r#"{"token": "cvl_"}"#), everybody(401)),
    row("POST /api/v1/tenant/auth/password-reset", Some(r#"{"email": "nobody"}"#), everybody(422)),
    row(
        "POST /api/v1/tenant/auth/password-reset/confirm",
        Some(r#"{"token": "cvl_", "password": "$password"}"#),
        everybody(401),
    ),
    // one's own account
    row("GET /api/v1/tenant/me", None, people(200, 200, 200, 200, 200)),
    row("POST /api/v1/tenant/auth/verify-email/resend", None, people(202, 202, 202, 202, 202)),
    row("POST /api/v1/tenant/auth/email", Some(r#"{"email": "x@y.example"}"#), people(428, 428, 428, 428, 428)),
    row("POST /api/v1/tenant/auth/password", NEW_PASSWORD, people(428, 428, 428, 428, 428)),
    row("GET /api/v1/tenant/sessions", None, people(200, 200, 200, 200, 200)),
    row("DELETE /api/v1/tenant/sessions", None, people(204, 204, 204, 204, 204)),
    row("DELETE /api/v1/tenant/sessions/{session_id}", None, people(404, 404, 404, 404, 404)),
    row(
        "POST /api/v1/tenant/step-up/{challenge_id}/verify",
        Some(r#"{"method": "password", "password": "$password"}"#),
        people(404, 404, 404, 404, 404),
    ),
    // the tenant
    row("GET /api/v1/tenant/settings", None, people(200, 200, 200, 200, 200)),
    row("PATCH /api/v1/tenant/settings", Some("{}"), people(200, 403, 403, 403, 200)),
    row("GET /api/v1/tenant/api-keys", None, people(200, 403, 403, 200, 200)),
    row("POST /api/v1/tenant/api-keys", Some(r#"{"name": "mine"}"#), people(428, 403, 403, 403, 428)),
    row("GET /api/v1/tenant/api-keys/{api_key_id}", None, people(404, 403, 403, 200, 200)),
    row("PATCH /api/v1/tenant/api-keys/{api_key_id}", Some(r#"{"name": "mine"}"#), people(404, 403, 403, 403, 428)),
    row("DELETE /api/v1/tenant/api-keys/{api_key_id}", None, people(404, 403, 403, 403, 428)),
    row("POST /api/v1/tenant/api-keys/regenerate", Some(r#"{"api_key_id": "$key"}"#), people(404, 403, 403, 403, 428)),
    row("GET /api/v1/tenant/dashboard/stats", None, people(200, 200, 200, 200, 200)),
    row("GET /api/v1/tenant/dashboard/usage", None, people(200, 200, 200, 200, 200)),
    row("GET /api/v1/tenant/dashboard/activity", None, people(200, 200, 200, 200, 200)),
    row("GET /api/v1/tenant/audit", None, people(200, 403, 403, 200, 200)),
    row("GET /api/v1/tenant/request-logs", None, people(200, 403, 403, 200, 200)),
    row("GET /api/v1/tenant/users", None, people(200, 403, 403, 200, 200)),
    row("GET /api/v1/tenant/devices", None, people(200, 403, 403, 200, 200)),
    // platform staff, for what is not there
    row("GET /admin/tenants", None, staff(200)),
    row("POST /admin/tenants", Some(r#"{"name": ""}"#), staff(422)),
    row("GET /admin/tenants/{tenant_id}", None, staff(404)),
    row("PATCH /admin/tenants/{tenant_id}", Some("{}"), staff(404)),
    row("DELETE /admin/tenants/{tenant_id}", None, staff(404)),
    row("POST /admin/tenants/{tenant_id}/suspend", None, staff(404)),
    row("POST /admin/tenants/{tenant_id}/resume", None, staff(404)),
    row("GET /admin/servers", None, staff(200)),
    row("POST /admin/servers", Some(r#"{"name": "", "region": "", "public_ip": "::1"}"#), staff(422)),
    row("GET /admin/servers/{server_id}", None, staff(404)),
    row("DELETE /admin/servers/{server_id}", None, staff(404)),
    row("POST /admin/servers/{server_id}/enrol-token", None, staff(404)),
    row("POST /admin/servers/{server_id}/drain", None, staff(404)),
    row("POST /admin/servers/{server_id}/maintenance", None, staff(404)),
    row("POST /admin/servers/{server_id}/activate", None, staff(404)),
    row("GET /admin/pools", None, staff(200)),
    row("POST /admin/pools", Some(r#"{"name": "", "ipv4": "10.9.0.0/16"}"#), staff(422)),
    row("GET /admin/pools/{pool_id}", None, staff(404)),
    row("PATCH /admin/pools/{pool_id}", Some("{}"), staff(404)),
    row("DELETE /admin/pools/{pool_id}", None, staff(404)),
    row("GET /admin/audit", None, staff(200)),
    // the last: whoever it is for is logged out
    row("POST /api/v1/tenant/auth/logout", None, people(204, 204, 204, 204, 204)),
];
