//! The one line that each request leaves in the log, and what must never be in one.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::binary::{KEK, eventually};
use crate::platform::{PASSWORD, Platform};
use crate::scene::{Person, with_server};
use crate::transport::Serving;

/// A request as it goes over the wire, and what its line must say.
struct Asked<'a> {
    line: String,
    headers: Vec<(&'a str, String)>,
    body: Option<Value>,
    status: u16,
    route: &'a str,
    tenant: Option<&'a str>,
    trace_id: Option<&'a str>,
}

struct Answer {
    request_id: String,
    status: u16,
    body: String,
}

async fn send(address: &str, asked: &Asked<'_>) -> Answer {
    let body = asked.body.as_ref().map(Value::to_string).unwrap_or_default();
    let mut text = format!("{} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n", asked.line);
    for (name, value) in &asked.headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if asked.body.is_some() {
        text.push_str(&format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len()));
    }
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{text}\r\n{body}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let header = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap_or_else(|| panic!("no {name} in {head}")).to_owned()
    };
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { request_id: header("x-request-id"), status, body: body.to_owned() }
}

fn lines_of(serving: &Serving, request_id: &str) -> Vec<Value> {
    let log = serving.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["message"] == "request" && line["request_id"] == request_id).collect()
}

#[tokio::test]
async fn each_request_leaves_one_line_with_what_it_was_and_no_secret() {
    let (platform, directory) = (Platform::start().await, tempfile::tempdir().unwrap());
    with_server(&platform).await;
    let tenant = platform.tenant().await;
    let person = Person::of(&platform, &tenant, "somebody@example.com").await;
    let staff = platform.admin_token();
    let serving = Serving::beside(&platform, directory.path());
    let address = serving.address();

    let backend = || vec![("x-api-key", tenant.key.clone()), ("x-api-secret", tenant.secret.clone())];
    let user = || vec![("x-api-key", tenant.key.clone()), ("authorization", format!("Bearer {}", person.token))];
    let with = |mut headers: Vec<(&'static str, String)>, more: &[(&'static str, &str)]| {
        headers.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        headers
    };
    let (of_tenant, nobodys) = (Some(tenant.id.as_str()), "usr_00000000000000000000000001");
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let asked = [
        Asked {
            line: "GET /api/v1/users?email=quagga%40example.com".to_owned(),
            headers: with(backend(), &[("x-request-id", "of-the-caller"), ("x-correlation-id", "okapi")]),
            body: None,
            status: 200,
            route: "/api/v1/users",
            tenant: of_tenant,
            trace_id: None,
        },
        Asked {
            line: format!("GET /api/v1/users/{nobodys}"),
            headers: with(backend(), &[("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"))]),
            body: None,
            status: 404,
            route: "/api/v1/users/{user_id}",
            tenant: of_tenant,
            trace_id: Some(trace),
        },
        Asked {
            line: "POST /api/v1/auth/login".to_owned(),
            headers: with(backend(), &[("traceparent", "00-of-no-use-01"), ("idempotency-key", "narwhal")]),
            body: Some(json!({"email": "somebody@example.com", "password": PASSWORD})),
            status: 200,
            route: "/api/v1/auth/login",
            tenant: of_tenant,
            trace_id: None,
        },
        Asked {
            line: "POST /api/v1/devices".to_owned(),
            headers: user(),
            body: Some(json!({"device_name": "ocelot", "preshared_key": true})),
            status: 201,
            route: "/api/v1/devices",
            tenant: of_tenant,
            trace_id: None,
        },
        Asked {
            line: "GET /admin/tenants".to_owned(),
            headers: vec![("authorization", format!("Bearer {staff}"))],
            body: None,
            status: 200,
            route: "/admin/tenants",
            tenant: None,
            trace_id: None,
        },
        Asked {
            line: "GET /api/v1/devices".to_owned(),
            headers: vec![("x-api-key", "cvk_tapir".to_owned()), ("authorization", "Bearer tapir".to_owned())],
            body: None,
            status: 401,
            route: "/api/v1/devices",
            tenant: None,
            trace_id: None,
        },
        Asked {
            line: "GET /nowhere/with-a-secret".to_owned(),
            headers: Vec::new(),
            body: None,
            status: 404,
            route: "unmatched",
            tenant: None,
            trace_id: None,
        },
    ];
    let mut secrets = [&tenant.key, &tenant.secret, &person.token, &person.refresh, &staff].map(String::clone).to_vec();
    secrets.extend(
        [
            PASSWORD,
            KEK,
            nobodys,
            "somebody@example.com",
            "quagga",
            "of-the-caller",
            "okapi",
            "tapir",
            "narwhal",
            "ocelot",
            "with-a-secret",
            "of-no-use",
            "PrivateKey",
        ]
        .map(str::to_owned),
    );
    for asked in &asked {
        let answer = send(&address, asked).await;
        let what = format!("{}: {}", asked.line, answer.body);
        assert_eq!(answer.status, asked.status, "{what}");
        assert!(answer.request_id.starts_with("req_"), "ours, whatever the caller sends: {what}");
        eventually("the request is logged", || !lines_of(&serving, &answer.request_id).is_empty());
        let [line] = &lines_of(&serving, &answer.request_id)[..] else { panic!("more than one line: {what}") };
        assert_eq!(line["method"], asked.line.split(' ').next().unwrap(), "{what}");
        assert_eq!((&line["route"], &line["status"]), (&json!(asked.route), &json!(asked.status)), "{what}");
        assert_eq!(line["tenant"], json!(asked.tenant), "{what}");
        assert_eq!(line["trace_id"], json!(asked.trace_id), "{what}");
        assert!(line["duration_ms"].as_f64().is_some_and(|took| took > 0.0), "{what}: {line}");
        assert!(line["timestamp"].is_string() && line["level"] == "INFO", "{what}: {line}");
        if let Ok(body) = serde_json::from_str::<Value>(&answer.body) {
            secrets.extend(
                ["access_token", "refresh_token"].iter().filter_map(|name| body[name].as_str().map(str::to_owned)),
            );
            let config = body["config"].as_str().unwrap_or_default();
            let keys = config.lines().filter_map(|line| line.split_once("Key = ").map(|(_, key)| key.to_owned()));
            secrets.extend(keys);
        }
    }
    assert!(secrets.len() >= 18 + 2 + 3, "of two answers too");
    let log = serving.log();
    for secret in &secrets {
        assert!(!log.contains(secret.as_str()), "{secret} is in the log");
    }
    let requests = log.lines().filter(|line| line.contains("\"message\":\"request\"")).count();
    assert_eq!(requests, asked.len(), "one line each");
}
