//! The door to tenant rows under cancellation: whatever happens to a transaction, the next one is its own tenant's.

use std::time::Duration;

use rand::Rng as _;
use tokio::task::JoinSet;

use super::*;
use crate::db::{Db, DbConfig};
use crate::testing::{World, eventually};

async fn small(world: &World) -> Db {
    let config = DbConfig { app_connections: 4, ..world.database.config() };
    Db::connect(&config).await.unwrap()
}

/// What the transaction sees of itself: its own tenant, and only rows of it.
async fn sees_itself(tenancy: &Tenancy, tenant: TenantId, writes: bool) -> Result<(), DbError> {
    let mut tx = tenancy.begin(tenant).await?;
    let seen = sqlx::query!(
        r#"select cvault.tenant_id() as tenant, pg_current_xact_id_if_assigned()::text as xid,
                  (select count(*) from cvault.tenants) as "rows!", (select min(name) from cvault.tenants) as "name!",
                  (select count(*) from cvault.tenants where tenant_id = $1) as "own!""#,
        tenant.uuid()
    )
    .fetch_one(tx.conn())
    .await?;
    assert_eq!(seen.tenant, Some(tenant.uuid()), "another tenant's context");
    assert_eq!((seen.rows, seen.own), (1, 1), "rows of another tenant");
    assert_eq!(seen.name, "T", "what a transaction that panicked had written");
    assert_eq!(seen.xid, None, "a transaction that had already written");
    if writes {
        sqlx::query!("update cvault.tenants set updated_at = now() where tenant_id = $1", tenant.uuid())
            .execute(tx.conn())
            .await?;
    }
    tx.commit().await
}

/// What a transaction of the storm ends with when it panics on purpose.
struct Deliberate;

/// How one transaction of the storm is to end.
#[derive(Clone, Copy)]
enum Fate {
    Run {
        writes: bool,
    },
    /// Dropped after so many polls, so at any await point of BEGIN, the work or COMMIT.
    Cancelled(usize),
    /// Panics in the middle, having written.
    Panics,
}

#[derive(Default)]
struct Outcomes {
    done: usize,
    cancelled: usize,
    panicked: usize,
    /// Its connection was killed under it, or none could be had in time.
    failed: usize,
}

/// 20,000 transactions over four connections: one in ten is cancelled, one in a hundred panics, and meanwhile a backend
/// of the pool is killed now and then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_cancelled_panicking_and_killed_transactions_leaves_no_connection_in_another_tenants_context() {
    let world = World::new().await;
    let mut tenants = Vec::new();
    for _ in 0..8 {
        tenants.push(world.person().await.tenant);
    }
    let db = small(&world).await;
    let mut superuser = world.superuser().await;
    let mut tasks = JoinSet::new();
    let (mut outcomes, mut killed) = (Outcomes::default(), 0);
    for number in 0..20_000usize {
        let (tenancy, tenant) = (db.tenancy.clone(), tenants[number % tenants.len()]);
        let fate = match number % 100 {
            7 => Fate::Panics,
            ten if ten % 10 == 0 => Fate::Cancelled(rand::rng().random_range(1..8)),
            _ => Fate::Run { writes: number % 4 == 0 },
        };
        tasks.spawn(async move {
            match fate {
                Fate::Run { writes } => limited(usize::MAX, sees_itself(&tenancy, tenant, writes)).await,
                Fate::Cancelled(polls) => limited(polls, sees_itself(&tenancy, tenant, true)).await,
                Fate::Panics => panics(&tenancy, tenant).await,
            }
        });
        if number % 250 == 249 {
            killed += kill_one(&mut superuser).await;
        }
        if tasks.len() >= 32 {
            outcomes.count(tasks.join_next().await.expect("there are tasks"));
        }
    }
    while let Some(done) = tasks.join_next().await {
        outcomes.count(done);
    }
    let Outcomes { done, cancelled, panicked, failed } = outcomes;
    assert!((300..=2_000).contains(&cancelled), "{cancelled} cancelled of 20000");
    assert!((150..=200).contains(&panicked), "{panicked} panicked");
    assert!(killed > 40, "{killed} backends killed");
    assert!(done > 17_000, "{done} done, {failed} failed");
    eventually("no session is left inside a transaction", Duration::from_secs(5), async || {
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
        eventually("the pool has replaced what was killed", Duration::from_secs(10), async || {
            sees_itself(&db.tenancy, tenant, true).await.is_ok()
        })
        .await;
    }
}

