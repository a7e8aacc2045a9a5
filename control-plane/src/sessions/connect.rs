//! `connect`: opens a session, and moves the device when another region is asked for or its server does not work.

use cvault_types::{DeviceId, PoolId, RequestId, ServerId, SessionId, UserId};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::audit;
use crate::db::DbError;
use crate::devices::{self, Device};
use crate::ipam;
use crate::servers::{self, Server};
use crate::tenancy::TenantTx;

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("there is no such device")]
    NotFound,
    #[error("no server can take this device now")]
    ServerUnavailable,
    /// Only for a device whose address was taken back when it disconnected.
    #[error("the address pool is exhausted")]
    PoolExhausted,
    #[error("the tenant is suspended or being deleted")]
    TenantClosed,
    #[error(transparent)]
    BandwidthLimit(#[from] devices::UsedUp),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// A device with an open session, once the transaction is committed.
#[derive(Clone, Debug)]
pub struct Connection {
    pub session: SessionId,
    pub device: Device,
    pub server: Server,
    /// The device was put onto `server`. After COMMIT, call `Hub::server_changed` for it.
    pub placed: bool,
    /// The server the device was moved away from, to be called for too.
    pub moved_from: Option<ServerId>,
}

/// Opens a session of a device of `user`, or returns the open one.
///
/// # Errors
/// By variant.
pub async fn connect(
    tx: &mut TenantTx,
    user: UserId,
    id: DeviceId,
    region: Option<&str>,
    now: OffsetDateTime,
    request_id: RequestId,
) -> Result<Connection, ConnectError> {
    let Locked { used_up, suspended, pool } = lock_device(tx, user, id).await?;
    if used_up {
        return Err(devices::used_up(tx, now).await?.into());
    }
    let mut device = devices::find(tx, user, id).await?.ok_or(ConnectError::NotFound)?;
    let readdressed = device.reclaimed;
    let target = if readdressed {
        readdress(tx, &mut device, region, now).await?
    } else {
        target(tx, &device, pool, suspended, region, now).await?
    };
    let session = open(tx, &device, target.id, now).await?;
    let entry = audit::Entry {
        actor: &user.to_string(),
        action: "vpn.connect",
        target: &id.to_string(),
        details: serde_json::json!({ "server": target.id.to_string(), "session": session.to_string() }),
        request_id: Some(request_id),
    };
    audit::record(tx, entry).await?;
    let moved_from = (target.id != device.server).then_some(device.server);
    let placed = suspended || readdressed || moved_from.is_some();
    if suspended {
        put_back(tx, id).await?;
    }
    if placed {
        // last: from here to COMMIT both servers' rows are locked
        move_device(tx, id, target.id).await?;
    }
    Ok(Connection { session, device, server: target, placed, moved_from })
}

/// Gives a device that has no address one on its server, or, when that takes no devices or another region is asked for, on
/// the least loaded one that has an address left. It may change pools: nothing of it is left in its own.
async fn readdress(
    tx: &mut TenantTx,
    device: &mut Device,
    region: Option<&str>,
    now: OffsetDateTime,
) -> Result<Server, ConnectError> {
    let home = servers::find(tx, device.server).await?;
    let stays = |server: &Server| server.takes_devices(now) && region.is_none_or(|region| region == server.region);
    let candidates = match home.filter(stays) {
        Some(server) => vec![server],
        None => servers::candidates(tx, region, now).await?,
    };
    let mut refusal = ConnectError::ServerUnavailable;
    for server in candidates {
        let Some(addresses) = ipam::restore(tx, device.id, server.id).await? else {
            refusal = ConnectError::PoolExhausted;
            continue;
        };
        (device.addresses, device.server, device.reclaimed) = (addresses, server.id, false);
        return Ok(server);
    }
    Err(refusal)
}

/// Where the device is to be: where it is, if that works and is in the region that was asked for; otherwise on the least
/// loaded server of its pool, as it keeps its address. A device that is still off since a suspension needs a place.
async fn target(
    tx: &mut TenantTx,
    device: &Device,
    pool: PoolId,
    suspended: bool,
    region: Option<&str>,
    now: OffsetDateTime,
) -> Result<Server, ConnectError> {
    // of a device that is suspended it may have been removed
    let home = servers::find(tx, device.server).await?;
    let serves = |home: &Server| if suspended { home.takes_devices(now) } else { home.works(now) };
    let stays = |home: &Server| serves(home) && region.is_none_or(|region| home.region == region);
    let home = match home {
        Some(home) if stays(&home) => return Ok(home),
        other => other,
    };
    let mut others = servers::candidates(tx, region, now).await?;
    others.retain(|other| other.pool == pool);
    // of the same region rather
    let is_near = |other: &Server| home.as_ref().is_some_and(|home| other.region == home.region);
    let near = others.iter().position(is_near).unwrap_or(0);
    if near < others.len() { Ok(others.swap_remove(near)) } else { Err(ConnectError::ServerUnavailable) }
}

struct Locked {
    /// The tenant's month.
    used_up: bool,
    /// The device is on no server since a suspension.
    suspended: bool,
    pool: PoolId,
}

async fn lock_device(tx: &mut TenantTx, user: UserId, id: DeviceId) -> Result<Locked, ConnectError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select t.over_limit_since is not null as "over_limit!", d.suspended, d.pool_id
           from cvault.devices d join cvault.tenants t on t.tenant_id = d.tenant_id
           join cvault.users u on u.tenant_id = d.tenant_id and u.user_id = d.user_id
           where d.tenant_id = $1 and d.user_id = $2 and d.device_id = $3 and d.status = 'active' and u.status = 'active'
           for no key update of d"#,
        tenant,
        user.uuid(),
        id.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(ConnectError::NotFound)?;
    Ok(Locked { used_up: row.over_limit, suspended: row.suspended, pool: PoolId::from_uuid(row.pool_id) })
}

async fn put_back(tx: &mut TenantTx, id: DeviceId) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.devices set suspended = false where tenant_id = $1 and device_id = $2",
        tenant,
        id.uuid()
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

async fn open(tx: &mut TenantTx, device: &Device, server: ServerId, now: OffsetDateTime) -> Result<SessionId, DbError> {
    let tenant = tx.tenant().uuid();
    let session = sqlx::query_scalar!(
        r#"with device as (
               update cvault.devices set last_connected_at = $5 where tenant_id = $1 and device_id = $3
               returning user_id
           )
           insert into cvault.sessions (tenant_id, session_id, device_id, user_id, server_id, opened_by, connected_at)
           select $1, $2, $3, user_id, $4, 'connect', $5 from device
           on conflict (tenant_id, device_id) where status = 'active' do update set server_id = excluded.server_id
           returning session_id"#,
        tenant,
        Uuid::now_v7(),
        device.id.uuid(),
        server.uuid(),
        now,
    )
    .fetch_one(tx.conn())
    .await?;
    Ok(SessionId::from_uuid(session))
}

async fn move_device(tx: &mut TenantTx, id: DeviceId, server: ServerId) -> Result<(), ConnectError> {
    sqlx::query_scalar!("select platform.move_peer($1, $2)", id.uuid(), server.uuid())
        .fetch_one(tx.conn())
        .await
        .map_err(|error| {
            let error = DbError::from(error);
            match error.constraint() {
                Some("servers_open_for_peers") => ConnectError::ServerUnavailable,
                Some("peers_tenant_open") => ConnectError::TenantClosed,
                Some(_) | None => ConnectError::Db(error),
            }
        })?;
    Ok(())
}
