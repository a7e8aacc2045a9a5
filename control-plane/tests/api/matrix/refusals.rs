//! Refusals that depend on more than who asks: each operation answers them exactly where the document says so.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::rows::{Caller, PUBLIC, ROWS, Row};
use super::scene::{LOGIN, Scene};
use super::{document, not_in_document};
use crate::platform::{Answer, Call, PASSWORD};

/// Whether the document names `code` for the operation.
fn says(document: &Value, operation: &str, status: u16, code: &str) -> bool {
    let (method, path) = operation.split_once(' ').unwrap();
    let response = &document["paths"][path][method.to_lowercase()]["responses"][status.to_string()];
    response["content"]["application/problem+json"]["examples"].get(code).is_some()
}

fn is_portal(row: &Row) -> bool {
    row.operation.contains(" /api/v1/tenant/")
}

fn call<'a>(scene: &'a Scene, row: &Row) -> Call<'a> {
    let (method, template) = row.operation.split_once(' ').unwrap();
    let call = scene.platform.call(method, &scene.path(template));
    match row.body {
        Some(body) => call.json(&scene.body(body)),
        None => call,
    }
}

/// Refused with this status and code where the document says so of the operation, and nowhere else.
fn as_documented(document: &Value, row: &Row, status: u16, code: &str, answer: &Answer) -> Vec<String> {
    let refused = answer.status == status && answer.body["code"] == code;
    let expected = says(document, row.operation, status, code);
    let wrong = (refused != expected).then(|| format!("{}: {} {}", row.operation, answer.status, answer.text));
    wrong.into_iter().chain(not_in_document(document, row.operation, answer)).collect()
}

#[tokio::test]
async fn people_of_a_suspended_tenant_are_refused_where_the_document_says_so() {
    let (scene, document) = (Scene::new().await, document());
    sqlx::query("update cvault.tenants set status = 'suspended'")
        .execute(&mut scene.platform.superuser().await)
        .await
        .unwrap();
    let (logout, others): (Vec<_>, Vec<_>) = ROWS
        .iter()
        .filter(|row| is_portal(row) && !PUBLIC.contains(&row.operation))
        .partition(|row| row.operation.ends_with("/logout"));
    assert_eq!(logout.len(), 1);
    let (mut wrong, mut refused) = (BTreeSet::new(), 0);
    // logging out comes last: nobody would be there to ask for the rest
    for row in others.into_iter().chain(logout) {
        let answer = scene.sign(Caller::Admin, call(&scene, row)).send().await;
        refused += u32::from(answer.body["code"] == "TENANT_SUSPENDED");
        wrong.extend(as_documented(&document, row, 403, "TENANT_SUSPENDED", &answer));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(refused >= 11, "{refused} were refused");
}

#[tokio::test]
async fn pages_of_another_origin_are_refused_where_the_document_says_so() {
    let (scene, document) = (Scene::new().await, document());
    let owner = json!({"email": "owner@victim.example", "password": PASSWORD});
    let login = scene.platform.post(LOGIN, &owner).header("sec-fetch-site", "same-origin").send().await;
    let cookie = login.header("set-cookie").split(';').next().unwrap().to_owned();
    let mut wrong = BTreeSet::new();
    for row in ROWS.iter().filter(|row| is_portal(row) || PUBLIC.contains(&row.operation)) {
        let foreign = || call(&scene, row).header("sec-fetch-site", "cross-site");
        let answers = match PUBLIC.contains(&row.operation) {
            true => vec![foreign().send().await, foreign().header("cookie", &cookie).send().await],
            false => vec![foreign().header("cookie", &cookie).send().await],
        };
        for answer in answers {
            wrong.extend(as_documented(&document, row, 403, "ORIGIN_NOT_ALLOWED", &answer));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let still = scene.platform.call("GET", "/api/v1/tenant/me").header("cookie", &cookie).send().await;
    assert_eq!(still.status, 200, "the session goes on");
}

/// What is refused in front of every route that callers use is documented of each, those that anybody may ask included.
#[test]
fn only_operators_are_never_sent_away() {
    let document = document();
    for row in ROWS {
        let operators = ["GET /health", "GET /health/ready", "GET /metrics"].contains(&row.operation);
        for (status, code) in [(403, "HTTPS_REQUIRED"), (503, "OVERLOADED")] {
            assert_eq!(says(&document, row.operation, status, code), !operators, "{}: {code}", row.operation);
        }
    }
}

#[test]
fn every_answer_in_the_document_has_an_exact_status_a_description_and_an_example() {
    let document = document();
    let operations = document["paths"].as_object().unwrap().iter();
    let operations = operations.flat_map(|(path, methods)| {
        methods.as_object().unwrap().iter().map(move |(method, operation)| (format!("{method} {path}"), operation))
    });
    let mut faults = BTreeSet::new();
    for (operation, description) in operations {
        for (status, response) in description["responses"].as_object().unwrap() {
            if status.parse::<u16>().is_err() {
                faults.insert(format!("{operation}: {status} is no status"));
            }
            if response["description"].as_str().is_none_or(str::is_empty) {
                faults.insert(format!("{operation}: {status} has no description"));
            }
            for (kind, content) in response["content"].as_object().into_iter().flatten() {
                if content.get("example").or(content.get("examples")).is_none_or(Value::is_null) {
                    faults.insert(format!("{operation}: {status} {kind} has no example"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}
