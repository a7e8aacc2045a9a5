//! The door to tenant rows under cancellation: whatever happens to a transaction, the next one is its own tenant's.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
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

/// What the transaction sees of itself: its own tenant, and only rows of it. `under_way` is set once it has begun.
async fn sees_itself(
    tenancy: &Tenancy,
    tenant: TenantId,
    writes: bool,
    under_way: &AtomicBool,
) -> Result<TenantTx, DbError> {
    let mut tx = tenancy.begin(tenant).await?;
    under_way.store(true, Relaxed);
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
    Ok(tx)
}

/// As [`sees_itself`], by one statement that brings its context with it, as registrations and batched reads are.
async fn sees_itself_alone(
    tenancy: &Tenancy,
    tenant: TenantId,
    writes: bool,
    under_way: &AtomicBool,
) -> Result<TenantTx, DbError> {
    let mut tx = tenancy.single(tenant).await?;
    under_way.store(true, Relaxed);
    let (conn, context) = tx.entering();
    let statement = if writes {
        "with entered as materialized (select tenant from cvault.enter($1) as tenant),
         noted as (
             insert into cvault.audit_log (tenant_id, audit_id, actor, action, target, details)
             select tenant, gen_random_uuid(), $2, 'storm', 'nothing', '{}'::jsonb from entered returning tenant_id
         )
         select tenant_id from noted"
    } else {
        "select t.tenant_id from cvault.enter($1) as tenant
         cross join lateral (select tenant_id from cvault.tenants
                             where tenant is not null and $2 <> '' offset 0) as t"
    };
    let seen: Vec<uuid::Uuid> =
        sqlx::query_scalar(statement).bind(context).bind(tenant.uuid().to_string()).fetch_all(conn).await?;
    assert_eq!(seen, [tenant.uuid()], "rows of another tenant");
    Ok(tx)
}

/// What a transaction of the storm ends with when it panics on purpose.
struct Deliberate;

/// How one transaction of the storm goes about it.
#[derive(Clone, Copy)]
enum Way {
    Begun,
    Alone,
}

/// How one transaction of the storm is to end.
#[derive(Clone, Copy)]
enum Fate {
    Run {
        writes: bool,
    },
    /// Dropped with a statement under way: after so many polls, or fewer when it was done before.
    Cancelled(usize),
    /// Dropped after so many polls, so maybe while it waits for its connection or begins, and maybe not at all.
    CancelledAnywhere(usize),
    /// Panics in the middle, having written.
    Panics,
}

/// What became of one transaction.
enum Outcome {
    Done(Result<(), DbError>),
    Cancelled,
    CancelledAnywhere,
}

#[derive(Default)]
struct Outcomes {
    done: usize,
    cancelled: usize,
    panicked: usize,
    /// Its connection was killed under it, or none could be had in time.
    failed: usize,
}

async fn end(tenancy: Tenancy, tenant: TenantId, way: Way, fate: Fate) -> Vec<Outcome> {
    let work = async |writes: bool, under_way: &AtomicBool| {
        let tx = match way {
            Way::Begun => sees_itself(&tenancy, tenant, writes, under_way).await?,
            Way::Alone => sees_itself_alone(&tenancy, tenant, writes, under_way).await?,
        };
        tx.commit().await
    };
    match fate {
        Fate::Run { writes } => vec![Outcome::Done(work(writes, &AtomicBool::new(false)).await)],
        Fate::Panics => vec![Outcome::Done(panics(&tenancy, tenant, way).await)],
        Fate::CancelledAnywhere(polls) => {
            let from_the_start = AtomicBool::new(true);
            let done = limited(polls, &from_the_start, work(true, &AtomicBool::new(false))).await;
            vec![done.map_or(Outcome::CancelledAnywhere, Outcome::Done)]
        }
        Fate::Cancelled(polls) => {
            let (mut polls, mut outcomes) = (polls, Vec::new());
            loop {
                let under_way = AtomicBool::new(false);
                let Some(done) = limited(polls, &under_way, work(true, &under_way)).await else {
                    outcomes.push(Outcome::Cancelled);
                    return outcomes;
                };
                outcomes.push(Outcome::Done(done));
                polls = (polls - 1).max(1);
            }
        }
    }
}

