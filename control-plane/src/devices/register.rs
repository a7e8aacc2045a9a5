//! Registering a device: limits, key pair, address, row, audit, and last of all the server's revision.

use cvault_types::{DeviceId, RequestId, UserId};
use ipnet::IpNet;
use rand::CryptoRng;
use time::OffsetDateTime;
use uuid::Uuid;

use super::config::ConfigKeys;
use super::keys::KeyRequest;
use super::name::{DeviceName, Platform, PublicKey};
use crate::audit;
use crate::db::DbError;
use crate::ipam::{self, Addresses};
use crate::keys::{KeyError, KeyRing};
use crate::servers::{self, Server};
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

/// Registers a device of `user`. After COMMIT, call `Hub::server_changed` for its server.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn register(
    tx: &mut TenantTx,
    keys: &KeyRing,
    user: UserId,
    new: NewDevice,
    now: OffsetDateTime,
    rng: &mut (impl CryptoRng + Send),
    request_id: RequestId,
) -> Result<Registered, RegisterError> {
    let tenant = tx.tenant();
    let Admitted { data_key, client } = check_limit(tx, user).await?;
    let candidates = servers::candidates(tx, new.region.as_deref(), now).await?;
    let id = DeviceId::from_uuid(Uuid::now_v7());
    let (server, addresses) = place(tx, id, candidates).await?;

    let made = new.keys.make(tx, keys, &data_key, id, rng)?;
    sqlx::query!(
        "insert into cvault.devices (tenant_id, device_id, user_id, name, platform, public_key, private_key_sealed,
                                     preshared_key_sealed, preshared_key_hash, pool_id, ipv4, ipv6, server_id, created_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
        tenant.uuid(),
        id.uuid(),
        user.uuid(),
        new.name.as_str(),
        new.platform.as_ref().map(Platform::as_str),
        made.public.as_bytes().as_slice(),
        made.private_sealed,
        made.preshared_sealed,
        made.preshared_hash.as_slice(),
        server.pool.uuid(),
        IpNet::from(std::net::IpAddr::V4(addresses.ipv4)),
        IpNet::from(std::net::IpAddr::V6(addresses.ipv6)),
        server.id.uuid(),
        now,
    )
    .execute(tx.conn())
    .await
    .map_err(refused)?;
    let entry = audit::Entry {
        actor: &user.to_string(),
        action: "device.register",
        target: &id.to_string(),
        details: serde_json::json!({ "server": server.id.to_string() }),
        request_id: Some(request_id),
    };
    audit::record(tx, entry).await?;
    // last: from here to COMMIT the server's row is locked
    let revision = sqlx::query_scalar!(r#"select platform.place_peer($1) as "revision!""#, id.uuid())
        .fetch_one(tx.conn())
        .await
        .map_err(refused)?;
    let revision = u64::try_from(revision).expect("revisions count from 1");
    Ok(Registered { id, public_key: made.public, keys: made.open, addresses, server, client, revision })
}

/// What is known of the tenant when a device is let in.
struct Admitted {
    /// Sealed.
    data_key: Vec<u8>,
    client: ClientSettings,
}

/// Locks the user, so that racing registrations count one after the other, and the tenant against its deletion.
async fn check_limit(tx: &mut TenantTx, user: UserId) -> Result<Admitted, RegisterError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select t.max_devices_per_user, t.data_key_sealed, t.status in ('active', 'trial') as "open!",
                  t.over_limit_since is not null as "over_limit!", t.client_dns as "dns: Vec<IpNet>",
                  t.client_allowed_ips as "allowed_ips: Vec<IpNet>", t.client_mtu
         from cvault.users u join cvault.tenants t on t.tenant_id = u.tenant_id
         where u.tenant_id = $1 and u.user_id = $2 and u.status = 'active'
         for no key update of u for share of t"#,
        tenant,
        user.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(RegisterError::UserGone)?;
    if !row.open {
        return Err(RegisterError::TenantClosed);
    }
    if row.over_limit {
        let Carried { max, used } = carried(tx).await?;
        return Err(RegisterError::BandwidthLimit { max, used });
    }
    // a statement of its own: it sees what was committed while the first one waited for the lock
    let used = sqlx::query_scalar!(
        r#"select count(*) as "used!" from cvault.devices
           where tenant_id = $1 and user_id = $2 and status = 'active'"#,
        tenant,
        user.uuid()
    )
    .fetch_one(tx.conn())
    .await
    .map_err(DbError::from)?;
    let max = row.max_devices_per_user;
    if used >= i64::from(max) {
        return Err(RegisterError::DeviceLimit { max, used });
    }
    let data_key = row.data_key_sealed.ok_or(RegisterError::Key(KeyError::DoesNotOpen))?;
    Ok(Admitted { data_key, client: ClientSettings::from_row(row.dns, row.allowed_ips, row.client_mtu) })
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

/// The least loaded server whose pool has an address left.
async fn place(
    tx: &mut TenantTx,
    device: DeviceId,
    candidates: Vec<Server>,
) -> Result<(Server, Addresses), RegisterError> {
    if candidates.is_empty() {
        return Err(RegisterError::ServerUnavailable);
    }
    let mut exhausted = Vec::new();
    for server in candidates {
        if exhausted.contains(&server.pool) {
            continue;
        }
        match ipam::allocate(tx, server.pool, device).await? {
            Some(addresses) => return Ok((server, addresses)),
            None => exhausted.push(server.pool),
        }
    }
    Err(RegisterError::PoolExhausted)
}

pub(super) fn refused(error: sqlx::Error) -> RegisterError {
    let error = DbError::from(error);
    match error.constraint() {
        Some("devices_tenant_public_key" | "peers_public_key_unique" | "peers_public_key_device_unique") => {
            RegisterError::PublicKeyInUse
        }
        Some("servers_open_for_peers") => RegisterError::ServerFull,
        Some("peers_tenant_open") => RegisterError::TenantClosed,
        Some(_) | None => RegisterError::Db(error),
    }
}
