//! What administrators do with servers.

use std::net::IpAddr;

use cvault_types::ServerId;
use ipnet::IpNet;
use rand::CryptoRng;
use sqlx::{PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::{DbError, Tx};

/// What an administrator says of a new server.
#[derive(Clone, Debug)]
pub struct NewServer {
    pub name: String,
    /// Lower-case letters, digits and dashes.
    pub region: String,
    pub public_ip: IpAddr,
    pub endpoint_port: u16,
    /// Name of its address pool.
    pub pool: String,
    pub capacity: u32,
}

/// A server as administrators see it.
#[derive(Clone, Debug)]
pub struct ServerDetails {
    pub id: ServerId,
    pub name: String,
    pub region: String,
    pub public_ip: IpAddr,
    pub endpoint_port: u16,
    pub pool: String,
    pub capacity: u32,
    pub status: String,
    pub enrolled: bool,
    pub peers: u32,
    pub revision: u64,
    pub acked_revision: u64,
    pub last_seen_at: Option<OffsetDateTime>,
    pub health: serde_json::Value,
    pub created_at: OffsetDateTime,
}

#[derive(Debug, thiserror::Error)]
pub enum CreateServerError {
    #[error("a server named {0:?} exists already")]
    NameTaken(String),
    #[error("another server has this public address and port")]
    EndpointTaken,
    #[error("there is no pool named {0:?}")]
    NoSuchPool(String),
    #[error("{0}")]
    Invalid(&'static str),
    #[error(transparent)]
    Db(#[from] DbError),
}

#[derive(Debug, thiserror::Error)]
pub enum RemoveServerError {
    #[error("there is no such server")]
    NotFound,
    #[error("{peers} devices are on this server: move or delete them first")]
    InUse { peers: u32 },
    /// Its agent may hold bytes that it has not told yet; without its identity it cannot.
    #[error(
        "the server has not acknowledged the removal of its devices yet, so it may hold bytes that are not billed: wait, \
         or force the removal of a server that is lost"
    )]
    Unsettled,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Creates a server that has not enrolled yet.
///
/// # Errors
/// By variant; nothing is changed then.
pub async fn create_server(
    sys: impl PgExecutor<'_>,
    server: &NewServer,
    rng: &mut (impl CryptoRng + Send),
) -> Result<ServerId, CreateServerError> {
    let id = ServerId::from_uuid(Uuid::now_v7());
    let mut digest_key = [0; 32];
    rng.fill_bytes(&mut digest_key);
    let made = sqlx::query!(
        "insert into platform.servers (server_id, name, region, public_ip, endpoint_port, pool_id, capacity, digest_key)
         select $1, $2, $3, $4, $5, p.pool_id, $7, $8 from platform.address_pools p where p.name = $6",
        id.uuid(),
        server.name,
        server.region,
        IpNet::from(server.public_ip),
        i32::from(server.endpoint_port),
        server.pool,
        i32::try_from(server.capacity).unwrap_or(i32::MAX),
        digest_key.as_slice(),
    )
    .execute(sys)
    .await
    .map_err(DbError::from);
    match made {
        Ok(done) if done.rows_affected() == 1 => Ok(id),
        Ok(_) => Err(CreateServerError::NoSuchPool(server.pool.clone())),
        Err(DbError::Constraint { name }) => Err(match name.as_str() {
            "servers_name_unique" => CreateServerError::NameTaken(server.name.clone()),
            "servers_endpoint_unique" => CreateServerError::EndpointTaken,
            "servers_name_length" => CreateServerError::Invalid("the name of a server has 1 to 64 characters"),
            "servers_region_form" => {
                CreateServerError::Invalid("a region has 1 to 50 lower-case letters, digits and dashes")
            }
            "servers_endpoint_port" => CreateServerError::Invalid("the port must be 1 to 65535"),
            "servers_capacity" => CreateServerError::Invalid("the capacity must be 1 to 65533 devices"),
            _ => DbError::Constraint { name }.into(),
        }),
        Err(error) => Err(error.into()),
    }
}

/// All servers that were not removed, by region and name.
///
/// # Errors
/// Those of the database.
pub async fn list_all(sys: &PgPool) -> Result<Vec<ServerDetails>, DbError> {
    let rows = sqlx::query!(
        r#"select s.server_id, s.name, s.region, s.public_ip as "public_ip!: IpNet", s.endpoint_port, p.name as pool,
                  s.capacity, s.status, s.identity_pin is not null as "enrolled!", s.peer_count, s.revision,
                  s.acked_revision, s.last_seen_at, s.health, s.created_at
           from platform.servers s join platform.address_pools p using (pool_id)
           where s.status <> 'removed'
           order by s.region, s.name"#
    )
    .fetch_all(sys)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| ServerDetails {
            id: ServerId::from_uuid(row.server_id),
            name: row.name,
            region: row.region,
            public_ip: row.public_ip.addr(),
            endpoint_port: u16::try_from(row.endpoint_port).expect("servers_endpoint_port"),
            pool: row.pool,
            capacity: u32::try_from(row.capacity).expect("servers_capacity"),
            status: row.status,
            enrolled: row.enrolled,
            peers: u32::try_from(row.peer_count).unwrap_or_default(),
            revision: u64::try_from(row.revision).unwrap_or_default(),
            acked_revision: u64::try_from(row.acked_revision).unwrap_or_default(),
            last_seen_at: row.last_seen_at,
            health: row.health,
            created_at: row.created_at,
        })
        .collect())
}

/// Whether to wait for what a server still has to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Only when its agent has acknowledged that it has no devices, and has had the time to tell their last bytes.
    Settled,
    /// For a server that is lost, with whatever it had not told.
    Forced,
}

/// An agent tells the last bytes of removed devices within two reports.
const SETTLED_AFTER_SECONDS: f64 = 10.0;

/// Removes a server without devices: its identity and its tokens are worth nothing from now on.
///
/// # Errors
/// By variant; nothing is changed then.
pub async fn remove_server(sys: &PgPool, id: ServerId, removal: Removal) -> Result<(), RemoveServerError> {
    let mut tx = Tx::begin(sys).await?;
    let work = remove_in(&mut tx, id, removal).await;
    tx.finish(work).await
}

async fn remove_in(tx: &mut Tx, id: ServerId, removal: Removal) -> Result<(), RemoveServerError> {
    let server = sqlx::query!(
        r#"select peer_count,
                  revision = 0 or (acked_revision >= revision and acked_at < now() - make_interval(secs => $2)) as "settled"
           from platform.servers where server_id = $1 and status <> 'removed' for no key update"#,
        id.uuid(),
        SETTLED_AFTER_SECONDS,
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(RemoveServerError::NotFound)?;
    if server.peer_count > 0 {
        return Err(RemoveServerError::InUse { peers: u32::try_from(server.peer_count).unwrap_or(u32::MAX) });
    }
    if removal == Removal::Settled && server.settled != Some(true) {
        return Err(RemoveServerError::Unsettled);
    }
    sqlx::query!("update platform.servers set status = 'removed', identity_pin = null where server_id = $1", id.uuid())
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    sqlx::query!("update platform.enrol_tokens set expires_at = now() where server_id = $1", id.uuid())
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    Ok(())
}
