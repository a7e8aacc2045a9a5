//! Keys, secrets, tokens, passwords: the right ones work, and each wrong one has its exact answer.

use cvault_control_plane::auth::passwords::{Party, Passwords, Scheme};
use cvault_control_plane::auth::tokens::{self, ClientToken};
use cvault_types::{Secret, TenantId, UserId};
use serde_json::{Value, json};
use sqlx::Connection;
use time::Duration;
use uuid::Uuid;

use crate::platform::{Answer, PASSWORD, Platform, Tenant};

const LOGIN: &str = "/api/v1/auth/login";
const REFRESH: &str = "/api/v1/auth/refresh";

fn login_body(email: &str, password: &str) -> Value {
    json!({"email": email, "password": password})
}

async fn refresh(platform: &Platform, tenant: &Tenant, token: &str) -> Answer {
    platform.post(REFRESH, &json!({"refresh_token": token})).backend(tenant).send().await
}

#[tokio::test]
async fn a_user_registers_logs_in_refreshes_and_logs_out() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let registered = platform.register(&tenant, "User@Example.com").await;
    assert_eq!(registered.status, 201, "{}", registered.text);
    assert!(registered.text("user_id").starts_with("usr_"));
    assert_eq!((registered.text("token_type").as_str(), &registered.body["expires_in"]), ("Bearer", &json!(900)));

    let login = platform.post(LOGIN, &login_body("user@example.COM", PASSWORD)).backend(&tenant).send().await;
    assert_eq!((login.status.as_u16(), login.text("user_id")), (200, registered.text("user_id")));

    let next = refresh(&platform, &tenant, &login.text("refresh_token")).await;
    assert_eq!((next.status.as_u16(), next.text("user_id")), (200, registered.text("user_id")));
    assert_ne!(next.text("refresh_token"), login.text("refresh_token"));

    let body = json!({"refresh_token": next.text("refresh_token")});
    assert_eq!(platform.post("/api/v1/auth/logout", &body).backend(&tenant).send().await.status, 204);
    let after = refresh(&platform, &tenant, &next.text("refresh_token")).await;
    assert_eq!(after.status, 401, "{}", after.text);
    let elsewhere = refresh(&platform, &tenant, &registered.text("refresh_token")).await;
    assert_eq!(elsewhere.status, 200, "another login of the same user goes on");
}

#[tokio::test]
async fn a_login_brings_an_old_hash_up_to_the_configured_scheme() {
    let scheme = Scheme::Argon2id { memory_kib: 8192, passes: 1 };
    let platform = Platform::with(|config| config.passwords = scheme).await;
    let tenant = platform.tenant().await;
    platform.register(&tenant, "a@example.com").await;
    let old = Passwords::new(Scheme::Bcrypt { cost: 10 }).hash(Party::Portal, Secret::new(PASSWORD)).await.unwrap();
    let mut superuser = sqlx::PgConnection::connect_with(&platform.database.superuser()).await.unwrap();
    let mut stored = async || -> String {
        sqlx::query_scalar("select password_hash from cvault.users").fetch_one(&mut superuser).await.unwrap()
    };
    let first = stored().await;
    assert!(first.starts_with("$argon2id$v=19$m=8192,t=1,p=1$"), "{first}");
    let login = async |password: &str| {
        platform.post(LOGIN, &login_body("a@example.com", password)).backend(&tenant).send().await.status.as_u16()
    };
    assert_eq!((login(PASSWORD).await, stored().await), (200, first), "what is as configured stays");
    let mut connection = sqlx::PgConnection::connect_with(&platform.database.superuser()).await.unwrap();
    sqlx::query("update cvault.users set password_hash = $1").bind(&old).execute(&mut connection).await.unwrap();
    assert_eq!((login("another password").await, stored().await), (401, old.clone()));
    assert_eq!(login(PASSWORD).await, 200);
    let fresh = stored().await;
    assert!(fresh.starts_with("$argon2id$"), "{fresh}");
    assert_eq!(login(PASSWORD).await, 200);
}