/// Kills any one backend of the pool, whatever it is doing; 0 when there is none.
async fn kill_one(superuser: &mut PgConnection) -> usize {
    let killed: Vec<bool> = sqlx::query_scalar(
        "select pg_terminate_backend(pid) from (select pid from pg_stat_activity
         where datname = current_database() and usename = 'cvault_app' order by random() limit 1) one",
    )
    .fetch_all(superuser)
    .await
    .unwrap();
    killed.into_iter().filter(|killed| *killed).count()
}

/// Writes, then panics with the transaction open.
async fn panics(tenancy: &Tenancy, tenant: TenantId) -> Option<Result<(), DbError>> {
    let written = async {
        let mut tx = tenancy.begin(tenant).await?;
        sqlx::query!("update cvault.tenants set name = 'written by a panic' where tenant_id = $1", tenant.uuid())
            .execute(tx.conn())
            .await?;
        Ok::<_, DbError>(tx)
    };
    match written.await {
        Ok(_tx) => std::panic::resume_unwind(Box::new(Deliberate)),
        Err(error) => Some(Err(error)),
    }
}

impl Outcomes {
    fn count(&mut self, done: Result<Option<Result<(), DbError>>, tokio::task::JoinError>) {
        match done {
            Ok(Some(Ok(()))) => self.done += 1,
            Ok(Some(Err(error))) => {
                // a statement that ran is never refused: what fails is the connection
                assert!(
                    matches!(error, DbError::Unavailable(_) | DbError::CommitUnknown(_))
                        || error.to_string().contains("terminating connection")
                        || matches!(error, DbError::Other(sqlx::Error::Io(_))),
                    "{error:?}"
                );
                self.failed += 1;
            }
            Ok(None) => self.cancelled += 1,
            Err(error) if error.is_panic() => {
                assert!(error.into_panic().is::<Deliberate>(), "an assertion of the storm has failed");
                self.panicked += 1;
            }
            Err(error) => panic!("a task of the storm was lost: {error}"),
        }
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
async fn a_statement_of_its_own_that_is_cancelled_anywhere_leaves_its_session_to_nobody() {
    let world = World::new().await;
    let (one, other) = (world.person().await.tenant, world.person().await.tenant);
    let db = small(&world).await;
    let mut done = 0;
    for round in 0..300 {
        let work = limited(round % 6 + 1, async {
            let mut tx = db.tenancy.single(one).await?;
            let (conn, context) = tx.entering();
            let seen: Vec<uuid::Uuid> = sqlx::query_scalar(
                "select t.tenant_id from cvault.enter($1) as tenant
                 cross join lateral (select tenant_id from cvault.tenants where tenant is not null offset 0) as t",
            )
            .bind(context)
            .fetch_all(conn)
            .await?;
            assert_eq!(seen, [one.uuid()]);
            tx.commit().await
        });
        if let Some(outcome) = work.await {
            outcome.map_err(|error: DbError| error).unwrap();
            done += 1;
        }
        sees_itself(&db.tenancy, other, false).await.unwrap();
    }
    assert!((1..300).contains(&done), "{done} of 300 were not cancelled");
}

#[tokio::test]
async fn a_statement_without_its_context_sees_nothing() {
    let world = World::new().await;
    let tenant = world.person().await.tenant;
    let mut tx = world.app.db.tenancy.single(tenant).await.unwrap();
    let rows: i64 = sqlx::query_scalar("select count(*) from cvault.tenants").fetch_one(tx.conn()).await.unwrap();
    assert_eq!(rows, 0);
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
        let mut session = db.tenancy.pool.get().await.unwrap();
        let context: Option<String> = sqlx::query_scalar("select nullif(current_setting('app.ctx', true), '')")
            .fetch_one(&mut session.conn)
            .await
            .unwrap();
        assert_eq!(context, None);
        let rows: i64 =
            sqlx::query_scalar("select count(*) from cvault.tenants").fetch_one(&mut session.conn).await.unwrap();
        assert_eq!(rows, 0);
    }
}

#[test]
fn the_debug_form_of_a_key_shows_nothing() {
    assert_eq!(format!("{:?}", ContextKey(Zeroizing::new(vec![9; 32]))), "ContextKey");
}
