//! What a tenant's developers see of the requests made with its keys.

use serde_json::{Value, json};

use crate::people::Person;
use crate::platform::{PASSWORD, Platform};
use crate::scene;

const LOGS: &str = "/api/v1/tenant/request-logs";

async fn written(platform: &Platform) {
    platform.app.request_log.flush(&platform.app.db.sys).await.unwrap();
}

async fn listed(owner: &Person<'_>, query: &str) -> Vec<Value> {
    owner.get(&format!("{LOGS}{query}")).await.body["data"].as_array().unwrap().clone()
}

fn lines(entries: &[Value]) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    entries
        .iter()
        .map(|entry| {
            format!("{} {} {} {}", text(&entry["method"]), text(&entry["route"]), entry["status"], text(&entry["code"]))
        })
        .collect()
}

#[tokio::test]
async fn a_developer_finds_the_requests_of_keys_and_users_and_nothing_secret() {
    let platform = Platform::start().await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    let user = scene::Person::of(&platform, &owner.tenant, "somebody@example.com").await;
    let found =
        platform.call("GET", "/api/v1/users?email=somebody@example.com").backend(&owner.tenant).from("198.51.100.7");
    let found = found.send().await;
    let user_id = found.body["data"][0]["user_id"].as_str().unwrap().to_owned();
    let missing = format!("/api/v1/devices/{}", "dev_00000000000000000000000001");
    let missing = user.call(&platform, "GET", &missing).refused(404, "NOT_FOUND").await;
    // nobody's, or people's
    let wrong = platform.call("GET", "/api/v1/users").header("x-api-key", &owner.tenant.key);
    wrong.header("x-api-secret", "cvs_0000000000000000000000000000000000000000").refused(401, "INVALID_API_KEY").await;
    platform.call("GET", "/api/v1/nothing").backend(&owner.tenant).refused(404, "NOT_FOUND").await;
    owner.get("/api/v1/tenant/me").await;
    assert_eq!(listed(&owner, "").await, Vec::<Value>::new(), "not yet");
    written(&platform).await;

    let entries = listed(&owner, "").await;
    let expected = [
        "GET /api/v1/devices/{device_id} 404 NOT_FOUND",
        "GET /api/v1/users 200 -",
        "POST /api/v1/auth/register 201 -",
    ];
    assert_eq!(lines(&entries), expected);
    assert_eq!((&entries[0]["request_id"], &entries[0]["user_id"]), (&missing.body["request_id"], &json!(user_id)));
    assert_eq!((&entries[1]["user_id"], &entries[1]["client_ip"]), (&Value::Null, &json!("198.51.100.7")));
    assert!(entries.iter().all(|entry| entry["duration_ms"].as_f64().unwrap() > 0.0));
    let key = owner.get("/api/v1/tenant/api-keys").await.body["data"][0]["id"].clone();
    assert!(entries.iter().all(|entry| entry["api_key_id"] == key));
    let text = json!(entries).to_string();
    for secret in [PASSWORD, "somebody", &owner.tenant.secret, &user.token, "dev_0000"] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }

    let (key, id) = (key.as_str().unwrap(), missing.text("request_id"));
    let (first, last) = (entries[2]["at"].as_str().unwrap(), entries[0]["at"].as_str().unwrap());
    for (query, count) in [
        ("?status=404", 1),
        ("?status=2xx", 2),
        ("?status=5xx", 0),
        ("?code=NOT_FOUND", 1),
        ("?method=POST", 1),
        ("?route=/api/v1/users", 1),
        ("?route=/api/v1/devices/%7Bdevice_id%7D&method=GET&status=4xx", 1),
        (&format!("?api_key_id={key}"), 3),
        ("?api_key_id=key_00000000000000000000000001", 0),
        (&format!("?user_id={user_id}"), 1),
        (&format!("?request_id={id}"), 1),
        (&format!("?request_id={id}&status=2xx"), 0),
        (&format!("?from={first}"), 3),
        (&format!("?to={first}"), 0),
        (&format!("?from={first}&to={last}&status=404"), 0),
    ] {
        assert_eq!(listed(&owner, query).await.len(), count, "{query}");
    }
}

#[tokio::test]
async fn pages_follow_each_other_and_what_is_no_filter_is_refused() {
    let platform = Platform::start().await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    for _ in 0..5 {
        assert_eq!(platform.call("GET", "/api/v1/users").backend(&owner.tenant).send().await.status, 200);
    }
    written(&platform).await;
    let (mut seen, mut query) = (Vec::new(), "?limit=2".to_owned());
    loop {
        let page = owner.get(&format!("{LOGS}{query}")).await;
        seen.extend(page.body["data"].as_array().unwrap().iter().map(|entry| entry["request_id"].to_string()));
        let Some(next) = page.body["next_cursor"].as_str() else { break };
        assert_eq!(page.body["has_more"], true);
        query = format!("?limit=2&cursor={next}");
    }
    assert!(seen.len() == 5 && seen.is_sorted_by(|a, b| a > b), "{seen:?}");
    for (query, fault) in [
        ("?status=6xx", "?status invalid_format"),
        ("?status=40", "?status invalid_format"),
        ("?route=%00", "?route invalid_format"),
        ("?limit=0", "?limit out_of_range"),
        ("?cursor=AAAA", "?cursor invalid_value"),
        ("?method=BREW", "?method invalid_value"),
        ("?code=NO_SUCH", "?code invalid_value"),
        ("?from=yesterday", "?from invalid_format"),
        ("?api_key_id=usr_00000000000000000000000001", "?api_key_id invalid_format"),
        ("?body=x", "?body unknown"),
    ] {
        let refused = owner.call("GET", &format!("{LOGS}{query}")).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(refused.faults(), [fault], "{query}: {}", refused.text);
    }
}

#[tokio::test]
async fn a_tenant_sees_its_own_requests_those_refused_by_its_limits_included_until_it_is_deleted() {
    let platform = Platform::with(|config| config.rate_limit_per_minute = 2).await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    let other = Person::owner(&platform, "other@example.com").await;
    for status in [200, 200, 429, 429] {
        let answer = platform.call("GET", "/api/v1/users").backend(&owner.tenant).send().await;
        assert_eq!(answer.status, status, "{}", answer.text);
    }
    let narrow =
        platform.call("GET", "/api/v1/users").backend(&other.tenant).header("origin", "https://elsewhere.example");
    narrow.refused(403, "SECRET_KEY_IN_BROWSER").await;
    written(&platform).await;
    assert_eq!(listed(&owner, "?code=RATE_LIMITED").await.len(), 2);
    assert_eq!(listed(&owner, "").await.len(), 4);
    assert_eq!(listed(&other, "").await, Vec::<Value>::new(), "a secret that was not looked at proves nothing");
    for (role, status) in [("viewer", 403), ("billing", 403), ("developer", 200), ("admin", 200)] {
        owner.has_role(role).await;
        assert_eq!(owner.call("GET", LOGS).send().await.status, status, "{role}");
    }

    assert_eq!(platform.call("GET", "/api/v1/users").backend(&other.tenant).send().await.status, 200);
    for tenant in [&owner.tenant, &other.tenant] {
        let deleted = platform.admin("DELETE", &format!("/admin/tenants/{}", tenant.id)).send().await;
        assert_eq!(deleted.status, 204, "{}", deleted.text);
    }
    // what was noted before and not yet written is not written any more
    written(&platform).await;
    let left: i64 = sqlx::query_scalar("select count(*) from cvault.request_logs")
        .fetch_one(&mut platform.superuser().await)
        .await
        .unwrap();
    assert_eq!(left, 0);
}
