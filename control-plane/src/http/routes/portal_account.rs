//! `/api/v1/tenant/auth/{verify-email,password-reset,password}`, `/api/v1/tenant/sessions`, `/api/v1/tenant/step-up`: what
//! people do with their own account.

use axum::extract::State;
use axum::response::Response;
use cvault_types::portal::{
    ChallengeToken, ChangePasswordRequest, PasswordResetConfirm, PasswordResetRequest, PortalSessionList, StepUpAnswer,
    VerifyEmailRequest,
};
use cvault_types::{ChallengeId, ErrorCode, PortalSessionId};
use http::StatusCode;
use rand::SeedableRng;
use rand::rngs::StdRng;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::portal::Origin;
use super::portal_attempt::Attempt;
use super::portal_link::{self, Mailing};
use crate::app::App;
use crate::auth::email::Email;
use crate::auth::events::Outcome;
use crate::auth::passwords::{self, Party};
use crate::http::{Json, Path, Portal, Problem, idempotency};
use crate::portal::attempts::{self, AttemptKind};
use crate::portal::links;
use crate::portal::recovery;
use crate::portal::sessions;
use crate::step_up;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(verify_email))
        .routes(routes!(resend_verification))
        .routes(routes!(request_reset))
        .routes(routes!(confirm_reset))
        .routes(routes!(change_password))
        .routes(routes!(list_sessions, revoke_other_sessions))
        .routes(routes!(revoke_session))
        .routes(routes!(verify_step_up))
}

/// Verify an address with the token of a mailed link.
#[utoipa::path(post, path = "/api/v1/tenant/auth/verify-email", tag = "portal", request_body = VerifyEmailRequest,
    responses((status = 204),
        (status = 401, description = "INVALID_TOKEN: unknown, used, replaced or expired"),
        (status = 403, description = "ORIGIN_NOT_ALLOWED"),
        (status = 503, description = "DATABASE_UNAVAILABLE")))]
async fn verify_email(
    State(app): State<App>,
    origin: Origin,
    Json(body): Json<VerifyEmailRequest>,
) -> Result<StatusCode, Problem> {
    let tenant = portal_link::tenant_of(&app, &origin, &body.token).await?;
    if recovery::verify_email(&app, tenant, &body.token, origin.caller()).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(links::invalid())
}

/// Mail the link that verifies the caller's address once more; earlier ones stop working.
#[utoipa::path(post, path = "/api/v1/tenant/auth/verify-email/resend", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 202, description = "Nothing is mailed for an address that is verified."),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED"),
        (status = 503, description = "DATABASE_UNAVAILABLE, OVERLOADED")))]
async fn resend_verification(State(app): State<App>, portal: Portal) -> Result<Response, Problem> {
    if let Some(replay) = idempotency::earlier(&app, portal.tenant, portal.actor()).await? {
        return Ok(replay);
    }
    app.throttles.mail(attempts::account(&portal.actor()))?;
    idempotency::once(&app, portal.tenant, portal.actor(), StatusCode::ACCEPTED, async |tx| {
        Ok(recovery::resend_verification(tx, &app, &portal, &mut StdRng::from_os_rng()).await?)
    })
    .await
}

/// Mail a link to choose a new password. The answer is the same whether the address has an account or not.
#[utoipa::path(post, path = "/api/v1/tenant/auth/password-reset", tag = "portal", request_body = PasswordResetRequest,
    responses((status = 202),
        (status = 403, description = "ORIGIN_NOT_ALLOWED"),
        (status = 503, description = "DATABASE_UNAVAILABLE")))]
async fn request_reset(
    State(app): State<App>,
    origin: Origin,
    Json(body): Json<PasswordResetRequest>,
) -> Result<StatusCode, Problem> {
    let mailing = Mailing::of_this_request();
    let Some(email) = Email::parse(&body.email) else {
        return Err(Problem::validation().field("/email", "invalid_format", "must be an e-mail address"));
    };
    let attempt = Attempt::at(&app, AttemptKind::PasswordReset, &body.email, &origin.seen);
    let admitted = app.throttles.before_portal_login(origin.seen.ip);
    attempt.admitted(admitted.and_then(|()| app.throttles.mail(attempts::account(&body.email))))?;
    app.throttles.portal_login_failed(origin.seen.ip);
    attempt.note(Outcome::Success).await?;
    let sent = recovery::send_reset(&app, &email, origin.caller(), &mut StdRng::from_os_rng()).await;
    if let Err(error) = sent {
        // said of an account that exists only: so it is for the log
        tracing::warn!(error = crate::http::problem::chain(&error), "a reset link could not be mailed");
    }
    mailing.over().await;
    Ok(StatusCode::ACCEPTED)
}

/// Choose a new password with the token of a mailed link. Ends every session of the account.
#[utoipa::path(post, path = "/api/v1/tenant/auth/password-reset/confirm", tag = "portal", request_body = PasswordResetConfirm,
    responses((status = 204),
        (status = 401, description = "INVALID_TOKEN: unknown, used, replaced or expired"),
        (status = 403, description = "ORIGIN_NOT_ALLOWED")))]
