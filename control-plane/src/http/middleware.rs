//! What surrounds every route: its own task, a deadline, the request id, one line of log, metrics, headers.

use std::any::Any;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use cvault_types::ErrorCode;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, STRICT_TRANSPORT_SECURITY,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

use super::context::RequestContext;
use super::serve::{Peer, Unprotected};
use super::trace::TraceId;
use super::{Problem, cors};
use crate::metrics;
use crate::request_logs::{Entry, RequestLog};

/// Longer than the 30 s that `Prefer: wait` may ask for, shorter than a load balancer's patience.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(45);
/// An answer of the API is data: whoever makes a page of it gets one without scripts, frames or anything else.
const NOTHING_TO_LOAD: &str = "default-src 'none'; frame-ancestors 'none'";
/// A year. Not for subdomains: they are not ours to decide about.
pub(super) const ONLY_TLS: HeaderValue = HeaderValue::from_static("max-age=31536000");
/// What is added to an answer, and a little more; one to another origin has three besides.
const ADDED_HEADERS: usize = 10;
/// The work goes on: nothing is known of its outcome.
const TOO_LONG: &str = "This took too long. The change may or may not have been made.";
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Requests that may be served at once. Their tasks outlive their clients, so that connections do not bound them.
#[derive(Debug, Clone)]
pub struct InFlight {
    places: Arc<Semaphore>,
    /// A request that takes longer is answered without its outcome.
    timeout: Duration,
    log: Arc<RequestLog>,
}

/// A request, for the log, the metrics and what its tenant sees of it.
struct Asked {
    context: Arc<RequestContext>,
    method: Method,
    /// The template, never the path: a path holds ids.
    route: Arc<str>,
    from: Peer,
    started: Instant,
    log: Arc<RequestLog>,
}

impl InFlight {
    #[must_use]
    pub fn at_most(requests: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(requests)), timeout: REQUEST_TIMEOUT, log: Arc::default() }
    }

    #[must_use]
    pub fn noted_in(self, log: Arc<RequestLog>) -> Self {
        Self { log, ..self }
    }

    /// A request of `route`'s place while it runs: none, where operators look when all places are taken.
    fn admit(&self, route: &str) -> Result<Option<OwnedSemaphorePermit>, TryAcquireError> {
        if is_operators(route) {
            return Ok(None);
        }
        Arc::clone(&self.places).try_acquire_owned().map(Some)
    }
}

/// Runs the request in a task of its own: a client that goes away cancels nothing, neither a BEGIN nor a COMMIT.
pub async fn own_task(State(in_flight): State<InFlight>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let context = Arc::new(RequestContext::of(&request));
    let route: Arc<str> = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).into();
    let correlation = request.headers().get(&CORRELATION_ID).filter(|value| value.len() <= 128).cloned();
    let admitted = in_flight.admit(&route);
    let asked = Arc::new(Asked {
        context: Arc::clone(&context),
        method: request.method().clone(),
        route,
        from: request.extensions().get().copied().unwrap_or_default(),
        started,
        log: in_flight.log,
    });
    let Ok(permit) = admitted else {
        let mut response = problem(&context, Problem::new(ErrorCode::Overloaded).retry_after(1)).await;
        asked.answered(&response);
        add_headers(response.headers_mut(), &context);
        return response;
    };
    let work = {
        let (context, asked) = (Arc::clone(&context), Arc::clone(&asked));
        let serving = metrics::serving();
        async move {
            let response = match cors::preflight(&request) {
                Some(response) => response,
                None => context.scope(async move { as_problem(next.run(request).await) }).await,
            };
            asked.answered(&response);
            drop((permit, serving));
            response
        }
    };
    let answer = tokio::time::timeout(in_flight.timeout, tokio::spawn(work)).await;
    let mut response = match answer {
        Ok(Ok(response)) => response,
        Ok(Err(failure)) => {
            let text =
                failure.try_into_panic().map_or_else(|_| "cancelled".to_owned(), |payload| panic_text(&*payload));
            tracing::error!(request_id = %context.id, route = &*asked.route, panic = text, "a request panicked");
            let response = problem(&context, Problem::new(ErrorCode::InternalError)).await;
            asked.answered(&response);
            response
        }
        Err(_) => {
            tracing::warn!(
                request_id = %context.id,
                method = asked.method.as_str(),
                route = &*asked.route,
                "a request takes too long; it goes on without its caller"
            );
            problem(&context, Problem::new(ErrorCode::Overloaded).detail(TOO_LONG).retry_after(5)).await
        }
    };
    let headers = response.headers_mut();
    if let Some(value) = correlation {
        headers.insert(CORRELATION_ID, value);
    }
    add_headers(headers, &context);
    response
}

/// For an API that its callers reach over TLS.
pub async fn only_tls(mut response: Response) -> Response {
    response.headers_mut().insert(STRICT_TRANSPORT_SECURITY, ONLY_TLS);
    response
}

/// For an API whose callers are to use TLS: what a trusted proxy has taken without is refused, and never redirected, because
/// whatever is secret in it has been seen on the way by then. Operators' own requests are not concerned.
pub async fn protected(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    if request.extensions().get::<Unprotected>().is_some() && !is_operators(route) {
        return Problem::new(ErrorCode::HttpsRequired).into_response();
    }
    next.run(request).await
}

