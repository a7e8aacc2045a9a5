//! Deleting a user. Several transactions, as no server's row may be locked for long and each device is an own one; each
//! can be repeated, and a deletion that was interrupted is finished by a periodic task, or by asking for it again.

use cvault_types::{DeviceId, RequestId, TenantId, UserId};
use http::StatusCode;
use serde_json::json;
use time::{Duration, OffsetDateTime};
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

/// Deletions in one run of [`finish_deletions`].
const USERS: i64 = 100;
/// Whoever asked for a deletion is at it for so long; then it is taken to be interrupted.
const INTERRUPTED: Duration = Duration::minutes(1);

/// Ends the user's logins, forgets its address, name and password, withdraws its devices and destroys their keys. What it
/// has used stays in the tenant's ledger under an id that names nobody. Deleting a deleted user changes nothing.
///
/// # Errors
/// By variant.
pub async fn delete(app: &App, tenant: TenantId, id: UserId, actor: &Actor) -> Result<(), DeleteError> {
    match close(app, tenant, id, actor).await? {
        Closed::Deleting => erase(app, tenant, id, actor).await,
        Closed::Deleted => Ok(()),
    }
}

/// Goes on with deletions that were interrupted, in all tenants. Returns how many were finished.
///
/// # Errors
/// The first fault; one user's does not keep the others.
pub async fn finish_deletions(app: &App) -> Result<u64, DbError> {
    let users = sqlx::query!(
        "select tenant_id, user_id from cvault.users
         where deleting_since <= $1 and status <> 'deleted' order by deleting_since, user_id limit $2",
        app.clock.now() - INTERRUPTED,
        USERS
    )
    .fetch_all(&app.db.sys)
    .await?;
    let actor = Actor { name: "platform".to_owned(), request_id: None };
    let (mut finished, mut fault) = (0, None);
    for user in users {
        match erase(app, TenantId::from_uuid(user.tenant_id), UserId::from_uuid(user.user_id), &actor).await {
            Ok(()) => finished += 1,
            Err(DeleteError::Db(error)) => fault = fault.or(Some(error)),
            Err(error) => tracing::error!(error = crate::http::problem::chain(&error), "a deletion cannot be finished"),
        }
    }
    fault.map_or(Ok(finished), Err)
}

enum Closed {
    Deleting,
    Deleted,
}

/// From here the user gets no device and no token, nobody finds it, and its address is free again. Waits for
/// registrations in flight, which hold the row.
async fn close(app: &App, tenant: TenantId, id: UserId, actor: &Actor) -> Result<Closed, DeleteError> {
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let work = close_in(&mut tx, id, actor, app.clock.now()).await;
    tx.finish(work).await
}

async fn close_in(tx: &mut TenantTx, id: UserId, actor: &Actor, now: OffsetDateTime) -> Result<Closed, DeleteError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select status = 'deleted' as "deleted!", deleting_since is not null as "deleting!"
           from cvault.users where tenant_id = $1 and user_id = $2 for update"#,
        tenant,
        id.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(DeleteError::NotFound)?;
    if row.deleted {
        return Ok(Closed::Deleted);
    }
    if row.deleting {
        return Ok(Closed::Deleting);
    }
    sqlx::query!(
        "update cvault.users
         set status = 'disabled', deleting_since = $3, email = null, external_user_id = null, password_hash = null
         where tenant_id = $1 and user_id = $2",
        tenant,
        id.uuid(),
        now
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    forget_tokens(tx, id).await?;
    let entry = audit::Entry {
        actor: &actor.name,
        action: "user.delete",
        target: &id.to_string(),
        details: json!({}),
        request_id: actor.request_id,
    };
    audit::record(tx, entry).await?;
    Ok(Closed::Deleting)
}

