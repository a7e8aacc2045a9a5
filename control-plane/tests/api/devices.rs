//! Devices, connections, servers and usage, by the guide's calls.

use cvault_control_plane::ipam::{self, NewPool};
use cvault_control_plane::servers::{self, NewServer};
use cvault_types::ServerId;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime, Time};

use crate::platform::{Call, Platform, Tenant};

const CLIENTS_KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

/// A platform with one live server in region `lab-1`.
pub(crate) async fn platform() -> (Platform, ServerId) {
    let platform = Platform::start().await;
    let sys = &platform.app.db.sys;
    let pool = NewPool {
        name: "default".to_owned(),
        ipv4: "10.8.0.0/16".parse().unwrap(),
        ipv6: "fd00:cafe::/64".parse().unwrap(),
        quarantine_seconds: 60,
        reclaim: false,
    };
    ipam::create_pool(sys, &pool).await.unwrap();
    let server = server(&platform, "s1", "lab-1", "203.0.113.10").await;
    (platform, server)
}

async fn server(platform: &Platform, name: &str, region: &str, public_ip: &str) -> ServerId {
    let sys = &platform.app.db.sys;
    let server = NewServer {
        name: name.to_owned(),
        region: region.to_owned(),
        public_ip: public_ip.parse().unwrap(),
        endpoint_port: 51820,
        pool: "default".to_owned(),
        capacity: 100,
    };
    let id = servers::create_server(sys, &server, &mut StdRng::from_os_rng()).await.unwrap();
    let key: [u8; 32] = rand::random();
    sqlx::query(
        "update platform.servers set public_key = $2, identity_pin = $2, last_seen_at = now() where server_id = $1",
    )
    .bind(id.uuid())
    .bind(key.as_slice())
    .execute(sys)
    .await
    .unwrap();
    id
}

struct User<'a> {
    platform: &'a Platform,
    key: String,
    token: String,
}

impl<'a> User<'a> {
    async fn new(platform: &'a Platform, tenant: &Tenant, email: &str) -> Self {
        let answer = platform.register(tenant, email).await;
        Self { platform, key: tenant.key.clone(), token: answer.text("access_token") }
    }

    fn call(&self, method: &str, path: &str) -> Call<'a> {
        let bearer = format!("Bearer {}", self.token);
        self.platform.call(method, path).header("x-api-key", &self.key).header("authorization", &bearer)
    }

    async fn device(&self, body: Value) -> Value {
        let answer = self.call("POST", "/api/v1/devices").json(&body).send().await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        answer.body
    }
}

