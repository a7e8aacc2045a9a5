//! `/api/v1/users…`: a tenant's end users, for the tenant's backend.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use cvault_types::auth::TokenResponse;
use cvault_types::user::{UpdateUser, User, UserPage};
use cvault_types::{ErrorCode, UserId};
use http::StatusCode;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::open_session;
use crate::app::App;
use crate::auth::email::Email;
use crate::auth::events::{self, AuthEvent, AuthKind, Outcome};
use crate::auth::refresh::Family;
use crate::http::idempotency::{self, Claim};
use crate::http::serve::Peer;
use crate::http::{Json, Path, Problem, Query, TenantKey, cursor};
use crate::tenancy::TenantTx;
use crate::tenants::Actor;
use crate::users::{self, DeleteError, ExternalId, Filter, UpdateError, UserChange, VouchError, Vouched};

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(get, update, delete)).routes(routes!(login_token))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    email: Option<String>,
    external_id: Option<String>,
}

/// The tenant's users, oldest first.
#[utoipa::path(get, path = "/api/v1/users", tag = "users", security(("api_key" = [], "api_secret" = [])),
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "Default 50."),
           ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before."),
           ("email" = Option<String>, Query, description = "Only the user with this e-mail address."),
           ("external_id" = Option<String>, Query, description = "Only the user with this external id.")),
    responses((status = 200, body = UserPage),
              (status = 403, description = "INSUFFICIENT_SCOPE, TENANT_SUSPENDED, SECRET_KEY_IN_BROWSER")))]
async fn list(
    State(app): State<App>,
    key: TenantKey,
    Query(query): Query<ListQuery>,
) -> Result<Json<UserPage>, Problem> {
    let limit = query.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(Problem::validation().field("?limit", "out_of_range", "must be from 1 to 200"));
    }
    let name = format!("users:{}", key.tenant);
    let after = query.cursor.as_deref().map(|text| cursor::decode(&app.secrets, &name, text)).transpose()?;
    let filter = filter(query.email.as_deref(), query.external_id.as_deref())?;
    let mut tx = app.db.tenancy.begin(key.tenant).await?;
    let mut data = users::list(&mut tx, &filter, after.map(UserId::from_uuid), limit + 1).await?;
    tx.commit().await?;
    let has_more = data.len() > limit as usize;
    data.truncate(limit as usize);
    let next_cursor =
        data.last().filter(|_| has_more).map(|last| cursor::encode(&app.secrets, &name, last.user_id.uuid()));
    Ok(Json(UserPage { data, has_more, next_cursor }))
}

pub(super) fn filter(email: Option<&str>, external_id: Option<&str>) -> Result<Filter, Problem> {
    let mut problem = Problem::validation();
    let email = email.map(Email::parse);
    if let Some(None) = email {
        problem = problem.field("?email", "invalid_format", "must be an e-mail address");
    }
    let external_id = match external_id.map(ExternalId::parse).transpose() {
        Ok(id) => id,
        Err(fault) => {
            problem = problem.field("?external_id", fault.code, fault.detail);
            None
        }
    };
    problem.or_ok(Filter { email: email.flatten(), external_id })
}

/// One user.
#[utoipa::path(get, path = "/api/v1/users/{user_id}", tag = "users", security(("api_key" = [], "api_secret" = [])),
    params(("user_id" = UserId, Path)),
    responses((status = 200, body = User)))]
async fn get(State(app): State<App>, key: TenantKey, Path(id): Path<UserId>) -> Result<Json<User>, Problem> {
    let mut tx = app.db.tenancy.begin(key.tenant).await?;
    let user = users::find(&mut tx, id).await?;
    tx.commit().await?;
    user.map(Json).ok_or_else(|| Problem::new(ErrorCode::NotFound))
}

/// Disable or enable a user, or give it an external id.
///
/// A disabled user cannot log in, its refresh tokens are revoked, and its devices are off their servers; enabling it brings
/// them back with their addresses.
#[utoipa::path(patch, path = "/api/v1/users/{user_id}", tag = "users", security(("api_key" = [], "api_secret" = [])),
    params(("user_id" = UserId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")), request_body = UpdateUser,
    responses((status = 200, body = User),
              (status = 409, description = "EXTERNAL_ID_TAKEN")))]
async fn update(
    State(app): State<App>,
    key: TenantKey,
    Path(id): Path<UserId>,
    Json(body): Json<UpdateUser>,
) -> Result<Response, Problem> {
    let change = UserChange::parse(body)?;
    let answer = idempotency::once(&app, key.tenant, key.api_key_id.to_string(), StatusCode::OK, async |tx| {
        Ok(users::update(tx, id, &change, &actor(key), app.clock.now()).await?)
    })
    .await?;
    change.enforce(&app, key.tenant).await?;
    Ok(answer)
}

