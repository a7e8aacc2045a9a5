//! Reading a user's devices.

use cvault_types::{DeviceId, ServerId, TenantId, UserId};
use ipnet::IpNet;
use time::OffsetDateTime;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::config::{ConfigKey, ConfigKeys};
use super::name::PublicKey;
use crate::db::DbError;
use crate::ipam::{self, Addresses};
use crate::keys::{Aad, KeyError, KeyRing};
use crate::servers::Server;
use crate::tenancy::TenantTx;

/// WireGuard gives a session up 180 s after its last handshake (REJECT_AFTER_TIME, whitepaper §6.1).
const TUNNEL_UP_SECONDS: i64 = 180;

/// An active device of a user.
#[derive(Clone, Debug)]
pub struct Device {
    pub id: DeviceId,
    pub name: String,
    pub platform: Option<String>,
    pub public_key: PublicKey,
    pub addresses: Addresses,
    pub server: ServerId,
    /// Its pool has taken the addresses back: they were the last it had. It gets others when it connects.
    pub reclaimed: bool,
    /// The server has to acknowledge this revision before the device works.
    pub placed_revision: u64,
    pub last_handshake_at: Option<OffsetDateTime>,
    pub last_connected_at: Option<OffsetDateTime>,
    pub created_at: OffsetDateTime,
}

impl Device {
    #[must_use]
    pub fn tunnel_up(&self, now: OffsetDateTime) -> bool {
        self.last_handshake_at.is_some_and(|at| (now - at).whole_seconds() < TUNNEL_UP_SECONDS)
    }
}

struct Row {
    device_id: uuid::Uuid,
    name: String,
    platform: Option<String>,
    public_key: Vec<u8>,
    ipv4: IpNet,
    ipv6: IpNet,
    server_id: uuid::Uuid,
    reclaimed: bool,
    placed_revision: i64,
    last_handshake_at: Option<OffsetDateTime>,
    last_connected_at: Option<OffsetDateTime>,
    created_at: OffsetDateTime,
}

/// What a statement with more columns found of a device.
macro_rules! device {
    ($row:ident) => {
        Device::try_from(Row {
            device_id: $row.device_id,
            name: $row.name,
            platform: $row.platform,
            public_key: $row.public_key,
            ipv4: $row.ipv4,
            ipv6: $row.ipv6,
            server_id: $row.server_id,
            reclaimed: $row.reclaimed,
            placed_revision: $row.placed_revision,
            last_handshake_at: $row.last_handshake_at,
            last_connected_at: $row.last_connected_at,
            created_at: $row.created_at,
        })
    };
}

impl TryFrom<Row> for Device {
    type Error = DbError;

    fn try_from(row: Row) -> Result<Self, DbError> {
        Ok(Self {
            id: DeviceId::from_uuid(row.device_id),
            name: row.name,
            platform: row.platform,
            public_key: PublicKey::from_bytes(row.public_key.try_into().expect("devices_public_key_length")),
            addresses: ipam::addresses(row.ipv4, row.ipv6)?,
            server: ServerId::from_uuid(row.server_id),
            reclaimed: row.reclaimed,
            placed_revision: u64::try_from(row.placed_revision).unwrap_or_default(),
            last_handshake_at: row.last_handshake_at,
            last_connected_at: row.last_connected_at,
            created_at: row.created_at,
        })
    }
}

/// A device, and what its server says of it.
#[derive(Clone, Debug)]
pub struct ServedDevice {
    pub device: Device,
    pub region: String,
    /// The server has acknowledged it.
    pub acked: bool,
}

impl ServedDevice {
    /// `server` is the device's; `None`: one that was removed.
    #[must_use]
    pub fn new(device: Device, server: Option<&Server>) -> Self {
        let acked = server.map_or(0, |server| server.acked_revision);
        Self::of(device, server.map(|server| server.region.clone()), acked)
    }

    fn of(device: Device, region: Option<String>, acked_revision: u64) -> Self {
        let acked = !device.reclaimed && acked_revision >= device.placed_revision;
        Self { device, region: region.unwrap_or_default(), acked }
    }
}

/// Up to `limit` active devices of `user`, oldest first, after the one named.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub user: UserId,
    pub after: Option<DeviceId>,
    pub limit: u32,
}

/// One page.
///
/// # Errors
/// Those of the database.
pub async fn list(tx: &mut TenantTx, page: Page) -> Result<Vec<ServedDevice>, DbError> {
    Ok(pages(tx, &[page]).await?.pop().unwrap_or_default())
}

