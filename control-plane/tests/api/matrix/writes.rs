//! Every write of the document, made so that it succeeds: it leaves an entry in the audit log or among the logins, and a
//! retry of it is what the table says.

use std::collections::BTreeSet;

use cvault_types::TenantId;
use serde_json::{Value, json};
use uuid::Uuid;

use super::operations;
use super::rows::Caller;
use super::scene::{CHANGE_PASSWORD, Entry, Scene, access_token};
use crate::platform::{Answer, Call, PASSWORD};
use crate::portal::{link_token, mailed};

/// A write that succeeds: who makes it, where and with what.
struct Write {
    operation: &'static str,
    by: By,
    retry: Retry,
    call: fn(&Scene, &Made) -> (String, Option<Value>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Staff,
    Backend,
    User,
    /// Somebody who begins with nothing but what is in the body.
    Stranger,
    /// In the portal. What asks for a challenge gets its answer.
    Owner,
}

/// What comes of the same request once more, with the same `Idempotency-Key`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// The first answer, marked as such, and nothing else happens.
    Replayed,
    /// The key is not looked at: what the request proves is used up, or proves the same again.
    DecidedAnew(u16),
}

/// What earlier writes have made.
#[derive(Default)]
struct Made {
    tenant: String,
    /// Of the owner who has signed up, and `adm_…` of theirs.
    owners: String,
    owner_id: String,
    pool: String,
    server: String,
    refresh: String,
    user: String,
    key: String,
    /// Access token of an owner who has signed up.
    owner: String,
    /// Of their second login.
    portal_refresh: String,
    /// Their third.
    session: String,
    /// What was mailed to them last.
    link: String,
    challenge: String,
}

const EMAIL: &str = "new@owner.example";
/// Theirs, later on.
const NEW_EMAIL: &str = "other@owner.example";
const NEW_PASSWORD: &str = "another fine password";

const fn write(
    operation: &'static str,
    by: By,
    retry: Retry,
    call: fn(&Scene, &Made) -> (String, Option<Value>),
) -> Write {
    Write { operation, by, retry, call }
}

