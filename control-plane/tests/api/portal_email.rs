//! Another address for a portal account.

use cvault_control_plane::auth::passwords::Scheme;
use cvault_control_plane::mail::Sink;
use serde_json::json;

use crate::people::Person;
use crate::platform::{Answer, PASSWORD, Platform};
use crate::portal::{link_token, mailed};

const ASK: &str = "/api/v1/tenant/auth/email";
const CONFIRM: &str = "/api/v1/tenant/auth/email/confirm";
const ME: &str = "/api/v1/tenant/me";
const OLD: &str = "owner@example.com";
const NEW: &str = "new@example.com";

async fn with_mail() -> (Platform, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let platform = Platform::with(|config| {
        config.passwords = Scheme::Argon2id { memory_kib: 64, passes: 1 };
        config.mail.sink = Sink::Directory(folder.path().to_owned());
    })
    .await;
    (platform, folder)
}

async fn log_in(platform: &Platform, email: &str) -> Answer {
    platform.post("/api/v1/tenant/auth/login", &json!({"email": email, "password": PASSWORD})).send().await
}

/// What was mailed since the last time, as `address: subject`, and the token of the link to the page named.
async fn news(platform: &Platform, folder: &std::path::Path, page: &str) -> (Vec<String>, Option<String>) {
    let mails = mailed(platform, folder).await;
    for file in std::fs::read_dir(folder).unwrap() {
        std::fs::remove_file(file.unwrap().path()).unwrap();
    }
    let header = |mail: &str, name: &str| {
        let line = mail.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned));
        line.unwrap_or_else(|| panic!("no {name} in {mail}"))
    };
    let mut list: Vec<_> =
        mails.iter().map(|mail| format!("{}:{}", header(mail, "To: "), header(mail, "Subject:"))).collect();
    list.sort();
    let link = mails.iter().find(|mail| mail.contains(&format!("/portal/{page}#"))).map(|mail| link_token(mail));
    (list, link)
}

#[tokio::test]
async fn an_address_changes_when_the_link_mailed_to_the_new_one_is_opened() {
    let (platform, folder) = with_mail().await;
    let owner = Person::owner(&platform, OLD).await;
    news(&platform, folder.path(), "").await;
    let elsewhere = log_in(&platform, OLD).await;
    let elsewhere = format!("Bearer {}", elsewhere.body["tokens"]["access_token"].as_str().unwrap());
    let reset = platform.post("/api/v1/tenant/auth/password-reset", &json!({"email": OLD})).send().await;
    assert_eq!(reset.status, 202);
    let (_, reset) = news(&platform, folder.path(), "reset-password").await;

    owner.call("POST", ASK).json(&json!({"email": "nobody"})).refused(422, "VALIDATION_FAILED").await;
    let same = owner.sure("POST", ASK, Some(&json!({"email": "OWNER@example.com"}))).await;
    assert_eq!(same.faults(), ["/email invalid_value"], "{}", same.text);
    let asked = owner.sure_with("POST", ASK, Some(&json!({"email": NEW})), &[("idempotency-key", "e1")]).await;
    assert_eq!((asked.status.as_u16(), asked.text.as_str()), (202, ""));
    let again = owner.sure_with("POST", ASK, Some(&json!({"email": NEW})), &[("idempotency-key", "e1")]).await;
    assert_eq!((again.status.as_u16(), again.header("idempotency-replayed")), (202, "true"));
    let (told, link) = news(&platform, folder.path(), "change-email").await;
    let expected =
        [format!("{NEW}: Confirm your new e-mail address"), format!("{OLD}: Your e-mail address is about to change")];
    assert_eq!(told, expected);
    assert_eq!(owner.get(ME).await.body["email"], OLD, "not yet");
    assert_eq!(log_in(&platform, NEW).await.status, 401);

    let link = link.unwrap();
    let confirm = |token: &str| platform.post(CONFIRM, &json!({"token": token}));
    let other = platform.post("/api/v1/tenant/auth/verify-email", &json!({"token": link}));
    other.refused(401, "INVALID_TOKEN").await;
    assert_eq!(confirm(&link).send().await.status, 204);
    confirm(&link).refused(401, "INVALID_TOKEN").await;
    let me = owner.get(ME).await;
    assert_eq!(
        (&me.body["email"], &me.body["email_verified"]),
        (&json!(NEW), &json!(true)),
        "the session that asked stays"
    );
    platform.call("GET", ME).header("authorization", &elsewhere).refused(401, "SESSION_TERMINATED").await;
    assert_eq!(
        (log_in(&platform, OLD).await.status.as_u16(), log_in(&platform, NEW).await.status.as_u16()),
        (401, 200)
    );
    let reset = json!({"token": reset.unwrap(), "password": "another fine password"});
    let reset = platform.post("/api/v1/tenant/auth/password-reset/confirm", &reset);
    reset.refused(401, "INVALID_TOKEN").await;
    assert_eq!(news(&platform, folder.path(), "").await.0, [format!("{OLD}: Your e-mail address was changed")]);
    let log = owner.get("/api/v1/tenant/audit?action=email").await;
    let log: Vec<_> = log.body["data"].as_array().unwrap().iter().map(|entry| entry["action"].clone()).collect();
    assert_eq!(log, ["email.change", "email.change_request"]);
    // the former one is free
    Person::owner(&platform, OLD).await;
}

