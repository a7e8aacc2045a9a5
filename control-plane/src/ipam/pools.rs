//! Pools: prefixes that servers share and devices get their addresses from.

use cvault_types::PoolId;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand::CryptoRng;
use serde_json::json;
use sqlx::{PgExecutor, PgPool};
use std::net::Ipv6Addr;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::audit;
use crate::db::{DbError, Tx};
use crate::tenants::Actor;
use crate::text::misleads;

/// What an administrator says of a new pool.
#[derive(Clone, Debug)]
pub struct NewPool {
    pub name: String,
    pub ipv4: Ipv4Net,
    pub ipv6: Ipv6Net,
    /// How long a released address rests after the server has acknowledged the removal at the latest.
    pub quarantine_seconds: u32,
    /// Whether a device that disconnects gives its address back.
    pub reclaim: bool,
}

/// What an administrator changes of a pool; absent: stays.
#[derive(Clone, Debug, Default)]
pub struct PoolChange {
    pub name: Option<String>,
    pub quarantine_seconds: Option<u32>,
    pub reclaim: Option<bool>,
}

/// A pool as administrators see it.
#[derive(Clone, Debug)]
pub struct Pool {
    pub id: PoolId,
    pub name: String,
    pub ipv4: Ipv4Net,
    pub ipv6: Ipv6Net,
    pub quarantine_seconds: u32,
    pub reclaim: bool,
    /// Servers that share it.
    pub servers: u32,
    /// Addresses that devices hold.
    pub allocated: u64,
    /// Addresses that rest after a release.
    pub quarantined: u64,
    /// Addresses a pool of this size can hand out in all.
    pub size: u64,
    pub created_at: OffsetDateTime,
}

#[derive(Debug, thiserror::Error)]
pub enum CreatePoolError {
    #[error("a pool named {0:?} exists already")]
    NameTaken(String),
    #[error("the {family} prefix overlaps that of another pool")]
    Overlap { family: &'static str },
    #[error("{detail}")]
    Unusable { field: &'static str, detail: &'static str },
    #[error(transparent)]
    Db(#[from] DbError),
}

#[derive(Debug, thiserror::Error)]
pub enum DeletePoolError {
    #[error("there is no such pool")]
    NotFound,
    #[error("{0} servers share this pool: remove them first")]
    HasServers(i64),
    #[error(
        "{0} addresses of this pool are held or rest: delete their devices, and wait for the end of the quarantine"
    )]
    HasAddresses(i64),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// A `/64` of the unique local addresses, as RFC 4193 §3.2 draws it.
#[must_use]
pub fn draw_ula(rng: &mut impl CryptoRng) -> Ipv6Net {
    let mut bytes = [0; 16];
    bytes[0] = 0xfd;
    rng.fill_bytes(&mut bytes[1..6]);
    Ipv6Net::new(Ipv6Addr::from(bytes), 64).expect("64 is a prefix length of IPv6")
}

/// Creates a pool.
///
/// # Errors
/// By variant; nothing is changed then.
pub async fn create_pool(sys: impl PgExecutor<'_>, pool: &NewPool) -> Result<PoolId, CreatePoolError> {
    check(pool)?;
    let id = PoolId::from_uuid(Uuid::now_v7());
    sqlx::query!(
        "insert into platform.address_pools (pool_id, name, ipv4, ipv6, quarantine_seconds, reclaim)
         values ($1, $2, $3::inet::cidr, $4::inet::cidr, $5, $6)",
        id.uuid(),
        pool.name,
        IpNet::V4(pool.ipv4),
        IpNet::V6(pool.ipv6),
        i32::try_from(pool.quarantine_seconds).unwrap_or(i32::MAX),
        pool.reclaim,
    )
    .execute(sys)
    .await
    .map_err(|error| refused(error, &pool.name))?;
    Ok(id)
}

/// As [`create_pool`], with its entry in the audit log.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn create_pool_noted(tx: &mut Tx, pool: &NewPool, actor: &Actor) -> Result<PoolId, CreatePoolError> {
    let id = create_pool(tx.conn(), pool).await?;
    let details = json!({"name": pool.name, "ipv4": pool.ipv4, "ipv6": pool.ipv6,
                         "quarantine_seconds": pool.quarantine_seconds, "reclaim": pool.reclaim});
    note(tx, actor, "pool.create", id, details).await?;
    Ok(id)
}

