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

use super::platform::secret_aad;
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
}

/// What is wrapped with one version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    pub version: i16,
    pub data_keys: i64,
    pub secrets: i64,
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
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Why the key ring is not the one of this database.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error(
        "version {version} of the key-encryption key is missing, and {data_keys} tenants need it: give it too, in \
         CVAULT_KEK_FILE, until `admin keys rotate` has finished"
    )]
    Missing { version: i16, data_keys: i64 },
    #[error("what the key-encryption keys wrap cannot be looked up")]
    Db(#[from] DbError),
}

/// What each version wraps, ascending.
///
/// # Errors
/// Those of the database.
pub async fn in_use(sys: &PgPool) -> Result<Vec<InUse>, DbError> {
    let rows = sqlx::query!(
        r#"select version as "version!", sum(data_keys)::bigint as "data_keys!", sum(secrets)::bigint as "secrets!"
           from (select data_key_version as version, count(*) as data_keys, 0 as secrets
                 from cvault.tenants where data_key_sealed is not null group by 1
                 union all
                 select kek_version, 0, count(*) from platform.secrets group by 1) as used
           group by version order by version"#
    )
    .fetch_all(sys)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| InUse { version: row.version, data_keys: row.data_keys, secrets: row.secrets })
        .collect())
}

/// Whether every data key can be opened, by its version: a process that could serve only some tenants must not start.
///
/// # Errors
/// [`RingError::Missing`] names the version.
pub async fn check(sys: &PgPool, keys: &KeyRing) -> Result<(), RingError> {
    let missing = in_use(sys).await?.into_iter().find(|used| !keys.known().any(|known| known == used.version));
    match missing {
        Some(InUse { version, data_keys, .. }) => Err(RingError::Missing { version, data_keys }),
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
        let batch = older(&app.db.sys, app.keys.version(), after).await?;
        let Some(last) = batch.last() else { break };
        after = last.uuid();
        for tenant in batch {
            match rotate_tenant(app, tenant, actor).await {
                Ok(changed) => data_keys += u64::from(changed),
                Err(TenantKeyError::Key(error)) => {
                    tracing::error!(%tenant, %error, "a data key does not open");
                    closed.push(tenant);
                }
                Err(TenantKeyError::Db(error)) => return Err(error.into()),
            }
        }
    }
    tracing::info!(
        version = app.keys.version(),
        data_keys,
        secrets,
        failed = closed.len(),
        actor,
        "keys were wrapped anew"
    );
    if closed.is_empty() {
        return Ok(Rotated { data_keys, secrets });
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

async fn older(sys: &PgPool, version: i16, after: Uuid) -> Result<Vec<TenantId>, DbError> {
    let rows = sqlx::query_scalar!(
        "select tenant_id from cvault.tenants
         where data_key_sealed is not null and data_key_version <> $1 and tenant_id > $2
         order by tenant_id limit $3",
        version,
        after,
        BATCH
    )
    .fetch_all(sys)
    .await?;
    Ok(rows.into_iter().map(TenantId::from_uuid).collect())
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
mod tests {
    use std::time::Duration;

    use zeroize::Zeroizing;

    use super::*;
    use crate::config::{Config, Overrides};
    use crate::serve::{self, StartError};
    use crate::testing::{World, eventually};

    fn ring(versions: &[(i16, u8)]) -> KeyRing {
        KeyRing::versions(versions.iter().map(|(version, byte)| (*version, Zeroizing::new([*byte; 32])))).unwrap()
    }

    const OLD: (i16, u8) = (1, 7);
    const NEW: (i16, u8) = (2, 8);

    async fn open(world: &World, versions: &[(i16, u8)]) -> Result<App, StartError> {
        let config = Config::from_env(&|_| None, &Overrides::default()).unwrap();
        serve::open(config, &world.database.config(), ring(versions)).await
    }

    async fn data_keys(world: &World) -> Vec<(i16, i64)> {
        in_use(&world.app.db.sys).await.unwrap().iter().map(|used| (used.version, used.data_keys)).collect()
    }

    /// What each device's configuration holds, read with the keys of `app`.
    async fn private_key(app: &App, person: crate::testing::Person, device: cvault_types::DeviceId) -> Vec<u8> {
        let mut tx = app.db.tenancy.begin(person.tenant).await.unwrap();
        let keys = crate::devices::config_of(&mut tx, &app.keys, device).await.unwrap();
        match keys.private {
            crate::devices::ConfigKey::Known(key) => key.to_vec(),
            crate::devices::ConfigKey::OnlyAtTheClient => panic!("the server made this key"),
        }
    }

    #[tokio::test]
    async fn a_rotation_cut_off_in_the_middle_is_finished_by_the_next_and_the_old_key_is_not_needed_any_more() {
        let (world, _) = World::with_server().await;
        let mut people = Vec::new();
        for _ in 0..9 {
            let person = world.person().await;
            let device = world.register(person, "d").await.unwrap().id;
            let key = private_key(&world.app, person, device).await;
            people.push((person, device, key));
        }
        people.sort_by_key(|(person, ..)| person.tenant);
        let both = open(&world, &[OLD, NEW]).await.unwrap();
        // the fifth tenant is held, so that the rotation is cut off there
        let mut holder = world.superuser().await;
        sqlx::raw_sql("begin").execute(&mut holder).await.unwrap();
        sqlx::query("select from cvault.tenants where tenant_id = $1 for update")
            .bind(people[4].0.tenant.uuid())
            .execute(&mut holder)
            .await
            .unwrap();
        let cut_off = tokio::spawn({
            let both = both.clone();
            async move { rotate(&both, "cli").await }
        });
        eventually("four are done", Duration::from_secs(20), async || data_keys(&world).await == [(1, 5), (2, 4)])
            .await;
        cut_off.abort();
        assert!(cut_off.await.unwrap_err().is_cancelled());
        sqlx::raw_sql("rollback").execute(&mut holder).await.unwrap();
        assert_eq!(data_keys(&world).await, [(1, 5), (2, 4)]);
        for (person, device, key) in &people {
            assert_eq!(&private_key(&both, *person, *device).await, key);
        }
        assert!(matches!(
            open(&world, &[NEW]).await,
            Err(StartError::Keys(RingError::Missing { version: 1, data_keys: 5 }))
        ));
        assert_eq!(rotate(&both, "cli").await.unwrap(), Rotated { data_keys: 5, secrets: 0 });
        assert_eq!(rotate(&both, "cli").await.unwrap(), Rotated { data_keys: 0, secrets: 0 });
        let new = open(&world, &[NEW]).await.unwrap();
        assert_eq!(new.secrets.pepper, both.secrets.pepper);
        for (person, device, key) in &people {
            assert_eq!(&private_key(&new, *person, *device).await, key);
        }
        let noted: i64 = sqlx::query_scalar("select count(*) from cvault.audit_log where action = 'tenant.rewrap_key'")
            .fetch_one(&mut holder)
            .await
            .unwrap();
        assert_eq!(noted, 9);
        assert!(matches!(open(&world, &[OLD]).await, Err(StartError::Secrets(_))));
    }

    #[tokio::test]
    async fn a_key_that_does_not_open_is_named_and_does_not_keep_the_others() {
        let world = World::new().await;
        let (broken, whole) = (world.person().await, world.person().await);
        sqlx::query("update cvault.tenants set data_key_sealed = $2 where tenant_id = $1")
            .bind(broken.tenant.uuid())
            .bind(ring(&[(1, 99)]).new_data_key(broken.tenant, &mut rand::rng()).sealed)
            .execute(&mut world.superuser().await)
            .await
            .unwrap();
        let both = open(&world, &[OLD, NEW]).await.unwrap();
        match rotate(&both, "cli").await {
            Err(RotateError::DoNotOpen { count: 1, named }) => assert_eq!(named, broken.tenant.to_string()),
            other => panic!("{other:?}"),
        }
        assert_eq!(data_keys(&world).await, [(1, 1), (2, 1)]);
        let sealed: Vec<u8> = sqlx::query_scalar("select data_key_sealed from cvault.tenants where tenant_id = $1")
            .bind(whole.tenant.uuid())
            .fetch_one(&mut world.superuser().await)
            .await
            .unwrap();
        assert!(ring(&[NEW]).rewrap(whole.tenant, &sealed).is_ok());
    }
}
