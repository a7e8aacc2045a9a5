//! Registering a device: key pair, then one statement for all the rest (`platform.register_device`: limits, address, row, and
//! last of all the server's revision), with its audit entry.

use cvault_types::{DeviceId, RequestId, TenantId, UserId};
use rand::CryptoRng;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::config::ConfigKeys;
use super::keys::{KeyRequest, NewKeys};
use super::name::{DeviceName, Platform, PublicKey};
use super::placed::{Placed, PlacedRow};
use super::used_up::{UsedUp, used_up};
use crate::db::DbError;
use crate::ipam::Addresses;
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
    #[error(transparent)]
    BandwidthLimit(#[from] UsedUp),
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

/// A device that has its keys and is to be registered.
pub struct Registration {
    pub(super) id: DeviceId,
    pub(super) user: UserId,
    pub(super) name: DeviceName,
    pub(super) platform: Option<Platform>,
    pub(super) region: Option<String>,
    pub(super) keys: NewKeys,
    pub(super) request_id: RequestId,
}

impl Registration {
    /// Makes the keys of a device of `user`. `data_key` is the tenant's, sealed.
    ///
    /// # Errors
    /// When the data key does not open.
    pub fn new(
        tenant: TenantId,
        user: UserId,
        new: NewDevice,
        keys: &KeyRing,
        data_key: &[u8],
        rng: &mut impl CryptoRng,
        request_id: RequestId,
    ) -> Result<Self, KeyError> {
        let id = DeviceId::from_uuid(Uuid::now_v7());
        let NewDevice { name, platform, keys: request, region } = new;
        let keys = request.make(tenant, keys, data_key, id, rng)?;
        Ok(Self { id, user, name, platform, region, keys, request_id })
    }

    pub(super) fn placed(self, row: PlacedRow) -> Result<Registered, DbError> {
        let Placed { server, addresses, client, revision } = row.try_into()?;
        let NewKeys { public, open, .. } = self.keys;
        Ok(Registered { id: self.id, public_key: public, keys: open, addresses, server, client, revision })
    }
}

/// Registers a device, in one statement: `tx` need not have begun. After COMMIT, call `Hub::server_changed` for its server.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn register(
    tx: &mut TenantTx,
    device: Registration,
    now: OffsetDateTime,
) -> Result<Registered, RegisterError> {
    let (tenant, keys) = (tx.tenant().uuid(), &device.keys);
    let (actor, target) = (device.user.to_string(), device.id.to_string());
    let (conn, context) = tx.entering();
    let row = sqlx::query_as!(
        PlacedRow,
        r#"with placed as (
               select r.* from cvault.enter($1) as tenant cross join lateral platform.register_device(
                   tenant, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) as r
           ), noted as (
               insert into cvault.audit_log (tenant_id, audit_id, actor, action, target, details, request_id)
               select $13, $14, $15, 'device.register', $16,
                      jsonb_build_object('server', platform.id_text('srv', server_id)), $17
               from placed where outcome = 'registered'
           )
           select $2 as "device_id!", outcome as "outcome!", max_devices, devices, client_dns as "client_dns: _",
                  client_allowed_ips as "client_allowed_ips: _", client_mtu, server_id, server_name, region,
                  public_ip as "public_ip: _", endpoint_port, server_public_key, pool_id, capacity, peer_count,
                  last_seen_at, acked_revision, ipv4 as "ipv4: _", ipv6 as "ipv6: _", revision
           from placed"#,
        context,
        device.id.uuid(),
        device.user.uuid(),
        device.name.as_str(),
        device.platform.as_ref().map(Platform::as_str),
        keys.public.as_bytes().as_slice(),
        keys.private_sealed,
        keys.preshared_sealed,
        keys.preshared_hash.as_slice(),
        device.region,
        now - Duration::seconds(SILENT_AFTER_SECONDS),
        now,
        tenant,
        Uuid::now_v7(),
        actor,
        target,
        device.request_id.uuid(),
    )
    .fetch_one(conn)
    .await
    .map_err(refused)?;
    match row.outcome.as_str() {
        "registered" => Ok(device.placed(row)?),
        "user_gone" => Err(RegisterError::UserGone),
        "tenant_closed" => Err(RegisterError::TenantClosed),
        "over_limit" => {
            tx.open().await?;
            Err(used_up(tx, now).await?.into())
        }
        "device_limit" => {
            let (max, used) = (row.max_devices.unwrap_or_default(), row.devices.unwrap_or_default());
            Err(RegisterError::DeviceLimit { max, used })
        }
        "pool_exhausted" => Err(RegisterError::PoolExhausted),
        _ => Err(RegisterError::ServerUnavailable),
    }
}

pub(super) fn refused(error: sqlx::Error) -> RegisterError {
    // the statement may be the whole transaction
    let error = DbError::of_commit(error);
    match error.constraint() {
        Some("devices_tenant_public_key" | "peers_public_key_device_unique") => RegisterError::PublicKeyInUse,
        Some("servers_open_for_peers") => RegisterError::ServerFull,
        Some("peers_tenant_open") => RegisterError::TenantClosed,
        Some(_) | None => RegisterError::Db(error),
    }
}
