//! API keys: scopes, expiry, regeneration, revocation; clients without a secret, and pages of other origins.

use cvault_control_plane::auth::api_keys::{self, KeyChange, KeySettings};
use cvault_control_plane::auth::passwords::Scheme;
use cvault_control_plane::auth::throttle::Account;
use cvault_control_plane::http::router;
use cvault_control_plane::tenancy::TenantTx;
use cvault_control_plane::tenants::Actor;
use cvault_types::TenantId;
use cvault_types::api_key::{ApiKey, Scope, UpdateApiKey};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::platform::{Answer, Call, PASSWORD, Platform, Tenant};

const REFRESH: &str = "/api/v1/auth/refresh";
const REGISTER: &str = "/api/v1/auth/register";
const SHOP: &str = "https://shop.example";

async fn begin(platform: &Platform, tenant: &Tenant) -> TenantTx {
    platform.app.db.tenancy.begin(tenant.id.parse::<TenantId>().unwrap()).await.unwrap()
}

fn actor() -> Actor {
    Actor { name: "adm_test".to_owned(), request_id: None }
}

/// Another key of the tenant, as a tenant of its own to call with.
async fn key(platform: &Platform, tenant: &Tenant, scopes: &[Scope]) -> (ApiKey, Tenant) {
    let settings = KeySettings { name: "another".to_owned(), scopes: scopes.to_vec(), expires_at: None };
    let mut tx = begin(platform, tenant).await;
    let (secrets, now) = (&platform.app.secrets, platform.app.clock.now());
    let mut rng = StdRng::from_os_rng();
    let (key, secret) = api_keys::add(&mut tx, secrets, &settings, &actor(), now, &mut rng).await.unwrap();
    tx.commit().await.unwrap();
    let caller = Tenant { id: tenant.id.clone(), key: key.api_key.clone(), secret: secret.expose().to_owned() };
    (key, caller)
}

async fn only_key(platform: &Platform, tenant: &Tenant) -> ApiKey {
    let mut tx = begin(platform, tenant).await;
    let keys = api_keys::list(&mut tx).await.unwrap();
    assert_eq!(keys.len(), 1);
    keys.into_iter().next().unwrap()
}

async fn regenerate(platform: &Platform, tenant: &Tenant, grace: Duration) -> Tenant {
    let mut tx = begin(platform, tenant).await;
    let (secrets, now) = (&platform.app.secrets, platform.app.clock.now());
    let mut rng = StdRng::from_os_rng();
    let (key, secret) = api_keys::regenerate(&mut tx, secrets, None, grace, &actor(), now, &mut rng).await.unwrap();
    tx.commit().await.unwrap();
    Tenant { id: tenant.id.clone(), key: key.api_key, secret: secret.expose().to_owned() }
}

/// A call that needs the secret and changes nothing.
async fn works(platform: &Platform, caller: &Tenant) -> bool {
    let answer = platform.call("GET", "/api/v1/users").backend(caller).send().await;
    if answer.status != 200 {
        answer.is_problem("a key that does not work", 401, "INVALID_API_KEY");
    }
    answer.status == 200
}

async fn set(platform: &Platform, tenant: &Tenant, public_clients: bool, origins: &[&str]) {
    let id = tenant.id.parse::<TenantId>().unwrap().uuid();
    sqlx::query("update cvault.tenants set public_clients = $2, allowed_origins = $3 where tenant_id = $1")
        .bind(id)
        .bind(public_clients)
        .bind(origins)
        .execute(&mut platform.superuser().await)
        .await
        .unwrap();
}

