//! Backends that are killed while they register devices: who is told of a device has it, and of one that nobody was told of there
//! is all or nothing.

use std::time::Duration;

use cvault_types::ErrorCode;
use sqlx::PgConnection;
use tokio::task::JoinHandle;

use super::*;
use crate::http::Problem;
use crate::testing::{eventually, kill_waiting};

async fn register_each(world: &Arc<World>, people: &[Person], devices: usize) -> JoinHandle<Vec<Outcome>> {
    let devices = people.iter().flat_map(|person| vec![(*person, None); devices]).collect();
    tokio::spawn(registering(world, devices).await.join_all())
}

/// The devices that somebody was told of. Everybody else was told that the database is away.
fn told_of(outcomes: Vec<Outcome>) -> BTreeSet<Uuid> {
    let mut told = BTreeSet::new();
    for (_, outcome) in outcomes {
        match outcome {
            Ok(device) => assert!(told.insert(device.id.uuid()), "a device twice"),
            Err(error) => assert_eq!(Problem::from(error).code(), ErrorCode::DatabaseUnavailable),
        }
    }
    told
}

/// Those of `told` that are there.
async fn there(superuser: &mut PgConnection, told: &BTreeSet<Uuid>) -> usize {
    let told: Vec<Uuid> = told.iter().copied().collect();
    let there: i64 = sqlx::query_scalar("select count(*) from cvault.devices where device_id = any ($1)")
        .bind(told)
        .fetch_one(superuser)
        .await
        .unwrap();
    usize::try_from(there).unwrap()
}

async fn registrations_work_again(world: &Arc<World>, people: &[Person]) {
    let before = devices(world).await;
    let mut registered = 0;
    eventually("sessions that were killed are replaced", Duration::from_secs(20), async || {
        let told = told_of(register_each(world, people, 1).await.await.unwrap());
        registered += i64::try_from(told.len()).unwrap();
        told.len() == people.len()
    })
    .await;
    assert!(devices(world).await >= before + registered);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_a_backend_that_is_killed_is_told_and_nothing_of_theirs_stays() {
    let (world, _) = World::with_server().await;
    let world = Arc::new(world);
    open_addresses(&world).await;
    let person = world.person().await;
    // more than go together
    let people = colleagues(&world, person, 60).await;
    let (mut superuser, mut holder) = (world.superuser().await, world.superuser().await);
    // the last lock of all, before which addresses are taken
    sqlx::raw_sql("begin; select from platform.servers for update").execute(&mut holder).await.unwrap();
    let registering = register_each(&world, &people, 1).await;
    let killed = kill_waiting(&mut superuser, "cvault_app", || registering.is_finished()).await;
    assert_eq!(told_of(registering.await.unwrap()).len(), 0, "registered without the server's row");
    assert!((2..people.len()).contains(&killed.len()), "{killed:?}: none of them waited together");
    sqlx::raw_sql("rollback").execute(&mut holder).await.unwrap();
    assert_eq!(devices(&world).await, 0);
    registrations_work_again(&world, &people).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_that_are_killed_at_any_moment_lose_no_device_and_no_address() {
    let (world, _) = World::with_server().await;
    let world = Arc::new(world);
    open_addresses(&world).await;
    let person = world.person().await;
    let people = colleagues(&world, person, 40).await;
    let mut superuser = world.superuser().await;
    let registering = register_each(&world, &people, 10).await;
    let mut killed = 0_usize;
    eventually("everybody is told", Duration::from_secs(60), async || {
        let one: Vec<bool> = sqlx::query_scalar(
            "select pg_terminate_backend(pid) from (select pid from pg_stat_activity
             where datname = current_database() and usename = 'cvault_app' order by random() limit 1) one",
        )
        .fetch_all(&mut superuser)
        .await
        .unwrap();
        killed += one.len();
        registering.is_finished()
    })
    .await;
    assert!(killed > 0, "nothing was killed");
    let told = told_of(registering.await.unwrap());
    assert_eq!(there(&mut superuser, &told).await, told.len(), "somebody was told of a device that is not there");
    let all = usize::try_from(devices(&world).await).unwrap();
    assert!((told.len()..=400).contains(&all), "{all} devices, {} told of", told.len());
    registrations_work_again(&world, &people).await;
}
