//! Rotations that are cut off, and keys that do not open.

use std::time::Duration;

use zeroize::Zeroizing;

use super::*;
use crate::config::{Config, Overrides};
use crate::serve::{self, StartError};
use crate::testing::{World, eventually};

fn ring(versions: &[(i16, u8)]) -> KeyRing {
    KeyRing::versions(versions.iter().map(|(version, byte)| (*version, Zeroizing::new([*byte; 32])))).unwrap()
}

const OLD: (i16, u8) = (1, 7);
const NEW: (i16, u8) = (2, 8);

async fn open(world: &World, versions: &[(i16, u8)]) -> Result<App, StartError> {
    let config = Config::from_env(&|_| None, &Overrides::default()).unwrap();
    serve::open(config, &world.database.config(), ring(versions)).await
}

async fn data_keys(world: &World) -> Vec<(i16, i64)> {
    in_use(&world.app.db.sys).await.unwrap().iter().map(|used| (used.version, used.data_keys)).collect()
}

/// What each device's configuration holds, read with the keys of `app`.
async fn private_key(app: &App, person: crate::testing::Person, device: cvault_types::DeviceId) -> Vec<u8> {
    let mut tx = app.db.tenancy.begin(person.tenant).await.unwrap();
    let keys = crate::devices::config_of(&mut tx, &app.keys, device).await.unwrap();
    match keys.private {
        crate::devices::ConfigKey::Known(key) => key.to_vec(),
        crate::devices::ConfigKey::OnlyAtTheClient => panic!("the server made this key"),
    }
}

#[tokio::test]
async fn a_rotation_cut_off_in_the_middle_is_finished_by_the_next_and_the_old_key_is_not_needed_any_more() {
    let (world, _) = World::with_server().await;
    let mut people = Vec::new();
    for _ in 0..9 {
        let person = world.person().await;
        let device = world.register(person, "d").await.unwrap().id;
        let key = private_key(&world.app, person, device).await;
        people.push((person, device, key));
    }
    people.sort_by_key(|(person, ..)| person.tenant);
    let both = open(&world, &[OLD, NEW]).await.unwrap();
    // the fifth tenant is held, so that the rotation is cut off there
    let mut holder = world.superuser().await;
    sqlx::raw_sql("begin").execute(&mut holder).await.unwrap();
    sqlx::query("select from cvault.tenants where tenant_id = $1 for update")
        .bind(people[4].0.tenant.uuid())
        .execute(&mut holder)
        .await
        .unwrap();
    let cut_off = tokio::spawn({
        let both = both.clone();
        async move { rotate(&both, "cli").await }
    });
    eventually("four are done", Duration::from_secs(20), async || data_keys(&world).await == [(1, 5), (2, 4)]).await;
    cut_off.abort();
    assert!(cut_off.await.unwrap_err().is_cancelled());
    sqlx::raw_sql("rollback").execute(&mut holder).await.unwrap();
    assert_eq!(data_keys(&world).await, [(1, 5), (2, 4)]);
    for (person, device, key) in &people {
        assert_eq!(&private_key(&both, *person, *device).await, key);
    }
    assert!(matches!(
        open(&world, &[NEW]).await,
        Err(StartError::Keys(RingError::Missing { version: 1, data_keys: 5, secrets: 0 }))
    ));
    assert_eq!(rotate(&both, "cli").await.unwrap(), Rotated { data_keys: 5, secrets: 0, answers: 0 });
    assert_eq!(rotate(&both, "cli").await.unwrap(), Rotated { data_keys: 0, secrets: 0, answers: 0 });
    let new = open(&world, &[NEW]).await.unwrap();
    assert_eq!(new.secrets.pepper, both.secrets.pepper);
    for (person, device, key) in &people {
        assert_eq!(&private_key(&new, *person, *device).await, key);
    }
    let noted: i64 = sqlx::query_scalar("select count(*) from cvault.audit_log where action = 'tenant.rewrap_key'")
        .fetch_one(&mut holder)
        .await
        .unwrap();
    assert_eq!(noted, 9);
    assert!(matches!(open(&world, &[OLD]).await, Err(StartError::Secrets(_))));
}

#[tokio::test]
async fn a_key_that_does_not_open_is_named_and_does_not_keep_the_others() {
    let world = World::new().await;
    let (broken, whole) = (world.person().await, world.person().await);
    sqlx::query("update cvault.tenants set data_key_sealed = $2 where tenant_id = $1")
        .bind(broken.tenant.uuid())
        .bind(ring(&[(1, 99)]).new_data_key(broken.tenant, &mut rand::rng()).sealed)
        .execute(&mut world.superuser().await)
        .await
        .unwrap();
    let both = open(&world, &[OLD, NEW]).await.unwrap();
    match rotate(&both, "cli").await {
        Err(RotateError::DoNotOpen { count: 1, named }) => assert_eq!(named, broken.tenant.to_string()),
        other => panic!("{other:?}"),
    }
    assert_eq!(data_keys(&world).await, [(1, 1), (2, 1)]);
    let sealed: Vec<u8> = sqlx::query_scalar("select data_key_sealed from cvault.tenants where tenant_id = $1")
        .bind(whole.tenant.uuid())
        .fetch_one(&mut world.superuser().await)
        .await
        .unwrap();
    ring(&[NEW]).opens(whole.tenant, &sealed).unwrap();
    // it is named as long as it is there, also when its version says that it was done
    sqlx::query("update cvault.tenants set data_key_version = 2").execute(&mut world.superuser().await).await.unwrap();
    assert!(matches!(rotate(&both, "cli").await, Err(RotateError::DoNotOpen { count: 1, .. })));
}
