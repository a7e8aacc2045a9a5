//! Tenants, from creation to deletion.

use serde_json::{Value, json};
use sqlx::Connection;

use crate::people::Person;
use crate::platform::Platform;

#[tokio::test]
async fn a_tenant_is_created_with_the_guides_fields_and_read_back() {
    let platform = Platform::start().await;
    let body = json!({"name": "Acme", "bandwidth_limit_gb": 500, "user_limit": 1000, "max_devices_per_user": 3,
        "whitelabel_config": {"brand": "AcmeVPN"}, "status": "trial"});
    let created = platform.admin("POST", "/admin/tenants").json(&body).send().await;
    assert_eq!(created.status, 201, "{}", created.text);
    for (name, value) in body.as_object().unwrap() {
        assert_eq!(&created.body[name], value, "{name}");
    }
    assert!(created.text("api_key").starts_with("cvk_") && created.text("api_secret").starts_with("cvs_"));
    let path = format!("/admin/tenants/{}", created.text("id"));
    let read = platform.admin("GET", &path).send().await;
    assert_eq!(read.body["whitelabel_config"], json!({"brand": "AcmeVPN"}));
    assert!(read.body.get("api_secret").is_none() && read.body.get("api_key").is_none());
}

#[tokio::test]
async fn a_change_touches_only_what_it_names_and_null_takes_a_limit_away() {
    let platform = Platform::start().await;
    let tenant = platform.tenant_with(json!({"name": "Acme", "user_limit": 5, "bandwidth_limit_gb": 7})).await;
    let path = format!("/admin/tenants/{}", tenant.id);
    let changed = platform.admin("PATCH", &path).json(&json!({"user_limit": null, "name": "Acme 2"})).send().await;
    assert_eq!((&changed.body["user_limit"], &changed.body["bandwidth_limit_gb"]), (&Value::Null, &json!(7)));
    assert_eq!(changed.text("name"), "Acme 2");
    assert_eq!(platform.admin("GET", &path).send().await.body, changed.body);
}

#[tokio::test]
async fn a_policy_has_closed_defaults_and_a_change_touches_only_what_it_names() {
    let platform = Platform::start().await;
    let policy = json!({"rate_down_mbps": 100, "allow_private_destinations": ["10.20.30.40/16", "fd00:7::/48"]});
    let body = json!({"name": "Acme", "policy": policy});
    let created = platform.admin("POST", "/admin/tenants").json(&body).send().await;
    assert_eq!(created.status, 201, "{}", created.text);
    let mut wanted = json!({"rate_up_mbps": null, "rate_down_mbps": 100, "device_rate_up_mbps": null,
        "device_rate_down_mbps": null, "allow_intra_tenant": false, "allow_smtp": false, "over_quota": "block",
        "allow_private_destinations": ["10.20.0.0/16", "fd00:7::/48"], "throttle_kbps": 1000});
    assert_eq!(created.body["policy"], wanted);
    let path = format!("/admin/tenants/{}", created.text("id"));
    let change = json!({"policy": {"rate_down_mbps": null, "over_quota": "throttle", "throttle_kbps": 64}});
    let changed = platform.admin("PATCH", &path).json(&change).send().await;
    wanted["rate_down_mbps"] = Value::Null;
    wanted["over_quota"] = json!("throttle");
    wanted["throttle_kbps"] = json!(64);
    assert_eq!(changed.body["policy"], wanted);
    assert_eq!(platform.admin("GET", &path).send().await.body, changed.body);
    let bad = json!({"policy": {"rate_up_mbps": 0, "device_rate_down_mbps": 100_001, "throttle_kbps": 63,
        "allow_private_destinations": ["10.0.0.0/8", "169.254.169.254/32", "0.0.0.0/0"]}});
    let refused = platform.admin("PATCH", &path).json(&bad).send().await;
    let pointers: Vec<_> =
        refused.body["errors"].as_array().unwrap().iter().map(|fault| fault["pointer"].as_str().unwrap()).collect();
    let wanted = [
        "/policy/rate_up_mbps",
        "/policy/device_rate_down_mbps",
        "/policy/throttle_kbps",
        "/policy/allow_private_destinations/1",
        "/policy/allow_private_destinations/2",
    ];
    assert_eq!(pointers, wanted, "{}", refused.text);
    let unknown = platform.admin("PATCH", &path).json(&json!({"policy": {"allow_everything": true}})).send().await;
    assert!(unknown.status.is_client_error());
}

