//! Sessions: one connection of a device. Opened by `connect` or by the first handshake a server reports, closed by
//! `disconnect`, by silence, or with the device.
//!
//! All times are the receiver's: when the report arrived, minus the ages the agent measured on its own clock.

mod connect;
mod disconnect;
mod track;

use cvault_types::{DeviceId, SessionId, UserId};
use time::OffsetDateTime;

use crate::db::DbError;
use crate::tenancy::TenantTx;

pub use connect::{ConnectError, Connection, connect};
pub use disconnect::{Held, hold, reclaim};
pub use track::{Handshake, close_silent, note_handshakes};

#[cfg(test)]
mod tests;

/// A session without a handshake for this long is over (REJECT_AFTER_TIME of WireGuard).
pub const SILENT_AFTER_SECONDS: i64 = 180;

/// An open session.
#[derive(Clone, Debug)]
pub struct Session {
    pub id: SessionId,
    pub device: DeviceId,
    pub connected_at: OffsetDateTime,
    pub rx_bytes: i64,
    pub tx_bytes: i64,
}

/// The open sessions of a user, at most one for each device.
///
/// # Errors
/// Those of the database.
pub async fn open_sessions(tx: &mut TenantTx, user: UserId) -> Result<Vec<Session>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        "select s.session_id, s.device_id, s.connected_at, s.rx_bytes, s.tx_bytes
         from cvault.sessions s join cvault.devices d on (d.tenant_id, d.device_id) = (s.tenant_id, s.device_id)
         where s.tenant_id = $1 and d.user_id = $2 and d.status = 'active' and s.status = 'active'
         order by s.device_id",
        tenant,
        user.uuid()
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Session {
            id: SessionId::from_uuid(row.session_id),
            device: DeviceId::from_uuid(row.device_id),
            connected_at: row.connected_at,
            rx_bytes: row.rx_bytes,
            tx_bytes: row.tx_bytes,
        })
        .collect())
}

/// Closes the open session of a device, if there is one.
///
/// # Errors
/// Those of the database.
pub async fn close(tx: &mut TenantTx, device: DeviceId, now: OffsetDateTime) -> Result<Option<SessionId>, DbError> {
    let tenant = tx.tenant().uuid();
    let closed = sqlx::query_scalar!(
        "update cvault.sessions
         set status = 'disconnected', disconnected_at = greatest($3, connected_at)
         where tenant_id = $1 and device_id = $2 and status = 'active'
         returning session_id",
        tenant,
        device.uuid(),
        now,
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(closed.map(SessionId::from_uuid))
}
