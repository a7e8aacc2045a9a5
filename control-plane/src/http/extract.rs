//! Strict extractors: a body, path or query that is not exactly what the route expects is refused with its fault named;
//! a caller is who its credentials say, or nobody.

use std::cell::Cell;
use std::fmt::Display;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use axum::response::{IntoResponse, Response};
use cvault_types::{ApiKeyId, ErrorCode, RequestId, TenantId, UserId};
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use uuid::Uuid;

mod portal;

pub use portal::Portal;

use super::{Problem, context};
use crate::app::App;
use crate::auth::api_keys::{self, Proof};
use crate::auth::tokens::AdminToken;
use crate::auth::{admin_tokens, tokens};
use crate::http::serve::Peer;
use crate::metrics;

/// The largest body the API reads.
const MAX_BODY_BYTES: usize = 1 << 20;
/// A body must be complete within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest body of somebody without credentials: a few texts of a form.
const STRANGERS_BODY_BYTES: usize = 16 << 10;
const STRANGERS_BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// Room in which a thread writes its answers, kept from one to the next: nearly all fit.
const ANSWER_ROOM_BYTES: usize = 64 << 10;
const USUAL_HEADERS: usize = 12;
/// Characters of a field's name that an answer repeats.
const LONGEST_NAME: usize = 64;

/// A JSON body. Also the JSON answer.
#[derive(Debug)]
pub struct Json<T>(pub T);

/// An answer as it goes out. Those who get the same share it.
#[derive(Debug, Clone)]
pub struct Written(Bytes);

/// Parameters of the path. A text that is no id of the right kind is 404: nothing has that address.
#[derive(Debug)]
pub struct Path<T>(pub T);

/// The query string. Unknown names are refused when `T` denies unknown fields.
#[derive(Debug)]
pub struct Query<T>(pub T);

/// A tenant's user: API key and user token of the same tenant.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    pub tenant: TenantId,
    pub user: UserId,
    pub request_id: RequestId,
}

/// The tenant's own backend: API key and secret.
#[derive(Debug, Clone, Copy)]
pub struct TenantKey {
    pub tenant: TenantId,
    pub api_key_id: ApiKeyId,
    pub request_id: RequestId,
}

/// Who logs a tenant's users in: its backend, or, if the tenant allows that, a program without a secret.
#[derive(Debug, Clone, Copy)]
pub struct ClientKey {
    pub tenant: TenantId,
    pub api_key_id: ApiKeyId,
    pub proof: Proof,
    pub request_id: RequestId,
}

/// Platform staff: bearer token of audience `admin`.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Who the token was made for.
    pub subject: String,
    /// What it is revoked by.
    pub token: Uuid,
    /// `X-Challenge-Token`: the second proof that some operations ask for.
    pub challenge_token: Option<String>,
    pub request_id: RequestId,
}

impl ClientKey {
    /// Whose `Idempotency-Key` a request brings: the backend's; or, of programs that all have the same key, that of whoever
    /// `concerns` names. They know nothing of each other, and must not meet.
    #[must_use]
    pub fn principal(&self, concerns: &[u8]) -> String {
        match self.proof {
            Proof::Secret => self.api_key_id.to_string(),
            Proof::KeyAlone => format!("{}/{}", self.api_key_id, hex::encode(Sha256::digest(concerns))),
        }
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let (issuer, now) = (&app.config.public_url, app.clock.now());
        let claims = match bearer(&parts.headers) {
            Ok(token) => app.verified(token, |keys| app.tokens.client(keys, issuer, token, now)).await,
            Err(problem) => Err(problem),
        };
        let claims = api_keys::authenticate_user(app, parts, claims).await?;
        Ok(Self { tenant: claims.tenant, user: claims.user, request_id: context::request_id() })
    }
}

impl FromRequestParts<App> for TenantKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let key = api_keys::authenticate_secret(app, parts).await?;
        Ok(Self { tenant: key.tenant, api_key_id: key.api_key_id, request_id: context::request_id() })
    }
}

impl FromRequestParts<App> for ClientKey {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let (key, proof) = api_keys::authenticate_client(app, parts).await?;
        Ok(Self { tenant: key.tenant, api_key_id: key.api_key_id, proof, request_id: context::request_id() })
    }
}

