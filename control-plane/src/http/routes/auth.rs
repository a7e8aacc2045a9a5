//! `/api/v1/auth/*`: register, login, refresh and logout of a tenant's users, called by the tenant's backend, or by
//! programs without a secret if the tenant has such.

use std::net::IpAddr;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use cvault_types::auth::{LoginRequest, RefreshRequest, RegisterRequest, TokenResponse};
use cvault_types::{ErrorCode, Secret, TenantId, UserId};
use http::StatusCode;
use rand::SeedableRng;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::auth::api_keys::Proof;
use crate::auth::email::Email;
use crate::auth::events::{self, AuthEvent, AuthKind, Outcome};
use crate::auth::passwords::{self, Party, PasswordError};
use crate::auth::refresh::{self, Family, Taken};
use crate::auth::throttle::Account;
use crate::auth::tokens::{self, ClientToken};
use crate::db::DbError;
use crate::http::idempotency::{self, Claim};
use crate::http::serve::Peer;
use crate::http::{ClientKey, Json, Problem};
use crate::tenancy::TenantTx;
use crate::users::{self, RegisterError};

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(register))
        .routes(routes!(login))
        .routes(routes!(refresh_tokens))
        .routes(routes!(logout))
}

/// Register a user.
#[utoipa::path(post, path = "/api/v1/auth/register", tag = "auth", security(("api_key" = [], "api_secret" = []), ("api_key" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = RegisterRequest,
    responses((status = 201, body = TokenResponse), (status = 403, description = "USER_LIMIT_EXCEEDED"),
              (status = 409, description = "EMAIL_TAKEN")))]
async fn register(
    State(app): State<App>,
    key: ClientKey,
    peer: Peer,
    Json(body): Json<RegisterRequest>,
) -> Result<Response, Problem> {
    let (email, password) = checked(&body)?;
    let event = Attempt { kind: AuthKind::Register, key, client_ip: peer.ip() };
    let admitted = match key.proof {
        Proof::Secret => Ok(()),
        Proof::KeyAlone => app.throttles.public_registration(key.tenant, peer.ip()),
    };
    let admitted = admitted.and_then(|()| app.throttles.before_login(key.tenant, peer.ip()));
    event.admitted(&app, admitted).await?;
    let principal = key.principal(&Account::of(key.tenant, email.as_str()).bytes());
    if let Some(replay) = before_hashing(&app, event, &principal, &email).await? {
        return Ok(replay);
    }
    let hash = app.passwords.hash(Party::Tenant(key.tenant), password).await?;
    let mut tx = app.db.tenancy.begin(key.tenant).await?;
    let place = match idempotency::claim(&mut tx, &app, principal).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => {
            tx.commit().await?;
            return Ok(replay.into_response());
        }
    };
    match users::register(&mut tx, &email, &hash, app.clock.now()).await {
        Ok(user) => {
            events::record(&mut tx, event.row(Outcome::Success, Some(user))).await?;
            let answer = open_session(&app, &mut tx, Family::begin(user)).await?;
            idempotency::keep(&mut tx, &app.keys, place, StatusCode::CREATED, &answer).await?;
            tx.commit().await?;
            Ok((StatusCode::CREATED, Json(answer)).into_response())
        }
        Err(error) => {
            tx.rollback().await?;
            app.throttles.login_failed(key.tenant, peer.ip());
            event.note(&app, Outcome::Failure, None).await?;
            Err(error.into())
        }
    }
}

/// What can be answered without the costly hash: a replay, or an address that is taken. Both are asked again later,
/// under the lock.
async fn before_hashing(
    app: &App,
    event: Attempt,
    principal: &str,
    email: &Email,
) -> Result<Option<Response>, Problem> {
    let mut tx = app.db.tenancy.begin(event.key.tenant).await?;
    let claim = idempotency::claim(&mut tx, app, principal.to_owned()).await?;
    let taken = users::email_exists(&mut tx, email).await?;
    // the claim is given back: hashing takes a fifth of a second, and no transaction waits for it
    tx.rollback().await?;
    if let Claim::Replay(replay) = claim {
        return Ok(Some(replay.into_response()));
    }
    if taken {
        app.throttles.login_failed(event.key.tenant, event.client_ip);
        event.note(app, Outcome::Failure, None).await?;
        return Err(email_taken());
    }
    Ok(None)
}

/// Log a user in. A retry without an `Idempotency-Key` begins another login.
#[utoipa::path(post, path = "/api/v1/auth/login", tag = "auth", security(("api_key" = [], "api_secret" = []), ("api_key" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = LoginRequest,
    responses((status = 200, body = TokenResponse), (status = 401, description = "INVALID_CREDENTIALS: unknown user or wrong password, one answer for both")))]
