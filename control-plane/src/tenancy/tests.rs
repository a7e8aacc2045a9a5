//! The door to tenant rows under cancellation: whatever happens to a transaction, the next one is its own tenant's.

use std::time::Duration;

use rand::Rng as _;
use tokio::task::JoinSet;

use super::*;
use crate::db::{Db, DbConfig};
use crate::testing::World;

async fn small(world: &World) -> Db {
    let config = DbConfig { app_connections: 4, ..world.database.config() };
    Db::connect(&config).await.unwrap()
}

/// What the transaction sees of itself: its own tenant, and only rows of it.
async fn sees_itself(tenancy: &Tenancy, tenant: TenantId) -> Result<(), DbError> {
    let mut tx = tenancy.begin(tenant).await?;
    let seen = sqlx::query!(
        r#"select cvault.tenant_id() as tenant, pg_current_xact_id_if_assigned()::text as xid,
                  (select count(*) from cvault.tenants) as "rows!",
                  (select count(*) from cvault.tenants where tenant_id = $1) as "own!""#,
        tenant.uuid()
    )
    .fetch_one(tx.conn())
    .await?;
    assert_eq!(seen.tenant, Some(tenant.uuid()), "another tenant's context");
    assert_eq!((seen.rows, seen.own), (1, 1), "rows of another tenant");
    assert_eq!(seen.xid, None, "a transaction that had already written");
    sqlx::query!("update cvault.tenants set updated_at = now() where tenant_id = $1", tenant.uuid())
        .execute(tx.conn())
        .await?;
    tx.commit().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_cancelled_transactions_leaves_no_connection_in_another_tenants_context() {
    let world = World::new().await;
    let mut tenants = Vec::new();
    for _ in 0..8 {
        tenants.push(world.person().await.tenant);
    }
    let db = small(&world).await;
    let mut tasks = JoinSet::new();
    let mut cancelled = 0;
    for number in 0..2_000usize {
        let (tenancy, tenant) = (db.tenancy.clone(), tenants[number % tenants.len()]);
        // dropped after a random number of polls, so at any await point of BEGIN, the work or COMMIT
        let polls = if number % 10 == 0 { rand::rng().random_range(1..12) } else { usize::MAX };
        tasks.spawn(async move { limited(polls, sees_itself(&tenancy, tenant)).await });
        if tasks.len() >= 32 {
            cancelled += usize::from(finished(tasks.join_next().await));
        }
    }
    while let Some(done) = tasks.join_next().await {
        cancelled += usize::from(finished(Some(done)));
    }
    assert!((50..=200).contains(&cancelled), "{cancelled} cancelled of 2000");
    let mut superuser = world.superuser().await;
    crate::testing::eventually("no session is left inside a transaction", Duration::from_secs(5), async || {
        sqlx::query_scalar!(
            // every open transaction holds a lock on its own number; the role's activity is not tracked
            r#"select count(*) = 0 as "none!" from pg_locks l join pg_stat_activity a using (pid)
               where a.datname = current_database() and a.usename = 'cvault_app' and l.locktype = 'virtualxid'"#
        )
        .fetch_one(&mut superuser)
        .await
        .unwrap()
    })
    .await;
    for tenant in tenants {
        sees_itself(&db.tenancy, tenant).await.unwrap();
    }
}

fn finished(done: Option<Result<Option<Result<(), DbError>>, tokio::task::JoinError>>) -> bool {
    match done.expect("there are tasks").expect("no assertion has failed") {
        Some(outcome) => {
            // while connections are being replaced, one may not be had in time; anything else is a fault
            assert!(matches!(outcome, Ok(()) | Err(DbError::Unavailable(_))), "{outcome:?}");
            false
        }
        None => true,
    }
}

/// Polls `work` so many times, then drops it: `None`.
async fn limited<F: Future>(polls: usize, work: F) -> Option<F::Output> {
    let mut work = Box::pin(work);
    let mut left = polls;
    std::future::poll_fn(move |cx| {
        if left == 0 {
            return std::task::Poll::Ready(None);
        }
        left -= 1;
        let polled = work.as_mut().poll(cx).map(Some);
        if left == 0 && polled.is_pending() { std::task::Poll::Ready(None) } else { polled }
    })
    .await
}

#[tokio::test]
async fn a_transaction_whose_statement_has_failed_does_not_commit_silently() {
    let world = World::new().await;
    let tenant = world.person().await.tenant;
    let mut tx = world.app.db.tenancy.begin(tenant).await.unwrap();
    sqlx::query("update cvault.tenants set name = 'changed'").execute(tx.conn()).await.unwrap();
    sqlx::query("select 1 / 0").execute(tx.conn()).await.unwrap_err();
    assert!(tx.commit().await.is_err());
    let mut tx = world.app.db.tenancy.begin(tenant).await.unwrap();
    let name: String = sqlx::query_scalar("select name from cvault.tenants").fetch_one(tx.conn()).await.unwrap();
    assert_eq!(name, "T");
}

#[tokio::test]
async fn a_lost_connection_at_commit_is_an_unknown_outcome_and_not_an_acknowledgement() {
    let world = World::new().await;
    let tenant = world.person().await.tenant;
    let mut tx = world.app.db.tenancy.begin(tenant).await.unwrap();
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(tx.conn()).await.unwrap();
    let mut superuser = world.superuser().await;
    sqlx::query("select pg_terminate_backend($1)").bind(pid).execute(&mut superuser).await.unwrap();
    assert!(matches!(tx.commit().await, Err(DbError::CommitUnknown(_))));
}

#[tokio::test]
async fn the_context_ends_with_the_transaction() {
    let world = World::new().await;
    let tenant = world.person().await.tenant;
    let config = DbConfig { app_connections: 1, ..world.database.config() };
    let db = Db::connect(&config).await.unwrap();
    for round in 0..3 {
        let tx = db.tenancy.begin(tenant).await.unwrap();
        match round {
            0 => tx.commit().await.unwrap(),
            1 => tx.rollback().await.unwrap(),
            _ => drop(tx),
        }
        let context: Option<String> = sqlx::query_scalar("select nullif(current_setting('app.ctx', true), '')")
            .fetch_one(&db.tenancy.pool)
            .await
            .unwrap();
        assert_eq!(context, None);
        let rows: i64 =
            sqlx::query_scalar("select count(*) from cvault.tenants").fetch_one(&db.tenancy.pool).await.unwrap();
        assert_eq!(rows, 0);
    }
}

#[test]
fn the_debug_form_of_a_key_shows_nothing() {
    assert_eq!(format!("{:?}", ContextKey(Zeroizing::new(vec![9; 32]))), "ContextKey");
}
