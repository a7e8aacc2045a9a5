//! What failed attempts cost, and whom.

use std::time::Instant;

use cvault_control_plane::auth::passwords::Scheme;
use cvault_control_plane::auth::tokens::{self, ClientToken};
use serde_json::{Value, json};
use sqlx::ConnectOptions;

use crate::platform::{Answer, Call, PASSWORD, Platform, Tenant, decided};

const LOGIN: &str = "/api/v1/auth/login";
const REGISTER: &str = "/api/v1/auth/register";
const WRONG_SECRET: &str = "cvs_0000000000000000000000000000000000000000000000000000000000000000";

fn wrong_secret(tenant: &Tenant) -> String {
    // well-formed, so that it is looked up
    let sum = crc32fast::hash(&WRONG_SECRET.as_bytes()[4..]);
    let text = format!("{WRONG_SECRET}{sum:08x}");
    assert_ne!(text, tenant.secret);
    text
}

fn login<'a>(platform: &'a Platform, tenant: &Tenant, email: &str, password: &str) -> Call<'a> {
    platform.post(LOGIN, &json!({"email": email, "password": password})).backend(tenant)
}

async fn at_once(calls: impl Iterator<Item = Call<'_>>) -> Vec<Answer> {
    futures::future::join_all(calls.map(Call::send)).await
}

fn count(answers: &[Answer], status: u16) -> usize {
    answers.iter().filter(|answer| answer.status == status).count()
}

#[tokio::test]
async fn who_knows_the_public_key_alone_cannot_use_up_the_tenants_rate() {
    let platform = Platform::with(|config| config.rate_limit_per_minute = 5).await;
    let tenant = platform.tenant().await;
    let body = json!({"refresh_token": "cvr_"});
    for _ in 0..10 {
        let no_secret = platform.post("/api/v1/auth/refresh", &body).header("x-api-key", &tenant.key);
        no_secret.refused(401, "INVALID_API_KEY").await;
        let wrong = platform.post("/api/v1/auth/refresh", &body).header("x-api-key", &tenant.key);
        wrong.header("x-api-secret", &wrong_secret(&tenant)).refused(401, "INVALID_API_KEY").await;
        let no_token = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key);
        let refused = no_token.header("authorization", "Bearer a.b.c").refused(401, "INVALID_TOKEN").await;
        assert!(!refused.headers.contains_key("ratelimit"), "nothing of the tenant is told");
    }
    let answer = platform.post("/api/v1/auth/refresh", &body).backend(&tenant).refused(401, "INVALID_TOKEN").await;
    assert!(answer.header("ratelimit").starts_with("\"tenant\";r=4;"), "{}", answer.header("ratelimit"));
}

#[tokio::test]
async fn a_network_that_fails_too_often_waits_while_another_is_served() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let wrong = |ip: &str| {
        let call = platform.call("GET", "/api/v1/usage").header("x-api-key", &tenant.key).from(ip);
        call.header("x-api-secret", &wrong_secret(&tenant))
    };
    for host in 0..100 {
        wrong(&format!("2001:db8::{host:x}")).refused(401, "INVALID_API_KEY").await;
    }
    // on a slow machine some of them have run off by now
    let fail = || (0..100).for_each(|_| platform.app.throttles.credentials_failed("2001:db8::1".parse().ok()));
    fail();
    let refused = wrong("2001:db8::1:1").refused(429, "RATE_LIMITED").await;
    assert_eq!(refused.header("retry-after"), "1");
    let right = |ip: &str| platform.call("GET", "/api/v1/usage").backend(&tenant).from(ip).send();
    fail();
    assert_eq!(right("2001:db8::1").await.status, 429, "nobody has been right from there");
    assert_eq!(right("2001:db8:0:1::1").await.status, 200);
}

#[tokio::test]
async fn who_is_known_or_has_a_right_token_does_not_wait_for_its_neighbours() {
    let platform = Platform::start().await;
    let (tenant, newcomer) = (platform.tenant().await, platform.tenant().await);
    let session = platform.register(&tenant, "a@example.com").await;
    let nat = "198.51.100.1";
    let usage = |tenant: &Tenant| platform.call("GET", "/api/v1/usage").backend(tenant).from(nat);
    assert_eq!(usage(&tenant).send().await.status, 200);
    let devices = |token: &str, key: &str| {
        let call = platform.call("GET", "/api/v1/devices").header("x-api-key", key).from(nat);
        call.header("authorization", &format!("Bearer {token}"))
    };
    for _ in 0..100 {
        platform.app.throttles.credentials_failed(Some(nat.parse().unwrap()));
    }
    usage(&newcomer).refused(429, "RATE_LIMITED").await;
    assert_eq!(usage(&tenant).send().await.status, 200);
    let token = session.text("access_token");
    assert_eq!(devices(&token, &tenant.key).send().await.status, 200);
    devices("a.b.c", &tenant.key).refused(429, "RATE_LIMITED").await;
    // a right token does not open the way to keys: its user is charged
    devices(&token, &newcomer.key).refused(401, "INVALID_TOKEN").await;
    let user = session.text("user_id").parse().unwrap();
    for _ in 0..100 {
        platform.app.throttles.key_failed_of(user);
    }
    devices(&token, &newcomer.key).refused(429, "RATE_LIMITED").await;
}