#[tokio::test]
async fn programs_with_one_public_key_and_one_idempotency_key_do_not_meet() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    set(&platform, &tenant, true, &[]).await;
    let send = |path: &str, email: &str, password: &str| {
        let call = platform.post(path, &json!({"email": email, "password": password})).header("x-api-key", &tenant.key);
        call.header("idempotency-key", path)
    };
    for path in ["/api/v1/auth/register", "/api/v1/auth/login"] {
        for email in ["a@example.com", "b@example.com"] {
            let first = send(path, email, PASSWORD).send().await;
            assert!(first.status.is_success() && first.header("idempotency-replayed").is_empty(), "{}", first.text);
            let again = send(path, email, PASSWORD).send().await;
            assert_eq!((&again.text, again.header("idempotency-replayed")), (&first.text, "true"));
        }
    }
    // an answer that is kept is no way to try passwords
    let login = "/api/v1/auth/login";
    let account = Account::of(tenant.id.parse().unwrap(), "a@example.com");
    for _ in 0..18 {
        platform.app.throttles.guess(account).unwrap();
    }
    send(login, "a@example.com", "wrong password").refused(422, "IDEMPOTENCY_KEY_REUSED").await;
    send(login, "a@example.com", "wrong password").refused(422, "IDEMPOTENCY_KEY_REUSED").await;
    send(login, "a@example.com", "wrong password").refused(429, "RATE_LIMITED").await;
}

#[tokio::test]
async fn a_key_opens_what_its_scopes_name_and_nothing_else() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let user = platform.register(&tenant, "a@example.com").await;
    let bearer = format!("Bearer {}", user.text("access_token"));
    for scope in Scope::ALL {
        let (_, caller) = key(&platform, &tenant, &[scope]).await;
        let calls = [
            (Scope::Auth, platform.post(REFRESH, &json!({"refresh_token": "cvr_"})).backend(&caller)),
            (Scope::Users, platform.call("GET", "/api/v1/users").backend(&caller)),
            (Scope::Usage, platform.call("GET", "/api/v1/usage").backend(&caller)),
            (
                Scope::Devices,
                platform
                    .call("GET", "/api/v1/devices")
                    .header("x-api-key", &caller.key)
                    .header("authorization", &bearer),
            ),
            (
                Scope::Devices,
                platform
                    .call("GET", "/api/v1/servers")
                    .header("x-api-key", &caller.key)
                    .header("authorization", &bearer),
            ),
        ];
        for (needed, call) in calls {
            let answer = call.send().await;
            if needed == scope {
                assert_ne!(answer.body["code"], "INSUFFICIENT_SCOPE", "{scope:?}: {}", answer.text);
            } else {
                answer.is_problem(&format!("{scope:?} at {needed:?}"), 403, "INSUFFICIENT_SCOPE");
            }
        }
    }
}

#[test]
fn every_operation_that_asks_for_a_key_has_a_scope() {
    let (_, document) = router::routes().split_for_parts();
    let document = serde_json::to_value(&document).unwrap();
    let mut asked = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        for operation in operations.as_object().unwrap().values() {
            let alternatives = operation["security"].as_array().cloned().unwrap_or_default();
            if alternatives.iter().any(|needs| needs.get("api_key").is_some()) {
                asked += 1;
                assert!(api_keys::scope_of(path).is_some(), "{path} needs a scope in api_keys::scope_of");
            }
        }
    }
    assert!(asked >= 18, "{asked}");
}

#[tokio::test]
async fn a_regenerated_secret_replaces_the_old_one_at_once_or_after_its_grace() {
    let platform = Platform::start().await;
    let first = platform.tenant().await;
    let second = regenerate(&platform, &first, Duration::ZERO).await;
    assert_eq!(second.key, first.key, "the public part stays");
    assert!(works(&platform, &second).await && !works(&platform, &first).await);

    let third = regenerate(&platform, &second, Duration::hours(1)).await;
    assert!(works(&platform, &third).await && works(&platform, &second).await);
    let shown = only_key(&platform, &third).await;
    let left = shown.previous_secret_valid_until.unwrap() - platform.app.clock.now();
    assert!(left > Duration::minutes(59) && left <= Duration::hours(1), "{left}");

    let fourth = regenerate(&platform, &third, Duration::days(30)).await;
    assert!(!works(&platform, &second).await, "one old secret at a time");
    assert!(works(&platform, &third).await && works(&platform, &fourth).await);
    let until = only_key(&platform, &fourth).await.previous_secret_valid_until.unwrap();
    assert!(until - platform.app.clock.now() <= Duration::days(7));

    sqlx::query("update cvault.api_keys set previous_valid_until = now()")
        .execute(&mut platform.superuser().await)
        .await
        .unwrap();
    assert!(works(&platform, &fourth).await && !works(&platform, &third).await);
    assert!(only_key(&platform, &fourth).await.previous_secret_valid_until.is_none());
}