#[tokio::test]
async fn a_user_that_is_disabled_while_its_password_is_checked_gets_no_tokens() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let user = platform.register(&tenant, "a@example.com").await.text("user_id").parse::<UserId>().unwrap();
    let (mut disabling, mut watching) = (platform.superuser().await, platform.superuser().await);
    sqlx::raw_sql("begin").execute(&mut disabling).await.unwrap();
    sqlx::query("update cvault.users set status = 'disabled' where user_id = $1")
        .bind(user.uuid())
        .execute(&mut disabling)
        .await
        .unwrap();
    let login = platform.post("/api/v1/auth/login", &login_body("a@example.com", PASSWORD)).backend(&tenant).send();
    let commit = async {
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
        let waits = "select exists (select from pg_locks l join pg_stat_activity a using (pid)
                                    where a.datname = current_database() and not l.granted)";
        while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&mut watching).await.unwrap() {
            assert!(tokio::time::Instant::now() < deadline, "the login does not look again");
        }
        sqlx::raw_sql("commit").execute(&mut disabling).await.unwrap();
    };
    let (answer, ()) = tokio::join!(login, commit);
    answer.is_problem("a login", 401, "INVALID_CREDENTIALS");
    let tokens: i64 =
        sqlx::query_scalar("select count(*) from cvault.refresh_tokens where issued_at > now() - interval '1 hour'")
            .fetch_one(&mut watching)
            .await
            .unwrap();
    assert_eq!(tokens, 1, "of the registration");
}

#[tokio::test]
async fn a_refresh_token_used_twice_ends_its_whole_family() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let first = platform.register(&tenant, "a@example.com").await.text("refresh_token");
    let second = refresh(&platform, &tenant, &first).await.text("refresh_token");
    refresh(&platform, &tenant, &first).await.is_problem("reuse", 401, "TOKEN_REUSED");
    refresh(&platform, &tenant, &second).await.is_problem("the thief's or the owner's", 401, "INVALID_TOKEN");
    refresh(&platform, &tenant, "cvr_nonsense").await.is_problem("nonsense", 401, "INVALID_TOKEN");
}

#[tokio::test]
async fn of_simultaneous_uses_of_a_refresh_token_one_succeeds() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let token = platform.register(&tenant, "a@example.com").await.text("refresh_token");
    let answers = futures::future::join_all((0..8).map(|_| refresh(&platform, &tenant, &token))).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 1);
    assert!(answers.iter().filter(|answer| answer.status != 200).all(|answer| answer.body["code"] == "TOKEN_REUSED"));
}

#[tokio::test]
async fn a_refresh_token_of_another_tenant_is_unknown() {
    let platform = Platform::start().await;
    let (one, other) = (platform.tenant().await, platform.tenant().await);
    let token = platform.register(&one, "a@example.com").await.text("refresh_token");
    refresh(&platform, &other, &token).await.is_problem("foreign", 401, "INVALID_TOKEN");
    assert_eq!(refresh(&platform, &one, &token).await.status, 200, "and was not used up by the attempt");
}

#[tokio::test]
async fn a_wrong_key_or_secret_has_one_answer() {
    let platform = Platform::start().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    let body = login_body("a@example.com", PASSWORD);
    let unknown = format!("cvk_{}{:08x}", "0".repeat(40), crc32fast::hash("0".repeat(40).as_bytes()));
    let (rest, last) = tenant.secret.split_at(tenant.secret.len() - 1);
    let mistyped = format!("{rest}{}", if last == "0" { "1" } else { "0" });
    let pairs = [
        (Some(tenant.key.as_str()), None),
        (None, Some(tenant.secret.as_str())),
        (None, None),
        (Some(&tenant.key), Some(&other.secret)),
        (Some(&other.key), Some(&tenant.secret)),
        (Some(&unknown), Some(&tenant.secret)),
        (Some("cvk_"), Some("cvs_")),
        (Some("tenant_abc123xyz"), Some(&tenant.secret)),
        (Some(&tenant.secret), Some(&tenant.key)),
        (Some(&tenant.key), Some(&mistyped)),
        (Some(&tenant.key), Some(&tenant.secret[..20])),
        (Some(&tenant.key), Some("' or 1=1 --")),
    ];
    for (key, secret) in pairs {
        let mut call = platform.post(LOGIN, &body);
        if let Some(key) = key {
            call = call.header("x-api-key", key);
        }
        if let Some(secret) = secret {
            call = call.header("x-api-secret", secret);
        }
        call.refused(401, "INVALID_API_KEY").await;
    }
    let twice = platform.post(LOGIN, &body).backend(&tenant).header("x-api-key", &other.key);
    twice.refused(401, "INVALID_API_KEY").await;
    let browser = platform.post(LOGIN, &body).backend(&tenant).header("origin", "https://shop.example");
    browser.refused(403, "SECRET_KEY_IN_BROWSER").await;
}

