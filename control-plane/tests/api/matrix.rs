//! Every operation of the OpenAPI document, asked by every kind of caller for what is not theirs: the exact status. An
//! operation without a row here fails the test, and so does a row without an operation.
//!
//! The same walk looks at what every answer must have, and at the audit entry of every write.

mod ids;
mod refusals;
mod rows;
mod scene;
mod writes;

use std::collections::BTreeSet;

use cvault_control_plane::http::openapi;
use serde_json::{Value, json};

use crate::platform::{Answer, PASSWORD};
use rows::{CALLERS, Caller, PUBLIC, ROWS};
use scene::Scene;

fn document() -> Value {
    serde_json::from_str(openapi::document_text()).unwrap()
}

/// `METHOD /path` of every operation in the document, and whether it says that it needs credentials.
pub(crate) fn operations() -> Vec<(String, bool)> {
    let document = document();
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

/// A refusal whose code is not one of those that the document says of its status, with an example of the same shape.
fn not_in_document(document: &Value, operation: &str, answer: &Answer) -> Option<String> {
    if answer.status.is_success() {
        return None;
    }
    let (method, path) = operation.split_once(' ').unwrap();
    let responses = &document["paths"][path][method.to_lowercase()]["responses"];
    let examples = &responses[answer.status.as_str()]["content"]["application/problem+json"]["examples"];
    let code = answer.body["code"].as_str().unwrap_or_default();
    let example = &document["components"]["examples"][code]["value"];
    let same =
        ["type", "title", "status", "code", "retryable"].iter().all(|field| example[*field] == answer.body[*field]);
    let there = examples.get(code).is_some() && same;
    (!there).then(|| format!("{operation}: {} {code}", answer.status))
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
        if PUBLIC.contains(&row.operation) {
            let first = row.status[0];
            assert!(row.status.iter().all(|status| *status == first), "{}: the same for everybody", row.operation);
        } else {
            assert_eq!(row.status[0], 401, "{}", row.operation);
        }
    }
}

/// What anybody may keep a copy of.
fn cacheable(operation: &str) -> bool {
    PUBLIC.contains(&operation) && operation.starts_with("GET ")
}

#[tokio::test]
async fn nobody_gets_what_is_not_theirs() {
    let document = document();
    let mut undocumented = BTreeSet::new();
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
            undocumented.extend(not_in_document(&document, row.operation, &answer));
            if !cacheable(row.operation) {
                assert_eq!(answer.header("cache-control"), "no-store", "{what}");
            }
            let of_tenant = template.starts_with("/api/v1/") && status != 401 && !PUBLIC.contains(&row.operation);
            let rated = answer.headers.contains_key("ratelimit") && answer.headers.contains_key("ratelimit-policy");
            assert!(!of_tenant || rated, "{what}: no rate limit");
            shows_nothing_of_the_victim(&scene, caller, &what, &answer);
        }
    }
    assert!(undocumented.is_empty(), "not in the document: {undocumented:#?}");
    let still = scene.victim.call(&scene.platform, "GET", &format!("/api/v1/devices/{}", scene.device)).send().await;
    assert_eq!(still.status, 200, "the device is untouched");
    let refreshed = scene.platform.post("/api/v1/auth/refresh", &json!({"refresh_token": scene.foreigner.refresh}));
    assert_eq!(refreshed.backend(&scene.foreign_tenant).send().await.status, 200, "and so are the logins");
    let owner = json!({"email": "owner@victim.example", "password": PASSWORD});
    assert_eq!(scene.platform.post(scene::LOGIN, &owner).send().await.status, 200, "also in the portal");
}

fn shows_nothing_of_the_victim(scene: &Scene, caller: Caller, what: &str, answer: &Answer) {
    let hidden = match caller {
        Caller::PlatformAdmin | Caller::Viewer | Caller::Billing | Caller::Developer | Caller::Admin => return,
        // they have the tenant's key themselves
        Caller::Neighbour | Caller::NarrowKey => &scene.of_the_victim()[..2],
        Caller::Anonymous
        | Caller::WrongKey
        | Caller::MixedTenants
        | Caller::ForeignUser
        | Caller::ForeignBackend
        | Caller::ForeignOwner => &scene.of_the_victim()[..],
    };
    for secret in hidden {
        assert!(!answer.text.contains(secret), "{what}: {secret} in {}", answer.text);
    }
}

