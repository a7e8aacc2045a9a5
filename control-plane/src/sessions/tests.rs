//! Addresses that are taken back at a disconnect.

use std::sync::Arc;

use cvault_types::{DeviceId, ServerId};
use tokio::task::JoinSet;

use super::*;
use crate::desired::{self, Update};
use crate::ipam;
use crate::testing::{Person, World, request_id};

/// A pool of five addresses that takes them back, and a server.
async fn reclaiming() -> (World, ServerId, Person) {
    let world = World::new().await;
    world.pool("small", "192.168.9.0/29", "fd00:9::/64", 0).await;
    let server = world.server("s", "small", "lab-1").await;
    set_reclaim(&world, true).await;
    let person = world.person().await;
    (world, server, person)
}

async fn set_reclaim(world: &World, reclaim: bool) {
    sqlx::query("update platform.address_pools set reclaim = $1")
        .bind(reclaim)
        .execute(&world.app.db.sys)
        .await
        .unwrap();
}

async fn connect(world: &World, person: Person, device: DeviceId) -> Result<Connection, ConnectError> {
    let mut tx = world.app.db.tenancy.begin(person.tenant).await?;
    let now = world.app.clock.now();
    let work = super::connect(&mut tx, person.user, device, None, now, request_id()).await;
    tx.finish(work).await
}

async fn disconnect(world: &World, person: Person, device: DeviceId) -> Result<Held, DbError> {
    let mut tx = world.app.db.tenancy.begin(person.tenant).await?;
    let work = async {
        let held = hold(&mut tx, person.user, device).await?.expect("the device is active");
        close(&mut tx, device, world.app.clock.now()).await?;
        if held.reclaims {
            reclaim(&mut tx, device).await?;
        }
        Ok(held)
    }
    .await;
    tx.finish(work).await
}

async fn acknowledge(world: &World, server: ServerId) {
    sqlx::query!("update platform.servers set acked_revision = revision where server_id = $1", server.uuid())
        .execute(&world.app.db.sys)
        .await
        .unwrap();
}

/// The peers of the server, whose count and digest agree with its row.
async fn peers(world: &World, server: ServerId) -> usize {
    let update = desired::read(&world.app.db.sys, &world.app.keys, server, None).await.unwrap();
    let Update::Snapshot { peers, .. } = update else { panic!("{update:?}") };
    peers.len()
}

async fn state_of(world: &World, connection: &Connection) -> String {
    let ipv4 = connection.device.addresses.ipv4;
    sqlx::query_scalar("select state from platform.addresses where host = $1")
        .bind(i64::from(ipv4.octets()[3]))
        .fetch_one(&world.app.db.sys)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_disconnected_device_leaves_its_server_and_comes_back_with_another_address() {
    let (world, server, person) = reclaiming().await;
    let device = world.register(person, "d").await.unwrap().id;
    let first = connect(&world, person, device).await.unwrap();
    assert!(!first.placed);
    assert_eq!(peers(&world, server).await, 1);
    acknowledge(&world, server).await;

    assert!(disconnect(&world, person, device).await.unwrap().reclaims);
    assert_eq!((peers(&world, server).await, state_of(&world, &first).await.as_str()), (0, "quarantine"));
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 0, "its removal is not proven");
    assert!(!disconnect(&world, person, device).await.unwrap().reclaims, "there is nothing to take any more");

    let second = connect(&world, person, device).await.unwrap();
    assert!(second.placed && !second.device.reclaimed);
    assert_ne!(second.device.addresses, first.device.addresses);
    assert_eq!(peers(&world, server).await, 1);
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 0, "the server may still have the first");
    acknowledge(&world, server).await;
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 1, "though the device is there again");
    let again = connect(&world, person, device).await.unwrap();
    assert_eq!((again.device.addresses, again.placed), (second.device.addresses, false));
}

#[tokio::test]
async fn without_the_setting_a_device_keeps_its_address() {
    let (world, server, person) = reclaiming().await;
    set_reclaim(&world, false).await;
    let device = world.register(person, "d").await.unwrap().id;
    let first = connect(&world, person, device).await.unwrap();
    assert!(!disconnect(&world, person, device).await.unwrap().reclaims);
    assert_eq!(peers(&world, server).await, 1);
    let second = connect(&world, person, device).await.unwrap();
    assert_eq!(first.device.addresses, second.device.addresses);
}

#[tokio::test]
async fn a_pool_without_an_address_left_is_said_and_a_new_key_waits_for_the_next_connect() {
    let (world, server, person) = reclaiming().await;
    let away = world.register(person, "away").await.unwrap().id;
    disconnect(&world, person, away).await.unwrap();
    let rotated = world.rotate(person, away, None).await.unwrap();
    assert_eq!(peers(&world, server).await, 0, "a device without an address is on no server");
    acknowledge(&world, server).await;
    ipam::free_quarantined(&world.app.db.sys).await.unwrap();
    let (mut others, mut last) = (0, None);
    while let Ok(registered) = world.register(person, &format!("d{others}")).await {
        others += 1;
        last = Some(registered.id);
    }
    assert_eq!(others, 5);
    assert!(matches!(connect(&world, person, away).await, Err(ConnectError::PoolExhausted)));
    world.revoke(person, last.unwrap()).await;
    acknowledge(&world, server).await;
    ipam::free_quarantined(&world.app.db.sys).await.unwrap();
    let connection = connect(&world, person, away).await.unwrap();
    assert_eq!(connection.device.public_key, rotated.device.public_key);
    assert_eq!(peers(&world, server).await, 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connects_and_disconnects_that_race_leave_each_device_with_one_address_or_none() {
    let (world, server, person) = reclaiming().await;
    sqlx::query("update platform.address_pools set ipv4 = '10.8.0.0/16'")
        .execute(&mut world.superuser().await)
        .await
        .unwrap();
    let world = Arc::new(world);
    let mut devices = Vec::new();
    for number in 0..4 {
        devices.push(world.register(person, &format!("d{number}")).await.unwrap().id);
    }
    let mut tasks = JoinSet::new();
    for number in 0..160usize {
        let (world, device) = (Arc::clone(&world), devices[number % 4]);
        tasks.spawn(async move {
            match number % 3 {
                0 => disconnect(&world, person, device).await.map(drop),
                1 => connect(&world, person, device).await.map(drop).map_err(|error| panic!("{error}")),
                _ => {
                    acknowledge(&world, server).await;
                    ipam::free_quarantined(&world.app.db.sys).await.map(drop)
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    let wrong: Vec<String> = sqlx::query_scalar(
        "select d.name from cvault.devices d
         left join platform.addresses a on a.device_id = d.device_id
         left join platform.address_pools p on p.pool_id = a.pool_id
         left join platform.peers r on r.device_id = d.device_id and r.removed_revision is null
         where (a.host is null) <> d.reclaimed or (r.device_id is null) <> d.reclaimed
            or not d.reclaimed and (d.ipv4, d.ipv4) is distinct from (r.ipv4, host(p.ipv4::inet + a.host)::inet)",
    )
    .fetch_all(&mut world.superuser().await)
    .await
    .unwrap();
    assert_eq!(wrong, Vec::<String>::new());
    let holding: i64 = sqlx::query_scalar("select count(*) from cvault.devices where not reclaimed")
        .fetch_one(&mut world.superuser().await)
        .await
        .unwrap();
    assert_eq!(peers(&world, server).await, usize::try_from(holding).unwrap());
}
