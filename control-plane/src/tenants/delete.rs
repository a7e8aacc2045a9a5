//! Deleting a tenant. Several transactions, so that no server's row is locked for long; each can be repeated, and a
//! deletion that was interrupted is finished by asking for it again.

use cvault_types::{DeviceId, RequestId, TenantId, UserId};
use serde_json::json;
use uuid::Uuid;

use super::{Actor, TenantError, note};
use crate::app::App;
use crate::auth::{api_keys, refresh};
use crate::db::DbError;
use crate::devices::{self, RevokeError};
use crate::tenancy::TenantTx;

/// Devices looked up at once; each is withdrawn in a transaction of its own.
const BATCH: i64 = 200;

/// Revokes the tenant's keys, withdraws its devices, destroys its data key.
///
/// # Errors
/// [`TenantError::NotFound`] also for a tenant that is deleted already.
pub async fn delete(app: &App, id: TenantId, actor: &Actor) -> Result<(), TenantError> {
    close(app, id).await?;
    withdraw_devices(app, id, actor).await?;
    let mut tx = app.db.tenancy.begin(id).await?;
    let work = destroy(&mut tx, actor, app).await;
    tx.finish(work).await
}

/// From here nobody of the tenant gets in.
async fn close(app: &App, id: TenantId) -> Result<(), TenantError> {
    let now = app.clock.now();
    let mut tx = app.db.tenancy.begin(id).await?;
    let closed = sqlx::query!(
        "update cvault.tenants set status = 'suspended', updated_at = $2 where tenant_id = $1 and status <> 'deleted'",
        id.uuid(),
        now
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if closed.rows_affected() == 0 {
        return tx.finish(Err(TenantError::NotFound)).await;
    }
    api_keys::revoke_all(&mut tx, now).await?;
    refresh::revoke_all(&mut tx, now).await?;
    Ok(tx.commit().await?)
}

async fn withdraw_devices(app: &App, id: TenantId, actor: &Actor) -> Result<(), TenantError> {
    let request_id = actor.request_id.unwrap_or_else(|| RequestId::from_uuid(Uuid::now_v7()));
    loop {
        let batch = active_devices(app, id).await?;
        if batch.is_empty() {
            return Ok(());
        }
        for (user, device) in batch {
            let mut tx = app.db.tenancy.begin(id).await?;
            match devices::revoke(&mut tx, user, device, app.clock.now(), request_id).await {
                Ok(revoked) => {
                    tx.commit().await?;
                    app.nodes.server_changed(revoked.server);
                }
                // its own user was faster
                Err(RevokeError::NotFound) => tx.rollback().await?,
                Err(RevokeError::Db(error)) => return Err(error.into()),
            }
        }
    }
}

async fn active_devices(app: &App, id: TenantId) -> Result<Vec<(UserId, DeviceId)>, DbError> {
    let mut tx = app.db.tenancy.begin(id).await?;
    let rows = sqlx::query!(
        "select user_id, device_id from cvault.devices where tenant_id = $1 and status = 'active'
         order by device_id limit $2",
        id.uuid(),
        BATCH
    )
    .fetch_all(tx.conn())
    .await?;
    tx.commit().await?;
    Ok(rows.into_iter().map(|row| (UserId::from_uuid(row.user_id), DeviceId::from_uuid(row.device_id))).collect())
}

async fn destroy(tx: &mut TenantTx, actor: &Actor, app: &App) -> Result<(), TenantError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.tenants set status = 'deleted', data_key_sealed = null, deleted_at = $2, updated_at = $2
         where tenant_id = $1",
        tenant,
        app.clock.now()
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    Ok(note(tx, actor, "tenant.delete", json!({})).await?)
}