#[tokio::test]
async fn a_device_is_registered_listed_read_and_deleted() {
    let (platform, server) = platform().await;
    let tenant = platform.tenant().await;
    let user = User::new(&platform, &tenant, "a@example.com").await;
    let device = user.device(json!({"device_name": "MacBook Pro", "platform": "macos"})).await;
    assert_eq!(device["assigned_ip"], "10.8.0.2");
    assert_eq!(device["assigned_ipv6"], "fd00:cafe::2");
    assert_eq!(device["status"], "pending");
    assert!(device.get("activation_ms").is_none());
    assert_eq!(device["server"]["id"], server.to_string());
    let config = device["config"].as_str().unwrap();
    assert!(config.contains("\nAddress = 10.8.0.2/32, fd00:cafe::2/128\n"), "{config}");
    assert!(config.contains("\nEndpoint = 203.0.113.10:51820\n"), "{config}");
    assert!(config.contains("\nAllowedIPs = 0.0.0.0/0, ::/0\n") && !config.contains("MacBook"), "{config}");

    let path = format!("/api/v1/devices/{}", device["device_id"].as_str().unwrap());
    let again = user.call("GET", &format!("{path}/config")).send().await;
    assert_eq!((again.status.as_u16(), again.text.as_str()), (200, config));
    assert_eq!(again.header("content-type"), "text/plain; charset=utf-8");
    assert_eq!(again.header("cache-control"), "no-store");
    let read = user.call("GET", &path).send().await.body;
    assert_eq!(
        (&read["device_name"], &read["platform"], &read["server_region"]),
        (&json!("MacBook Pro"), &json!("macos"), &json!("lab-1"))
    );
    assert_eq!(user.call("GET", "/api/v1/devices").send().await.body["data"], json!([read]));

    let other = User::new(&platform, &tenant, "b@example.com").await;
    let foreign = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    for stranger in [&other, &foreign] {
        for (method, path) in [("GET", path.clone()), ("GET", format!("{path}/config")), ("DELETE", path.clone())] {
            stranger.call(method, &path).refused(404, "NOT_FOUND").await;
        }
        let body = json!({"device_id": device["device_id"]});
        stranger.call("POST", "/api/v1/vpn/connect").json(&body).refused(404, "NOT_FOUND").await;
        stranger.call("POST", "/api/v1/vpn/disconnect").json(&body).refused(404, "NOT_FOUND").await;
        assert_eq!(stranger.call("GET", "/api/v1/devices").send().await.body["data"], json!([]));
    }
    let deleted = user.call("DELETE", &path).send().await;
    assert_eq!((deleted.status.as_u16(), deleted.text.as_str()), (204, ""));
    assert_eq!(user.call("DELETE", &path).send().await.status, 204, "idempotent");
    other.call("DELETE", &path).refused(404, "NOT_FOUND").await;
    user.call("GET", &path).refused(404, "NOT_FOUND").await;
}

#[tokio::test]
async fn a_server_that_fills_up_at_the_last_moment_gives_way_to_the_next() {
    let (platform, first) = platform().await;
    server(&platform, "s2", "lab-2", "203.0.113.11").await;
    let user = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    let (mut filling, mut watching) = (platform.superuser().await, platform.superuser().await);
    sqlx::raw_sql("begin").execute(&mut filling).await.unwrap();
    sqlx::query("update platform.servers set status = 'draining' where server_id = $1")
        .bind(first.uuid())
        .execute(&mut filling)
        .await
        .unwrap();
    let registration = user.call("POST", "/api/v1/devices").json(&json!({"device_name": "d"})).send();
    let commit = async {
        let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
        let waits = "select exists (select from pg_locks l join pg_stat_activity a using (pid)
                                    where a.datname = current_database() and not l.granted)";
        while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&mut watching).await.unwrap() {
            assert!(tokio::time::Instant::now() < deadline, "it does not come to the server");
        }
        sqlx::raw_sql("commit").execute(&mut filling).await.unwrap();
    };
    let (answer, ()) = tokio::join!(registration, commit);
    assert_eq!((answer.status.as_u16(), &answer.body["server"]["region"]), (201, &json!("lab-2")), "{}", answer.text);
}

#[tokio::test]
async fn every_fault_of_a_registration_is_named_at_once() {
    let (platform, _) = platform().await;
    let user = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    let bad = json!({"device_name": "x\nPostUp = reboot", "platform": "Mac OS", "public_key": "AAAA", "server_region": "US East"});
    let answer = user.call("POST", "/api/v1/devices").json(&bad).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(
        answer.faults(),
        [
            "/device_name invalid_format",
            "/platform invalid_format",
            "/public_key invalid_format",
            "/server_region invalid_format"
        ]
    );
    let unknown = json!({"device_name": "x", "name": "y"});
    user.call("POST", "/api/v1/devices").json(&unknown).refused(422, "VALIDATION_FAILED").await;
    let good = json!({"device_name": "x"});
    user.call("POST", "/api/v1/devices?wait=later").json(&good).refused(422, "VALIDATION_FAILED").await;
    user.call("GET", "/api/v1/devices?limit=0").refused(422, "VALIDATION_FAILED").await;
    user.call("GET", "/api/v1/devices?cursor=AAAA").refused(422, "VALIDATION_FAILED").await;
    user.call("GET", "/api/v1/devices/usr_01kaz3r6e8f4s9w2v5m7n0q1tb").refused(404, "NOT_FOUND").await;
    let nowhere = json!({"device_name": "x", "server_region": "mars-1"});
    let refused = user.call("POST", "/api/v1/devices").json(&nowhere).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(refused.faults(), ["/server_region invalid_value"]);
    let drained = server(&platform, "s2", "mars-1", "203.0.113.11").await;
    let drain = format!("/admin/servers/{drained}/drain");
    assert_eq!(platform.admin("POST", &drain).send().await.status, 200);
    user.call("POST", "/api/v1/devices").json(&nowhere).refused(503, "SERVER_UNAVAILABLE").await;
}

