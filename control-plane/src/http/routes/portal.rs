//! `/api/v1/tenant/auth/*` and `/api/v1/tenant/me`: signing up, logging in and out of the portal.
//!
//! Who sends them is a browser or a program: a browser gets its session as a cookie and no tokens in the body, so that no
//! script of the page can read a credential.

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use cvault_types::portal::{
    PortalLogin, PortalLoginRequest, PortalMe, PortalRefreshRequest, SignupRequest, SignupResponse,
};
use cvault_types::tenant::TenantStatus;
use cvault_types::{ErrorCode, PortalSessionId, Secret, TenantAdminId, TenantId, TenantRole};
use http::header::SET_COOKIE;
use http::request::Parts;
use http::{HeaderValue, StatusCode};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::portal_attempt::Attempt;
use crate::app::App;
use crate::audit;
use crate::auth::email::Email;
use crate::auth::events::{AuthKind, Outcome};
use crate::auth::passwords::{self, Party};
use crate::auth::tokens::PortalToken;
use crate::db::DbError;
use crate::http::idempotency::{self, Claim};
use crate::http::{Json, Portal, Problem, browser, context};
use crate::portal::accounts::{self, Account, CreateError};
use crate::portal::attempts::{self, AttemptKind};
use crate::portal::recovery::Caller;
use crate::portal::sessions::{self, COOKIE_LIFETIME, End, How, NewSession, Seen, Taken};
use crate::portal::signup::{self, Form, SignedUp, SignupError};
use crate::tenancy::TenantTx;
use crate::tenants::{self, Settings};

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(sign_up))
        .routes(routes!(login))
        .routes(routes!(refresh))
        .routes(routes!(logout))
        .routes(routes!(me))
}

/// Create a tenant with its first API key, and the account of its owner. Self-service; the answer is the only one that
/// ever holds the API secret. An `Idempotency-Key` is not looked at: a repetition answers EMAIL_TAKEN; log in instead.
#[utoipa::path(post, path = "/api/v1/tenant/auth/signup", tag = "portal", request_body = SignupRequest,
    responses((status = 201, body = SignupResponse, headers(("Set-Cookie" = Option<String>, description = "For browsers: the session."))),
        (status = 403, description = "ORIGIN_NOT_ALLOWED"),
        (status = 409, description = "EMAIL_TAKEN")))]
async fn sign_up(State(app): State<App>, origin: Origin, Json(body): Json<SignupRequest>) -> Result<Response, Problem> {
    let (settings, email) = checked(&body)?;
    let attempt = Attempt::at(&app, AttemptKind::Signup, &body.email, &origin.seen);
    attempt.admitted(app.throttles.before_signup(origin.seen.ip))?;
    let made = make_account(&app, (settings, email), body.password, &origin).await;
    let made = match made {
        Ok(made) => made,
        Err(problem) => {
            app.throttles.not_signed_up(origin.seen.ip);
            if problem.code() != ErrorCode::EmailTaken {
                return Err(problem);
            }
            app.throttles.portal_login_failed(origin.seen.ip);
            return attempt.refused(problem).await;
        }
    };
    let (login, cookie) = login_answer(made.tenant.id, made.admin, TenantRole::Owner, made.session);
    let answer = SignupResponse { login, tenant: made.tenant, api_key: made.key.key, api_secret: made.key.secret };
    Ok(with_cookie((StatusCode::CREATED, Json(answer)).into_response(), cookie))
}

async fn make_account(
    app: &App,
    (settings, email): (Settings, Email),
    password: Secret,
    origin: &Origin,
) -> Result<SignedUp, Problem> {
    if accounts::find(&app.db.sys, &email).await?.is_some() {
        return Err(email_taken());
    }
    let password_hash = app.passwords.hash(Party::Portal, password).await?;
    let form = Form { settings, email, password_hash };
    Ok(signup::sign_up(app, form, origin.how(), &origin.seen, &mut StdRng::from_os_rng()).await?)
}

/// Log in. A retry begins another session; an `Idempotency-Key` is not looked at.
#[utoipa::path(post, path = "/api/v1/tenant/auth/login", tag = "portal", request_body = PortalLoginRequest,
    responses((status = 200, body = PortalLogin, headers(("Set-Cookie" = Option<String>, description = "For browsers: the session."))),
        (status = 401, description = "INVALID_CREDENTIALS: unknown address or wrong password, one answer for both"),
        (status = 403, description = "ORIGIN_NOT_ALLOWED")))]