const WRITES: &[Write] = &[
    write("POST /api/v1/auth/register", By::Backend, Retry::Replayed, |_, _| {
        ("/api/v1/auth/register".into(), Some(json!({"email": "new@example.com", "password": PASSWORD})))
    }),
    write("POST /api/v1/auth/login", By::Backend, Retry::Replayed, |_, _| {
        ("/api/v1/auth/login".into(), Some(json!({"email": "new@example.com", "password": PASSWORD})))
    }),
    write("POST /api/v1/auth/refresh", By::Backend, Retry::Replayed, |scene, _| {
        ("/api/v1/auth/refresh".into(), Some(json!({"refresh_token": scene.foreigner.refresh})))
    }),
    write("POST /api/v1/auth/logout", By::Backend, Retry::Replayed, |_, made| {
        ("/api/v1/auth/logout".into(), Some(json!({"refresh_token": made.refresh})))
    }),
    write("POST /api/v1/users/{external_id}/login-token", By::Backend, Retry::Replayed, |_, _| {
        ("/api/v1/users/4711/login-token".into(), None)
    }),
    write("PATCH /api/v1/users/{user_id}", By::Backend, Retry::Replayed, |_, made| {
        (format!("/api/v1/users/{}", made.user), Some(json!({"status": "disabled"})))
    }),
    write("DELETE /api/v1/users/{user_id}", By::Backend, Retry::Replayed, |_, made| {
        (format!("/api/v1/users/{}", made.user), None)
    }),
    write("POST /api/v1/devices", By::User, Retry::Replayed, |_, _| {
        ("/api/v1/devices".into(), Some(json!({"device_name": "second"})))
    }),
    write("POST /api/v1/devices/{device_id}/rotate-key", By::User, Retry::Replayed, |scene, _| {
        (format!("/api/v1/devices/{}/rotate-key", scene.device), Some(json!({})))
    }),
    write("POST /api/v1/vpn/connect", By::User, Retry::Replayed, |scene, _| {
        ("/api/v1/vpn/connect".into(), Some(json!({"device_id": scene.device})))
    }),
    write("POST /api/v1/vpn/disconnect", By::User, Retry::Replayed, |scene, _| {
        ("/api/v1/vpn/disconnect".into(), Some(json!({"device_id": scene.device})))
    }),
    write("DELETE /api/v1/devices/{device_id}", By::User, Retry::Replayed, |scene, _| {
        (format!("/api/v1/devices/{}", scene.device), None)
    }),
    // the portal; its sessions are taken apart at the end
    write("POST /api/v1/tenant/auth/signup", By::Stranger, Retry::DecidedAnew(409), |_, _| {
        let form = json!({"business_name": "Acme", "email": EMAIL, "password": PASSWORD});
        ("/api/v1/tenant/auth/signup".into(), Some(form))
    }),
    write("POST /api/v1/tenant/auth/verify-email/resend", By::Owner, Retry::Replayed, |_, _| {
        ("/api/v1/tenant/auth/verify-email/resend".into(), None)
    }),
    write("POST /api/v1/tenant/auth/verify-email", By::Stranger, Retry::DecidedAnew(401), |_, made| {
        ("/api/v1/tenant/auth/verify-email".into(), Some(json!({"token": made.link})))
    }),
    write("POST /api/v1/tenant/auth/login", By::Stranger, Retry::DecidedAnew(200), |_, _| {
        ("/api/v1/tenant/auth/login".into(), Some(json!({"email": EMAIL, "password": PASSWORD})))
    }),
    write("POST /api/v1/tenant/auth/refresh", By::Stranger, Retry::Replayed, |_, made| {
        ("/api/v1/tenant/auth/refresh".into(), Some(json!({"refresh_token": made.portal_refresh})))
    }),
    write("PATCH /api/v1/tenant/settings", By::Owner, Retry::Replayed, |_, _| {
        ("/api/v1/tenant/settings".into(), Some(json!({"name": "Renamed"})))
    }),
    write("POST /api/v1/tenant/api-keys", By::Owner, Retry::Replayed, |_, _| {
        ("/api/v1/tenant/api-keys".into(), Some(json!({"name": "another"})))
    }),
    write("PATCH /api/v1/tenant/api-keys/{api_key_id}", By::Owner, Retry::Replayed, |_, made| {
        (format!("/api/v1/tenant/api-keys/{}", made.key), Some(json!({"name": "renamed"})))
    }),
    write("POST /api/v1/tenant/api-keys/regenerate", By::Owner, Retry::Replayed, |_, made| {
        ("/api/v1/tenant/api-keys/regenerate".into(), Some(json!({"api_key_id": made.key})))
    }),
    write("DELETE /api/v1/tenant/api-keys/{api_key_id}", By::Owner, Retry::Replayed, |_, made| {
        (format!("/api/v1/tenant/api-keys/{}", made.key), None)
    }),
    write("POST /api/v1/tenant/step-up/{challenge_id}/verify", By::Owner, Retry::DecidedAnew(404), |_, made| {
        let path = format!("/api/v1/tenant/step-up/{}/verify", made.challenge);
        (path, Some(json!({"method": "password", "password": PASSWORD})))
    }),
    write("DELETE /api/v1/tenant/sessions/{session_id}", By::Owner, Retry::Replayed, |_, made| {
        (format!("/api/v1/tenant/sessions/{}", made.session), None)
    }),
    write("DELETE /api/v1/tenant/sessions", By::Owner, Retry::Replayed, |_, _| {
        ("/api/v1/tenant/sessions".into(), None)
    }),
    write("POST /api/v1/tenant/auth/password", By::Owner, Retry::Replayed, |_, _| {
        (CHANGE_PASSWORD.into(), Some(json!({"password": PASSWORD})))
    }),
    write("POST /api/v1/tenant/auth/email", By::Owner, Retry::Replayed, |_, _| {
        ("/api/v1/tenant/auth/email".into(), Some(json!({"email": NEW_EMAIL})))
    }),
    write("POST /api/v1/tenant/auth/email/confirm", By::Stranger, Retry::DecidedAnew(401), |_, made| {
        ("/api/v1/tenant/auth/email/confirm".into(), Some(json!({"token": made.link})))
    }),
    write("POST /api/v1/tenant/auth/logout", By::Owner, Retry::DecidedAnew(401), |_, _| {
        ("/api/v1/tenant/auth/logout".into(), None)
    }),
    write("POST /api/v1/tenant/auth/password-reset", By::Stranger, Retry::DecidedAnew(202), |_, _| {
        ("/api/v1/tenant/auth/password-reset".into(), Some(json!({"email": NEW_EMAIL})))
    }),
    write("POST /api/v1/tenant/auth/password-reset/confirm", By::Stranger, Retry::DecidedAnew(401), |_, made| {
        let body = json!({"token": made.link, "password": NEW_PASSWORD});
        ("/api/v1/tenant/auth/password-reset/confirm".into(), Some(body))
    }),
    write("POST /admin/tenants", By::Staff, Retry::Replayed, |_, _| {
        ("/admin/tenants".into(), Some(json!({"name": "Third"})))
    }),
    write("PATCH /admin/tenants/{tenant_id}", By::Staff, Retry::Replayed, |_, made| {
        (format!("/admin/tenants/{}", made.tenant), Some(json!({"name": "Renamed"})))
    }),
    write("POST /admin/tenants/{tenant_id}/suspend", By::Staff, Retry::Replayed, |_, made| {
        (format!("/admin/tenants/{}/suspend", made.tenant), None)
    }),
    write("POST /admin/tenants/{tenant_id}/resume", By::Staff, Retry::Replayed, |_, made| {
        (format!("/admin/tenants/{}/resume", made.tenant), None)
    }),
    write("DELETE /admin/tenants/{tenant_id}", By::Staff, Retry::Replayed, |_, made| {
        (format!("/admin/tenants/{}", made.tenant), None)
    }),
    write("POST /admin/pools", By::Staff, Retry::Replayed, |_, _| {
        ("/admin/pools".into(), Some(json!({"name": "second", "ipv4": "10.9.0.0/16"})))
    }),
    write("PATCH /admin/pools/{pool_id}", By::Staff, Retry::Replayed, |_, made| {
        (format!("/admin/pools/{}", made.pool), Some(json!({"quarantine_seconds": 5})))
    }),
    write("POST /admin/servers", By::Staff, Retry::Replayed, |_, _| {
        let body = json!({"name": "s2", "region": "lab-2", "public_ip": "203.0.113.11"});
        ("/admin/servers".into(), Some(body))
    }),
    write("POST /admin/servers/{server_id}/enrol-token", By::Staff, Retry::Replayed, |_, made| {
        (format!("/admin/servers/{}/enrol-token", made.server), None)
    }),
    write("POST /admin/servers/{server_id}/drain", By::Staff, Retry::Replayed, |scene, _| {
        (format!("/admin/servers/{}/drain", scene.server), None)
    }),
    write("POST /admin/servers/{server_id}/maintenance", By::Staff, Retry::Replayed, |scene, _| {
        (format!("/admin/servers/{}/maintenance", scene.server), None)
    }),
    write("POST /admin/servers/{server_id}/activate", By::Staff, Retry::Replayed, |scene, _| {
        (format!("/admin/servers/{}/activate", scene.server), None)
    }),
    write("DELETE /admin/servers/{server_id}", By::Staff, Retry::Replayed, |_, made| {
        (format!("/admin/servers/{}", made.server), None)
    }),
    write("DELETE /admin/pools/{pool_id}", By::Staff, Retry::Replayed, |_, made| {
        (format!("/admin/pools/{}", made.pool), None)
    }),
];

