//! Platform staff: names, revoked tokens, limits, the second proof; and the `admin` commands through the binary.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::binary::program;
use crate::matrix::operations;
use crate::platform::{Call, Platform, Tenant};
use crate::scene::Person;

const KEK: &str = "0707070707070707070707070707070707070707070707070707070707070707";

/// Runs `admin --json …` on the platform's database; what it printed, and whether it succeeded.
fn admin(platform: &Platform, args: &[&str]) -> (Value, bool) {
    let database = &platform.database;
    let output = program()
        .args(["admin", "--json"])
        .args(args)
        .env("DATABASE_URL", database.url("cvault_app"))
        .env("CVAULT_DATABASE_SYS_URL", database.url("cvault_sys"))
        .env("API_ENCRYPTION_KEY", KEK)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    (serde_json::from_str(&text).unwrap_or(Value::String(error)), output.status.success())
}

fn done(platform: &Platform, args: &[&str]) -> Value {
    let (answer, success) = admin(platform, args);
    assert!(success, "{args:?}: {answer}");
    answer
}

fn text(answer: &Value, name: &str) -> String {
    answer[name].as_str().unwrap_or_else(|| panic!("no {name} in {answer}")).to_owned()
}

fn bearer<'a>(call: Call<'a>, token: &str) -> Call<'a> {
    call.header("authorization", &format!("Bearer {token}"))
}

#[tokio::test]
async fn a_token_has_a_name_in_the_audit_log_and_ends_when_it_is_revoked() {
    let platform = Platform::start().await;
    let made = done(&platform, &["token", "--name", "jane@example.com"]);
    let token = text(&made, "token");
    let call = bearer(platform.call("POST", "/admin/pools"), &token);
    let pool = call.json(&json!({"name": "default", "ipv4": "10.8.0.0/16"})).send().await;
    assert_eq!(pool.status, 201, "{}", pool.text);
    assert_eq!(pool.header("ratelimit-policy"), "\"staff\";q=3000;w=60");
    assert!(pool.header("ratelimit").starts_with("\"staff\";r=2999;"), "{}", pool.header("ratelimit"));
    let log = platform.admin("GET", "/admin/audit?actor=admin:jane@example.com").send().await;
    assert_eq!(log.body["data"][0]["action"], "pool.create");

    let id = text(&made, "token_id");
    assert_eq!(done(&platform, &["token", "revoke", &id])["was_revoked"], false);
    bearer(platform.call("GET", "/admin/pools"), &token).refused(401, "INVALID_TOKEN").await;
    assert_eq!(done(&platform, &["token", "revoke", &id])["was_revoked"], true);
    assert_eq!(platform.admin("GET", "/admin/pools").send().await.status, 200, "another token");
    let actions = platform.admin("GET", "/admin/audit?action=admin_token").send().await;
    let actions: Vec<_> = actions.body["data"].as_array().unwrap().iter().map(|row| row["action"].clone()).collect();
    assert_eq!(actions, ["admin_token.revoke", "admin_token.create"]);
    let (refusal, success) = admin(&platform, &["token", "--name", "two words"]);
    assert!(!success && refusal.as_str().unwrap().contains("--name"), "{refusal}");
}

#[tokio::test]
async fn a_network_that_guesses_admin_tokens_waits_and_others_do_not() {
    let platform = Platform::start().await;
    for _ in 0..100 {
        bearer(platform.call("GET", "/admin/pools").from("192.0.2.7"), "guess").refused(401, "INVALID_TOKEN").await;
    }
    let refused = platform.admin("GET", "/admin/pools").from("192.0.2.7").refused(429, "RATE_LIMITED").await;
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(platform.admin("GET", "/admin/pools").from("198.51.100.7").send().await.status, 200);
    let tenant = platform.tenant().await;
    let users = platform.call("GET", "/api/v1/users").from("192.0.2.7").backend(&tenant).send().await;
    assert_eq!(users.status, 200, "tenants of that network are not concerned");
}

