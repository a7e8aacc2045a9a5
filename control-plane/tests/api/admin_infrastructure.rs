//! Servers, pools and the audit log, as platform staff manages them over HTTP.

use cvault_types::ServerId;
use serde_json::{Value, json};

use crate::platform::{Answer, Call, Platform};
use crate::scene::Person;

const NOBODY: &str = "srv_00000000000000000000000001";

async fn pool(platform: &Platform, name: &str, ipv4: &str) -> Value {
    let body = json!({"name": name, "ipv4": ipv4, "quarantine_seconds": 0});
    let answer = platform.admin("POST", "/admin/pools").json(&body).send().await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer.body
}

async fn server(platform: &Platform, name: &str, region: &str, public_ip: &str) -> Answer {
    let body = json!({"name": name, "region": region, "public_ip": public_ip});
    platform.admin("POST", "/admin/servers").json(&body).send().await
}

/// As its agent would make it, at its first word.
async fn enrolled(platform: &Platform, id: &str) {
    let key: [u8; 32] = rand::random();
    sqlx::query(
        "update platform.servers set public_key = $2, identity_pin = $2, last_seen_at = now() where server_id = $1",
    )
    .bind(id.parse::<ServerId>().unwrap().uuid())
    .bind(key.as_slice())
    .execute(&platform.app.db.sys)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_server_is_created_shown_and_listed() {
    let platform = Platform::start().await;
    pool(&platform, "default", "10.8.0.0/16").await;
    let made = server(&platform, "fra-1", "eu-central", "203.0.113.7").await;
    assert_eq!(made.status, 201, "{}", made.text);
    let shown = &made.body["server"];
    let id = shown["id"].as_str().unwrap();
    for (name, value) in [
        ("name", json!("fra-1")),
        ("region", json!("eu-central")),
        ("public_ip", json!("203.0.113.7")),
        ("port", json!(51820)),
        ("pool", json!("default")),
        ("status", json!("active")),
        ("enrolled", json!(false)),
        ("available", json!(false)),
        ("capacity", json!(65_000)),
        ("peers", json!(0)),
    ] {
        assert_eq!(shown[name], value, "{name}");
    }
    let enrolment = &made.body["enrolment"];
    let command = "cvault-node-agent enroll --control-plane ";
    assert!(enrolment["token"].as_str().unwrap().len() > 60 && enrolment["server_id"] == id);
    assert!(enrolment["command"].as_str().unwrap().starts_with(command), "{enrolment}");
    let read = platform.admin("GET", &format!("/admin/servers/{id}")).send().await;
    assert_eq!(&read.body, shown, "the token is shown once");
    enrolled(&platform, id).await;
    server(&platform, "nyc-1", "us-east", "203.0.113.8").await;
    let regions = |query: &str| {
        let list = platform.admin("GET", &format!("/admin/servers{query}"));
        async move {
            let list = list.send().await;
            let rows = list.body["data"].as_array().unwrap().clone();
            rows.iter().map(|row| row["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        }
    };
    assert_eq!(regions("").await, ["fra-1", "nyc-1"]);
    assert_eq!(regions("?region=us-east").await, ["nyc-1"]);
    assert!(regions("?status=draining").await.is_empty());
    let first = platform.admin("GET", "/admin/servers?limit=1").send().await;
    assert_eq!((&first.body["has_more"], &first.body["data"][0]["available"]), (&json!(true), &json!(true)));
    assert_eq!(regions(&format!("?limit=1&cursor={}", first.text("next_cursor"))).await, ["nyc-1"]);
}

#[tokio::test]
async fn what_a_server_cannot_be_is_said() {
    let platform = Platform::start().await;
    let missing = server(&platform, "a", "eu", "203.0.113.7").await;
    missing.is_problem("no pool", 422, "VALIDATION_FAILED");
    pool(&platform, "default", "10.8.0.0/16").await;
    assert_eq!(server(&platform, "a", "eu", "203.0.113.7").await.status, 201);
    let taken = server(&platform, "a", "eu", "203.0.113.8").await;
    taken.is_problem("name", 409, "CONFLICT");
    assert_eq!(taken.faults(), ["/name taken"]);
    let taken = server(&platform, "b", "eu", "203.0.113.7").await;
    assert_eq!(taken.faults(), ["/public_ip taken"]);
    let with = |name: &str, value: Value| {
        let mut body = json!({"name": "c", "region": "eu", "public_ip": "203.0.113.9"});
        body[name] = value;
        body
    };
    for (name, value, fault) in [
        ("name", json!(""), "/name invalid_value"),
        ("name", json!("x".repeat(65)), "/name invalid_value"),
        ("name", json!("a\nb"), "/name invalid_value"),
        ("name", json!("a\u{0}"), "/name invalid_value"),
        ("region", json!("EU"), "/region invalid_value"),
        ("region", json!(""), "/region invalid_value"),
        ("public_ip", json!("0.0.0.0"), "/public_ip invalid_value"),
        ("public_ip", json!("host.example"), "/public_ip invalid_format"),
        ("port", json!(0), "/port invalid_value"),
        ("port", json!(65536), "/port invalid_type"),
        ("capacity", json!(0), "/capacity invalid_value"),
        ("capacity", json!(65534), "/capacity invalid_value"),
        ("pool_id", json!("pol_00000000000000000000000001"), "/pool_id not_found"),
        ("surprise", json!(1), "/surprise unknown"),
    ] {
        let body = with(name, value);
        let answer = platform.admin("POST", "/admin/servers").json(&body).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults(), [fault], "{body}");
    }
    for path in ["drain", "maintenance", "activate", "enrol-token"] {
        platform.admin("POST", &format!("/admin/servers/{NOBODY}/{path}")).refused(404, "NOT_FOUND").await;
    }
    platform.admin("DELETE", &format!("/admin/servers/{NOBODY}")).refused(404, "NOT_FOUND").await;
    let log = platform.admin("GET", "/admin/audit?action=server").send().await;
    assert_eq!(log.body["data"].as_array().unwrap().len(), 1, "what was refused left nothing: {}", log.text);
}

#[tokio::test]
async fn a_draining_server_gets_no_devices_until_it_is_active_again() {
    let platform = Platform::start().await;
    pool(&platform, "default", "10.8.0.0/16").await;
    let made = server(&platform, "a", "eu", "203.0.113.7").await;
    let id = made.body["server"]["id"].as_str().unwrap().to_owned();
    enrolled(&platform, &id).await;
    let tenant = platform.tenant().await;
    let token = platform.register(&tenant, "a@example.com").await.text("access_token");
    let register = || {
        let call = platform.post("/api/v1/devices", &json!({"device_name": "d"})).header("x-api-key", &tenant.key);
        call.header("authorization", &format!("Bearer {token}")).send()
    };
    for (verb, status) in [("drain", "draining"), ("maintenance", "maintenance")] {
        let answer = platform.admin("POST", &format!("/admin/servers/{id}/{verb}")).send().await;
        assert_eq!((answer.text("status").as_str(), &answer.body["available"]), (status, &json!(false)));
        register().await.is_problem(verb, 503, "SERVER_UNAVAILABLE");
    }
    let answer = platform.admin("POST", &format!("/admin/servers/{id}/activate")).send().await;
    assert_eq!((answer.text("status").as_str(), &answer.body["available"]), ("active", &json!(true)));
    let device = register().await;
    assert_eq!(device.status, 201, "{}", device.text);
    let path = format!("/admin/servers/{id}");
    let refused = platform.admin("DELETE", &path).refused(409, "CONFLICT").await;
    assert!(refused.text("detail").starts_with("1 devices"), "{}", refused.text);
    let call = platform.call("DELETE", &format!("/api/v1/devices/{}", device.text("device_id")));
    call.header("x-api-key", &tenant.key).header("authorization", &format!("Bearer {token}")).send().await;
    platform.admin("DELETE", &path).refused(409, "CONFLICT").await;
    assert_eq!(platform.admin("DELETE", &format!("{path}?force=true")).send().await.status, 204);
    platform.admin("GET", &path).refused(404, "NOT_FOUND").await;
    platform.admin("POST", &format!("{path}/activate")).refused(404, "NOT_FOUND").await;
}

#[tokio::test]
async fn another_token_can_be_had_for_a_server_that_exists() {
    let platform = Platform::start().await;
    pool(&platform, "default", "10.8.0.0/16").await;
    let made = server(&platform, "a", "eu", "203.0.113.7").await;
    let path = format!("/admin/servers/{}/enrol-token", made.body["server"]["id"].as_str().unwrap());
    let token = platform.admin("POST", &path).header("idempotency-key", "k").send().await;
    assert_eq!((token.status.as_u16(), &token.body["expires_in_seconds"]), (201, &json!(3600)));
    assert_ne!(token.body["token"], made.body["enrolment"]["token"]);
    let again = platform.admin("POST", &path).header("idempotency-key", "k").send().await;
    assert_eq!((&again.text, again.header("idempotency-replayed")), (&token.text, "true"));
    let stored: Vec<u8> = sqlx::query_scalar("select response_sealed from platform.idempotency_keys")
        .fetch_one(&platform.app.db.sys)
        .await
        .unwrap();
    let secret = token.text("token");
    assert!(!stored.windows(secret.len()).any(|part| part == secret.as_bytes()), "the token is sealed");
}

#[tokio::test]
async fn pools_of_any_size_are_created_counted_and_deleted_when_nobody_uses_them() {
    let platform = Platform::start().await;
    let big = pool(&platform, "default", "10.64.0.0/10").await;
    assert_eq!((&big["size"], &big["used"], &big["free"]), (&json!(4_194_301), &json!(0), &json!(4_194_301)));
    assert!(big["ipv6"].as_str().unwrap().starts_with("fd") && big["ipv6"].as_str().unwrap().ends_with("::/64"));
    let small = pool(&platform, "small", "10.9.0.0/29").await;
    assert_eq!(small["size"], 5);
    let made = server(&platform, "a", "eu", "203.0.113.7").await;
    let server_id = made.body["server"]["id"].as_str().unwrap().to_owned();
    enrolled(&platform, &server_id).await;
    let tenant = platform.tenant().await;
    let user = platform.register(&tenant, "a@example.com").await;
    let bearer = format!("Bearer {}", user.text("access_token"));
    let as_user = |method: &str, path: &str| {
        platform.call(method, path).header("x-api-key", &tenant.key).header("authorization", &bearer)
    };
    let device = as_user("POST", "/api/v1/devices").json(&json!({"device_name": "d"})).send().await;
    assert_eq!(device.text("assigned_ip"), "10.64.0.2");
    let path = format!("/admin/pools/{}", big["id"].as_str().unwrap());
    let counts = async || {
        let pool = platform.admin("GET", &path).send().await.body;
        (pool["used"].as_u64().unwrap(), pool["quarantined"].as_u64().unwrap(), pool["servers"].as_u64().unwrap())
    };
    assert_eq!(counts().await, (1, 0, 1));
    let refused = platform.admin("DELETE", &path).refused(409, "CONFLICT").await;
    assert!(refused.text("detail").contains("1 servers"), "{}", refused.text);
    as_user("DELETE", &format!("/api/v1/devices/{}", device.text("device_id"))).send().await;
    assert_eq!(counts().await, (0, 1, 1));
    platform.admin("DELETE", &format!("/admin/servers/{server_id}?force=true")).send().await;
    let refused = platform.admin("DELETE", &path).refused(409, "CONFLICT").await;
    assert!(refused.text("detail").contains("1 addresses"), "{}", refused.text);
    cvault_control_plane::ipam::free_quarantined(&platform.app.db.sys).await.unwrap();
    assert_eq!(platform.admin("DELETE", &path).send().await.status, 204);
    platform.admin("GET", &path).refused(404, "NOT_FOUND").await;
    platform.admin("DELETE", &path).refused(404, "NOT_FOUND").await;
    let again = pool(&platform, "default", "10.64.0.0/10").await;
    assert_ne!(again["id"], big["id"], "name and prefix are free again");
    let list = platform.admin("GET", "/admin/pools").send().await;
    assert_eq!(list.body["data"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn addresses_of_a_10_are_given_beyond_its_first_16_and_to_its_last() {
    let platform = Platform::start().await;
    let body = json!({"name": "default", "ipv4": "10.64.0.0/10", "ipv6": "fd00:cafe::/64"});
    let made = platform.admin("POST", "/admin/pools").json(&body).send().await;
    assert_eq!(made.status, 201, "{}", made.text);
    let made = server(&platform, "a", "eu", "203.0.113.7").await;
    enrolled(&platform, made.body["server"]["id"].as_str().unwrap()).await;
    let tenant = platform.tenant_with(json!({"name": "Acme", "max_devices_per_user": 20})).await;
    let person = Person::of(&platform, &tenant, "a@example.com").await;
    let from = async |next_host: i64| {
        let mut superuser = platform.superuser().await;
        sqlx::query("delete from platform.addresses where state = 'free'").execute(&mut superuser).await.unwrap();
        let sql = "update platform.address_pools set next_host = $1";
        sqlx::query(sql).bind(next_host).execute(&mut superuser).await.unwrap();
    };
    let given = async |ipv4: &str, ipv6: &str| {
        let device = person.device(&platform, ipv4).await;
        assert_eq!((&device["assigned_ip"], &device["assigned_ipv6"]), (&json!(ipv4), &json!(ipv6)));
        let address = format!("\nAddress = {ipv4}/32, {ipv6}/128\n");
        assert!(device["config"].as_str().unwrap().contains(&address), "{device}");
    };
    from(65_534).await;
    given("10.64.255.254", "fd00:cafe::fffe").await;
    given("10.64.255.255", "fd00:cafe::ffff").await;
    given("10.65.0.0", "fd00:cafe::1:0").await;
    given("10.65.0.1", "fd00:cafe::1:1").await;
    from((1 << 22) - 3).await;
    given("10.127.255.253", "fd00:cafe::3f:fffd").await;
    given("10.127.255.254", "fd00:cafe::3f:fffe").await;
    for _ in 0..2 {
        let call = person.call(&platform, "POST", "/api/v1/devices").json(&json!({"device_name": "one too many"}));
        let refused = call.refused(503, "POOL_EXHAUSTED").await;
        assert!(refused.headers.contains_key("retry-after"));
    }
}

#[tokio::test]
async fn what_a_pool_cannot_be_is_said() {
    let platform = Platform::start().await;
    pool(&platform, "default", "10.8.0.0/16").await;
    for (body, status, fault) in [
        (json!({"name": "default", "ipv4": "10.9.0.0/16"}), 409, "/name taken"),
        (json!({"name": "b", "ipv4": "10.8.128.0/17"}), 409, "/ipv4 taken"),
        (json!({"name": "", "ipv4": "10.9.0.0/16"}), 422, "/name invalid_value"),
        (json!({"name": "b\u{7}", "ipv4": "10.9.0.0/16"}), 422, "/name invalid_value"),
        (json!({"name": "b", "ipv4": "10.9.0.1/16"}), 422, "/ipv4 invalid_value"),
        (json!({"name": "b", "ipv4": "10.9.0.0/30"}), 422, "/ipv4 invalid_value"),
        (json!({"name": "b", "ipv4": "0.0.0.0/0"}), 422, "/ipv4 invalid_value"),
        (json!({"name": "b", "ipv4": "10.9.0.0/33"}), 422, "/ipv4 invalid_format"),
        (json!({"name": "b", "ipv4": "fd00::/64"}), 422, "/ipv4 invalid_format"),
        (json!({"name": "b", "ipv4": "10.9.0.0/16", "ipv6": "fd00::/32"}), 422, "/ipv6 invalid_value"),
        (json!({"name": "b", "ipv4": "10.9.0.0/16", "ipv6": "10.9.0.0/16"}), 422, "/ipv6 invalid_format"),
        (
            json!({"name": "b", "ipv4": "10.9.0.0/16", "quarantine_seconds": 604_801}),
            422,
            "/quarantine_seconds invalid_value",
        ),
    ] {
        let code = if status == 409 { "CONFLICT" } else { "VALIDATION_FAILED" };
        let answer = platform.admin("POST", "/admin/pools").json(&body).refused(status, code).await;
        assert_eq!(answer.faults(), [fault], "{body}");
    }
    let made = pool(&platform, "other", "10.9.0.0/16").await;
    let path = format!("/admin/pools/{}", made["id"].as_str().unwrap());
    let change = |body: Value| platform.admin("PATCH", &path).json(&body);
    assert_eq!(change(json!({"quarantine_seconds": 7})).send().await.body["quarantine_seconds"], 7);
    assert_eq!(change(json!({"name": " renamed "})).send().await.text("name"), "renamed");
    change(json!({"name": "default"})).refused(409, "CONFLICT").await;
    change(json!({"ipv4": "10.10.0.0/16"})).refused(422, "VALIDATION_FAILED").await;
    let nobody = "/admin/pools/pol_00000000000000000000000001";
    platform.admin("PATCH", nobody).json(&json!({})).refused(404, "NOT_FOUND").await;
}

#[tokio::test]
async fn the_audit_log_is_read_newest_first_by_tenant_action_actor_and_time() {
    let platform = Platform::start().await;
    pool(&platform, "default", "10.8.0.0/16").await;
    let (first, second) = (platform.tenant().await, platform.tenant().await);
    platform.admin("POST", &format!("/admin/tenants/{}/suspend", first.id)).send().await;
    let log = async |query: &str| {
        let answer = platform.admin("GET", &format!("/admin/audit{query}")).send().await;
        assert_eq!(answer.status, 200, "{query}: {}", answer.text);
        let rows = answer.body["data"].as_array().unwrap().clone();
        rows.iter().map(|row| row["action"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(log("").await, ["tenant.update", "tenant.create", "tenant.create", "pool.create"]);
    assert_eq!(log(&format!("?tenant_id={}", second.id)).await, ["tenant.create"]);
    assert_eq!(log("?action=tenant").await.len(), 3);
    assert_eq!(log("?action=tenant.update").await, ["tenant.update"]);
    assert_eq!(log("?actor=admin:test").await.len(), 4);
    assert!(log("?actor=cli").await.is_empty());
    assert!(log("?to=2026-01-01T00:00:00Z").await.is_empty());
    assert_eq!(log("?from=2026-01-01T00:00:00Z").await.len(), 4);
    let (mut seen, mut query) = (Vec::new(), "?limit=3".to_owned());
    loop {
        let page = platform.admin("GET", &format!("/admin/audit{query}")).send().await;
        seen.extend(page.body["data"].as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().to_owned()));
        let Some(next) = page.body["next_cursor"].as_str() else { break };
        query = format!("?limit=3&cursor={next}");
    }
    let mut sorted = seen.clone();
    sorted.sort_by(|a, b| b.cmp(a));
    assert_eq!((seen.len(), &seen), (4, &sorted));
    let row = &platform.admin("GET", "/admin/audit?action=pool").send().await.body["data"][0];
    assert_eq!((&row["tenant_id"], row["actor"].as_str()), (&Value::Null, Some("admin:test")));
    assert!(row["target"].as_str().unwrap().starts_with("pol_") && row["request_id"].is_string());
    for (query, pointer) in [
        ("?from=yesterday", "?from invalid_format"),
        ("?limit=0", "?limit out_of_range"),
        ("?cursor=x", "?cursor invalid_value"),
        ("?actor=%00", "?actor invalid_format"),
        ("?tenant=x", "?tenant unknown"),
    ] {
        let path = format!("/admin/audit{query}");
        let answer = platform.admin("GET", &path).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults(), [pointer]);
    }
}

#[tokio::test]
async fn the_platforms_own_entries_are_chained_too() {
    let platform = Platform::start().await;
    pool(&platform, "default", "10.8.0.0/16").await;
    let sys = &platform.app.db.sys;
    let chained = tokio::time::timeout(std::time::Duration::from_secs(20), async {
        while cvault_control_plane::audit::chain_new(sys).await.unwrap() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    });
    chained.await.unwrap();
    assert_eq!(cvault_control_plane::audit::verify_chain(sys, uuid::Uuid::nil()).await.unwrap(), None);
    let log = platform.admin("GET", "/admin/audit").send().await;
    assert_eq!(log.body["data"][0]["chain_sequence"], 1);
}

#[tokio::test]
async fn a_backlog_of_entries_is_chained_in_one_run_and_in_its_order() {
    const ENTRIES: i64 = 2_500;
    let platform = Platform::start().await;
    let (sys, mut superuser) = (&platform.app.db.sys, platform.superuser().await);
    let tenants: Vec<uuid::Uuid> = (1..=2_u128).map(uuid::Uuid::from_u128).collect();
    sqlx::query(
        "insert into cvault.audit_log (tenant_id, audit_id, at, actor, action, target)
         select t, gen_random_uuid(), now() - interval '1 hour' + n * interval '1 s', 'test', 'test.backlog', n::text
         from unnest($1::uuid[]) t, generate_series(1, $2) n",
    )
    .bind(&tenants)
    .bind(ENTRIES)
    .execute(&mut superuser)
    .await
    .unwrap();
    assert!(cvault_control_plane::audit::chain_new(sys).await.unwrap() >= u64::try_from(2 * ENTRIES).unwrap());
    for tenant in tenants {
        assert_eq!(cvault_control_plane::audit::verify_chain(sys, tenant).await.unwrap(), None);
        let in_order: i64 = sqlx::query_scalar(
            "select count(*) from cvault.audit_log where tenant_id = $1 and chain_sequence::text = target",
        )
        .bind(tenant)
        .fetch_one(&mut superuser)
        .await
        .unwrap();
        assert_eq!(in_order, ENTRIES);
    }
}

#[tokio::test]
async fn more_tenants_than_take_turns_at_once_are_chained_in_one_run() {
    const TENANTS: i64 = 1_100;
    let platform = Platform::start().await;
    let mut superuser = platform.superuser().await;
    sqlx::query(
        "insert into cvault.audit_log (tenant_id, audit_id, at, actor, action, target)
         select gen_random_uuid(), gen_random_uuid(), now() - interval '1 hour', 'test', 'test.backlog', 'nothing'
         from generate_series(1, $1)",
    )
    .bind(TENANTS)
    .execute(&mut superuser)
    .await
    .unwrap();
    let chained = cvault_control_plane::audit::chain_new(&platform.app.db.sys).await.unwrap();
    assert!(chained >= u64::try_from(TENANTS).unwrap(), "{chained}");
}

#[tokio::test]
async fn a_retried_write_of_staff_happens_once() {
    let platform = Platform::start().await;
    fn key<'a>(call: Call<'a>, key: &str) -> Call<'a> {
        call.header("idempotency-key", key)
    }
    let body = json!({"name": "default", "ipv4": "10.8.0.0/16"});
    let make = |body: &Value| key(platform.admin("POST", "/admin/pools").json(body), "k1").send();
    let first = make(&body).await;
    let again = make(&body).await;
    assert_eq!((again.status.as_u16(), again.header("idempotency-replayed")), (201, "true"), "{}", again.text);
    assert_eq!(again.text, first.text);
    let other = make(&json!({"name": "other", "ipv4": "10.9.0.0/16"})).await;
    other.is_problem("another body", 422, "IDEMPOTENCY_KEY_REUSED");

    let tenant = || key(platform.admin("POST", "/admin/tenants").json(&json!({"name": "Acme"})), "k2").send();
    let made = futures::future::join_all((0..4).map(|_| tenant())).await;
    assert!(made.iter().all(|answer| answer.text == made[0].text && answer.status == 201), "{made:?}");
    let list = platform.admin("GET", "/admin/tenants").send().await;
    assert_eq!(list.body["data"].as_array().unwrap().len(), 1);

    let path = format!("/admin/tenants/{}", made[0].text("id"));
    let rename = |name: &str, id: &str| key(platform.admin("PATCH", &path).json(&json!({"name": name})), id).send();
    assert_eq!(rename("B", "k3").await.text("name"), "B");
    assert_eq!(rename("C", "k4").await.text("name"), "C");
    let replay = rename("B", "k3").await;
    assert_eq!((replay.text("name").as_str(), replay.header("idempotency-replayed")), ("B", "true"));
    assert_eq!(platform.admin("GET", &path).send().await.text("name"), "C", "nothing was done again");
    rename("B", "k2").await.is_problem("another tenant's key", 422, "IDEMPOTENCY_KEY_REUSED");
    let nobody = "/admin/tenants/ten_00000000000000000000000001";
    key(platform.admin("PATCH", nobody).json(&json!({"name": "B"})), "k5").refused(404, "NOT_FOUND").await;

    let delete = || key(platform.admin("DELETE", &path), "k6").send();
    assert_eq!(delete().await.status, 204);
    let again = delete().await;
    assert_eq!((again.status.as_u16(), again.header("idempotency-replayed")), (204, "true"), "{}", again.text);
    tenant().await.is_problem("an answer that was destroyed", 404, "NOT_FOUND");
    let suspends = platform.admin("GET", "/admin/audit?action=tenant.delete").send().await;
    assert_eq!(suspends.body["data"].as_array().unwrap().len(), 1);
}