/// The answer, and how many entries there were before the request itself: answering a challenge leaves some.
async fn sent(scene: &Scene, made: &Made, write: &Write, key: &str) -> (Answer, i64) {
    let (method, _) = write.operation.split_once(' ').unwrap();
    let (path, body) = (write.call)(scene, made);
    let call = || {
        let call = scene.platform.call(method, &path).header("idempotency-key", key);
        let call = body.iter().fold(call, |call, body| call.json(body));
        signed(scene, made, write.by, call)
    };
    let before = scene.entries().await;
    let answer = call().send().await;
    if answer.status != 428 {
        return (answer, before);
    }
    let verify = answer.body["challenge"]["verify_url"].as_str().unwrap();
    let proof = scene.platform.post(verify, &json!({"method": "password", "password": PASSWORD}));
    let proof = signed(scene, made, write.by, proof).send().await;
    assert_eq!(proof.status, 200, "{}: {}", write.operation, proof.text);
    let before = scene.entries().await;
    (call().header("x-challenge-token", &proof.text("challenge_token")).send().await, before)
}

fn signed<'a>(scene: &'a Scene, made: &Made, by: By, call: Call<'a>) -> Call<'a> {
    match by {
        By::Staff => scene.sign(Caller::PlatformAdmin, call),
        By::Backend => call.backend(&scene.foreign_tenant),
        By::User => scene.victim.signs(call),
        By::Stranger => call,
        By::Owner => call.header("authorization", &made.owner),
    }
}