#[tokio::test]
async fn a_revoked_or_expired_key_is_refused_at_the_next_request() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let (made, caller) = key(&platform, &tenant, &Scope::ALL).await;
    assert!(works(&platform, &caller).await);
    let expire = async |at: Option<OffsetDateTime>| {
        let change = KeyChange { name: None, scopes: None, expires_at: Some(at) };
        let mut tx = begin(&platform, &tenant).await;
        api_keys::update(&mut tx, made.id, change, &actor()).await.unwrap();
        tx.commit().await.unwrap();
    };
    expire(Some(platform.app.clock.now())).await;
    assert!(!works(&platform, &caller).await);
    expire(Some(platform.app.clock.now() + Duration::hours(1))).await;
    assert!(works(&platform, &caller).await);
    expire(None).await;
    let mut tx = begin(&platform, &tenant).await;
    api_keys::revoke(&mut tx, made.id, &actor(), platform.app.clock.now()).await.unwrap();
    tx.commit().await.unwrap();
    assert!(!works(&platform, &caller).await);
    assert!(works(&platform, &tenant).await, "the tenant's other keys go on");
    let mut tx = begin(&platform, &tenant).await;
    let again = api_keys::revoke(&mut tx, made.id, &actor(), platform.app.clock.now()).await;
    assert!(matches!(again, Err(api_keys::ManageError::NotFound)));
    drop(tx);
    let mut tx = begin(&platform, &platform.tenant().await).await;
    assert!(api_keys::find_key(&mut tx, made.id).await.unwrap().is_none(), "nor is it another tenant's");
    let actions: Vec<String> =
        sqlx::query_scalar("select action from cvault.audit_log where actor = 'adm_test' order by audit_id")
            .fetch_all(&mut platform.superuser().await)
            .await
            .unwrap();
    assert_eq!(actions, ["api_key.create", "api_key.update", "api_key.update", "api_key.update", "api_key.revoke"]);
}

#[tokio::test]
async fn a_key_that_is_revoked_while_it_is_over_the_rate_is_only_ever_refused_and_soon_as_unknown() {
    let platform = Platform::start().await;
    let tenant = platform.tenant_with(json!({"name": "Backend", "rate_limit_per_minute": 1})).await;
    let (made, caller) = key(&platform, &tenant, &Scope::ALL).await;
    let status = async || platform.call("GET", "/api/v1/users").backend(&caller).send().await.status.as_u16();
    assert_eq!((status().await, status().await), (200, 429));
    let mut tx = begin(&platform, &tenant).await;
    api_keys::revoke(&mut tx, made.id, &actor(), platform.app.clock.now()).await.unwrap();
    tx.commit().await.unwrap();
    let unknown = async {
        loop {
            match status().await {
                401 => break,
                429 => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
                other => panic!("{other}"),
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), unknown).await.unwrap();
}

#[test]
fn a_key_of_no_name_no_scope_or_the_past_is_refused_with_all_its_faults() {
    let now = OffsetDateTime::from_unix_timestamp(1_000).unwrap();
    let request = UpdateApiKey { name: Some("a\nb".to_owned()), scopes: Some(Vec::new()), expires_at: Some(Some(now)) };
    let problem = KeyChange::parse(request, now).unwrap_err();
    for field in ["name", "scopes", "expires_at"] {
        assert!(problem.sentences().contains(field), "{}", problem.sentences());
    }
}

#[tokio::test]
async fn uses_are_written_once_a_minute_and_not_by_requests() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let mut superuser = platform.superuser().await;
    assert!(only_key(&platform, &tenant).await.last_used_at.is_none());
    for _ in 0..3 {
        assert!(works(&platform, &tenant).await);
    }
    assert!(only_key(&platform, &tenant).await.last_used_at.is_none(), "a request writes nothing");
    let flush = async || platform.app.uses.flush(&platform.app.db.sys).await.unwrap();
    assert_eq!(flush().await, 2, "a key and a day");
    let used = only_key(&platform, &tenant).await.last_used_at.unwrap();
    assert!(works(&platform, &tenant).await);
    flush().await;
    assert_eq!(only_key(&platform, &tenant).await.last_used_at, Some(used), "not a minute later");
    sqlx::query("update cvault.api_keys set last_used_at = last_used_at - interval '1 minute'")
        .execute(&mut superuser)
        .await
        .unwrap();
    assert!(works(&platform, &tenant).await);
    assert_eq!(flush().await, 2);
    assert!(only_key(&platform, &tenant).await.last_used_at.unwrap() > used);
    assert_eq!(flush().await, 0, "nothing is written twice");
    let calls: i64 = sqlx::query_scalar("select sum(api_calls)::bigint from cvault.usage_daily")
        .fetch_one(&mut superuser)
        .await
        .unwrap();
    assert_eq!(calls, 5);
}

