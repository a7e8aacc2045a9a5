//! API keys: `X-API-Key` names the tenant, `X-API-Secret` proves it. No cache: each request that is served was judged by a
//! lookup that began after it arrived, so that a revoked key or a suspended tenant is refused at once on every replica.
//!
//! The key alone proves nothing: it stands in programs that everybody has. Where it is enough (`authenticate_client`, if the
//! tenant has switched that on) its calls are counted by themselves, so that strangers cannot use up what the tenant's
//! backend may send.

mod lookup;
mod manage;
mod over;
mod uses;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use cvault_types::api_key::Scope;
use cvault_types::{ApiKeyId, ErrorCode, Secret, TenantId};
use http::header::ORIGIN;
use http::request::Parts;
use http::{HeaderMap, HeaderValue};
use rand::CryptoRng;
use subtle::ConstantTimeEq;
use time::OffsetDateTime;

use super::opaque;
use super::throttle::Credential;
use super::tokens::ClientToken;
use crate::app::App;
use crate::db::DbError;
use crate::http::extract::single;
use crate::http::limit::{Allowance, Decision};
use crate::http::serve::Peer;
use crate::http::{Problem, context};
use crate::keys::PlatformSecrets;
use crate::metrics;
use crate::tenancy::TenantTx;

pub use lookup::Lookups;
pub use manage::{
    KeyChange, KeySettings, MAX_GRACE, ManageError, add, find as find_key, list, regenerate, revoke, revoke_all, update,
};
pub use over::OverRate;
pub use uses::Uses;

const KEY_HEADER: &str = "x-api-key";
const SECRET_HEADER: &str = "x-api-secret";

/// A key that exists, is not revoked, and belongs to a tenant that may use the API.
#[derive(Debug, Clone, Copy)]
pub struct AuthenticatedKey {
    pub tenant: TenantId,
    pub api_key_id: ApiKeyId,
}

/// How a caller has shown that it speaks for the tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// The tenant's backend.
    Secret,
    /// Anybody: a program that cannot keep a secret, of a tenant that has such programs.
    KeyAlone,
}

/// A new key, in clear for the only time.
#[derive(Debug)]
pub struct NewKey {
    pub id: ApiKeyId,
    pub key: String,
    pub secret: Secret,
}

struct StoredKey<'a> {
    /// As the caller sent it.
    text: &'a str,
    row: Arc<lookup::Row>,
    /// When it was found.
    now: OffsetDateTime,
    in_scope: bool,
    origin: Origin,
    per_minute: u32,
    user_per_minute: u32,
}

impl StoredKey<'_> {
    /// Before anything is refused, so that a page can read also why.
    fn tell_origin(&self) {
        if let Origin::Allowed(origin) = &self.origin {
            context::origin_allowed(origin);
        }
    }

    fn authenticated(&self) -> AuthenticatedKey {
        AuthenticatedKey { tenant: self.row.tenant, api_key_id: ApiKeyId::from_uuid(self.row.api_key_id) }
    }

    /// Whether the secret is the key's, or the one before while its grace lasts.
    fn is_proven_by(&self, hash: &[u8; 32]) -> bool {
        let row = &self.row;
        let current = hash.ct_eq(&row.secret_hash);
        let graced = row.previous_valid_until.is_some_and(|until| until > self.now);
        let previous = row.previous_secret_hash.as_ref().filter(|_| graced);
        bool::from(current | previous.map_or(0.into(), |previous| hash.ct_eq(previous)))
    }
}

/// Where a browser says that the call comes from. Other programs say nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    None,
    Allowed(HeaderValue),
    Refused,
}

/// What a key must be good for, to be used for a path. `None`: the path does not ask for keys.
#[must_use]
pub fn scope_of(path: &str) -> Option<Scope> {
    let (noun, _) = path.strip_prefix("/api/v1/").map(|rest| rest.split_once('/').unwrap_or((rest, "")))?;
    match noun {
        "auth" => Some(Scope::Auth),
        "users" => Some(Scope::Users),
        "usage" => Some(Scope::Usage),
        "devices" | "vpn" | "servers" => Some(Scope::Devices),
        _ => None,
    }
}

