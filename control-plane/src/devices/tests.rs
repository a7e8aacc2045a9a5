//! Registration and deletion against a real database: addresses, limits, digests, quarantine.

use std::collections::BTreeSet;
use std::sync::Arc;

use cvault_types::{DeviceId, ServerId};
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
async fn numbers_are_made_free_ahead_of_need_and_never_past_the_end_of_the_pool() {
    let world = World::new().await;
    world.pool("tiny", "192.168.9.0/29", "fd00:9::/64", 0).await;
    world.server("s", "tiny", "lab-1").await;
    let person = world.person().await;
    let sys = &world.app.db.sys;
    assert!(ipam::open_ahead(sys).await.unwrap() >= 5);
    assert_eq!(ipam::open_ahead(sys).await.unwrap(), 0, "what is there is not made again");
    let mut addresses = BTreeSet::new();
    for number in 0..5 {
        let device = world.register(person, &format!("d{number}")).await.unwrap();
        addresses.insert(device.addresses.ipv4.to_string());
        assert_eq!(ipam::open_ahead(sys).await.unwrap(), 0);
    }
    assert_eq!(addresses, (2..=6).map(|host| format!("192.168.9.{host}")).collect());
    assert!(matches!(world.register(person, "late").await, Err(RegisterError::PoolExhausted)));
}

#[tokio::test]
async fn numbers_are_opened_in_portions_up_to_a_mark_and_none_of_a_pool_that_is_gone() {
    let world = World::new().await;
    world.pool("large", "10.9.0.0/16", "fd00:9::/64", 0).await;
    let sys = &world.app.db.sys;
    let (one, other) = tokio::join!(ipam::open_ahead(sys), ipam::open_ahead(sys));
    assert_eq!(one.unwrap() + other.unwrap(), 8_192, "by two replicas at once");
    assert_eq!(ipam::open_ahead(sys).await.unwrap(), 0);

    let mut superuser = world.superuser().await;
    let mut take = async |count: i64| {
        sqlx::query(
            "delete from platform.addresses where (pool_id, host) in (
                 select pool_id, host from platform.addresses where state = 'free' order by host limit $1)",
        )
        .bind(count)
        .execute(&mut superuser)
        .await
        .unwrap();
    };
    take(1_023).await;
    assert_eq!(ipam::open_ahead(sys).await.unwrap(), 0, "not for every number that was taken");
    take(2_000).await;
    assert_eq!(ipam::open_ahead(sys).await.unwrap(), 1_024 + 1_024, "what is then missing is no portion");
    sqlx::query("update platform.address_pools set deleted_at = now()").execute(&mut superuser).await.unwrap();
    let none: i64 = sqlx::query_scalar("select platform.open_addresses(pool_id, 60000) from platform.address_pools")
        .fetch_one(&mut superuser)
        .await
        .unwrap();
    assert_eq!(none, 0);
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
        assert!(list(&mut tx, Page { user: person.user, after: None, limit: 10 }).await.unwrap().is_empty());
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
        let new = NewDevice {
            name: DeviceName::parse("d").unwrap(),
            platform: None,
            keys: KeyRequest { public_key: Some(key), preshared: false },
            region: None,
        };
        let data_key = world.app.data_keys.sealed(&world.app.db.tenancy, person.tenant).await.unwrap().unwrap();
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::from_os_rng();
        let (now, keys) = (world.app.clock.now(), &world.app.keys);
        let (tenant, user) = (person.tenant, person.user);
        let device = Registration::new(tenant, user, new, keys, &data_key, &mut rng, request_id()).unwrap();
        let work = register(&mut tx, device, now).await;
        outcomes.push(tx.finish(work).await.map(|device| matches!(device.keys.private, ConfigKey::OnlyAtTheClient)));
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

