//! Deleting a tenant. Several transactions, so that no server's row is locked for long; each can be repeated, and a
//! deletion that was interrupted is finished by a periodic task, or by asking for it again.

use cvault_types::{DeviceId, RequestId, TenantId, UserId};
use http::StatusCode;
use serde_json::json;
use time::{Duration, OffsetDateTime};
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

/// Users erased in one transaction.
const USERS: i64 = 1_000;
/// Deletions in one run of [`finish_deletions`].
const TENANTS: i64 = 20;
/// Whoever asked for a deletion is at it for so long; then it is taken to be interrupted.
const INTERRUPTED: Duration = Duration::minutes(1);

/// Revokes the tenant's keys, withdraws its devices, erases its people and users, and destroys its data key. What it has
/// used stays in the ledger under ids that name nobody. Deleting a deleted tenant changes nothing.
///
/// # Errors
/// [`TenantError::NotFound`] for one that never was.
pub async fn delete(app: &App, id: TenantId, actor: &Actor) -> Result<(), TenantError> {
    match close(app, id, actor).await? {
        Closed::Deleting => erase(app, id, actor).await,
        Closed::Deleted => Ok(()),
    }
}

/// Goes on with deletions that were interrupted. Returns how many were finished.
///
/// # Errors
/// The first fault; one tenant's does not keep the others.
pub async fn finish_deletions(app: &App) -> Result<u64, DbError> {
    let tenants = sqlx::query_scalar!(
        "select tenant_id from cvault.tenants
         where deleting_since <= $1 and status <> 'deleted' order by deleting_since, tenant_id limit $2",
        app.clock.now() - INTERRUPTED,
        TENANTS
    )
    .fetch_all(&app.db.sys)
    .await?;
    let actor = Actor { name: "platform".to_owned(), request_id: None };
    let (mut finished, mut fault) = (0, None);
    for tenant in tenants {
        match erase(app, TenantId::from_uuid(tenant), &actor).await {
            Ok(()) => finished += 1,
            Err(TenantError::Db(error)) => fault = fault.or(Some(error)),
            Err(error) => tracing::error!(error = crate::http::problem::chain(&error), "a deletion cannot be finished"),
        }
    }
    fault.map_or(Ok(finished), Err)
}

enum Closed {
    Deleting,
    Deleted,
}

/// From here nobody of the tenant gets in, neither its users nor its own people, whose addresses are free again.
async fn close(app: &App, id: TenantId, actor: &Actor) -> Result<Closed, TenantError> {
    let mut tx = app.db.tenancy.begin(id).await?;
    let work = close_in(&mut tx, actor, app.clock.now()).await;
    tx.finish(work).await
}

async fn close_in(tx: &mut TenantTx, actor: &Actor, now: OffsetDateTime) -> Result<Closed, TenantError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select status = 'deleted' as "deleted!", deleting_since is not null as "deleting!"
           from cvault.tenants where tenant_id = $1 for no key update"#,
        tenant
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(TenantError::NotFound)?;
    if row.deleted {
        return Ok(Closed::Deleted);
    }
    if row.deleting {
        return Ok(Closed::Deleting);
    }
    sqlx::query!(
        "update cvault.tenants set status = 'suspended', deleting_since = $2, updated_at = $2 where tenant_id = $1",
        tenant,
        now
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    api_keys::revoke_all(tx, now).await?;
    refresh::revoke_all(tx, now).await?;
    accounts::delete_all(tx).await?;
    note(tx, actor, "tenant.delete", json!({})).await?;
    Ok(Closed::Deleting)
}

/// What remains to be done to a tenant that is closed. May be repeated, and done by several at once.
async fn erase(app: &App, id: TenantId, actor: &Actor) -> Result<(), TenantError> {
    loop {
        withdraw_devices(app, id, actor).await?;
        erase_users(app, id).await?;
        let mut tx = app.db.tenancy.begin(id).await?;
        let work = destroy(&mut tx, actor, app).await;
        if tx.finish(work).await? {
            return Ok(());
        }
    }
}

