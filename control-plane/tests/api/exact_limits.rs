//! A thousand requests at once, to two replicas: as many succeed as the limit says, every other one is told which limit it
//! was, and nobody gets what somebody else has.

use std::collections::HashSet;

use cvault_control_plane::auth::passwords::Scheme;
use serde_json::{Value, json};

use crate::platform::{Answer, PASSWORD, Platform, Tenant, decided};
use crate::scene::{with_server, with_server_and_pool};

async fn two_replicas() -> [Platform; 2] {
    let cheap = Scheme::Argon2id { memory_kib: 64, passes: 1 };
    let first = Platform::with(|config| config.passwords = cheap).await;
    let second = first.replica().await;
    [first, second]
}

fn with_status(answers: &[Answer], status: u16) -> impl Iterator<Item = &Answer> {
    answers.iter().filter(move |answer| answer.status == status)
}

/// Every answer is a success or says that `limit` is reached; the successes.
fn within<'a>(answers: &'a [Answer], code: &str, limit: &Value) -> Vec<&'a Answer> {
    for refused in answers.iter().filter(|answer| !answer.status.is_success()) {
        refused.is_problem("past the limit", 403, code);
        let told = &refused.body["limit"];
        assert_eq!((&told["name"], &told["max"], &told["used"]), (&limit["name"], &limit["max"], &limit["max"]));
    }
    answers.iter().filter(|answer| answer.status.is_success()).collect()
}

fn all_different<'a>(answers: impl Iterator<Item = &'a Answer>, name: &str) {
    let (mut seen, mut count) = (HashSet::new(), 0);
    for answer in answers {
        count += 1;
        seen.insert(answer.text(name));
    }
    assert_eq!(seen.len(), count, "a {name} is there twice");
}

async fn number(platform: &Platform, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(&mut platform.superuser().await).await.unwrap()
}

/// Users by the tenant's own names; the token of each.
async fn users(platform: &Platform, tenant: &Tenant, count: usize) -> Vec<String> {
    let calls = (0..count).map(|number| async move {
        let path = format!("/api/v1/users/user-{number}/login-token");
        decided(|| platform.call("POST", &path).backend(tenant)).await
    });
    let answers = futures::future::join_all(calls).await;
    answers.iter().map(|answer| answer.text("access_token")).collect()
}

/// Devices of these users, `count` of them in all, by turns.
async fn devices(replicas: &[Platform; 2], tenant: &Tenant, tokens: &[String], count: usize) -> Vec<Answer> {
    let calls = (0..count).map(|number| async move {
        let body = json!({"device_name": format!("d{number}")});
        let bearer = format!("Bearer {}", tokens[number % tokens.len()]);
        let replica = &replicas[number / tokens.len() % 2];
        let call = || replica.post("/api/v1/devices", &body).header("x-api-key", &tenant.key);
        decided(|| call().header("authorization", &bearer)).await
    });
    futures::future::join_all(calls).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_users_stop_at_the_tenants_limit() {
    let replicas = two_replicas().await;
    let tenant = replicas[0].tenant_with(json!({"name": "Small", "user_limit": 50})).await;
    let (tenant, replicas) = (&tenant, &replicas);
    // each name twice: the same user is counted once, whoever comes first
    let vouched = (0..600).map(|number| async move {
        let path = format!("/api/v1/users/user-{}/login-token", number % 300);
        decided(|| replicas[number % 2].call("POST", &path).backend(tenant)).await
    });
    let registered = (0..400).map(|number| async move {
        let body = json!({"email": format!("user{number}@example.com"), "password": PASSWORD});
        decided(|| replicas[number % 2].post("/api/v1/auth/register", &body).backend(tenant)).await
    });
    let (mut answers, registered) =
        tokio::join!(futures::future::join_all(vouched), futures::future::join_all(registered));
    answers.extend(registered);
    assert_eq!(answers.len(), 1_000);
    let let_in = within(&answers, "USER_LIMIT_EXCEEDED", &json!({"name": "users", "max": 50}));
    let ids: HashSet<String> = let_in.iter().map(|answer| answer.text("user_id")).collect();
    assert_eq!((with_status(&answers, 201).count(), ids.len()), (50, 50));
    assert_eq!(number(&replicas[0], "select count(*) from cvault.users").await, 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_stop_at_each_users_limit_and_no_address_is_given_twice() {
    let replicas = two_replicas().await;
    with_server(&replicas[0]).await;
    let tenant = replicas[0].tenant_with(json!({"name": "Small", "max_devices_per_user": 7})).await;
    let tokens = users(&replicas[0], &tenant, 61).await;
    let limit = json!({"name": "devices_per_user", "max": 7});
    // one user who wants far too many, and sixty who want some too many
    for tokens in [&tokens[..1], &tokens[1..]] {
        let answers = devices(&replicas, &tenant, tokens, 1_000).await;
        let let_in = within(&answers, "DEVICE_LIMIT_EXCEEDED", &limit);
        assert_eq!(let_in.len(), 7 * tokens.len());
    }
    let addresses = "select count(distinct ipv4) from cvault.devices where status = 'active'";
    assert_eq!(number(&replicas[0], addresses).await, 7 * 61);
    assert_eq!(number(&replicas[0], "select count(distinct ipv6) from cvault.devices").await, 7 * 61);
    assert_eq!(number(&replicas[0], "select count(*) from platform.peers").await, 7 * 61);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_devices_at_once_have_a_thousand_addresses() {
    let replicas = two_replicas().await;
    with_server(&replicas[0]).await;
    let tenant = replicas[0].tenant_with(json!({"name": "Large", "max_devices_per_user": 1_000})).await;
    let tokens = users(&replicas[0], &tenant, 10).await;
    let answers = devices(&replicas, &tenant, &tokens, 1_000).await;
    assert_eq!(with_status(&answers, 201).count(), 1_000);
    for name in ["device_id", "assigned_ip", "assigned_ipv6"] {
        all_different(answers.iter(), name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_address_of_a_pool_is_given_once() {
    let replicas = two_replicas().await;
    with_server_and_pool(&replicas[0], "10.8.0.0/24").await;
    let pools = replicas[0].admin("GET", "/admin/pools").send().await;
    let free = pools.body["data"][0]["free"].as_u64().unwrap();
    assert!((250..=254).contains(&free), "{}", pools.text);
    let tenant = replicas[0].tenant_with(json!({"name": "Large", "max_devices_per_user": 100})).await;
    let tokens = users(&replicas[0], &tenant, 20).await;
    let answers = devices(&replicas, &tenant, &tokens, 1_000).await;
    for refused in answers.iter().filter(|answer| !answer.status.is_success()) {
        refused.is_problem("the pool is used up", 503, "POOL_EXHAUSTED");
    }
    assert_eq!(with_status(&answers, 201).count() as u64, free);
    for name in ["device_id", "assigned_ip", "assigned_ipv6"] {
        all_different(with_status(&answers, 201), name);
    }
    let peers = number(&replicas[0], "select count(*) from platform.peers where removed_revision is null").await;
    assert_eq!(peers.unsigned_abs(), free);
}