#[tokio::test]
async fn an_unknown_user_and_a_wrong_password_cannot_be_told_apart() {
    let platform = Platform::start().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    platform.register(&tenant, "a@example.com").await;
    let login = async |tenant: &Tenant, email: &str, password: &str| {
        let started = std::time::Instant::now();
        let call = platform.post(LOGIN, &login_body(email, password)).backend(tenant);
        let answer = call.refused(401, "INVALID_CREDENTIALS").await;
        (answer.text("detail"), started.elapsed())
    };
    let (wrong, took_wrong) = login(&tenant, "a@example.com", "not the password").await;
    let (unknown, took_unknown) = login(&tenant, "b@example.com", "not the password").await;
    let (malformed, took_malformed) = login(&tenant, "no address", "x").await;
    let (foreign, _) = login(&other, "a@example.com", PASSWORD).await;
    assert!(wrong == unknown && unknown == malformed && malformed == foreign);
    let floor = took_wrong / 4;
    assert!(took_unknown > floor && took_malformed > floor, "{took_wrong:?} {took_unknown:?} {took_malformed:?}");
}

#[tokio::test]
async fn wrong_admin_tokens_have_their_exact_answers() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let user = platform.register(&tenant, "a@example.com").await;
    let keys = platform.app.token_keys.last();
    let key = keys.signing(platform.app.clock.now());
    let issuer = &platform.app.config.public_url;
    let expired = tokens::mint_admin(key, issuer, "x", platform.app.clock.now() - Duration::hours(13));
    let foreign = tokens::mint_admin(key, "https://elsewhere", "x", platform.app.clock.now());
    let call = |value: &str| platform.call("GET", "/admin/tenants").header("authorization", value);
    call(&format!("Bearer {}", expired.expose())).refused(401, "TOKEN_EXPIRED").await;
    call(&format!("Bearer {}", foreign.expose())).refused(401, "INVALID_TOKEN").await;
    call(&format!("Bearer {}", user.text("access_token"))).refused(401, "INVALID_TOKEN").await;
    call(&format!("Basic {}", platform.admin_token())).refused(401, "INVALID_TOKEN").await;
    for value in ["Bearer", "Bearer ", "Bearer a.b.c", "", "eyJ"] {
        call(value).refused(401, "INVALID_TOKEN").await;
    }
    platform.call("GET", "/admin/tenants").refused(401, "INVALID_TOKEN").await;
    platform.call("GET", "/admin/tenants").backend(&tenant).refused(401, "INVALID_TOKEN").await;
    let lower = format!("bearer {}", platform.admin_token());
    assert_eq!(call(&lower).send().await.status, 200, "the scheme's case does not matter (RFC 9110)");
}

#[tokio::test]
async fn anyone_can_verify_a_user_token_with_the_published_key() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let user = platform.register(&tenant, "a@example.com").await;
    let jwks: jsonwebtoken::jwk::JwkSet =
        serde_json::from_value(platform.call("GET", "/.well-known/jwks.json").send().await.body).unwrap();
    let token = user.text("access_token");
    let header = jsonwebtoken::decode_header(&token).unwrap();
    let key = jsonwebtoken::DecodingKey::from_jwk(jwks.find(&header.kid.unwrap()).unwrap()).unwrap();
    let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::EdDSA);
    validation.set_audience(&["client"]);
    validation.set_issuer(&[&platform.app.config.public_url]);
    let claims = jsonwebtoken::decode::<Value>(&token, &key, &validation).unwrap().claims;
    assert_eq!(
        (claims["sub"].as_str(), claims["tid"].as_str()),
        (Some(user.text("user_id").as_str()), Some(tenant.id.as_str()))
    );
    assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 900);
    assert!(claims["sid"].is_string() && claims["jti"].is_string());
}

