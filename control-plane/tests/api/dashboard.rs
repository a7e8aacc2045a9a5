//! What a tenant's people do in the portal besides logging in: keys, settings, figures, logs.

use serde_json::{Value, json};
use sqlx::PgConnection;

use crate::devices;
use crate::people::Person;
use crate::platform::{Answer, PASSWORD, Platform, Tenant};

const KEYS: &str = "/api/v1/tenant/api-keys";
const REGENERATE: &str = "/api/v1/tenant/api-keys/regenerate";
const SETTINGS: &str = "/api/v1/tenant/settings";

fn caller(tenant: &Tenant, made: &Answer) -> Tenant {
    Tenant { id: tenant.id.clone(), key: made.text("api_key"), secret: made.text("api_secret") }
}

async fn works(platform: &Platform, caller: &Tenant) -> bool {
    platform.call("GET", "/api/v1/users").backend(caller).send().await.status == 200
}

#[tokio::test]
async fn a_key_is_made_shown_changed_regenerated_and_revoked_in_the_portal() {
    let platform = Platform::start().await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    let body = json!({"name": "backend", "scopes": ["users", "auth", "users"]});
    let made = owner.sure("POST", KEYS, Some(&body)).await;
    assert_eq!(made.status, 201, "{}", made.text);
    assert_eq!(made.body["scopes"], json!(["auth", "users"]));
    assert!(works(&platform, &caller(&owner.tenant, &made)).await);
    let path = format!("{KEYS}/{}", made.text("id"));

    let shown = owner.get(&path).await;
    assert!(shown.body.get("api_secret").is_none() && !shown.text.contains(&made.text("api_secret")));
    let list = owner.get(KEYS).await;
    let names: Vec<_> = list.body["data"].as_array().unwrap().iter().map(|key| key["name"].clone()).collect();
    assert_eq!(names, ["default", "backend"]);

    let changed = owner.sure("PATCH", &path, Some(&json!({"scopes": ["usage"], "name": "reports"}))).await;
    assert_eq!((changed.status.as_u16(), &changed.body["scopes"]), (200, &json!(["usage"])), "{}", changed.text);
    let refused = platform.call("GET", "/api/v1/users").backend(&caller(&owner.tenant, &made)).send().await;
    refused.is_problem("at once", 403, "INSUFFICIENT_SCOPE");

    let which = owner.sure("POST", REGENERATE, Some(&json!({}))).await;
    which.is_problem("one of two", 422, "VALIDATION_FAILED");
    assert_eq!(which.faults(), ["/api_key_id required"]);
    let body = json!({"api_key_id": made.text("id"), "grace_period_seconds": 3600});
    let new = owner.sure_with("POST", REGENERATE, Some(&body), &[("idempotency-key", "r1")]).await;
    assert_eq!((new.status.as_u16(), new.text("api_key")), (200, made.text("api_key")), "{}", new.text);
    assert!(new.body["previous_secret_valid_until"].is_string());
    let again = owner.sure_with("POST", REGENERATE, Some(&body), &[("idempotency-key", "r1")]).await;
    assert_eq!((again.header("idempotency-replayed"), again.text("api_secret")), ("true", new.text("api_secret")));
    let usage = async |secret: &str| {
        let call = platform.call("GET", "/api/v1/usage").header("x-api-key", &made.text("api_key"));
        call.header("x-api-secret", secret).send().await.status.as_u16()
    };
    assert_eq!((usage(&made.text("api_secret")).await, usage(&new.text("api_secret")).await), (200, 200));

    assert_eq!(owner.sure("DELETE", &path, None).await.status, 204);
    assert_eq!((usage(&made.text("api_secret")).await, usage(&new.text("api_secret")).await), (401, 401));
    owner.call("DELETE", &path).refused(404, "NOT_FOUND").await;
    owner.call("GET", &path).refused(404, "NOT_FOUND").await;
    let only = owner.sure("POST", REGENERATE, Some(&json!({}))).await;
    assert_eq!(only.status, 200, "without an id: the only one: {}", only.text);
    assert!(!works(&platform, &owner.tenant).await && works(&platform, &caller(&owner.tenant, &only)).await);

    let log = owner.get("/api/v1/tenant/audit?action=api_key").await;
    let log: Vec<_> = log.body["data"].as_array().unwrap().iter().map(|entry| entry["action"].clone()).collect();
    let expected = ["api_key.regenerate", "api_key.revoke", "api_key.regenerate", "api_key.update", "api_key.create"];
    assert_eq!(log, expected);
}