/// Changes a pool; `false` when there is no such pool.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn update_pool(tx: &mut Tx, id: PoolId, change: PoolChange, actor: &Actor) -> Result<bool, CreatePoolError> {
    if let Some(name) = &change.name {
        check_name(name)?;
    }
    let done = sqlx::query!(
        "update platform.address_pools
         set name = coalesce($2, name), quarantine_seconds = coalesce($3, quarantine_seconds),
             reclaim = coalesce($4, reclaim)
         where pool_id = $1 and deleted_at is null",
        id.uuid(),
        change.name,
        change.quarantine_seconds.map(|seconds| i32::try_from(seconds).unwrap_or(i32::MAX)),
        change.reclaim,
    )
    .execute(tx.conn())
    .await
    .map_err(|error| refused(error, change.name.as_deref().unwrap_or_default()))?;
    let details = json!({"name": change.name, "quarantine_seconds": change.quarantine_seconds,
                         "reclaim": change.reclaim});
    note(tx, actor, "pool.update", id, details).await?;
    Ok(done.rows_affected() == 1)
}

/// Deletes a pool that no server shares and of which no address is held or rests. Its prefixes may be used again.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn delete_pool(tx: &mut Tx, id: PoolId, now: OffsetDateTime, actor: &Actor) -> Result<(), DeletePoolError> {
    note(tx, actor, "pool.delete", id, json!({})).await?;
    // `for update`: a server that is being created for it holds the row, or waits for it
    sqlx::query!(
        "select pool_id from platform.address_pools where pool_id = $1 and deleted_at is null for update",
        id.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(DeletePoolError::NotFound)?;
    let in_use = sqlx::query!(
        r#"select (select count(*) from platform.servers where pool_id = $1 and status <> 'removed') as "servers!",
                  (select count(*) from platform.addresses where pool_id = $1 and state <> 'free') as "addresses!""#,
        id.uuid()
    )
    .fetch_one(tx.conn())
    .await
    .map_err(DbError::from)?;
    if in_use.servers > 0 {
        return Err(DeletePoolError::HasServers(in_use.servers));
    }
    if in_use.addresses > 0 {
        return Err(DeletePoolError::HasAddresses(in_use.addresses));
    }
    sqlx::query!("delete from platform.addresses where pool_id = $1", id.uuid())
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    sqlx::query!("update platform.address_pools set deleted_at = $2 where pool_id = $1", id.uuid(), now)
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    Ok(())
}

fn refused(error: sqlx::Error, name: &str) -> CreatePoolError {
    let error = DbError::from(error);
    match error.constraint() {
        Some("address_pools_name_unique") => CreatePoolError::NameTaken(name.to_owned()),
        Some("address_pools_ipv4_overlap") => CreatePoolError::Overlap { family: "IPv4" },
        Some("address_pools_ipv6_overlap") => CreatePoolError::Overlap { family: "IPv6" },
        Some("address_pools_quarantine") => CreatePoolError::Unusable {
            field: "quarantine_seconds",
            detail: "the quarantine must be 0 to 604800 seconds",
        },
        Some(_) | None => error.into(),
    }
}

fn check_name(name: &str) -> Result<(), CreatePoolError> {
    if !(1..=64).contains(&name.chars().count()) || name.trim() != name || misleads(name) {
        let detail = "the name of a pool has 1 to 64 printable characters and no space around it";
        return Err(CreatePoolError::Unusable { field: "name", detail });
    }
    Ok(())
}