/// For calls that carry a user token besides the key; `claims` is what became of it. The key is public: what its tenant is
/// charged with, and told, waits for the token. The user is charged first: what is refused to one user costs the others
/// nothing.
///
/// # Errors
/// `INVALID_API_KEY`, `TENANT_SUSPENDED`, `ORIGIN_NOT_ALLOWED`, `INSUFFICIENT_SCOPE`, `RATE_LIMITED`, `SECRET_KEY_IN_BROWSER`
/// when an `Origin` header says that a browser sent the secret, what is wrong with the token, or the database's.
pub async fn authenticate_user(
    app: &App,
    request: &Parts,
    claims: Result<ClientToken, Problem>,
) -> Result<ClientToken, Problem> {
    refuse_secret_of_browser(&request.headers)?;
    let ip = Peer::of(request).ip();
    match &claims {
        Ok(claims) => {
            app.throttles.before_key_of(claims.user)?;
            user_still_over_rate(app, request, claims)?;
        }
        Err(_) => app.throttles.before_credentials(ip)?,
    }
    let found = match find(app, request).await {
        Ok(stored) => claims.map(|claims| (stored, claims)),
        Err(problem) => {
            // a token that is right is nobody's guess: its user answers for the key, and not its network
            match &claims {
                Ok(claims) if problem.code() == ErrorCode::InvalidApiKey => app.throttles.key_failed_of(claims.user),
                Ok(_) | Err(_) => note_failure(app, ip, &problem),
            }
            return Err(problem);
        }
    };
    let (stored, claims) = found.inspect_err(|problem| note_failure(app, ip, problem))?;
    if claims.tenant != stored.row.tenant {
        app.throttles.key_failed_of(claims.user);
        return Err(
            Problem::new(ErrorCode::InvalidToken).detail("The token belongs to another tenant than the API key.")
        );
    }
    let decision = app.throttles.user(claims.user, Allowance::paced(stored.user_per_minute));
    admit_user(&stored, &claims, decision)
        .and_then(|()| admit(app, &stored, charge(app, &stored)))
        .inspect_err(|problem| note_over_rate(app, &stored, problem))?;
    Ok(claims)
}

fn refuse_secret_of_browser(headers: &HeaderMap) -> Result<(), Problem> {
    if headers.contains_key(ORIGIN) && headers.contains_key(SECRET_HEADER) {
        return Err(Problem::new(ErrorCode::SecretKeyInBrowser).detail(
            "A browser sent the API secret. Anyone who uses that page can read it: revoke the key, and call from your server.",
        ));
    }
    Ok(())
}

/// For calls of the tenant's own backend: the secret is needed too.
///
/// # Errors
/// As [`authenticate_user`].
pub async fn authenticate_secret(app: &App, request: &Parts) -> Result<AuthenticatedKey, Problem> {
    refuse_secret_of_browser(&request.headers)?;
    let ip = Peer::of(request).ip();
    let credential = credential(request);
    app.throttles.before_credential(ip, credential)?;
    backend_still_over_rate(app, request)?;
    let stored = find_with_secret(app, request).await.inspect_err(|problem| note_failure(app, ip, problem))?;
    app.throttles.credential_right(ip, credential);
    admit(app, &stored, charge(app, &stored)).inspect_err(|problem| note_over_rate(app, &stored, problem))?;
    Ok(stored.authenticated())
}

/// For calls with which users log in: of the tenant's backend, or, if the tenant has public clients, of anybody.
///
/// # Errors
/// As [`authenticate_secret`]; without a secret `INVALID_API_KEY` for a tenant that has no public clients, and
/// `RATE_LIMITED` for a network that calls too often.
pub async fn authenticate_client(app: &App, request: &Parts) -> Result<(AuthenticatedKey, Proof), Problem> {
    if request.headers.contains_key(SECRET_HEADER) {
        return Ok((authenticate_secret(app, request).await?, Proof::Secret));
    }
    let (ip, credential) = (Peer::of(request).ip(), credential(request));
    app.throttles.before_credential(ip, credential)?;
    let stored = match find(app, request).await {
        Ok(stored) if stored.row.public_clients => Ok(stored),
        Ok(_) => Err(Problem::new(ErrorCode::InvalidApiKey)),
        Err(problem) => Err(problem),
    }
    .inspect_err(|problem| note_failure(app, ip, problem))?;
    app.throttles.credential_right(ip, credential);
    let tenant = stored.row.tenant;
    app.throttles.public_call(tenant, ip)?;
    let decision = app.throttles.public_calls(tenant, Allowance::paced(stored.per_minute));
    admit(app, &stored, decision)?;
    Ok((stored.authenticated(), Proof::KeyAlone))
}

