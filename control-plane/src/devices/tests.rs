//! Registration and deletion against a real database: addresses, limits, digests, quarantine.

use std::collections::BTreeSet;
use std::sync::Arc;

use cvault_types::ServerId;
use tokio::task::JoinSet;

use super::*;
use crate::desired::{self, Update};
use crate::ipam;
use crate::testing::{Person, World, request_id};

/// Pretends that the server's agent has applied everything.
async fn acknowledge(world: &World, server: ServerId) {
    sqlx::query!("update platform.servers set acked_revision = revision where server_id = $1", server.uuid())
        .execute(&world.app.db.sys)
        .await
        .unwrap();
}

/// Count and digest of the server's row, if they are those of its peers.
async fn snapshot_count(world: &World, server: ServerId) -> usize {
    // an inconsistent row is an error here: Rust recomputes what SQL has summed up
    let update = desired::read(&world.app.db.sys, &world.app.keys, server, None).await.unwrap();
    let Update::Snapshot { peers, .. } = update else { panic!("{update:?}") };
    peers.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_registrations_get_different_addresses_and_a_matching_digest() {
    let (world, server) = World::with_server().await;
    let world = Arc::new(world);
    let mut people = Vec::new();
    for _ in 0..4 {
        people.push(world.person().await);
    }
    let mut tasks = JoinSet::new();
    for number in 0..64usize {
        let (world, person) = (Arc::clone(&world), people[number % 4]);
        tasks.spawn(async move { (person, world.register(person, &format!("d{number}")).await.unwrap()) });
    }
    let mut addresses = BTreeSet::new();
    let mut revisions = BTreeSet::new();
    let mut devices = Vec::new();
    while let Some(done) = tasks.join_next().await {
        let (person, device) = done.unwrap();
        assert_eq!(u32::from(device.addresses.ipv4) & 0xffff, u32::from(device.addresses.ipv6.segments()[7]));
        addresses.insert(device.addresses.ipv4);
        revisions.insert(device.revision);
        devices.push((person, device.id));
    }
    assert_eq!(addresses.len(), 64);
    assert!(!addresses.contains(&"10.8.0.0".parse().unwrap()) && !addresses.contains(&"10.8.0.1".parse().unwrap()));
    assert_eq!(revisions, (1..=64).collect(), "revisions have no gap");
    assert_eq!(snapshot_count(&world, server).await, 64);
    for (person, device) in devices.iter().take(20) {
        world.revoke(*person, *device).await;
    }
    assert_eq!(snapshot_count(&world, server).await, 44);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_address_is_handed_out_once_and_then_the_pool_is_exhausted() {
    let world = Arc::new(World::new().await);
    world.pool("tiny", "192.168.9.0/29", "fd00:9::/64", 0).await;
    let server = world.server("s", "tiny", "lab-1").await;
    let person = world.person().await;
    let mut tasks = JoinSet::new();
    for number in 0..16 {
        let world = Arc::clone(&world);
        tasks.spawn(async move { world.register(person, &format!("d{number}")).await });
    }
    let (mut addresses, mut exhausted, mut first) = (BTreeSet::new(), 0, None);
    while let Some(done) = tasks.join_next().await {
        match done.unwrap() {
            Ok(device) => {
                addresses.insert(device.addresses.ipv4.to_string());
                first.get_or_insert(device.id);
            }
            Err(RegisterError::PoolExhausted) => exhausted += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    let usable: BTreeSet<_> = (2..=6).map(|host| format!("192.168.9.{host}")).collect();
    assert_eq!((addresses, exhausted), (usable, 11));

    // an address comes back only when the server has acknowledged the removal
    world.revoke(person, first.unwrap()).await;
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 0);
    assert!(matches!(world.register(person, "early").await, Err(RegisterError::PoolExhausted)));
    acknowledge(&world, server).await;
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 1);
    world.register(person, "late").await.unwrap();
}

#[tokio::test]
async fn an_acknowledged_address_still_rests_for_the_quarantine() {
    let world = World::new().await;
    world.pool("slow", "10.9.0.0/24", "fd00:9::/64", 3600).await;
    let server = world.server("s", "slow", "lab-1").await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    world.revoke(person, device.id).await;
    acknowledge(&world, server).await;
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 0);
    let mut superuser = world.superuser().await;
    sqlx::query("update platform.addresses set released_at = now() - interval '2 hours' where state = 'quarantine'")
        .execute(&mut superuser)
        .await
        .unwrap();
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_registrations_cannot_exceed_the_limit_of_a_user() {
    let (world, _) = World::with_server().await;
    let world = Arc::new(world);
    let person = world.person().await;
    let mut superuser = world.superuser().await;
    sqlx::query("update cvault.tenants set max_devices_per_user = 5").execute(&mut superuser).await.unwrap();
    let mut tasks = JoinSet::new();
    for number in 0..20 {
        let world = Arc::clone(&world);
        tasks.spawn(async move { world.register(person, &format!("d{number}")).await });
    }
    let (mut made, mut refused) = (0, 0);
    while let Some(done) = tasks.join_next().await {
        match done.unwrap() {
            Ok(_) => made += 1,
            Err(RegisterError::DeviceLimit { max: 5, used: 5 }) => refused += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!((made, refused), (5, 15));
}

#[tokio::test]
async fn a_deleted_device_leaves_no_key_and_is_gone_for_everybody() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    let revoked = world.revoke(person, device.id).await;
    assert_eq!((revoked.server, revoked.revision), (server, Some(2)));
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let again = revoke(&mut tx, person.user, device.id, world.app.clock.now(), request_id()).await;
    assert!(matches!(again, Err(RevokeError::NotFound)));
    assert!(find(&mut tx, person.user, device.id).await.unwrap().is_none());
    tx.rollback().await.unwrap();
    let mut superuser = world.superuser().await;
    let row = sqlx::query!(
        r#"select private_key_sealed is null and preshared_key_sealed is null as "destroyed!",
                  (select count(*) from cvault.audit_log) as "audited!",
                  (select state from platform.addresses where host = 2) as "state!"
           from cvault.devices"#
    )
    .fetch_one(&mut superuser)
    .await
    .unwrap();
    assert_eq!((row.destroyed, row.audited, row.state.as_str()), (true, 2, "quarantine"));
}

#[tokio::test]
async fn another_tenants_and_another_users_devices_are_not_there() {
    let (world, _) = World::with_server().await;
    let (owner, stranger) = (world.person().await, world.person().await);
    let device = world.register(owner, "d").await.unwrap();
    let same_tenant = Person { tenant: owner.tenant, user: stranger.user };
    for person in [stranger, same_tenant] {
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        assert!(find(&mut tx, person.user, device.id).await.unwrap().is_none());
        assert!(list(&mut tx, person.user, None, 10).await.unwrap().is_empty());
        let refused = revoke(&mut tx, person.user, device.id, world.app.clock.now(), request_id()).await;
        assert!(matches!(refused, Err(RevokeError::NotFound)));
        tx.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn a_public_key_is_one_devices_on_the_whole_platform() {
    let (world, _) = World::with_server().await;
    let (one, other) = (world.person().await, world.person().await);
    let key = PublicKey::parse("xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=").unwrap();
    let mut outcomes = Vec::new();
    for person in [one, one, other] {
        let new =
            NewDevice { name: DeviceName::parse("d").unwrap(), platform: None, public_key: Some(key), region: None };
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::from_os_rng();
        let now = world.app.clock.now();
        let work = register(&mut tx, &world.app.keys, person.user, new, now, &mut rng, request_id()).await;
        outcomes.push(tx.finish(work).await.map(|device| matches!(device.key, ConfigKey::OnlyAtTheClient)));
    }
    assert!(matches!(
        outcomes.as_slice(),
        [Ok(true), Err(RegisterError::PublicKeyInUse), Err(RegisterError::PublicKeyInUse)]
    ));
}

#[tokio::test]
async fn a_device_goes_to_the_least_loaded_server_that_is_alive_and_in_the_region() {
    let (world, first) = World::with_server().await;
    let person = world.person().await;
    assert_eq!(world.register(person, "a").await.unwrap().server.id, first);
    let second = world.server("s2", "default", "lab-2").await;
    assert_eq!(world.register(person, "b").await.unwrap().server.id, second);
    sqlx::query!(
        "update platform.servers set last_seen_at = now() - interval '91 seconds' where server_id = $1",
        second.uuid()
    )
    .execute(&world.app.db.sys)
    .await
    .unwrap();
    assert_eq!(world.register(person, "c").await.unwrap().server.id, first);
    sqlx::query!("update platform.servers set status = 'draining' where server_id = $1", first.uuid())
        .execute(&world.app.db.sys)
        .await
        .unwrap();
    assert!(matches!(world.register(person, "d").await, Err(RegisterError::ServerUnavailable)));
}

#[tokio::test]
async fn a_delta_brings_exactly_what_a_snapshot_would() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let mut devices = Vec::new();
    for number in 0..6 {
        devices.push(world.register(person, &format!("d{number}")).await.unwrap());
    }
    let Update::Snapshot { target: have, .. } =
        desired::read(&world.app.db.sys, &world.app.keys, server, None).await.unwrap()
    else {
        panic!("no snapshot")
    };
    world.revoke(person, devices[0].id).await;
    let passing = world.register(person, "passing").await.unwrap();
    world.revoke(person, passing.id).await;
    let stays = world.register(person, "stays").await.unwrap();
    let update = desired::read(&world.app.db.sys, &world.app.keys, server, Some(have)).await.unwrap();
    let Update::Delta { from_revision, target, peer_count, removed, upserted } = update else { panic!("{update:?}") };
    assert_eq!((from_revision, target.revision, peer_count), (6, 10, 6));
    assert_eq!(removed, [devices[0].public_key.as_bytes().to_vec()]);
    assert_eq!(upserted.len(), 1);
    assert_eq!(upserted[0].public_key.as_ref(), stays.public_key.as_bytes());
    let nothing = desired::read(&world.app.db.sys, &world.app.keys, server, Some(target)).await.unwrap();
    assert!(matches!(nothing, Update::Nothing));
}

#[tokio::test]
async fn rows_that_cannot_be_read_are_never_sent_as_no_peers() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    world.register(person, "d").await.unwrap();
    let mut superuser = world.superuser().await;
    sqlx::query("alter table platform.peers enable row level security").execute(&mut superuser).await.unwrap();
    let refused = desired::read(&world.app.db.sys, &world.app.keys, server, None).await;
    assert!(matches!(refused, Err(desired::DesiredError::Inconsistent { revision: 1, .. })));
}
