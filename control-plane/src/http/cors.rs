//! Cross-origin calls (Fetch standard, §3.3): pages of other origins may use the client API, and nothing else.
//!
//! A preflight carries no key, so nobody knows its tenant: it is answered for every origin, and the call itself decides. A
//! call from an origin that the tenant has not allowed is refused, and no page can read an answer without
//! `Access-Control-Allow-Origin`. Cookies are never allowed along (no `Access-Control-Allow-Credentials`).

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};

/// Not `X-API-Secret`: a browser that asks to send it learns that it may not.
const HEADERS: &str =
    "authorization, content-type, idempotency-key, prefer, traceparent, x-api-key, x-correlation-id, x-requested-with";
const EXPOSED: &str = "idempotency-replayed, ratelimit, ratelimit-policy, retry-after, x-correlation-id, x-request-id, \
                       x-session-terminated";
/// What browsers keep at most.
const MAX_AGE_SECONDS: &str = "7200";

/// The answer to a preflight of the client API. `None`: it is no such request.
pub(super) fn preflight(request: &Request) -> Option<Response> {
    let headers = request.headers();
    let asked = request.method() == Method::OPTIONS && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    let origin = headers.get(ORIGIN).filter(|_| asked && is_client_api(request.uri().path()))?.clone();
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, PATCH, DELETE"));
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(HEADERS));
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE_SECONDS));
    headers.append(VARY, HeaderValue::from_static("origin"));
    Some(response)
}

/// Lets pages of `origin` read the answer.
pub(super) fn allow(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    headers.append(VARY, HeaderValue::from_static("origin"));
}

/// What a user's own program may call. Not `/api/v1/users`, which needs the secret.
fn is_client_api(path: &str) -> bool {
    let noun = path.strip_prefix("/api/v1/").map(|rest| rest.split('/').next().unwrap_or_default());
    noun.is_some_and(|noun| matches!(noun, "auth" | "devices" | "vpn" | "servers" | "usage"))
}