#[tokio::test]
async fn suspending_deleting_and_other_limits_need_an_approval_that_is_good_once() {
    let platform = Platform::with(|config| config.admin_step_up = true).await;
    let (tenant, other) = (platform.tenant().await, platform.tenant().await);
    let path = format!("/admin/tenants/{}", tenant.id);
    let suspend = format!("{path}/suspend");
    let approve = |action: &str, target: &str| {
        text(&done(&platform, &["approve", "--action", action, "--target", target]), "challenge_token")
    };
    let limits = json!({"user_limit": 7});
    for (method, path, body) in [
        ("POST", &suspend, Value::Null),
        ("DELETE", &path, Value::Null),
        ("PATCH", &path, limits.clone()),
        ("PATCH", &path, json!({"status": "suspended"})),
        ("PATCH", &path, json!({"policy": {"allow_smtp": true}})),
    ] {
        let call = platform.admin(method, path);
        let call = if body.is_null() { call } else { call.json(&body) };
        let refused = call.refused(428, "CHALLENGE_REQUIRED").await;
        assert!(refused.text("detail").contains(&format!("--target {}", tenant.id)), "{}", refused.text);
    }
    let proven =
        |method: &str, path: &str, token: &str| platform.admin(method, path).header("x-challenge-token", token);
    let both = json!({"status": "suspended", "user_limit": 7});
    platform.admin("PATCH", &path).json(&both).refused(422, "VALIDATION_FAILED").await;

    let token = approve("tenant.limits", &tenant.id);
    proven("POST", &suspend, &token).refused(428, "CHALLENGE_REQUIRED").await;
    let elsewhere = format!("/admin/tenants/{}", other.id);
    proven("PATCH", &elsewhere, &token).json(&limits).refused(428, "CHALLENGE_REQUIRED").await;
    let changed = proven("PATCH", &path, &token).json(&limits).send().await;
    assert_eq!((changed.status.as_u16(), &changed.body["user_limit"]), (200, &json!(7)), "{}", changed.text);
    proven("PATCH", &path, &token).json(&limits).refused(428, "CHALLENGE_REQUIRED").await;

    let token = approve("tenant.suspend", &tenant.id);
    fn key(call: Call<'_>) -> Call<'_> {
        call.header("idempotency-key", "k1")
    }
    assert_eq!(key(proven("POST", &suspend, &token)).send().await.body["status"], "suspended");
    let replay = key(platform.admin("POST", &suspend)).send().await;
    assert_eq!(replay.header("idempotency-replayed"), "true", "a retry needs no second approval");
    let resumed = platform.admin("POST", &format!("{path}/resume")).send().await;
    assert_eq!(resumed.body["status"], "active", "{}", resumed.text);
    assert_eq!(platform.admin("PATCH", &path).json(&json!({"name": "B"})).send().await.status, 200);

    let token = approve("tenant.delete", &tenant.id);
    sqlx::query("update platform.admin_approvals set expires_at = now() - interval '1 second' where used_at is null")
        .execute(&mut platform.superuser().await)
        .await
        .unwrap();
    proven("DELETE", &path, &token).refused(428, "CHALLENGE_REQUIRED").await;
    let token = approve("tenant.delete", &tenant.id);
    assert_eq!(proven("DELETE", &path, &token).send().await.status, 204);
}

#[tokio::test]
async fn one_user_cannot_use_up_what_its_tenant_may_send() {
    cvault_control_plane::metrics::install();
    let platform = Platform::start().await;
    let tenant = platform.tenant_with(json!({"name": "Acme", "rate_limit_per_minute": 10})).await;
    let busy = Person::of(&platform, &tenant, "busy@example.com").await;
    let other = Person::of(&platform, &tenant, "other@example.com").await;
    let first = busy.call(&platform, "GET", "/api/v1/devices").send().await;
    assert_eq!(first.header("ratelimit-policy"), "\"tenant\";q=10;w=60, \"user\";q=5;w=60");
    for _ in 1..5 {
        assert_eq!(busy.call(&platform, "GET", "/api/v1/devices").send().await.status, 200);
    }
    for _ in 0..5 {
        let refused = busy.call(&platform, "GET", "/api/v1/devices").refused(429, "RATE_LIMITED").await;
        assert_eq!(refused.body["limit"]["max"], 5, "{}", refused.text);
        assert!(refused.header("ratelimit").contains("\"user\";r=0;"), "{}", refused.header("ratelimit"));
    }
    assert_eq!(other.call(&platform, "GET", "/api/v1/devices").send().await.status, 200);

    let set = json!({"user_rate_limit_per_minute": 1_000, "rate_limit_per_minute": 2_000});
    let changed = platform.admin("PATCH", &format!("/admin/tenants/{}", tenant.id)).json(&set).send().await;
    assert_eq!(changed.body["user_rate_limit_per_minute"], 1_000, "{}", changed.text);
    // what it has used up runs off at the new rate
    let deadline = Instant::now() + Duration::from_secs(20);
    while busy.call(&platform, "GET", "/api/v1/devices").send().await.status != 200 {
        assert!(Instant::now() < deadline, "the new limit holds");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let text = platform.call("GET", "/metrics").send().await.text;
    for line in [
        "cvault_rate_limited_total{limit=\"user\"}",
        "cvault_db_pool_connections{pool=\"app\",state=\"open\"}",
        "cvault_db_pool_connections{pool=\"sys\",state=\"idle\"}",
        "cvault_http_requests_in_flight",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    assert!(!text.contains(&tenant.id));
}

#[test]
fn every_metric_is_on_its_page() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/");
    let source = std::fs::read_to_string(format!("{folder}src/metrics.rs")).unwrap();
    let page = std::fs::read_to_string(format!("{folder}../docs/operations/metrics.md")).unwrap();
    let names: Vec<_> = source.split('"').filter(|part| part.starts_with("cvault_")).collect();
    assert!(names.len() > 12);
    for name in names {
        assert!(page.contains(&format!("`{name}`")), "{name} is not in docs/operations/metrics.md");
    }
}

/// What staff can do over HTTP, and the command that does the same.
const TWINS: &[(&str, &str)] = &[
    ("GET /admin/audit", "audit list"),
    ("GET /admin/pools", "pool list"),
    ("POST /admin/pools", "pool create"),
    ("GET /admin/pools/{pool_id}", "pool show"),
    ("PATCH /admin/pools/{pool_id}", "pool update"),
    ("DELETE /admin/pools/{pool_id}", "pool delete"),
    ("GET /admin/servers", "server list"),
    ("POST /admin/servers", "server create"),
    ("GET /admin/servers/{server_id}", "server show"),
    ("POST /admin/servers/{server_id}/enrol-token", "server token"),
    ("POST /admin/servers/{server_id}/drain", "server drain"),
    ("POST /admin/servers/{server_id}/maintenance", "server maintenance"),
    ("POST /admin/servers/{server_id}/activate", "server activate"),
    ("DELETE /admin/servers/{server_id}", "server remove"),
    ("GET /admin/tenants", "tenant list"),
    ("POST /admin/tenants", "tenant create"),
    ("GET /admin/tenants/{tenant_id}", "tenant show"),
    ("PATCH /admin/tenants/{tenant_id}", "tenant update"),
    ("POST /admin/tenants/{tenant_id}/suspend", "tenant suspend"),
    ("POST /admin/tenants/{tenant_id}/resume", "tenant resume"),
    ("DELETE /admin/tenants/{tenant_id}", "tenant delete"),
];

/// The command line of a platform, which knows what was run.
struct Terminal<'a> {
    platform: &'a Platform,
    ran: RefCell<BTreeSet<String>>,
}

impl Terminal<'_> {
    fn done(&self, args: &[&str]) -> Value {
        self.ran.borrow_mut().insert(args[..2].join(" "));
        done(self.platform, args)
    }

    fn refused(&self, args: &[&str], why: &str) {
        let (refusal, success) = admin(self.platform, args);
        assert!(!success && refusal.as_str().is_some_and(|text| text.contains(why)), "{args:?}: {refusal}");
    }

    async fn over_http(&self, path: &str) -> Value {
        self.platform.admin("GET", path).send().await.body
    }
}