impl FromRequestParts<App> for Admin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let ip = Peer::of(parts).ip();
        app.throttles.before_staff(ip)?;
        let AdminToken { subject, id: token } = staff_token(app, parts).await.inspect_err(|problem| {
            // nobody is charged for a database that is away, nor for a token that was right once
            if problem.code() == ErrorCode::InvalidToken {
                app.throttles.staff_failed(ip);
            }
        })?;
        let decision = app.throttles.staff(&subject);
        context::staff_identified(decision);
        if !decision.allowed {
            metrics::rate_limited("staff");
            let (max, seconds) = (i64::from(decision.quota), decision.retry_after_seconds);
            let problem = Problem::new(ErrorCode::RateLimited).limit("requests_per_minute", max, max);
            return Err(problem.retry_after(seconds));
        }
        let challenge_token = single(&parts.headers, "x-challenge-token").map(str::to_owned);
        Ok(Self { subject, token, challenge_token, request_id: context::request_id() })
    }
}

/// The subject of an admin token that nobody has revoked.
async fn staff_token(app: &App, parts: &Parts) -> Result<AdminToken, Problem> {
    let (issuer, now) = (&app.config.public_url, app.clock.now());
    let token = bearer(&parts.headers)?;
    let token = app.verified(token, |keys| tokens::verify_admin(keys, issuer, token, now)).await?;
    if admin_tokens::is_revoked(&app.db.sys, token.id).await? {
        return Err(Problem::new(ErrorCode::InvalidToken).detail("This token was revoked."));
    }
    Ok(token)
}

pub(super) fn bearer(headers: &HeaderMap) -> Result<&str, Problem> {
    let missing =
        || Problem::new(ErrorCode::InvalidToken).detail("An Authorization header `Bearer <token>` is needed, once.");
    let text = single(headers, AUTHORIZATION.as_str()).ok_or_else(missing)?;
    let (scheme, token) = text.split_once(' ').ok_or_else(missing)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim()) } else { Err(missing()) }
}

/// A header that is there exactly once, in visible ASCII.
pub(crate) fn single<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            return Err(Problem::new(ErrorCode::UnsupportedMediaType));
        }
        let body = read_body(request, app).await?;
        context::body_was(&body);
        parse_json(&body).map(Json)
    }
}

impl<T: serde::Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        Written::json(&self.0).into_response()
    }
}

impl Written {
    /// As JSON, in no more memory than it takes: an answer may wait for its client.
    ///
    /// # Errors
    /// INTERNAL: there is no JSON of it.
    pub fn json(answer: &impl serde::Serialize) -> Result<Self, Problem> {
        thread_local! {
            static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
        }
        // what fails or panics half-way takes it along
        let mut room = ROOM.take();
        room.reserve(ANSWER_ROOM_BYTES);
        serde_json::to_writer(&mut room, answer).map_err(|error| Problem::internal(&error))?;
        if room.len() > ANSWER_ROOM_BYTES {
            return Ok(Self(room.into()));
        }
        let body = Bytes::copy_from_slice(&room);
        // there may be keys in it
        room.fill(0);
        room.clear();
        ROOM.set(room);
        Ok(Self(body))
    }
}

impl IntoResponse for Written {
    fn into_response(self) -> Response {
        let mut headers = HeaderMap::with_capacity(USUAL_HEADERS);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let mut response = Response::new(self.0.into());
        *response.headers_mut() = headers;
        response
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = single(headers, CONTENT_TYPE.as_str()) else { return false };
    let mut parts = value.split(';').map(str::trim);
    parts.next().is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"))
        && parts.all(|parameter| {
            parameter.is_empty()
                || parameter.split_once('=').is_some_and(|(name, value)| {
                    name.eq_ignore_ascii_case("charset") && value.trim_matches('"').eq_ignore_ascii_case("utf-8")
                })
        })
}

async fn read_body(request: Request, app: &App) -> Result<Bytes, Problem> {
    let stranger = context::is_stranger();
    let (bytes, time) =
        if stranger { (STRANGERS_BODY_BYTES, STRANGERS_BODY_TIMEOUT) } else { (MAX_BODY_BYTES, BODY_TIMEOUT) };
    let _reading = match stranger {
        true => Some(app.strangers.take(request.extensions().get().copied().unwrap_or_default())?),
        false => None,
    };
    let body = Limited::new(request.into_body(), bytes);
    match tokio::time::timeout(time, body.collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Problem::new(ErrorCode::PayloadTooLarge)),
        Ok(Err(_)) => Err(Problem::new(ErrorCode::MalformedRequest).detail("The body broke off.")),
        Err(_) => Err(Problem::new(ErrorCode::RequestTimeout)),
    }
}