#[tokio::test]
async fn a_limit_and_a_key_in_use_have_their_own_answers() {
    let (platform, _) = platform().await;
    let tenant = platform.tenant_with(json!({"name": "Small", "max_devices_per_user": 2})).await;
    let user = User::new(&platform, &tenant, "a@example.com").await;
    let own_key = json!({"device_name": "x", "public_key": CLIENTS_KEY});
    let device = user.device(own_key.clone()).await;
    assert_eq!(device["public_key"], CLIENTS_KEY);
    assert!(device["config"].as_str().unwrap().contains("PrivateKey = REPLACE_WITH_YOUR_PRIVATE_KEY\n"));
    user.call("POST", "/api/v1/devices").json(&own_key).refused(409, "PUBLIC_KEY_IN_USE").await;
    user.device(json!({"device_name": "y"})).await;
    let full = user.call("POST", "/api/v1/devices").json(&json!({"device_name": "z"}));
    let full = full.refused(403, "DEVICE_LIMIT_EXCEEDED").await;
    assert_eq!(full.body["limit"], json!({"name": "devices_per_user", "max": 2, "used": 2, "resets_at": null}));
    assert_eq!(full.body["detail"], "This user has 2 of 2 devices. Remove one or raise the limit.");
}

#[tokio::test]
async fn who_has_used_up_the_month_is_told_everywhere_when_the_next_one_begins() {
    let (platform, _) = platform().await;
    let tenant = platform.tenant_with(json!({"name": "Metered", "bandwidth_limit_gb": 2})).await;
    let user = User::new(&platform, &tenant, "a@example.com").await;
    let device = user.device(json!({"device_name": "x"})).await["device_id"].as_str().unwrap().to_owned();
    let used_up = "update cvault.tenants set over_limit_since = now() where bandwidth_limit_bytes is not null";
    sqlx::query(used_up).execute(&mut platform.superuser().await).await.unwrap();
    let rotate = format!("/api/v1/devices/{device}/rotate-key");
    for (path, body) in [
        ("/api/v1/devices", json!({"device_name": "y"})),
        (&rotate, json!({})),
        ("/api/v1/vpn/connect", json!({"device_id": device})),
    ] {
        let refused = user.call("POST", path).json(&body).refused(403, "BANDWIDTH_LIMIT_EXCEEDED").await;
        let limit = &refused.body["limit"];
        assert_eq!(
            (&limit["name"], &limit["max"], &limit["used"]),
            (&json!("bandwidth_bytes"), &json!(2_000_000_000_i64), &json!(0))
        );
        let at = OffsetDateTime::parse(limit["resets_at"].as_str().unwrap(), &Rfc3339).unwrap();
        assert!(at.day() == 1 && at.time() == Time::MIDNIGHT && at.offset().is_utc(), "{path}: {at}");
        let ahead = at - platform.app.clock.now();
        assert!(ahead.is_positive() && ahead <= Duration::days(31), "{path}: {at}");
    }
}

