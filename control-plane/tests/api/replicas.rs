//! What is taken back on one replica is worth nothing on another at once: its next request is refused.

use serde_json::json;

use crate::people::Person;
use crate::platform::{Answer, PASSWORD, Platform, Tenant};
use crate::scene::{self, with_server};

const KEYS: &str = "/api/v1/tenant/api-keys";

struct Two {
    here: Platform,
    there: Platform,
}

impl Two {
    async fn start() -> Self {
        let here = Platform::start().await;
        Self { there: here.replica().await, here }
    }

    fn both(&self) -> [&Platform; 2] {
        [&self.here, &self.there]
    }
}

async fn listed(platform: &Platform, tenant: &Tenant) -> Answer {
    platform.call("GET", "/api/v1/users").backend(tenant).send().await
}

fn served(answer: &Answer) {
    assert!(answer.status.is_success(), "{}", answer.text);
}

#[tokio::test]
async fn a_key_that_is_revoked_and_a_secret_that_is_replaced_end_on_every_replica() {
    let two = Two::start().await;
    let owner = Person::owner(&two.here, "owner@example.com").await;
    let made = owner.sure("POST", KEYS, Some(&json!({"name": "another"}))).await;
    let another = Tenant { id: owner.tenant.id.clone(), key: made.text("api_key"), secret: made.text("api_secret") };
    for platform in two.both() {
        served(&listed(platform, &another).await);
        served(&listed(platform, &owner.tenant).await);
    }

    let id = made.text("id");
    let body = json!({"api_key_id": id, "grace_period_seconds": 0});
    let renewed = owner.sure("POST", &format!("{KEYS}/regenerate"), Some(&body)).await;
    assert_eq!(renewed.status, 200, "{}", renewed.text);
    let renewed = Tenant { secret: renewed.text("api_secret"), id: another.id.clone(), key: another.key.clone() };
    listed(&two.there, &another).await.is_problem("the secret before", 401, "INVALID_API_KEY");
    listed(&two.here, &another).await.is_problem("the secret before", 401, "INVALID_API_KEY");
    for platform in two.both() {
        served(&listed(platform, &renewed).await);
    }

    served(&owner.sure("DELETE", &format!("{KEYS}/{id}"), None).await);
    listed(&two.there, &renewed).await.is_problem("the revoked key", 401, "INVALID_API_KEY");
    listed(&two.here, &renewed).await.is_problem("the revoked key", 401, "INVALID_API_KEY");
    for platform in two.both() {
        served(&listed(platform, &owner.tenant).await);
    }
}

#[tokio::test]
async fn a_portal_session_that_is_ended_ends_on_every_replica() {
    let two = Two::start().await;
    let owner = Person::owner(&two.here, "owner@example.com").await;
    let login = json!({"email": "owner@example.com", "password": PASSWORD});
    let other = two.there.post("/api/v1/tenant/auth/login", &login).send().await;
    assert_eq!(other.status, 200, "{}", other.text);
    let bearer = format!("Bearer {}", other.body["tokens"]["access_token"].as_str().unwrap());
    let me = |platform| Platform::call(platform, "GET", "/api/v1/tenant/me").header("authorization", &bearer);
    for platform in two.both() {
        served(&me(platform).send().await);
    }
    let path = format!("/api/v1/tenant/sessions/{}", other.text("session_id"));
    served(&owner.call("DELETE", &path).send().await);
    for platform in [&two.there, &two.here] {
        assert_eq!(me(platform).send().await.status, 401);
    }
    let refresh = json!({"refresh_token": other.body["tokens"]["refresh_token"]});
    let refreshed = two.there.post("/api/v1/tenant/auth/refresh", &refresh).send().await;
    assert_eq!(refreshed.status, 401, "{}", refreshed.text);
    owner.get("/api/v1/tenant/me").await;
}

#[tokio::test]
async fn a_user_that_is_disabled_does_nothing_on_any_replica() {
    let two = Two::start().await;
    with_server(&two.here).await;
    let tenant = two.here.tenant().await;
    let user = scene::Person::of(&two.here, &tenant, "somebody@example.com").await;
    let bystander = scene::Person::of(&two.here, &tenant, "bystander@example.com").await;
    let device = user.device(&two.there, "d").await["device_id"].as_str().unwrap().to_owned();
    bystander.device(&two.there, "b").await;
    let connect = json!({"device_id": device});
    let login = json!({"email": "somebody@example.com", "password": PASSWORD});
    for platform in two.both() {
        served(&user.call(platform, "POST", "/api/v1/vpn/connect").json(&connect).send().await);
        served(&platform.post("/api/v1/auth/login", &login).backend(&tenant).send().await);
    }
    let found = two.here.call("GET", "/api/v1/users?email=somebody@example.com").backend(&tenant).send().await;
    let path = format!("/api/v1/users/{}", found.body["data"][0]["user_id"].as_str().unwrap());
    let disabled = two.here.call("PATCH", &path).backend(&tenant).json(&json!({"status": "disabled"})).send().await;
    assert_eq!(disabled.body["status"], "disabled", "{}", disabled.text);

    for platform in [&two.there, &two.here] {
        let another = json!({"device_name": "another"});
        let rotate = format!("/api/v1/devices/{device}/rotate-key");
        user.call(platform, "POST", "/api/v1/vpn/connect").json(&connect).refused(404, "NOT_FOUND").await;
        user.call(platform, "POST", "/api/v1/devices").json(&another).refused(401, "INVALID_TOKEN").await;
        user.call(platform, "POST", &rotate).json(&json!({})).refused(404, "NOT_FOUND").await;
        let refresh = platform.post("/api/v1/auth/refresh", &json!({"refresh_token": user.refresh}));
        refresh.backend(&tenant).refused(401, "INVALID_TOKEN").await;
        platform.post("/api/v1/auth/login", &login).backend(&tenant).refused(401, "INVALID_CREDENTIALS").await;
        served(&bystander.call(platform, "GET", "/api/v1/devices").send().await);
    }
}

#[tokio::test]
async fn a_tenant_that_is_suspended_is_refused_on_every_replica() {
    let two = Two::start().await;
    let (tenant, other) = (two.here.tenant().await, two.here.tenant().await);
    for platform in two.both() {
        served(&listed(platform, &tenant).await);
    }
    served(&two.here.admin("POST", &format!("/admin/tenants/{}/suspend", tenant.id)).send().await);
    for platform in [&two.there, &two.here] {
        listed(platform, &tenant).await.is_problem("suspended", 403, "TENANT_SUSPENDED");
        served(&listed(platform, &other).await);
    }
    served(&two.here.admin("POST", &format!("/admin/tenants/{}/resume", tenant.id)).send().await);
    served(&listed(&two.there, &tenant).await);
}
