//! The whole way of a mail: the tenant's transaction, the outbox, a real SMTP server.

mod server;

use std::sync::atomic::Ordering;

use cvault_types::Secret;
use sqlx::Row;
use time::Duration;
use zeroize::Zeroizing;

use self::server::Server;
use super::*;
use crate::app::App;
use crate::config::{Config, Overrides};
use crate::keys::KeyRing;
use crate::serve;
use crate::testing::{Person, World};

const LINK: &str = "https://vpn.example.com/verify#a-token-nobody-else-may-see";

/// Another replica of the same platform, with a sink.
async fn replica(world: &World, sink: Sink) -> App {
    let mut config = Config::from_env(&|_| None, &Overrides::default()).unwrap();
    config.mail.sink = sink;
    config.mail.from = "CVault <no-reply@example.com>".parse().unwrap();
    serve::open(config, &world.database.config(), KeyRing::single(Zeroizing::new([7; 32]))).await.unwrap()
}

fn mail(app: &App, to: &str) -> Mail {
    Mail {
        to: Email::parse(to).unwrap(),
        kind: Kind::VerifyEmail,
        data: Data { link: Secret::new(LINK), valid_until: app.clock.now() + Duration::hours(24) },
    }
}

async fn queue(app: &App, person: Person, to: &str) -> cvault_types::MailId {
    let mut tx = app.db.tenancy.begin(person.tenant).await.unwrap();
    let id = enqueue(&mut tx, &app.keys, &mail(app, to), app.clock.now()).await.unwrap();
    tx.commit().await.unwrap();
    id
}