#[tokio::test]
async fn a_token_that_has_expired_is_nobodys_guess() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let session = platform.register(&tenant, "a@example.com").await;
    let who = ClientToken { tenant: tenant.id.parse().unwrap(), user: session.text("user_id").parse().unwrap() };
    let (keys, issuer) = (platform.app.token_keys.last(), &platform.app.config.public_url);
    let key = keys.signing(platform.app.clock.now());
    let long_ago = platform.app.clock.now() - time::Duration::hours(1);
    let token = tokens::mint_client(key, issuer, who, uuid::Uuid::now_v7(), long_ago);
    for _ in 0..110 {
        let call = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key).from("198.51.100.1");
        call.header("authorization", &format!("Bearer {}", token.expose())).refused(401, "TOKEN_EXPIRED").await;
    }
}

#[tokio::test]
async fn guesses_at_one_account_are_bounded_whether_it_exists_or_not() {
    let cheap = Scheme::Argon2id { memory_kib: 64, passes: 1 };
    let platform = Platform::with(|config| config.passwords = cheap).await;
    let tenant = platform.tenant().await;
    platform.register(&tenant, "a@example.com").await;
    platform.register(&tenant, "b@example.com").await;
    let mut refusals = 0;
    for email in ["a@example.com", "nobody@example.com"] {
        let started = Instant::now();
        // a place is free again after 15 s, however long the machine takes for twenty
        let bound = || 20 + usize::try_from(started.elapsed().as_secs() / 15).unwrap();
        let guess = || login(&platform, &tenant, email, "wrong");
        let answers = futures::future::join_all((0..30).map(|_| decided(guess))).await;
        let (mut guesses, limited) = (count(&answers, 401), count(&answers, 429));
        assert!(guesses + limited == 30 && (20..=bound()).contains(&guesses), "{email}: {guesses} and {limited}");
        refusals += limited;
        // whoever knows the password waits too, and whatever the spelling is
        let refused = loop {
            let answer = decided(|| login(&platform, &tenant, &email.to_uppercase(), PASSWORD)).await;
            if answer.status == 429 {
                break answer;
            }
            // a place was free again: it is used up
            let guess = decided(guess).await;
            let (guessed, limited) = (usize::from(guess.status == 401), usize::from(guess.status == 429));
            assert_eq!(guessed + limited, 1, "{}", guess.text);
            (guesses, refusals) = (guesses + guessed, refusals + limited);
            assert!(guesses <= bound(), "{email}: {guesses} in {:?}", started.elapsed());
        };
        refused.is_problem(email, 429, "RATE_LIMITED");
        refusals += 1;
        assert!((1..=15).contains(&refused.header("retry-after").parse::<u64>().unwrap()));
    }
    assert_eq!(login(&platform, &tenant, "b@example.com", PASSWORD).send().await.status, 200);
    let mut superuser = platform.database.superuser().connect().await.unwrap();
    let limited: i64 =
        sqlx::query_scalar("select count(*) from cvault.auth_events where kind = 'login' and outcome = 'limited'")
            .fetch_one(&mut superuser)
            .await
            .unwrap();
    assert_eq!(usize::try_from(limited).unwrap(), refusals);
}

#[tokio::test]
async fn right_passwords_count_for_nothing() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    platform.register(&tenant, "a@example.com").await;
    let answers = at_once((0..15).map(|_| login(&platform, &tenant, "a@example.com", PASSWORD))).await;
    assert_eq!(count(&answers, 200), 15);
    let answers = at_once((0..15).map(|_| login(&platform, &tenant, "a@example.com", PASSWORD))).await;
    assert_eq!(count(&answers, 200), 15);
}

#[tokio::test]
async fn a_network_that_fails_at_one_tenant_is_served_at_another() {
    let platform = Platform::start().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    for tenant in [&tenant, &other] {
        platform.register(tenant, "a@example.com").await;
    }
    let taken: Value = json!({"email": "a@example.com", "password": PASSWORD});
    let register = |tenant, ip: &str| platform.post(REGISTER, &taken).backend(tenant).from(ip);
    let network = Some("192.0.2.1".parse().unwrap());
    // most of what it may fail, at once: on a busy machine a hundred passwords take longer than the allowance lasts
    for _ in 0..95 {
        platform.app.throttles.login_failed(tenant.id.parse().unwrap(), network);
    }
    let mut failures = 0;
    while register(&tenant, "192.0.2.1").send().await.status == 409 {
        failures += 1;
        assert!(failures < 100, "never limited");
    }
    assert!(failures > 0);
    login(&platform, &tenant, "a@example.com", PASSWORD).from("192.0.2.1").refused(429, "RATE_LIMITED").await;
    register(&tenant, "192.0.2.2").refused(409, "EMAIL_TAKEN").await;
    register(&other, "192.0.2.1").refused(409, "EMAIL_TAKEN").await;
}
