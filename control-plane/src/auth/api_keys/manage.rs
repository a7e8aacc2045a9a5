//! A tenant's keys, from creation to revocation. A secret is in clear only in the answer that makes it.

use cvault_types::api_key::{ApiKey, CreateApiKey, Scope, UpdateApiKey};
use cvault_types::{ApiKeyId, Secret};
use rand::CryptoRng;
use serde_json::json;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::{NewKey, hash_secret};
use crate::audit;
use crate::auth::opaque;
use crate::db::DbError;
use crate::devices::DeviceName;
use crate::http::Problem;
use crate::keys::PlatformSecrets;
use crate::tenancy::TenantTx;
use crate::tenants::{self, Actor};

/// Keys of a tenant that are not revoked.
const MAX_KEYS: i64 = 100;
/// The longest an old secret goes on working.
pub const MAX_GRACE: Duration = Duration::days(7);

#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    #[error("there is no such key")]
    NotFound,
    #[error("there is no such tenant, or it is being deleted")]
    NoTenant,
    #[error("the tenant has {MAX_KEYS} keys")]
    TooMany,
    #[error("which of the tenant's keys is meant is not said")]
    Ambiguous,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What a key is to be, checked.
#[derive(Debug, Clone)]
pub struct KeySettings {
    pub name: String,
    pub scopes: Vec<Scope>,
    pub expires_at: Option<OffsetDateTime>,
}

/// What is to change of a key, checked; `None` stays.
#[derive(Debug, Clone)]
pub struct KeyChange {
    pub name: Option<String>,
    pub scopes: Option<Vec<Scope>>,
    pub expires_at: Option<Option<OffsetDateTime>>,
}

impl Default for KeySettings {
    /// The key a tenant begins with.
    fn default() -> Self {
        Self { name: "default".to_owned(), scopes: Scope::ALL.to_vec(), expires_at: None }
    }
}

impl KeySettings {
    /// # Errors
    /// All faults at once.
    pub fn parse(request: CreateApiKey, now: OffsetDateTime) -> Result<Self, Problem> {
        let UpdateApiKey { name, scopes, expires_at } = UpdateApiKey {
            name: Some(request.name),
            scopes: Some(request.scopes.unwrap_or_else(|| Scope::ALL.to_vec())),
            expires_at: Some(request.expires_at),
        };
        let change = KeyChange::parse(UpdateApiKey { name, scopes, expires_at }, now)?;
        Ok(Self {
            name: change.name.unwrap_or_default(),
            scopes: change.scopes.unwrap_or_default(),
            expires_at: change.expires_at.flatten(),
        })
    }
}

impl KeyChange {
    /// # Errors
    /// All faults at once.
    pub fn parse(request: UpdateApiKey, now: OffsetDateTime) -> Result<Self, Problem> {
        let mut problem = Problem::validation();
        let name = match request.name.as_deref().map(DeviceName::parse).transpose() {
            Ok(name) => name.map(|name| name.as_str().to_owned()),
            Err(fault) => {
                problem = problem.field("/name", fault.code, fault.detail);
                None
            }
        };
        let scopes = request.scopes.map(|mut scopes| {
            scopes.sort_unstable();
            scopes.dedup();
            scopes
        });
        if scopes.as_ref().is_some_and(Vec::is_empty) {
            problem = problem.field("/scopes", "too_short", "must name one scope or more");
        }
        if request.expires_at.flatten().is_some_and(|at| at <= now) {
            problem = problem.field("/expires_at", "out_of_range", "must be in the future");
        }
        problem.or_ok(Self { name, scopes, expires_at: request.expires_at })
    }
}