/// As if the pause were over.
async fn make_due(world: &World) {
    sqlx::query("update cvault.outbox set next_attempt_at = now() - interval '1 minute'")
        .execute(&mut world.superuser().await)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_committed_mail_arrives_once_over_tls_and_its_secrets_are_destroyed() {
    for tls in [SmtpTls::StartTls, SmtpTls::Wrapped] {
        let (world, server) = (World::new().await, Server::start(tls).await);
        let app = replica(&world, Sink::Smtp(server.smtp())).await;
        let person = world.person().await;
        let id = queue(&app, person, "ada@example.org").await;
        let sealed: Vec<u8> = sqlx::query_scalar("select payload_sealed from cvault.outbox")
            .fetch_one(&mut world.superuser().await)
            .await
            .unwrap();
        assert!(
            !String::from_utf8_lossy(&sealed).contains("ada@") && !String::from_utf8_lossy(&sealed).contains("token")
        );
        assert_eq!(deliver(&app).await.unwrap(), 1);
        assert_eq!(deliver(&app).await.unwrap(), 0);
        let mails = server.mails();
        assert_eq!((mails.len(), mails[0].to.as_slice()), (1, ["ada@example.org".to_owned()].as_slice()));
        let text = &mails[0].text;
        for part in [
            "From: CVault <no-reply@example.com>\r\n",
            "To: ada@example.org\r\n",
            "Subject: Confirm your e-mail address\r\n",
            &format!("Message-ID: <{id}@example.com>\r\n"),
            "Auto-Submitted: auto-generated\r\n",
            "text/plain",
            "text/html",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        assert!(text.replace("=\r\n", "").contains(LINK), "{text}");
        assert_eq!(server.state.logins.load(Ordering::Relaxed), 1);
        assert_eq!(server.state.in_clear.load(Ordering::Relaxed), 0);
        let row = sqlx::query("select payload_sealed is null, delivered_at is not null, attempts from cvault.outbox")
            .fetch_one(&mut world.superuser().await)
            .await
            .unwrap();
        assert_eq!((row.get::<bool, _>(0), row.get::<bool, _>(1), row.get::<i32, _>(2)), (true, true, 1));
    }
}

#[tokio::test]
async fn a_mail_of_a_transaction_that_was_rolled_back_never_was() {
    let (world, server) = (World::new().await, Server::start(SmtpTls::None).await);
    let app = replica(&world, Sink::Smtp(server.smtp())).await;
    let person = world.person().await;
    let mut tx = app.db.tenancy.begin(person.tenant).await.unwrap();
    enqueue(&mut tx, &app.keys, &mail(&app, "ada@example.org"), app.clock.now()).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(deliver(&app).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_at_once_send_each_mail_once() {
    let (world, server) = (World::new().await, Server::start(SmtpTls::None).await);
    let person = world.person().await;
    for n in 0..60 {
        queue(&world.app, person, &format!("p{n}@example.org")).await;
    }
    let mut replicas = Vec::new();
    for _ in 0..3 {
        let app = replica(&world, Sink::Smtp(server.smtp())).await;
        replicas.push(tokio::spawn(async move { deliver(&app).await.unwrap() }));
    }
    let mut attempts = 0;
    for replica in replicas {
        attempts += replica.await.unwrap();
    }
    let mut to: Vec<String> = server.mails().into_iter().flat_map(|mail| mail.to).collect();
    assert_eq!((attempts, to.len()), (60, 60));
    to.sort();
    to.dedup();
    assert_eq!(to.len(), 60);
}

#[tokio::test]
async fn a_server_that_is_busy_is_asked_again_and_one_that_knows_nobody_is_not() {
    let (world, server) = (World::new().await, Server::start(SmtpTls::StartTls).await);
    let app = replica(&world, Sink::Smtp(server.smtp())).await;
    let person = world.person().await;
    let id = queue(&app, person, "ada@example.org").await;
    server.state.refuse_with.store(451, Ordering::Relaxed);
    assert_eq!(deliver(&app).await.unwrap(), 1);
    assert_eq!(deliver(&app).await.unwrap(), 0, "it has a pause");
    let waiting = &list(&app.db.sys, false, 10).await.unwrap()[0];
    assert_eq!((waiting.id, waiting.attempts, waiting.dead), (id, 1, false));
    assert!(waiting.next_attempt_at > app.clock.now() && waiting.last_error.as_ref().unwrap().contains("451"));
    server.state.refuse_with.store(550, Ordering::Relaxed);
    make_due(&world).await;
    deliver(&app).await.unwrap();
    assert!(list(&app.db.sys, false, 10).await.unwrap().is_empty());
    let dead = &list(&app.db.sys, true, 10).await.unwrap()[0];
    assert_eq!((dead.id, dead.attempts, dead.dead), (id, 2, true));
    server.state.refuse_with.store(0, Ordering::Relaxed);
    retry(&app, id, "cli").await.unwrap();
    assert!(matches!(retry(&app, id, "cli").await, Err(RetryError::NotThere)), "it is no longer dead");
    deliver(&app).await.unwrap();
    assert_eq!(server.mails().len(), 1);
    let noted: i64 = sqlx::query_scalar("select count(*) from cvault.audit_log where action = 'mail.retry'")
        .fetch_one(&mut world.superuser().await)
        .await
        .unwrap();
    assert_eq!(noted, 1);
}

#[tokio::test]
async fn a_wrong_password_or_a_server_without_tls_loses_nothing_and_shows_nothing() {
    let world = World::new().await;
    let person = world.person().await;
    queue(&world.app, person, "ada@example.org").await;
    let protected = Server::start(SmtpTls::StartTls).await;
    let bare = Server::start(SmtpTls::None).await;
    let wrong = Smtp { credentials: Some((server::USER.to_owned(), Secret::new("wrong"))), ..protected.smtp() };
    let stripped = Smtp { tls: SmtpTls::StartTls, credentials: protected.smtp().credentials, ..bare.smtp() };
    let stranger = Smtp { ca: bare.smtp().ca, ..protected.smtp() };
    let nobody = Smtp { port: 1, ..protected.smtp() };
    for smtp in [wrong, stripped, stranger, nobody] {
        make_due(&world).await;
        let app = replica(&world, Sink::Smtp(smtp)).await;
        assert_eq!(deliver(&app).await.unwrap(), 1);
        assert!(!list(&app.db.sys, false, 10).await.unwrap()[0].dead);
    }
    assert!(protected.mails().is_empty() && bare.mails().is_empty());
    make_due(&world).await;
    deliver(&replica(&world, Sink::Smtp(protected.smtp())).await).await.unwrap();
    assert_eq!(protected.mails().len(), 1);
}

#[tokio::test]
async fn a_mail_is_given_up_after_its_last_attempt() {
    let (world, server) = (World::new().await, Server::start(SmtpTls::None).await);
    let app = replica(&world, Sink::Smtp(server.smtp())).await;
    queue(&app, world.person().await, "ada@example.org").await;
    sqlx::query("update cvault.outbox set attempts = 15").execute(&mut world.superuser().await).await.unwrap();
    server.state.refuse_with.store(451, Ordering::Relaxed);
    deliver(&app).await.unwrap();
    assert!(list(&app.db.sys, true, 10).await.unwrap()[0].dead);
}

#[tokio::test]
async fn without_a_mail_server_mails_wait_and_what_came_too_late_is_given_up() {
    let world = World::new().await;
    let person = world.person().await;
    queue(&world.app, person, "ada@example.org").await;
    assert_eq!(deliver(&world.app).await.unwrap(), 0);
    assert_eq!(list(&world.app.db.sys, false, 10).await.unwrap().len(), 1);
    let later = world.app.clock.now() + Duration::hours(25);
    assert_eq!(expire(&world.app.db.sys, later).await.unwrap(), 1);
    let dead = &list(&world.app.db.sys, true, 10).await.unwrap()[0];
    assert!(dead.last_error.as_ref().unwrap().starts_with("It expired"));
    assert!(matches!(retry(&world.app, dead.id, "cli").await, Err(RetryError::NotThere)));
}

#[tokio::test]
async fn a_directory_gets_a_file_for_each_mail_that_only_we_can_read() {
    use std::os::unix::fs::PermissionsExt;
    let (world, directory) = (World::new().await, tempfile::tempdir().unwrap());
    let app = replica(&world, Sink::Directory(directory.path().to_owned())).await;
    let id = queue(&app, world.person().await, "ada@example.org").await;
    deliver(&app).await.unwrap();
    let path = directory.path().join(format!("{id}.eml"));
    assert!(std::fs::read_to_string(&path).unwrap().contains("To: ada@example.org\r\n"));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_tenant_cannot_fill_the_outbox_nor_see_what_another_has_in_it() {
    let world = World::new().await;
    let (person, other) = (world.person().await, world.person().await);
    sqlx::query(
        "insert into cvault.outbox (tenant_id, mail_id, kind, payload_sealed, expires_at)
         select $1, gen_random_uuid(), 'verify_email', '', now() + interval '1 hour' from generate_series(1, 1000)",
    )
    .bind(person.tenant.uuid())
    .execute(&mut world.superuser().await)
    .await
    .unwrap();
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let full = enqueue(&mut tx, &world.app.keys, &mail(&world.app, "a@example.org"), world.app.clock.now()).await;
    assert!(matches!(full, Err(EnqueueError::Full)));
    tx.rollback().await.unwrap();
    queue(&world.app, other, "a@example.org").await;
    let mut tx = world.app.db.tenancy.begin(other.tenant).await.unwrap();
    let seen: i64 = sqlx::query_scalar("select count(mail_id) from cvault.outbox").fetch_one(tx.conn()).await.unwrap();
    assert_eq!(seen, 1);
    let reads = sqlx::query("select payload_sealed from cvault.outbox").fetch_all(tx.conn()).await;
    assert!(reads.is_err(), "the application's role never reads a mail back");
}

#[tokio::test]
async fn no_address_adds_a_header_or_a_recipient() {
    let server = Server::start(SmtpTls::None).await;
    let from = "no-reply@example.com".parse().unwrap();
    let id = cvault_types::MailId::from_uuid(uuid::Uuid::now_v7());
    let text = render(Kind::VerifyEmail, &mail_data());
    for to in [
        "a@example.org\r\nBcc: b@example.org",
        "a@example.org, b@example.org",
        "a@example.org>\r\nRCPT TO:<b@example.org",
        "a\0@example.org",
    ] {
        let refused = send(&Sink::Smtp(server.smtp()), &from, to, id, &text).await.unwrap_err();
        assert!(refused.is_final(), "{to:?}: {refused}");
    }
    assert!(server.mails().is_empty());
}

fn mail_data() -> Data {
    Data {
        link: Secret::new("https://x/\r\n.\r\nMAIL FROM:<evil@example.org>\r\n"),
        valid_until: time::macros::datetime!(2027-01-01 00:00 UTC),
    }
}

#[tokio::test]
async fn no_link_ends_a_mail_or_begins_another() {
    let server = Server::start(SmtpTls::None).await;
    let from = "no-reply@example.com".parse().unwrap();
    let id = cvault_types::MailId::from_uuid(uuid::Uuid::now_v7());
    let text = render(Kind::VerifyEmail, &mail_data());
    send(&Sink::Smtp(server.smtp()), &from, "a@example.org", id, &text).await.unwrap();
    let mails = server.mails();
    assert_eq!(mails.len(), 1);
    assert!(mails[0].text.contains("MAIL FROM:<evil@example.org>"), "it is part of the body: {}", mails[0].text);
}
