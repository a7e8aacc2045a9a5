//! Deleting a device: its keys are destroyed, its session is closed, its server is told, its address rests.

use cvault_types::{DeviceId, RequestId, ServerId, UserId};
use time::OffsetDateTime;

use crate::audit;
use crate::db::DbError;
use crate::sessions;
use crate::tenancy::TenantTx;

#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    #[error("there is no such device")]
    NotFound,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// A device that is gone once the transaction is committed.
#[derive(Clone, Copy, Debug)]
pub struct Revoked {
    pub server: ServerId,
    /// When the server has acknowledged this revision, the device's tunnel is dead. `None`: it was on no server.
    pub revision: Option<u64>,
}

/// Whether `user` had this device, as long as that is remembered.
///
/// # Errors
/// Those of the database.
pub async fn is_revoked(tx: &mut TenantTx, user: UserId, id: DeviceId) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    Ok(sqlx::query_scalar!(
        r#"select exists (select from cvault.devices
                          where tenant_id = $1 and user_id = $2 and device_id = $3 and status = 'revoked') as "revoked!""#,
        tenant,
        user.uuid(),
        id.uuid()
    )
    .fetch_one(tx.conn())
    .await?)
}

/// Deletes a device of `user`. After COMMIT, call `Hub::server_changed` for its server.
///
/// # Errors
/// By variant.
pub async fn revoke(
    tx: &mut TenantTx,
    user: UserId,
    id: DeviceId,
    now: OffsetDateTime,
    request_id: RequestId,
) -> Result<Revoked, RevokeError> {
    let tenant = tx.tenant().uuid();
    let server = sqlx::query_scalar!(
        "update cvault.devices
         set status = 'revoked', revoked_at = $4, private_key_sealed = null, preshared_key_sealed = null
         where tenant_id = $1 and user_id = $2 and device_id = $3 and status = 'active'
         returning server_id",
        tenant,
        user.uuid(),
        id.uuid(),
        now,
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .map(ServerId::from_uuid)
    .ok_or(RevokeError::NotFound)?;
    sessions::close(tx, id, now).await?;
    let entry = audit::Entry {
        actor: &user.to_string(),
        action: "device.delete",
        target: &id.to_string(),
        details: serde_json::json!({ "server": server.to_string() }),
        request_id: Some(request_id),
    };
    audit::record(tx, entry).await?;
    // last: from here to COMMIT the server's row is locked
    let revision = sqlx::query_scalar!("select platform.retire_peer($1)", id.uuid())
        .fetch_one(tx.conn())
        .await
        .map_err(DbError::from)?;
    Ok(Revoked { server, revision: revision.and_then(|revision| u64::try_from(revision).ok()) })
}
