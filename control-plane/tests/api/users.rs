//! A tenant's users, seen by its backend: listed, vouched for, disabled, deleted.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::devices;
use crate::platform::{Answer, Call, Platform, Tenant};

fn login_token<'a>(platform: &'a Platform, tenant: &Tenant, external_id: &str) -> Call<'a> {
    platform.call("POST", &format!("/api/v1/users/{external_id}/login-token")).backend(tenant)
}

fn user_call<'a>(platform: &'a Platform, tenant: &Tenant, method: &str, user: &str) -> Call<'a> {
    platform.call(method, &format!("/api/v1/users/{user}")).backend(tenant)
}

fn as_user<'a>(platform: &'a Platform, tenant: &Tenant, session: &Answer, method: &str, path: &str) -> Call<'a> {
    let bearer = format!("Bearer {}", session.text("access_token"));
    platform.call(method, path).header("x-api-key", &tenant.key).header("authorization", &bearer)
}

async fn device(platform: &Platform, tenant: &Tenant, session: &Answer) -> String {
    let answer =
        as_user(platform, tenant, session, "POST", "/api/v1/devices").json(&json!({"device_name": "d"})).send().await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer.text("device_id")
}

/// Peers that servers are to run.
async fn peers(platform: &Platform) -> i64 {
    sqlx::query_scalar("select count(*) from platform.peers where removed_revision is null")
        .fetch_one(&mut platform.superuser().await)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_backend_logs_its_own_user_in_by_its_own_name_for_it() {
    let (platform, _) = devices::platform().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    let new = login_token(&platform, &tenant, "customer%2F4711%20%C3%A4").send().await;
    assert_eq!(new.status, 201, "{}", new.text);
    assert_eq!((new.text("token_type").as_str(), &new.body["expires_in"]), ("Bearer", &json!(900)));
    let again = login_token(&platform, &tenant, "customer%2F4711%20%C3%A4").send().await;
    assert_eq!((again.status.as_u16(), again.text("user_id")), (200, new.text("user_id")));
    device(&platform, &tenant, &again).await;
    let refreshed = platform
        .post("/api/v1/auth/refresh", &json!({"refresh_token": new.text("refresh_token")}))
        .backend(&tenant)
        .send()
        .await;
    assert_eq!(refreshed.status, 200, "{}", refreshed.text);

    let user = user_call(&platform, &tenant, "GET", &new.text("user_id")).send().await;
    assert_eq!(
        (&user.body["external_id"], &user.body["email"], &user.body["status"], &user.body["devices"]),
        (&json!("customer/4711 ä"), &Value::Null, &json!("active"), &json!(1))
    );
    let foreign = login_token(&platform, &other, "customer%2F4711%20%C3%A4").send().await;
    assert_eq!(foreign.status, 201, "another tenant's names are its own");
    assert_ne!(foreign.text("user_id"), new.text("user_id"));
    for method in ["GET", "DELETE"] {
        user_call(&platform, &other, method, &new.text("user_id")).refused(404, "NOT_FOUND").await;
    }
    let body = json!({"status": "disabled"});
    user_call(&platform, &other, "PATCH", &new.text("user_id")).json(&body).refused(404, "NOT_FOUND").await;
    let events: Vec<String> =
        sqlx::query_scalar("select kind || ' ' || outcome from cvault.auth_events order by event_id limit 3")
            .fetch_all(&mut platform.superuser().await)
            .await
            .unwrap();
    assert_eq!(events, ["register success", "login success", "refresh success"]);
}

#[tokio::test]
async fn a_name_that_nobody_could_read_is_refused() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let long = "x".repeat(256);
    for id in ["%00", "a%0Ab", "%1B%5B31m", "%E2%80%AEevil", "%20", "a%20", "%20a", &long] {
        let answer = login_token(&platform, &tenant, id).refused(422, "VALIDATION_FAILED").await;
        assert!(answer.faults()[0].starts_with("{external_id} "), "{id}: {:?}", answer.faults());
    }
    login_token(&platform, &tenant, "%FF").refused(404, "NOT_FOUND").await;
    assert_eq!(login_token(&platform, &tenant, &"x".repeat(255)).send().await.status, 201);
    assert_eq!(login_token(&platform, &tenant, "%27%20or%201=1%20--").send().await.status, 201);
}

