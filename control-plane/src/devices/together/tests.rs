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

/// All at once: the first makes the rest wait, and so go together.
async fn register_all(
    world: &Arc<World>,
    devices: Vec<(Person, Option<PublicKey>)>,
) -> Vec<(Person, Result<Registered, RegisterError>)> {
    let mut tasks = JoinSet::new();
    for (number, (person, public_key)) in devices.into_iter().enumerate() {
        let world = Arc::clone(world);
        tasks.spawn(async move {
            let app = &world.app;
            let data_key = app.data_keys.sealed(&app.db.tenancy, person.tenant).await.unwrap().unwrap();
            let new = NewDevice {
                name: DeviceName::parse(&format!("d{number}")).unwrap(),
                platform: None,
                keys: KeyRequest { public_key, preshared: number % 3 == 0 },
                region: None,
            };
            let (tenant, user, mut rng) = (person.tenant, person.user, StdRng::from_os_rng());
            let device = Registration::new(tenant, user, new, &app.keys, &data_key, &mut rng, request_id()).unwrap();
            (person, app.registrations.register(&app.db.tenancy, tenant, device).await)
        });
    }
    tasks.join_all().await
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
    let counts = sqlx::query(
        "select (select count(*) from cvault.devices d join platform.peers p using (device_id)
                 where p.generation = d.placed_revision and (p.ipv4, p.ipv6) = (d.ipv4, d.ipv6)),
                (select count(distinct (target, actor)) from cvault.audit_log where action = 'device.register'),
                (select count(*) from platform.node_changes), s.revision, s.peer_count,
                (select sum(platform.peer_record_digest(s.digest_key, p.device_id, p.tenant_id, p.public_key,
                     p.preshared_key_hash, p.ipv4, p.ipv6, p.generation)) % 340282366920938463463374607431768211456
                 from platform.peers p) = s.digest
         from platform.servers s",
    )
    .fetch_one(&mut world.superuser().await)
    .await
    .unwrap();
    for column in 0..5 {
        assert_eq!(counts.get::<i64, _>(column), 90, "column {column}");
    }
    assert!(counts.get::<bool, _>(5), "the digest is not that of the peers");
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