#[tokio::test]
async fn keys_are_for_admins_and_another_tenants_are_not_there() {
    let platform = Platform::start().await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    let other = Person::owner(&platform, "other@example.com").await;
    let theirs = other.get(KEYS).await.body["data"][0]["id"].as_str().unwrap().to_owned();
    let path = format!("{KEYS}/{theirs}");
    let create = json!({"name": "x"});
    let regenerate = json!({"api_key_id": theirs});
    owner.call("GET", &path).refused(404, "NOT_FOUND").await;
    owner.call("PATCH", &path).json(&json!({"name": "x"})).refused(404, "NOT_FOUND").await;
    owner.call("DELETE", &path).refused(404, "NOT_FOUND").await;
    owner.call("POST", REGENERATE).json(&regenerate).refused(404, "NOT_FOUND").await;
    for body in [
        json!({"name": ""}),
        json!({"name": "x", "scopes": []}),
        json!({"name": "x", "expires_at": "2020-01-01T00:00:00Z"}),
        json!({"name": "x", "scopes": ["admin"]}),
        json!({"name": "x", "secret": "mine"}),
    ] {
        owner.call("POST", KEYS).json(&body).refused(422, "VALIDATION_FAILED").await;
    }
    let long = json!({"grace_period_seconds": 604_801});
    owner.call("POST", REGENERATE).json(&long).refused(422, "VALIDATION_FAILED").await;
    for (role, reads) in [("developer", 200), ("billing", 403), ("viewer", 403)] {
        other.has_role(role).await;
        assert_eq!(other.call("GET", KEYS).send().await.status, reads, "{role}");
        assert_eq!(other.call("GET", &path).send().await.status, reads, "{role}");
        assert_eq!(other.call("GET", "/api/v1/tenant/audit").send().await.status, reads, "{role}");
        assert_eq!(other.call("GET", "/api/v1/tenant/users").send().await.status, reads, "{role}");
        assert_eq!(other.call("GET", "/api/v1/tenant/devices").send().await.status, reads, "{role}");
        assert_eq!(other.call("GET", SETTINGS).send().await.status, 200, "{role}");
        assert_eq!(other.call("GET", "/api/v1/tenant/dashboard/stats").send().await.status, 200, "{role}");
        let refused = "INSUFFICIENT_SCOPE";
        other.call("POST", KEYS).json(&create).refused(403, refused).await;
        other.call("PATCH", &path).json(&json!({"name": "x"})).refused(403, refused).await;
        other.call("DELETE", &path).refused(403, refused).await;
        other.call("POST", REGENERATE).json(&regenerate).refused(403, refused).await;
        other.call("PATCH", SETTINGS).json(&json!({"name": "x"})).refused(403, refused).await;
    }
    for path in [
        KEYS,
        SETTINGS,
        "/api/v1/tenant/dashboard/stats",
        "/api/v1/tenant/dashboard/usage",
        "/api/v1/tenant/dashboard/activity",
        "/api/v1/tenant/audit",
        "/api/v1/tenant/users",
        "/api/v1/tenant/devices",
    ] {
        platform.call("GET", path).refused(401, "INVALID_TOKEN").await;
        platform.call("GET", path).backend(&owner.tenant).refused(401, "INVALID_TOKEN").await;
        platform.admin("GET", path).refused(401, "INVALID_TOKEN").await;
    }
}

