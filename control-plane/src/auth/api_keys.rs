//! API keys: `X-API-Key` names the tenant, `X-API-Secret` proves it. No cache: one indexed lookup per request, so that a
//! revoked key or a suspended tenant is refused at once on every replica.

use std::net::IpAddr;
use std::time::Instant;

use cvault_types::{ApiKeyId, ErrorCode, Secret, TenantId};
use http::HeaderMap;
use http::header::ORIGIN;
use http::request::Parts;
use rand::CryptoRng;
use subtle::ConstantTimeEq;
use time::OffsetDateTime;
use uuid::Uuid;

use super::opaque;
use crate::app::App;
use crate::db::DbError;
use crate::http::extract::single;
use crate::http::limit::Allowance;
use crate::http::serve::Peer;
use crate::http::{Problem, context};
use crate::keys::PlatformSecrets;
use crate::tenancy::TenantTx;

const KEY_HEADER: &str = "x-api-key";
const SECRET_HEADER: &str = "x-api-secret";

/// A key that exists, is not revoked, and belongs to a tenant that may use the API.
#[derive(Debug, Clone, Copy)]
pub struct AuthenticatedKey {
    pub tenant: TenantId,
    pub api_key_id: ApiKeyId,
}

/// A new key, in clear for the only time.
#[derive(Debug)]
pub struct NewKey {
    pub id: ApiKeyId,
    pub key: String,
    pub secret: Secret,
}

struct StoredKey {
    authenticated: AuthenticatedKey,
    secret_hash: Vec<u8>,
    suspended: bool,
    per_minute: u32,
}

/// For calls that carry a user token besides the key. The key is public: what its tenant is charged with, and told,
/// waits for `prove`, which checks the token.
///
/// # Errors
/// `INVALID_API_KEY`, `TENANT_SUSPENDED`, `RATE_LIMITED`, what `prove` says, or the database's.
pub async fn authenticate_key<T>(
    app: &App,
    request: &Parts,
    prove: impl FnOnce(AuthenticatedKey) -> Result<T, Problem>,
) -> Result<T, Problem> {
    let ip = Peer::of(request).ip();
    app.throttles.before_credentials(ip)?;
    let proven = match find(app, &request.headers).await {
        Ok(stored) => prove(stored.authenticated).map(|proof| (stored, proof)),
        Err(problem) => Err(problem),
    };
    let (stored, proof) = proven.inspect_err(|problem| note_failure(app, ip, problem))?;
    admit(app, &stored)?;
    Ok(proof)
}

/// For calls of the tenant's own backend: the secret is needed too.
///
/// # Errors
/// As [`authenticate_key`], and `SECRET_KEY_IN_BROWSER` when an `Origin` header says a browser sent the secret.
pub async fn authenticate_secret(app: &App, request: &Parts) -> Result<AuthenticatedKey, Problem> {
    let headers = &request.headers;
    if headers.contains_key(ORIGIN) && headers.contains_key(SECRET_HEADER) {
        return Err(Problem::new(ErrorCode::SecretKeyInBrowser).detail(
            "A browser sent the API secret. Anyone who uses that page can read it: revoke the key, and call from your server.",
        ));
    }
    let ip = Peer::of(request).ip();
    app.throttles.before_credentials(ip)?;
    let stored = find_with_secret(app, headers).await.inspect_err(|problem| note_failure(app, ip, problem))?;
    admit(app, &stored)?;
    Ok(stored.authenticated)
}

async fn find_with_secret(app: &App, headers: &HeaderMap) -> Result<StoredKey, Problem> {
    let secret = single(headers, SECRET_HEADER)
        .filter(|text| opaque::API_SECRET.is_well_formed(text))
        .ok_or_else(|| Problem::new(ErrorCode::InvalidApiKey))?;
    let stored = find(app, headers).await?;
    if bool::from(hash_secret(&app.secrets, secret).ct_eq(&stored.secret_hash)) {
        Ok(stored)
    } else {
        Err(Problem::new(ErrorCode::InvalidApiKey))
    }
}