/// Adds a key to the transaction's tenant.
///
/// # Errors
/// Those of the database.
pub(super) async fn insert(
    tx: &mut TenantTx,
    secrets: &PlatformSecrets,
    settings: &KeySettings,
    now: OffsetDateTime,
    rng: &mut impl CryptoRng,
) -> Result<NewKey, DbError> {
    let id = ApiKeyId::from_uuid(Uuid::now_v7());
    let key = opaque::API_KEY.draw(rng).expose().to_owned();
    let secret = opaque::API_SECRET.draw(rng);
    let hash = hash_secret(secrets, secret.expose());
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "insert into cvault.api_keys (tenant_id, api_key_id, name, key_text, secret_hash, scopes, expires_at, created_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8)",
        tenant,
        id.uuid(),
        settings.name,
        key,
        hash.as_slice(),
        &texts(&settings.scopes),
        settings.expires_at,
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(NewKey { id, key, secret })
}

/// Adds a key, and says so in the audit log.
///
/// # Errors
/// [`ManageError::TooMany`], [`ManageError::NoTenant`], or the database's.
pub async fn add(
    tx: &mut TenantTx,
    secrets: &PlatformSecrets,
    settings: &KeySettings,
    actor: &Actor,
    now: OffsetDateTime,
    rng: &mut impl CryptoRng,
) -> Result<(ApiKey, Secret), ManageError> {
    // racing creations count one after the other
    if !tenants::hold(tx).await? {
        return Err(ManageError::NoTenant);
    }
    if list(tx).await?.len() >= usize::try_from(MAX_KEYS).unwrap_or(usize::MAX) {
        return Err(ManageError::TooMany);
    }
    let new = insert(tx, secrets, settings, now, rng).await?;
    let details = json!({"name": settings.name, "scopes": texts(&settings.scopes)});
    note(tx, actor, "api_key.create", new.id, details).await?;
    Ok((find(tx, new.id).await?.ok_or(ManageError::NotFound)?, new.secret))
}

/// All keys that are not revoked, oldest first; at most [`MAX_KEYS`].
///
/// # Errors
/// Those of the database.
pub async fn list(tx: &mut TenantTx) -> Result<Vec<ApiKey>, DbError> {
    read(tx, None).await
}

/// One key that is not revoked.
///
/// # Errors
/// Those of the database.
pub async fn find(tx: &mut TenantTx, id: ApiKeyId) -> Result<Option<ApiKey>, DbError> {
    Ok(read(tx, Some(id)).await?.into_iter().next())
}

async fn read(tx: &mut TenantTx, id: Option<ApiKeyId>) -> Result<Vec<ApiKey>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        r#"select api_key_id, name, key_text, scopes, created_at, expires_at, last_used_at, regenerated_at,
                  case when previous_valid_until > now() then previous_valid_until end as previous_valid_until
           from cvault.api_keys
           where tenant_id = $1 and revoked_at is null and ($2::uuid is null or api_key_id = $2)
           order by api_key_id"#,
        tenant,
        id.map(ApiKeyId::uuid)
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| ApiKey {
            id: ApiKeyId::from_uuid(row.api_key_id),
            name: row.name,
            api_key: row.key_text,
            scopes: row.scopes.iter().filter_map(|text| Scope::parse(text)).collect(),
            created_at: row.created_at,
            expires_at: row.expires_at,
            last_used_at: row.last_used_at,
            regenerated_at: row.regenerated_at,
            previous_secret_valid_until: row.previous_valid_until,
        })
        .collect())
}