#[tokio::test]
async fn settings_change_what_the_tenants_configurations_say() {
    let (platform, _) = devices::platform().await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    let before = owner.get(SETTINGS).await.body;
    assert_eq!(
        (&before["name"], &before["public_clients"], &before["allowed_origins"], &before["client_dns"]),
        (&json!("Acme"), &json!(false), &json!([]), &Value::Null)
    );
    assert_eq!(before["limits"]["max_devices_per_user"], 5);

    let token = platform.call("POST", "/api/v1/users/u1/login-token").backend(&owner.tenant).send().await;
    let bearer = format!("Bearer {}", token.text("access_token"));
    let as_user = |method: &str, path: &str| {
        platform.call(method, path).header("x-api-key", &owner.tenant.key).header("authorization", &bearer)
    };
    let device = as_user("POST", "/api/v1/devices").json(&json!({"device_name": "d"})).send().await;
    let full = device.text("config");

    let body = json!({"name": " Acme GmbH ", "whitelabel_config": {"brand": "AcmeVPN"}, "public_clients": true,
        "allowed_origins": ["https://APP.example.com:443", "https://app.example.com"],
        "client_dns": ["10.0.0.53", "fd00::53"], "client_allowed_ips": ["10.1.2.3/8", "fd00::/8"], "client_mtu": 1280});
    let after = owner.call("PATCH", SETTINGS).json(&body).send().await;
    assert_eq!(after.status, 200, "{}", after.text);
    assert_eq!(after.body["name"], "Acme GmbH");
    assert_eq!(after.body["allowed_origins"], json!(["https://app.example.com"]));
    assert_eq!(after.body["client_allowed_ips"], json!(["10.0.0.0/8", "fd00::/8"]));
    assert_eq!(owner.get(SETTINGS).await.body, after.body);

    let wanted = full
        .replace("DNS = 1.1.1.1, 2606:4700:4700::1111", "DNS = 10.0.0.53, fd00::53")
        .replace("MTU = 1420", "MTU = 1280")
        .replace("AllowedIPs = 0.0.0.0/0, ::/0", "AllowedIPs = 10.0.0.0/8, fd00::/8");
    let id = device.text("device_id");
    assert_eq!(as_user("GET", &format!("/api/v1/devices/{id}/config")).send().await.text, wanted);
    let connected = as_user("POST", "/api/v1/vpn/connect").json(&json!({"device_id": id})).send().await;
    assert_eq!(connected.text("config"), wanted);
    let rotated = as_user("POST", &format!("/api/v1/devices/{id}/rotate-key")).json(&json!({})).send().await;
    let second = as_user("POST", "/api/v1/devices").json(&json!({"device_name": "e"})).send().await;
    for answer in [rotated, second] {
        assert!(answer.text("config").contains("\nAllowedIPs = 10.0.0.0/8, fd00::/8\n"), "{}", answer.text);
    }
    let other = Person::owner(&platform, "other@example.com").await;
    assert_eq!(other.get(SETTINGS).await.body["client_mtu"], Value::Null, "another tenant's are its own");

    let page = json!({"email": "a@example.com", "password": PASSWORD});
    let call = platform.post("/api/v1/auth/register", &page).header("x-api-key", &owner.tenant.key);
    let answer = call.header("origin", "https://app.example.com").send().await;
    assert_eq!(answer.status, 201, "what is switched on works: {}", answer.text);

    let back = json!({"client_dns": null, "client_allowed_ips": null, "client_mtu": null});
    assert_eq!(owner.call("PATCH", SETTINGS).json(&back).send().await.status, 200);
    let plain = as_user("GET", &format!("/api/v1/devices/{id}/config")).send().await.text;
    assert!(plain.contains("\nAllowedIPs = 0.0.0.0/0, ::/0\n") && plain.contains("\nMTU = 1420\n"), "{plain}");
}