async fn login(
    State(app): State<App>,
    origin: Origin,
    Json(body): Json<PortalLoginRequest>,
) -> Result<Response, Problem> {
    let attempt = Attempt::at(&app, AttemptKind::Login, &body.email, &origin.seen);
    let account = attempts::account(&body.email);
    let admitted = app.throttles.before_portal_login(origin.seen.ip).and_then(|()| app.throttles.guess(account));
    attempt.admitted(admitted)?;
    let checked = check_password(&app, body).await;
    if !matches!(checked, Ok(Checked { right: false, .. })) {
        app.throttles.no_guess(account);
    }
    let Checked { tenant, account, right, rehashed } = checked?;
    let (Some(account), true) = (account, right) else {
        app.throttles.portal_login_failed(origin.seen.ip);
        return attempt.refused(Problem::new(ErrorCode::InvalidCredentials)).await;
    };
    let mut tx = app.db.tenancy.begin(tenant).await?;
    if !accounts::still_is(&mut tx, &account).await? {
        tx.rollback().await?;
        return attempt.refused(Problem::new(ErrorCode::InvalidCredentials)).await;
    }
    if let (Some(old), Some(new)) = (&account.password_hash, &rehashed) {
        accounts::replace_hash(&mut tx, account.id, old, new).await?;
    }
    let rng = &mut StdRng::from_os_rng();
    let session = sessions::open(&mut tx, &app, account.id, origin.how(), &origin.seen, rng).await?;
    attempt.record(&mut tx, AuthKind::PortalLogin, Outcome::Success, Some(account.id)).await?;
    note(&mut tx, account.id, "portal_session.create", session.id()).await?;
    tx.commit().await?;
    let (answer, cookie) = login_answer(tenant, account.id, account.role, session);
    Ok(with_cookie(Json(answer).into_response(), cookie))
}

/// Whose password it was, and whether it was right. A disabled account is nobody's.
struct Checked {
    tenant: TenantId,
    account: Option<Account>,
    right: bool,
    /// The hash that the configuration wants in the place of the stored one.
    rehashed: Option<String>,
}

/// The same steps for an address nobody has: its tenant is one that does not exist.
async fn check_password(app: &App, body: PortalLoginRequest) -> Result<Checked, Problem> {
    let owner = match Email::parse(&body.email) {
        Some(email) => accounts::find(&app.db.sys, &email).await?,
        None => None,
    };
    let nobody = (TenantId::from_uuid(Uuid::nil()), TenantAdminId::from_uuid(Uuid::nil()));
    let (tenant, admin) = owner.map_or(nobody, |owner| (owner.tenant, owner.admin));
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let account = accounts::load(&mut tx, admin).await?.filter(|account| account.active);
    tx.commit().await?;
    let hash = account.as_ref().and_then(|account| account.password_hash.clone());
    // no transaction is open while this takes its fifth of a second
    let verified = app.passwords.verify_login(Party::Portal, body.password, hash).await?;
    Ok(Checked { tenant, account, right: verified.right, rehashed: verified.rehashed })
}

/// Exchange a refresh token for the next pair; each works once, and a second use ends the session. A browser sends `{}`:
/// its cookie lasts longer with each use by itself, and this tells whose session it is. Programs: send an `Idempotency-Key`, so
/// that a lost answer can be asked for again.
#[utoipa::path(post, path = "/api/v1/tenant/auth/refresh", tag = "portal", request_body = PortalRefreshRequest,
    security((), ("portal_cookie" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 200, body = PortalLogin),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, TOKEN_REUSED, SESSION_TERMINATED (with `X-Session-Terminated: true`)"),
        (status = 503, description = "DATABASE_UNAVAILABLE")))]
