//! New keys for a device. Its server drops the old public key in the same revision step, so the old tunnel is dead when the
//! new one works.

use cvault_types::{DeviceId, RequestId, ServerId, UserId};
use ipnet::IpNet;
use rand::CryptoRng;
use time::OffsetDateTime;

use super::keys::KeyRequest;
use super::name::PublicKey;
use super::read;
use super::register::{RegisterError, Registered, refused};
use super::used_up::used_up;
use crate::audit;
use crate::db::DbError;
use crate::keys::{KeyError, KeyRing};
use crate::servers;
use crate::tenancy::TenantTx;
use crate::tenants::ClientSettings;

/// What is asked of a rotation.
#[derive(Clone, Debug)]
pub struct NewDeviceKeys {
    pub device: DeviceId,
    /// Made by the client; otherwise the platform makes the pair.
    pub public_key: Option<PublicKey>,
    /// `None`: with a new preshared key if the device has one.
    pub preshared: Option<bool>,
}

/// A device with new keys, once the transaction is committed.
pub struct Rotated {
    pub device: Registered,
    /// The server it was on, when that takes no peers any more. After COMMIT, call `Hub::server_changed` for both.
    pub moved_from: Option<ServerId>,
}

#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error("there is no such device")]
    NotFound,
    #[error(transparent)]
    Refused(#[from] RegisterError),
}

/// Gives a device of `user` new keys. It keeps its addresses, and its server unless that takes no peers.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn rotate(
    tx: &mut TenantTx,
    keys: &KeyRing,
    user: UserId,
    new: NewDeviceKeys,
    now: OffsetDateTime,
    rng: &mut (impl CryptoRng + Send),
    request_id: RequestId,
) -> Result<Rotated, RotateError> {
    let (tenant, id) = (tx.tenant().uuid(), new.device);
    let row = sqlx::query!(
        r#"select d.preshared_key_sealed is not null as "has_preshared!", d.suspended, d.pool_id, t.data_key_sealed,
                  t.status in ('active', 'trial') as "open!", t.over_limit_since is not null as "over_limit!",
                  t.client_dns as "dns: Vec<IpNet>", t.client_allowed_ips as "allowed_ips: Vec<IpNet>", t.client_mtu
           from cvault.devices d join cvault.tenants t on t.tenant_id = d.tenant_id
           join cvault.users u on u.tenant_id = d.tenant_id and u.user_id = d.user_id
           where d.tenant_id = $1 and d.user_id = $2 and d.device_id = $3 and d.status = 'active' and u.status = 'active'
           for no key update of d for share of t"#,
        tenant,
        user.uuid(),
        id.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(db)?
    .ok_or(RotateError::NotFound)?;
    if !row.open {
        return Err(RegisterError::TenantClosed.into());
    }
    if row.over_limit {
        let used_up = used_up(tx, now).await.map_err(RegisterError::from)?;
        return Err(RegisterError::from(used_up).into());
    }
    let device = read::find(tx, user, id).await.map_err(RegisterError::from)?.ok_or(RotateError::NotFound)?;
    let server = servers::find(tx, device.server).await.map_err(RegisterError::from)?;
    // one that is off since a suspension needs a place, and its server may have been removed
    let stays = |server: &servers::Server| server.active && (!row.suspended || server.has_room());
    let target = match server.filter(stays) {
        Some(server) => server,
        None => {
            // the device keeps its address, so it can only move within the pool
            let mut candidates = servers::candidates(tx, None, now).await.map_err(RegisterError::from)?.into_iter();
            let other = candidates.find(|candidate| candidate.pool.uuid() == row.pool_id);
            other.ok_or(RegisterError::ServerUnavailable)?
        }
    };
    let data_key = row.data_key_sealed.ok_or(RegisterError::Key(KeyError::DoesNotOpen))?;
    let request = KeyRequest { public_key: new.public_key, preshared: new.preshared.unwrap_or(row.has_preshared) };
    let made = request.make(tx.tenant(), keys, &data_key, id, rng).map_err(RegisterError::from)?;
    if made.public == device.public_key {
        return Err(RegisterError::PublicKeyInUse.into());
    }
    sqlx::query!(
        "update cvault.devices set public_key = $3, private_key_sealed = $4, preshared_key_sealed = $5,
                                   preshared_key_hash = $6, suspended = false
         where tenant_id = $1 and device_id = $2",
        tenant,
        id.uuid(),
        made.public.as_bytes().as_slice(),
        made.private_sealed,
        made.preshared_sealed,
        made.preshared_hash.as_slice(),
    )
    .execute(tx.conn())
    .await
    .map_err(refused)?;
    let entry = audit::Entry {
        actor: &user.to_string(),
        action: "device.rotate_key",
        target: &id.to_string(),
        details: serde_json::json!({ "server": target.id.to_string() }),
        request_id: Some(request_id),
    };
    audit::record(tx, entry).await.map_err(RegisterError::from)?;
    // last: from here to COMMIT the servers' rows are locked
    let revision =
        sqlx::query_scalar!(r#"select platform.move_peer($1, $2) as "revision!""#, id.uuid(), target.id.uuid())
            .fetch_one(tx.conn())
            .await
            .map_err(refused)?;
    let revision = u64::try_from(revision).expect("revisions count from 1");
    let moved_from = (target.id != device.server).then_some(device.server);
    let addresses = device.addresses;
    let client = ClientSettings::from_row(row.dns, row.allowed_ips, row.client_mtu);
    let device =
        Registered { id, public_key: made.public, keys: made.open, addresses, server: target, client, revision };
    Ok(Rotated { device, moved_from })
}

fn db(error: sqlx::Error) -> RotateError {
    RegisterError::from(DbError::from(error)).into()
}
