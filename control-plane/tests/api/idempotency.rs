//! Retried writes happen once.

use cvault_control_plane::keys;
use serde_json::json;

use crate::platform::{PASSWORD, Platform};

const REGISTER: &str = "/api/v1/auth/register";
const KEY: &str = "idempotency-key";

#[tokio::test]
async fn a_retried_registration_gets_the_first_answer_again() {
    let platform = Platform::start().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    let body = json!({"email": "a@example.com", "password": PASSWORD});
    let call = |tenant| platform.post(REGISTER, &body).backend(tenant).header(KEY, "4f1c");
    let first = call(&tenant).send().await;
    assert_eq!((first.status.as_u16(), first.header("idempotency-replayed")), (201, ""));
    let again = call(&tenant).send().await;
    assert_eq!((again.status.as_u16(), again.header("idempotency-replayed")), (201, "true"));
    assert_eq!((&again.text, again.header("content-type")), (&first.text, "application/json"), "byte for byte");
    let foreign = call(&other).send().await;
    assert_eq!(
        (foreign.status.as_u16(), foreign.header("idempotency-replayed")),
        (201, ""),
        "a key is its tenant's own"
    );
    platform.post(REGISTER, &body).backend(&tenant).refused(409, "EMAIL_TAKEN").await;
}

#[tokio::test]
async fn simultaneous_retries_register_one_user() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let body = json!({"email": "a@example.com", "password": PASSWORD});
    let calls = (0..6).map(|_| platform.post(REGISTER, &body).backend(&tenant).header(KEY, "same").send());
    let answers = futures::future::join_all(calls).await;
    assert!(answers.iter().all(|answer| answer.status == 201 && answer.text == answers[0].text), "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| answer.header("idempotency-replayed").is_empty()).count(), 1);
}

#[tokio::test]
async fn a_key_with_another_request_or_a_malformed_key_is_refused() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let call = |email: &str, key: &str| {
        platform.post(REGISTER, &json!({"email": email, "password": PASSWORD})).backend(&tenant).header(KEY, key)
    };
    assert_eq!(call("a@example.com", "k").send().await.status, 201);
    call("b@example.com", "k").refused(422, "IDEMPOTENCY_KEY_REUSED").await;
    for key in ["", "a b", "a\tb", &"x".repeat(256)] {
        call("b@example.com", key).refused(422, "VALIDATION_FAILED").await;
    }
    call("b@example.com", "k2").header(KEY, "k3").refused(422, "VALIDATION_FAILED").await;
    call("a@example.com", "k4").refused(409, "EMAIL_TAKEN").await;
}

#[tokio::test]
async fn a_key_whose_first_request_is_being_served_says_so() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let body = json!({"email": "a@example.com", "password": PASSWORD});
    let id: cvault_types::TenantId = tenant.id.parse().unwrap();
    let key_id: uuid::Uuid =
        sqlx::query_scalar("select api_key_id from cvault.api_keys").fetch_one(&platform.app.db.sys).await.unwrap();
    let principal = cvault_types::ApiKeyId::from_uuid(key_id).to_string();
    let mut first = platform.app.db.tenancy.begin(id).await.unwrap();
    sqlx::query(
        "insert into cvault.idempotency_keys (tenant_id, principal, key, fingerprint) values ($1, $2, 'k', '')",
    )
    .bind(id.uuid())
    .bind(principal)
    .execute(first.conn())
    .await
    .unwrap();
    let call = || platform.post(REGISTER, &body).backend(&tenant).header(KEY, "k");
    let refused = call().refused(409, "IDEMPOTENCY_KEY_IN_USE").await;
    assert_eq!(refused.header("retry-after"), "1");
    first.rollback().await.unwrap();
    assert_eq!(call().send().await.status, 201);
}