/// What remains to be done to a user that is closed. May be repeated, and done by several at once.
async fn erase(app: &App, tenant: TenantId, id: UserId, actor: &Actor) -> Result<(), DeleteError> {
    loop {
        withdraw_devices(app, tenant, id, actor).await?;
        let mut tx = app.db.tenancy.begin(tenant).await?;
        let work = erase_in(&mut tx, app, id, actor).await;
        if tx.finish(work).await? {
            return Ok(());
        }
    }
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
async fn erase_in(tx: &mut TenantTx, app: &App, id: UserId, actor: &Actor) -> Result<bool, DeleteError> {
    let tenant = tx.tenant().uuid();
    let erased = sqlx::query!(
        "update cvault.users
         set status = 'deleted', deleted_at = $3
         where tenant_id = $1 and user_id = $2 and deleting_since is not null and status <> 'deleted' and not exists (
             select from cvault.devices d where d.tenant_id = $1 and d.user_id = $2 and d.status = 'active')",
        tenant,
        id.uuid(),
        app.clock.now()
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if erased.rows_affected() == 0 {
        // by another deletion of the same user, or not at all
        let gone = sqlx::query_scalar!(
            r#"select exists (select from cvault.users where tenant_id = $1 and user_id = $2 and status = 'deleted') as "gone!""#,
            tenant,
            id.uuid()
        )
        .fetch_one(tx.conn())
        .await
        .map_err(DbError::from)?;
        if !gone {
            return Ok(false);
        }
    }
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

#[cfg(test)]
mod tests {
    use cvault_types::user::{UpdateUser, UserStatus};

    use super::*;
    use crate::testing::{Person, World};
    use crate::users::{self, UpdateError, UserChange};

    fn actor() -> Actor {
        Actor { name: "key_of_the_tenant".to_owned(), request_id: Some(RequestId::from_uuid(Uuid::now_v7())) }
    }

    async fn enabled_again(world: &World, person: Person) -> Result<(), UpdateError> {
        let change = UpdateUser { status: Some(UserStatus::Active), ..UpdateUser::default() };
        let change = UserChange::parse(change).map_err(|_| "refused").unwrap();
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let work = users::update(&mut tx, person.user, &change, &actor(), world.app.clock.now()).await;
        tx.finish(work).await.map(drop)
    }

    #[tokio::test]
    async fn a_deletion_that_was_interrupted_is_never_taken_back_and_finished_by_itself() {
        let (world, _) = World::with_server().await;
        let person = world.person().await;
        let bystander = world.user(person.tenant, "bystander@example.com").await;
        for name in ["one", "two"] {
            world.register(person, name).await.unwrap();
        }
        world.register(bystander, "stays").await.unwrap();
        let mut superuser = world.superuser().await;
        sqlx::query("update cvault.users set password_hash = 'x', external_user_id = user_id::text")
            .execute(&mut superuser)
            .await
            .unwrap();
        let asked = actor();
        close(&world.app, person.tenant, person.user, &asked).await.unwrap();

        let named = "select count(*) from cvault.users where user_id = $1 and num_nonnulls(email, external_user_id, password_hash) > 0";
        let named: i64 = sqlx::query_scalar(named).bind(person.user.uuid()).fetch_one(&mut superuser).await.unwrap();
        assert_eq!(named, 0, "already now");
        assert!(matches!(enabled_again(&world, person).await, Err(UpdateError::NotFound)));
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        assert!(users::find(&mut tx, person.user).await.unwrap().is_none());
        let listed = users::list(&mut tx, &users::Filter::default(), None, 10).await.unwrap();
        assert_eq!(listed.iter().map(|user| user.user_id).collect::<Vec<_>>(), [bystander.user]);
        assert!(!users::is_active(&mut tx, person.user).await.unwrap());
        tx.commit().await.unwrap();
        world.register(person, "three").await.map(drop).unwrap_err();
        assert_eq!(finish_deletions(&world.app).await.unwrap(), 0, "somebody is at it");

        sqlx::query(
            "update cvault.users set deleting_since = now() - interval '2 minutes' where deleting_since is not null",
        )
        .execute(&mut superuser)
        .await
        .unwrap();
        let (here, there) = tokio::join!(finish_deletions(&world.app), finish_deletions(&world.app));
        assert!(here.unwrap() + there.unwrap() >= 1);
        assert_eq!(finish_deletions(&world.app).await.unwrap(), 0);
        assert!(matches!(enabled_again(&world, person).await, Err(UpdateError::NotFound)));
        let left: (String, i64, i64, i64) = sqlx::query_as(
            "select (select status from cvault.users where user_id = $1),
                    (select count(*) from cvault.devices where user_id = $1
                         and (status = 'active' or private_key_sealed is not null)),
                    (select count(*) from platform.peers p join cvault.devices d using (device_id)
                         where d.user_id = $1 and (p.removed_revision is null or p.preshared_key_sealed is not null)),
                    (select count(*) from platform.peers where removed_revision is null)",
        )
        .bind(person.user.uuid())
        .fetch_one(&mut superuser)
        .await
        .unwrap();
        assert_eq!(left, ("deleted".to_owned(), 0, 0, 1));
        delete(&world.app, person.tenant, person.user, &actor()).await.unwrap();
        let noted: Vec<(String, String, Option<Uuid>)> = sqlx::query_as(
            "select actor, target, request_id from cvault.audit_log where action = 'user.delete' order by audit_id",
        )
        .fetch_all(&mut superuser)
        .await
        .unwrap();
        let request_id = asked.request_id.map(|id| id.uuid());
        assert_eq!(noted, [(asked.name, person.user.to_string(), request_id)], "once, by whoever asked");
        enabled_again(&world, bystander).await.unwrap();
    }
}
