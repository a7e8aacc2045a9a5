//! Deleting a user. Several transactions, as no server's row may be locked for long and each device is an own one; each
//! can be repeated, and a deletion that was interrupted is finished by asking for it again.

use cvault_types::{DeviceId, RequestId, TenantId, UserId};
use http::StatusCode;
use serde_json::json;
use uuid::Uuid;

use crate::app::App;
use crate::audit;
use crate::db::DbError;
use crate::devices::{self, RevokeError};
use crate::http::Problem;
use crate::http::idempotency::{self, Claim};
use crate::tenancy::TenantTx;
use crate::tenants::Actor;

#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    #[error("there is no such user")]
    NotFound,
    /// The `Idempotency-Key` of the request.
    #[error("{}", .0.sentences())]
    Idempotency(Problem),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What was found of the user.
enum Found {
    Present,
    Deleted,
}

/// Ends the user's logins, withdraws its devices and destroys their keys, forgets its address, name and password. What it
/// has used stays in the tenant's ledger under an id that names nobody. Deleting a deleted user changes nothing.
///
/// # Errors
/// By variant.
pub async fn delete(app: &App, tenant: TenantId, id: UserId, actor: &Actor) -> Result<(), DeleteError> {
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let work = close(&mut tx, id).await;
    if let Found::Deleted = tx.finish(work).await? {
        return Ok(());
    }
    loop {
        withdraw_devices(app, tenant, id, actor).await?;
        let mut tx = app.db.tenancy.begin(tenant).await?;
        let work = erase(&mut tx, app, id, actor).await;
        if tx.finish(work).await? {
            return Ok(());
        }
    }
}

/// From here the user gets no device and no token. Waits for registrations in flight, which hold the row.
async fn close(tx: &mut TenantTx, id: UserId) -> Result<Found, DeleteError> {
    let tenant = tx.tenant().uuid();
    let status = sqlx::query_scalar!(
        "select status from cvault.users where tenant_id = $1 and user_id = $2 for update",
        tenant,
        id.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(DeleteError::NotFound)?;
    if status == "deleted" {
        return Ok(Found::Deleted);
    }
    sqlx::query!(
        "update cvault.users set status = 'disabled' where tenant_id = $1 and user_id = $2",
        tenant,
        id.uuid()
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    forget_tokens(tx, id).await?;
    Ok(Found::Present)
}

async fn withdraw_devices(app: &App, tenant: TenantId, id: UserId, actor: &Actor) -> Result<(), DbError> {
    let request_id = actor.request_id.unwrap_or_else(|| RequestId::from_uuid(Uuid::now_v7()));
    for device in active_devices(app, tenant, id).await? {
        let mut tx = app.db.tenancy.begin(tenant).await?;
        match devices::revoke(&mut tx, id, device, app.clock.now(), request_id).await {
            Ok(revoked) => {
                tx.commit().await?;
                app.nodes.server_changed(revoked.server);
            }
            // somebody was faster
            Err(RevokeError::NotFound) => tx.rollback().await?,
            Err(RevokeError::Db(error)) => return Err(error),
        }
    }
    Ok(())
}

async fn active_devices(app: &App, tenant: TenantId, id: UserId) -> Result<Vec<DeviceId>, DbError> {
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let ids = sqlx::query_scalar!(
        "select device_id from cvault.devices where tenant_id = $1 and user_id = $2 and status = 'active' order by device_id",
        tenant.uuid(),
        id.uuid()
    )
    .fetch_all(tx.conn())
    .await?;
    tx.commit().await?;
    Ok(ids.into_iter().map(DeviceId::from_uuid).collect())
}

/// `false`, and nothing changed, when the user has got a device meanwhile.
async fn erase(tx: &mut TenantTx, app: &App, id: UserId, actor: &Actor) -> Result<bool, DeleteError> {
    let tenant = tx.tenant().uuid();
    let erased = sqlx::query!(
        "update cvault.users
         set status = 'deleted', deleted_at = $3, email = null, external_user_id = null, password_hash = null
         where tenant_id = $1 and user_id = $2 and status <> 'deleted' and not exists (
             select from cvault.devices d where d.tenant_id = $1 and d.user_id = $2 and d.status = 'active')",
        tenant,
        id.uuid(),
        app.clock.now()
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    forget_tokens(tx, id).await?;
    if erased.rows_affected() == 0 {
        // by another deletion of the same user, or not at all
        return Ok(sqlx::query_scalar!(
            r#"select exists (select from cvault.users where tenant_id = $1 and user_id = $2 and status = 'deleted') as "gone!""#,
            tenant,
            id.uuid()
        )
        .fetch_one(tx.conn())
        .await
        .map_err(DbError::from)?);
    }
    let entry = audit::Entry {
        actor: &actor.name,
        action: "user.delete",
        target: &id.to_string(),
        details: json!({}),
        request_id: actor.request_id,
    };
    audit::record(tx, entry).await?;
    keep_answer(tx, app, actor).await.map_err(DeleteError::Idempotency)?;
    Ok(true)
}

/// For a retry of the request that asks for the deletion.
async fn keep_answer(tx: &mut TenantTx, app: &App, actor: &Actor) -> Result<(), Problem> {
    match idempotency::claim(tx, app, actor.name.clone()).await? {
        Claim::Proceed(place) => idempotency::keep(tx, &app.keys, place, StatusCode::NO_CONTENT, &()).await,
        Claim::Replay(_) => Ok(()),
    }
}

async fn forget_tokens(tx: &mut TenantTx, id: UserId) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!("delete from cvault.refresh_tokens where tenant_id = $1 and user_id = $2", tenant, id.uuid())
        .execute(tx.conn())
        .await?;
    Ok(())
}