#[tokio::test]
async fn pages_follow_each_other_without_gap_or_repetition() {
    let (platform, _) = platform().await;
    let tenant = platform.tenant().await;
    let user = User::new(&platform, &tenant, "a@example.com").await;
    for number in 0..5 {
        user.device(json!({"device_name": format!("d{number}")})).await;
    }
    let (mut names, mut path) = (Vec::new(), "/api/v1/devices?limit=2".to_owned());
    loop {
        let page = user.call("GET", &path).send().await.body;
        names.extend(
            page["data"].as_array().unwrap().iter().map(|device| device["device_name"].as_str().unwrap().to_owned()),
        );
        assert_eq!(page["has_more"] == true, page["next_cursor"].is_string());
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        path = format!("/api/v1/devices?limit=2&cursor={cursor}");
    }
    assert_eq!(names, ["d0", "d1", "d2", "d3", "d4"]);
    let page = user.call("GET", "/api/v1/devices?limit=2").send().await.body;
    let other = User::new(&platform, &tenant, "b@example.com").await;
    let path = format!("/api/v1/devices?cursor={}", page["next_cursor"].as_str().unwrap());
    other.call("GET", &path).refused(422, "VALIDATION_FAILED").await;
}

#[tokio::test]
async fn waiting_for_activation_ends_with_the_acknowledgement_or_the_time() {
    let (platform, server) = platform().await;
    let user = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    let body = json!({"device_name": "x"});
    let call = user.call("POST", "/api/v1/devices").header("prefer", "respond-async, wait=0").json(&body);
    let answer = call.send().await;
    assert_eq!((answer.status.as_u16(), answer.text("status").as_str()), (201, "pending"));
    // the server has acknowledged what is about to come
    sqlx::query("update platform.servers set acked_revision = 1000 where server_id = $1")
        .bind(server.uuid())
        .execute(&platform.app.db.sys)
        .await
        .unwrap();
    let answer = user.call("POST", "/api/v1/devices?wait=active").json(&body).send().await;
    assert_eq!((answer.status.as_u16(), answer.text("status").as_str()), (201, "active"));
    assert!(answer.body["activation_ms"].as_u64().unwrap() < 5_000);
}

#[tokio::test]
async fn connect_status_and_disconnect_speak_the_guides_words() {
    let (platform, first) = platform().await;
    let user = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    let device = user.device(json!({"device_name": "x"})).await;
    let id = &device["device_id"];
    let status = user.call("GET", "/api/v1/vpn/status").send().await.body;
    assert_eq!((&status["status"], &status["tunnel_up"]), (&json!("disconnected"), &json!(false)));

    let connect = |body: Value| user.call("POST", "/api/v1/vpn/connect").json(&body);
    let connected = connect(json!({"device_id": id})).send().await.body;
    assert_eq!(connected["status"], "connected");
    assert_eq!((&connected["server_ip"], &connected["server_port"]), (&json!("203.0.113.10"), &json!(51820)));
    assert_eq!((&connected["config"], &connected["assigned_ip"]), (&device["config"], &device["assigned_ip"]));
    let again = connect(json!({"device_id": id, "server_region": "lab-1"})).send().await.body;
    assert_eq!(again["session_id"], connected["session_id"], "one session for each device");
    let status = user.call("GET", "/api/v1/vpn/status").send().await.body;
    assert_eq!(status["status"], "connected");
    assert_eq!(status["devices"][0]["session"]["session_id"], connected["session_id"]);

    let nowhere = connect(json!({"device_id": id, "server_region": "lab-2"})).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(nowhere.faults(), ["/server_region invalid_value"]);
    let second = server(&platform, "s2", "lab-2", "203.0.113.11").await;
    let moved = connect(json!({"device_id": id, "server_region": "lab-2"})).send().await.body;
    assert_eq!((&moved["server_ip"], &moved["assigned_ip"]), (&json!("203.0.113.11"), &device["assigned_ip"]));
    let placed: Vec<(uuid::Uuid, i64, i64)> =
        sqlx::query_as("select server_id, revision, peer_count from platform.servers order by name")
            .fetch_all(&platform.app.db.sys)
            .await
            .unwrap();
    assert_eq!(placed, [(first.uuid(), 2, 0), (second.uuid(), 1, 1)]);

    let disconnect = || user.call("POST", "/api/v1/vpn/disconnect").json(&json!({"device_id": id}));
    let gone = disconnect().send().await.body;
    assert_eq!((&gone["status"], &gone["session_id"]), (&json!("disconnected"), &connected["session_id"]));
    let again = disconnect().send().await;
    assert_eq!((again.status.as_u16(), again.text("status").as_str()), (200, "disconnected"));
    assert!(again.body.get("session_id").is_none());
}