/// Where operators and their load balancers look.
pub(super) fn is_operators(route: &str) -> bool {
    matches!(route, "/health" | "/health/ready" | "/metrics")
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

/// Errors that the libraries answer with a bare text (or nothing) get the one form of error. What a handler answers
/// itself is JSON and stays, such as /health's 503.
fn as_problem(response: Response) -> Response {
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error())
        || response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().ends_with(b"json"))
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

impl Asked {
    fn answered(&self, response: &Response) {
        let (took, status) = (self.started.elapsed(), response.status());
        metrics::request(Arc::clone(&self.route), Some(&self.method), status.as_u16(), took);
        let tenant = self.context.tenant.get().copied();
        tracing::info!(
            request_id = %self.context.id,
            method = self.method.as_str(),
            route = &*self.route,
            status = status.as_u16(),
            duration_ms = took.as_secs_f64() * 1e3,
            tenant = tenant.map(|tenant| tenant.to_string()),
            trace_id = self.context.trace_id.as_ref().map(TraceId::as_str),
            "request"
        );
        if let (Some(tenant), Some(caller)) = (tenant, self.context.called_by.get()) {
            self.log.note(Entry {
                tenant,
                id: self.context.id,
                method: self.method.clone(),
                route: Arc::clone(&self.route),
                status,
                code: response.extensions().get().copied(),
                took,
                api_key: caller.api_key,
                user: caller.user,
                client: self.from.ip(),
            });
        }
    }
}

pub(super) fn add_headers(headers: &mut HeaderMap, context: &RequestContext) {
    // once, and not each time a few more are added
    headers.reserve(ADDED_HEADERS);
    let id = HeaderValue::try_from(context.id.to_string()).expect("ids are ASCII");
    headers.insert(REQUEST_ID, id);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.entry(CONTENT_SECURITY_POLICY).or_insert(HeaderValue::from_static(NOTHING_TO_LOAD));
    if let Some(origin) = context.origin.get() {
        cors::allow(headers, origin.clone());
    }
    let rates = context.rate.get().map(|rate| (rate.policy, rate.decision));
    let rates = rates.into_iter().chain(context.user_rate.get().map(|decision| ("user", *decision)));
    // draft-ietf-httpapi-ratelimit-headers
    let (mut policies, mut states) = (String::new(), String::new());
    for (name, rate) in rates {
        let comma = if policies.is_empty() { "" } else { ", " };
        let _ = write!(policies, "{comma}\"{name}\";q={};w=60", rate.quota);
        let _ = write!(states, "{comma}\"{name}\";r={};t={}", rate.remaining, rate.reset_seconds);
    }
    if !policies.is_empty() {
        headers.insert(RATE_LIMIT_POLICY, HeaderValue::try_from(policies).expect("digits are ASCII"));
        headers.insert(RATE_LIMIT, HeaderValue::try_from(states).expect("digits are ASCII"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;
    use http_body_util::BodyExt;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::sync::Notify;
    use tower::ServiceExt;

    fn surrounded(router: Router) -> Router {
        router.layer(axum::middleware::from_fn_with_state(InFlight::at_most(1), own_task))
    }

    fn request(path: &str) -> Request {
        http::Request::builder().uri(path).body(Body::empty()).unwrap()
    }

    async fn panics() -> Response {
        panic!("a secret of the implementation")
    }

    #[tokio::test]
    async fn a_panic_is_answered_as_an_internal_error_that_says_nothing() {
        let router = surrounded(Router::new().route("/panic", get(panics)));
        let response = router.oneshot(request("/panic")).await.unwrap();
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
        let id = response.headers()[REQUEST_ID].to_str().unwrap().to_owned();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = std::str::from_utf8(&body).unwrap();
        assert!(text.contains("INTERNAL_ERROR") && text.contains(&id) && !text.contains("secret"), "{text}");
    }

    #[tokio::test]
    async fn a_client_that_goes_away_cancels_nothing_and_what_it_left_counts_as_in_flight() {
        let (begun, go_on, done) = (Arc::new(Notify::new()), Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
        let handler = {
            let (begun, go_on, done) = (Arc::clone(&begun), Arc::clone(&go_on), Arc::clone(&done));
            async move || {
                begun.notify_one();
                go_on.notified().await;
                done.store(true, Ordering::Relaxed);
                begun.notify_one();
            }
        };
        let router = surrounded(Router::new().route("/", get(handler)).route("/health", get(async || ())));
        let call = tokio::spawn(router.clone().oneshot(request("/")));
        begun.notified().await;
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        let refused = router.clone().oneshot(request("/")).await.unwrap();
        assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (503, "1"));
        assert!(refused.headers().contains_key(REQUEST_ID));
        assert_eq!(router.clone().oneshot(request("/health")).await.unwrap().status(), 200, "needs no place");
        go_on.notify_one();
        begun.notified().await;
        assert!(done.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_request_without_an_end_is_answered_with_what_is_not_known() {
        let in_flight = InFlight { timeout: Duration::from_millis(10), ..InFlight::at_most(1) };
        let router = Router::new().route("/", get(std::future::pending::<()>));
        let router = router.layer(axum::middleware::from_fn_with_state(in_flight, own_task));
        let response = router.oneshot(request("/")).await.unwrap();
        assert_eq!(response.status(), 503);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(std::str::from_utf8(&body).unwrap().contains("may or may not have been made"));
    }
}
