//! Step-up: before a sensitive request has any effect, whoever sends it shows once more who they are.
//!
//! `428 CHALLENGE_REQUIRED` carries a challenge; answering it (with the password; other methods are further variants of
//! [`StepUpAnswer`]) gives a token that is good once, for a minute, for this session and exactly this request. In front
//! stands [`risk`], which may ask where nothing was asked, or end the session.

mod challenges;
pub mod risk;
mod staff;

use cvault_types::ErrorCode;
use serde_json::json;
use time::Duration;

use crate::app::App;
use crate::audit;
use crate::auth::events::{self, AdminEvent, AuthKind, Outcome};
use crate::db::DbError;
use crate::http::context::{self, Sensitive};
use crate::http::{Portal, Problem};
use crate::metrics;
use crate::portal::accounts::Owner;
use crate::portal::{attempts, sessions};
use crate::tenancy::TenantTx;
use risk::{Signals, Verdict};

pub use challenges::{VerifyError, verify};
#[cfg(doc)]
use cvault_types::portal::StepUpAnswer;
pub use staff::{Approval, StaffWatch};

/// How far back failed logins count.
const LOGIN_FAILURES_WITHIN: Duration = Duration::minutes(15);
/// What sensitive requests are counted in.
const RATE_WINDOW: Duration = Duration::minutes(1);

/// In front of an action that always needs a challenge. Call it before anything else happens, outside of any transaction;
/// `action` is `noun.verb`, as in the audit log.
///
/// # Errors
/// `CHALLENGE_REQUIRED` with the challenge, `SESSION_TERMINATED`, or the database's.
pub async fn require(app: &App, portal: &Portal, action: &'static str) -> Result<(), Problem> {
    guard(app, portal, action, Verdict::Challenge).await
}

/// In front of an action that needs a challenge only when something looks odd.
///
/// # Errors
/// As [`require`].
pub async fn if_risky(app: &App, portal: &Portal, action: &'static str) -> Result<(), Problem> {
    guard(app, portal, action, Verdict::Allow).await
}

async fn guard(app: &App, portal: &Portal, action: &'static str, at_least: Verdict) -> Result<(), Problem> {
    let request = context::sensitive().ok_or_else(|| Problem::new(ErrorCode::InternalError))?;
    let since = app.clock.now() - LOGIN_FAILURES_WITHIN;
    let who = Owner { tenant: portal.tenant, admin: portal.admin };
    let login_failures = attempts::recent_failures(&app.db.sys, who, since).await?;
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let Some(signals) = signals(&mut tx, app, portal, &request, login_failures).await? else {
        tx.rollback().await?;
        return Err(Problem::new(ErrorCode::SessionTerminated));
    };
    let verdict = risk::judge(signals).max(at_least);
    metrics::portal_verdict(verdict.as_str());
    let answer = match verdict {
        Verdict::Allow => Ok(()),
        Verdict::Challenge => challenge(&mut tx, app, portal, action, request).await?,
        Verdict::Block => {
            tracing::warn!(tenant = %portal.tenant, session = %portal.session_id(), action, ?signals, "a portal session was ended");
            block(&mut tx, app, portal, &request, action).await?;
            Err(Problem::new(ErrorCode::SessionTerminated)
                .detail("This session looked stolen and was ended. Log in again."))
        }
    };
    tx.commit().await?;
    answer
}

/// A token of an answered challenge lets the request through; without one it gets a new challenge.
async fn challenge(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    action: &'static str,
    request: Sensitive,
) -> Result<Result<(), Problem>, DbError> {
    if let Some(token) = &request.token
        && challenges::take(tx, app, portal, action, token, &request.digest).await?
    {
        return Ok(Ok(()));
    }
    let challenge = challenges::create(tx, app, portal, action, &request.digest).await?;
    let problem = Problem::new(ErrorCode::ChallengeRequired).challenge(challenge);
    Ok(Err(if request.token.is_some() {
        problem.detail(
            "The challenge token is used up, expired, or of another session or request. Here is a new challenge.",
        )
    } else {
        problem
    }))
}

/// Counts the request. `None`: the session has ended meanwhile.
async fn signals(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    request: &Sensitive,
    recent_login_failures: u32,
) -> Result<Option<Signals>, DbError> {
    let now = app.clock.now();
    let row = sqlx::query!(
        r#"update cvault.portal_sessions s
           set sensitive_requests = case when s.counted_from <= $3 then 1 else s.sensitive_requests + 1 end,
               counted_from = case when s.counted_from <= $3 then $4 else s.counted_from end
           where s.tenant_id = $1 and s.session_id = $2 and s.ended_at is null
           returning s.sensitive_requests, s.challenge_failures, s.user_agent,
               $5::inet is null or exists (select from cvault.portal_networks n where n.tenant_id = $1
                   and n.admin_id = s.admin_id and n.network = $5) as "network_known!""#,
        portal.tenant.uuid(),
        portal.session,
        now - RATE_WINDOW,
        now,
        request.seen.network()
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(|row| Signals {
        network_known: row.network_known,
        same_user_agent: row.user_agent == request.seen.user_agent,
        requests_per_minute: u32::try_from(row.sensitive_requests).unwrap_or(u32::MAX),
        challenge_failures: u32::try_from(row.challenge_failures).unwrap_or(u32::MAX),
        recent_login_failures,
    }))
}

async fn block(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    request: &Sensitive,
    action: &'static str,
) -> Result<(), DbError> {
    sessions::end(tx, portal.session, sessions::End::Risk, app.clock.now()).await?;
    events::record_admin(
        tx,
        AdminEvent {
            kind: AuthKind::PortalRisk,
            outcome: Outcome::Failure,
            admin: Some(portal.admin),
            client_ip: request.seen.ip,
            request_id: portal.request_id,
        },
    )
    .await?;
    let target = portal.session_id().to_string();
    let details = json!({"action": action, "admin": portal.admin});
    let request_id = Some(portal.request_id);
    audit::record(
        tx,
        audit::Entry { actor: "system", action: "portal_session.terminate", target: &target, details, request_id },
    )
    .await
}