/// The devices of each page, in the order of the pages. One statement: `tx` need not have begun.
///
/// # Errors
/// Those of the database.
pub(super) async fn pages(tx: &mut TenantTx, pages: &[Page]) -> Result<Vec<Vec<ServedDevice>>, DbError> {
    let users: Vec<Uuid> = pages.iter().map(|page| page.user.uuid()).collect();
    let after: Vec<Uuid> = pages.iter().map(|page| page.after.map_or(Uuid::nil(), DeviceId::uuid)).collect();
    let limits: Vec<i64> = pages.iter().map(|page| i64::from(page.limit)).collect();
    let (conn, context) = tx.entering();
    let rows = sqlx::query!(
        r#"select place as "place!", device_id, d.name, platform, d.public_key, ipv4 as "ipv4!: IpNet", ipv6 as "ipv6!: IpNet",
                  d.server_id, reclaimed, placed_revision, last_handshake_at, last_connected_at, created_at,
                  s.region as "region?", s.acked_revision as "acked_revision?"
           from cvault.enter($1) as tenant
           cross join lateral (
               select w.place, d.*
               from unnest($2::uuid[], $3::uuid[], $4::bigint[]) with ordinality as w (user_id, after, most, place)
               cross join lateral (
                   select * from cvault.devices
                   where tenant_id = tenant and user_id = w.user_id and status = 'active' and device_id > w.after
                   order by device_id limit w.most) as d
               offset 0) as d
           left join platform.list_servers() as s on s.server_id = d.server_id
           order by place, device_id"#,
        context,
        &users,
        &after,
        &limits,
    )
    .fetch_all(conn)
    .await?;
    let mut found: Vec<Vec<ServedDevice>> = pages.iter().map(|_| Vec::new()).collect();
    for row in rows {
        let device = device!(row)?;
        let acked_revision = row.acked_revision.and_then(|revision| u64::try_from(revision).ok());
        let place = usize::try_from(row.place - 1).expect("ordinality");
        found[place].push(ServedDevice::of(device, row.region, acked_revision.unwrap_or_default()));
    }
    Ok(found)
}

/// A device and whose it is.
#[derive(Clone, Debug)]
pub struct OwnedDevice {
    pub user: UserId,
    pub device: Device,
    /// Off its server, because its tenant or its user is.
    pub suspended: bool,
}

/// Up to `limit` active devices of all users, oldest first, after the one named.
///
/// # Errors
/// Those of the database.
pub async fn list_all(tx: &mut TenantTx, after: Option<DeviceId>, limit: u32) -> Result<Vec<OwnedDevice>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        r#"select user_id, suspended, device_id, name, platform, public_key, ipv4 as "ipv4!: IpNet", ipv6 as "ipv6!: IpNet",
                  server_id, reclaimed, placed_revision, last_handshake_at, last_connected_at, created_at
           from cvault.devices
           where tenant_id = $1 and status = 'active' and device_id > $2
           order by device_id limit $3"#,
        tenant,
        after.map_or(Uuid::nil(), DeviceId::uuid),
        i64::from(limit),
    )
    .fetch_all(tx.conn())
    .await?;
    rows.into_iter()
        .map(|row| {
            let device = device!(row)?;
            Ok(OwnedDevice { user: UserId::from_uuid(row.user_id), device, suspended: row.suspended })
        })
        .collect()
}

/// One active device of the user.
///
/// # Errors
/// Those of the database.
pub async fn find(tx: &mut TenantTx, user: UserId, id: DeviceId) -> Result<Option<Device>, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query_as!(
        Row,
        r#"select device_id, name, platform, public_key, ipv4 as "ipv4!: IpNet", ipv6 as "ipv6!: IpNet", server_id,
                  reclaimed, placed_revision, last_handshake_at, last_connected_at, created_at
           from cvault.devices
           where tenant_id = $1 and user_id = $2 and status = 'active' and device_id = $3"#,
        tenant,
        user.uuid(),
        id.uuid(),
    )
    .fetch_optional(tx.conn())
    .await?;
    row.map(Device::try_from).transpose()
}

/// Why a device's keys could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("a device's key does not open")]
    Key(#[from] KeyError),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// The keys for the configuration of an active device.
///
/// # Errors
/// When they cannot be read or opened.
pub async fn config_of(tx: &mut TenantTx, keys: &KeyRing, id: DeviceId) -> Result<ConfigKeys, ConfigError> {
    let tenant = tx.tenant();
    let row = sqlx::query!(
        "select d.private_key_sealed, d.preshared_key_sealed, t.data_key_sealed
         from cvault.devices d join cvault.tenants t on t.tenant_id = d.tenant_id
         where d.tenant_id = $1 and d.device_id = $2",
        tenant.uuid(),
        id.uuid()
    )
    .fetch_one(tx.conn())
    .await
    .map_err(DbError::from)?;
    let open = |aad, sealed: Option<Vec<u8>>| -> Result<Option<Zeroizing<[u8; 32]>>, KeyError> {
        let Some(sealed) = sealed else { return Ok(None) };
        let opened = keys.open(row.data_key_sealed.as_deref().ok_or(KeyError::DoesNotOpen)?, aad, &sealed)?;
        let key: &[u8; 32] = opened.as_slice().try_into().map_err(|_| KeyError::Layout)?;
        Ok(Some(Zeroizing::new(*key)))
    };
    let private = open(private_key_aad(tenant, id), row.private_key_sealed)?;
    Ok(ConfigKeys {
        private: private.map_or(ConfigKey::OnlyAtTheClient, ConfigKey::Known),
        preshared: open(preshared_key_aad(tenant, id), row.preshared_key_sealed)?,
    })
}

pub(super) fn private_key_aad(tenant: TenantId, device: DeviceId) -> Aad {
    Aad { table: "devices", column: "private_key_sealed", tenant, row: device.uuid() }
}

pub(crate) fn preshared_key_aad(tenant: TenantId, device: DeviceId) -> Aad {
    Aad { table: "devices", column: "preshared_key_sealed", tenant, row: device.uuid() }
}
