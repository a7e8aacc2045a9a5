//! API keys: `X-API-Key` names the tenant, `X-API-Secret` proves it. No cache: one indexed lookup per request, so that a
//! revoked key or a suspended tenant is refused at once on every replica.

use std::time::Instant;

use cvault_types::{ApiKeyId, ErrorCode, Secret, TenantId};
use http::HeaderMap;
use http::header::ORIGIN;
use rand::CryptoRng;
use subtle::ConstantTimeEq;
use time::OffsetDateTime;
use uuid::Uuid;

use super::opaque;
use crate::app::App;
use crate::db::DbError;
use crate::http::extract::single;
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
}

/// For calls that carry a user token besides the key.
///
/// # Errors
/// `INVALID_API_KEY`, `TENANT_SUSPENDED`, `RATE_LIMITED`, or the database's.
pub async fn authenticate_key(app: &App, headers: &HeaderMap) -> Result<AuthenticatedKey, Problem> {
    let stored = find(app, headers).await?;
    refuse_suspended(&stored)?;
    Ok(stored.authenticated)
}

/// For calls of the tenant's own backend: the secret is needed too.
///
/// # Errors
/// As [`authenticate_key`], and `SECRET_KEY_IN_BROWSER` when an `Origin` header says a browser sent the secret.
pub async fn authenticate_secret(app: &App, headers: &HeaderMap) -> Result<AuthenticatedKey, Problem> {
    if headers.contains_key(ORIGIN) && headers.contains_key(SECRET_HEADER) {
        return Err(Problem::new(ErrorCode::SecretKeyInBrowser).detail(
            "A browser sent the API secret. Anyone who uses that page can read it: revoke the key, and call from your server.",
        ));
    }
    let stored = find(app, headers).await?;
    let secret = single(headers, SECRET_HEADER)
        .filter(|text| opaque::API_SECRET.is_well_formed(text))
        .ok_or_else(|| Problem::new(ErrorCode::InvalidApiKey))?;
    if !bool::from(hash_secret(&app.secrets, secret).ct_eq(&stored.secret_hash)) {
        return Err(Problem::new(ErrorCode::InvalidApiKey));
    }
    refuse_suspended(&stored)?;
    Ok(stored.authenticated)
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
    let tenant = TenantId::from_uuid(row.tenant_id);
    let per_minute = row
        .rate_limit_per_minute
        .and_then(|limit| u32::try_from(limit).ok())
        .unwrap_or(app.config.rate_limit_per_minute);
    count_request(app, tenant, per_minute)?;
    Ok(StoredKey {
        authenticated: AuthenticatedKey { tenant, api_key_id: ApiKeyId::from_uuid(row.api_key_id) },
        secret_hash: row.secret_hash,
        suspended: row.status == "suspended",
    })
}

fn count_request(app: &App, tenant: TenantId, per_minute: u32) -> Result<(), Problem> {
    let decision = app.limiter.check(tenant, per_minute, Instant::now());
    context::identified(tenant, decision);
    if decision.allowed {
        return Ok(());
    }
    let (max, seconds) = (i64::from(decision.per_minute), decision.retry_after_seconds);
    Err(Problem::new(ErrorCode::RateLimited).limit("requests_per_minute", max, max).retry_after(seconds))
}

fn refuse_suspended(stored: &StoredKey) -> Result<(), Problem> {
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
