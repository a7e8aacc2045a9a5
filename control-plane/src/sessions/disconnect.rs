//! `disconnect`: closes the session, and takes the address back where the pool is set so.

use cvault_types::{DeviceId, ServerId, UserId};

use crate::db::DbError;
use crate::tenancy::TenantTx;

/// A device that is being disconnected.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub server: ServerId,
    /// Its pool takes the address back: end the transaction with [`reclaim`].
    pub reclaims: bool,
}

/// Locks an active device of `user`, so that it cannot be connected meanwhile; `None` when there is none.
///
/// # Errors
/// Those of the database.
pub async fn hold(tx: &mut TenantTx, user: UserId, device: DeviceId) -> Result<Option<Held>, DbError> {
    let row = sqlx::query!(
        r#"select d.server_id, platform.pool_reclaims(d.pool_id) and not d.reclaimed as "reclaims!"
           from cvault.devices d
           where d.tenant_id = $1 and d.user_id = $2 and d.device_id = $3 and d.status = 'active'
           for no key update of d"#,
        tx.tenant().uuid(),
        user.uuid(),
        device.uuid()
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(|row| Held { server: ServerId::from_uuid(row.server_id), reclaims: row.reclaims }))
}

/// Takes the device off its server and its address into quarantine. From here to COMMIT the server's row is locked; after
/// COMMIT, call `Hub::server_changed`.
///
/// # Errors
/// Those of the database.
pub async fn reclaim(tx: &mut TenantTx, device: DeviceId) -> Result<(), DbError> {
    sqlx::query_scalar!("select platform.reclaim_address($1)", device.uuid()).fetch_one(tx.conn()).await?;
    Ok(())
}
