//! What the routes of mailed links share: an answer that takes as long whether somebody was written to or not, and links that
//! cannot be tried out.

use cvault_types::{Secret, TenantId};
use tokio::time::{Duration, Instant, sleep_until};

use super::portal::Origin;
use crate::app::App;
use crate::http::{Problem, context};
use crate::portal::links;

/// Longer than the database takes to write a mail down: the answer comes no sooner when there is nobody to write to.
const MAILING_TAKES: Duration = Duration::from_millis(400);

/// When the answer may come that somebody was written to, if there is anybody.
pub(super) struct Mailing {
    answer_at: Instant,
}

impl Mailing {
    /// Counted from the request's arrival, whatever was done since.
    pub(super) fn of_this_request() -> Self {
        Self { answer_at: context::arrived() + MAILING_TAKES }
    }

    pub(super) async fn over(self) {
        sleep_until(self.answer_at).await;
    }
}

/// The tenant of a mailed link. Unknown ones count against the network they come from.
pub(super) async fn tenant_of(app: &App, origin: &Origin, token: &Secret) -> Result<TenantId, Problem> {
    app.throttles.before_credentials(origin.seen.ip)?;
    let tenant = links::tenant_of(app, token).await?;
    tenant.ok_or_else(|| failed(app, origin))
}

/// Counts a link that is good for nothing, and answers it.
pub(super) fn failed(app: &App, origin: &Origin) -> Problem {
    app.throttles.credentials_failed(origin.seen.ip);
    links::invalid()
}