#[tokio::test]
async fn a_user_token_works_only_with_its_own_tenants_key() {
    let platform = Platform::start().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    let token = platform.register(&tenant, "a@example.com").await.text("access_token");
    let devices = |tenant: &Tenant, token: &str| {
        let call = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key);
        call.header("authorization", &format!("Bearer {token}"))
    };
    assert_eq!(devices(&tenant, &token).send().await.status, 200);
    devices(&other, &token).refused(401, "INVALID_TOKEN").await;
    devices(&tenant, &platform.admin_token()).refused(401, "INVALID_TOKEN").await;
    let who = ClientToken { tenant: tenant.id.parse::<TenantId>().unwrap(), user: UserId::from_uuid(Uuid::now_v7()) };
    let long_ago = platform.app.clock.now() - Duration::minutes(16);
    let expired = tokens::mint_client(
        platform.app.token_keys.last().signing(platform.app.clock.now()),
        &platform.app.config.public_url,
        who,
        Uuid::now_v7(),
        long_ago,
    );
    devices(&tenant, expired.expose()).refused(401, "TOKEN_EXPIRED").await;
    let call = platform.call("GET", "/api/v1/devices").header("authorization", &format!("Bearer {token}"));
    call.refused(401, "INVALID_API_KEY").await;
    platform.call("GET", "/api/v1/devices").backend(&tenant).refused(401, "INVALID_TOKEN").await;
}

#[tokio::test]
async fn one_of_many_simultaneous_registrations_of_an_address_succeeds() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let answers = futures::future::join_all((0..8).map(|_| platform.register(&tenant, "a@example.com"))).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1);
    for answer in answers.iter().filter(|answer| answer.status != 201) {
        answer.is_problem("a loser", 409, "EMAIL_TAKEN");
    }
    let other = platform.tenant().await;
    assert_eq!(platform.register(&other, "a@example.com").await.status, 201, "another tenant's users are its own");
}

#[tokio::test]
async fn simultaneous_registrations_stop_exactly_at_the_user_limit() {
    let platform = Platform::start().await;
    let tenant = platform.tenant_with(json!({"name": "Small", "user_limit": 3})).await;
    let emails: Vec<String> = (0..10).map(|i| format!("user{i}@example.com")).collect();
    let answers = futures::future::join_all(emails.iter().map(|email| platform.register(&tenant, email))).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 3);
    for answer in answers.iter().filter(|answer| answer.status != 201) {
        answer.is_problem("past the limit", 403, "USER_LIMIT_EXCEEDED");
        assert_eq!(answer.body["limit"], json!({"name": "users", "max": 3, "used": 3, "resets_at": null}));
    }
}

#[tokio::test]
async fn nothing_secret_is_stored_in_clear_and_every_attempt_is_recorded() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let user = platform.register(&tenant, "a@example.com").await;
    platform.post(LOGIN, &login_body("a@example.com", "wrong password")).backend(&tenant).send().await;
    refresh(&platform, &tenant, &user.text("refresh_token")).await;
    refresh(&platform, &tenant, &user.text("refresh_token")).await;

    let mut connection = sqlx::PgConnection::connect_with(&platform.database.superuser()).await.unwrap();
    let events: Vec<String> =
        sqlx::query_scalar("select kind || ' ' || outcome from cvault.auth_events order by event_id")
            .fetch_all(&mut connection)
            .await
            .unwrap();
    assert_eq!(events, ["register success", "login failure", "refresh success", "refresh reuse"]);

    let everything: String = sqlx::query_scalar(
        "select string_agg(x, ' ') from (
            select t::text as x from cvault.tenants t union all select t::text from cvault.api_keys t
            union all select t::text from cvault.users t union all select t::text from cvault.refresh_tokens t
            union all select t::text from cvault.auth_events t union all select t::text from cvault.audit_log t
            union all select t::text from platform.secrets t) rows",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    for secret in [PASSWORD, "wrong password", &tenant.secret, &user.text("refresh_token"), &user.text("access_token")]
    {
        assert!(!everything.contains(secret));
        assert!(!everything.contains(&hex::encode(secret)), "nor as bytea");
    }
    assert!(everything.contains("$2b$12$"), "passwords are bcrypt at cost 12");
}
