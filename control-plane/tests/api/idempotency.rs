//! Retried writes happen once.

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
    for key in ["", &"x".repeat(256)] {
        call("b@example.com", key).refused(422, "VALIDATION_FAILED").await;
    }
    call("b@example.com", "k2").header(KEY, "k3").refused(422, "VALIDATION_FAILED").await;
    call("a@example.com", "k4").refused(409, "EMAIL_TAKEN").await;
}