async fn refresh(
    State(app): State<App>,
    origin: Origin,
    Json(body): Json<PortalRefreshRequest>,
) -> Result<Response, Problem> {
    let Some(token) = body.refresh_token else {
        // there is nothing to keep, but a malformed key is one here too
        idempotency::wanted(&app.secrets)?;
        let found = Portal::find(&origin.parts, &app).await?;
        let PortalToken { tenant, admin, session } = found.token;
        let session_id = PortalSessionId::from_uuid(session);
        return Ok(Json(PortalLogin {
            admin_id: admin,
            tenant_id: tenant,
            role: found.role,
            session_id,
            tokens: None,
        })
        .into_response());
    };
    app.throttles.before_credentials(origin.seen.ip)?;
    let Some(tenant) = sessions::tenant_of(&app, &token).await? else {
        app.throttles.credentials_failed(origin.seen.ip);
        return Err(Problem::new(ErrorCode::InvalidToken));
    };
    exchange(&app, tenant, &token, &origin).await
}

async fn exchange(app: &App, tenant: TenantId, token: &Secret, origin: &Origin) -> Result<Response, Problem> {
    let attempt = Attempt::at(app, AttemptKind::Login, "", &origin.seen);
    let mut tx = app.db.tenancy.begin(tenant).await?;
    // nobody knows yet who calls: a retry is known by the token
    let principal = format!("portal_refresh:{}", hex::encode(app.secrets.peppered("principal", token.expose())));
    let place = match idempotency::claim(&mut tx, app, principal).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => {
            tx.commit().await?;
            return Ok(replay.into_response());
        }
    };
    let (who, outcome, code) = match sessions::take(&mut tx, &app.secrets, token, app.clock.now()).await? {
        Taken::Valid(who) => {
            let tokens = sessions::issue(&mut tx, app, who, &mut StdRng::from_os_rng()).await?;
            let account = accounts::load(&mut tx, who.admin).await?;
            let account = account.ok_or_else(|| Problem::new(ErrorCode::SessionTerminated))?;
            attempt.record(&mut tx, AuthKind::PortalRefresh, Outcome::Success, Some(who.admin)).await?;
            let answer = PortalLogin {
                admin_id: who.admin,
                tenant_id: tenant,
                role: account.role,
                session_id: PortalSessionId::from_uuid(who.session),
                tokens: Some(tokens),
            };
            idempotency::keep(&mut tx, &app.keys, place, StatusCode::OK, &answer).await?;
            tx.commit().await?;
            return Ok(Json(answer).into_response());
        }
        Taken::Reused(who) => (Some(who.admin), Outcome::Reuse, ErrorCode::TokenReused),
        Taken::Expired(who) => (Some(who.admin), Outcome::Failure, ErrorCode::TokenExpired),
        Taken::Ended(who) => (Some(who.admin), Outcome::Failure, ErrorCode::SessionTerminated),
        Taken::Unknown => (None, Outcome::Failure, ErrorCode::InvalidToken),
    };
    attempt.record(&mut tx, AuthKind::PortalRefresh, outcome, who).await?;
    idempotency::give_back(&mut tx, place).await?;
    // the end of the session has to last
    tx.commit().await?;
    let problem = Problem::new(code);
    let expired = code == ErrorCode::TokenExpired;
    Err(if expired { problem.detail("The refresh token has expired. Log in again.") } else { problem })
}

/// End the session. Also that of a suspended tenant.
#[utoipa::path(post, path = "/api/v1/tenant/auth/logout", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    responses((status = 204),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED"),
        (status = 503, description = "DATABASE_UNAVAILABLE")))]
async fn logout(State(app): State<App>, origin: Origin) -> Result<Response, Problem> {
    let PortalToken { tenant, admin, session } = Portal::find(&origin.parts, &app).await?.token;
    let attempt = Attempt::at(&app, AttemptKind::Login, "", &origin.seen);
    let mut tx = app.db.tenancy.begin(tenant).await?;
    sessions::end(&mut tx, session, End::Logout, app.clock.now()).await?;
    attempt.record(&mut tx, AuthKind::PortalLogout, Outcome::Success, Some(admin)).await?;
    note(&mut tx, admin, "portal_session.end", session).await?;
    tx.commit().await?;
    let expired = Some(HeaderValue::from_static(browser::EXPIRED_COOKIE));
    Ok(with_cookie(StatusCode::NO_CONTENT.into_response(), expired))
}

/// Who is logged in, and to which tenant.
#[utoipa::path(get, path = "/api/v1/tenant/me", tag = "portal", security(("portal_cookie" = []), ("portal" = [])),
    responses((status = 200, body = PortalMe),
        (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, SESSION_TERMINATED"),
        (status = 503, description = "DATABASE_UNAVAILABLE")))]