#[tokio::test]
async fn no_setting_becomes_a_line_of_a_configuration() {
    let (platform, _) = devices::platform().await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    let line = "10.0.0.0/8\nPostUp = id";
    for (body, fault) in [
        (json!({"client_dns": [line]}), "/client_dns/0 invalid_format"),
        (json!({"client_dns": ["1.1.1.1", "example.com"]}), "/client_dns/1 invalid_format"),
        (json!({"client_dns": []}), "/client_dns too_short"),
        (json!({"client_dns": vec!["1.1.1.1"; 5]}), "/client_dns too_long"),
        (json!({"client_allowed_ips": [line]}), "/client_allowed_ips/0 invalid_format"),
        (json!({"client_allowed_ips": ["0.0.0.0/0, ::/0"]}), "/client_allowed_ips/0 invalid_format"),
        (json!({"client_allowed_ips": vec!["10.0.0.0/8"; 33]}), "/client_allowed_ips too_long"),
        (json!({"client_mtu": 1279}), "/client_mtu out_of_range"),
        (json!({"client_mtu": 1501}), "/client_mtu out_of_range"),
        (json!({"client_mtu": "1400\nPostUp = id"}), "/client_mtu invalid_type"),
        (json!({"allowed_origins": ["*"]}), "/allowed_origins/0 invalid_format"),
        (json!({"allowed_origins": ["https://a.example\r\nx: y"]}), "/allowed_origins/0 invalid_format"),
        (json!({"name": "a\nb"}), "/name invalid_format"),
        (json!({"whitelabel_config": {"x": "y".repeat(20_000)}}), "/whitelabel_config too_long"),
        (json!({"status": "active"}), "/status unknown"),
        (json!({"user_limit": 1_000_000}), "/user_limit unknown"),
    ] {
        let answer = owner.call("PATCH", SETTINGS).json(&body).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults(), [fault], "{body}");
    }
    let many = json!({"client_mtu": 1, "client_dns": ["x"], "name": "", "allowed_origins": ["x"]});
    let answer = owner.call("PATCH", SETTINGS).json(&many).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(answer.faults().len(), 4, "all at once: {:?}", answer.faults());
    // as many and as long as they may be: the QR code holds them
    let nets: Vec<String> = (0..32).map(|i| format!("2001:db8:ffff:ffff:ffff:ffff:ffff:f{i:03x}/128")).collect();
    let body = json!({"client_allowed_ips": nets, "client_dns": vec!["2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"; 4]});
    assert_eq!(owner.call("PATCH", SETTINGS).json(&body).send().await.status, 200);
    let token = platform.call("POST", "/api/v1/users/u1/login-token").backend(&owner.tenant).send().await;
    let bearer = format!("Bearer {}", token.text("access_token"));
    let as_user = |method: &str, path: &str| {
        platform.call(method, path).header("x-api-key", &owner.tenant.key).header("authorization", &bearer)
    };
    let device =
        as_user("POST", "/api/v1/devices").json(&json!({"device_name": "d", "preshared_key": true})).send().await;
    let path = format!("/api/v1/devices/{}/config?format=qr", device.text("device_id"));
    assert_eq!(as_user("GET", &path).send().await.status, 200);
}