#[tokio::test]
async fn whether_somebody_has_the_address_is_not_told() {
    let (platform, folder) = with_mail().await;
    let (owner, _other) = (Person::owner(&platform, OLD).await, Person::owner(&platform, "other@example.com").await);
    news(&platform, folder.path(), "").await;
    let taken = owner.sure("POST", ASK, Some(&json!({"email": "other@example.com"}))).await;
    let (told, link) = news(&platform, folder.path(), "change-email").await;
    assert_eq!((told, link), (vec![format!("{OLD}: Your e-mail address is about to change")], None));
    let free = owner.sure("POST", ASK, Some(&json!({"email": NEW}))).await;
    assert_eq!((taken.status.as_u16(), &taken.text), (202, &free.text));
    assert_eq!(free.status, 202);
    let (_, link) = news(&platform, folder.path(), "change-email").await;
    let confirm = || platform.post(CONFIRM, &json!({"token": link.clone().unwrap()}));

    // it is taken meanwhile: whoever reads its mails may know
    Person::owner(&platform, NEW).await;
    confirm().refused(409, "EMAIL_TAKEN").await;
    assert_eq!(owner.get(ME).await.body["email"], OLD);
}

#[tokio::test]
async fn another_password_or_another_wish_stops_a_change_and_wishes_are_few() {
    let (platform, folder) = with_mail().await;
    let owner = Person::owner(&platform, OLD).await;
    let ask = async |email: &str| {
        let answer = owner.sure("POST", ASK, Some(&json!({"email": email}))).await;
        (answer.status.as_u16(), news(&platform, folder.path(), "change-email").await.1)
    };
    let refused = async |token: Option<String>| {
        platform.post(CONFIRM, &json!({"token": token.unwrap()})).refused(401, "INVALID_TOKEN").await
    };
    let (_, first) = ask(NEW).await;
    let (_, second) = ask("newer@example.com").await;
    refused(first).await;
    let password = json!({"password": PASSWORD});
    assert_eq!(owner.sure("POST", "/api/v1/tenant/auth/password", Some(&password)).await.status, 204);
    refused(second).await;
    let (_, third) = ask(NEW).await;
    sqlx::query("update cvault.tenant_admins set status = 'disabled'")
        .execute(&mut platform.superuser().await)
        .await
        .unwrap();
    refused(third).await;
    sqlx::query("update cvault.tenant_admins set status = 'active'")
        .execute(&mut platform.superuser().await)
        .await
        .unwrap();
    assert_eq!((ask("a@example.com").await.0, ask("b@example.com").await.0), (202, 202));
    assert_eq!(ask("c@example.com").await.0, 429);
}
