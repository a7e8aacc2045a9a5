//! Rates, overload, and a database that is away.

use serde_json::json;

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
async fn more_logins_than_the_cores_can_check_are_answered_at_once() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let login = |number: usize| {
        let body = json!({"email": format!("a{number}@example.com"), "password": PASSWORD});
        platform.post("/api/v1/auth/login", &body).backend(&tenant)
    };
    let cores = std::thread::available_parallelism().unwrap().get();
    let calls = (0..cores * 21 + 5).map(|number| login(number).send());
    let answers = futures::future::join_all(calls).await;
    let overloaded: Vec<_> = answers.iter().filter(|answer| answer.status == 503).collect();
    assert!(!overloaded.is_empty(), "the queue is bounded");
    for answer in overloaded {
        answer.is_problem("overload", 503, "OVERLOADED");
        assert_eq!(answer.header("retry-after"), "2");
    }
    assert!(answers.iter().any(|answer| answer.status == 401), "those in the queue are served");
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