async fn login(
    State(app): State<App>,
    key: ClientKey,
    peer: Peer,
    Json(body): Json<LoginRequest>,
) -> Result<Response, Problem> {
    let event = Attempt { kind: AuthKind::Login, key, client_ip: peer.ip() };
    let account = Account::of(key.tenant, &body.email);
    event.admitted(&app, app.throttles.before_login(key.tenant, peer.ip())).await?;
    // also before a kept answer is looked for: it tells whether a password is the one that was sent with the key
    event.admitted(&app, app.throttles.guess(account)).await?;
    let principal = key.principal(&account.bytes());
    if let Some(replay) = idempotency::earlier(&app, key.tenant, principal.clone()).await? {
        app.throttles.no_guess(account);
        return Ok(replay);
    }
    let checked = check_password(&app, key.tenant, body).await;
    if !matches!(checked, Ok(Checked { right: false, .. })) {
        app.throttles.no_guess(account);
    }
    let Checked { user, right, rehashed } = checked?;
    let (Some(user), true) = (user, right) else {
        app.throttles.login_failed(key.tenant, peer.ip());
        event.note(&app, Outcome::Failure, user).await?;
        return Err(Problem::new(ErrorCode::InvalidCredentials));
    };
    let mut tx = app.db.tenancy.begin(key.tenant).await?;
    if let Some(Rehashed { old, new }) = rehashed {
        users::replace_hash(&mut tx, user, &old, &new).await?;
    }
    // again: its password has taken a while
    if !users::hold_active(&mut tx, user).await? {
        tx.rollback().await?;
        event.note(&app, Outcome::Failure, Some(user)).await?;
        return Err(Problem::new(ErrorCode::InvalidCredentials));
    }
    let place = match idempotency::claim(&mut tx, &app, principal).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => {
            tx.commit().await?;
            return Ok(replay.into_response());
        }
    };
    events::record(&mut tx, event.row(Outcome::Success, Some(user))).await?;
    let answer = open_session(&app, &mut tx, Family::begin(user)).await?;
    idempotency::keep(&mut tx, &app.keys, place, StatusCode::OK, &answer).await?;
    tx.commit().await?;
    Ok(Json(answer).into_response())
}

/// Whose password it was, and whether it was right. A disabled user is nobody.
struct Checked {
    user: Option<UserId>,
    right: bool,
    rehashed: Option<Rehashed>,
}

/// The stored hash, and the one that the configuration wants in its place.
struct Rehashed {
    old: String,
    new: String,
}

async fn check_password(app: &App, tenant: TenantId, body: LoginRequest) -> Result<Checked, Problem> {
    let found = match Email::parse(&body.email) {
        Some(email) => {
            let mut tx = app.db.tenancy.begin(tenant).await?;
            let found = users::find_login(&mut tx, &email).await?;
            tx.commit().await?;
            found
        }
        None => None,
    };
    let (user, hash) = found.map_or((None, None), |login| (login.active.then_some(login.user), login.password_hash));
    // no transaction is open while this takes its fifth of a second
    let verified = app.passwords.verify_login(Party::Tenant(tenant), body.password, hash.clone()).await?;
    let rehashed = hash.zip(verified.rehashed).map(|(old, new)| Rehashed { old, new });
    Ok(Checked { user, right: verified.right, rehashed })
}

/// Exchange a refresh token for a new pair. Each refresh token works once: send an `Idempotency-Key`, so that a lost
/// answer can be asked for again.
#[utoipa::path(post, path = "/api/v1/auth/refresh", tag = "auth", security(("api_key" = [], "api_secret" = []), ("api_key" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = RefreshRequest,
    responses((status = 200, body = TokenResponse), (status = 401, description = "INVALID_TOKEN, TOKEN_EXPIRED, TOKEN_REUSED")))]
async fn refresh_tokens(
    State(app): State<App>,
    key: ClientKey,
    peer: Peer,
    Json(body): Json<RefreshRequest>,
) -> Result<Response, Problem> {
    let event = Attempt { kind: AuthKind::Refresh, key, client_ip: peer.ip() };
    let principal = key.principal(body.refresh_token.expose().as_bytes());
    let mut tx = app.db.tenancy.begin(key.tenant).await?;
    let place = match idempotency::claim(&mut tx, &app, principal).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => {
            tx.commit().await?;
            return Ok(replay.into_response());
        }
    };
    let taken = refresh::take(&mut tx, &app.secrets, &body.refresh_token, app.clock.now()).await?;
    let (family, outcome, code) = match taken {
        Taken::Valid(family) if users::is_active(&mut tx, family.user).await? => {
            events::record(&mut tx, event.row(Outcome::Success, Some(family.user))).await?;
            let answer = open_session(&app, &mut tx, family).await?;
            idempotency::keep(&mut tx, &app.keys, place, StatusCode::OK, &answer).await?;
            tx.commit().await?;
            return Ok(Json(answer).into_response());
        }
        Taken::Reused(family) => (Some(family), Outcome::Reuse, ErrorCode::TokenReused),
        Taken::Expired(family) => (Some(family), Outcome::Failure, ErrorCode::TokenExpired),
        Taken::Valid(family) | Taken::Revoked(family) => (Some(family), Outcome::Failure, ErrorCode::InvalidToken),
        Taken::Unknown => (None, Outcome::Failure, ErrorCode::InvalidToken),
    };
    events::record(&mut tx, event.row(outcome, family.map(|family| family.user))).await?;
    idempotency::give_back(&mut tx, place).await?;
    // the revocation of the family has to last
    tx.commit().await?;
    let problem = Problem::new(code);
    let expired = code == ErrorCode::TokenExpired;
    Err(if expired { problem.detail("The refresh token has expired. Log in again.") } else { problem })
}