/// What the next write needs that no write makes.
async fn prepare(scene: &Scene, made: &mut Made, operation: &str) {
    match operation {
        "POST /api/v1/tenant/auth/verify-email" => made.link = newest_link(scene, EMAIL, "verify-email").await,
        "POST /api/v1/tenant/auth/password-reset/confirm" => {
            made.link = newest_link(scene, NEW_EMAIL, "reset-password").await
        }
        "POST /api/v1/tenant/auth/email/confirm" => made.link = newest_link(scene, NEW_EMAIL, "change-email").await,
        "POST /api/v1/tenant/step-up/{challenge_id}/verify" => {
            let change = scene.platform.post(CHANGE_PASSWORD, &json!({"password": NEW_PASSWORD}));
            let challenged = change.header("authorization", &made.owner).refused(428, "CHALLENGE_REQUIRED").await;
            made.challenge = challenged.body["challenge"]["id"].as_str().unwrap().to_owned();
        }
        _ => {}
    }
}

/// Earlier ones to the same address are worth nothing: the newest is the one that works.
async fn newest_link(scene: &Scene, email: &str, page: &str) -> String {
    let mails = mailed(&scene.platform, scene.mails.path()).await;
    let mail = mails.iter().rev().find(|mail| mail.contains(email) && mail.contains(&format!("/portal/{page}#")));
    link_token(mail.unwrap_or_else(|| panic!("no {page} in {mails:?}")))
}

