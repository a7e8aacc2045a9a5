//! Putting a new key-encryption key in the place of an old one: what it wraps is wrapped anew, and no row of a tenant is
//! rewritten, because rows are sealed with the tenant's data key, which stays.
//!
//! Each data key is changed in its own transaction, with an entry in the tenant's audit log. An interrupted rotation leaves
//! some keys wrapped with the old and some with the new one; whoever has both can open all, and the next rotation goes on
//! with what is left.

use cvault_types::TenantId;
use serde_json::json;
use sqlx::PgPool;
use uuid::Uuid;

use super::platform::{kept_answer_aad, secret_aad};
use super::{KeyError, KeyRing};
use crate::app::App;
use crate::audit;
use crate::db::{DbError, Tx};

/// Tenants looked up at once.
const BATCH: i64 = 500;
/// Named in the error; the log names all.
const NAMED: usize = 10;

/// What was wrapped anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotated {
    pub data_keys: u64,
    pub secrets: u64,
    /// Of platform staff's requests; see `http::staff`.
    pub answers: u64,
}

/// What is wrapped with one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    pub version: i16,
    pub data_keys: i64,
    pub secrets: i64,
    pub answers: i64,
}

#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error(
        "{count} data keys do not open with any key-encryption key that was given (tenants {named}); all others are \
         wrapped with the newest one. Keep every old key until this is mended"
    )]
    DoNotOpen { count: usize, named: String },
    #[error("the secret {name} of the installation does not open; nothing was changed")]
    Secret { name: String, source: KeyError },
    #[error(
        "the answer kept for an Idempotency-Key of {principal} does not open, and none of them was changed. Keep every \
         old key until it is forgotten, a day after it was made"
    )]
    Answer { principal: String, source: KeyError },
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Why the key ring is not the one of this database.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error(
        "version {version} of the key-encryption key is missing, and {data_keys} tenants and {secrets} secrets of the \
         installation need it: give it too, in CVAULT_KEK_FILE, until `admin keys rotate` has finished"
    )]
    Missing { version: i16, data_keys: i64, secrets: i64 },
    #[error("what the key-encryption keys wrap cannot be looked up")]
    Db(#[from] DbError),
}

/// What each version wraps, ascending.
///
/// # Errors
/// Those of the database.
pub async fn in_use(sys: &PgPool) -> Result<Vec<InUse>, DbError> {
    let rows = sqlx::query!(
        r#"select version as "version!", sum(data_keys)::bigint as "data_keys!", sum(secrets)::bigint as "secrets!",
               sum(answers)::bigint as "answers!"
           from (select data_key_version as version, count(*) as data_keys, 0 as secrets, 0 as answers
                 from cvault.tenants where data_key_sealed is not null group by 1
                 union all
                 select kek_version, 0, count(*), 0 from platform.secrets group by 1
                 union all
                 select kek_version, 0, 0, count(*) from platform.idempotency_keys
                 where kek_version is not null and created_at >= now() - interval '24 hours' group by 1) as used
           group by version order by version"#
    )
    .fetch_all(sys)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| InUse { version: row.version, data_keys: row.data_keys, secrets: row.secrets, answers: row.answers })
        .collect())
}

/// Whether every data key can be opened, by its version: a process that could serve only some tenants must not start. One
/// that cannot repeat an answer of today may.
///
/// # Errors
/// [`RingError::Missing`] names the version.
pub async fn check(sys: &PgPool, keys: &KeyRing) -> Result<(), RingError> {
    let needed = in_use(sys).await?.into_iter().filter(|used| used.data_keys + used.secrets > 0);
    match { needed }.find(|used| !keys.known().any(|known| known == used.version)) {
        Some(InUse { version, data_keys, secrets, .. }) => Err(RingError::Missing { version, data_keys, secrets }),
        None => Ok(()),
    }
}

/// Wraps everything with the newest key of the ring. Cancelled or killed at any point, it may be called again.
///
/// # Errors
/// [`RotateError::DoNotOpen`] after all that do open were changed: the old keys must stay.
pub async fn rotate(app: &App, actor: &str) -> Result<Rotated, RotateError> {
    let secrets = rotate_secrets(app).await?;
    let (mut data_keys, mut closed, mut after) = (0, Vec::new(), Uuid::nil());
    loop {
        let batch = data_keys_after(&app.db.sys, after).await?;
        let Some(last) = batch.last() else { break };
        after = last.tenant.uuid();
        for key in batch {
            // also those that need nothing: who is told that all is well takes the old key away
            let outcome = if key.version == app.keys.version() {
                app.keys.opens(key.tenant, &key.sealed).map(|()| false).map_err(TenantKeyError::Key)
            } else {
                rotate_tenant(app, key.tenant, actor).await
            };
            match outcome {
                Ok(changed) => data_keys += u64::from(changed),
                Err(TenantKeyError::Key(error)) => {
                    tracing::error!(tenant = %key.tenant, %error, "a data key does not open");
                    closed.push(key.tenant);
                }
                Err(TenantKeyError::Db(error)) => return Err(error.into()),
            }
        }
    }
    // last, because what is wrong with one of them keeps no tenant's key
    let answers = rotate_answers(app).await;
    tracing::info!(
        version = app.keys.version(),
        data_keys,
        secrets,
        answers = answers.as_ref().ok(),
        failed = closed.len(),
        actor,
        "keys were wrapped anew"
    );
    if closed.is_empty() {
        return Ok(Rotated { data_keys, secrets, answers: answers? });
    }
    let named: Vec<String> = closed.iter().take(NAMED).map(ToString::to_string).collect();
    Err(RotateError::DoNotOpen { count: closed.len(), named: named.join(", ") })
}