#[tokio::test]
async fn every_operation_has_a_twin_on_the_command_line() {
    let staffs = operations().into_iter().map(|(operation, _)| operation).filter(|name| name.contains(" /admin/"));
    let listed: BTreeSet<String> = TWINS.iter().map(|(operation, _)| (*operation).to_owned()).collect();
    assert_eq!(staffs.collect::<BTreeSet<_>>(), listed, "every operation of staff has a command");

    let platform = Platform::start().await;
    let terminal = Terminal { platform: &platform, ran: RefCell::default() };
    pools_and_servers(&terminal).await;
    tenants(&terminal).await;
    let commands: BTreeSet<String> = TWINS.iter().map(|(_, command)| (*command).to_owned()).collect();
    assert_eq!(*terminal.ran.borrow(), commands, "each was run");
}

async fn pools_and_servers(terminal: &Terminal<'_>) {
    let made = terminal.done(&["pool", "create", "--name", "default", "--v4", "10.9.0.0/16", "--v6", "fd00:9::/64"]);
    let pool = text(&made, "pool_id");
    let pools = terminal.done(&["pool", "list"]);
    assert_eq!((&pools["pools"][0]["id"], &pools["pools"][0]["v4"]), (&json!(pool), &json!("10.9.0.0/16")));
    let shown = terminal.done(&["pool", "update", &pool, "--quarantine", "7", "--reclaim", "true"]);
    assert_eq!((&shown["quarantine_seconds"], &shown["reclaim"]), (&json!(7), &json!(true)));
    assert_eq!(terminal.done(&["pool", "show", &pool]), shown);
    assert_eq!(terminal.over_http(&format!("/admin/pools/{pool}")).await["reclaim"], true);
    terminal.refused(&["pool", "show", "pol_00000000000000000000000001"], "no such pool");

    let where_to = ["--name", "s1", "--region", "lab-1", "--public-ip", "203.0.113.1"];
    let made = terminal.done(&[&["server", "create"][..], &where_to].concat());
    let server = text(&made, "server_id");
    let another = terminal.done(&["server", "token", &server]);
    assert_ne!(text(&another, "token"), text(&made, "token"));
    assert_eq!(terminal.done(&["server", "list"])["servers"][0]["id"], json!(server));
    let path = format!("/admin/servers/{server}");
    for (command, status) in [("drain", "draining"), ("maintenance", "maintenance"), ("activate", "active")] {
        assert_eq!(terminal.done(&["server", command, &server])["status"], status);
        assert_eq!(terminal.done(&["server", "show", &server])["status"], status);
        assert_eq!(terminal.over_http(&path).await["status"], status);
    }
    terminal.refused(&["pool", "delete", &pool], "1 servers");
    assert_eq!(terminal.done(&["server", "remove", &server, "--force"])["status"], "removed");
    assert_eq!(terminal.over_http(&path).await["code"], "NOT_FOUND");
    terminal.refused(&["server", "drain", &server], "no such server");
    assert_eq!(terminal.done(&["pool", "delete", &pool])["status"], "deleted");
    assert_eq!(terminal.over_http(&format!("/admin/pools/{pool}")).await["code"], "NOT_FOUND");
}