#[tokio::test]
async fn impossible_settings_are_all_named() {
    let platform = Platform::start().await;
    let body = json!({"name": "", "bandwidth_limit_gb": -1, "user_limit": -1, "max_devices_per_user": 1001,
        "rate_limit_per_minute": 0, "status": "deleted"});
    let answer = platform.admin("POST", "/admin/tenants").json(&body).refused(422, "VALIDATION_FAILED").await;
    let mut faults = answer.faults();
    faults.sort();
    assert_eq!(
        faults,
        [
            "/bandwidth_limit_gb out_of_range",
            "/max_devices_per_user out_of_range",
            "/name invalid_format",
            "/rate_limit_per_minute out_of_range",
            "/status invalid_value",
            "/user_limit out_of_range"
        ]
    );
    for (body, fault) in [
        (json!({"name": "x", "status": "open"}), "/status invalid_value"),
        (json!({"name": "x", "user_limit": 3_000_000_000_u64}), "/user_limit invalid_type"),
        (json!({"name": "x", "user_limit": 1.5}), "/user_limit invalid_type"),
        (json!({"name": "x", "whitelabel_config": []}), "/whitelabel_config invalid_type"),
        (json!({"name": "x\u{0}"}), "/name invalid_format"),
        (json!({"name": "x", "whitelabel_config": {"a": "\u{0}"}}), "/whitelabel_config too_long"),
    ] {
        let answer = platform.admin("POST", "/admin/tenants").json(&body).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults(), [fault], "{body}");
    }
    let nobody = "/admin/tenants/ten_00000000000000000000000001";
    platform.admin("PATCH", nobody).json(&json!({"name": "x"})).refused(404, "NOT_FOUND").await;
    platform.admin("GET", nobody).refused(404, "NOT_FOUND").await;
    platform.admin("DELETE", nobody).refused(404, "NOT_FOUND").await;
}

#[tokio::test]
async fn a_list_pages_through_every_tenant_once() {
    let platform = Platform::start().await;
    let mut made = Vec::new();
    for i in 0..7 {
        made.push(platform.tenant_with(json!({"name": format!("Tenant {i}")})).await.id);
    }
    let (mut seen, mut path) = (Vec::new(), "/admin/tenants?limit=3".to_owned());
    loop {
        let page = platform.admin("GET", &path).send().await;
        seen.extend(page.body["data"].as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().to_owned()));
        if page.body["has_more"] == false {
            assert_eq!(page.body["next_cursor"], Value::Null);
            break;
        }
        path = format!("/admin/tenants?limit=3&cursor={}", page.text("next_cursor"));
    }
    assert_eq!(seen, made);
}

#[tokio::test]
async fn a_suspended_tenant_is_refused_until_it_is_resumed() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let token = platform.register(&tenant, "a@example.com").await.text("access_token");
    let suspended = platform.admin("POST", &format!("/admin/tenants/{}/suspend", tenant.id)).send().await;
    assert_eq!(suspended.text("status"), "suspended");
    platform.register(&tenant, "b@example.com").await.is_problem("backend", 403, "TENANT_SUSPENDED");
    let user = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key);
    user.header("authorization", &format!("Bearer {token}")).refused(403, "TENANT_SUSPENDED").await;
    let stranger = platform.post("/api/v1/auth/login", &json!({})).header("x-api-key", &tenant.key);
    stranger.header("x-api-secret", "cvs_").refused(401, "INVALID_API_KEY").await;
    platform.admin("POST", &format!("/admin/tenants/{}/resume", tenant.id)).send().await;
    assert_eq!(platform.register(&tenant, "b@example.com").await.status, 201);
}

