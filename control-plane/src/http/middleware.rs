//! What surrounds every route: its own task, a deadline, the request id, one line of log, metrics, headers.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use cvault_types::ErrorCode;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::Problem;
use super::context::RequestContext;
use crate::metrics;

/// Longer than `?wait=` may wait, shorter than a load balancer's patience.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Runs the request in a task of its own: a client that goes away cancels nothing, neither a BEGIN nor a COMMIT.
pub async fn own_task(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let context = Arc::new(RequestContext::new());
    let method = request.method().clone();
    // the template, never the path: a path holds ids
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched".to_owned(), |path| path.as_str().to_owned());
    let correlation = request.headers().get(&CORRELATION_ID).filter(|value| value.len() <= 128).cloned();
    let work = {
        let context = Arc::clone(&context);
        let finishing = Arc::clone(&context);
        let (method, route) = (method.clone(), route.clone());
        async move {
            let response = context.scope(async move { as_problem(next.run(request).await) }).await;
            log(&finishing, method.as_str(), &route, response.status(), started);
            response
        }
    };
    let answer = tokio::time::timeout(REQUEST_TIMEOUT, tokio::spawn(work)).await;
    let mut response = match answer {
        Ok(Ok(response)) => response,
        Ok(Err(failure)) => {
            let text = failure.try_into_panic().map_or_else(|_| "cancelled".to_owned(), |payload| panic_text(&*payload));
            tracing::error!(request_id = %context.id, route, panic = text, "a request panicked");
            let response = problem(&context, Problem::new(ErrorCode::InternalError)).await;
            log(&context, method.as_str(), &route, response.status(), started);
            response
        }
        Err(_) => problem(&context, Problem::new(ErrorCode::Overloaded).retry_after(5)).await,
    };
    let headers = response.headers_mut();
    if let Some(value) = correlation {
        headers.insert(CORRELATION_ID, value);
    }
    add_headers(headers, &context);
    response
}

async fn problem(context: &Arc<RequestContext>, problem: Problem) -> Response {
    Arc::clone(context).scope(async move { problem.into_response() }).await
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a message".to_owned())
}

/// Errors that the libraries answer with a bare text (or nothing) get the one form of error.
fn as_problem(response: Response) -> Response {
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error())
        || response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/problem+json")
    {
        return response;
    }
    let code = match status {
        StatusCode::NOT_FOUND => ErrorCode::NotFound,
        StatusCode::METHOD_NOT_ALLOWED => ErrorCode::MethodNotAllowed,
        StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::PayloadTooLarge,
        StatusCode::UNSUPPORTED_MEDIA_TYPE => ErrorCode::UnsupportedMediaType,
        StatusCode::UNPROCESSABLE_ENTITY => ErrorCode::ValidationFailed,
        StatusCode::REQUEST_TIMEOUT => ErrorCode::RequestTimeout,
        _ if status.is_client_error() => ErrorCode::MalformedRequest,
        _ => ErrorCode::InternalError,
    };
    Problem::new(code).allow(response.headers().get(ALLOW).cloned()).into_response()
}

fn log(context: &RequestContext, method: &str, route: &str, status: StatusCode, started: Instant) {
    let took = started.elapsed();
    metrics::request(route, method, status.as_u16(), took);
    let tenant = context.tenant.get().map(ToString::to_string);
    tracing::info!(
        request_id = %context.id,
        method,
        route,
        status = status.as_u16(),
        duration_ms = took.as_secs_f64() * 1e3,
        tenant,
        "request"
    );
}

fn add_headers(headers: &mut HeaderMap, context: &RequestContext) {
    let id = HeaderValue::from_str(&context.id.to_string()).expect("ids are ASCII");
    headers.insert(REQUEST_ID, id);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if let Some(rate) = context.rate.get() {
        // draft-ietf-httpapi-ratelimit-headers
        let policy = format!("\"tenant\";q={};w=60", rate.per_minute);
        let state = format!("\"tenant\";r={};t={}", rate.remaining, rate.reset_seconds);
        headers.insert(RATE_LIMIT_POLICY, HeaderValue::from_str(&policy).expect("digits are ASCII"));
        headers.insert(RATE_LIMIT, HeaderValue::from_str(&state).expect("digits are ASCII"));
    }
}