#[tokio::test]
async fn what_was_removed_on_purpose_is_expected_even_when_the_log_is_trimmed() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let mut devices = Vec::new();
    for number in 0..4 {
        devices.push(world.register(person, &format!("d{number}")).await.unwrap().id);
    }
    let sys = &world.app.db.sys;
    let Update::Snapshot { target: have, .. } = desired::read(sys, &world.app.keys, server, None).await.unwrap() else {
        panic!("no snapshot")
    };
    acknowledge(&world, server).await;
    for device in &devices[..3] {
        world.revoke(person, *device).await;
    }
    let mut superuser = world.superuser().await;
    sqlx::query("delete from platform.node_changes").execute(&mut superuser).await.unwrap();
    for acked in ["0", "revision"] {
        // what the server says it has counts as well as what it has acknowledged
        let sql = format!("update platform.servers set acked_revision = {acked}");
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut superuser).await.unwrap();
        let update = desired::read(sys, &world.app.keys, server, Some(have)).await.unwrap();
        assert!(matches!(update, Update::Snapshot { expected_removed: 3, .. }), "{update:?}");
    }
}

#[tokio::test]
async fn only_a_snapshot_helps_a_server_of_another_history_and_it_waits_for_its_turn() {
    let (world, server) = World::with_server().await;
    let (sys, keys) = (&world.app.db.sys, &world.app.keys);
    let Update::Snapshot { target, .. } = desired::read(sys, keys, server, None).await.unwrap() else {
        panic!("no snapshot")
    };
    let other = desired::Position { incarnation: uuid::Uuid::nil(), ..target };
    let future = desired::Position { revision: 9, ..target };
    for have in [other, future] {
        assert!(desired::read_changes(sys, keys, server, Some(have)).await.unwrap().is_none());
    }
    let nothing = desired::read_changes(sys, keys, server, Some(target)).await.unwrap();
    assert!(matches!(nothing, Some(Update::Nothing)), "{nothing:?}");
}

/// What a tenant's own SQL says of a device that was registered by nobody.
#[tokio::test]
async fn a_device_with_addresses_that_were_not_allocated_to_it_is_placed_nowhere() {
    let (world, server) = World::with_server().await;
    let (attacker, victim) = (world.person().await, world.person().await);
    let taken = world.register(victim, "d").await.unwrap().addresses;
    let pool: uuid::Uuid =
        sqlx::query_scalar("select pool_id from platform.address_pools").fetch_one(&world.app.db.sys).await.unwrap();
    let addresses = [
        ("10.8.0.77".to_owned(), "fd00:cafe::4d".to_owned()),
        ("10.8.0.1".to_owned(), "fd00:cafe::1".to_owned()),
        ("8.8.8.8".to_owned(), "2001:db8::8".to_owned()),
        (taken.ipv4.to_string(), taken.ipv6.to_string()),
        ("fd00:cafe::4d".to_owned(), "10.8.0.77".to_owned()),
    ];
    for allocates in [false, true] {
        for (ipv4, ipv6) in &addresses {
            let device = uuid::Uuid::now_v7();
            let mut tx = world.app.db.tenancy.begin(attacker.tenant).await.unwrap();
            if allocates {
                sqlx::query("select platform.allocate_address($1, $2)")
                    .bind(pool)
                    .bind(device)
                    .execute(tx.conn())
                    .await
                    .unwrap();
            }
            let inserted = sqlx::query(
                "insert into cvault.devices (tenant_id, device_id, user_id, name, public_key, pool_id, ipv4, ipv6, server_id)
                 values ($1, $2, $3, 'x', sha256('x'), $4, $5::inet, $6::inet, $7)",
            )
            .bind(attacker.tenant.uuid())
            .bind(device)
            .bind(attacker.user.uuid())
            .bind(pool)
            .bind(ipv4.parse::<ipnet::IpNet>().unwrap_or_else(|_| ipnet::IpNet::from(ipv4.parse::<std::net::IpAddr>().unwrap())))
            .bind(ipv6.parse::<ipnet::IpNet>().unwrap_or_else(|_| ipnet::IpNet::from(ipv6.parse::<std::net::IpAddr>().unwrap())))
            .bind(server.uuid())
            .execute(tx.conn())
            .await;
            let refused = match inserted {
                Ok(_) => sqlx::query("select platform.place_peer($1)").bind(device).execute(tx.conn()).await,
                Err(error) => Err(error),
            };
            let name = crate::db::DbError::from(refused.unwrap_err()).constraint().map(str::to_owned);
            assert!(
                matches!(name.as_deref(), Some("devices_addresses_allocated" | "devices_families")),
                "{ipv4} {ipv6}: {name:?}"
            );
        }
    }
    world.register(attacker, "honest").await.unwrap();
    assert_eq!(snapshot_count(&world, server).await, 2);
}