/// So many transactions over four connections: one in ten is cancelled with a statement under way, another one in a
/// hundred anywhere, one in a hundred panics, and meanwhile a backend of the pool is killed now and then.
async fn storm(world: &World, transactions: usize, way: fn(usize) -> Way) {
    let mut tenants = Vec::new();
    for _ in 0..8 {
        tenants.push(world.person().await.tenant);
    }
    let db = small(world).await;
    let mut superuser = world.superuser().await;
    let mut tasks = JoinSet::new();
    let (mut outcomes, mut killed) = (Outcomes::default(), 0);
    for number in 0..transactions {
        let (tenancy, tenant) = (db.tenancy.clone(), tenants[number % tenants.len()]);
        let fate = match number % 100 {
            7 => Fate::Panics,
            33 => Fate::CancelledAnywhere(rand::rng().random_range(1..8)),
            ten if ten % 10 == 0 => Fate::Cancelled(rand::rng().random_range(1..=4)),
            _ => Fate::Run { writes: number % 4 == 0 },
        };
        tasks.spawn(end(tenancy, tenant, way(number), fate));
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
    assert_eq!(cancelled, transactions / 10, "cancelled under way");
    assert!((transactions / 133..=transactions / 100).contains(&panicked), "{panicked} panicked");
    assert!(killed > transactions / 500, "{killed} backends killed");
    assert!(done > transactions / 100 * 85, "{done} done, {failed} failed");
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
            let outcomes = end(db.tenancy.clone(), tenant, Way::Begun, Fate::Run { writes: true }).await;
            matches!(outcomes[..], [Outcome::Done(Ok(()))])
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_cancelled_panicking_and_killed_transactions_leaves_no_connection_in_another_tenants_context() {
    storm(&World::new().await, 20_000, |_| Way::Begun).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_statements_that_bring_their_context_writes_and_reads_for_their_own_tenant_only() {
    let world = World::new().await;
    storm(&world, 6_000, |number| if number % 4 == 3 { Way::Begun } else { Way::Alone }).await;
    let (noted, astray): (i64, i64) = sqlx::query_as(
        "select count(*), count(*) filter (where tenant_id::text <> actor) from cvault.audit_log where action = 'storm'",
    )
    .fetch_one(&mut world.superuser().await)
    .await
    .unwrap();
    assert_eq!(astray, 0);
    assert!(noted > 1_000, "{noted}");
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

/// Panics with the connection in hand; one that has begun has written then.
async fn panics(tenancy: &Tenancy, tenant: TenantId, way: Way) -> Result<(), DbError> {
    let in_hand = match way {
        Way::Alone => sees_itself_alone(tenancy, tenant, true, &AtomicBool::new(false)).await,
        Way::Begun => {
            async {
                let mut tx = tenancy.begin(tenant).await?;
                sqlx::query!(
                    "update cvault.tenants set name = 'written by a panic' where tenant_id = $1",
                    tenant.uuid()
                )
                .execute(tx.conn())
                .await?;
                Ok(tx)
            }
            .await
        }
    };
    match in_hand {
        Ok(_tx) => std::panic::resume_unwind(Box::new(Deliberate)),
        Err(error) => Err(error),
    }
}

impl Outcomes {
    fn count(&mut self, ended: Result<Vec<Outcome>, tokio::task::JoinError>) {
        match ended {
            Ok(all) => all.into_iter().for_each(|one| self.count_one(one)),
            Err(error) if error.is_panic() => {
                assert!(error.into_panic().is::<Deliberate>(), "an assertion of the storm has failed");
                self.panicked += 1;
            }
            Err(error) => panic!("a task of the storm was lost: {error}"),
        }
    }

    fn count_one(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Done(Ok(())) => self.done += 1,
            Outcome::Done(Err(error)) => {
                // a statement that ran is never refused: what fails is the connection
                assert!(
                    matches!(error, DbError::Unavailable(_) | DbError::CommitUnknown(_))
                        || error.to_string().contains("terminating connection")
                        || matches!(error, DbError::Other(sqlx::Error::Io(_))),
                    "{error:?}"
                );
                self.failed += 1;
            }
            Outcome::Cancelled => self.cancelled += 1,
            Outcome::CancelledAnywhere => {}
        }
    }
}

/// Polls `work` so many times after `counting` is set, then drops it: `None`.
async fn limited<F: Future>(polls: usize, counting: &AtomicBool, work: F) -> Option<F::Output> {
    let mut work = Box::pin(work);
    let mut left = polls;
    std::future::poll_fn(move |cx| match work.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => {
            left -= usize::from(counting.load(Relaxed));
            if left == 0 { Poll::Ready(None) } else { Poll::Pending }
        }
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
