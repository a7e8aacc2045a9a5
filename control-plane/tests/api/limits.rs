//! Rates, overload, and a database that is away.

use std::pin::Pin;
use std::time::Duration;

use cvault_control_plane::auth::passwords::{Party, PasswordError};
use cvault_types::Secret;
use futures::FutureExt;
use serde_json::json;
use tokio::time::Instant;

use crate::platform::{PASSWORD, Platform};

#[tokio::test]
async fn a_tenant_past_its_rate_waits_while_another_is_served() {
    let platform = Platform::with(|config| config.rate_limit_per_minute = 5).await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    let raised = platform.tenant_with(json!({"name": "Paying", "rate_limit_per_minute": 50})).await;
    let call = |tenant| platform.post("/api/v1/auth/refresh", &json!({"refresh_token": "cvr_"})).backend(tenant);
    for remaining in (0..5).rev() {
        let answer = call(&tenant).refused(401, "INVALID_TOKEN").await;
        assert_eq!(answer.header("ratelimit-policy"), "\"tenant\";q=5;w=60");
        assert!(
            answer.header("ratelimit").starts_with(&format!("\"tenant\";r={remaining};t=")),
            "{}",
            answer.header("ratelimit")
        );
    }
    let refused = call(&tenant).refused(429, "RATE_LIMITED").await;
    assert!((1..=12).contains(&refused.header("retry-after").parse::<u64>().unwrap()));
    assert_eq!(refused.body["limit"]["name"], "requests_per_minute");
    call(&other).refused(401, "INVALID_TOKEN").await;
    for _ in 0..20 {
        call(&raised).refused(401, "INVALID_TOKEN").await;
    }
}

#[tokio::test]
async fn who_is_over_the_rate_is_refused_without_a_look_at_the_database_and_nobody_else_is_told() {
    let platform = Platform::start().await;
    let tenant = platform.tenant_with(json!({"name": "Backend", "rate_limit_per_minute": 1})).await;
    let users = || platform.call("GET", "/api/v1/users").header("x-api-key", &tenant.key);
    let ours = || users().header("x-api-secret", &tenant.secret);
    assert_eq!(ours().send().await.status, 200);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < deadline, "a refusal waits for the database each time");
        let refused = ours().refused(429, "RATE_LIMITED").await;
        assert_eq!(refused.header("ratelimit-policy"), "\"tenant\";q=1;w=60");
        let mut superuser = platform.superuser().await;
        sqlx::raw_sql("begin; lock table cvault.api_keys").execute(&mut superuser).await.unwrap();
        let again = tokio::time::timeout(Duration::from_millis(500), ours().send()).await;
        sqlx::raw_sql("rollback").execute(&mut superuser).await.unwrap();
        // a machine may be so slow that nothing is remembered any more
        if again.is_ok_and(|again| again.status == 429) {
            break;
        }
    }
    let other = platform.tenant().await;
    users().header("x-api-secret", &other.secret).refused(401, "INVALID_API_KEY").await;
}

#[tokio::test]
async fn more_logins_than_the_cores_can_check_are_answered_at_once() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let party = Party::Tenant(tenant.id.parse().unwrap());
    let login = |number: usize| {
        let body = json!({"email": format!("a{number}@example.com"), "password": PASSWORD});
        platform.post("/api/v1/auth/login", &body).backend(&tenant)
    };
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut waiting = Vec::new();
    for number in 0.. {
        assert!(Instant::now() < deadline, "never overloaded");
        // every place there is, and those that have become free meanwhile
        while let Some(check) = admitted(&platform, party) {
            waiting.push(check);
        }
        let answer = login(number).send().await;
        if answer.status == 503 {
            answer.is_problem("overload", 503, "OVERLOADED");
            assert_eq!(answer.header("retry-after"), "2");
            break;
        }
        assert_eq!(answer.status, 401, "one place was free again: {}", answer.text);
    }
    let cores = std::thread::available_parallelism().unwrap().get();
    assert!(waiting.len() >= cores * 21, "{} places", waiting.len());
    let last = waiting.pop().unwrap();
    waiting.clear();
    let served = last.await;
    assert!(served.unwrap().starts_with("$2b$12$"), "those in the queue are served");
    login(0).refused(401, "INVALID_CREDENTIALS").await;
}

type Check<'a> = Pin<Box<dyn Future<Output = Result<String, PasswordError>> + 'a>>;

/// Takes a place in the queue of password checks, if there is one.
fn admitted(platform: &Platform, party: Party) -> Option<Check<'_>> {
    let mut check: Check<'_> = Box::pin(platform.app.passwords.hash(party, Secret::new(PASSWORD)));
    match check.as_mut().now_or_never() {
        Some(Err(PasswordError::Overloaded)) => None,
        Some(other) => panic!("{other:?}"),
        None => Some(check),
    }
}

#[tokio::test]
async fn without_its_database_the_platform_says_so() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    platform.app.db.close().await;
    let login = platform.post("/api/v1/auth/login", &json!({"email": "a@b.de", "password": "x"})).backend(&tenant);
    let answer = login.refused(503, "DATABASE_UNAVAILABLE").await;
    assert_eq!(answer.header("retry-after"), "1");
    for path in ["/health", "/health/ready"] {
        let health = platform.call("GET", path).send().await;
        assert_eq!((health.status.as_u16(), health.text("status").as_str()), (503, "unhealthy"));
        assert!(health.body["timestamp"].is_string());
    }
}

#[tokio::test]
async fn readiness_fails_as_soon_as_the_shutdown_begins() {
    let platform = Platform::start().await;
    assert_eq!(platform.call("GET", "/health/ready").send().await.status, 200);
    platform.app.draining.cancel();
    assert_eq!(platform.call("GET", "/health/ready").send().await.status, 503);
    assert_eq!(platform.call("GET", "/health").send().await.status, 200);
}