#[tokio::test]
async fn servers_show_load_and_whether_they_take_devices() {
    let (platform, id) = platform().await;
    let user = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    user.device(json!({"device_name": "x"})).await;
    let list = user.call("GET", "/api/v1/servers").send().await.body;
    assert_eq!(
        list,
        json!({"servers": [{"id": id.to_string(), "name": "s1", "region": "lab-1", "load": 1, "available": true}]})
    );
    sqlx::query("update platform.servers set last_seen_at = now() - interval '2 min'")
        .execute(&platform.app.db.sys)
        .await
        .unwrap();
    let list = user.call("GET", "/api/v1/servers").send().await.body;
    assert_eq!(list["servers"][0]["available"], false);
}

#[tokio::test]
async fn usage_is_the_tenants_own_for_its_backend_and_the_users_own_for_the_user() {
    let (platform, _) = platform().await;
    let tenant = platform.tenant_with(json!({"name": "T", "bandwidth_limit_gb": 500})).await;
    let user = User::new(&platform, &tenant, "a@example.com").await;
    let device = user.device(json!({"device_name": "x"})).await;
    let id: cvault_types::DeviceId = device["device_id"].as_str().unwrap().parse().unwrap();
    sqlx::query(
        "insert into cvault.usage_hourly
         select tenant_id, date_trunc('hour', now(), 'UTC'), device_id, user_id, server_id, 1500000000, 500000000
         from cvault.devices where device_id = $1",
    )
    .bind(id.uuid())
    .execute(&platform.app.db.sys)
    .await
    .unwrap();
    let usage = platform.call("GET", "/api/v1/usage").backend(&tenant).send().await.body;
    let period = &usage["current_period"];
    assert_eq!((&period["bandwidth_gb"], &period["bandwidth_bytes"]), (&json!(2.0), &json!(2_000_000_000_i64)));
    assert_eq!((&period["rx_bytes"], &period["tx_bytes"]), (&json!(1_500_000_000), &json!(500_000_000)));
    assert_eq!((&period["active_users"], &period["connection_hours"]), (&json!(1), &json!(0.0)));
    assert_eq!(usage["limits"]["bandwidth_limit_bytes"], json!(500_000_000_000_i64));
    assert_eq!(usage["daily"][0]["rx_bytes"], json!(1_500_000_000));
    assert_eq!(user.call("GET", "/api/v1/usage").send().await.body["current_period"]["rx_bytes"], json!(1_500_000_000));
    let other = User::new(&platform, &tenant, "b@example.com").await;
    assert_eq!(other.call("GET", "/api/v1/usage").send().await.body["current_period"]["rx_bytes"], json!(0));
    let foreign = platform.tenant().await;
    let usage = platform.call("GET", "/api/v1/usage").backend(&foreign).send().await.body;
    assert_eq!((&usage["current_period"]["bandwidth_bytes"], &usage["daily"]), (&json!(0), &json!([])));

    let empty = platform.call("GET", "/api/v1/usage?from=2020-01-01&to=2020-02-01").backend(&tenant).send().await;
    assert_eq!(empty.body["current_period"]["bandwidth_bytes"], json!(0));
    for query in ["from=yesterday", "from=2026-02-01&to=2026-01-01", "from=2000-01-01", "since=2026-01-01"] {
        let call = platform.call("GET", &format!("/api/v1/usage?{query}")).backend(&tenant);
        call.refused(422, "VALIDATION_FAILED").await;
    }
}