async fn tenants(terminal: &Terminal<'_>) {
    let made = terminal.done(&["tenant", "create", "--name", "Acme"]);
    let id = text(&made, "tenant_id");
    let policy = r#"{"allow_smtp":true}"#;
    let change = ["--user-limit", "9", "--bandwidth-limit-gb", "none", "--user-rate-limit-per-minute", "50"];
    let updated = terminal.done(&[&["tenant", "update", &id, "--policy", policy][..], &change].concat());
    let limits = (&updated["user_limit"], &updated["user_rate_limit_per_minute"], &updated["policy"]["allow_smtp"]);
    assert_eq!(limits, (&json!(9), &json!(50), &json!(true)));
    let path = format!("/admin/tenants/{id}");
    assert_eq!(terminal.done(&["tenant", "show", &id]), updated);
    assert_eq!(terminal.over_http(&path).await, updated);
    assert_eq!(terminal.done(&["tenant", "list"])["tenants"].as_array().unwrap().len(), 1);

    let tenant = Tenant { id: id.clone(), key: text(&made, "api_key"), secret: text(&made, "api_secret") };
    let call = || terminal.platform.call("GET", "/api/v1/users").backend(&tenant).send();
    assert_eq!(call().await.status, 200);
    assert_eq!(terminal.done(&["tenant", "suspend", &id])["status"], "suspended");
    call().await.is_problem("suspended", 403, "TENANT_SUSPENDED");
    assert_eq!(terminal.done(&["tenant", "resume", &id])["status"], "active");
    assert_eq!(call().await.status, 200);
    assert_eq!(terminal.done(&["tenant", "delete", &id])["status"], "deleted");
    call().await.is_problem("deleted", 401, "INVALID_API_KEY");
    assert_eq!(terminal.over_http(&path).await["code"], "NOT_FOUND");
    terminal.refused(&["tenant", "resume", &id], "no such tenant");

    let entries = terminal.done(&["audit", "list", "--tenant", &id, "--limit", "20"]);
    let entries = entries["entries"].as_array().unwrap();
    assert!(entries.iter().all(|entry| entry["actor"] == "cli" && entry["target"] == json!(id)), "{entries:?}");
    let actions: Vec<_> = entries.iter().rev().map(|entry| entry["action"].as_str().unwrap()).collect();
    let noted = ["create", "update", "update", "update", "delete", "erase"].map(|verb| format!("tenant.{verb}"));
    assert_eq!(actions, noted);
}