fn alone<'a>(platform: &'a Platform, tenant: &Tenant, email: &str) -> Call<'a> {
    let body = json!({"email": email, "password": PASSWORD});
    platform.post(REGISTER, &body).header("x-api-key", &tenant.key)
}

#[tokio::test]
async fn without_a_secret_users_log_in_only_where_the_tenant_allows_it() {
    let platform = Platform::start().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    alone(&platform, &tenant, "a@example.com").refused(401, "INVALID_API_KEY").await;
    set(&platform, &tenant, true, &[]).await;
    let user = alone(&platform, &tenant, "a@example.com").send().await;
    assert_eq!(user.status, 201, "{}", user.text);
    let send = async |path: &str, body: serde_json::Value| {
        platform.post(path, &body).header("x-api-key", &tenant.key).send().await
    };
    let login = send("/api/v1/auth/login", json!({"email": "a@example.com", "password": PASSWORD})).await;
    assert_eq!(login.status, 200, "{}", login.text);
    let next = send(REFRESH, json!({"refresh_token": login.text("refresh_token")})).await;
    assert_eq!(next.status, 200, "{}", next.text);
    let out = send("/api/v1/auth/logout", json!({"refresh_token": next.text("refresh_token")})).await;
    assert_eq!(out.status, 204, "{}", out.text);

    for (method, path) in [
        ("GET", "/api/v1/users".to_owned()),
        ("POST", "/api/v1/users/x/login-token".to_owned()),
        ("DELETE", format!("/api/v1/users/{}", user.text("user_id"))),
        ("GET", "/api/v1/usage".to_owned()),
    ] {
        platform.call(method, &path).header("x-api-key", &tenant.key).refused(401, "INVALID_API_KEY").await;
    }
    alone(&platform, &other, "a@example.com").refused(401, "INVALID_API_KEY").await;
    let (_, no_auth) = key(&platform, &tenant, &[Scope::Devices]).await;
    alone(&platform, &no_auth, "b@example.com").refused(403, "INSUFFICIENT_SCOPE").await;
}

#[tokio::test]
async fn strangers_with_the_public_key_cannot_use_up_what_the_backend_may_send() {
    // what a hash costs is not what this is about
    let cheap = Scheme::Argon2id { memory_kib: 64, passes: 1 };
    let platform = Platform::with(|config| config.passwords = cheap).await;
    let tenant = platform.tenant_with(json!({"name": "Small", "rate_limit_per_minute": 40})).await;
    set(&platform, &tenant, true, &[]).await;
    let refresh = |from: &str| {
        let body = json!({"refresh_token": "cvr_"});
        platform.post(REFRESH, &body).header("x-api-key", &tenant.key).from(from)
    };
    for _ in 0..30 {
        refresh("192.0.2.1").refused(401, "INVALID_TOKEN").await;
    }
    let refused = refresh("192.0.2.1").refused(429, "RATE_LIMITED").await;
    assert!(refused.headers.contains_key("retry-after"));
    for _ in 0..10 {
        refresh("192.0.2.2").refused(401, "INVALID_TOKEN").await;
    }
    let all = refresh("192.0.2.2").refused(429, "RATE_LIMITED").await;
    assert_eq!(all.body["limit"]["name"], "requests_per_minute", "all of them together have the tenant's rate");
    for _ in 0..40 {
        assert!(works(&platform, &tenant).await);
    }

    let busy = platform.tenant().await;
    set(&platform, &busy, true, &[]).await;
    let register = async |number: usize, from: &str| -> Answer {
        let body = json!({"email": format!("a{number}@example.com"), "password": PASSWORD});
        platform.post(REGISTER, &body).header("x-api-key", &busy.key).from(from).send().await
    };
    for number in 0..10 {
        assert_eq!(register(number, "192.0.2.3").await.status, 201);
    }
    register(10, "192.0.2.3").await.is_problem("the eleventh", 429, "RATE_LIMITED");
    assert_eq!(register(10, "192.0.2.4").await.status, 201);
}