#[tokio::test]
async fn a_retried_login_token_gets_the_first_answer() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let first = login_token(&platform, &tenant, "a").header("idempotency-key", "k1").send().await;
    let second = login_token(&platform, &tenant, "a").header("idempotency-key", "k1").send().await;
    assert_eq!((second.status.as_u16(), second.header("idempotency-replayed")), (201, "true"));
    assert_eq!(first.body, second.body);
    let other = login_token(&platform, &tenant, "b").header("idempotency-key", "k1");
    other.refused(422, "IDEMPOTENCY_KEY_REUSED").await;
}

#[tokio::test]
async fn users_are_listed_in_pages_and_found_by_address_and_by_name() {
    let platform = Platform::start().await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    for number in 0..5 {
        login_token(&platform, &tenant, &format!("c{number}")).send().await;
    }
    let registered = platform.register(&tenant, "Ada@Example.com").await.text("user_id");
    platform.register(&other, "ada@example.com").await;
    let list = async |tenant: &Tenant, query: &str| {
        platform.call("GET", &format!("/api/v1/users{query}")).backend(tenant).send().await
    };
    let mut seen = Vec::new();
    let mut query = "?limit=4".to_owned();
    loop {
        let page = list(&tenant, &query).await;
        assert_eq!(page.status, 200, "{}", page.text);
        seen.extend(page.body["data"].as_array().unwrap().iter().map(|user| user["user_id"].clone()));
        if page.body["has_more"] == false {
            assert_eq!(page.body["next_cursor"], Value::Null);
            break;
        }
        assert_eq!(page.body["data"].as_array().unwrap().len(), 4);
        let foreign = list(&other, &format!("?cursor={}", page.text("next_cursor"))).await;
        foreign.is_problem("another tenant's cursor", 422, "VALIDATION_FAILED");
        query = format!("?limit=4&cursor={}", page.text("next_cursor"));
    }
    assert_eq!(seen.len(), 6);
    assert_eq!(seen.iter().collect::<HashSet<_>>().len(), 6);
    let found = list(&tenant, "?email=ada%40EXAMPLE.com").await;
    assert_eq!(found.body["data"].as_array().unwrap().len(), 1);
    assert_eq!(found.body["data"][0]["user_id"], registered);
    assert_eq!(list(&tenant, "?external_id=c3").await.body["data"][0]["external_id"], "c3");
    assert_eq!(list(&tenant, "?external_id=C3").await.body["data"], json!([]));
    let wrong = list(&tenant, "?email=x&external_id=%0A").await;
    wrong.is_problem("filters", 422, "VALIDATION_FAILED");
    assert_eq!(wrong.faults().len(), 2);
    list(&tenant, "?limit=201").await.is_problem("limit", 422, "VALIDATION_FAILED");
    list(&tenant, "?name=x").await.is_problem("unknown", 422, "VALIDATION_FAILED");
}

#[tokio::test]
async fn an_external_id_belongs_to_one_user() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let registered = platform.register(&tenant, "a@example.com").await.text("user_id");
    let vouched = login_token(&platform, &tenant, "one").send().await.text("user_id");
    let change = async |user: &str, body: Value| user_call(&platform, &tenant, "PATCH", user).json(&body).send().await;
    change(&registered, json!({"external_id": "one"})).await.is_problem("taken", 409, "EXTERNAL_ID_TAKEN");
    assert_eq!(change(&registered, json!({"external_id": "two"})).await.text("external_id"), "two");
    let token = login_token(&platform, &tenant, "two").send().await;
    assert_eq!((token.status.as_u16(), token.text("user_id")), (200, registered.clone()), "the registered user");
    let nobody = change(&vouched, json!({"external_id": null})).await;
    nobody.is_problem("a user that nothing names", 422, "VALIDATION_FAILED");
    assert_eq!(change(&registered, json!({"external_id": null})).await.body["external_id"], Value::Null);
    let faulty = change(&registered, json!({"external_id": "a\u{0}b"})).await;
    assert_eq!(faulty.faults(), ["/external_id invalid_format"]);
    let deleted = change(&registered, json!({"status": "deleted"})).await;
    deleted.is_problem("deleting by PATCH", 422, "VALIDATION_FAILED");
}