/// What staff may do to a tenant that is there, with approvals on: the exact status without one.
const OF_A_TENANT: &[(&str, Option<&str>, u16)] = &[
    ("GET /admin/tenants/{tenant_id}", None, 200),
    ("PATCH /admin/tenants/{tenant_id}", Some("{}"), 200),
    ("PATCH /admin/tenants/{tenant_id}", Some(r#"{"user_limit": 7}"#), 428),
    ("PATCH /admin/tenants/{tenant_id}", Some(r#"{"policy": {"allow_smtp": true}}"#), 428),
    ("PATCH /admin/tenants/{tenant_id}", Some(r#"{"status": "suspended"}"#), 428),
    ("POST /admin/tenants/{tenant_id}/suspend", None, 428),
    ("POST /admin/tenants/{tenant_id}/resume", None, 200),
    ("DELETE /admin/tenants/{tenant_id}", None, 428),
];

#[tokio::test]
async fn a_tenant_that_is_there_is_suspended_or_deleted_with_an_approval_and_by_nobody_but_staff() {
    let of_a_tenant = |operation: &String| operation.contains("/admin/tenants/{tenant_id}");
    let in_document: BTreeSet<String> = operations().into_iter().map(|(name, _)| name).filter(of_a_tenant).collect();
    let listed: BTreeSet<String> = OF_A_TENANT.iter().map(|(operation, _, _)| (*operation).to_owned()).collect();
    assert_eq!(in_document, listed);
    let scene = Scene::new().await;
    assert!(scene.platform.app.config.admin_step_up);
    for (operation, body, status) in OF_A_TENANT {
        let (method, template) = operation.split_once(' ').unwrap();
        for caller in CALLERS {
            // to who may not, it is all the same whether the tenant is there
            for (tenant, status) in [(scene.tenant.as_str(), *status), ("ten_00000000000000000000000001", 404)] {
                let status = if caller == Caller::PlatformAdmin { status } else { 401 };
                let call = scene.platform.call(method, &template.replace("{tenant_id}", tenant));
                let call = body.iter().fold(call, |call, body| call.json(&scene.body(body)));
                let (what, answer) = (format!("{operation} as {caller:?}"), scene.sign(caller, call).send().await);
                assert_eq!(answer.status, status, "{what}: {}", answer.text);
                well_formed(&what, &answer);
            }
        }
    }
    let still = scene.victim.call(&scene.platform, "GET", &format!("/api/v1/devices/{}", scene.device)).send().await;
    assert_eq!(still.status, 200, "the tenant is untouched");
}

#[tokio::test]
async fn an_id_of_another_kind_or_of_none_is_not_found() {
    let scene = Scene::new().await;
    let uuid = uuid::Uuid::now_v7().to_string();
    let broken = ["%00", "..%2f..%2fadmin", "a%0d%0aSet-Cookie:%20x=1", "%ff%fe", "dev_", &"x".repeat(5_000), &uuid];
    // a tenant's own names for its users are no ids of ours
    for row in ROWS.iter().filter(|row| row.operation.contains("_id}") && !row.operation.contains("{external_id}")) {
        let (method, template) = row.operation.split_once(' ').unwrap();
        let own = scene.path(template.split('/').find(|part| part.starts_with('{')).unwrap());
        let others = ids::of_other_kinds(&scene, &own);
        for id in broken.into_iter().map(str::to_owned).chain(others) {
            let path = template.split('/').map(|part| if part.starts_with('{') { id.as_str() } else { part });
            let path = path.collect::<Vec<_>>().join("/");
            let caller = match template.split('/').nth(3) {
                _ if template.starts_with("/admin") => Caller::PlatformAdmin,
                Some("tenant") => Caller::Admin,
                Some("users") => Caller::ForeignBackend,
                _ => Caller::Neighbour,
            };
            let mut call = scene.sign(caller, scene.platform.call(method, &path));
            if let Some(body) = row.body {
                call = call.json(&scene.body(body));
            }
            let answer = call.refused(404, "NOT_FOUND").await;
            assert!(!answer.headers.contains_key("set-cookie"), "{path}");
        }
    }
}