async fn find(app: &App, headers: &HeaderMap) -> Result<StoredKey, Problem> {
    let text = single(headers, KEY_HEADER)
        .filter(|text| opaque::API_KEY.is_well_formed(text))
        .ok_or_else(|| Problem::new(ErrorCode::InvalidApiKey))?;
    let row = sqlx::query!(
        "select k.tenant_id, k.api_key_id, k.secret_hash, t.status, t.rate_limit_per_minute
         from cvault.api_keys k join cvault.tenants t using (tenant_id)
         where k.key_text = $1 and k.revoked_at is null and (k.expires_at is null or k.expires_at > $2)
             and t.status <> 'deleted'",
        text,
        app.clock.now()
    )
    .fetch_optional(&app.db.sys)
    .await
    .map_err(DbError::from)?
    .ok_or_else(|| Problem::new(ErrorCode::InvalidApiKey))?;
    Ok(StoredKey {
        authenticated: AuthenticatedKey {
            tenant: TenantId::from_uuid(row.tenant_id),
            api_key_id: ApiKeyId::from_uuid(row.api_key_id),
        },
        secret_hash: row.secret_hash,
        suspended: row.status == "suspended",
        per_minute: row
            .rate_limit_per_minute
            .and_then(|limit| u32::try_from(limit).ok())
            .unwrap_or(app.config.rate_limit_per_minute),
    })
}

/// Nobody is charged for a database that is away.
fn note_failure(app: &App, ip: Option<IpAddr>, problem: &Problem) {
    if matches!(problem.code(), ErrorCode::InvalidApiKey | ErrorCode::InvalidToken | ErrorCode::TokenExpired) {
        app.throttles.credentials_failed(ip);
    }
}

/// Charges the tenant's rate, now that the caller has proven to speak for it.
fn admit(app: &App, stored: &StoredKey) -> Result<(), Problem> {
    let tenant = stored.authenticated.tenant;
    let decision = app.limiter.charge(tenant, Allowance::per_minute(stored.per_minute), Instant::now());
    context::identified(tenant, decision);
    if !decision.allowed {
        let (max, seconds) = (i64::from(decision.quota), decision.retry_after_seconds);
        return Err(Problem::new(ErrorCode::RateLimited).limit("requests_per_minute", max, max).retry_after(seconds));
    }
    if stored.suspended { Err(Problem::new(ErrorCode::TenantSuspended)) } else { Ok(()) }
}

fn hash_secret(secrets: &PlatformSecrets, secret: &str) -> [u8; 32] {
    secrets.peppered("api_secret", secret)
}

/// Adds a key to the transaction's tenant.
///
/// # Errors
/// Those of the database.
pub async fn create(
    tx: &mut TenantTx,
    secrets: &PlatformSecrets,
    now: OffsetDateTime,
    rng: &mut impl CryptoRng,
) -> Result<NewKey, DbError> {
    let id = ApiKeyId::from_uuid(Uuid::now_v7());
    let key = opaque::API_KEY.draw(rng).expose().to_owned();
    let secret = opaque::API_SECRET.draw(rng);
    let tenant = tx.tenant().uuid();
    let hash = hash_secret(secrets, secret.expose());
    sqlx::query!(
        "insert into cvault.api_keys (tenant_id, api_key_id, key_text, secret_hash, created_at) values ($1, $2, $3, $4, $5)",
        tenant,
        id.uuid(),
        key,
        hash.as_slice(),
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(NewKey { id, key, secret })
}

/// Revokes every key of the transaction's tenant.
///
/// # Errors
/// Those of the database.
pub async fn revoke_all(tx: &mut TenantTx, now: OffsetDateTime) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!("update cvault.api_keys set revoked_at = $2 where tenant_id = $1 and revoked_at is null", tenant, now)
        .execute(tx.conn())
        .await?;
    Ok(())
}
