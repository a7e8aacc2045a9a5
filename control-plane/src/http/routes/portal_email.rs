//! `/api/v1/tenant/auth/email`: another address for the caller's own account.

use axum::extract::State;
use axum::response::Response;
use cvault_types::portal::{ChangeEmailConfirm, ChangeEmailRequest};
use http::StatusCode;
use rand::SeedableRng;
use rand::rngs::StdRng;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::portal::Origin;
use super::portal_link::{self, Mailing};
use crate::app::App;
use crate::auth::email::Email;
use crate::http::{Json, Portal, Problem, idempotency};
use crate::portal::{accounts, attempts, email};
use crate::step_up;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(change_email)).routes(routes!(confirm_email))
}

/// Ask for another address. Needs a step-up challenge. The link that confirms it is mailed there, unless somebody has an
/// account with it: the answer is the same. The present address is told, and stays until the link is opened.
#[utoipa::path(post, path = "/api/v1/tenant/auth/email", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    params(("X-Challenge-Token" = Option<String>, Header, description = "Of an answered challenge, for exactly this request."),
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = ChangeEmailRequest,
    responses((status = 202),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED"),
        (status = 428, description = "CHALLENGE_REQUIRED"),
        (status = 503, description = "DATABASE_UNAVAILABLE, OVERLOADED")))]
async fn change_email(
    State(app): State<App>,
    portal: Portal,
    Json(body): Json<ChangeEmailRequest>,
) -> Result<Response, Problem> {
    let mailing = Mailing::of_this_request();
    let Some(wanted) = Email::parse(&body.email) else {
        return Err(Problem::validation().field("/email", "invalid_format", "must be an e-mail address"));
    };
    step_up::require(&app, &portal, "email.change").await?;
    if let Some(replay) = idempotency::earlier(&app, portal.tenant, portal.actor()).await? {
        return Ok(replay);
    }
    app.throttles.mail(attempts::account(&portal.actor()))?;
    app.throttles.mail(attempts::account(wanted.as_str()))?;
    let somebodys = accounts::find(&app.db.sys, &wanted).await?;
    let answer = idempotency::once(&app, portal.tenant, portal.actor(), StatusCode::ACCEPTED, async |tx| {
        Ok(email::ask(tx, &app, &portal, &wanted, somebodys, &mut StdRng::from_os_rng()).await?)
    })
    .await?;
    mailing.over().await;
    Ok(answer)
}

/// Change the address with the token of the mailed link. Ends every session but the one that asked.
#[utoipa::path(post, path = "/api/v1/tenant/auth/email/confirm", tag = "portal", request_body = ChangeEmailConfirm,
    responses((status = 204),
        (status = 401, description = "INVALID_TOKEN: unknown, used, replaced or expired"),
        (status = 403, description = "ORIGIN_NOT_ALLOWED"),
        (status = 409, description = "EMAIL_TAKEN: meanwhile")))]
async fn confirm_email(
    State(app): State<App>,
    origin: Origin,
    Json(body): Json<ChangeEmailConfirm>,
) -> Result<StatusCode, Problem> {
    let tenant = portal_link::tenant_of(&app, &origin, &body.token).await?;
    email::confirm(&app, tenant, &body.token, origin.caller()).await?;
    Ok(StatusCode::NO_CONTENT)
}