#[tokio::test]
async fn a_retried_registration_gets_the_device_and_nothing_of_it_once_it_is_deleted() {
    let (platform, _) = platform().await;
    let user = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    let body = json!({"device_name": "x"});
    let register = || user.call("POST", "/api/v1/devices").header("idempotency-key", "k").json(&body);
    let first = register().send().await;
    let again = register().send().await;
    assert_eq!((again.status.as_u16(), again.header("idempotency-replayed")), (201, "true"), "{}", again.text);
    assert_eq!(again.text, first.text, "byte for byte");

    let path = format!("/api/v1/devices/{}", first.text("device_id"));
    let delete = || user.call("DELETE", &path).header("idempotency-key", "d").send();
    let (gone, repeated) = (delete().await, delete().await);
    assert_eq!((gone.status.as_u16(), gone.header("idempotency-replayed")), (204, ""));
    assert_eq!((repeated.status.as_u16(), repeated.header("idempotency-replayed")), (204, "true"));
    assert!(repeated.text.is_empty() && !repeated.headers.contains_key("content-type"));
    register().refused(404, "NOT_FOUND").await;
}

#[tokio::test]
async fn a_fault_of_the_query_names_its_field() {
    let (platform, _) = platform().await;
    let user = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    for (query, fault) in [
        ("limit=many", "?limit invalid_format"),
        ("limit=-1", "?limit invalid_format"),
        ("limit=1&limit=2", "?limit duplicate"),
        ("page=2", "?page unknown"),
        ("limit=0", "?limit out_of_range"),
    ] {
        let answer = user.call("GET", &format!("/api/v1/devices?{query}")).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults(), [fault], "{query}");
    }
}

#[tokio::test]
async fn a_preshared_key_comes_on_request_and_keys_are_renewed() {
    let (platform, _) = platform().await;
    let tenant = platform.tenant().await;
    let user = User::new(&platform, &tenant, "a@example.com").await;
    let device = user.device(json!({"device_name": "laptop", "preshared_key": true})).await;
    let line = |config: &Value, key: &str| {
        let text = config.as_str().unwrap();
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = ")).map(str::to_owned)
    };
    let preshared = line(&device["config"], "PresharedKey").unwrap();
    assert_eq!(preshared.len(), 44);
    let path = format!("/api/v1/devices/{}", device["device_id"].as_str().unwrap());
    let config = user.call("GET", &format!("{path}/config")).send().await;
    assert_eq!(Value::String(config.text), device["config"], "kept, and the same as at registration");

    let rotate = format!("{path}/rotate-key");
    let renewed = user.call("POST", &rotate).header("idempotency-key", "r1").json(&json!({})).send().await;
    assert_eq!(renewed.status, 200, "{}", renewed.text);
    assert_eq!(renewed.body["assigned_ip"], device["assigned_ip"]);
    assert_ne!(renewed.body["public_key"], device["public_key"]);
    assert_ne!(line(&renewed.body["config"], "PrivateKey"), line(&device["config"], "PrivateKey"));
    assert_ne!(line(&renewed.body["config"], "PresharedKey").unwrap(), preshared);
    let replayed = user.call("POST", &rotate).header("idempotency-key", "r1").json(&json!({})).send().await;
    assert_eq!((replayed.status, &replayed.body["public_key"]), (renewed.status, &renewed.body["public_key"]));
    assert_eq!(replayed.headers["idempotency-replayed"], "true");

    let own = json!({"public_key": CLIENTS_KEY, "preshared_key": false});
    let renewed = user.call("POST", &rotate).json(&own).send().await;
    assert_eq!((renewed.status.as_u16(), &renewed.body["public_key"]), (200, &json!(CLIENTS_KEY)));
    assert_eq!(line(&renewed.body["config"], "PrivateKey").unwrap(), "REPLACE_WITH_YOUR_PRIVATE_KEY");
    assert_eq!(line(&renewed.body["config"], "PresharedKey"), None);
    let same = user.call("POST", &rotate).json(&own).send().await;
    assert_eq!((same.status.as_u16(), &same.body["code"]), (409, &json!("PUBLIC_KEY_IN_USE")));
    let bad = user.call("POST", &rotate).json(&json!({"public_key": "short"})).send().await;
    assert_eq!((bad.status.as_u16(), &bad.body["errors"][0]["pointer"]), (422, &json!("/public_key")));

    let stranger = User::new(&platform, &platform.tenant().await, "a@example.com").await;
    let foreign = stranger.call("POST", &rotate).json(&json!({})).send().await;
    assert_eq!((foreign.status.as_u16(), &foreign.body["code"]), (404, &json!("NOT_FOUND")));
}

