//! Deleting a tenant. Several transactions, so that no server's row is locked for long; each can be repeated, and a
//! deletion that was interrupted is finished by asking for it again.

use cvault_types::{DeviceId, RequestId, TenantId, UserId};
use http::StatusCode;
use serde_json::json;
use uuid::Uuid;

use super::{Actor, TenantError, note};
use crate::app::App;
use crate::auth::{api_keys, refresh};
use crate::db::DbError;
use crate::devices::{self, RevokeError};
use crate::http::Problem;
use crate::http::idempotency::{self, Claim};
use crate::portal::accounts;
use crate::tenancy::TenantTx;

/// Devices looked up at once; each is withdrawn in a transaction of its own.
const BATCH: i64 = 200;

/// Revokes the tenant's keys, withdraws its devices, destroys its data key.
///
/// # Errors
/// [`TenantError::NotFound`] also for a tenant that is deleted already.
pub async fn delete(app: &App, id: TenantId, actor: &Actor) -> Result<(), TenantError> {
    close(app, id).await?;
    loop {
        withdraw_devices(app, id, actor).await?;
        let mut tx = app.db.tenancy.begin(id).await?;
        let work = destroy(&mut tx, actor, app).await;
        if tx.finish(work).await? {
            return Ok(());
        }
    }
}

/// From here nobody of the tenant gets in, neither its users nor its own people, whose addresses are free again.
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
    accounts::delete_all(&mut tx).await?;
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

/// `false`, and nothing changed, when the tenant has got a device meanwhile.
async fn destroy(tx: &mut TenantTx, actor: &Actor, app: &App) -> Result<bool, TenantError> {
    let tenant = tx.tenant().uuid();
    // waits for registrations in flight, which hold the row; those that come later find it suspended
    sqlx::query!("select tenant_id from cvault.tenants where tenant_id = $1 for no key update", tenant)
        .fetch_optional(tx.conn())
        .await
        .map_err(DbError::from)?;
    let done = sqlx::query!(
        "update cvault.tenants set status = 'deleted', data_key_sealed = null, deleted_at = $2, updated_at = $2
         where tenant_id = $1 and not exists (select from cvault.devices where tenant_id = $1 and status = 'active')",
        tenant,
        app.clock.now()
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    note(tx, actor, "tenant.delete", json!({})).await?;
    keep_answer(tx, actor, app).await.map_err(TenantError::Idempotency)?;
    Ok(true)
}

/// For a retry of the request that asks for the deletion.
async fn keep_answer(tx: &mut TenantTx, actor: &Actor, app: &App) -> Result<(), Problem> {
    match idempotency::claim(tx, app, actor.name.clone()).await? {
        Claim::Proceed(place) => idempotency::keep(tx, &app.keys, place, StatusCode::NO_CONTENT, &()).await,
        Claim::Replay(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::devices::{DeviceName, KeyRequest, NewDevice, RegisterError};
    use crate::testing::{World, eventually, request_id};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_registration_in_flight_does_not_survive_the_deletion_of_its_tenant() {
        let (world, _) = World::with_server().await;
        let person = world.person().await;
        let app = &world.app;
        let new = NewDevice {
            name: DeviceName::parse("d").unwrap(),
            platform: None,
            keys: KeyRequest { public_key: None, preshared: true },
            region: None,
        };
        let mut flying = app.db.tenancy.begin(person.tenant).await.unwrap();
        let (now, mut rng) = (app.clock.now(), StdRng::from_os_rng());
        devices::register(&mut flying, &app.keys, person.user, new, now, &mut rng, request_id()).await.unwrap();
        let deleting = tokio::spawn({
            let app = app.clone();
            async move { delete(&app, person.tenant, &Actor { name: "cli".to_owned(), request_id: None }).await }
        });
        let mut superuser = world.superuser().await;
        eventually("the deletion waits for it", Duration::from_secs(5), async || {
            sqlx::query_scalar!(
                r#"select exists (select from pg_locks l join pg_stat_activity a using (pid)
                                  where a.datname = current_database() and not l.granted) as "waits!""#
            )
            .fetch_one(&mut superuser)
            .await
            .unwrap()
        })
        .await;
        flying.commit().await.unwrap();
        deleting.await.unwrap().unwrap();
        assert!(active_devices(app, person.tenant).await.unwrap().is_empty());
        let placed: i64 = sqlx::query_scalar("select count(*) from platform.peers where removed_revision is null")
            .fetch_one(&mut superuser)
            .await
            .unwrap();
        assert_eq!(placed, 0);
    }

    #[tokio::test]
    async fn a_suspended_tenant_gets_no_devices_and_one_with_devices_is_not_destroyed() {
        let (world, _) = World::with_server().await;
        let person = world.person().await;
        world.register(person, "d").await.unwrap();
        let actor = Actor { name: "cli".to_owned(), request_id: None };
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        assert!(!destroy(&mut tx, &actor, &world.app).await.unwrap());
        tx.commit().await.unwrap();
        close(&world.app, person.tenant).await.unwrap();
        assert!(matches!(world.register(person, "e").await, Err(RegisterError::TenantClosed)));
        delete(&world.app, person.tenant, &actor).await.unwrap();
        assert!(matches!(delete(&world.app, person.tenant, &actor).await, Err(TenantError::NotFound)));
    }
}
