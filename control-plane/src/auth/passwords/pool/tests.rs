use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use axum::body::Body;
use futures::FutureExt;
use http::{Request, StatusCode};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tower::ServiceExt;
use uuid::Uuid;

use super::*;
use crate::http::router;
use crate::tenants::{self, Actor, Settings};
use crate::testing::{World, eventually};

const LONG: Duration = Duration::from_secs(120);

fn tenant(number: u128) -> Party {
    Party::Tenant(TenantId::from_uuid(Uuid::from_u128(number)))
}

type Check<'a> = Pin<Box<dyn Future<Output = Result<usize, PasswordError>> + 'a>>;

/// Work that tells when it was done, asked for once so that it has its place.
fn asked<'a>(pool: &'a Pool, party: Party, done: &Arc<AtomicUsize>) -> Option<Check<'a>> {
    let done = Arc::clone(done);
    let mut check: Check<'a> = Box::pin(pool.run(party, move || done.fetch_add(1, Ordering::Relaxed)));
    match check.as_mut().now_or_never() {
        None => Some(check),
        Some(Err(PasswordError::Overloaded)) => None,
        Some(other) => panic!("{other:?}"),
    }
}

type Held<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Keeps every thread of a pool until the first that is given back is dropped.
async fn all_busy(pool: &Pool, threads: usize) -> (Vec<mpsc::Sender<()>>, Vec<Held<'_>>) {
    let (mut busy, mut work) = (Vec::new(), Vec::new());
    for _ in 0..threads {
        let (release, released) = mpsc::channel::<()>();
        let mut held: Held<'_> = Box::pin(async move {
            pool.run(Party::Portal, move || released.recv().is_err()).await.unwrap();
        });
        assert!(held.as_mut().now_or_never().is_none());
        busy.push(release);
        work.push(held);
    }
    eventually("every thread is busy", LONG, async || pool.shared.state().running == threads).await;
    (busy, work)
}

#[tokio::test]
async fn the_threads_give_way_to_everybody_and_survive_a_panic() {
    let pool = Pool::start(1, 2);
    let own = rustix::process::getpriority_process(None).unwrap();
    let theirs = pool.run(tenant(1), || rustix::process::getpriority_process(None).unwrap()).await.unwrap();
    assert_eq!((own, theirs), (rustix::process::getpriority_process(None).unwrap(), NICE));
    assert!(own < NICE);
    let panicked = pool.run(tenant(1), || panic!("a fault of ours")).await;
    assert!(matches!(panicked, Err::<(), _>(PasswordError::Interrupted)));
    assert_eq!(pool.run(tenant(1), || 7).await.unwrap(), 7);
    eventually("its place is free", LONG, async || pool.shared.state().running == 0).await;
}

#[tokio::test]
async fn work_that_nobody_waits_for_is_left_out_and_its_place_is_free_at_once() {
    let pool = Pool::start(1, 1);
    let (busy, work) = all_busy(&pool, 1).await;
    let done = Arc::default();
    let left = asked(&pool, tenant(1), &done).unwrap();
    assert!(asked(&pool, tenant(2), &done).is_none(), "full, and nobody holds more than one place");
    drop(left);
    let kept = asked(&pool, tenant(2), &done).unwrap();
    drop(busy);
    assert_eq!(kept.await.unwrap(), 0, "nothing was done before it");
    futures::future::join_all(work).await;
    assert_eq!(done.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn one_that_floods_keeps_nobody_else_out_or_waiting() {
    let pool = Pool::start(1, 6);
    let (busy, work) = all_busy(&pool, 1).await;
    let done = Arc::default();
    let mut flood: Vec<_> = std::iter::from_fn(|| asked(&pool, tenant(1), &done)).collect();
    assert_eq!(flood.len(), 6);
    let quiet = [asked(&pool, tenant(2), &done).unwrap(), asked(&pool, tenant(3), &done).unwrap()];
    for newest in flood.split_off(4) {
        assert!(matches!(newest.now_or_never(), Some(Err(PasswordError::Overloaded))), "told at once");
    }
    assert!(asked(&pool, tenant(1), &done).is_none());
    drop(busy);
    let quiet = futures::future::join_all(quiet).await.into_iter().map(Result::unwrap);
    assert_eq!(quiet.collect::<Vec<_>>(), [1, 2], "each after one of the flood");
    let flood = futures::future::join_all(flood).await.into_iter().map(Result::unwrap);
    assert_eq!(flood.collect::<Vec<_>>(), [0, 3, 4, 5]);
    futures::future::join_all(work).await;
}

#[tokio::test]
async fn a_login_at_one_tenant_is_admitted_while_another_tenant_fills_the_queue() {
    let world = World::new().await;
    let mut rng = StdRng::from_os_rng();
    let actor = Actor { name: "cli".to_owned(), request_id: None };
    let mut made = Vec::new();
    for name in ["Flood", "Quiet"] {
        made.push(tenants::create(&world.app, Settings::named(name.to_owned()), &actor, &mut rng).await.unwrap());
    }
    let login = |of: usize| {
        let request = Request::post("/api/v1/auth/login")
            .header("content-type", "application/json")
            .header("x-api-key", &made[of].1.key)
            .header("x-api-secret", made[of].1.secret.expose())
            .body(Body::from(r#"{"email":"a@example.com","password":"correct horse"}"#))
            .unwrap();
        router::api(world.app.clone()).oneshot(request)
    };
    let pool = &world.app.passwords.pool;
    let cores = std::thread::available_parallelism().unwrap().get();
    let (busy, work) = all_busy(pool, cores).await;
    let done = Arc::default();
    let mut flood: Vec<_> = std::iter::from_fn(|| asked(pool, Party::Tenant(made[0].0.id), &done)).collect();
    assert_eq!(login(0).await.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    let quiet = tokio::spawn(login(1));
    let newest = tokio::time::timeout(LONG, flood.pop().unwrap()).await.unwrap();
    assert!(matches!(newest, Err(PasswordError::Overloaded)), "it has made room: {newest:?}");
    drop(busy);
    assert_eq!(quiet.await.unwrap().unwrap().status(), StatusCode::UNAUTHORIZED);
    for check in flood {
        check.await.unwrap();
    }
    futures::future::join_all(work).await;
}
