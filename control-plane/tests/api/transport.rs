//! What protects every answer on its way, and TLS and the keys as an operator handles them.

use std::convert::Infallible;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use axum::body::{Body, Bytes};
use cvault_control_plane::http::router;
use cvault_control_plane::http::serve::{Limits, Peer, serve as serve_plain};
use http::Request;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustix::process::Signal;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::ServiceExt;

use crate::binary::{eventually, program, serve, signal};
use crate::platform::{Answer, Platform};

const OLD_KEK: &str = "0707070707070707070707070707070707070707070707070707070707070707";
const NEW_KEK: &str = "0909090909090909090909090909090909090909090909090909090909090909";

fn is_protected(what: &str, answer: &Answer) {
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
        ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ] {
        assert_eq!(answer.header(name), value, "{what}: {name}");
    }
    assert!(!answer.header("x-request-id").is_empty(), "{what}");
}

#[tokio::test]
async fn every_answer_is_protected_and_asks_for_tls_only_where_there_is_some() {
    for (url, expected) in [("http://127.0.0.1:8080", ""), ("https://api.example.com", "max-age=31536000")] {
        let platform = Platform::with(|config| url.clone_into(&mut config.public_url)).await;
        let tenant = platform.tenant().await;
        let huge = vec![b' '; 2 << 20];
        let answers = [
            ("200", platform.call("GET", "/health").send().await),
            ("201", platform.register(&tenant, "a@example.com").await),
            (
                "400",
                platform.call("POST", "/api/v1/auth/login").backend(&tenant).raw("application/json", "{").send().await,
            ),
            ("401", platform.call("GET", "/api/v1/devices").send().await),
            ("404", platform.call("GET", "/nothing").send().await),
            ("405", platform.call("PUT", "/health").send().await),
            (
                "413",
                platform.call("POST", "/api/v1/auth/login").backend(&tenant).raw("application/json", huge).send().await,
            ),
            ("415", platform.call("POST", "/api/v1/auth/login").backend(&tenant).raw("text/plain", "x").send().await),
            (
                "422",
                platform
                    .post("/api/v1/auth/register", &json!({"email": "x", "password": "y"}))
                    .backend(&tenant)
                    .send()
                    .await,
            ),
        ];
        for (status, answer) in &answers {
            assert_eq!(answer.status.as_str(), *status, "{}", answer.text);
            is_protected(status, answer);
            assert_eq!(answer.header("strict-transport-security"), expected, "{status}");
            if *status != "200" {
                assert_eq!(answer.header("cache-control"), "no-store", "{status}");
            }
        }
    }
}

#[tokio::test]
async fn slow_bodies_of_one_network_without_credentials_leave_places_to_everybody_else() {
    let platform = Platform::start().await;
    let router = router::api(platform.app.clone());
    let slow = |number: usize| {
        let (arrives, body) = futures::channel::mpsc::unbounded::<Result<Bytes, Infallible>>();
        let request = Request::post("/api/v1/tenant/auth/login").header("content-type", "application/json");
        let peer = Peer::from(std::net::IpAddr::from([192, 0, 2, 1]));
        let request = request.extension(peer).header("x-number", number).body(Body::from_stream(body)).unwrap();
        (arrives, tokio::spawn(router.clone().oneshot(request)))
    };
    let mut held: Vec<_> = (0..100).map(slow).collect();
    let login = |ip: &str| platform.post("/api/v1/tenant/auth/login", &json!({})).from(ip);
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(4);
    while login("192.0.2.1").send().await.status != 429 {
        assert!(tokio::time::Instant::now() < deadline, "they are read without bound");
    }
    login("192.0.2.1").refused(429, "RATE_LIMITED").await;
    login("192.0.2.2").refused(422, "VALIDATION_FAILED").await;
    assert_eq!(platform.call("GET", "/health").from("192.0.2.1").send().await.status, 200);
    let (arrives, answer) = held.pop().unwrap();
    arrives.unbounded_send(Ok(Bytes::from(vec![b' '; (16 << 10) + 1]))).unwrap();
    assert_eq!(answer.await.unwrap().unwrap().status(), 413);
    let (_silent, answer) = held.pop().unwrap();
    assert_eq!(answer.await.unwrap().unwrap().status(), 408);
}