#[tokio::test]
async fn a_page_of_an_allowed_origin_reads_its_answers_and_another_is_refused() {
    let platform = Platform::start().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    set(&platform, &tenant, true, &[SHOP, "capacitor://localhost"]).await;
    let user = alone(&platform, &tenant, "a@example.com").header("origin", SHOP).send().await;
    assert_eq!((user.status.as_u16(), user.header("access-control-allow-origin")), (201, SHOP), "{}", user.text);
    assert_eq!(user.header("vary"), "origin");
    assert!(user.header("access-control-expose-headers").contains("x-request-id"));
    assert_eq!(user.header("access-control-allow-credentials"), "");
    let app = alone(&platform, &tenant, "b@example.com").header("origin", "capacitor://localhost").send().await;
    assert_eq!(app.header("access-control-allow-origin"), "capacitor://localhost");

    let bearer = format!("Bearer {}", user.text("access_token"));
    let devices = |origin: &str| {
        let call = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key);
        call.header("authorization", &bearer).header("origin", origin)
    };
    assert_eq!(devices(SHOP).send().await.header("access-control-allow-origin"), SHOP);
    let refused =
        alone(&platform, &tenant, "no address").header("origin", SHOP).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(refused.header("access-control-allow-origin"), SHOP, "a page reads also why it is refused");
    for origin in ["https://shop.example.evil", "https://SHOP.example", "http://shop.example", "null", "", "*"] {
        let answer = devices(origin).refused(403, "ORIGIN_NOT_ALLOWED").await;
        assert_eq!(answer.header("access-control-allow-origin"), "", "{origin}");
        alone(&platform, &tenant, "c@example.com").header("origin", origin).refused(403, "ORIGIN_NOT_ALLOWED").await;
    }
    devices(SHOP).header("origin", SHOP).refused(403, "ORIGIN_NOT_ALLOWED").await;
    let with_secret = platform.post(REGISTER, &json!({})).backend(&tenant).header("origin", SHOP);
    with_secret.refused(403, "SECRET_KEY_IN_BROWSER").await;
    devices(SHOP).header("x-api-secret", &tenant.secret).refused(403, "SECRET_KEY_IN_BROWSER").await;
    set(&platform, &other, true, &[]).await;
    alone(&platform, &other, "a@example.com").header("origin", SHOP).refused(403, "ORIGIN_NOT_ALLOWED").await;
}

#[tokio::test]
async fn a_preflight_of_the_client_api_is_answered_without_a_key_and_of_nothing_else() {
    let platform = Platform::start().await;
    let preflight = |path: &str| {
        let call = platform.call("OPTIONS", path).header("origin", SHOP);
        call.header("access-control-request-method", "POST").header("access-control-request-headers", "x-api-key")
    };
    for path in [REGISTER, "/api/v1/devices", "/api/v1/devices/dev_1/config", "/api/v1/vpn/connect", "/api/v1/usage"] {
        let answer = preflight(path).send().await;
        assert_eq!((answer.status.as_u16(), answer.header("access-control-allow-origin")), (204, SHOP), "{path}");
        let headers = answer.header("access-control-allow-headers");
        assert!(headers.contains("x-api-key") && !headers.contains("x-api-secret"), "{headers}");
        assert!(answer.header("access-control-allow-methods").contains("DELETE"));
        assert_eq!(answer.header("access-control-allow-credentials"), "");
    }
    for path in ["/api/v1/users", "/api/v1/users/x/login-token", "/admin/tenants", "/api/v1/tenant/api-keys", "/health"]
    {
        let answer = preflight(path).send().await;
        assert_ne!(answer.status, 204, "{path}");
        assert_eq!(answer.header("access-control-allow-origin"), "", "{path}");
    }
    let no_preflight = platform.call("OPTIONS", REGISTER).header("origin", SHOP);
    no_preflight.refused(405, "METHOD_NOT_ALLOWED").await;
}
