//! Devices that are registered together, against a real database: each as if it came alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use sqlx::Row as _;
use tokio::task::JoinSet;

use super::*;
use crate::devices::{DeviceName, KeyRequest, NewDevice, PublicKey};
use crate::testing::{Person, World, request_id};

mod killed;

async fn registration(world: &World, person: Person, public_key: Option<PublicKey>, preshared: bool) -> Registration {
    let app = &world.app;
    let data_key = app.data_keys.sealed(&app.db.tenancy, person.tenant).await.unwrap().unwrap();
    let new = NewDevice {
        name: DeviceName::parse("d").unwrap(),
        platform: None,
        keys: KeyRequest { public_key, preshared },
        region: None,
    };
    let mut rng = StdRng::from_os_rng();
    Registration::new(person.tenant, person.user, new, &app.keys, &data_key, &mut rng, request_id()).unwrap()
}

type Outcome = (Person, Result<Registered, RegisterError>);

/// All at once: those that come while others are served go together.
async fn register_all(world: &Arc<World>, devices: Vec<(Person, Option<PublicKey>)>) -> Vec<Outcome> {
    registering(world, devices).await.join_all().await
}

async fn registering(world: &Arc<World>, devices: Vec<(Person, Option<PublicKey>)>) -> JoinSet<Outcome> {
    let mut registrations = Vec::new();
    for (number, (person, public_key)) in devices.into_iter().enumerate() {
        registrations.push((person, registration(world, person, public_key, number % 3 == 0).await));
    }
    let mut tasks = JoinSet::new();
    for (person, device) in registrations {
        let world = Arc::clone(world);
        tasks.spawn(async move {
            (person, world.app.registrations.register(&world.app.db.tenancy, person.tenant, device).await)
        });
    }
    tasks
}

/// In one statement: where those are that it did not pass over.
async fn place_all(world: &World, devices: Vec<(Person, Option<PublicKey>)>) -> Vec<Option<PlacedRow>> {
    let mut registrations = Vec::new();
    for (person, public_key) in &devices {
        registrations.push(registration(world, *person, *public_key, true).await);
    }
    let tx = world.app.db.tenancy.single(devices[0].0.tenant).await.unwrap();
    let mut placed = place(tx, None, &registrations.iter().collect::<Vec<_>>(), Clock.now()).await.unwrap();
    registrations.iter().map(|device| placed.remove(&device.id.uuid())).collect()
}

/// Made free ahead of need, as a periodic task does.
async fn open_addresses(world: &World) {
    sqlx::query("select platform.open_addresses(pool_id, 200) from platform.address_pools")
        .execute(&world.app.db.sys)
        .await
        .unwrap();
}

/// Other users of the person's tenant.
async fn colleagues(world: &World, person: Person, count: usize) -> Vec<Person> {
    let mut people = Vec::new();
    for _ in 0..count {
        let user = cvault_types::UserId::from_uuid(Uuid::now_v7());
        sqlx::query("insert into cvault.users (tenant_id, user_id, external_user_id) values ($1, $2, $2::text)")
            .bind(person.tenant.uuid())
            .bind(user.uuid())
            .execute(&mut world.superuser().await)
            .await
            .unwrap();
        people.push(Person { user, ..person });
    }
    people
}