/// As the deletion of each does; see [`crate::users::delete`].
async fn erase_users(app: &App, id: TenantId) -> Result<(), DbError> {
    loop {
        let mut tx = app.db.tenancy.begin(id).await?;
        let erased = sqlx::query!(
            "update cvault.users u
             set status = 'deleted', deleted_at = $2, email = null, external_user_id = null, password_hash = null
             from (select user_id from cvault.users where tenant_id = $1 and status <> 'deleted'
                   order by user_id limit $3 for no key update) present
             where u.tenant_id = $1 and u.user_id = present.user_id",
            id.uuid(),
            app.clock.now(),
            USERS
        )
        .execute(tx.conn())
        .await?;
        tx.commit().await?;
        if erased.rows_affected() < USERS.unsigned_abs() {
            return Ok(());
        }
    }
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

/// `false`, and nothing changed, when the tenant has got a device or a user meanwhile.
async fn destroy(tx: &mut TenantTx, actor: &Actor, app: &App) -> Result<bool, TenantError> {
    let tenant = tx.tenant().uuid();
    // waits for registrations in flight, which hold the row; those that come later find it suspended
    let deleted = sqlx::query_scalar!(
        r#"select status = 'deleted' as "deleted!" from cvault.tenants where tenant_id = $1 for no key update"#,
        tenant
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?;
    if deleted == Some(true) {
        // somebody else was at it too
        keep_answer(tx, actor, app).await.map_err(TenantError::Idempotency)?;
        return Ok(true);
    }
    let done = sqlx::query!(
        "update cvault.tenants
         set status = 'deleted', data_key_sealed = null, deleted_at = $2, updated_at = $2, whitelabel_config = '{}',
             allowed_origins = '{}', client_dns = null, client_allowed_ips = null, client_mtu = null
         where tenant_id = $1
           and not exists (select from cvault.devices where tenant_id = $1 and status = 'active')
           and not exists (select from cvault.users where tenant_id = $1 and status <> 'deleted')",
        tenant,
        app.clock.now()
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if done.rows_affected() == 0 {
        return Ok(false);
    }
    sqlx::query!("delete from cvault.refresh_tokens where tenant_id = $1", tenant)
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    sqlx::query!("delete from cvault.outbox where tenant_id = $1", tenant)
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    sqlx::query!("delete from cvault.request_logs where tenant_id = $1", tenant)
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    note(tx, actor, "tenant.erase", json!({})).await?;
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
    use cvault_types::tenant::{TenantStatus, UpdateTenantRequest};
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;
    use crate::auth::api_keys::{KeySettings, ManageError};
    use crate::auth::email::Email;
    use crate::devices::{DeviceName, KeyRequest, NewDevice, RegisterError, Registration};
    use crate::testing::{World, request_id, waiting};
    use crate::users::{self, ExternalId, VouchError};

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
        let data_key = app.data_keys.sealed(&app.db.tenancy, person.tenant).await.unwrap().unwrap();
        let mut flying = app.db.tenancy.begin(person.tenant).await.unwrap();
        let (now, mut rng) = (app.clock.now(), StdRng::from_os_rng());
        let (tenant, user) = (person.tenant, person.user);
        let device = Registration::new(tenant, user, new, &app.keys, &data_key, &mut rng, request_id()).unwrap();
        devices::register(&mut flying, device, now).await.unwrap();
        let deleting = tokio::spawn({
            let app = app.clone();
            async move { delete(&app, person.tenant, &Actor { name: "cli".to_owned(), request_id: None }).await }
        });
        let mut superuser = world.superuser().await;
        waiting(&mut superuser, 1).await;
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
        close(&world.app, person.tenant, &actor).await.unwrap();
        assert!(matches!(world.register(person, "e").await, Err(RegisterError::TenantClosed)));
        delete(&world.app, person.tenant, &actor).await.unwrap();
        delete(&world.app, person.tenant, &actor).await.unwrap();
        let nobody = TenantId::from_uuid(Uuid::now_v7());
        assert!(matches!(delete(&world.app, nobody, &actor).await, Err(TenantError::NotFound)));
    }

    #[tokio::test]
    async fn a_user_whose_registration_was_let_in_before_the_deletion_of_its_tenant_is_not_made() {
        let (world, _) = World::with_server().await;
        let person = world.person().await;
        let actor = Actor { name: "cli".to_owned(), request_id: None };
        let (email, name) = (Email::parse("late@example.com").unwrap(), ExternalId::parse("late").unwrap());
        let late = async || {
            let now = world.app.clock.now();
            let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
            let refused = users::register(&mut tx, &email, "hash", now).await.unwrap_err();
            assert!(matches!(refused, users::RegisterError::TenantClosed), "{refused}");
            let refused = users::vouch(&mut tx, &name, &actor, now).await.unwrap_err();
            assert!(matches!(refused, VouchError::TenantClosed), "{refused}");
            tx.rollback().await.unwrap();
        };
        let late_key = async || {
            let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
            let now = world.app.clock.now();
            let key = KeySettings { name: "late".to_owned(), scopes: Vec::new(), expires_at: None };
            let (secrets, rng) = (&world.app.secrets, &mut StdRng::from_os_rng());
            let refused = api_keys::add(&mut tx, secrets, &key, &actor, now, rng).await.map(drop).unwrap_err();
            assert!(matches!(refused, ManageError::NoTenant), "{refused}");
            tx.rollback().await.unwrap();
        };
        let mut closing = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        close_in(&mut closing, &actor, world.app.clock.now()).await.unwrap();
        let mut superuser = world.superuser().await;
        let closed = async {
            waiting(&mut superuser, 2).await;
            closing.commit().await.unwrap();
        };
        tokio::join!(late(), late_key(), closed);
        late().await;
        delete(&world.app, person.tenant, &actor).await.unwrap();
        late().await;
    }

    #[tokio::test]
    async fn a_deletion_that_was_interrupted_is_never_taken_back_and_finished_by_itself() {
        let (world, _) = World::with_server().await;
        let person = world.person().await;
        world.register(person, "d").await.unwrap();
        let actor = Actor { name: "cli".to_owned(), request_id: None };
        close(&world.app, person.tenant, &actor).await.unwrap();
        let shown = crate::tenants::get(&world.app, person.tenant).await.unwrap();
        assert_eq!(shown.status, TenantStatus::Deleting);
        for status in [TenantStatus::Active, TenantStatus::Suspended] {
            let request = UpdateTenantRequest { status: Some(status), ..UpdateTenantRequest::default() };
            let refused = crate::tenants::update(&world.app, person.tenant, request, &actor).await.unwrap_err();
            assert_eq!(refused.code(), cvault_types::ErrorCode::NotFound);
        }
        assert_eq!(finish_deletions(&world.app).await.unwrap(), 0, "somebody is at it");
        let mut superuser = world.superuser().await;
        sqlx::query("update cvault.tenants set deleting_since = now() - interval '2 minutes'")
            .execute(&mut superuser)
            .await
            .unwrap();
        assert_eq!(finish_deletions(&world.app).await.unwrap(), 1);
        assert_eq!(finish_deletions(&world.app).await.unwrap(), 0);
        let left: (String, i64, i64) = sqlx::query_as(
            "select (select status from cvault.tenants),
                    (select count(*) from platform.peers where removed_revision is null),
                    (select count(*) from cvault.users where email is not null)",
        )
        .fetch_one(&mut superuser)
        .await
        .unwrap();
        assert_eq!(left, ("deleted".to_owned(), 0, 0));
        let noted: Vec<(String, String)> =
            sqlx::query_as("select actor, action from cvault.audit_log where action like 'tenant.%' order by audit_id")
                .fetch_all(&mut superuser)
                .await
                .unwrap();
        let noted: Vec<_> = noted.iter().map(|(actor, action)| (actor.as_str(), action.as_str())).collect();
        assert_eq!(noted, [("cli", "tenant.delete"), ("platform", "tenant.erase")]);
    }
}
