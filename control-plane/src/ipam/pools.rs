//! Pools: prefixes that servers share and devices get their addresses from.

use cvault_types::PoolId;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sqlx::PgPool;
use uuid::Uuid;

use crate::db::DbError;

/// What an administrator says of a new pool.
#[derive(Clone, Debug)]
pub struct NewPool {
    pub name: String,
    pub ipv4: Ipv4Net,
    pub ipv6: Ipv6Net,
    /// How long a released address rests after the server has acknowledged the removal at the latest.
    pub quarantine_seconds: u32,
}

/// A pool as administrators see it.
#[derive(Clone, Debug)]
pub struct Pool {
    pub id: PoolId,
    pub name: String,
    pub ipv4: Ipv4Net,
    pub ipv6: Ipv6Net,
    pub quarantine_seconds: u32,
    /// Addresses that devices hold.
    pub allocated: u64,
    /// Addresses that rest after a release.
    pub quarantined: u64,
    /// Addresses a pool of this size can hand out in all.
    pub size: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CreatePoolError {
    #[error("a pool named {0:?} exists already")]
    NameTaken(String),
    #[error("the prefixes overlap those of another pool")]
    Overlap,
    #[error("{0}")]
    Unusable(&'static str),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Creates a pool.
///
/// # Errors
/// By variant; nothing is changed then.
pub async fn create_pool(sys: &PgPool, pool: &NewPool) -> Result<PoolId, CreatePoolError> {
    check(pool)?;
    let id = PoolId::from_uuid(Uuid::now_v7());
    let made = sqlx::query!(
        "insert into platform.address_pools (pool_id, name, ipv4, ipv6, quarantine_seconds)
         values ($1, $2, $3::inet::cidr, $4::inet::cidr, $5)",
        id.uuid(),
        pool.name,
        IpNet::V4(pool.ipv4),
        IpNet::V6(pool.ipv6),
        i32::try_from(pool.quarantine_seconds).unwrap_or(i32::MAX),
    )
    .execute(sys)
    .await
    .map_err(DbError::from);
    match made {
        Ok(_) => Ok(id),
        Err(DbError::Constraint { name }) => Err(match name.as_str() {
            "address_pools_name_unique" => CreatePoolError::NameTaken(pool.name.clone()),
            "address_pools_ipv4_overlap" | "address_pools_ipv6_overlap" => CreatePoolError::Overlap,
            "address_pools_quarantine" => CreatePoolError::Unusable("the quarantine must be 0 to 604800 seconds"),
            _ => DbError::Constraint { name }.into(),
        }),
        Err(error) => Err(error.into()),
    }
}

fn check(pool: &NewPool) -> Result<(), CreatePoolError> {
    let unusable = |fault| Err(CreatePoolError::Unusable(fault));
    if pool.name.is_empty() || pool.name.chars().count() > 64 || pool.name.chars().any(char::is_control) {
        return unusable("the name of a pool has 1 to 64 printable characters");
    }
    if pool.ipv4.trunc() != pool.ipv4 || pool.ipv6.trunc() != pool.ipv6 {
        return unusable("the prefixes of a pool must have no host bits set");
    }
    if !(8..=29).contains(&pool.ipv4.prefix_len()) {
        return unusable("the IPv4 prefix of a pool must be /8 to /29");
    }
    if !(48..=96).contains(&pool.ipv6.prefix_len()) {
        return unusable("the IPv6 prefix of a pool must be /48 to /96");
    }
    Ok(())
}

/// All pools, by name.
///
/// # Errors
/// Those of the database.
pub async fn list_pools(sys: &PgPool) -> Result<Vec<Pool>, DbError> {
    let rows = sqlx::query!(
        r#"select p.pool_id, p.name, p.ipv4::inet as "ipv4!: IpNet", p.ipv6::inet as "ipv6!: IpNet", p.quarantine_seconds,
                  count(*) filter (where a.state = 'allocated') as "allocated!",
                  count(*) filter (where a.state = 'quarantine') as "quarantined!"
           from platform.address_pools p left join platform.addresses a using (pool_id)
           group by p.pool_id order by p.name"#
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
                allocated: u64::try_from(row.allocated).unwrap_or_default(),
                quarantined: u64::try_from(row.quarantined).unwrap_or_default(),
                // network, broadcast and the servers' own address are never handed out
                size: (1 << (32 - ipv4.prefix_len())) - 3,
            }),
            (IpNet::V4(_) | IpNet::V6(_), _) => None,
        })
        .collect())
}