/// What a camera reads off the picture, which is a path of dark rectangles, each drawn as `M{x} {y}h{w}v{h}H{x}V{y}`.
fn read_off(svg: &str) -> String {
    let between = |from: &str, to: &str| {
        let rest = svg.split_once(from).unwrap_or_else(|| panic!("no {from} in {svg}")).1;
        rest.split_once(to).unwrap().0
    };
    let (width, height): (usize, usize) =
        (between(" width=\"", "\"").parse().unwrap(), between(" height=\"", "\"").parse().unwrap());
    assert!(svg.contains(&format!("viewBox=\"0 0 {width} {height}\"")) && width >= 320, "{svg}");
    let mut pixels = vec![u8::MAX; width * height];
    for rectangle in between(" d=\"M", "\"").split('M') {
        let numbers: Vec<usize> =
            rectangle.split([' ', 'h', 'v', 'H', 'V']).map(|number| number.parse().unwrap()).collect();
        let [x, y, w, h, back, up] = numbers[..] else { panic!("{rectangle}") };
        assert_eq!((back, up), (x, y));
        for row in y..y + h {
            pixels[row * width + x..row * width + x + w].fill(0);
        }
    }
    let mut picture = rqrr::PreparedImage::prepare_from_greyscale(width, height, |x, y| pixels[y * width + x]);
    let codes = picture.detect_grids();
    assert_eq!(codes.len(), 1);
    codes[0].decode().unwrap().1
}

#[tokio::test]
async fn a_configuration_is_also_a_picture() {
    let (platform, _) = platform().await;
    let tenant = platform.tenant().await;
    let user = User::new(&platform, &tenant, "a@example.com").await;
    let devices = [
        json!({"device_name": "phone"}),
        json!({"device_name": "with a key of its own", "public_key": CLIENTS_KEY}),
        json!({"device_name": "with a preshared key", "preshared_key": true}),
    ];
    for (body, line) in
        devices.iter().zip(["PrivateKey = ", "PrivateKey = REPLACE_WITH_YOUR_PRIVATE_KEY\n", "PresharedKey = "])
    {
        let device = user.device(body.clone()).await;
        let path = format!("/api/v1/devices/{}/config", device["device_id"].as_str().unwrap());
        let picture = user.call("GET", &format!("{path}?format=qr")).send().await;
        assert_eq!((picture.status.as_u16(), picture.header("content-type")), (200, "image/svg+xml"));
        assert_eq!(picture.header("cache-control"), "no-store");
        let file = user.call("GET", &path).send().await.text;
        assert!(file.contains(line), "{file}");
        assert_eq!(read_off(&picture.text), file);
        assert_eq!(device["config"], file);
        let unknown = user.call("GET", &format!("{path}?format=png")).send().await;
        assert_eq!(unknown.status.as_u16(), 422, "{}", unknown.text);
    }
}
