//! Calls that must be refused, each with its exact answer, over real HTTP.

use cvault_tests::platform::{Answer, ControlOptions, Platform, Request, Tenant, User};
use reqwest::Method;
use serde_json::json;

struct Case {
    what: &'static str,
    request: Request,
    status: u16,
    code: &'static str,
}

fn case(what: &'static str, request: Request, status: u16, code: &'static str) -> Case {
    Case { what, request, status, code }
}

#[test]
fn every_refusal_is_a_problem_document_with_its_own_status_and_code() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    let acme = platform.tenant("Acme").unwrap();
    let globex = platform.tenant("Globex").unwrap();
    let user = platform.user(&acme, "ada@example.com").unwrap();
    let mut failures = Vec::new();
    for case in credentials(&acme, &globex, &user).into_iter().chain(bodies(&acme, &user)) {
        let answer = platform.http.send(&case.request).unwrap();
        if let Some(fault) = fault(&answer, case.status, case.code) {
            failures.push(format!("{}: {fault}", case.what));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    platform.check_logs_hold_no_secret().unwrap();
}

#[test]
fn a_refresh_token_works_once_and_its_reuse_ends_the_family() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    let tenant = platform.tenant("Acme").unwrap();
    let user = platform.user(&tenant, "ada@example.com").unwrap();
    let refresh = |token: &str| {
        platform
            .http
            .send(&tenant.sign(Request::post("/api/v1/auth/refresh", &json!({ "refresh_token": token }))))
            .unwrap()
    };
    let first = refresh(&user.refresh_token).expect(200).unwrap();
    let second = first["refresh_token"].as_str().unwrap().to_owned();
    platform.lab.secret("refresh token", &second);
    platform.lab.secret("access token", first["access_token"].as_str().unwrap());
    assert_ne!(second, user.refresh_token);
    let reused = refresh(&user.refresh_token);
    assert_eq!((reused.status, reused.code().as_str()), (401, "TOKEN_REUSED"));
    assert_eq!(refresh(&second).status, 401, "the whole family is revoked");
    platform.check_logs_hold_no_secret().unwrap();
}

fn credentials(acme: &Tenant, globex: &Tenant, user: &User) -> Vec<Case> {
    let devices = || Request::get("/api/v1/devices");
    let login = || Request::post("/api/v1/auth/login", &json!({ "email": user.email, "password": user.password }));
    let bearer = format!("Bearer {}", user.access_token);
    let tampered = format!("Bearer {}x{}", &user.access_token[..user.access_token.len() - 6], "AAAAA");
    vec![
        case("no key", login(), 401, "INVALID_API_KEY"),
        case(
            "unknown key",
            login().header("X-API-Key", "cvk_nonsense").header("X-API-Secret", &acme.api_secret),
            401,
            "INVALID_API_KEY",
        ),
        case("key without secret", login().header("X-API-Key", &acme.api_key), 401, "INVALID_API_KEY"),
        case(
            "wrong secret",
            login().header("X-API-Key", &acme.api_key).header("X-API-Secret", "cvs_wrong"),
            401,
            "INVALID_API_KEY",
        ),
        case(
            "another tenant's secret",
            login().header("X-API-Key", &acme.api_key).header("X-API-Secret", &globex.api_secret),
            401,
            "INVALID_API_KEY",
        ),
        case("the user of another tenant", globex.sign(login()), 401, "INVALID_CREDENTIALS"),
        case("no token", devices().header("X-API-Key", &acme.api_key), 401, "INVALID_TOKEN"),
        case(
            "nonsense token",
            devices().header("X-API-Key", &acme.api_key).header("Authorization", "Bearer x.y.z"),
            401,
            "INVALID_TOKEN",
        ),
        case(
            "tampered token",
            devices().header("X-API-Key", &acme.api_key).header("Authorization", &tampered),
            401,
            "INVALID_TOKEN",
        ),
        case(
            "another tenant's key",
            devices().header("X-API-Key", &globex.api_key).header("Authorization", &bearer),
            401,
            "INVALID_TOKEN",
        ),
        case(
            "a user's token for the admin",
            Request::get("/admin/tenants").header("Authorization", &bearer),
            401,
            "INVALID_TOKEN",
        ),
        case("nobody for the admin", Request::get("/admin/tenants"), 401, "INVALID_TOKEN"),
        case(
            "a secret from a browser",
            acme.sign(login()).header("Origin", "https://evil.example"),
            403,
            "SECRET_KEY_IN_BROWSER",
        ),
    ]
}

