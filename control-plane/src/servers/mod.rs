//! Servers: the shared infrastructure tenants' devices connect through. Administrators create and remove them; tenants
//! see region, load and whether they take devices.
//!
//! Deliberately absent: what a server should run (`desired/`) and the link to its agent (`nodes/`).

mod admin;
mod enrol;
mod listing;

use std::net::IpAddr;

use cvault_types::{PoolId, ServerId};
use ipnet::IpNet;
use sqlx::PgConnection;
use time::OffsetDateTime;

use crate::db::DbError;
use crate::tenancy::TenantTx;

pub use admin::{
    CreateServerError, NewServer, Removal, RemoveServerError, ServerDetails, ServerFilter, create_server,
    create_with_token, list_all, list_details, parse_status, remove_server, renew_token, set_status,
};
pub use enrol::{EnrolError, Enrolled, TOKEN_LIFETIME_SECONDS, consume_token, enrol_command, issue_token};
pub use listing::Listing;

/// An agent reports every few seconds; after this long without a word its server gets no new devices.
pub const SILENT_AFTER_SECONDS: i64 = 90;

/// An agent goes on without the control plane, so that a shorter silence is no reason to move anybody who has not asked.
const LOST_AFTER_SECONDS: i64 = 15 * 60;

/// What a tenant may know of a server.
#[derive(Clone, Debug)]
pub struct Server {
    pub id: ServerId,
    pub name: String,
    pub region: String,
    pub public_ip: IpAddr,
    pub endpoint_port: u16,
    /// `None` until the server has enrolled.
    pub public_key: Option<[u8; 32]>,
    pub pool: PoolId,
    pub capacity: u32,
    pub peers: u32,
    pub active: bool,
    pub last_seen_at: Option<OffsetDateTime>,
    pub acked_revision: u64,
}

impl Server {
    /// Percent of the capacity in use, rounded down.
    #[must_use]
    pub fn load_percent(&self) -> u8 {
        let percent = u64::from(self.peers) * 100 / u64::from(self.capacity.max(1));
        u8::try_from(percent.min(100)).expect("at most 100")
    }

    /// Millionths of the capacity in use: what placement compares.
    #[must_use]
    pub fn load(&self) -> u64 {
        u64::from(self.peers) * 1_000_000 / u64::from(self.capacity.max(1))
    }

    /// Whether the devices it has are served, new ones or not.
    #[must_use]
    pub fn works(&self, now: OffsetDateTime) -> bool {
        let seen = self.last_seen_at.is_some_and(|at| (now - at).whole_seconds() < SILENT_AFTER_SECONDS);
        self.public_key.is_some() && seen
    }

    /// Whether a new device may be placed here.
    #[must_use]
    pub fn takes_devices(&self, now: OffsetDateTime) -> bool {
        self.has_room() && self.works(now)
    }

    /// Whether it has said nothing for so long that its devices are better off elsewhere, even unasked.
    #[must_use]
    pub fn is_lost(&self, now: OffsetDateTime) -> bool {
        self.last_seen_at.is_none_or(|at| (now - at).whole_seconds() >= LOST_AFTER_SECONDS)
    }

    /// Whether it may have one more device, working or not.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.active && self.peers < self.capacity
    }
}

/// All servers that were not removed, by region and name. They are no tenant's: `tx` need not have begun.
///
/// # Errors
/// Those of the database.
pub async fn list(tx: &mut TenantTx) -> Result<Vec<Server>, DbError> {
    read(tx.conn()).await
}

async fn read(conn: &mut PgConnection) -> Result<Vec<Server>, DbError> {
    let rows = sqlx::query!(
        r#"select server_id as "server_id!", name as "name!", region as "region!", public_ip as "public_ip!: IpNet",
                  endpoint_port as "endpoint_port!", public_key, pool_id as "pool_id!", capacity as "capacity!",
                  peer_count as "peer_count!", status as "status!", enrolled as "enrolled!", last_seen_at,
                  acked_revision as "acked_revision!"
           from platform.list_servers()
           order by region, name"#
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Server {
            id: ServerId::from_uuid(row.server_id),
            name: row.name,
            region: row.region,
            public_ip: row.public_ip.addr(),
            endpoint_port: u16::try_from(row.endpoint_port).expect("servers_endpoint_port"),
            public_key: row.public_key.filter(|_| row.enrolled).and_then(|key| key.try_into().ok()),
            pool: PoolId::from_uuid(row.pool_id),
            capacity: u32::try_from(row.capacity).expect("servers_capacity"),
            peers: u32::try_from(row.peer_count).unwrap_or_default(),
            active: row.status == "active",
            last_seen_at: row.last_seen_at,
            acked_revision: u64::try_from(row.acked_revision).unwrap_or_default(),
        })
        .collect())
}

/// One server, if it was not removed.
///
/// # Errors
/// Those of the database.
pub async fn find(tx: &mut TenantTx, id: ServerId) -> Result<Option<Server>, DbError> {
    Ok(list(tx).await?.into_iter().find(|server| server.id == id))
}

/// Servers that take a new device now, least loaded first.
///
/// # Errors
/// Those of the database.
pub async fn candidates(tx: &mut TenantTx, region: Option<&str>, now: OffsetDateTime) -> Result<Vec<Server>, DbError> {
    let mut servers = list(tx).await?;
    servers.retain(|server| server.takes_devices(now) && region.is_none_or(|region| server.region == region));
    servers.sort_by_key(|server| (server.load(), server.id));
    Ok(servers)
}