/// Whether the bucket of the user or of its tenant is still full.
fn user_still_over_rate(app: &App, request: &Parts, claims: &ClientToken) -> Result<(), Problem> {
    let Some(stored) = over_rate(app, request).filter(|stored| stored.row.tenant == claims.tenant) else {
        return Ok(());
    };
    let decision = app.throttles.ask_user(claims.user, Allowance::paced(stored.user_per_minute));
    if !decision.allowed {
        stored.tell_origin();
        return admit_user(&stored, claims, decision);
    }
    tenant_still_over_rate(app, &stored)
}

/// As [`user_still_over_rate`]; who has no right to know is not told.
fn backend_still_over_rate(app: &App, request: &Parts) -> Result<(), Problem> {
    match (over_rate(app, request), secret(request)) {
        (Some(stored), Ok(secret)) if stored.is_proven_by(&hash_secret(&app.secrets, secret)) => {
            tenant_still_over_rate(app, &stored)
        }
        _ => Ok(()),
    }
}

fn tenant_still_over_rate(app: &App, stored: &StoredKey<'_>) -> Result<(), Problem> {
    let decision = app.limiter.ask(stored.row.tenant, Allowance::paced(stored.per_minute), Instant::now());
    if decision.allowed {
        return Ok(());
    }
    stored.tell_origin();
    admit(app, stored, decision)
}

fn note_over_rate(app: &App, stored: &StoredKey<'_>, problem: &Problem) {
    if problem.code() == ErrorCode::RateLimited {
        app.over_rate.note(stored.text, &stored.row, Instant::now());
    }
}

/// What was found of the key when its caller was refused for the rate.
fn over_rate<'a>(app: &App, request: &'a Parts) -> Option<StoredKey<'a>> {
    let text = key(request).ok()?;
    let now = app.clock.now();
    let row = app.over_rate.get(text, Instant::now()).filter(|row| row.expires_at.is_none_or(|until| until > now))?;
    Some(stored(app, request, text, row, now))
}

async fn find_with_secret<'a>(app: &App, request: &'a Parts) -> Result<StoredKey<'a>, Problem> {
    let secret = secret(request)?;
    let stored = find(app, request).await?;
    if stored.is_proven_by(&hash_secret(&app.secrets, secret)) {
        Ok(stored)
    } else {
        Err(Problem::new(ErrorCode::InvalidApiKey))
    }
}

fn secret(request: &Parts) -> Result<&str, Problem> {
    single(&request.headers, SECRET_HEADER)
        .filter(|text| opaque::API_SECRET.is_well_formed(text))
        .ok_or_else(|| Problem::new(ErrorCode::InvalidApiKey))
}

fn key(request: &Parts) -> Result<&str, Problem> {
    single(&request.headers, KEY_HEADER)
        .filter(|text| opaque::API_KEY.is_well_formed(text))
        .ok_or_else(|| Problem::new(ErrorCode::InvalidApiKey))
}

async fn find<'a>(app: &App, request: &'a Parts) -> Result<StoredKey<'a>, Problem> {
    let text = key(request)?;
    let now = app.clock.now();
    let row = app
        .key_lookups
        .find(&app.db.sys, text)
        .await?
        .filter(|row| row.expires_at.is_none_or(|until| until > now))
        .ok_or_else(|| Problem::new(ErrorCode::InvalidApiKey))?;
    let stored = stored(app, request, text, row, now);
    stored.tell_origin();
    Ok(stored)
}

