//! What is known about the request being served, for the log line, the metrics and the error body.

use std::sync::{Arc, OnceLock};

use axum::extract::Request;
use cvault_types::{ApiKeyId, RequestId, TenantId, UserId};
use http::HeaderValue;
use http::uri::PathAndQuery;
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use uuid::Uuid;

use super::extract::single;
use super::limit::Decision;
use super::trace::TraceId;
use crate::portal::sessions::Seen;

tokio::task_local! {
    /// Set for the whole task of a request.
    static CONTEXT: Arc<RequestContext>;
}

/// Filled in as the request is understood; each field at most once.
#[derive(Debug)]
pub struct RequestContext {
    pub id: RequestId,
    /// As the caller has named it.
    pub trace_id: Option<TraceId>,
    pub tenant: OnceLock<TenantId>,
    pub called_by: OnceLock<CalledBy>,
    pub rate: OnceLock<Rate>,
    /// What the limiter said of the tenant's user, beside `rate`.
    pub user_rate: OnceLock<Decision>,
    /// The caller's origin, when its tenant has allowed it.
    pub origin: OnceLock<HeaderValue>,
    /// When the request's head was complete.
    arrived: Instant,
    /// Method, path and query.
    line: String,
    /// `None`: there is none. `Some(None)`: there is one, and it is malformed.
    idempotency_key: Option<Option<String>>,
    body_digest: OnceLock<[u8; 32]>,
    /// Of a request to the portal only.
    sensitive: Option<(Option<String>, Seen)>,
    /// The caller's credentials are right.
    proven: OnceLock<()>,
}

/// Whose request it is, of the tenant's: what it was proven with.
#[derive(Debug, Clone, Copy)]
pub struct CalledBy {
    pub api_key: ApiKeyId,
    pub user: Option<UserId>,
}

/// What the limiter said, and of whom.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// The policy's name: `tenant`, `person`, `staff`.
    pub policy: &'static str,
    pub decision: Decision,
}

/// What a request that may be challenged brings.
#[derive(Debug)]
pub(crate) struct Sensitive {
    /// `X-Challenge-Token`.
    pub(crate) token: Option<String>,
    /// SHA-256 of method, path, query and body: what a challenge is bound to.
    pub(crate) digest: [u8; 32],
    pub(crate) seen: Seen,
}

/// A request's `Idempotency-Key`, and what it was sent with.
#[derive(Debug)]
pub(super) struct Idempotency {
    /// `None`: malformed.
    pub(super) key: Option<String>,
    /// SHA-256 of method, path, query and body.
    pub(super) fingerprint: [u8; 32],
}

impl RequestContext {
    #[must_use]
    pub fn of(request: &Request) -> Self {
        let header = "idempotency-key";
        let key = request
            .headers()
            .contains_key(header)
            .then(|| single(request.headers(), header).filter(|key| is_well_formed(key)).map(str::to_owned));
        let sensitive = request
            .uri()
            .path()
            .starts_with("/api/v1/tenant/")
            .then(|| (single(request.headers(), "x-challenge-token").map(str::to_owned), Seen::of(request)));
        Self {
            id: RequestId::from_uuid(Uuid::now_v7()),
            trace_id: TraceId::of(request.headers()),
            tenant: OnceLock::new(),
            called_by: OnceLock::new(),
            rate: OnceLock::new(),
            user_rate: OnceLock::new(),
            origin: OnceLock::new(),
            arrived: Instant::now(),
            // without scheme and host: HTTP/2 sends them, HTTP/1.1 does not
            line: format!("{} {}", request.method(), request.uri().path_and_query().map_or("/", PathAndQuery::as_str)),
            idempotency_key: key,
            body_digest: OnceLock::new(),
            sensitive,
            proven: OnceLock::new(),
        }
    }

    fn fingerprint(&self) -> [u8; 32] {
        let body = self.body_digest.get().copied().unwrap_or_default();
        Sha256::new().chain_update(&self.line).chain_update([0]).chain_update(body).finalize().into()
    }

    /// Runs `work` as the work of this request.
    pub async fn scope<F: Future>(self: Arc<Self>, work: F) -> F::Output {
        CONTEXT.scope(self, work).await
    }
}

