//! Registering a device: key pair, then one statement for all the rest (`platform.register_device`: limits, address, row, and
//! last of all the server's revision), with its audit entry.

use cvault_types::{DeviceId, PoolId, RequestId, ServerId, UserId};
use ipnet::IpNet;
use rand::CryptoRng;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::config::ConfigKeys;
use super::keys::KeyRequest;
use super::name::{DeviceName, Platform, PublicKey};
use crate::db::DbError;
use crate::ipam::{self, Addresses};
use crate::keys::{KeyError, KeyRing};
use crate::servers::{SILENT_AFTER_SECONDS, Server};
use crate::tenancy::TenantTx;
use crate::tenants::ClientSettings;

/// What a user says of a new device.
#[derive(Clone, Debug)]
pub struct NewDevice {
    pub name: DeviceName,
    pub platform: Option<Platform>,
    pub keys: KeyRequest,
    pub region: Option<String>,
}

/// A device that exists once the transaction is committed.
pub struct Registered {
    pub id: DeviceId,
    pub public_key: PublicKey,
    pub keys: ConfigKeys,
    pub addresses: Addresses,
    pub server: Server,
    /// What its tenant sets for its configuration.
    pub client: ClientSettings,
    /// When the server has acknowledged this revision, the device works.
    pub revision: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    #[error("the user has {used} of {max} devices")]
    DeviceLimit { max: i32, used: i64 },
    #[error("the user does not exist any more or is disabled")]
    UserGone,
    #[error("the tenant is suspended or being deleted")]
    TenantClosed,
    #[error("the tenant has carried {used} of {max} bytes this month")]
    BandwidthLimit { max: i64, used: i64 },
    #[error("the public key belongs to another device")]
    PublicKeyInUse,
    #[error("no server takes a device now")]
    ServerUnavailable,
    /// Another try finds another one.
    #[error("the chosen server has filled up meanwhile")]
    ServerFull,
    #[error("the address pool is exhausted")]
    PoolExhausted,
    #[error("the tenant's data key cannot be used")]
    Key(#[from] KeyError),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Registers a device of `user`, in one statement: `tx` need not have begun. `data_key` is the tenant's, sealed. After COMMIT,
/// call `Hub::server_changed` for its server.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn register(
    tx: &mut TenantTx,
    keys: &KeyRing,
    data_key: &[u8],
    user: UserId,
    new: NewDevice,
    now: OffsetDateTime,
    rng: &mut (impl CryptoRng + Send),
    request_id: RequestId,
) -> Result<Registered, RegisterError> {
    let id = DeviceId::from_uuid(Uuid::now_v7());
    let made = new.keys.make(tx.tenant(), keys, data_key, id, rng)?;
    let (tenant, key) = (tx.tenant().uuid(), made.public);
    let (actor, target) = (user.to_string(), id.to_string());
    let (conn, context) = tx.entering();
    let row = sqlx::query!(
        r#"with placed as (
               select r.* from cvault.enter($1) as tenant cross join lateral platform.register_device(
                   tenant, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) as r
           ), noted as (
               insert into cvault.audit_log (tenant_id, audit_id, actor, action, target, details, request_id)
               select $13, $14, $15, 'device.register', $16,
                      jsonb_build_object('server', platform.id_text('srv', server_id)), $17
               from placed where outcome = 'registered'
           )
           select outcome as "outcome!", max_devices, devices, client_dns as "dns: Vec<IpNet>",
                  client_allowed_ips as "allowed_ips: Vec<IpNet>", client_mtu, server_id, server_name, region,
                  public_ip as "public_ip: IpNet", endpoint_port, server_public_key, pool_id, capacity, peer_count,
                  last_seen_at, acked_revision, ipv4 as "ipv4: IpNet", ipv6 as "ipv6: IpNet", revision
           from placed"#,
        context,
        id.uuid(),
        user.uuid(),
        new.name.as_str(),
        new.platform.as_ref().map(Platform::as_str),
        key.as_bytes().as_slice(),
        made.private_sealed,
        made.preshared_sealed,
        made.preshared_hash.as_slice(),
        new.region,
        now - Duration::seconds(SILENT_AFTER_SECONDS),
        now,
        tenant,
        Uuid::now_v7(),
        actor,
        target,
        request_id.uuid(),
    )
    .fetch_one(conn)
    .await
    .map_err(refused)?;
    match row.outcome.as_str() {
        "registered" => {}
        "user_gone" => return Err(RegisterError::UserGone),
        "tenant_closed" => return Err(RegisterError::TenantClosed),
        "over_limit" => {
            tx.open().await?;
            let Carried { max, used } = carried(tx).await?;
            return Err(RegisterError::BandwidthLimit { max, used });
        }
        "device_limit" => {
            let (max, used) = (row.max_devices.unwrap_or_default(), row.devices.unwrap_or_default());
            return Err(RegisterError::DeviceLimit { max, used });
        }
        "pool_exhausted" => return Err(RegisterError::PoolExhausted),
        _ => return Err(RegisterError::ServerUnavailable),
    }
    let whole = || DbError::Other(sqlx::Error::ColumnNotFound("a column of a registered device".to_owned()));
    let server = Server {
        id: ServerId::from_uuid(row.server_id.ok_or_else(whole)?),
        name: row.server_name.ok_or_else(whole)?,
        region: row.region.ok_or_else(whole)?,
        public_ip: row.public_ip.ok_or_else(whole)?.addr(),
        endpoint_port: u16::try_from(row.endpoint_port.ok_or_else(whole)?).expect("servers_endpoint_port"),
        public_key: row.server_public_key.and_then(|key| key.try_into().ok()),
        pool: PoolId::from_uuid(row.pool_id.ok_or_else(whole)?),
        capacity: u32::try_from(row.capacity.ok_or_else(whole)?).expect("servers_capacity"),
        peers: u32::try_from(row.peer_count.ok_or_else(whole)?).unwrap_or_default(),
        active: true,
        last_seen_at: row.last_seen_at,
        acked_revision: u64::try_from(row.acked_revision.ok_or_else(whole)?).unwrap_or_default(),
    };
    let addresses = ipam::addresses(row.ipv4.ok_or_else(whole)?, row.ipv6.ok_or_else(whole)?)?;
    let revision = u64::try_from(row.revision.ok_or_else(whole)?).expect("revisions count from 1");
    let client = ClientSettings::from_row(row.dns, row.allowed_ips, row.client_mtu);
    Ok(Registered { id, public_key: key, keys: made.open, addresses, server, client, revision })
}

/// What a tenant may carry in a month, and has carried in this one, in bytes.
pub struct Carried {
    pub max: i64,
    pub used: i64,
}

/// The current tenant's month, known to the minute.
///
/// # Errors
/// Those of the database.
pub async fn carried(tx: &mut TenantTx) -> Result<Carried, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select coalesce(t.bandwidth_limit_bytes, 0) as "max!", (
               select coalesce(sum(u.rx_bytes + u.tx_bytes), 0)::bigint from cvault.usage_daily u
               where u.tenant_id = t.tenant_id
                 and u.day >= date_trunc('month', now(), 'UTC')::date) as "used!"
           from cvault.tenants t where t.tenant_id = $1"#,
        tenant
    )
    .fetch_one(tx.conn())
    .await?;
    Ok(Carried { max: row.max, used: row.used })
}

pub(super) fn refused(error: sqlx::Error) -> RegisterError {
    let error = DbError::from(error);
    match error.constraint() {
        Some("devices_tenant_public_key" | "peers_public_key_device_unique") => RegisterError::PublicKeyInUse,
        Some("servers_open_for_peers") => RegisterError::ServerFull,
        Some("peers_tenant_open") => RegisterError::TenantClosed,
        Some(_) | None => RegisterError::Db(error),
    }
}