/// Delete a user: its logins end, its devices leave their servers, their keys are destroyed, its address and password are
/// forgotten. Cannot be undone. May be repeated.
#[utoipa::path(delete, path = "/api/v1/users/{user_id}", tag = "users", security(("api_key" = [], "api_secret" = [])),
    params(("user_id" = UserId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 204, description = "Deleted, now or before.")))]
async fn delete(State(app): State<App>, key: TenantKey, Path(id): Path<UserId>) -> Result<Response, Problem> {
    if let Some(replay) = idempotency::earlier(&app, key.tenant, key.api_key_id.to_string()).await? {
        return Ok(replay);
    }
    users::delete(&app, key.tenant, id, &actor(key)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Log in a user that the tenant's own backend vouches for, by the tenant's own name for it.
///
/// A new name makes a new user, which counts against the tenant's limit. 1 to 255 printable characters, percent-encoded in
/// the path; `a/b` is `a%2Fb`.
#[utoipa::path(post, path = "/api/v1/users/{external_id}/login-token", tag = "users",
    security(("api_key" = [], "api_secret" = [])),
    params(("external_id" = String, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 200, body = TokenResponse, description = "The user was known."),
              (status = 201, body = TokenResponse, description = "The user is new."),
              (status = 403, description = "USER_LIMIT_EXCEEDED, USER_DISABLED, INSUFFICIENT_SCOPE, TENANT_SUSPENDED")))]
async fn login_token(
    State(app): State<App>,
    key: TenantKey,
    peer: Peer,
    Path(external_id): Path<String>,
) -> Result<Response, Problem> {
    let external_id = ExternalId::parse(&external_id)
        .map_err(|fault| Problem::validation().field("{external_id}", fault.code, fault.detail))?;
    let mut tx = app.db.tenancy.begin(key.tenant).await?;
    let work = vouch_once(&app, &mut tx, key, peer, &external_id).await;
    tx.finish(work).await
}

async fn vouch_once(
    app: &App,
    tx: &mut TenantTx,
    key: TenantKey,
    peer: Peer,
    external_id: &ExternalId,
) -> Result<Response, Problem> {
    let place = match idempotency::claim(tx, app, key.api_key_id.to_string()).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => return Ok(replay.into_response()),
    };
    let (user, kind, status) = match users::vouch(tx, external_id, &actor(key), app.clock.now()).await? {
        Vouched::Known(user) => (user, AuthKind::Login, StatusCode::OK),
        Vouched::New(user) => (user, AuthKind::Register, StatusCode::CREATED),
    };
    let event = AuthEvent {
        kind,
        outcome: Outcome::Success,
        user: Some(user),
        client_ip: peer.ip(),
        request_id: key.request_id,
    };
    events::record(tx, event).await?;
    let answer = open_session(app, tx, Family::begin(user)).await?;
    idempotency::keep(tx, &app.keys, place, status, &answer).await?;
    Ok((status, Json(answer)).into_response())
}

fn actor(key: TenantKey) -> Actor {
    Actor { name: key.api_key_id.to_string(), request_id: Some(key.request_id) }
}

impl From<VouchError> for Problem {
    fn from(error: VouchError) -> Self {
        match error {
            VouchError::Disabled => Self::new(ErrorCode::UserDisabled),
            VouchError::LimitExceeded { max, used } => users::RegisterError::LimitExceeded { max, used }.into(),
            VouchError::TenantClosed => Self::new(ErrorCode::TenantSuspended),
            VouchError::Db(error) => error.into(),
        }
    }
}

impl From<UpdateError> for Problem {
    fn from(error: UpdateError) -> Self {
        match error {
            UpdateError::NotFound => Self::new(ErrorCode::NotFound),
            UpdateError::ExternalIdTaken => {
                Self::new(ErrorCode::ExternalIdTaken).detail("Another user of this tenant has this external id.")
            }
            UpdateError::Unidentified => Self::validation().field(
                "/external_id",
                "required",
                "must stay: the user has no e-mail address to be known by",
            ),
            UpdateError::Db(error) => error.into(),
        }
    }
}

impl From<DeleteError> for Problem {
    fn from(error: DeleteError) -> Self {
        match error {
            DeleteError::NotFound => Self::new(ErrorCode::NotFound),
            DeleteError::Idempotency(problem) => problem,
            DeleteError::Db(error) => error.into(),
        }
    }
}