/// Whether an `Idempotency-Key` has 1 to 255 visible characters.
fn is_well_formed(key: &str) -> bool {
    (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The id of the request this task serves; a fresh one outside of any request.
#[must_use]
pub fn request_id() -> RequestId {
    CONTEXT.try_with(|context| context.id).unwrap_or_else(|_| RequestId::from_uuid(Uuid::now_v7()))
}

/// When this task's request arrived; now, outside of any request.
#[must_use]
pub fn arrived() -> Instant {
    CONTEXT.try_with(|context| context.arrived).unwrap_or_else(|_| Instant::now())
}

/// Notes who the caller's tenant is and what the limiter said of it.
pub(crate) fn identified(tenant: TenantId, decision: Decision) {
    note(tenant, Rate { policy: "tenant", decision });
}

/// As [`identified`], where one person of the tenant is limited.
pub(crate) fn person_identified(tenant: TenantId, decision: Decision) {
    note(tenant, Rate { policy: "person", decision });
}

/// Notes whose user the caller is, and what the limiter said of that user.
pub(crate) fn user_identified(tenant: TenantId, decision: Decision) {
    let noted = CONTEXT.try_with(|context| {
        context.proven.get_or_init(|| ());
        context.tenant.get_or_init(|| tenant);
        context.user_rate.get_or_init(|| decision);
    });
    if noted.is_err() {
        tracing::debug!("identified outside of a request");
    }
}

/// Notes with which key, and by which user, the request was made, once that is proven.
pub(crate) fn called_by(api_key: ApiKeyId, user: Option<UserId>) {
    let noted = CONTEXT.try_with(|context| {
        context.called_by.get_or_init(|| CalledBy { api_key, user });
    });
    if noted.is_err() {
        tracing::debug!("a caller outside of a request");
    }
}

/// Notes what the limiter said of one of the platform's staff.
pub(super) fn staff_identified(decision: Decision) {
    let noted = CONTEXT.try_with(|context| {
        context.proven.get_or_init(|| ());
        context.rate.get_or_init(|| Rate { policy: "staff", decision });
    });
    if noted.is_err() {
        tracing::debug!("identified outside of a request");
    }
}

/// Whether nothing has proven yet who the caller is. Nobody is a stranger outside of a request.
pub(super) fn is_stranger() -> bool {
    CONTEXT.try_with(|context| context.proven.get().is_none()).unwrap_or(false)
}

fn note(tenant: TenantId, rate: Rate) {
    let noted = CONTEXT.try_with(|context| {
        context.proven.get_or_init(|| ());
        context.tenant.get_or_init(|| tenant);
        context.rate.get_or_init(|| rate);
    });
    if noted.is_err() {
        tracing::debug!("identified outside of a request");
    }
}

/// Notes that the caller's tenant lets pages of this origin read its answers.
pub(crate) fn origin_allowed(origin: &HeaderValue) {
    let noted = CONTEXT.try_with(|context| {
        context.origin.get_or_init(|| origin.clone());
    });
    if noted.is_err() {
        tracing::debug!("an origin outside of a request");
    }
}

/// Notes what the body was, for the fingerprint of a request that is idempotent or may be challenged.
pub(super) fn body_was(bytes: &[u8]) {
    let noted = CONTEXT.try_with(|context| {
        if context.idempotency_key.is_some() || context.sensitive.is_some() {
            context.body_digest.get_or_init(|| Sha256::digest(bytes).into());
        }
    });
    if noted.is_err() {
        tracing::debug!("a body outside of a request");
    }
}

/// Whether the request has an `Idempotency-Key`, well-formed or not.
pub(super) fn is_idempotent() -> bool {
    CONTEXT.try_with(|context| context.idempotency_key.is_some()).unwrap_or(false)
}

/// The request's `Idempotency-Key`, if it has one.
pub(super) fn idempotency() -> Option<Idempotency> {
    CONTEXT
        .try_with(|context| {
            let key = context.idempotency_key.clone()?;
            Some(Idempotency { key, fingerprint: context.fingerprint() })
        })
        .ok()
        .flatten()
}

/// What the request brings for a challenge; nothing outside of the portal's paths.
pub(crate) fn sensitive() -> Option<Sensitive> {
    CONTEXT
        .try_with(|context| {
            let (token, seen) = context.sensitive.clone()?;
            Some(Sensitive { token, digest: context.fingerprint(), seen })
        })
        .ok()
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn context(uri: &str) -> Arc<RequestContext> {
        let request = http::Request::post(uri).header("idempotency-key", "k").body(Body::empty()).unwrap();
        Arc::new(RequestContext::of(&request))
    }

    async fn fingerprint(uri: &str) -> [u8; 32] {
        context(uri).scope(async { idempotency().unwrap().fingerprint }).await
    }

    #[tokio::test]
    async fn a_retry_over_another_version_of_http_has_the_same_fingerprint() {
        let over_http_1 = fingerprint("/api/v1/devices?wait=active").await;
        assert_eq!(over_http_1, fingerprint("https://api.example.com/api/v1/devices?wait=active").await);
        assert_ne!(over_http_1, fingerprint("/api/v1/devices").await);
    }

    #[tokio::test]
    async fn a_request_arrives_when_its_head_does_and_not_when_it_is_asked() {
        let context = context("/");
        let arrived = Arc::clone(&context).scope(async { arrived() }).await;
        assert_eq!(arrived, context.arrived);
    }
}