/// Changes a key; what is taken from it is refused from the next request on.
///
/// # Errors
/// [`ManageError::NotFound`], or the database's.
pub async fn update(tx: &mut TenantTx, id: ApiKeyId, change: KeyChange, actor: &Actor) -> Result<ApiKey, ManageError> {
    let tenant = tx.tenant().uuid();
    let scopes = change.scopes.as_deref().map(texts);
    let changed = sqlx::query!(
        "update cvault.api_keys
         set name = coalesce($3, name), scopes = coalesce($4, scopes), expires_at = case when $5 then $6 else expires_at end
         where tenant_id = $1 and api_key_id = $2 and revoked_at is null",
        tenant,
        id.uuid(),
        change.name,
        scopes.as_deref(),
        change.expires_at.is_some(),
        change.expires_at.flatten()
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if changed.rows_affected() == 0 {
        return Err(ManageError::NotFound);
    }
    let key = find(tx, id).await?.ok_or(ManageError::NotFound)?;
    let details = json!({"name": key.name, "scopes": key.scopes, "expires": key.expires_at.is_some()});
    note(tx, actor, "api_key.update", id, details).await?;
    Ok(key)
}

/// Gives a key another secret; the public part stays, as it stands in programs that are not updated at once. The old secret
/// works for `grace` more; one that was in its grace already ends now. Without `id`: the tenant's only key.
///
/// # Errors
/// [`ManageError::NotFound`], [`ManageError::Ambiguous`], or the database's.
pub async fn regenerate(
    tx: &mut TenantTx,
    secrets: &PlatformSecrets,
    id: Option<ApiKeyId>,
    grace: Duration,
    actor: &Actor,
    now: OffsetDateTime,
    rng: &mut impl CryptoRng,
) -> Result<(ApiKey, Secret), ManageError> {
    let id = match id {
        Some(id) => id,
        None => match list(tx).await?.as_slice() {
            [] => return Err(ManageError::NotFound),
            [only] => only.id,
            [_, _, ..] => return Err(ManageError::Ambiguous),
        },
    };
    let secret = opaque::API_SECRET.draw(rng);
    let hash = hash_secret(secrets, secret.expose());
    let tenant = tx.tenant().uuid();
    let until = (grace > Duration::ZERO).then(|| now + grace.min(MAX_GRACE));
    let changed = sqlx::query!(
        "update cvault.api_keys
         set secret_hash = $3, regenerated_at = $4, previous_valid_until = $5,
             previous_secret_hash = case when $5::timestamptz is not null then secret_hash end
         where tenant_id = $1 and api_key_id = $2 and revoked_at is null",
        tenant,
        id.uuid(),
        hash.as_slice(),
        now,
        until
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if changed.rows_affected() == 0 {
        return Err(ManageError::NotFound);
    }
    let details = json!({"grace_period_seconds": grace.whole_seconds()});
    note(tx, actor, "api_key.regenerate", id, details).await?;
    Ok((find(tx, id).await?.ok_or(ManageError::NotFound)?, secret))
}

/// Ends a key at once, on every replica: nothing of it is cached.
///
/// # Errors
/// [`ManageError::NotFound`] also for one that is revoked already, or the database's.
pub async fn revoke(tx: &mut TenantTx, id: ApiKeyId, actor: &Actor, now: OffsetDateTime) -> Result<(), ManageError> {
    let tenant = tx.tenant().uuid();
    let revoked = sqlx::query!(
        "update cvault.api_keys set revoked_at = $3, previous_secret_hash = null, previous_valid_until = null
         where tenant_id = $1 and api_key_id = $2 and revoked_at is null",
        tenant,
        id.uuid(),
        now
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if revoked.rows_affected() == 0 {
        return Err(ManageError::NotFound);
    }
    Ok(note(tx, actor, "api_key.revoke", id, json!({})).await?)
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

async fn note(
    tx: &mut TenantTx,
    actor: &Actor,
    action: &'static str,
    id: ApiKeyId,
    details: serde_json::Value,
) -> Result<(), DbError> {
    let target = id.to_string();
    let entry = audit::Entry { actor: &actor.name, action, target: &target, details, request_id: actor.request_id };
    audit::record(tx, entry).await
}

fn texts(scopes: &[Scope]) -> Vec<String> {
    scopes.iter().map(|scope| scope.as_str().to_owned()).collect()
}

impl From<ManageError> for Problem {
    fn from(error: ManageError) -> Self {
        use cvault_types::ErrorCode;
        match error {
            ManageError::NotFound => Self::new(ErrorCode::NotFound),
            ManageError::NoTenant => Self::new(ErrorCode::TenantSuspended),
            ManageError::TooMany => Self::validation()
                .detail(format!("This tenant has {MAX_KEYS} API keys, and may have no more. Revoke one."))
                .limit("api_keys", MAX_KEYS, MAX_KEYS),
            ManageError::Ambiguous => Self::validation().field(
                "/api_key_id",
                "required",
                "must name one of the tenant's keys, as there are several",
            ),
            ManageError::Db(error) => error.into(),
        }
    }
}