/// End a login: its refresh tokens stop working. May be repeated.
#[utoipa::path(post, path = "/api/v1/auth/logout", tag = "auth", security(("api_key" = [], "api_secret" = []), ("api_key" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = RefreshRequest,
    responses((status = 204),
              (status = 401, description = "INVALID_TOKEN")))]
async fn logout(
    State(app): State<App>,
    key: ClientKey,
    peer: Peer,
    Json(body): Json<RefreshRequest>,
) -> Result<Response, Problem> {
    let event = Attempt { kind: AuthKind::Logout, key, client_ip: peer.ip() };
    let now = app.clock.now();
    let principal = key.principal(body.refresh_token.expose().as_bytes());
    let mut tx = app.db.tenancy.begin(key.tenant).await?;
    let place = match idempotency::claim(&mut tx, &app, principal).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => {
            tx.commit().await?;
            return Ok(replay.into_response());
        }
    };
    let family = match refresh::take(&mut tx, &app.secrets, &body.refresh_token, now).await? {
        Taken::Valid(family) | Taken::Reused(family) | Taken::Expired(family) | Taken::Revoked(family) => family,
        Taken::Unknown => {
            events::record(&mut tx, event.row(Outcome::Failure, None)).await?;
            idempotency::give_back(&mut tx, place).await?;
            tx.commit().await?;
            return Err(Problem::new(ErrorCode::InvalidToken));
        }
    };
    refresh::revoke(&mut tx, family, now).await?;
    events::record(&mut tx, event.row(Outcome::Success, Some(family.user))).await?;
    idempotency::keep(&mut tx, &app.keys, place, StatusCode::NO_CONTENT, &()).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The constant parts of an attempt's event.
#[derive(Clone, Copy)]
struct Attempt {
    kind: AuthKind,
    key: ClientKey,
    client_ip: Option<IpAddr>,
}

impl Attempt {
    fn row(self, outcome: Outcome, user: Option<UserId>) -> AuthEvent {
        AuthEvent { kind: self.kind, outcome, user, client_ip: self.client_ip, request_id: self.key.request_id }
    }

    /// Notes what a throttle has refused.
    async fn admitted(self, app: &App, decision: Result<(), Problem>) -> Result<(), Problem> {
        if decision.is_err() {
            self.note(app, Outcome::Limited, None).await?;
        }
        decision
    }

    async fn note(self, app: &App, outcome: Outcome, user: Option<UserId>) -> Result<(), DbError> {
        let mut tx = app.db.tenancy.begin(self.key.tenant).await?;
        events::record(&mut tx, self.row(outcome, user)).await?;
        tx.commit().await
    }
}

pub(super) async fn open_session(app: &App, tx: &mut TenantTx, family: Family) -> Result<TokenResponse, DbError> {
    let now = app.clock.now();
    let refresh_token = refresh::issue(tx, &app.secrets, family, now, &mut rand::rngs::StdRng::from_os_rng()).await?;
    let who = ClientToken { tenant: tx.tenant(), user: family.user };
    let keys = app.token_keys().await?;
    Ok(TokenResponse {
        user_id: family.user,
        access_token: tokens::mint_client(keys.signing(now), &app.config.public_url, who, family.id, now),
        refresh_token,
        token_type: "Bearer".to_owned(),
        expires_in: tokens::ACCESS_SECONDS,
    })
}

fn checked(body: &RegisterRequest) -> Result<(Email, Secret), Problem> {
    let email = Email::parse(&body.email);
    let mut problem = Problem::validation();
    if email.is_none() {
        problem = problem.field("/email", "invalid_format", "must be an e-mail address");
    }
    problem = passwords::checked(problem, "/password", &body.password);
    match email {
        Some(email) => problem.or_ok((email, body.password.clone())),
        None => Err(problem),
    }
}

fn email_taken() -> Problem {
    Problem::new(ErrorCode::EmailTaken).detail("This tenant has a user with this e-mail address.")
}

impl From<RegisterError> for Problem {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::EmailTaken => email_taken(),
            RegisterError::LimitExceeded { max, used } => Self::new(ErrorCode::UserLimitExceeded)
                .detail(format!("This tenant has {used} of {max} users. Remove one or raise the limit."))
                .limit("users", max, used),
            RegisterError::TenantClosed => Self::new(ErrorCode::TenantSuspended),
            RegisterError::Db(error) => error.into(),
        }
    }
}

impl From<PasswordError> for Problem {
    fn from(error: PasswordError) -> Self {
        match &error {
            PasswordError::Overloaded => Self::new(ErrorCode::Overloaded).retry_after(2),
            PasswordError::Hash(_) | PasswordError::Interrupted => Self::internal(&error),
        }
    }
}