#[tokio::test]
async fn a_disabled_user_is_off_every_server_until_it_is_enabled() {
    let (platform, _) = devices::platform().await;
    let tenant = platform.tenant().await;
    let session = login_token(&platform, &tenant, "a").send().await;
    let bystander = login_token(&platform, &tenant, "b").send().await;
    let (one, _) = (device(&platform, &tenant, &session).await, device(&platform, &tenant, &session).await);
    device(&platform, &tenant, &bystander).await;
    let set = async |status: &str| {
        let call = user_call(&platform, &tenant, "PATCH", &session.text("user_id"));
        let answer = call.json(&json!({"status": status})).send().await;
        assert_eq!((answer.status.as_u16(), answer.text("status").as_str()), (200, status), "{}", answer.text);
        assert_eq!(answer.body["devices"], 2, "they are kept");
    };
    set("disabled").await;
    assert_eq!(peers(&platform).await, 1, "the other user's goes on");
    login_token(&platform, &tenant, "a").refused(403, "USER_DISABLED").await;
    let body = json!({"refresh_token": session.text("refresh_token")});
    platform.post("/api/v1/auth/refresh", &body).backend(&tenant).refused(401, "INVALID_TOKEN").await;
    let (rotate, connect) = (format!("/api/v1/devices/{one}/rotate-key"), "/api/v1/vpn/connect");
    as_user(&platform, &tenant, &session, "POST", &rotate).json(&json!({})).refused(404, "NOT_FOUND").await;
    let body = json!({"device_id": one});
    as_user(&platform, &tenant, &session, "POST", connect).json(&body).refused(404, "NOT_FOUND").await;
    let body = json!({"device_name": "another"});
    let call = as_user(&platform, &tenant, &session, "POST", "/api/v1/devices").json(&body);
    call.refused(401, "INVALID_TOKEN").await;
    cvault_control_plane::tenants::enforce_suspensions(&platform.app).await.unwrap();
    assert_eq!(peers(&platform).await, 1, "the periodic task puts nothing back");

    set("active").await;
    assert_eq!(peers(&platform).await, 3);
    assert_eq!(login_token(&platform, &tenant, "a").send().await.status, 200);

    // the process that disabled the user ended before it took the devices off
    sqlx::query("update cvault.users set status = 'disabled' where external_user_id = 'a'")
        .execute(&mut platform.superuser().await)
        .await
        .unwrap();
    assert_eq!(cvault_control_plane::tenants::enforce_suspensions(&platform.app).await.unwrap(), 2);
    assert_eq!(peers(&platform).await, 1);
    assert_eq!(cvault_control_plane::tenants::enforce_suspensions(&platform.app).await.unwrap(), 0);
}

