//! What administrators do with servers. Each change leaves an entry in the platform's own audit log.

use std::net::IpAddr;

use cvault_node_protocol::tls::Pin;
use cvault_node_protocol::token::EnrolToken;
use cvault_types::admin::ServerStatus;
use cvault_types::{PoolId, ServerId};
use ipnet::IpNet;
use rand::CryptoRng;
use serde_json::json;
use sqlx::{PgExecutor, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{SILENT_AFTER_SECONDS, issue_token};
use crate::audit;
use crate::db::{DbError, Tx};
use crate::devices::is_region;
use crate::tenants::Actor;
use crate::text::misleads;

const REGION_RULE: &str = "a region has 1 to 50 lower-case letters, digits and dashes";

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
    pub pool_id: PoolId,
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

impl ServerDetails {
    /// Whether a new device could be placed here, as [`super::Server::takes_devices`] says to tenants.
    #[must_use]
    pub fn takes_devices(&self, now: OffsetDateTime) -> bool {
        let seen = self.last_seen_at.is_some_and(|at| (now - at).whole_seconds() < SILENT_AFTER_SECONDS);
        self.status == "active" && self.enrolled && seen && self.peers < self.capacity
    }
}

/// Which servers to list; absent: all.
#[derive(Clone, Debug, Default)]
pub struct ServerFilter {
    pub id: Option<ServerId>,
    pub region: Option<String>,
    pub status: Option<ServerStatus>,
    pub pool: Option<PoolId>,
}

#[derive(Debug, thiserror::Error)]
pub enum CreateServerError {
    #[error("a server named {0:?} exists already")]
    NameTaken(String),
    #[error("another server has this public address and port")]
    EndpointTaken,
    #[error("there is no pool named {0:?}")]
    NoSuchPool(String),
    #[error("{detail}")]
    Invalid { field: &'static str, detail: &'static str },
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

/// Creates a server with its first enrolment token.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn create_with_token(
    tx: &mut Tx,
    server: &NewServer,
    control_plane: Pin,
    actor: &Actor,
    rng: &mut (impl CryptoRng + Send),
) -> Result<(ServerId, EnrolToken), CreateServerError> {
    let id = create_server(tx.conn(), server, rng).await?;
    let details = json!({"name": server.name, "region": server.region, "public_ip": server.public_ip,
                         "port": server.endpoint_port, "pool": server.pool, "capacity": server.capacity});
    note(tx, actor, "server.create", id, details).await?;
    let token = issue_token(tx.conn(), id, control_plane, rng).await?;
    Ok((id, token.ok_or(CreateServerError::Db(DbError::Other(sqlx::Error::RowNotFound)))?))
}

/// Draws another enrolment token; `None` when there is no such server.
///
/// # Errors
/// Those of the database.
pub async fn renew_token(
    tx: &mut Tx,
    id: ServerId,
    control_plane: Pin,
    actor: &Actor,
    rng: &mut (impl CryptoRng + Send),
) -> Result<Option<EnrolToken>, DbError> {
    let token = issue_token(tx.conn(), id, control_plane, rng).await?;
    if token.is_some() {
        note(tx, actor, "server.enrol_token", id, json!({})).await?;
    }
    Ok(token)
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
    let invalid = |field, detail| Err(CreateServerError::Invalid { field, detail });
    if server.name.trim() != server.name || misleads(&server.name) {
        return invalid("name", "a name has printable characters only, and no space around it");
    }
    if !is_region(&server.region) {
        return invalid("region", REGION_RULE);
    }
    if server.public_ip.is_unspecified() || server.public_ip.is_multicast() {
        return invalid("public_ip", "must be an address that clients can send to");
    }
    let id = ServerId::from_uuid(Uuid::now_v7());
    let mut digest_key = [0; 32];
    rng.fill_bytes(&mut digest_key);
    let made = sqlx::query!(
        "insert into platform.servers (server_id, name, region, public_ip, endpoint_port, pool_id, capacity, digest_key)
         select $1, $2, $3, $4, $5, p.pool_id, $7, $8 from platform.address_pools p
         where p.name = $6 and p.deleted_at is null
         -- a pool that is being deleted is waited for, and gone
         for key share of p",
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
        Err(DbError::Constraint { name }) => match name.as_str() {
            "servers_name_unique" => Err(CreateServerError::NameTaken(server.name.clone())),
            "servers_endpoint_unique" => Err(CreateServerError::EndpointTaken),
            "servers_name_length" => invalid("name", "the name of a server has 1 to 64 characters"),
            "servers_region_form" => invalid("region", REGION_RULE),
            "servers_endpoint_port" => invalid("port", "the port must be 1 to 65535"),
            "servers_capacity" => invalid("capacity", "the capacity must be 1 to 65533 devices"),
            _ => Err(DbError::Constraint { name }.into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// Up to `limit` servers after `after` that were not removed, oldest first.
///
/// # Errors
/// Those of the database.
pub async fn list_details(
    sys: impl PgExecutor<'_>,
    filter: &ServerFilter,
    after: Option<ServerId>,
    limit: i64,
) -> Result<Vec<ServerDetails>, DbError> {
    let rows = sqlx::query!(
        r#"select s.server_id, s.name, s.region, s.public_ip as "public_ip!: IpNet", s.endpoint_port, s.pool_id,
                  p.name as pool, s.capacity, s.status, s.identity_pin is not null as "enrolled!", s.peer_count,
                  s.revision, s.acked_revision, s.last_seen_at, s.health, s.created_at
           from platform.servers s join platform.address_pools p using (pool_id)
           where s.status <> 'removed' and s.server_id > $1
             and ($2::uuid is null or s.server_id = $2) and ($3::text is null or s.region = $3)
             and ($4::text is null or s.status = $4) and ($5::uuid is null or s.pool_id = $5)
           order by s.server_id limit $6"#,
        after.map_or(Uuid::nil(), ServerId::uuid),
        filter.id.map(ServerId::uuid),
        filter.region,
        filter.status.map(status_text),
        filter.pool.map(PoolId::uuid),
        limit
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
            pool_id: PoolId::from_uuid(row.pool_id),
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

/// All servers that were not removed, by region and name.
///
/// # Errors
/// Those of the database.
pub async fn list_all(sys: &PgPool) -> Result<Vec<ServerDetails>, DbError> {
    let mut servers = list_details(sys, &ServerFilter::default(), None, i64::MAX).await?;
    servers.sort_by(|a, b| (&a.region, &a.name).cmp(&(&b.region, &b.name)));
    Ok(servers)
}

/// Sets what an administrator wants of a server; `false` when there is no such server.
///
/// # Errors
/// Those of the database.
pub async fn set_status(tx: &mut Tx, id: ServerId, status: ServerStatus, actor: &Actor) -> Result<bool, DbError> {
    let status = status_text(status);
    // before the server's row is locked, which waits for registrations and makes them wait
    note(tx, actor, "server.set_status", id, json!({ "status": status })).await?;
    let done = sqlx::query!(
        "update platform.servers set status = $2 where server_id = $1 and status <> 'removed'",
        id.uuid(),
        status
    )
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

fn status_text(status: ServerStatus) -> &'static str {
    match status {
        ServerStatus::Active => "active",
        ServerStatus::Draining => "draining",
        ServerStatus::Maintenance => "maintenance",
        ServerStatus::Offline => "offline",
    }
}

/// What the column says. A removed server is never listed.
#[must_use]
pub fn parse_status(text: &str) -> ServerStatus {
    match text {
        "active" => ServerStatus::Active,
        "draining" => ServerStatus::Draining,
        "maintenance" => ServerStatus::Maintenance,
        _ => ServerStatus::Offline,
    }
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
/// By variant; the transaction must then be rolled back.
pub async fn remove_server(
    tx: &mut Tx,
    id: ServerId,
    removal: Removal,
    actor: &Actor,
) -> Result<(), RemoveServerError> {
    note(tx, actor, "server.remove", id, json!({ "forced": removal == Removal::Forced })).await?;
    sqlx::query!("update platform.enrol_tokens set expires_at = now() where server_id = $1", id.uuid())
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
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
    Ok(())
}

async fn note(
    tx: &mut Tx,
    actor: &Actor,
    action: &'static str,
    id: ServerId,
    details: serde_json::Value,
) -> Result<(), DbError> {
    let target = id.to_string();
    let entry = audit::Entry { actor: &actor.name, action, target: &target, details, request_id: actor.request_id };
    audit::record_platform(tx.conn(), entry).await
}