async fn me(State(app): State<App>, origin: Origin) -> Result<Json<PortalMe>, Problem> {
    let found = Portal::find(&origin.parts, &app).await?;
    let PortalToken { tenant, admin, session } = found.token;
    let gone = || Problem::new(ErrorCode::SessionTerminated);
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let account = accounts::load(&mut tx, admin).await?.ok_or_else(gone)?;
    tx.commit().await?;
    let tenant = tenants::get(&app, tenant).await?;
    Ok(Json(PortalMe {
        admin_id: admin,
        email: account.email,
        email_verified: account.email_verified,
        role: account.role,
        tenant_id: tenant.id,
        tenant_name: tenant.name,
        tenant_status: tenant.status,
        session_id: PortalSessionId::from_uuid(session),
        session_expires_at: found.expires_at,
    }))
}

/// A request without a session yet: where it comes from. A browser's must come from a page of ours, so that no other page
/// logs somebody in to an account that is not theirs.
pub(super) struct Origin {
    pub(super) seen: Seen,
    parts: Parts,
}

impl Origin {
    pub(super) fn caller(&self) -> Caller {
        Caller { ip: self.seen.ip, request_id: context::request_id() }
    }

    fn how(&self) -> How {
        if browser::is_browser(&self.parts.headers) { How::Cookie } else { How::Tokens }
    }
}

impl axum::extract::FromRequestParts<App> for Origin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        if browser::is_browser(&parts.headers) {
            browser::same_origin(&parts.method, &parts.headers, &app.config.public_url)?;
        }
        let parts = parts.clone();
        let seen = Seen::of(&Request::from_parts(parts.clone(), ()));
        Ok(Self { seen, parts })
    }
}

fn login_answer(
    tenant_id: TenantId,
    admin_id: TenantAdminId,
    role: TenantRole,
    session: NewSession,
) -> (PortalLogin, Option<HeaderValue>) {
    let session_id = PortalSessionId::from_uuid(session.id());
    let (tokens, cookie) = match session {
        NewSession::Cookie { value, .. } => (None, Some(browser::set_cookie(&value, COOKIE_LIFETIME.whole_seconds()))),
        NewSession::Tokens { tokens, .. } => (Some(tokens), None),
    };
    (PortalLogin { admin_id, tenant_id, role, session_id, tokens }, cookie)
}

fn with_cookie(mut response: Response, cookie: Option<HeaderValue>) -> Response {
    if let Some(cookie) = cookie {
        response.headers_mut().insert(SET_COOKIE, cookie);
    }
    response
}

async fn note(tx: &mut TenantTx, admin: TenantAdminId, action: &'static str, session: Uuid) -> Result<(), DbError> {
    let (actor, target) = (admin.to_string(), PortalSessionId::from_uuid(session).to_string());
    let request_id = Some(context::request_id());
    audit::record(tx, audit::Entry { actor: &actor, action, target: &target, details: json!({}), request_id }).await
}

fn checked(body: &SignupRequest) -> Result<(Settings, Email), Problem> {
    let email = Email::parse(&body.email);
    let mut problem = Problem::validation();
    if email.is_none() {
        problem = problem.field("/email", "invalid_format", "must be an e-mail address");
    }
    problem = passwords::checked(problem, "/password", &body.password);
    let settings = Settings { status: TenantStatus::Trial, ..Settings::named(&body.business_name) };
    if settings.clone().checked().is_err() {
        problem = problem.field("/business_name", "invalid_format", tenants::NAME_RULE);
    }
    match email {
        Some(email) => problem.or_ok((settings, email)),
        None => Err(problem),
    }
}

fn email_taken() -> Problem {
    Problem::new(ErrorCode::EmailTaken)
        .detail("There is an account with this e-mail address. Log in, or reset its password.")
}

impl From<SignupError> for Problem {
    fn from(error: SignupError) -> Self {
        match error {
            SignupError::Account(CreateError::EmailTaken) => email_taken(),
            SignupError::Account(CreateError::Db(error)) | SignupError::Db(error) => error.into(),
            SignupError::Tenant(error) => error.into(),
            SignupError::Mail(error) => error.into(),
        }
    }
}