/// A `serve`; killed when dropped.
pub(crate) struct Serving {
    pub(crate) child: Child,
    log: PathBuf,
}

impl Serving {
    pub(crate) fn start(mut command: Command, directory: &Path) -> Self {
        let log = directory.join("log");
        let child = command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
        Self { child, log }
    }

    /// Of the platform's database, and with tokens that are good for both.
    pub(crate) fn beside(platform: &Platform, directory: &Path) -> Self {
        let mut command = serve(&platform.database, OLD_KEK);
        command.env("CVAULT_PUBLIC_URL", &platform.app.config.public_url).env("CVAULT_LOG", "trace");
        Self::start(command, directory)
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn address(&self) -> String {
        let mut found = None;
        eventually("the API serves", || {
            let log = self.log();
            found = log
                .lines()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
                .find(|line| line["message"] == "serving")
                .map(|line| line["listen"].as_str().unwrap().to_owned());
            found.is_some()
        });
        found.unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_certificate(directory: &Path) -> CertificateDer<'static> {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = directory.join("key.pem");
    fs::write(&key, signing_key.serialize_pem()).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(directory.join("cert.pem"), cert.pem()).unwrap();
    cert.der().clone()
}

/// Trusting `certificate` alone; `None` when the handshake fails.
async fn connected(address: &str, certificate: &CertificateDer<'static>) -> Option<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.ok()
}

/// One request over TLS.
async fn get(address: &str, certificate: &CertificateDer<'static>, path: &str) -> Option<String> {
    let mut stream = connected(address, certificate).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    Some(text)
}

#[tokio::test]
async fn the_api_speaks_tls_and_takes_a_renewed_certificate_without_a_restart() {
    let (platform, directory) = (Platform::start().await, tempfile::tempdir().unwrap());
    let dir = directory.path();
    let first = write_certificate(dir);
    let mut command = serve(&platform.database, OLD_KEK);
    command.env("CVAULT_TLS_CERT_FILE", dir.join("cert.pem")).env("CVAULT_TLS_KEY_FILE", dir.join("key.pem"));
    let serving = Serving::start(command, dir);
    let address = serving.address();

    let answer = get(&address, &first, "/health").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("strict-transport-security: max-age=31536000\r\n"), "{answer}");
    let refused = get(&address, &first, "/not here").await.unwrap();
    assert!(refused.starts_with("HTTP/1.1 400") && refused.contains("MALFORMED_REQUEST"), "{refused}");
    assert!(refused.contains("strict-transport-security: max-age=31536000\r\n"), "{refused}");

    let mut half = connected(&address, &first).await.unwrap();
    half.write_all(b"GET /health HTTP/1.1\r\nHos").await.unwrap();
    half.shutdown().await.unwrap();
    let mut refused = String::new();
    half.read_to_string(&mut refused).await.unwrap();
    assert!(refused.starts_with("HTTP/1.1 400") && refused.contains("MALFORMED_REQUEST"), "{refused}");
    assert!(refused.contains("strict-transport-security: max-age=31536000\r\n"), "{refused}");

    let mut plain = TcpStream::connect(&address).await.unwrap();
    plain.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut bytes = Vec::new();
    let _ = plain.read_to_end(&mut bytes).await;
    assert!(!String::from_utf8_lossy(&bytes).contains("HTTP/1.1"), "nothing is said in clear");

    let second = write_certificate(dir);
    signal(i32::try_from(serving.child.id()).unwrap(), Signal::HUP);
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
    while get(&address, &second, "/health").await.is_none() {
        assert!(tokio::time::Instant::now() < deadline, "{}", serving.log());
        tokio::task::yield_now().await;
    }
    assert!(get(&address, &first, "/health").await.is_none());
}

#[tokio::test]
async fn the_key_encryption_key_is_replaced_by_one_command_while_both_are_known() {
    let (platform, directory) = (Platform::start().await, tempfile::tempdir().unwrap());
    for _ in 0..3 {
        platform.tenant().await;
    }
    let pool = json!({"name": "default", "ipv4": "10.8.0.0/16"});
    let kept = platform.admin("POST", "/admin/pools").json(&pool).header("idempotency-key", "k").send().await;
    assert_eq!(kept.status, 201, "{}", kept.text);
    let keys = directory.path().join("kek");
    let admin = |lines: &str, args: &[&str]| {
        fs::write(&keys, lines).unwrap();
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
        let mut command = program();
        command.args(["admin", "--json", "keys"]).args(args).env("CVAULT_KEK_FILE", &keys);
        command.env("DATABASE_URL", platform.database.url("cvault_app"));
        command.env("CVAULT_DATABASE_SYS_URL", platform.database.url("cvault_sys"));
        let output = command.output().unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (answer, String::from_utf8(output.stderr).unwrap())
    };
    let both = format!("1:{OLD_KEK}\n2:{NEW_KEK}\n");
    let (before, _) = admin(OLD_KEK, &["status"]);
    let secrets = before["keys"][0]["secrets"].as_u64().unwrap();
    assert_eq!((&before["keys"][0]["data_keys"], &before["keys"][0]["removable"]), (&json!(3), &json!(false)));
    assert_eq!(before["keys"][0]["answers"], 1);
    assert_eq!(admin(&both, &["rotate"]).0, json!({"version": 2, "data_keys": 3, "secrets": secrets, "answers": 1}));
    assert_eq!(admin(&both, &["rotate"]).0, json!({"version": 2, "data_keys": 0, "secrets": 0, "answers": 0}));
    let (after, _) = admin(&both, &["status"]);
    assert_eq!((&after["keys"][0]["version"], &after["keys"][0]["removable"]), (&json!(1), &json!(true)));
    let (begun, _) = admin(&both, &["rotate-tokens"]);
    assert_eq!((&begun["status"], &begun["token_keys"][1]["stage"]), (&json!("begun"), &json!("next")));
    assert_eq!(admin(&both, &["rotate-tokens"]).0["status"], "under_way");
    let (ended, _) = admin(&both, &["rotate-tokens", "--now"]);
    assert_eq!((&ended["status"], ended["token_keys"].as_array().unwrap().len()), (&json!("replaced"), 1));
    let (begun, _) = admin(&both, &["rotate-contexts"]);
    assert_eq!((&begun["status"], &begun["context_keys"][0]["stage"]), (&json!("begun"), &json!("verifies")));
    let (alone, _) = admin(&format!("2:{NEW_KEK}"), &["status"]);
    assert_eq!(alone["token_keys"][0]["stage"], "signs");
    assert_eq!(alone["context_keys"][1]["stage"], "signs");
    assert_eq!(alone["keys"][0]["data_keys"], 3);
    let (nothing, fault) = admin(OLD_KEK, &["status"]);
    assert!(nothing.is_null() && fault.contains("key-encryption key"), "{fault}");
}

#[tokio::test]
async fn what_a_trusted_proxy_has_taken_without_tls_is_refused_and_not_redirected() {
    for (url, trusted, proto, status) in [
        ("https://api.example.com", true, "http", 403),
        ("https://api.example.com", true, "https", 401),
        ("https://api.example.com", false, "http", 401),
        ("http://127.0.0.1:8080", true, "http", 401),
    ] {
        let platform = Platform::with(|config| url.clone_into(&mut config.public_url)).await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let proxies = if trusted { vec!["127.0.0.0/8".parse().unwrap()] } else { Vec::new() };
        let shutdown = tokio_util::sync::CancellationToken::new();
        let router = router::api(platform.app.clone());
        let serving = tokio::spawn(serve_plain(listener, router, Limits::behind(proxies), shutdown.clone()));
        let ask = async |line: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let head = format!(
                "{line} HTTP/1.1\r\nhost: api.example.com\r\nx-forwarded-proto: {proto}\r\nauthorization: Bearer x\r\nconnection: close\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            text
        };
        for line in ["GET /admin/tenants", "DELETE /api/v1/tenant/sessions", "POST /api/v1/tenant/auth/logout"] {
            let answer = ask(line).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{url} {trusted} {proto} {line}: {answer}");
            assert_eq!(answer.contains("\"HTTPS_REQUIRED\""), status == 403, "{answer}");
            assert!(!answer.to_lowercase().contains("location:"), "{answer}");
        }
        for line in ["GET /health", "GET /metrics", "GET /health/ready"] {
            let answer = ask(line).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{line}: {answer}");
        }
        shutdown.cancel();
        serving.await.unwrap();
    }
}