fn check(pool: &NewPool) -> Result<(), CreatePoolError> {
    let unusable = |field, detail| Err(CreatePoolError::Unusable { field, detail });
    check_name(&pool.name)?;
    if pool.ipv4.trunc() != pool.ipv4 {
        return unusable("ipv4", "the prefixes of a pool must have no host bits set");
    }
    if pool.ipv6.trunc() != pool.ipv6 {
        return unusable("ipv6", "the prefixes of a pool must have no host bits set");
    }
    if !(8..=29).contains(&pool.ipv4.prefix_len()) {
        return unusable("ipv4", "the IPv4 prefix of a pool must be /8 to /29");
    }
    if !(48..=96).contains(&pool.ipv6.prefix_len()) {
        return unusable("ipv6", "the IPv6 prefix of a pool must be /48 to /96");
    }
    Ok(())
}

/// Up to `limit` pools after `after`, oldest first; or the one with the id `only`.
///
/// # Errors
/// Those of the database.
pub async fn list_details(
    sys: impl PgExecutor<'_>,
    only: Option<PoolId>,
    after: Option<PoolId>,
    limit: i64,
) -> Result<Vec<Pool>, DbError> {
    let rows = sqlx::query!(
        // what is neither free nor resting is held: counting the held ones themselves would read every row of a /10
        r#"select p.pool_id, p.name, p.ipv4::inet as "ipv4!: IpNet", p.ipv6::inet as "ipv6!: IpNet", p.quarantine_seconds,
                  p.reclaim, p.created_at, p.next_host - 2 as "opened!",
                  (select count(*) from platform.servers s where s.pool_id = p.pool_id and s.status <> 'removed') as "servers!",
                  (select count(*) from platform.addresses a where a.pool_id = p.pool_id and a.state = 'free') as "free!",
                  (select count(*) from platform.addresses a where a.pool_id = p.pool_id and a.state = 'quarantine')
                      as "quarantined!"
           from platform.address_pools p
           where p.deleted_at is null and p.pool_id > $1 and ($2::uuid is null or p.pool_id = $2)
           order by p.pool_id limit $3"#,
        after.map_or(Uuid::nil(), PoolId::uuid),
        only.map(PoolId::uuid),
        limit
    )
    .fetch_all(sys)
    .await?;
    Ok(rows
        .into_iter()
        .filter_map(|row| match (row.ipv4, row.ipv6) {
            (IpNet::V4(ipv4), IpNet::V6(ipv6)) => Some(Pool {
                id: PoolId::from_uuid(row.pool_id),
                name: row.name,
                ipv4,
                ipv6,
                quarantine_seconds: u32::try_from(row.quarantine_seconds).unwrap_or_default(),
                reclaim: row.reclaim,
                servers: u32::try_from(row.servers).unwrap_or_default(),
                allocated: u64::try_from(row.opened - row.free - row.quarantined).unwrap_or_default(),
                quarantined: u64::try_from(row.quarantined).unwrap_or_default(),
                // network, broadcast and the servers' own address are never handed out
                size: (1 << (32 - ipv4.prefix_len())) - 3,
                created_at: row.created_at,
            }),
            (IpNet::V4(_) | IpNet::V6(_), _) => None,
        })
        .collect())
}

/// All pools, by name.
///
/// # Errors
/// Those of the database.
pub async fn list_pools(sys: &PgPool) -> Result<Vec<Pool>, DbError> {
    let mut pools = list_details(sys, None, None, i64::MAX).await?;
    pools.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(pools)
}

async fn note(
    tx: &mut Tx,
    actor: &Actor,
    action: &'static str,
    id: PoolId,
    details: serde_json::Value,
) -> Result<(), DbError> {
    let target = id.to_string();
    let entry = audit::Entry { actor: &actor.name, action, target: &target, details, request_id: actor.request_id };
    audit::record_platform(tx.conn(), entry).await
}