#[tokio::test]
async fn keys_of_tenants_are_made_replaced_listed_and_revoked_from_the_command_line() {
    let platform = Platform::start().await;
    let id = text(&done(&platform, &["tenant", "create", "--name", "Acme"]), "tenant_id");
    let keys = done(&platform, &["api-key", "list", "--tenant", &id]);
    let key = text(&keys["api_keys"][0], "id");
    assert!(!keys.to_string().contains("cvs_"), "{keys}");
    done(&platform, &["api-key", "revoke", "--tenant", &id, &key]);
    assert_eq!(done(&platform, &["api-key", "list", "--tenant", &id])["api_keys"], json!([]));

    let create = ["api-key", "create", "--tenant", &id, "--name", "backend", "--scopes", "usage,users"];
    let made = done(&platform, &create);
    assert_eq!(made["scopes"], json!(["users", "usage"]), "{made}");
    let usage = async |secret: &str| {
        let call = platform.call("GET", "/api/v1/usage").header("x-api-key", made["api_key"].as_str().unwrap());
        call.header("x-api-secret", secret).send().await.status.as_u16()
    };
    let first = text(&made, "api_secret");
    assert_eq!(usage(&first).await, 200);
    let made_id = text(&made, "api_key_id");
    let replaced = done(&platform, &["api-key", "regenerate", "--tenant", &id, &made_id]);
    assert_eq!((usage(&first).await, usage(&text(&replaced, "api_secret")).await), (401, 200));
    let again = done(&platform, &["api-key", "regenerate", "--tenant", &id, &made_id, "--grace", "60"]);
    let both = (usage(&text(&replaced, "api_secret")).await, usage(&text(&again, "api_secret")).await);
    assert_eq!(both, (200, 200));
    let (refusal, success) =
        admin(&platform, &["api-key", "regenerate", "--tenant", &id, &made_id, "--grace", "604801"]);
    assert!(!success, "{refusal}");
    for faulty in [["--scopes", "all"], ["--expires-at", "2020-01-01T00:00:00Z"], ["--expires-at", "soon"]] {
        let (refusal, success) = admin(&platform, &[&create[..6], &faulty[..]].concat());
        assert!(!success, "{refusal}");
    }

    for (action, count) in [("api_key.create", 1), ("api_key.regenerate", 2)] {
        let entries = done(&platform, &["audit", "list", "--tenant", &id, "--action", action]);
        let actors: Vec<_> = entries["entries"].as_array().unwrap().iter().map(|entry| &entry["actor"]).collect();
        assert_eq!(actors, vec!["cli"; count], "{entries}");
    }
    let entries = done(&platform, &["audit", "list", "--tenant", &id, "--action", "api_key.revoke"]);
    assert_eq!((&entries["entries"][0]["actor"], &entries["entries"][0]["target"]), (&json!("cli"), &json!(key)));
    assert_eq!(done(&platform, &["audit", "verify"])["broken"], json!([]));
}

#[tokio::test]
async fn an_audit_log_that_was_tampered_with_is_told_and_ends_with_status_1() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let mut superuser = platform.superuser().await;
    // settled: as if it had been written a minute ago
    let earlier = "update cvault.audit_log set at = at - interval '1 minute'";
    sqlx::query(earlier).execute(&mut superuser).await.unwrap();
    assert!(cvault_control_plane::audit::chain_new(&platform.app.db.sys).await.unwrap() > 0);
    assert_eq!(done(&platform, &["audit", "verify"])["broken"], json!([]));
    sqlx::query("update cvault.audit_log set actor = 'usr_somebody'").execute(&mut superuser).await.unwrap();
    let (answer, success) = admin(&platform, &["audit", "verify"]);
    assert!(!success);
    assert_eq!(answer["broken"], json!([{"tenant_id": tenant.id, "chain_sequence": 1}]));
}