#[tokio::test]
async fn a_preshared_key_that_does_not_open_costs_its_own_device_and_nobody_else() {
    let (world, server) = World::with_server().await;
    let (victim, attacker) = (world.person().await, world.person().await);
    world.register(victim, "honest").await.unwrap();
    for sealed in [Some([9_u8; 60].as_slice()), None] {
        let device = world.register(attacker, "forged").await.unwrap().id;
        let mut tx = world.app.db.tenancy.begin(attacker.tenant).await.unwrap();
        let forged = sqlx::query(
            "update cvault.devices set preshared_key_sealed = $2, preshared_key_hash = sha256('y') where device_id = $1",
        )
        .bind(device.uuid())
        .bind(sealed)
        .execute(tx.conn())
        .await;
        if sealed.is_none() {
            let name = crate::db::DbError::from(forged.unwrap_err()).constraint().map(str::to_owned);
            assert_eq!(name.as_deref(), Some("devices_preshared_key_hashed"));
            continue;
        }
        forged.unwrap();
        sqlx::query("select platform.move_peer($1, $2)")
            .bind(device.uuid())
            .bind(server.uuid())
            .execute(tx.conn())
            .await
            .unwrap();
        tx.commit().await.unwrap();
        let Update::Snapshot { peers, .. } =
            desired::read(&world.app.db.sys, &world.app.keys, server, None).await.unwrap()
        else {
            panic!("no snapshot")
        };
        assert_eq!(peers.len(), 1, "the forged one is taken off");
    }
    world.register(victim, "another").await.unwrap();
    assert_eq!(snapshot_count(&world, server).await, 3);
}

#[tokio::test]
async fn new_keys_take_the_place_of_the_old_ones_on_the_same_server_and_addresses() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    let before = position(&world, server).await;
    let rotated = world.rotate(person, device.id, Some(true)).await.unwrap().device;
    assert_ne!(rotated.public_key, device.public_key);
    assert_eq!((rotated.addresses, rotated.server.id), (device.addresses, server));
    let preshared = rotated.keys.preshared.clone().unwrap();
    let update = desired::read(&world.app.db.sys, &world.app.keys, server, Some(before)).await.unwrap();
    let Update::Delta { removed, upserted, .. } = update else { panic!("{update:?}") };
    assert_eq!(removed, [device.public_key.as_bytes().to_vec()]);
    assert_eq!(upserted.len(), 1);
    assert_eq!(upserted[0].public_key, rotated.public_key.as_bytes().to_vec());
    assert_eq!(upserted[0].preshared_key, preshared.to_vec());
    assert_eq!(snapshot_count(&world, server).await, 1);
    let again = world.rotate(person, device.id, None).await.unwrap().device;
    assert_ne!(again.keys.preshared.unwrap(), preshared, "a device with a preshared key gets a new one");
    let stranger = world.person().await;
    assert!(matches!(world.rotate(stranger, device.id, None).await, Err(RotateError::NotFound)));
    world.revoke(person, device.id).await;
    assert!(matches!(world.rotate(person, device.id, None).await, Err(RotateError::NotFound)));
}

#[tokio::test]
async fn new_keys_bring_a_device_away_from_a_server_that_is_drained() {
    let (world, first) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    sqlx::query("update platform.servers set status = 'draining'").execute(&world.app.db.sys).await.unwrap();
    let refused = world.rotate(person, device.id, None).await;
    assert!(matches!(refused, Err(RotateError::Refused(RegisterError::ServerUnavailable))));
    let second = world.server("s2", "default", "lab-2").await;
    let rotated = world.rotate(person, device.id, None).await.unwrap();
    assert_eq!((rotated.moved_from, rotated.device.server.id), (Some(first), second));
    assert_eq!((snapshot_count(&world, first).await, snapshot_count(&world, second).await), (0, 1));
}