/// All of the installation's own secrets, or none.
async fn rotate_secrets(app: &App) -> Result<u64, RotateError> {
    let mut tx = Tx::begin(&app.db.sys).await?;
    let work = rewrap_secrets(&mut tx, &app.keys).await;
    tx.finish(work).await
}

async fn rewrap_secrets(tx: &mut Tx, keys: &KeyRing) -> Result<u64, RotateError> {
    let rows = sqlx::query!(
        "select name, sealed from platform.secrets where kek_version <> $1 order by name for update",
        keys.version()
    )
    .fetch_all(tx.conn())
    .await
    .map_err(DbError::from)?;
    let count = rows.len() as u64;
    for row in rows {
        let sealed = keys
            .rewrap_at(&secret_aad(&row.name), &row.sealed)
            .map_err(|source| RotateError::Secret { name: row.name.clone(), source })?;
        sqlx::query!(
            "update platform.secrets set sealed = $2, kek_version = $3 where name = $1",
            row.name,
            sealed,
            keys.version()
        )
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    }
    Ok(count)
}

/// All that are kept for platform staff, or none. Those of tenants are sealed with the tenant's data key.
async fn rotate_answers(app: &App) -> Result<u64, RotateError> {
    let mut tx = Tx::begin(&app.db.sys).await?;
    let work = rewrap_answers(&mut tx, &app.keys).await;
    tx.finish(work).await
}

async fn rewrap_answers(tx: &mut Tx, keys: &KeyRing) -> Result<u64, RotateError> {
    let rows = sqlx::query!(
        r#"select principal, key, response_sealed as "response_sealed!" from platform.idempotency_keys
           where kek_version <> $1 and created_at >= now() - interval '24 hours' order by principal, key for update"#,
        keys.version()
    )
    .fetch_all(tx.conn())
    .await
    .map_err(DbError::from)?;
    let count = rows.len() as u64;
    for row in rows {
        let sealed = keys
            .rewrap_at(&kept_answer_aad(&row.principal, &row.key), &row.response_sealed)
            .map_err(|source| RotateError::Answer { principal: row.principal.clone(), source })?;
        sqlx::query!(
            "update platform.idempotency_keys set response_sealed = $3, kek_version = $4
             where principal = $1 and key = $2",
            row.principal,
            row.key,
            sealed,
            keys.version()
        )
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    }
    Ok(count)
}

struct DataKey {
    tenant: TenantId,
    version: i16,
    sealed: Vec<u8>,
}

async fn data_keys_after(sys: &PgPool, after: Uuid) -> Result<Vec<DataKey>, DbError> {
    let rows = sqlx::query!(
        r#"select tenant_id, data_key_version, data_key_sealed as "data_key_sealed!" from cvault.tenants
           where data_key_sealed is not null and tenant_id > $1 order by tenant_id limit $2"#,
        after,
        BATCH
    )
    .fetch_all(sys)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| DataKey {
            tenant: TenantId::from_uuid(row.tenant_id),
            version: row.data_key_version,
            sealed: row.data_key_sealed,
        })
        .collect())
}

enum TenantKeyError {
    Key(KeyError),
    Db(DbError),
}

impl From<DbError> for TenantKeyError {
    fn from(error: DbError) -> Self {
        Self::Db(error)
    }
}

/// `false` when there is nothing to do any more: deleted, or done by another.
async fn rotate_tenant(app: &App, tenant: TenantId, actor: &str) -> Result<bool, TenantKeyError> {
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let work = async {
        let row = sqlx::query!(
            "select data_key_version, data_key_sealed from cvault.tenants where tenant_id = $1 for no key update",
            tenant.uuid()
        )
        .fetch_one(tx.conn())
        .await
        .map_err(DbError::from)?;
        let Some(sealed) = row.data_key_sealed.filter(|_| row.data_key_version != app.keys.version()) else {
            return Ok(false);
        };
        let rewrapped = app.keys.rewrap(tenant, &sealed).map_err(TenantKeyError::Key)?;
        sqlx::query!(
            "update cvault.tenants set data_key_sealed = $2, data_key_version = $3 where tenant_id = $1",
            tenant.uuid(),
            rewrapped.sealed,
            rewrapped.kek_version
        )
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
        let target = tenant.to_string();
        let details = json!({"from_version": row.data_key_version, "to_version": rewrapped.kek_version});
        let entry = audit::Entry { actor, action: "tenant.rewrap_key", target: &target, details, request_id: None };
        audit::record(&mut tx, entry).await?;
        Ok(true)
    }
    .await;
    tx.finish(work).await
}

#[cfg(test)]
mod tests;