fn stored<'a>(app: &App, request: &Parts, text: &'a str, row: Arc<lookup::Row>, now: OffsetDateTime) -> StoredKey<'a> {
    let named = single(&request.headers, ORIGIN.as_str());
    let origin = match request.headers.get(ORIGIN) {
        None => Origin::None,
        Some(origin) if named.is_some_and(|named| row.allowed_origins.iter().any(|allowed| allowed == named)) => {
            Origin::Allowed(origin.clone())
        }
        Some(_) => Origin::Refused,
    };
    let wanted = scope_of(request.uri.path()).map(Scope::as_str);
    let in_scope = wanted.is_none_or(|wanted| row.scopes.iter().any(|scope| scope == wanted));
    let own = |limit: Option<i32>| limit.and_then(|limit| u32::try_from(limit).ok());
    let per_minute = own(row.rate_limit_per_minute).unwrap_or(app.config.rate_limit_per_minute);
    // one user alone cannot use up what all of them share
    let user_per_minute = own(row.user_rate_limit_per_minute).unwrap_or(per_minute.div_ceil(2));
    StoredKey { text, row, now, in_scope, origin, per_minute, user_per_minute }
}

fn credential(request: &Parts) -> Credential {
    let bytes = |name| request.headers.get(name).map_or(&[][..], HeaderValue::as_bytes);
    Credential::of(bytes(KEY_HEADER), bytes(SECRET_HEADER))
}

/// Nobody is charged for a database that is away, nor for a token that was right once.
fn note_failure(app: &App, ip: Option<IpAddr>, problem: &Problem) {
    if matches!(problem.code(), ErrorCode::InvalidApiKey | ErrorCode::InvalidToken) {
        app.throttles.credentials_failed(ip);
    }
}

/// Charges the tenant's rate, now that the caller has proven to speak for it.
fn charge(app: &App, stored: &StoredKey<'_>) -> Decision {
    app.limiter.charge(stored.row.tenant, Allowance::paced(stored.per_minute), Instant::now())
}

fn admit_user(stored: &StoredKey<'_>, claims: &ClientToken, decision: Decision) -> Result<(), Problem> {
    let AuthenticatedKey { tenant, api_key_id } = stored.authenticated();
    context::user_identified(tenant, decision);
    context::called_by(api_key_id, Some(claims.user));
    if decision.allowed { Ok(()) } else { Err(rate_limited("user", decision)) }
}

fn admit(app: &App, stored: &StoredKey<'_>, decision: Decision) -> Result<(), Problem> {
    let AuthenticatedKey { tenant, api_key_id } = stored.authenticated();
    context::identified(tenant, decision);
    context::called_by(api_key_id, None);
    if !decision.allowed {
        return Err(rate_limited("tenant", decision));
    }
    if stored.row.suspended {
        return Err(Problem::new(ErrorCode::TenantSuspended));
    }
    if stored.origin == Origin::Refused {
        return Err(Problem::new(ErrorCode::OriginNotAllowed)
            .detail("The page that sent this is of an origin that the tenant has not allowed."));
    }
    if !stored.in_scope {
        return Err(Problem::new(ErrorCode::InsufficientScope)
            .detail("The API key is not meant for this. Use one with the scope."));
    }
    app.uses.note(tenant, api_key_id, app.clock.now());
    Ok(())
}

fn rate_limited(policy: &'static str, decision: Decision) -> Problem {
    metrics::rate_limited(policy);
    let (max, seconds) = (i64::from(decision.quota), decision.retry_after_seconds);
    Problem::new(ErrorCode::RateLimited).limit("requests_per_minute", max, max).retry_after(seconds)
}

fn hash_secret(secrets: &PlatformSecrets, secret: &str) -> [u8; 32] {
    secrets.peppered("api_secret", secret)
}

/// Adds the key a tenant begins with; who makes the tenant says so in the audit log.
///
/// # Errors
/// Those of the database.
pub async fn create(
    tx: &mut TenantTx,
    secrets: &PlatformSecrets,
    now: OffsetDateTime,
    rng: &mut impl CryptoRng,
) -> Result<NewKey, DbError> {
    manage::insert(tx, secrets, &KeySettings::default(), now, rng).await
}
