//! Completes what operations say of their refusals: to the codes of their own, those of everything that stands in front of
//! them, each with an example. So an operation names only what is special to it, and its words for the rest. The matrix test
//! holds every answer it sees against this.

use std::collections::{BTreeMap, BTreeSet};

use cvault_types::{ErrorCode, RequestId};
use serde_json::{Map, Value, json};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::http::{Problem, middleware};

const PROBLEM: &str = "application/problem+json";

/// Of any operation: a head that is no HTTP, and a fault of ours.
const OF_ALL: &[ErrorCode] = &[ErrorCode::MalformedRequest, ErrorCode::InternalError];
/// But not of those where operators look.
const OF_CALLERS: &[ErrorCode] = &[ErrorCode::HttpsRequired, ErrorCode::Overloaded];
/// Of what is not the same for everybody: its rate, its database.
const OF_API: &[ErrorCode] = &[ErrorCode::RateLimited, ErrorCode::DatabaseUnavailable];
const OF_BODIES: &[ErrorCode] = &[
    ErrorCode::RequestTimeout,
    ErrorCode::PayloadTooLarge,
    ErrorCode::UnsupportedMediaType,
    ErrorCode::ValidationFailed,
];
/// What people of a suspended tenant may do besides reading: leave.
const OF_SUSPENDED: &[&str] = &["/api/v1/tenant/auth/logout"];

/// Adds to every operation what it may be refused with.
pub(super) fn complete(document: &mut Value) {
    let mut used = BTreeSet::new();
    for (path, methods) in document["paths"].as_object_mut().into_iter().flatten() {
        for (method, operation) in methods.as_object_mut().into_iter().flatten() {
            for (status, codes) in by_status(path, method, operation) {
                used.extend(codes.iter().map(|code| code.as_str()));
                say(&mut operation["responses"][status.to_string()], &codes);
            }
        }
    }
    let examples = ErrorCode::ALL.iter().filter(|code| used.contains(code.as_str()));
    let examples: Map<_, _> = examples.map(|code| (code.as_str().to_owned(), example(*code))).collect();
    document["components"]["examples"] = Value::Object(examples);
}

fn by_status(path: &str, method: &str, operation: &Value) -> BTreeMap<u16, Vec<ErrorCode>> {
    let mut own = OF_ALL.to_vec();
    if !middleware::is_operators(path) {
        own.extend_from_slice(OF_CALLERS);
    }
    if path != "/api/v1/openapi.json" && (path.starts_with("/api/v1/") || path.starts_with("/admin/")) {
        own.extend_from_slice(OF_API);
    }
    for credential in credentials(operation) {
        own.extend_from_slice(of_credential(credential));
        if credential == "portal" && method != "get" && !OF_SUSPENDED.contains(&path) {
            own.push(ErrorCode::TenantSuspended);
        }
    }
    if path.contains('{') {
        own.push(ErrorCode::NotFound);
    }
    if operation.get("requestBody").is_some() {
        own.extend_from_slice(OF_BODIES);
    }
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        if parameter["in"] == "query" {
            own.push(ErrorCode::ValidationFailed);
        }
        if parameter["name"] == "Idempotency-Key" {
            own.extend([ErrorCode::ValidationFailed, ErrorCode::IdempotencyKeyInUse, ErrorCode::IdempotencyKeyReused]);
        }
    }
    let mut by_status: BTreeMap<u16, Vec<ErrorCode>> = BTreeMap::new();
    for code in ErrorCode::ALL {
        let status = code.status();
        let said = operation["responses"][status.to_string()]["description"].as_str().unwrap_or_default();
        if own.contains(code) || names(said, *code) {
            by_status.entry(status).or_default().push(*code);
        }
    }
    by_status
}

fn credentials(operation: &Value) -> impl Iterator<Item = &str> {
    let any = operation["security"].as_array().into_iter().flatten();
    any.filter_map(Value::as_object).flat_map(|all| all.keys().map(String::as_str))
}

fn of_credential(name: &str) -> &'static [ErrorCode] {
    match name {
        "api_key" => &[
            ErrorCode::InvalidApiKey,
            ErrorCode::TenantSuspended,
            ErrorCode::InsufficientScope,
            ErrorCode::OriginNotAllowed,
            ErrorCode::SecretKeyInBrowser,
        ],
        "portal" => &[ErrorCode::InvalidToken, ErrorCode::TokenExpired, ErrorCode::SessionTerminated],
        "portal_cookie" => &[ErrorCode::OriginNotAllowed],
        "user_token" | "admin" => &[ErrorCode::InvalidToken, ErrorCode::TokenExpired],
        _ => &[],
    }
}

/// Codes are words: one is not part of another.
fn names(description: &str, code: ErrorCode) -> bool {
    description.split(|letter: char| !letter.is_ascii_uppercase() && letter != '_').any(|word| word == code.as_str())
}

fn say(response: &mut Value, codes: &[ErrorCode]) {
    let said = response["description"].as_str().unwrap_or_default().to_owned();
    let missing = codes.iter().filter(|code| !names(&said, **code)).map(|code| code.as_str().to_owned());
    let own = Some(said.clone()).filter(|said| !said.is_empty());
    response["description"] = Value::String(own.into_iter().chain(missing).collect::<Vec<_>>().join(", "));
    let content = &mut response["content"][PROBLEM];
    content["schema"] = schema();
    let example = |code: &ErrorCode| {
        let code = code.as_str();
        (code.to_owned(), json!({ "$ref": format!("#/components/examples/{code}") }))
    };
    content["examples"] = Value::Object(codes.iter().map(example).collect());
}

fn schema() -> Value {
    json!({ "$ref": "#/components/schemas/ProblemBody" })
}

fn example(code: ErrorCode) -> Value {
    let problem = Problem::new(code);
    let problem = if code == ErrorCode::ValidationFailed {
        problem.field("/email", "invalid_format", "must be an e-mail address")
    } else if code == ErrorCode::DeviceLimitExceeded {
        problem.limit("devices_per_user", 5, 5)
    } else if code == ErrorCode::BandwidthLimitExceeded {
        let next_month = OffsetDateTime::UNIX_EPOCH + Duration::days(20_788);
        problem.limit("bandwidth_bytes", 2_000_000_000_000, 2_000_000_000_000).resets_at(next_month)
    } else {
        problem
    };
    let value = serde_json::to_value(problem.body(RequestId::from_uuid(Uuid::nil()))).expect("a problem is plain data");
    json!({ "summary": code.title(), "value": value })
}