#[tokio::test]
async fn a_deleted_tenant_is_gone_and_its_data_key_with_it() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    platform.register(&tenant, "a@example.com").await;
    let path = format!("/admin/tenants/{}", tenant.id);
    assert_eq!(platform.admin("DELETE", &path).send().await.status, 204);
    platform.register(&tenant, "b@example.com").await.is_problem("key", 401, "INVALID_API_KEY");
    platform.admin("GET", &path).refused(404, "NOT_FOUND").await;
    assert_eq!(platform.admin("DELETE", &path).send().await.status, 204, "idempotent");
    platform.admin("PATCH", &path).json(&json!({"status": "active"})).refused(404, "NOT_FOUND").await;
    assert_eq!(platform.admin("GET", "/admin/tenants").send().await.body["data"], json!([]));
    let mut connection = sqlx::PgConnection::connect_with(&platform.database.superuser()).await.unwrap();
    let (keys, actions): (i64, Vec<String>) = sqlx::query_as(
        "select (select count(*) from cvault.tenants where data_key_sealed is not null),
                (select array_agg(action order by audit_id) from cvault.audit_log)",
    )
    .fetch_one(&mut connection)
    .await
    .unwrap();
    assert_eq!(
        (keys, actions),
        (0, vec!["tenant.create".to_owned(), "tenant.delete".to_owned(), "tenant.erase".to_owned()])
    );
}

#[tokio::test]
async fn a_deleted_tenant_leaves_nothing_of_its_users_and_people() {
    let platform = Platform::start().await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    let (tenant, mut superuser) = (&owner.tenant, platform.superuser().await);
    platform.register(tenant, "a@example.com").await;
    let vouched = platform.call("POST", "/api/v1/users/ext-b/login-token").backend(tenant).send().await;
    assert_eq!(vouched.status, 201, "{}", vouched.text);
    sqlx::query("update cvault.tenants set whitelabel_config = '{\"brand\": \"Brand\"}', allowed_origins = '{https://a.example.com}', client_dns = '{192.0.2.53}'")
        .execute(&mut superuser)
        .await
        .unwrap();
    let path = format!("/admin/tenants/{}", tenant.id);
    assert_eq!(platform.admin("DELETE", &path).send().await.status, 204);
    let traces: Vec<String> = sqlx::query_scalar(
        "select x from (select 'user ' || u::text as x from cvault.users u union all select t::text from cvault.tenants t
                        union all select a::text from cvault.audit_log a union all select p::text from cvault.tenant_admins p
                        union all select s::text from cvault.portal_sessions s union all select l::text from cvault.portal_links l) t
         where x ~ '@example.com|ext-b|[$]2b[$]|Brand|a[.]example|192[.]0[.]2[.]53'
         union all select 'token' from cvault.refresh_tokens union all select 'mail' from cvault.outbox
         union all select 'user' from cvault.users where status <> 'deleted'",
    )
    .fetch_all(&mut superuser)
    .await
    .unwrap();
    assert_eq!(traces, Vec::<String>::new());
}

#[tokio::test]
async fn a_name_that_would_not_be_taken_any_more_keeps_nobody_from_suspending_its_tenant() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    sqlx::query("update cvault.tenants set name = $1")
        .bind("Old\u{200b}name")
        .execute(&mut platform.superuser().await)
        .await
        .unwrap();
    let path = format!("/admin/tenants/{}", tenant.id);
    let suspended = platform.admin("POST", &format!("{path}/suspend")).send().await;
    assert_eq!(
        (suspended.status.as_u16(), suspended.text("status").as_str()),
        (200, "suspended"),
        "{}",
        suspended.text
    );
    let limited = platform.admin("PATCH", &path).json(&json!({"user_limit": 7})).send().await;
    assert_eq!(limited.status, 200, "{}", limited.text);
    let same = platform.admin("PATCH", &path).json(&json!({"name": "Old\u{200b}name"}));
    assert_eq!(same.refused(422, "VALIDATION_FAILED").await.faults(), ["/name invalid_format"]);
}

#[tokio::test]
async fn a_name_is_stored_without_the_space_around_it() {
    let platform = Platform::start().await;
    let padded = format!("{}Acme ", " ".repeat(300));
    let created = platform.admin("POST", "/admin/tenants").json(&json!({"name": padded})).send().await;
    assert_eq!((created.status.as_u16(), created.text("name").as_str()), (201, "Acme"), "{}", created.text);
}