#[tokio::test]
async fn a_deleted_user_leaves_nothing_but_what_it_has_used() {
    let (platform, _) = devices::platform().await;
    let tenant = platform.tenant_with(json!({"name": "Small", "user_limit": 2})).await;
    let session = platform.register(&tenant, "a@example.com").await;
    let id = session.text("user_id");
    let body = json!({"external_id": "ext-a"});
    assert_eq!(user_call(&platform, &tenant, "PATCH", &id).json(&body).send().await.status, 200);
    login_token(&platform, &tenant, "b").send().await;
    let one = device(&platform, &tenant, &session).await;
    device(&platform, &tenant, &session).await;
    let connect = json!({"device_id": one});
    as_user(&platform, &tenant, &session, "POST", "/api/v1/vpn/connect").json(&connect).send().await;

    assert_eq!(user_call(&platform, &tenant, "DELETE", &id).send().await.status, 204);
    assert_eq!(peers(&platform).await, 0);
    assert_eq!(user_call(&platform, &tenant, "DELETE", &id).send().await.status, 204, "idempotent");
    user_call(&platform, &tenant, "GET", &id).refused(404, "NOT_FOUND").await;
    user_call(&platform, &tenant, "PATCH", &id).json(&json!({})).refused(404, "NOT_FOUND").await;
    let (tokens, keys, sessions, traces): (i64, i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from cvault.refresh_tokens r join cvault.users u using (tenant_id, user_id) where u.status = 'deleted'),
                (select count(*) from cvault.devices where private_key_sealed is not null or status = 'active'),
                (select count(*) from cvault.sessions where status = 'active'),
                (select count(*) from (select u::text as x from cvault.users u union all select a::text from cvault.audit_log a) t
                 where x like '%a@example.com%' or x like '%ext-a%' or x like '%$2b$%')",
    )
    .fetch_one(&mut platform.superuser().await)
    .await
    .unwrap();
    assert_eq!((tokens, keys, sessions, traces), (0, 0, 0, 0));
    let refresh = json!({"refresh_token": session.text("refresh_token")});
    platform.post("/api/v1/auth/refresh", &refresh).backend(&tenant).refused(401, "INVALID_TOKEN").await;
    let body = json!({"device_name": "another"});
    let call = as_user(&platform, &tenant, &session, "POST", "/api/v1/devices").json(&body);
    call.refused(401, "INVALID_TOKEN").await;
    let actions: Vec<(String, String)> = sqlx::query_as(
        "select actor, action from cvault.audit_log where action like 'user.%' or action = 'device.delete' order by audit_id",
    )
    .fetch_all(&mut platform.superuser().await)
    .await
    .unwrap();
    let actions: Vec<_> = actions.iter().map(|(_, action)| action.as_str()).collect();
    assert_eq!(actions, ["user.update", "user.create", "user.delete", "device.delete", "device.delete"]);

    let reborn = platform.register(&tenant, "a@example.com").await;
    assert_eq!(reborn.status, 201, "its place and its address are free: {}", reborn.text);
    assert_ne!(reborn.text("user_id"), id);
    login_token(&platform, &tenant, "ext-a").refused(403, "USER_LIMIT_EXCEEDED").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_that_is_deleted_many_times_at_once_while_it_registers_devices_has_none() {
    let (platform, _) = devices::platform().await;
    let tenant = platform.tenant().await;
    let session = login_token(&platform, &tenant, "a").send().await;
    let id = session.text("user_id");
    let registrations = (0..20).map(|number| {
        let body = json!({"device_name": format!("d{number}")});
        as_user(&platform, &tenant, &session, "POST", "/api/v1/devices").json(&body).send()
    });
    let deletions = (0..5).map(|_| user_call(&platform, &tenant, "DELETE", &id).send());
    let (registered, deleted) =
        tokio::join!(futures::future::join_all(registrations), futures::future::join_all(deletions));
    assert!(deleted.iter().all(|answer| answer.status == 204), "{deleted:?}");
    for answer in registered.iter().filter(|answer| answer.status != 201) {
        assert!(["INVALID_TOKEN", "DEVICE_LIMIT_EXCEEDED"].contains(&answer.body["code"].as_str().unwrap()));
    }
    assert_eq!(peers(&platform).await, 0);
    let mut superuser = platform.superuser().await;
    let deletions: i64 = sqlx::query_scalar("select count(*) from cvault.audit_log where action = 'user.delete'")
        .fetch_one(&mut superuser)
        .await
        .unwrap();
    assert_eq!(deletions, 1);
}
