//! How `serve` ends at a signal: what is under way is finished, within bounds, and nobody else gets in.

use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::binary::{eventually, signal};
use crate::platform::{Platform, Tenant};
use crate::scene::{Person, with_server};
use crate::transport::Serving;

const DEADLINE: Duration = Duration::from_secs(60);

fn terminate(serving: &Serving) {
    signal(i32::try_from(serving.child.id()).unwrap(), Signal::TERM);
}

fn ended(serving: &mut Serving) -> ExitStatus {
    let mut status = None;
    eventually("the process ends", || {
        status = serving.child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Sends a request; what comes until the connection is closed.
async fn exchange(address: &str, request: String) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    // a reset is an end too
    let _ = stream.read_to_end(&mut bytes).await;
    String::from_utf8(bytes).unwrap()
}

async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !check().await {
        assert!(Instant::now() < deadline, "{what} did not happen within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One that waits for a lock on the tenant's users, until the connection answered here is closed.
async fn held_users(platform: &Platform) -> PgConnection {
    let mut holder = platform.superuser().await;
    sqlx::raw_sql("begin; lock table cvault.users in access exclusive mode").execute(&mut holder).await.unwrap();
    holder
}

fn users(tenant: &Tenant) -> String {
    format!(
        "GET /api/v1/users HTTP/1.1\r\nhost: a\r\nx-api-key: {}\r\nx-api-secret: {}\r\n\r\n",
        tenant.key, tenant.secret
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_under_way_at_a_shutdown_is_answered_whole_and_nobody_else_gets_in() {
    let (platform, directory) = (Platform::start().await, tempfile::tempdir().unwrap());
    let tenant = platform.tenant().await;
    platform.register(&tenant, "somebody@example.com").await;
    let mut serving = Serving::beside(&platform, directory.path());
    let address = serving.address();
    let holder = held_users(&platform).await;
    let under_way = tokio::spawn({
        let (address, request) = (address.clone(), users(&tenant));
        async move { exchange(&address, request).await }
    });
    let mut watcher = platform.superuser().await;
    // the periodic tasks have another role
    let waits =
        "select exists (select from pg_stat_activity where datname = current_database() and usename = 'cvault_app'
                     and wait_event_type = 'Lock')";
    until("the request waits", async || sqlx::query_scalar::<_, bool>(waits).fetch_one(&mut watcher).await.unwrap())
        .await;

    terminate(&serving);
    until("the listener is gone", async || TcpStream::connect(&address).await.is_err()).await;
    assert!(serving.child.try_wait().unwrap().is_none(), "it waits for the request");
    assert!(!under_way.is_finished());
    holder.close().await.unwrap();
    let answer = tokio::time::timeout(DEADLINE, under_way).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{answer}");
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["data"][0]["email"], "somebody@example.com");
    assert!(ended(&mut serving).success());
    assert!(serving.log().contains("\"message\":\"stopped\""), "{}", serving.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_stays_longer_than_it_may_is_cut_and_keeps_no_process_alive() {
    let (platform, directory) = (Platform::start().await, tempfile::tempdir().unwrap());
    with_server(&platform).await;
    let tenant = platform.tenant().await;
    let person = Person::of(&platform, &tenant, "somebody@example.com").await;
    let mut serving = Serving::beside(&platform, directory.path());
    let address = serving.address();
    let body = r#"{"device_name":"d"}"#;
    // for a server that acknowledges nothing
    let request = format!(
        "POST /api/v1/devices HTTP/1.1\r\nhost: a\r\nx-api-key: {}\r\nauthorization: Bearer {}\r\nprefer: wait=30\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        person.key,
        person.token,
        body.len()
    );
    let under_way = tokio::spawn(async move { exchange(&address, request).await });
    let mut watcher = platform.superuser().await;
    let made = "select exists (select from cvault.devices)";
    until("the device is there", async || sqlx::query_scalar::<_, bool>(made).fetch_one(&mut watcher).await.unwrap())
        .await;
    assert!(!under_way.is_finished());
    terminate(&serving);
    assert!(ended(&mut serving).success());
    let answer = tokio::time::timeout(DEADLINE, under_way).await.unwrap().unwrap();
    assert_eq!(answer, "", "no half of an answer");
    assert!(serving.log().contains("some requests were still running"), "{}", serving.log());
}