/// Bytes and connections of the tenant's one device, yesterday and today.
async fn used(superuser: &mut PgConnection, device: &str) {
    let id = device.parse::<cvault_types::DeviceId>().unwrap().uuid();
    for (hours_ago, rx, tx) in [(0, 1_000_000_000_i64, 500_000_000_i64), (24, 7, 5), (24 * 60, 999, 999)] {
        sqlx::query(
            "insert into cvault.usage_hourly (tenant_id, hour, device_id, user_id, server_id, rx_bytes, tx_bytes)
             select tenant_id, date_trunc('hour', now(), 'UTC') - make_interval(hours => $2), device_id, user_id, server_id, $3, $4
             from cvault.devices where device_id = $1",
        )
        .bind(id)
        .bind(hours_ago)
        .bind(rx)
        .bind(tx)
        .execute(&mut *superuser)
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn the_dashboard_shows_what_the_ledger_has() {
    let (platform, server) = devices::platform().await;
    let owner = Person::owner(&platform, "owner@example.com").await;
    let other = Person::owner(&platform, "other@example.com").await;
    let token = platform.call("POST", "/api/v1/users/u1/login-token").backend(&owner.tenant).send().await;
    let bearer = format!("Bearer {}", token.text("access_token"));
    let as_user = |method: &str, path: &str| {
        platform.call(method, path).header("x-api-key", &owner.tenant.key).header("authorization", &bearer)
    };
    let device = as_user("POST", "/api/v1/devices").json(&json!({"device_name": "d"})).send().await.text("device_id");
    as_user("POST", "/api/v1/vpn/connect").json(&json!({"device_id": device})).send().await;
    used(&mut platform.superuser().await, &device).await;
    platform.app.uses.flush(&platform.app.db.sys).await.unwrap();

    let stats = owner.get("/api/v1/tenant/dashboard/stats").await.body;
    assert_eq!((&stats["bandwidth_bytes"], &stats["bandwidth_gb"]), (&json!(1_500_000_012_i64), &json!(1.5)));
    assert_eq!(
        (&stats["active_users"], &stats["active_devices"], &stats["api_calls"]),
        (&json!(1), &json!(1), &json!(3))
    );
    assert_eq!(
        (&stats["now"]["users"], &stats["now"]["devices"], &stats["now"]["connected_devices"]),
        (&json!(1), &json!(1), &json!(1))
    );
    let indicator = &stats["now"]["servers"][0];
    assert_eq!((&indicator["id"], &indicator["online"]), (&json!(server.to_string()), &json!(true)));
    let api = platform.call("GET", "/api/v1/usage?from=2000-01-01").backend(&owner.tenant);
    api.refused(422, "VALIDATION_FAILED").await;

    let usage = owner.get("/api/v1/tenant/dashboard/usage?days=7").await.body;
    let daily = usage["daily"].as_array().unwrap();
    assert_eq!(daily.len(), 7, "every day");
    let sum =
        |rows: &Value| rows.as_array().unwrap().iter().map(|row| row["bandwidth_bytes"].as_i64().unwrap()).sum::<i64>();
    assert_eq!(
        (sum(&usage["daily"]), sum(&usage["regions"]), sum(&usage["hours"])),
        (1_500_000_012, 1_500_000_012, 1_500_000_012)
    );
    assert_eq!(usage["regions"][0]["region"], "lab-1");
    assert_eq!(usage["hours"].as_array().unwrap().len(), 24);
    assert_eq!(sum(&owner.get("/api/v1/tenant/dashboard/usage?days=100").await.body["daily"]), 1_500_000_012 + 1_998);
    for days in ["0", "401", "-1", "x"] {
        let call = owner.call("GET", &format!("/api/v1/tenant/dashboard/stats?days={days}"));
        call.refused(422, "VALIDATION_FAILED").await;
    }

    let actions = |page: &Value| -> Vec<String> {
        page["data"].as_array().unwrap().iter().map(|row| row["action"].as_str().unwrap().to_owned()).collect()
    };
    let activity = owner.get("/api/v1/tenant/dashboard/activity").await.body;
    assert_eq!(
        actions(&activity),
        ["session.open", "device.register", "user.create", "tenant_admin.create", "tenant.create"]
    );
    assert_eq!((&activity["data"][0]["region"], &activity["data"][2]["region"]), (&json!("lab-1"), &Value::Null));
    let first = owner.get("/api/v1/tenant/dashboard/activity?limit=2").await.body;
    let cursor = first["next_cursor"].as_str().unwrap();
    let rest = owner.get(&format!("/api/v1/tenant/dashboard/activity?cursor={cursor}")).await.body;
    assert_eq!([actions(&first), actions(&rest)].concat(), actions(&activity), "no line twice, none left out");

    let log = owner.get("/api/v1/tenant/audit?limit=2").await.body;
    assert_eq!(actions(&log), ["vpn.connect", "device.register"]);
    let cursor = log["next_cursor"].as_str().unwrap();
    let rest = owner.get(&format!("/api/v1/tenant/audit?cursor={cursor}")).await.body;
    assert_eq!(
        (actions(&rest), &rest["has_more"]),
        (vec!["user.create".to_owned(), "tenant_admin.create".to_owned(), "tenant.create".to_owned()], &json!(false))
    );
    let foreign = other.call("GET", &format!("/api/v1/tenant/audit?cursor={cursor}"));
    foreign.refused(422, "VALIDATION_FAILED").await;
    assert_eq!(actions(&owner.get("/api/v1/tenant/audit?action=device").await.body), ["device.register"]);
    assert_eq!(
        actions(&owner.get(&format!("/api/v1/tenant/audit?target={device}&action=vpn.connect")).await.body),
        ["vpn.connect"]
    );
    owner.call("GET", "/api/v1/tenant/audit?actor=%00").refused(422, "VALIDATION_FAILED").await;

    let listed = owner.get("/api/v1/tenant/devices").await.body;
    assert_eq!(
        (&listed["data"][0]["device_id"], &listed["data"][0]["server_region"]),
        (&json!(device), &json!("lab-1"))
    );
    assert_eq!(listed["data"][0]["user_id"], owner.get("/api/v1/tenant/users").await.body["data"][0]["user_id"]);
    for path in ["devices", "users"] {
        assert_eq!(other.get(&format!("/api/v1/tenant/{path}")).await.body["data"], json!([]), "{path}");
    }
    let theirs = other.get("/api/v1/tenant/dashboard/stats").await.body;
    assert_eq!(
        (&theirs["bandwidth_bytes"], &theirs["api_calls"], &theirs["now"]["devices"]),
        (&json!(0), &json!(0), &json!(0))
    );
}