#[tokio::test]
async fn every_write_leaves_an_entry_and_a_retry_of_it_is_what_the_table_says() {
    let writes = operations().into_iter().map(|(operation, _)| operation).filter(|name| !name.starts_with("GET "));
    let listed: BTreeSet<String> = WRITES.iter().map(|write| write.operation.to_owned()).collect();
    assert_eq!(writes.collect::<BTreeSet<_>>(), listed, "every write of the document is tried here");

    // who approves is not a caller of the API
    let scene = Scene::with_approvals(false).await;
    let mut made = Made { refresh: scene.foreigner.refresh.clone(), ..Made::default() };
    let mut wrong = Vec::new();
    for (index, write) in WRITES.iter().enumerate() {
        let (what, key) = (write.operation, format!("k{index}"));
        prepare(&scene, &mut made, what).await;
        let (first, before) = sent(&scene, &made, write, &key).await;
        assert!(first.status.is_success(), "{what}: {}", first.text);
        let left = scene.entries().await - before;
        assert!(left > 0, "{what} leaves no entry");
        // whatever is learnt of the first, as who has signed up
        remember(&mut made, what, &first);
        wrong.extend(faults(&scene, &made, write, &first, left).await);
        let (again, before) = sent(&scene, &made, write, &key).await;
        let (status, replayed) = match write.retry {
            Retry::Replayed => (first.status.as_u16(), "true"),
            Retry::DecidedAnew(status) => (status, ""),
        };
        let got = (again.status.as_u16(), again.header("idempotency-replayed"));
        assert_eq!(got, (status, replayed), "{what}: {}", again.text);
        if write.retry == Retry::Replayed {
            assert_eq!(scene.entries().await, before, "{what}: the retry did something");
        }
        if what == "POST /api/v1/tenant/auth/login" {
            made.session = again.text("session_id");
        }
    }
    assert_eq!(wrong, [""; 0]);
}

/// What is wrong with the entries that the request has left: each is of its tenant, of its caller, and has its id.
async fn faults(scene: &Scene, made: &Made, write: &Write, answer: &Answer, left: i64) -> Vec<String> {
    let what = write.operation;
    let entries = scene.entries_of(answer.header("x-request-id").parse().unwrap()).await;
    let tenant = |id: &str| id.parse::<TenantId>().unwrap().uuid();
    let (of, by) = match write.by {
        By::Staff if what.contains("/admin/tenants") => (tenant(&made.tenant), "admin:test".to_owned()),
        By::Staff => (Uuid::nil(), "admin:test".to_owned()),
        By::Backend => (tenant(&scene.foreign_tenant.id), scene.id_of(&scene.foreign_tenant).await),
        By::User => (tenant(scene.victim_is().0), scene.victim_is().1.to_owned()),
        By::Stranger | By::Owner => (tenant(&made.owners), made.owner_id.clone()),
    };
    let wrong = |entry: &&Entry| {
        // what a backend does for a user who logs in is the user's
        let logs_in = write.by == By::Backend
            && ["register", "login", "refresh", "logout"].contains(&&*entry.action)
            && entry.actor.starts_with("usr_");
        // nobody is there yet, or has proven anything
        let nobody = match what {
            "POST /api/v1/tenant/auth/signup" => "signup",
            "POST /api/v1/tenant/auth/password-reset" => "anonymous",
            _ => &by,
        };
        let right = entry.actor == by || entry.actor == nobody || logs_in;
        entry.tenant != of || entry.action.is_empty() || !right
    };
    let mut faults: Vec<_> =
        entries.iter().filter(wrong).map(|entry| format!("{what}: {entry:?}, not by {by} of {of}")).collect();
    if i64::try_from(entries.len()).unwrap() != left {
        faults.push(format!("{what}: {left} entries, with its id {entries:?}"));
    }
    faults
}

fn remember(made: &mut Made, operation: &str, first: &Answer) {
    match operation {
        "POST /admin/tenants" => made.tenant = first.text("id"),
        "POST /admin/pools" => made.pool = first.text("id"),
        "POST /admin/servers" => made.server = first.body["server"]["id"].as_str().unwrap().to_owned(),
        "POST /api/v1/auth/refresh" => made.refresh = first.text("refresh_token"),
        "POST /api/v1/users/{external_id}/login-token" => made.user = first.text("user_id"),
        "POST /api/v1/tenant/auth/signup" => {
            made.owner = access_token(first);
            made.owners = first.text("tenant_id");
            made.owner_id = first.text("admin_id");
        }
        "POST /api/v1/tenant/auth/login" => {
            made.portal_refresh = first.body["tokens"]["refresh_token"].as_str().unwrap().to_owned();
        }
        "POST /api/v1/tenant/api-keys" => made.key = first.text("id"),
        _ => {}
    }
}
