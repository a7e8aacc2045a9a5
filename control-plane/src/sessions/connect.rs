//! `connect`: opens a session, and moves the device when another region is asked for.

use cvault_types::{DeviceId, RequestId, ServerId, SessionId, UserId};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::audit;
use crate::db::DbError;
use crate::devices::{self, Device};
use crate::servers::{self, Server};
use crate::tenancy::TenantTx;

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("there is no such device")]
    NotFound,
    #[error("no server can take this device now")]
    ServerUnavailable,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// A device with an open session, once the transaction is committed.
#[derive(Clone, Debug)]
pub struct Connection {
    pub session: SessionId,
    pub device: Device,
    pub server: Server,
    /// The server the device was moved away from. After COMMIT, call `Hub::server_changed` for both.
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
    lock_device(tx, user, id).await?;
    let device = devices::find(tx, user, id).await?.ok_or(ConnectError::NotFound)?;
    let current = servers::find(tx, device.server).await?;
    let target = match (current, region) {
        (Some(server), None) => server,
        (Some(server), Some(region)) if server.region == region => server,
        (Some(server), Some(region)) => servers::candidates(tx, Some(region), now)
            .await?
            .into_iter()
            // the device keeps its address, so it can only move within the pool
            .find(|candidate| candidate.pool == server.pool)
            .ok_or(ConnectError::ServerUnavailable)?,
        (None, _) => return Err(ConnectError::ServerUnavailable),
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
    if moved_from.is_some() {
        // last: from here to COMMIT both servers' rows are locked
        move_device(tx, id, target.id).await?;
    }
    Ok(Connection { session, device, server: target, moved_from })
}

async fn lock_device(tx: &mut TenantTx, user: UserId, id: DeviceId) -> Result<(), ConnectError> {
    let tenant = tx.tenant().uuid();
    sqlx::query_scalar!(
        "select device_id from cvault.devices
         where tenant_id = $1 and user_id = $2 and device_id = $3 and status = 'active' for no key update",
        tenant,
        user.uuid(),
        id.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .map(drop)
    .ok_or(ConnectError::NotFound)
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
                Some(_) | None => ConnectError::Db(error),
            }
        })?;
    Ok(())
}
