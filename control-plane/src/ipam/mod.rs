//! Address pools. Allocation is one function in the database (`platform.allocate_address`): a free list claimed with
//! SKIP LOCKED, filled ahead of need with never-used numbers, so the last address is as quick to get as the first.
//!
//! Deliberately absent: any search for a free address in Rust, and any retry loop.

mod pools;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use cvault_types::{DeviceId, PoolId, ServerId};
use ipnet::IpNet;
use sqlx::PgPool;

use crate::db::DbError;
use crate::tasks;
use crate::tenancy::TenantTx;

pub use pools::{
    CreatePoolError, DeletePoolError, NewPool, Pool, PoolChange, create_pool, create_pool_noted, delete_pool, draw_ula,
    list_details, list_pools, update_pool,
};

/// A device's two addresses, derived from one host number of its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
}

/// Takes an address for a device that is being registered in the same transaction; `None` when the pool is exhausted.
///
/// # Errors
/// Those of the database.
pub async fn allocate(tx: &mut TenantTx, pool: PoolId, device: DeviceId) -> Result<Option<Addresses>, DbError> {
    let row = sqlx::query!(
        r#"select ipv4 as "ipv4!: IpNet", ipv6 as "ipv6!: IpNet" from platform.allocate_address($1, $2)"#,
        pool.uuid(),
        device.uuid()
    )
    .fetch_optional(tx.conn())
    .await?;
    row.map(|row| addresses(row.ipv4, row.ipv6)).transpose()
}

/// Gives a device that has no address one of the pool of `server`, which becomes its server; `None` when the pool is
/// exhausted.
///
/// # Errors
/// Those of the database.
pub async fn restore(tx: &mut TenantTx, device: DeviceId, server: ServerId) -> Result<Option<Addresses>, DbError> {
    let row = sqlx::query!(
        r#"select ipv4 as "ipv4!: IpNet", ipv6 as "ipv6!: IpNet" from platform.restore_address($1, $2)"#,
        device.uuid(),
        server.uuid()
    )
    .fetch_optional(tx.conn())
    .await?;
    row.map(|row| addresses(row.ipv4, row.ipv6)).transpose()
}

/// The two columns of a device or peer row.
///
/// # Errors
/// When a column holds an address of the other family, which the schema refuses.
pub(crate) fn addresses(ipv4: IpNet, ipv6: IpNet) -> Result<Addresses, DbError> {
    match (ipv4, ipv6) {
        (IpNet::V4(v4), IpNet::V6(v6)) => Ok(Addresses { ipv4: v4.addr(), ipv6: v6.addr() }),
        (IpNet::V4(_) | IpNet::V6(_), _) => {
            Err(DbError::Other(sqlx::Error::Decode("an address of the wrong family".into())))
        }
    }
}

/// Never-used numbers that wait in a pool's free list, of which up to a thousand may be gone when it is filled again: a burst
/// of so many registrations finds one each without waiting for another transaction.
const AHEAD: i32 = 8_192;
/// Portions of a pool in one run: more than `AHEAD` has.
const ROUNDS: usize = 12;

/// Makes never-used numbers of every pool free ahead of need; returns how many.
///
/// # Errors
/// Those of the database.
pub async fn open_ahead(sys: &PgPool) -> Result<u64, DbError> {
    let pools =
        sqlx::query_scalar!("select pool_id from platform.address_pools where deleted_at is null order by pool_id")
            .fetch_all(sys)
            .await?;
    let mut opened = 0;
    let mut wanting = pools;
    for _ in 0..ROUNDS {
        let mut more = Vec::new();
        for pool in wanting {
            let began = Instant::now();
            // a transaction each: a pool's row stays locked until COMMIT
            let made = sqlx::query_scalar!(r#"select platform.open_addresses($1, $2) as "made!""#, pool, AHEAD)
                .fetch_one(sys)
                .await?;
            opened += u64::try_from(made).unwrap_or_default();
            if made > 0 {
                more.push(pool);
                tasks::pause_after(began).await;
            }
        }
        wanting = more;
    }
    Ok(opened)
}

/// Ends the quarantine of every address whose time is over and whose removal every server has acknowledged that ever
/// ran its device; returns how many became free.
///
/// # Errors
/// Those of the database.
pub async fn free_quarantined(sys: &PgPool) -> Result<u64, DbError> {
    let done = sqlx::query!(
        // another replica may be at the same rows
        "with rested as (
             select a.pool_id, a.host
             from platform.addresses a
             join platform.address_pools p on p.pool_id = a.pool_id
             where a.state = 'quarantine'
               and a.released_at + make_interval(secs => p.quarantine_seconds) <= now()
               and not exists (
                   select from platform.peers r join platform.servers s on s.server_id = r.server_id
                   where r.device_id = a.released_device_id and s.status <> 'removed'
                     -- a device that is there again came with another address: what told of that took this one away
                     and coalesce(r.removed_revision, r.generation) > s.acked_revision)
             for update of a skip locked
         )
         update platform.addresses a set state = 'free', released_device_id = null
         from rested
         where a.pool_id = rested.pool_id and a.host = rested.host"
    )
    .execute(sys)
    .await?;
    Ok(done.rows_affected())
}