/// Syntax first, over the whole body: a fault of a field is worth naming only in valid JSON.
fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice::<serde::de::IgnoredAny>(body).map_err(|error| syntax_problem(&error))?;
    // serde would take an array for a struct's fields in their order
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(Problem::validation().field("", "invalid_type", "must be an object"));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let pointer = pointer(error.path());
        let inner = error.into_inner();
        if inner.is_data() { field_problem(&pointer, &inner) } else { syntax_problem(&inner) }
    })
}

fn syntax_problem(error: &serde_json::Error) -> Problem {
    Problem::new(ErrorCode::MalformedRequest).detail(format!(
        "The body is not valid JSON: fault at line {}, column {}.",
        error.line(),
        error.column()
    ))
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    path.iter().fold(String::new(), |text, segment| match segment {
        Segment::Seq { index } => format!("{text}/{index}"),
        Segment::Map { key } | Segment::Enum { variant: key } => format!("{text}/{}", escape(key)),
        Segment::Unknown => format!("{text}/?"),
    })
}

/// The caller's own words, as far as they help to find the field.
fn escape(key: &str) -> String {
    let short: String = key.chars().take(LONGEST_NAME).collect();
    let more = if short.len() < key.len() { "…" } else { "" };
    short.replace('~', "~0").replace('/', "~1") + more
}

/// serde's sentences name the field of a missing, unknown or doubled one between backticks; the rest is at `path`.
/// Sentences about values are ours alone where they would repeat what the caller sent.
fn field_problem(path: &str, error: &impl Display) -> Problem {
    let text = error.to_string();
    let named = |text: &str| text.split('`').nth(1).map(escape).unwrap_or_default();
    let below = |parent: &str, name: &str| match parent {
        _ if parent.starts_with('?') => format!("?{name}"),
        _ if parent.ends_with(&format!("/{name}")) => parent.to_owned(),
        _ => format!("{parent}/{name}"),
    };
    let problem = Problem::validation();
    if text.starts_with("missing field") {
        problem.field(below(path, &named(&text)), "missing", "is required")
    } else if text.starts_with("unknown field") {
        problem.field(below(path, &named(&text)), "unknown", "is not a field of this request")
    } else if text.starts_with("duplicate field") {
        problem.field(below(path, &named(&text)), "duplicate", "is there more than once")
    } else if text.starts_with("invalid type") || text.starts_with("invalid value") {
        let expected = text.rsplit_once("expected ").map_or("another type", |(_, expected)| expected);
        let expected = expected.split(" at line ").next().unwrap_or(expected);
        problem.field(path, "invalid_type", format!("must be {expected}"))
    } else if text.starts_with("unknown variant") {
        let choices = text.split_once("expected ").map_or("", |(_, choices)| choices);
        let choices = choices.split(" at line ").next().unwrap_or(choices);
        problem.field(path, "invalid_value", format!("must be {choices}"))
    } else {
        let sentence = text.split(" at line ").next().unwrap_or(&text);
        problem.field(path, "invalid_format", sentence)
    }
}

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        // Percent-decoding faults and ids of another kind are the same to the caller: nothing is there.
        RawPathParams::from_request_parts(parts, app).await.map_err(|_| Problem::new(ErrorCode::NotFound))?;
        axum::extract::Path::<T>::from_request_parts(parts, app)
            .await
            .map(|path| Self(path.0))
            .map_err(|_| Problem::new(ErrorCode::NotFound))
    }
}

impl<T: DeserializeOwned> FromRequestParts<App> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _app: &App) -> Result<Self, Problem> {
        let text = parts.uri.query().unwrap_or_default();
        let pairs = serde_urlencoded::Deserializer::new(form_urlencoded::parse(text.as_bytes()));
        serde_path_to_error::deserialize(pairs).map(Self).map_err(|error| {
            let name = pointer(error.path()).trim_start_matches('/').to_owned();
            field_problem(&format!("?{name}"), error.inner())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Serialize)]
    struct Panics {
        secret: &'static str,
        #[serde(serialize_with = "panics")]
        then: (),
    }

    fn panics<S: serde::Serializer>((): &(), _: S) -> Result<S::Ok, S::Error> {
        panic!("half-way")
    }

    #[test]
    fn an_answer_holds_nothing_of_another() {
        let long = "a".repeat(2 * ANSWER_ROOM_BYTES);
        assert_eq!(Written::json(&long).unwrap().0.len(), long.len() + 2);
        assert_eq!(Written::json(&["b"]).unwrap().0, r#"["b"]"#);
        let half = std::panic::catch_unwind(|| Written::json(&Panics { secret: "a key", then: () }));
        assert!(half.is_err());
        assert_eq!(Written::json(&"c").unwrap().0, r#""c""#);
    }
}