/// How many devices there are: whatever else tells of them tells of each, and of nothing besides.
async fn devices(world: &World) -> i64 {
    let counts = sqlx::query(
        "select (select count(*) from cvault.devices),
                (select count(*) from cvault.devices d join platform.peers p using (device_id)
                 where p.generation = d.placed_revision and (p.ipv4, p.ipv6) = (d.ipv4, d.ipv6)),
                (select count(*) from platform.peers),
                (select count(distinct (target, actor)) from cvault.audit_log where action = 'device.register'),
                (select count(*) from cvault.audit_log where action = 'device.register'),
                (select count(*) from cvault.devices d join platform.addresses a using (device_id)
                 where a.state = 'allocated'),
                (select count(*) from platform.addresses where state <> 'free'),
                (select count(*) from platform.node_changes),
                sum(s.revision)::bigint, sum(s.peer_count)::bigint,
                bool_and((select coalesce(sum(platform.peer_record_digest(s.digest_key, p.device_id, p.tenant_id, p.public_key,
                     p.preshared_key_hash, p.ipv4, p.ipv6, p.generation)) % 340282366920938463463374607431768211456, 0)
                 from platform.peers p where p.server_id = s.server_id) = s.digest)
         from platform.servers s",
    )
    .fetch_one(&mut world.superuser().await)
    .await
    .unwrap();
    let devices = counts.get::<i64, _>(0);
    for column in 1..10 {
        assert_eq!(counts.get::<i64, _>(column), devices, "column {column}");
    }
    assert!(counts.get::<bool, _>(10), "the digest is not that of the peers");
    devices
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_addresses_revisions_and_audit_are_those_of_devices_that_came_one_by_one() {
    let (world, server) = World::with_server().await;
    let world = Arc::new(world);
    let person = world.person().await;
    sqlx::query("update cvault.tenants set max_devices_per_user = 3")
        .execute(&mut world.superuser().await)
        .await
        .unwrap();
    let people = colleagues(&world, person, 30).await;
    let outcomes = register_all(&world, people.iter().flat_map(|person| [(*person, None); 5]).collect()).await;
    let (mut own, mut addresses) = (BTreeMap::new(), BTreeSet::new());
    for (person, outcome) in outcomes {
        match outcome {
            Ok(device) => {
                assert!(addresses.insert(device.addresses.ipv4), "an address twice");
                assert_eq!(device.server.id, server);
                *own.entry(person.user.uuid()).or_insert(0) += 1;
            }
            Err(RegisterError::DeviceLimit { max: 3, used: 3 }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(own.into_values().collect::<Vec<_>>(), vec![3; 30]);
    assert_eq!(devices(&world).await, 90);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_refused_does_not_take_the_others_with_it() {
    let (world, _) = World::with_server().await;
    let world = Arc::new(world);
    let person = world.person().await;
    let people = colleagues(&world, person, 20).await;
    let gone = Person { user: cvault_types::UserId::from_uuid(Uuid::now_v7()), ..person };
    let key = PublicKey::parse("xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=").unwrap();
    let mut devices: Vec<_> = people.iter().map(|person| (*person, None)).collect();
    devices.splice(5..5, [(people[0], Some(key)), (gone, None), (people[1], Some(key))]);
    let outcomes = register_all(&world, devices).await;
    let count = |wanted: fn(&Result<Registered, RegisterError>) -> bool| {
        outcomes.iter().filter(|(_, outcome)| wanted(outcome)).count()
    };
    assert_eq!(count(|outcome| outcome.is_ok()), 21);
    assert_eq!(count(|outcome| matches!(outcome, Err(RegisterError::PublicKeyInUse))), 1);
    assert_eq!(count(|outcome| matches!(outcome, Err(RegisterError::UserGone))), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_and_a_server_are_filled_to_the_last_place() {
    for (pool, capacity) in [("192.168.9.0/28", 100), ("10.9.0.0/16", 13)] {
        let world = Arc::new(World::new().await);
        world.pool("tiny", pool, "fd00:9::/64", 0).await;
        world.server("s", "tiny", "lab-1").await;
        sqlx::query("update platform.servers set capacity = $1")
            .bind(capacity)
            .execute(&mut world.superuser().await)
            .await
            .unwrap();
        let person = world.person().await;
        let people = colleagues(&world, person, 40).await;
        let outcomes = register_all(&world, people.into_iter().map(|person| (person, None)).collect()).await;
        let placed = outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).count();
        assert_eq!(placed, 13, "{pool}");
        for (_, outcome) in outcomes {
            assert!(
                matches!(
                    outcome,
                    Ok(_)
                        | Err(RegisterError::PoolExhausted
                            | RegisterError::ServerUnavailable
                            | RegisterError::ServerFull)
                ),
                "{pool}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_those_whose_public_key_is_in_use_are_passed_over() {
    let (world, _) = World::with_server().await;
    let world = Arc::new(world);
    open_addresses(&world).await;
    let (person, foreign) = (world.person().await, world.person().await);
    let key = |byte| PublicKey::from_bytes([byte; 32]);
    let (own, theirs, suspended) = (key(1), key(2), key(3));
    for (person, key) in [(person, own), (foreign, theirs), (person, suspended)] {
        register_all(&world, vec![(person, Some(key))]).await.remove(0).1.unwrap();
    }
    // off its server, where its key might be another's meanwhile
    sqlx::query("delete from platform.peers where public_key = $1")
        .bind(suspended.as_bytes().as_slice())
        .execute(&mut world.superuser().await)
        .await
        .unwrap();
    let keys = [None, Some(own), Some(key(4)), Some(theirs), Some(key(5)), Some(key(4)), Some(suspended), None];
    let wanted = colleagues(&world, person, keys.len()).await.into_iter().zip(keys).collect();
    let placed = place_all(&world, wanted).await;
    let placed: Vec<bool> = placed.into_iter().map(|row| row.is_some()).collect();
    assert_eq!(placed, [true, false, true, false, true, false, false, true]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_passed_over_for_its_key_uses_up_nothing_of_its_users_limit() {
    let (world, _) = World::with_server().await;
    open_addresses(&world).await;
    let person = world.person().await;
    sqlx::query("update cvault.tenants set max_devices_per_user = 2")
        .execute(&mut world.superuser().await)
        .await
        .unwrap();
    let key = Some(PublicKey::from_bytes([1; 32]));
    let placed = place_all(&world, vec![(person, key), (person, key), (person, None), (person, None)]).await;
    let placed: Vec<bool> = placed.into_iter().map(|row| row.is_some()).collect();
    assert_eq!(placed, [true, false, true, false]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_is_exhausted_does_not_keep_devices_off_the_next_one() {
    let world = Arc::new(World::new().await);
    world.pool("tiny", "192.168.9.0/28", "fd00:9::/64", 0).await;
    world.pool("large", "10.9.0.0/16", "fd00:a::/64", 0).await;
    let tiny = world.server("s1", "tiny", "lab-1").await;
    let large = world.server("s2", "large", "lab-1").await;
    // with one device it is the more loaded one, however many the other has
    sqlx::query("update platform.servers set capacity = 1000 where server_id = $1")
        .bind(large.uuid())
        .execute(&mut world.superuser().await)
        .await
        .unwrap();
    let person = world.person().await;
    let people = colleagues(&world, person, 25).await;
    let alone = register_all(&world, people.into_iter().map(|person| (person, None)).collect()).await;
    let on_tiny = alone.into_iter().filter(|(_, outcome)| outcome.as_ref().unwrap().server.id == tiny).count();
    assert_eq!(on_tiny, 13);
    open_addresses(&world).await;
    let people = colleagues(&world, person, 20).await;
    for row in place_all(&world, people.into_iter().map(|person| (person, None)).collect()).await {
        assert_eq!(row.unwrap().server_id, Some(large.uuid()));
    }
    assert_eq!(devices(&world).await, 45);
}