#[tokio::test]
async fn a_device_that_is_off_since_a_suspension_is_put_back_by_new_keys_and_by_a_connection() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let devices = [world.register(person, "a").await.unwrap().id, world.register(person, "b").await.unwrap().id];
    let enforce = async |status: &str| {
        let status = format!("update cvault.tenants set status = '{status}'");
        sqlx::query(sqlx::AssertSqlSafe(status)).execute(&mut world.superuser().await).await.unwrap();
        crate::tenants::enforce_suspensions(&world.app).await.unwrap()
    };
    assert_eq!(enforce("suspended").await, 2);
    sqlx::query("update cvault.tenants set status = 'active'").execute(&mut world.superuser().await).await.unwrap();
    world.rotate(person, devices[0], None).await.unwrap();
    let connection = connect(&world, person, devices[1], None).await.unwrap();
    assert!(connection.placed);
    assert_eq!(snapshot_count(&world, server).await, 2);
    let before = position(&world, server).await;
    assert_eq!(enforce("active").await, 0, "nothing is left to be put back");
    assert_eq!(position(&world, server).await, before);
}

async fn connect(
    world: &World,
    person: Person,
    device: DeviceId,
    region: Option<&str>,
) -> Result<crate::sessions::Connection, crate::sessions::ConnectError> {
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let now = world.app.clock.now();
    let work = crate::sessions::connect(&mut tx, person.user, device, region, now, request_id()).await;
    tx.finish(work).await
}

#[tokio::test]
async fn a_connection_leads_to_a_server_that_works() {
    use crate::sessions::ConnectError;
    let (world, first) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    let sys = &world.app.db.sys;
    sqlx::query("update platform.servers set status = 'draining'").execute(sys).await.unwrap();
    let stays = connect(&world, person, device.id, None).await.unwrap();
    assert_eq!((stays.server.id, stays.placed), (first, false), "a server that is drained keeps those it has");
    sqlx::query("update platform.servers set last_seen_at = now() - interval '2 minutes'").execute(sys).await.unwrap();
    let refused = connect(&world, person, device.id, None).await;
    assert!(matches!(refused, Err(ConnectError::ServerUnavailable)), "nobody knows whether it runs");
    let second = world.server("s2", "default", "lab-2").await;
    let moved = connect(&world, person, device.id, None).await.unwrap();
    assert_eq!((moved.server.id, moved.placed, moved.moved_from), (second, true, Some(first)));
    assert_eq!((snapshot_count(&world, first).await, snapshot_count(&world, second).await), (0, 1));
}

async fn position(world: &World, server: ServerId) -> desired::Position {
    let update = desired::read(&world.app.db.sys, &world.app.keys, server, None).await.unwrap();
    let Update::Snapshot { target, .. } = update else { panic!("{update:?}") };
    target
}

#[tokio::test]
async fn an_address_rests_until_every_server_that_ran_it_has_acknowledged() {
    let (world, first) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    let second = world.server("s2", "default", "lab-2").await;
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let now = world.app.clock.now();
    let work = crate::sessions::connect(&mut tx, person.user, device.id, Some("lab-2"), now, request_id()).await;
    assert_eq!(tx.finish(work).await.unwrap().moved_from, Some(first));
    world.revoke(person, device.id).await;
    acknowledge(&world, second).await;
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 0);
    acknowledge(&world, first).await;
    assert_eq!(ipam::free_quarantined(&world.app.db.sys).await.unwrap(), 1);
}

#[tokio::test]
async fn a_server_is_removed_only_when_it_has_told_the_last_bytes_or_is_lost() {
    use crate::servers::{Removal, RemoveServerError};
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    let refused = world.remove_server(server, Removal::Forced).await;
    assert!(matches!(refused, Err(RemoveServerError::InUse { peers: 1 })));
    world.revoke(person, device.id).await;
    assert!(matches!(world.remove_server(server, Removal::Settled).await, Err(RemoveServerError::Unsettled)));
    let mut superuser = world.superuser().await;
    for (acked_at, settled) in [("now()", false), ("now() - interval '11 seconds'", true)] {
        let sql = format!("update platform.servers set acked_revision = revision, acked_at = {acked_at}");
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut superuser).await.unwrap();
        assert_eq!(world.remove_server(server, Removal::Settled).await.is_ok(), settled);
    }
    let lost = world.server("lost", "default", "lab-1").await;
    let device = world.register(person, "d").await.unwrap();
    world.revoke(person, device.id).await;
    world.remove_server(lost, Removal::Forced).await.unwrap();
}
