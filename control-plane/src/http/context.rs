//! What is known about the request being served, for the log line, the metrics and the error body.

use std::sync::{Arc, OnceLock};

use cvault_types::{RequestId, TenantId};
use uuid::Uuid;

use super::limit::Decision;

tokio::task_local! {
    /// Set for the whole task of a request.
    static CONTEXT: Arc<RequestContext>;
}

/// Filled in as the request is understood; each field at most once.
#[derive(Debug)]
pub struct RequestContext {
    pub id: RequestId,
    pub tenant: OnceLock<TenantId>,
    pub rate: OnceLock<Decision>,
}

impl RequestContext {
    #[must_use]
    pub fn new() -> Self {
        Self { id: RequestId::from_uuid(Uuid::now_v7()), tenant: OnceLock::new(), rate: OnceLock::new() }
    }

    /// Runs `work` as the work of this request.
    pub async fn scope<F: Future>(self: Arc<Self>, work: F) -> F::Output {
        CONTEXT.scope(self, work).await
    }
}

impl Default for RequestContext {
    fn default() -> Self {
        Self::new()
    }
}

/// The id of the request this task serves; a fresh one outside of any request.
#[must_use]
pub fn request_id() -> RequestId {
    CONTEXT.try_with(|context| context.id).unwrap_or_else(|_| RequestId::from_uuid(Uuid::now_v7()))
}

/// Notes who the caller's tenant is and what the limiter said.
pub(crate) fn identified(tenant: TenantId, decision: Decision) {
    let noted = CONTEXT.try_with(|context| {
        context.tenant.get_or_init(|| tenant);
        context.rate.get_or_init(|| decision);
    });
    if noted.is_err() {
        tracing::debug!("identified outside of a request");
    }
}