async fn confirm_reset(
    State(app): State<App>,
    origin: Origin,
    Json(body): Json<PasswordResetConfirm>,
) -> Result<StatusCode, Problem> {
    passwords::checked(Problem::validation(), "/password", &body.password).or_ok(())?;
    let tenant = portal_link::tenant_of(&app, &origin, &body.token).await?;
    let hash = app.passwords.hash(Party::Tenant(tenant), body.password).await?;
    if recovery::reset_password(&app, tenant, &body.token, &hash, origin.caller()).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(portal_link::failed(&app, &origin))
}

/// Change the caller's password. Needs a step-up challenge, which asks for the old one; ends every other session.
#[utoipa::path(post, path = "/api/v1/tenant/auth/password", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("X-Challenge-Token" = Option<String>, Header, description = "Of an answered challenge, for exactly this request."),
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = ChangePasswordRequest,
    responses((status = 204),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED"),
        (status = 428, description = "CHALLENGE_REQUIRED")))]
async fn change_password(
    State(app): State<App>,
    portal: Portal,
    origin: Origin,
    Json(body): Json<ChangePasswordRequest>,
) -> Result<Response, Problem> {
    passwords::checked(Problem::validation(), "/password", &body.password).or_ok(())?;
    step_up::require(&app, &portal, "password.change").await?;
    let hash = app.passwords.hash(Party::Tenant(portal.tenant), body.password).await?;
    idempotency::once(&app, portal.tenant, portal.actor(), StatusCode::NO_CONTENT, async |tx| {
        Ok(recovery::change_password(tx, &app, &portal, &hash, origin.seen.ip).await?)
    })
    .await
}

/// The caller's own sessions, newest first.
#[utoipa::path(get, path = "/api/v1/tenant/sessions", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    responses((status = 200, body = PortalSessionList),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED"),
        (status = 503, description = "DATABASE_UNAVAILABLE")))]
async fn list_sessions(State(app): State<App>, portal: Portal) -> Result<Json<PortalSessionList>, Problem> {
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let data = sessions::list(&mut tx, portal.admin, portal.session, app.clock.now()).await?;
    tx.commit().await?;
    Ok(Json(PortalSessionList { data }))
}

/// End every session of the caller but this one.
#[utoipa::path(delete, path = "/api/v1/tenant/sessions", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("X-Challenge-Token" = Option<String>, Header, description = "Of an answered challenge, for exactly this request."),
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 204),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED"),
        (status = 428, description = "CHALLENGE_REQUIRED, when something looks odd: another network, program or pace"),
        (status = 503, description = "DATABASE_UNAVAILABLE")))]
async fn revoke_other_sessions(State(app): State<App>, portal: Portal) -> Result<Response, Problem> {
    step_up::if_risky(&app, &portal, "portal_session.revoke_others").await?;
    idempotency::once(&app, portal.tenant, portal.actor(), StatusCode::NO_CONTENT, async |tx| {
        Ok(recovery::revoke_others(tx, &app, &portal).await?)
    })
    .await
}

/// End one of the caller's own sessions. May be repeated.
#[utoipa::path(delete, path = "/api/v1/tenant/sessions/{session_id}", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("session_id" = PortalSessionId, Path),
        ("X-Challenge-Token" = Option<String>, Header, description = "Of an answered challenge, for exactly this request."),
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 204),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED"),
        (status = 404, description = "NOT_FOUND, also for another person's session"),
        (status = 428, description = "CHALLENGE_REQUIRED, when something looks odd: another network, program or pace"),
        (status = 503, description = "DATABASE_UNAVAILABLE")))]
async fn revoke_session(
    State(app): State<App>,
    portal: Portal,
    Path(session): Path<PortalSessionId>,
) -> Result<Response, Problem> {
    step_up::if_risky(&app, &portal, "portal_session.revoke").await?;
    idempotency::once(&app, portal.tenant, portal.actor(), StatusCode::NO_CONTENT, async |tx| {
        let found = recovery::revoke_session(tx, &app, &portal, session).await?;
        if found { Ok(()) } else { Err(Problem::new(ErrorCode::NotFound)) }
    })
    .await
}

/// Answer a challenge. The token is good once, for 60 s, for the request that was challenged; so many wrong answers in a
/// row end the session.
#[utoipa::path(post, path = "/api/v1/tenant/step-up/{challenge_id}/verify", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("challenge_id" = ChallengeId, Path)), request_body = StepUpAnswer,
    responses((status = 200, body = ChallengeToken),
        (status = 401, description = "INVALID_CREDENTIALS: the answer is wrong. INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED: the session is."),
        (status = 404, description = "NOT_FOUND: no open challenge of this session")))]
async fn verify_step_up(
    State(app): State<App>,
    portal: Portal,
    Path(challenge): Path<ChallengeId>,
    origin: Origin,
    Json(body): Json<StepUpAnswer>,
) -> Result<Json<ChallengeToken>, Problem> {
    Ok(Json(step_up::verify(&app, &portal, challenge, body, &origin.seen).await?))
}
