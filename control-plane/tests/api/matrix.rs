//! Every operation of the OpenAPI document, asked by every kind of caller for what is not theirs: the exact status. An
//! operation without a row here fails the test, and so does a row without an operation.
//!
//! The same walk looks at what every answer must have, and at the audit entry of every write.

use std::collections::BTreeSet;

use cvault_control_plane::http::openapi;
use serde_json::{Value, json};
use sqlx::Connection;

use crate::platform::{Answer, Call, PASSWORD, Platform, Tenant};
use crate::scene::{Person, with_server};

/// Operations that need no credentials. Nothing else may be without.
const PUBLIC: &[&str] =
    &["GET /.well-known/jwks.json", "GET /api/v1/openapi.json", "GET /health", "GET /health/ready", "GET /metrics"];

/// Who asks. To add one: a variant, its credentials in [`Scene::sign`], a column in [`ROWS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    Anonymous,
    /// Well-formed credentials that nobody issued.
    WrongKey,
    /// The tenant's key with the token of another tenant's user.
    MixedTenants,
    /// A user of another tenant.
    ForeignUser,
    /// The backend of another tenant.
    ForeignBackend,
    /// Another user of the same tenant.
    Neighbour,
    PlatformAdmin,
}

const CALLERS: [Caller; 7] = [
    Caller::Anonymous,
    Caller::WrongKey,
    Caller::MixedTenants,
    Caller::ForeignUser,
    Caller::ForeignBackend,
    Caller::Neighbour,
    Caller::PlatformAdmin,
];

/// What an operation answers to each of [`CALLERS`], in their order.
struct Row {
    operation: &'static str,
    body: Option<&'static str>,
    status: [u16; CALLERS.len()],
}

const fn row(operation: &'static str, body: Option<&'static str>, status: [u16; CALLERS.len()]) -> Row {
    Row { operation, body, status }
}