fn bodies(acme: &Tenant, user: &User) -> Vec<Case> {
    let register = |body: &[u8]| {
        acme.sign(Request::new(Method::POST, "/api/v1/auth/register"))
            .header("Content-Type", "application/json")
            .raw_body(body.to_vec())
    };
    let device = |body: serde_json::Value| user.sign(Request::post("/api/v1/devices", &body));
    vec![
        case("not JSON", register(b"{\"email\":"), 400, "MALFORMED_REQUEST"),
        case("not UTF-8", register(b"{\"email\":\"\xff\"}"), 400, "MALFORMED_REQUEST"),
        case(
            "a form",
            acme.sign(Request::new(Method::POST, "/api/v1/auth/register"))
                .header("Content-Type", "application/x-www-form-urlencoded")
                .raw_body(b"email=a".to_vec()),
            415,
            "UNSUPPORTED_MEDIA_TYPE",
        ),
        case("more than 1 MiB", register(&vec![b' '; 1024 * 1024 + 1]), 413, "PAYLOAD_TOO_LARGE"),
        case("missing fields", register(b"{}"), 422, "VALIDATION_FAILED"),
        case(
            "an unknown field",
            register(br#"{"email":"b@example.com","password":"TestPass123!","admin":true}"#),
            422,
            "VALIDATION_FAILED",
        ),
        case(
            "no e-mail address",
            register(br#"{"email":"nobody","password":"TestPass123!"}"#),
            422,
            "VALIDATION_FAILED",
        ),
        case("a short password", register(br#"{"email":"b@example.com","password":"x"}"#), 422, "VALIDATION_FAILED"),
        case("an empty device name", device(json!({ "device_name": "" })), 422, "VALIDATION_FAILED"),
        case(
            "a line break in a device name",
            device(json!({ "device_name": "a\nPrivateKey = x" })),
            422,
            "VALIDATION_FAILED",
        ),
        case("no server at all", device(json!({ "device_name": "laptop" })), 503, "SERVER_UNAVAILABLE"),
        case("an id that is none", user.get_request("/api/v1/devices/1%20or%201=1"), 404, "NOT_FOUND"),
        case("an unknown route", Request::get("/api/v1/nothing"), 404, "NOT_FOUND"),
        case("a wrong method", acme.sign(Request::new(Method::PUT, "/api/v1/auth/login")), 405, "METHOD_NOT_ALLOWED"),
    ]
}

/// What is wrong with an answer that should be this problem.
fn fault(answer: &Answer, status: u16, code: &str) -> Option<String> {
    let kind = answer.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let body = answer.json().unwrap_or_default();
    if (answer.status, body["code"].as_str()) != (status, Some(code)) {
        return Some(format!("wanted {status} {code}, got {} {}", answer.status, answer.text()));
    }
    if !kind.starts_with("application/problem+json") {
        return Some(format!("content type {kind}"));
    }
    if body["status"] != status || body["type"] != format!("https://docs.cvault.io/errors/{code}") {
        return Some(format!("inconsistent document {body}"));
    }
    let request_id = answer.headers.get("x-request-id").and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !request_id.starts_with("req_") || body["request_id"] != request_id {
        return Some(format!("request id {request_id} beside {}", body["request_id"]));
    }
    None
}