#[tokio::test]
async fn a_portal_account_is_disabled_reset_and_logged_out_from_the_command_line() {
    let platform = Platform::start().await;
    let password = crate::platform::PASSWORD;
    let body = json!({"business_name": "Acme", "email": "owner@example.com", "password": password});
    let signed_up = platform.post("/api/v1/tenant/auth/signup", &body).send().await;
    assert_eq!(signed_up.status, 201, "{}", signed_up.text);
    let log_in = || {
        platform.post("/api/v1/tenant/auth/login", &json!({"email": "owner@example.com", "password": password})).send()
    };
    let token = |answer: &crate::platform::Answer| answer.body["tokens"]["access_token"].as_str().unwrap().to_owned();
    let me = |token: &str| bearer(platform.call("GET", "/api/v1/tenant/me"), token);
    let first = token(&signed_up);
    assert_eq!(me(&first).send().await.status, 200);

    assert_eq!(done(&platform, &["portal", "end-sessions", "owner@example.com"])["sessions_ended"], 1);
    assert_eq!(me(&first).send().await.status, 401);
    let second = token(&log_in().await);
    assert_eq!(done(&platform, &["portal", "disable", "owner@example.com"])["sessions_ended"], 1);
    assert_eq!(me(&second).send().await.status, 401);
    assert_eq!(log_in().await.status, 401);
    let tenant = signed_up.body["tenant"]["id"].as_str().unwrap().to_owned();
    let accounts = done(&platform, &["portal", "list", "--tenant", &tenant]);
    assert_eq!(accounts["accounts"][0]["status"], "disabled");
    assert!(!accounts.to_string().contains('$'), "no hash: {accounts}");
    done(&platform, &["portal", "enable", "owner@example.com"]);
    assert_eq!(log_in().await.status, 200);
    done(&platform, &["portal", "reset", "owner@example.com"]);
    let mails = done(&platform, &["mail", "list"]);
    let kinds: Vec<_> = mails["mails"].as_array().unwrap().iter().map(|mail| mail["kind"].clone()).collect();
    assert!(kinds.contains(&json!("reset_password")), "{mails}");
    done(&platform, &["portal", "create", "--tenant", &tenant, "second@example.com"]);
    let accounts = done(&platform, &["portal", "list", "--tenant", &tenant]);
    assert_eq!(accounts["accounts"][1]["role"], "owner", "{accounts}");
    let mails = done(&platform, &["mail", "list"]);
    let resets = mails["mails"].as_array().unwrap().iter().filter(|mail| mail["kind"] == "reset_password").count();
    assert_eq!(resets, 2, "{mails}");
    let second = json!({"email": "second@example.com", "password": password});
    assert_eq!(platform.post("/api/v1/tenant/auth/login", &second).send().await.status, 401, "it has no password yet");
    let (refusal, success) = admin(&platform, &["portal", "create", "--tenant", &tenant, "owner@example.com"]);
    assert!(!success, "{refusal}");
    done(&platform, &["tenant", "delete", &tenant]);
    for create in [
        &["portal", "create", "--tenant", &tenant, "third@example.com"][..],
        &["api-key", "create", "--tenant", &tenant, "--name", "k"],
    ] {
        let (refusal, success) = admin(&platform, create);
        assert!(!success && refusal.as_str().unwrap().contains("there is no such tenant"), "{refusal}");
    }
    let (refusal, success) = admin(&platform, &["portal", "disable", "nobody@example.com"]);
    assert!(!success && refusal.as_str().unwrap().contains("nobody has a portal account"), "{refusal}");
}

#[tokio::test]
async fn a_token_that_guesses_approvals_is_revoked() {
    let platform = Platform::with(|config| config.admin_step_up = true).await;
    let tenant = platform.tenant().await;
    let token = text(&done(&platform, &["token", "--name", "guesser"]), "token");
    let path = format!("/admin/tenants/{}", tenant.id);
    let guess = || bearer(platform.call("DELETE", &path), &token).header("x-challenge-token", "cvc_guess");
    for _ in 0..4 {
        guess().refused(428, "CHALLENGE_REQUIRED").await;
    }
    let ended = guess().refused(401, "SESSION_TERMINATED").await;
    assert_eq!(ended.header("x-session-terminated"), "true");
    bearer(platform.call("GET", "/admin/tenants"), &token).refused(401, "INVALID_TOKEN").await;
    let log = platform.admin("GET", "/admin/audit?action=admin_token.revoke").send().await;
    assert_eq!(log.body["data"][0]["actor"], "platform");
    assert_eq!(platform.admin("GET", &path).send().await.status, 200, "others go on, and the tenant is there");
}