/// `$device` is a device of the tenant under attack.
const DEVICE: Option<&str> = Some(r#"{"device_id": "$device"}"#);
const STAFF_ONLY: [u16; CALLERS.len()] = [401, 401, 401, 401, 401, 401, 404];
const USERS_OWN: [u16; CALLERS.len()] = [401, 401, 401, 404, 401, 404, 401];
const OPEN: [u16; CALLERS.len()] = [200; CALLERS.len()];

const ROWS: &[Row] = &[
    row("GET /.well-known/jwks.json", None, OPEN),
    row("GET /api/v1/openapi.json", None, OPEN),
    row("GET /health", None, OPEN),
    row("GET /health/ready", None, OPEN),
    row("GET /metrics", None, OPEN),
    // the tenant's backend
    row(
        "POST /api/v1/auth/register",
        Some(r#"{"email": "x@y.example", "password": "1"}"#),
        [401, 401, 401, 401, 422, 401, 401],
    ),
    row("POST /api/v1/auth/login", Some(r#"{"email": "victim@example.com", "password": "$password"}"#), [401; 7]),
    row("POST /api/v1/auth/refresh", Some(r#"{"refresh_token": "$refresh"}"#), [401; 7]),
    row("POST /api/v1/auth/logout", Some(r#"{"refresh_token": "$refresh"}"#), [401; 7]),
    // a tenant's user
    row("GET /api/v1/devices", None, [401, 401, 401, 200, 401, 200, 401]),
    row("POST /api/v1/devices", Some(r#"{"device_name": ""}"#), [401, 401, 401, 422, 401, 422, 401]),
    row("GET /api/v1/devices/{device_id}", None, USERS_OWN),
    row("DELETE /api/v1/devices/{device_id}", None, USERS_OWN),
    row("GET /api/v1/devices/{device_id}/config", None, USERS_OWN),
    row("POST /api/v1/devices/{device_id}/rotate-key", Some("{}"), USERS_OWN),
    row("POST /api/v1/vpn/connect", DEVICE, USERS_OWN),
    row("POST /api/v1/vpn/disconnect", DEVICE, USERS_OWN),
    row("GET /api/v1/vpn/status", None, [401, 401, 401, 200, 401, 200, 401]),
    row("GET /api/v1/servers", None, [401, 401, 401, 200, 401, 200, 401]),
    row("GET /api/v1/usage", None, [401, 401, 401, 200, 200, 200, 401]),
    // platform staff, for what is not there
    row("GET /admin/tenants", None, [401, 401, 401, 401, 401, 401, 200]),
    row("POST /admin/tenants", Some(r#"{"name": ""}"#), [401, 401, 401, 401, 401, 401, 422]),
    row("GET /admin/tenants/{tenant_id}", None, STAFF_ONLY),
    row("PATCH /admin/tenants/{tenant_id}", Some("{}"), STAFF_ONLY),
    row("DELETE /admin/tenants/{tenant_id}", None, STAFF_ONLY),
    row("POST /admin/tenants/{tenant_id}/suspend", None, STAFF_ONLY),
    row("POST /admin/tenants/{tenant_id}/resume", None, STAFF_ONLY),
    row("GET /admin/servers", None, [401, 401, 401, 401, 401, 401, 200]),
    row(
        "POST /admin/servers",
        Some(r#"{"name": "", "region": "", "public_ip": "::1"}"#),
        [401, 401, 401, 401, 401, 401, 422],
    ),
    row("GET /admin/servers/{server_id}", None, STAFF_ONLY),
    row("DELETE /admin/servers/{server_id}", None, STAFF_ONLY),
    row("POST /admin/servers/{server_id}/enrol-token", None, STAFF_ONLY),
    row("POST /admin/servers/{server_id}/drain", None, STAFF_ONLY),
    row("POST /admin/servers/{server_id}/maintenance", None, STAFF_ONLY),
    row("POST /admin/servers/{server_id}/activate", None, STAFF_ONLY),
    row("GET /admin/pools", None, [401, 401, 401, 401, 401, 401, 200]),
    row("POST /admin/pools", Some(r#"{"name": "", "ipv4": "10.9.0.0/16"}"#), [401, 401, 401, 401, 401, 401, 422]),
    row("GET /admin/pools/{pool_id}", None, STAFF_ONLY),
    row("PATCH /admin/pools/{pool_id}", Some("{}"), STAFF_ONLY),
    row("DELETE /admin/pools/{pool_id}", None, STAFF_ONLY),
    row("GET /admin/audit", None, [401, 401, 401, 401, 401, 401, 200]),
];

struct Scene {
    platform: Platform,
    victim: Person,
    neighbour: Person,
    foreigner: Person,
    foreign_tenant: Tenant,
    device: String,
    server: String,
}

impl Scene {
    async fn new() -> Self {
        let platform = Platform::start().await;
        let server = with_server(&platform).await;
        let (tenant, foreign_tenant) = (platform.tenant().await, platform.tenant().await);
        let victim = Person::of(&platform, &tenant, "victim@example.com").await;
        let neighbour = Person::of(&platform, &tenant, "neighbour@example.com").await;
        let foreigner = Person::of(&platform, &foreign_tenant, "foreigner@example.com").await;
        let device = victim.device(&platform, "d").await["device_id"].as_str().unwrap().to_owned();
        Self { platform, victim, neighbour, foreigner, foreign_tenant, device, server }
    }

    fn sign<'a>(&'a self, caller: Caller, call: Call<'a>) -> Call<'a> {
        match caller {
            Caller::Anonymous => call,
            Caller::WrongKey => call
                .header("x-api-key", "cvk_0000000000000000000000000000000000000000")
                .header("x-api-secret", "cvs_0000000000000000000000000000000000000000")
                .header("authorization", "Bearer eyJhbGciOiJFZERTQSJ9.e30.AAAA"),
            Caller::MixedTenants => {
                Person { key: self.victim.key.clone(), token: self.foreigner.token.clone(), refresh: String::new() }
                    .signs(call)
            }
            Caller::ForeignUser => self.foreigner.signs(call),
            Caller::ForeignBackend => call.backend(&self.foreign_tenant),
            Caller::Neighbour => self.neighbour.signs(call),
            Caller::PlatformAdmin => call.header("authorization", &format!("Bearer {}", self.platform.admin_token())),
        }
    }

    /// The path with ids of what is somebody else's; for staff, to whom nothing is, of what is not there.
    fn path(&self, template: &str) -> String {
        template
            .replace("{device_id}", &self.device)
            .replace("{tenant_id}", "ten_00000000000000000000000001")
            .replace("{server_id}", "srv_00000000000000000000000001")
            .replace("{pool_id}", "pol_00000000000000000000000001")
    }

    fn body(&self, template: &str) -> Value {
        let text = template
            .replace("$device", &self.device)
            .replace("$refresh", &self.victim.refresh)
            .replace("$password", PASSWORD);
        serde_json::from_str(&text).unwrap()
    }

    async fn entries(&self) -> i64 {
        let mut connection = sqlx::PgConnection::connect_with(&self.platform.database.superuser()).await.unwrap();
        sqlx::query_scalar("select (select count(*) from cvault.audit_log) + (select count(*) from cvault.auth_events)")
            .fetch_one(&mut connection)
            .await
            .unwrap()
    }
}

/// `METHOD /path` of every operation in the document, and whether it says that it needs credentials.
fn operations() -> Vec<(String, bool)> {
    let document: Value = serde_json::from_str(openapi::document_text()).unwrap();
    let paths = document["paths"].as_object().unwrap();
    let of_path = |(path, methods): (&String, &Value)| {
        let methods = methods.as_object().unwrap().clone();
        let path = path.clone();
        methods.into_iter().map(move |(method, operation)| {
            let needs = operation["security"].as_array().is_some_and(|any| any.iter().all(|one| *one != json!({})));
            (format!("{} {path}", method.to_uppercase()), needs)
        })
    };
    paths.iter().flat_map(of_path).collect()
}

fn well_formed(what: &str, answer: &Answer) {
    assert!(answer.header("x-request-id").starts_with("req_"), "{what}");
    assert_eq!(answer.header("x-content-type-options"), "nosniff", "{what}");
    if answer.status.is_success() {
        return;
    }
    let code = answer.body["code"].as_str().unwrap_or_default().to_owned();
    answer.is_problem(what, answer.status.as_u16(), &code);
    assert!(!answer.text.contains(PASSWORD), "{what}: a secret in {}", answer.text);
}

#[test]
fn every_operation_has_a_row_and_every_row_an_operation() {
    let in_document: BTreeSet<String> = operations().into_iter().map(|(operation, _)| operation).collect();
    let in_table: BTreeSet<String> = ROWS.iter().map(|row| row.operation.to_owned()).collect();
    let missing: Vec<_> = in_document.difference(&in_table).collect();
    let gone: Vec<_> = in_table.difference(&in_document).collect();
    assert!(missing.is_empty() && gone.is_empty(), "without a row: {missing:?}; without an operation: {gone:?}");
    assert_eq!(ROWS.len(), in_document.len(), "a row is there twice");
}

#[test]
fn what_is_public_is_on_the_list_and_everything_else_names_its_credentials() {
    let public: Vec<String> =
        operations().into_iter().filter(|(_, needs)| !needs).map(|(operation, _)| operation).collect();
    assert_eq!(public, PUBLIC);
    for row in ROWS {
        assert_eq!(row.status[0] == 200, PUBLIC.contains(&row.operation), "{}", row.operation);
    }
}

#[tokio::test]
async fn nobody_gets_what_is_not_theirs() {
    let scene = Scene::new().await;
    for row in ROWS {
        let (method, template) = row.operation.split_once(' ').unwrap();
        for (caller, status) in CALLERS.into_iter().zip(row.status) {
            let what = format!("{} as {caller:?}", row.operation);
            let mut call = scene.sign(caller, scene.platform.call(method, &scene.path(template)));
            if let Some(body) = row.body {
                call = call.json(&scene.body(body));
            }
            let answer = call.send().await;
            assert_eq!(answer.status, status, "{what}: {}", answer.text);
            well_formed(&what, &answer);
            if !PUBLIC.contains(&row.operation) {
                assert_eq!(answer.header("cache-control"), "no-store", "{what}");
            }
            let of_tenant = template.starts_with("/api/v1/") && status != 401 && !PUBLIC.contains(&row.operation);
            let rated = answer.headers.contains_key("ratelimit") && answer.headers.contains_key("ratelimit-policy");
            assert!(!of_tenant || rated, "{what}: no rate limit");
            let shown = answer.text.contains(&scene.device) && status < 400 && caller != Caller::PlatformAdmin;
            assert!(!shown, "{what}: {}", answer.text);
        }
    }
    let still = scene.victim.call(&scene.platform, "GET", &format!("/api/v1/devices/{}", scene.device)).send().await;
    assert_eq!(still.status, 200, "the device is untouched");
    let refreshed = scene.platform.post("/api/v1/auth/refresh", &json!({"refresh_token": scene.foreigner.refresh}));
    assert_eq!(refreshed.backend(&scene.foreign_tenant).send().await.status, 200, "and so are the logins");
}

#[tokio::test]
async fn an_id_of_another_kind_or_of_none_is_not_found() {
    let scene = Scene::new().await;
    let uuid = uuid::Uuid::now_v7().to_string();
    let ids = ["%00", "..%2f..%2fadmin", "a%0d%0aSet-Cookie:%20x=1", "%ff%fe", "dev_", &"x".repeat(5_000), &uuid];
    for row in ROWS.iter().filter(|row| row.operation.contains('{')) {
        let (method, template) = row.operation.split_once(' ').unwrap();
        for id in ids {
            let path = template.split('/').map(|part| if part.starts_with('{') { id } else { part });
            let path = path.collect::<Vec<_>>().join("/");
            let staff = template.starts_with("/admin");
            let caller = if staff { Caller::PlatformAdmin } else { Caller::Neighbour };
            let mut call = scene.sign(caller, scene.platform.call(method, &path));
            if let Some(body) = row.body {
                call = call.json(&scene.body(body));
            }
            let answer = call.refused(404, "NOT_FOUND").await;
            assert!(!answer.headers.contains_key("set-cookie"), "{path}");
        }
    }
}

/// A write that succeeds: who makes it, where and with what.
struct Write {
    operation: &'static str,
    call: fn(&Scene, &Made) -> (String, Option<Value>),
    by: By,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Staff,
    Backend,
    User,
}

/// What earlier writes have made.
struct Made {
    tenant: String,
    pool: String,
    server: String,
    refresh: String,
}

const WRITES: &[Write] = &[
    Write {
        operation: "POST /api/v1/auth/register",
        call: |_, _| ("/api/v1/auth/register".into(), Some(json!({"email": "new@example.com", "password": PASSWORD}))),
        by: By::Backend,
    },
    Write {
        operation: "POST /api/v1/auth/login",
        call: |_, _| ("/api/v1/auth/login".into(), Some(json!({"email": "new@example.com", "password": PASSWORD}))),
        by: By::Backend,
    },
    Write {
        operation: "POST /api/v1/auth/refresh",
        call: |scene, _| ("/api/v1/auth/refresh".into(), Some(json!({"refresh_token": scene.foreigner.refresh}))),
        by: By::Backend,
    },
    Write {
        operation: "POST /api/v1/auth/logout",
        call: |_, made| ("/api/v1/auth/logout".into(), Some(json!({"refresh_token": made.refresh}))),
        by: By::Backend,
    },
    Write {
        operation: "POST /api/v1/devices",
        call: |_, _| ("/api/v1/devices".into(), Some(json!({"device_name": "second"}))),
        by: By::User,
    },
    Write {
        operation: "POST /api/v1/devices/{device_id}/rotate-key",
        call: |scene, _| (format!("/api/v1/devices/{}/rotate-key", scene.device), Some(json!({}))),
        by: By::User,
    },
    Write {
        operation: "POST /api/v1/vpn/connect",
        call: |scene, _| ("/api/v1/vpn/connect".into(), Some(json!({"device_id": scene.device}))),
        by: By::User,
    },
    Write {
        operation: "POST /api/v1/vpn/disconnect",
        call: |scene, _| ("/api/v1/vpn/disconnect".into(), Some(json!({"device_id": scene.device}))),
        by: By::User,
    },
    Write {
        operation: "DELETE /api/v1/devices/{device_id}",
        call: |scene, _| (format!("/api/v1/devices/{}", scene.device), None),
        by: By::User,
    },
    Write {
        operation: "POST /admin/tenants",
        call: |_, _| ("/admin/tenants".into(), Some(json!({"name": "Third"}))),
        by: By::Staff,
    },
    Write {
        operation: "PATCH /admin/tenants/{tenant_id}",
        call: |_, made| (format!("/admin/tenants/{}", made.tenant), Some(json!({"name": "Renamed"}))),
        by: By::Staff,
    },
    Write {
        operation: "POST /admin/tenants/{tenant_id}/suspend",
        call: |_, made| (format!("/admin/tenants/{}/suspend", made.tenant), None),
        by: By::Staff,
    },
    Write {
        operation: "POST /admin/tenants/{tenant_id}/resume",
        call: |_, made| (format!("/admin/tenants/{}/resume", made.tenant), None),
        by: By::Staff,
    },
    Write {
        operation: "DELETE /admin/tenants/{tenant_id}",
        call: |_, made| (format!("/admin/tenants/{}", made.tenant), None),
        by: By::Staff,
    },
    Write {
        operation: "POST /admin/pools",
        call: |_, _| ("/admin/pools".into(), Some(json!({"name": "second", "ipv4": "10.9.0.0/16"}))),
        by: By::Staff,
    },
    Write {
        operation: "PATCH /admin/pools/{pool_id}",
        call: |_, made| (format!("/admin/pools/{}", made.pool), Some(json!({"quarantine_seconds": 5}))),
        by: By::Staff,
    },
    Write {
        operation: "POST /admin/servers",
        call: |_, _| {
            let body = json!({"name": "s2", "region": "lab-2", "public_ip": "203.0.113.11"});
            ("/admin/servers".into(), Some(body))
        },
        by: By::Staff,
    },
    Write {
        operation: "POST /admin/servers/{server_id}/enrol-token",
        call: |_, made| (format!("/admin/servers/{}/enrol-token", made.server), None),
        by: By::Staff,
    },
    Write {
        operation: "POST /admin/servers/{server_id}/drain",
        call: |scene, _| (format!("/admin/servers/{}/drain", scene.server), None),
        by: By::Staff,
    },
    Write {
        operation: "POST /admin/servers/{server_id}/maintenance",
        call: |scene, _| (format!("/admin/servers/{}/maintenance", scene.server), None),
        by: By::Staff,
    },
    Write {
        operation: "POST /admin/servers/{server_id}/activate",
        call: |scene, _| (format!("/admin/servers/{}/activate", scene.server), None),
        by: By::Staff,
    },
    Write {
        operation: "DELETE /admin/servers/{server_id}",
        call: |_, made| (format!("/admin/servers/{}", made.server), None),
        by: By::Staff,
    },
    Write {
        operation: "DELETE /admin/pools/{pool_id}",
        call: |_, made| (format!("/admin/pools/{}", made.pool), None),
        by: By::Staff,
    },
];

#[tokio::test]
async fn every_write_leaves_an_entry_and_a_retry_of_it_leaves_none() {
    let writes = operations().into_iter().map(|(operation, _)| operation).filter(|name| !name.starts_with("GET "));
    let listed: BTreeSet<String> = WRITES.iter().map(|write| write.operation.to_owned()).collect();
    assert_eq!(writes.collect::<BTreeSet<_>>(), listed, "every write of the document is tried here");

    let scene = Scene::new().await;
    let mut made = Made {
        tenant: String::new(),
        pool: String::new(),
        server: String::new(),
        refresh: scene.foreigner.refresh.clone(),
    };
    for (index, write) in WRITES.iter().enumerate() {
        let (method, _) = write.operation.split_once(' ').unwrap();
        let (path, body) = (write.call)(&scene, &made);
        let call = || {
            let call = scene.platform.call(method, &path).header("idempotency-key", &format!("k{index}"));
            let call = body.iter().fold(call, |call, body| call.json(body));
            match write.by {
                By::Staff => scene.sign(Caller::PlatformAdmin, call),
                By::Backend => call.backend(&scene.foreign_tenant),
                By::User => scene.victim.signs(call),
            }
        };
        let before = scene.entries().await;
        let first = call().send().await;
        assert!(first.status.is_success(), "{}: {}", write.operation, first.text);
        let after = scene.entries().await;
        assert!(after > before, "{} leaves no entry", write.operation);
        let again = call().send().await;
        assert_eq!(
            (again.status, again.header("idempotency-replayed")),
            (first.status, "true"),
            "{}: {}",
            write.operation,
            again.text
        );
        assert_eq!(scene.entries().await, after, "{}: the retry did something", write.operation);
        match write.operation {
            "POST /admin/tenants" => made.tenant = first.text("id"),
            "POST /admin/pools" => made.pool = first.text("id"),
            "POST /admin/servers" => made.server = first.body["server"]["id"].as_str().unwrap().to_owned(),
            "POST /api/v1/auth/refresh" => made.refresh = first.text("refresh_token"),
            _ => {}
        }
    }
}