#[tokio::test]
async fn a_retried_refresh_gets_the_same_tokens_and_a_refused_one_is_decided_anew() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let token = platform.register(&tenant, "a@example.com").await.text("refresh_token");
    let refresh = |token: &str, key: &str| {
        platform.post("/api/v1/auth/refresh", &json!({"refresh_token": token})).backend(&tenant).header(KEY, key)
    };
    let first = refresh(&token, "k").send().await;
    let again = refresh(&token, "k").send().await;
    assert_eq!((again.status.as_u16(), again.header("idempotency-replayed")), (200, "true"), "{}", again.text);
    assert_eq!(again.text, first.text);
    for _ in 0..2 {
        refresh("cvr_", "another").refused(401, "INVALID_TOKEN").await;
    }
    assert_eq!(refresh(&first.text("refresh_token"), "third").send().await.status, 200, "nothing was revoked");
}

#[tokio::test]
async fn an_answer_is_repeated_also_when_the_key_it_was_sealed_with_is_gone() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let pool = json!({"name": "default", "ipv4": "10.8.0.0/16"});
    let user = json!({"email": "a@example.com", "password": PASSWORD});
    let make_pool =
        async |platform: &Platform| platform.admin("POST", "/admin/pools").json(&pool).header(KEY, "k").send().await;
    let make_user =
        async |platform: &Platform| platform.post(REGISTER, &user).backend(&tenant).header(KEY, "k").send().await;
    let (made_pool, made_user) = (make_pool(&platform).await, make_user(&platform).await);
    assert_eq!((made_pool.status.as_u16(), made_user.status.as_u16()), (201, 201));

    let platform = platform.with_keys(&[(1, 7), (2, 8)]).await;
    let server = json!({"name": "s", "region": "lab-1", "public_ip": "203.0.113.10"});
    let make_server = async |platform: &Platform| {
        platform.admin("POST", "/admin/servers").json(&server).header(KEY, "later").send().await
    };
    let made_server = make_server(&platform).await;
    let answers = async |platform: &Platform| -> Vec<(i16, i64)> {
        let used = keys::in_use(&platform.app.db.sys).await.unwrap();
        used.iter().map(|used| (used.version, used.answers)).collect()
    };
    assert_eq!(answers(&platform).await, [(1, 1), (2, 1)], "the old key is needed");
    assert_eq!(keys::rotate(&platform.app, "cli").await.unwrap().answers, 1);
    assert_eq!(answers(&platform).await, [(2, 2)]);

    let platform = platform.with_keys(&[(2, 8)]).await;
    for (again, first) in [
        (make_pool(&platform).await, made_pool),
        (make_user(&platform).await, made_user),
        (make_server(&platform).await, made_server),
    ] {
        assert_eq!((again.status.as_u16(), again.header("idempotency-replayed")), (201, "true"), "{}", again.text);
        assert_eq!(again.text, first.text);
    }
}

#[tokio::test]
async fn an_answer_that_does_not_open_keeps_no_tenants_key() {
    let platform = Platform::start().await;
    platform.tenant().await;
    let pool = json!({"name": "default", "ipv4": "10.8.0.0/16"});
    let made = platform.admin("POST", "/admin/pools").json(&pool).header(KEY, "k").send().await;
    assert_eq!(made.status, 201, "{}", made.text);
    sqlx::query("update platform.idempotency_keys set response_sealed = response_sealed || 'x'::bytea")
        .execute(&mut platform.superuser().await)
        .await
        .unwrap();
    let platform = platform.with_keys(&[(1, 7), (2, 8)]).await;
    let refused = keys::rotate(&platform.app, "cli").await.unwrap_err();
    assert!(refused.to_string().contains("admin:test"), "{refused}");
    let used = keys::in_use(&platform.app.db.sys).await.unwrap();
    let used: Vec<_> = used.iter().map(|used| (used.version, used.data_keys, used.answers)).collect();
    assert_eq!(used, [(1, 0, 1), (2, 1, 0)]);
}
