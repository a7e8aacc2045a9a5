//! The portal: signing up, both kinds of login, what ends one, and step-up.

use cvault_control_plane::auth::passwords::Scheme;
use cvault_control_plane::mail::{self, Sink};
use cvault_types::TenantRole;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::platform::{Answer, Call, PASSWORD, Platform};

const SIGNUP: &str = "/api/v1/tenant/auth/signup";
const LOGIN: &str = "/api/v1/tenant/auth/login";
const REFRESH: &str = "/api/v1/tenant/auth/refresh";
const LOGOUT: &str = "/api/v1/tenant/auth/logout";
const ME: &str = "/api/v1/tenant/me";
const SESSIONS: &str = "/api/v1/tenant/sessions";
const CHANGE: &str = "/api/v1/tenant/auth/password";
const RESET: &str = "/api/v1/tenant/auth/password-reset";
const CONFIRM: &str = "/api/v1/tenant/auth/password-reset/confirm";
const VERIFY: &str = "/api/v1/tenant/auth/verify-email";
const EMAIL: &str = "owner@example.com";
const NEW_PASSWORD: &str = "another fine password";
const HOME: &str = "192.0.2.1";
const AGENT: &str = "test/1";

/// Cheap hashes: what they cost is not what these tests are about.
async fn start() -> Platform {
    Platform::with(|config| config.passwords = Scheme::Argon2id { memory_kib: 64, passes: 1 }).await
}

fn credentials(email: &str, password: &str) -> Value {
    json!({"email": email, "password": password})
}

fn form(email: &str) -> Value {
    json!({"business_name": "Acme", "email": email, "password": PASSWORD})
}

/// From the place and program everybody logs in with here.
fn at_home(call: Call<'_>) -> Call<'_> {
    call.from(HOME).header("user-agent", AGENT)
}

/// As a page of ours sends it.
fn by_browser(call: Call<'_>) -> Call<'_> {
    at_home(call).header("sec-fetch-site", "same-origin")
}

async fn sign_up(platform: &Platform, email: &str) -> Answer {
    let answer = at_home(platform.post(SIGNUP, &form(email))).send().await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer
}

async fn log_in(platform: &Platform, email: &str, password: &str) -> Answer {
    at_home(platform.post(LOGIN, &credentials(email, password))).send().await
}

fn token(answer: &Answer, name: &str) -> String {
    answer.body["tokens"][name].as_str().unwrap_or_else(|| panic!("no {name} in {}", answer.text)).to_owned()
}

fn access(answer: &Answer) -> String {
    format!("Bearer {}", token(answer, "access_token"))
}

/// `name=value` of the session cookie that was set.
fn cookie(answer: &Answer) -> String {
    answer.header("set-cookie").split(';').next().unwrap().to_owned()
}

async fn database(platform: &Platform) -> PgConnection {
    PgConnection::connect_with(&platform.database.superuser()).await.unwrap()
}

async fn execute(platform: &Platform, sql: &'static str) {
    sqlx::raw_sql(sql).execute(&mut database(platform).await).await.unwrap();
}

async fn strings(platform: &Platform, sql: &'static str) -> Vec<String> {
    sqlx::query_scalar(sql).fetch_all(&mut database(platform).await).await.unwrap()
}

async fn challenged(call: Call<'_>) -> Answer {
    let answer = call.refused(428, "CHALLENGE_REQUIRED").await;
    assert_eq!(answer.body["challenge"]["methods"], json!(["password"]), "{}", answer.text);
    answer
}

fn verify_url(answer: &Answer) -> String {
    answer.body["challenge"]["verify_url"].as_str().unwrap().to_owned()
}

fn password_answer(password: &str) -> Value {
    json!({"method": "password", "password": password})
}

/// A session of a program, and calls of it.
struct Program<'a> {
    platform: &'a Platform,
    bearer: String,
}

impl<'a> Program<'a> {
    fn of(platform: &'a Platform, login: &Answer) -> Self {
        Self { platform, bearer: access(login) }
    }

    fn call(&self, method: &str, path: &str) -> Call<'a> {
        at_home(self.platform.call(method, path)).header("authorization", &self.bearer)
    }

    fn post(&self, path: &str, body: &Value) -> Call<'a> {
        self.call("POST", path).json(body)
    }

    fn change(&self, password: &str) -> Call<'a> {
        self.post(CHANGE, &json!({"password": password}))
    }

    async fn answer(&self, challenge: &Answer) -> String {
        let answer = self.post(&verify_url(challenge), &password_answer(PASSWORD)).send().await;
        assert_eq!((answer.status.as_u16(), &answer.body["expires_in_seconds"]), (200, &json!(60)), "{}", answer.text);
        answer.text("challenge_token")
    }
}

#[tokio::test]
async fn whoever_signs_up_can_use_the_api_at_once() {
    let platform = start().await;
    let answer = sign_up(&platform, "Owner@Example.com").await;
    assert_eq!((answer.text("role"), &answer.body["tenant"]["status"]), ("owner".to_owned(), &json!("trial")));
    assert!(answer.text("admin_id").starts_with("adm_") && answer.text("session_id").starts_with("pss_"));
    let register = platform.post("/api/v1/auth/register", &credentials("user@example.com", PASSWORD));
    let register = register.header("x-api-key", &answer.text("api_key"));
    assert_eq!(register.header("x-api-secret", &answer.text("api_secret")).send().await.status, 201);

    let me = Program::of(&platform, &answer).call("GET", ME).send().await;
    assert_eq!((me.text("email"), me.text("tenant_name")), (EMAIL.to_owned(), "Acme".to_owned()));
    assert_eq!((&me.body["email_verified"], me.text("tenant_id")), (&json!(false), answer.text("tenant_id")));
    let actions = strings(&platform, "select action from cvault.audit_log order by audit_id").await;
    assert_eq!(actions, ["tenant.create", "tenant_admin.create"]);
}

#[tokio::test]
async fn an_address_has_one_account_on_the_whole_platform() {
    let platform = start().await;
    let answers = futures::future::join_all((0..6).map(|_| platform.post(SIGNUP, &form(EMAIL)).send())).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 201).count(), 1);
    for answer in answers.iter().filter(|answer| answer.status != 201) {
        answer.is_problem("a loser", 409, "EMAIL_TAKEN");
    }
    platform.post(SIGNUP, &form("OWNER@example.com")).refused(409, "EMAIL_TAKEN").await;
    assert_eq!(strings(&platform, "select tenant_id::text from cvault.tenants").await.len(), 1, "no half of a tenant");
}

#[tokio::test]
async fn the_form_names_all_of_its_faults() {
    let platform = start().await;
    let body = json!({"business_name": " ", "email": "nobody", "password": "short"});
    let answer = platform.post(SIGNUP, &body).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(answer.faults(), ["/email invalid_format", "/password too_short", "/business_name invalid_format"]);
}

#[tokio::test]
async fn a_browser_gets_a_cookie_that_works_for_our_pages_only() {
    let platform = start().await;
    let answer = by_browser(platform.post(SIGNUP, &form(EMAIL))).send().await;
    assert_eq!((answer.status.as_u16(), &answer.body["tokens"]), (201, &Value::Null), "{}", answer.text);
    let set = answer.header("set-cookie").to_owned();
    assert!(set.starts_with("__Host-cvault_session=cvb_"), "{set}");
    assert!(set.ends_with("; Path=/; Max-Age=604800; Secure; HttpOnly; SameSite=Lax"), "{set}");
    let cookie = cookie(&answer);
    let get = |site: &str| platform.call("GET", ME).header("cookie", &cookie).header("sec-fetch-site", site);
    assert_eq!(get("same-origin").send().await.status, 200);
    assert_eq!(get("none").send().await.status, 200);
    get("cross-site").refused(403, "ORIGIN_NOT_ALLOWED").await;
    let delete = || at_home(platform.call("DELETE", SESSIONS)).header("cookie", &cookie);
    delete().refused(403, "ORIGIN_NOT_ALLOWED").await;
    for site in ["cross-site", "same-site", "none"] {
        delete().header("sec-fetch-site", site).refused(403, "ORIGIN_NOT_ALLOWED").await;
    }
    delete().header("origin", "https://evil.example").refused(403, "ORIGIN_NOT_ALLOWED").await;
    let ours = platform.app.config.public_url.clone();
    assert_eq!(delete().header("origin", &ours).send().await.status, 204);

    // a form of a foreign page can send no JSON
    let plain = platform.call("POST", CHANGE).raw("text/plain", json!({"password": NEW_PASSWORD}).to_string());
    let plain = plain.header("cookie", &cookie).header("sec-fetch-site", "same-origin");
    plain.refused(415, "UNSUPPORTED_MEDIA_TYPE").await;
    let twice = platform.call("GET", ME).header("cookie", &format!("{cookie}; __Host-cvault_session=x"));
    twice.refused(401, "INVALID_TOKEN").await;
}

#[tokio::test]
async fn a_foreign_page_cannot_log_anybody_in() {
    let platform = start().await;
    sign_up(&platform, EMAIL).await;
    for (name, value) in [("sec-fetch-site", "cross-site"), ("origin", "https://evil.example")] {
        for (path, body) in [(LOGIN, credentials(EMAIL, PASSWORD)), (SIGNUP, form("b@example.com"))] {
            platform.post(path, &body).header(name, value).refused(403, "ORIGIN_NOT_ALLOWED").await;
        }
    }
}

#[tokio::test]
async fn the_end_of_a_session_is_told_in_the_header_and_takes_the_cookie_away() {
    let platform = start().await;
    sign_up(&platform, EMAIL).await;
    let answer = by_browser(platform.post(LOGIN, &credentials(EMAIL, PASSWORD))).send().await;
    let call = |method: &str, path: &str| by_browser(platform.call(method, path)).header("cookie", &cookie(&answer));
    let again = by_browser(platform.post(REFRESH, &json!({}))).header("cookie", &cookie(&answer)).send().await;
    assert_eq!((again.status.as_u16(), again.text("session_id")), (200, answer.text("session_id")));
    let out = call("POST", LOGOUT).send().await;
    assert_eq!(out.status, 204);
    assert!(out.header("set-cookie").contains("Max-Age=0"), "{:?}", out.headers);
    let refused = call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    assert_eq!(refused.header("x-session-terminated"), "true");
    assert!(refused.header("set-cookie").starts_with("__Host-cvault_session=; "));
}

#[tokio::test]
async fn a_program_refreshes_and_a_token_used_twice_ends_the_session() {
    let platform = start().await;
    let first = sign_up(&platform, EMAIL).await;
    let refresh = |token: &str| at_home(platform.post(REFRESH, &json!({"refresh_token": token})));
    let second = refresh(&token(&first, "refresh_token")).send().await;
    assert_eq!((second.status.as_u16(), second.text("session_id")), (200, first.text("session_id")), "{}", second.text);
    assert_eq!(Program::of(&platform, &second).call("GET", ME).send().await.status, 200);

    refresh(&token(&first, "refresh_token")).refused(401, "TOKEN_REUSED").await;
    refresh(&token(&second, "refresh_token")).refused(401, "SESSION_TERMINATED").await;
    Program::of(&platform, &second).call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    refresh("cvr_nonsense").refused(401, "INVALID_TOKEN").await;
    let outcomes = "select kind || ' ' || outcome from cvault.auth_events order by event_id";
    let expected =
        ["portal_signup success", "portal_refresh success", "portal_refresh reuse", "portal_refresh failure"];
    assert_eq!(strings(&platform, outcomes).await, expected);
}

#[tokio::test]
async fn of_simultaneous_refreshes_one_succeeds_and_the_session_ends() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let body = json!({"refresh_token": token(&login, "refresh_token")});
    let answers = futures::future::join_all((0..8).map(|_| platform.post(REFRESH, &body).send())).await;
    let codes = |code: &str| answers.iter().filter(|answer| answer.body["code"] == code).count();
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 1);
    assert_eq!((codes("TOKEN_REUSED"), codes("SESSION_TERMINATED")), (1, 6), "{answers:?}");
}

#[tokio::test]
async fn sessions_and_tokens_expire() {
    let platform = start().await;
    let program = sign_up(&platform, EMAIL).await;
    let browser = by_browser(platform.post(LOGIN, &credentials(EMAIL, PASSWORD))).send().await;
    execute(&platform, "update cvault.portal_refresh_tokens set expires_at = now()").await;
    let refresh = json!({"refresh_token": token(&program, "refresh_token")});
    platform.post(REFRESH, &refresh).refused(401, "TOKEN_EXPIRED").await;
    execute(&platform, "update cvault.portal_sessions set expires_at = now()").await;
    by_browser(platform.call("GET", ME)).header("cookie", &cookie(&browser)).refused(401, "TOKEN_EXPIRED").await;
    Program::of(&platform, &program).call("GET", ME).refused(401, "TOKEN_EXPIRED").await;
}

#[tokio::test]
async fn use_keeps_a_browser_logged_in_for_a_week_at_most() {
    let platform = start().await;
    sign_up(&platform, EMAIL).await;
    let browser = by_browser(platform.post(LOGIN, &credentials(EMAIL, PASSWORD))).send().await;
    let left = async |since_login: &'static str| {
        execute(&platform, since_login).await;
        let me = by_browser(platform.call("GET", ME)).header("cookie", &cookie(&browser)).send().await;
        assert_eq!(me.status, 200, "{}", me.text);
        strings(&platform, "select (extract(epoch from expires_at - now()) / 3600)::int::text from cvault.portal_sessions where cookie_hash is not null").await
    };
    let hours = left(
        "update cvault.portal_sessions set last_seen_at = now() - interval '11 hours', expires_at = now() + interval '1 hour'",
    );
    assert_eq!(hours.await, ["12"]);
    let hours = left(
        "update cvault.portal_sessions set last_seen_at = now() - interval '11 hours', expires_at = now() + interval '1 hour',
             created_at = now() - interval '165 hours'",
    );
    assert_eq!(hours.await, ["3"]);
}

#[tokio::test]
async fn tokens_of_other_kinds_are_refused() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let tenant = platform.tenant().await;
    let user = platform.register(&tenant, "a@example.com").await;
    let me = |bearer: &str| platform.call("GET", ME).header("authorization", bearer);
    me(&format!("Bearer {}", user.text("access_token"))).refused(401, "INVALID_TOKEN").await;
    me(&format!("Bearer {}", platform.admin_token())).refused(401, "INVALID_TOKEN").await;
    me("Bearer x").refused(401, "INVALID_TOKEN").await;
    platform.call("GET", ME).refused(401, "INVALID_TOKEN").await;
    platform.call("GET", ME).backend(&tenant).refused(401, "INVALID_TOKEN").await;
    platform.call("GET", "/admin/tenants").header("authorization", &access(&login)).refused(401, "INVALID_TOKEN").await;
    let devices = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key);
    devices.header("authorization", &access(&login)).refused(401, "INVALID_TOKEN").await;
}

#[tokio::test]
async fn an_unknown_account_and_a_wrong_password_cannot_be_told_apart() {
    let platform = start().await;
    sign_up(&platform, EMAIL).await;
    let mut details = Vec::new();
    for (email, password) in [(EMAIL, "wrong password"), ("nobody@example.com", PASSWORD), ("no address", PASSWORD)] {
        let answer = log_in(&platform, email, password).await;
        answer.is_problem(email, 401, "INVALID_CREDENTIALS");
        details.push(answer.text("detail"));
    }
    assert!(details.iter().all(|detail| *detail == details[0]));
    let attempts = "select kind || ' ' || outcome from platform.portal_attempts order by attempt_id";
    assert_eq!(strings(&platform, attempts).await, ["login failure"; 3]);
}

#[tokio::test]
async fn guesses_at_one_account_are_bounded_whether_it_exists_or_not() {
    let platform = start().await;
    sign_up(&platform, EMAIL).await;
    for email in [EMAIL, "nobody@example.com"] {
        // at once: an allowance that is used up comes back in time
        let guess = |number| {
            let call = platform.post(LOGIN, &credentials(email, "wrong password"));
            call.from(&format!("198.51.100.{number}")).send()
        };
        let answers = futures::future::join_all((0..25).map(guess)).await;
        let count = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
        assert_eq!((count(401), count(429)), (20, 5));
        let right = platform.post(LOGIN, &credentials(&email.to_uppercase(), PASSWORD)).from("203.0.113.1");
        right.refused(429, "RATE_LIMITED").await;
    }
    let attempts = strings(&platform, "select outcome from platform.portal_attempts").await;
    assert_eq!(attempts, ["failure"; 40], "what is refused unchecked leaves no row");
}

#[tokio::test]
async fn one_network_guesses_at_many_accounts_a_hundred_times_a_minute() {
    let platform = start().await;
    sign_up(&platform, EMAIL).await;
    let asks = (0..300).map(|number| {
        let body = json!({"email": format!("user{number}@example.com")});
        platform.post(RESET, &body).from("203.0.113.9").send()
    });
    let answers = futures::future::join_all(asks).await;
    let count = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
    assert!(count(202) >= 100 && count(429) > 0 && count(202) + count(429) == 300, "{} {}", count(202), count(429));
    let attacker = "203.0.113.9".parse().ok();
    (0..100).for_each(|_| platform.app.throttles.portal_login_failed(attacker));
    let call = platform.post(LOGIN, &credentials(EMAIL, PASSWORD)).from("203.0.113.9");
    call.refused(429, "RATE_LIMITED").await;
    assert_eq!(log_in(&platform, EMAIL, PASSWORD).await.status, 200, "another network is served");
}

#[tokio::test]
async fn one_network_makes_ten_accounts_an_hour() {
    let platform = start().await;
    for number in 0..10 {
        sign_up(&platform, &format!("owner{number}@example.com")).await;
    }
    at_home(platform.post(SIGNUP, &form("more@example.com"))).refused(429, "RATE_LIMITED").await;
    let form = |number| form(&format!("more{number}@example.com"));
    let at_once = (0..12).map(|number| platform.post(SIGNUP, &form(number)).from("203.0.113.1").send());
    let answers = futures::future::join_all(at_once.collect::<Vec<_>>()).await;
    let count = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!((count(201), count(429)), (10, 2), "also when they come at once");
}

#[tokio::test]
async fn people_see_and_end_their_own_sessions_and_no_others() {
    let platform = start().await;
    let first = sign_up(&platform, EMAIL).await;
    let second = log_in(&platform, EMAIL, PASSWORD).await;
    let stranger = sign_up(&platform, "stranger@example.com").await;
    let program = Program::of(&platform, &second);
    let list = program.call("GET", SESSIONS).send().await;
    let rows = list.body["data"].as_array().unwrap();
    let ids: Vec<_> = rows.iter().map(|row| (row["id"].as_str().unwrap(), row["current"].as_bool().unwrap())).collect();
    assert_eq!(ids, [(second.text("session_id").as_str(), true), (first.text("session_id").as_str(), false)]);
    assert_eq!((&rows[0]["ip"], &rows[0]["user_agent"]), (&json!(HOME), &json!(AGENT)));

    let end = |id: &str| program.call("DELETE", &format!("{SESSIONS}/{id}"));
    end(&stranger.text("session_id")).refused(404, "NOT_FOUND").await;
    end("ses_01kaz3r6e8f4s9w2v5m7n0q1tb").refused(404, "NOT_FOUND").await;
    assert_eq!(end(&first.text("session_id")).send().await.status, 204);
    assert_eq!(end(&first.text("session_id")).send().await.status, 204, "may be repeated");
    Program::of(&platform, &first).call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    assert_eq!(Program::of(&platform, &stranger).call("GET", ME).send().await.status, 200);

    let third = log_in(&platform, EMAIL, PASSWORD).await;
    assert_eq!(program.call("DELETE", SESSIONS).send().await.status, 204);
    Program::of(&platform, &third).call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    assert_eq!(program.call("GET", ME).send().await.status, 200, "the one that asked goes on");
}

#[tokio::test]
async fn a_disabled_account_is_out_at_once() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    execute(&platform, "update cvault.tenant_admins set status = 'disabled'").await;
    Program::of(&platform, &login).call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    let refresh = json!({"refresh_token": token(&login, "refresh_token")});
    platform.post(REFRESH, &refresh).refused(401, "SESSION_TERMINATED").await;
    log_in(&platform, EMAIL, PASSWORD).await.is_problem("disabled", 401, "INVALID_CREDENTIALS");
}

#[tokio::test]
async fn people_of_a_suspended_tenant_may_read_and_change_nothing() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let program = Program::of(&platform, &login);
    execute(&platform, "update cvault.tenants set status = 'suspended'").await;
    assert_eq!(program.call("GET", ME).send().await.text("tenant_status"), "suspended");
    program.change(NEW_PASSWORD).refused(403, "TENANT_SUSPENDED").await;
    assert_eq!(program.call("POST", LOGOUT).send().await.status, 204);
}

#[tokio::test]
async fn deleting_a_tenant_removes_its_people_and_frees_their_addresses() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let path = format!("/admin/tenants/{}", login.text("tenant_id"));
    assert_eq!(platform.admin("DELETE", &path).send().await.status, 204);
    Program::of(&platform, &login).call("GET", ME).refused(401, "INVALID_TOKEN").await;
    sign_up(&platform, EMAIL).await;
}

#[tokio::test]
async fn a_sensitive_request_waits_for_its_challenge_and_happens_once() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let other = log_in(&platform, EMAIL, PASSWORD).await;
    let program = Program::of(&platform, &login);
    let challenge = challenged(program.change(NEW_PASSWORD)).await;
    assert_eq!(challenge.body["challenge"]["action"], "password.change");
    assert!(!challenge.headers.contains_key("idempotency-replayed"));
    assert_eq!(log_in(&platform, EMAIL, PASSWORD).await.status, 200, "nothing has happened");

    let token = program.answer(&challenge).await;
    let again = program.post(&verify_url(&challenge), &password_answer(PASSWORD));
    again.refused(404, "NOT_FOUND").await;
    assert_eq!(program.change(NEW_PASSWORD).header("x-challenge-token", &token).send().await.status, 204);
    assert_eq!(log_in(&platform, EMAIL, NEW_PASSWORD).await.status, 200);
    Program::of(&platform, &other).call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    assert_eq!(program.call("GET", ME).send().await.status, 200);

    challenged(program.change(NEW_PASSWORD).header("x-challenge-token", &token)).await;
    let actions = strings(&platform, "select action from cvault.audit_log order by audit_id").await;
    assert!(
        actions.iter().any(|a| a == "step_up.verify") && actions.iter().any(|a| a == "password.change"),
        "{actions:?}"
    );
}

#[tokio::test]
async fn a_challenge_token_is_good_for_its_session_and_request_only() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let second = log_in(&platform, EMAIL, PASSWORD).await;
    let (program, other) = (Program::of(&platform, &login), Program::of(&platform, &second));
    let challenge = challenged(program.change(NEW_PASSWORD)).await;
    other.post(&verify_url(&challenge), &password_answer(PASSWORD)).refused(404, "NOT_FOUND").await;
    let token = program.answer(&challenge).await;

    challenged(other.change(NEW_PASSWORD).header("x-challenge-token", &token)).await;
    challenged(program.change("yet another password").header("x-challenge-token", &token)).await;
    let elsewhere = program.post(&format!("{CHANGE}?x=1"), &json!({"password": NEW_PASSWORD}));
    challenged(elsewhere.header("x-challenge-token", &token)).await;
    challenged(program.change(NEW_PASSWORD).header("x-challenge-token", "cvc_nonsense")).await;
    let twice = program.change(NEW_PASSWORD).header("x-challenge-token", &token).header("x-challenge-token", &token);
    challenged(twice).await;
    assert_eq!(log_in(&platform, EMAIL, PASSWORD).await.status, 200, "nothing has happened");
    assert_eq!(program.change(NEW_PASSWORD).header("x-challenge-token", &token).send().await.status, 204);
}

#[tokio::test]
async fn of_simultaneous_uses_of_a_challenge_token_one_succeeds() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let program = Program::of(&platform, &login);
    let token = program.answer(&challenged(program.change(NEW_PASSWORD)).await).await;
    let uses = (0..6).map(|_| program.change(NEW_PASSWORD).header("x-challenge-token", &token).send());
    let answers = futures::future::join_all(uses).await;
    let count = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!((count(204), count(428)), (1, 5));
}

#[tokio::test]
async fn challenges_and_their_tokens_expire() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let program = Program::of(&platform, &login);
    let challenge = challenged(program.change(NEW_PASSWORD)).await;
    execute(&platform, "update cvault.step_up_challenges set expires_at = now()").await;
    program.post(&verify_url(&challenge), &password_answer(PASSWORD)).refused(404, "NOT_FOUND").await;
    let token = program.answer(&challenged(program.change(NEW_PASSWORD)).await).await;
    execute(&platform, "update cvault.step_up_challenges set token_expires_at = now() where token_hash is not null")
        .await;
    challenged(program.change(NEW_PASSWORD).header("x-challenge-token", &token)).await;
}

#[tokio::test]
async fn wrong_answers_end_the_session_at_the_fifth() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let program = Program::of(&platform, &login);
    let challenge = challenged(program.change(NEW_PASSWORD)).await;
    let wrong = || program.post(&verify_url(&challenge), &password_answer("wrong password"));
    for _ in 0..4 {
        wrong().refused(401, "INVALID_CREDENTIALS").await;
    }
    let ended = wrong().refused(401, "SESSION_TERMINATED").await;
    assert_eq!(ended.header("x-session-terminated"), "true");
    program.call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    let malformed = json!({"method": "telepathy"});
    let second = log_in(&platform, EMAIL, PASSWORD).await;
    let answer = Program::of(&platform, &second).post(&verify_url(&challenge), &malformed).send().await;
    assert_eq!(answer.status, 422, "{}", answer.text);
}

#[tokio::test]
async fn a_session_that_looks_stolen_is_ended() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let body = json!({"password": NEW_PASSWORD});
    let from = |ip: &str, agent: &str| {
        let call = platform.post(CHANGE, &body).header("authorization", &access(&login));
        call.from(ip).header("user-agent", agent)
    };
    challenged(from("203.0.113.5", AGENT)).await;
    challenged(from(HOME, "test/2")).await;
    let blocked = from("203.0.113.5", "curl/8").refused(401, "SESSION_TERMINATED").await;
    assert_eq!(blocked.header("x-session-terminated"), "true");
    Program::of(&platform, &login).call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    let reasons = "select end_reason from cvault.portal_sessions";
    assert_eq!(strings(&platform, reasons).await, ["risk"]);
    let actions = strings(&platform, "select action from cvault.audit_log order by audit_id").await;
    assert_eq!(actions.last().unwrap(), "portal_session.terminate");
    assert_eq!(log_in(&platform, EMAIL, PASSWORD).await.status, 200);
}

#[tokio::test]
async fn ending_a_session_asks_only_when_something_looks_odd() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let from = |ip: &str| {
        let call = platform.call("DELETE", SESSIONS).header("authorization", &access(&login));
        call.from(ip).header("user-agent", AGENT)
    };
    assert_eq!(from(HOME).send().await.status, 204);
    let challenge = challenged(from("203.0.113.5")).await;
    let answer = platform.post(&verify_url(&challenge), &password_answer(PASSWORD)).from("203.0.113.5");
    let answer = answer.header("authorization", &access(&login)).header("user-agent", AGENT).send().await;
    let token = answer.text("challenge_token");
    assert_eq!(from("203.0.113.5").header("x-challenge-token", &token).send().await.status, 204);
    assert_eq!(from("203.0.113.5").send().await.status, 204, "the network is the account's own now");

    let other = log_in(&platform, EMAIL, PASSWORD).await;
    for _ in 0..5 {
        log_in(&platform, EMAIL, "wrong password").await.is_problem("a stranger", 401, "INVALID_CREDENTIALS");
    }
    challenged(Program::of(&platform, &other).call("DELETE", SESSIONS)).await;
}

#[tokio::test]
async fn the_oldest_of_a_hundred_sessions_makes_room() {
    let platform = start().await;
    let first = sign_up(&platform, EMAIL).await;
    let second = log_in(&platform, EMAIL, PASSWORD).await;
    for _ in 0..99 {
        assert_eq!(log_in(&platform, EMAIL, PASSWORD).await.status, 200);
    }
    Program::of(&platform, &first).call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    let list = Program::of(&platform, &second).call("GET", SESSIONS).send().await;
    assert_eq!(list.body["data"].as_array().unwrap().len(), 100);
    assert!(list.header("ratelimit").starts_with("\"person\";"), "{:?}", list.headers);
}

#[tokio::test]
async fn a_rate_that_no_person_reaches_ends_the_session() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let program = Program::of(&platform, &login);
    let answers = futures::future::join_all((0..70).map(|_| program.change(NEW_PASSWORD).send())).await;
    let count = |code: &str| answers.iter().filter(|answer| answer.body["code"] == code).count();
    assert_eq!((count("CHALLENGE_REQUIRED"), count("SESSION_TERMINATED")), (60, 10));
}

#[tokio::test]
async fn one_person_sends_three_hundred_requests_a_minute() {
    let platform = start().await;
    let login = sign_up(&platform, EMAIL).await;
    let program = Program::of(&platform, &login);
    let answers = futures::future::join_all((0..600).map(|_| program.call("GET", ME).send())).await;
    let count = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
    assert!(count(200) >= 300 && count(429) > 0 && count(200) + count(429) == 600, "{} {}", count(200), count(429));
}

/// Mails go to files here; the links in them.
pub(crate) async fn mailed(platform: &Platform, folder: &std::path::Path) -> Vec<String> {
    mail::deliver(&platform.app).await.unwrap();
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending == "eml"));
    files.sort();
    let texts = files.iter().map(|path| std::fs::read_to_string(path).unwrap());
    texts.map(|text| text.replace("=\r\n", "").replace("=3D", "=")).collect()
}

pub(crate) fn link_token(mail: &str) -> String {
    let rest = mail.split("#token=").nth(1).unwrap_or_else(|| panic!("no link in {mail}"));
    rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
}

async fn with_mail() -> (Platform, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let platform = Platform::with(|config| {
        config.passwords = Scheme::Argon2id { memory_kib: 64, passes: 1 };
        config.mail.sink = Sink::Directory(folder.path().to_owned());
    })
    .await;
    (platform, folder)
}

#[tokio::test]
async fn an_address_is_verified_by_the_newest_link_mailed_to_it() {
    let (platform, folder) = with_mail().await;
    let login = sign_up(&platform, EMAIL).await;
    let program = Program::of(&platform, &login);
    let verify = |token: &str| platform.post(VERIFY, &json!({"token": token}));
    let first = link_token(&mailed(&platform, folder.path()).await[0]);
    assert_eq!(program.call("POST", &format!("{VERIFY}/resend")).send().await.status, 202);
    verify(&first).refused(401, "INVALID_TOKEN").await;
    let mails = mailed(&platform, folder.path()).await;
    let second = mails.iter().map(|mail| link_token(mail)).find(|token| *token != first).unwrap();
    let reset = json!({"token": second, "password": NEW_PASSWORD});
    platform.post(CONFIRM, &reset).refused(401, "INVALID_TOKEN").await;
    assert_eq!(verify(&second).send().await.status, 204);
    verify(&second).refused(401, "INVALID_TOKEN").await;
    verify("cvl_nonsense").refused(401, "INVALID_TOKEN").await;
    assert_eq!(program.call("GET", ME).send().await.body["email_verified"], true);
    assert_eq!(program.call("POST", &format!("{VERIFY}/resend")).send().await.status, 202);
    assert_eq!(mailed(&platform, folder.path()).await.len(), 2, "nothing to verify any more");
}

#[tokio::test]
async fn a_forgotten_password_is_chosen_anew_and_every_session_ends() {
    let (platform, folder) = with_mail().await;
    let login = sign_up(&platform, EMAIL).await;
    mailed(&platform, folder.path()).await;
    for file in std::fs::read_dir(folder.path()).unwrap() {
        std::fs::remove_file(file.unwrap().path()).unwrap();
    }
    let ask = |email: &str| platform.post(RESET, &json!({"email": email}));
    let known = ask(EMAIL).send().await;
    let unknown = ask("nobody@example.com").send().await;
    assert_eq!((known.status.as_u16(), &known.text), (202, &unknown.text));
    assert_eq!(unknown.status, 202);
    let mails = mailed(&platform, folder.path()).await;
    assert_eq!(mails.len(), 1);
    let token = link_token(&mails[0]);

    let confirm = |token: &str, password: &str| platform.post(CONFIRM, &json!({"token": token, "password": password}));
    let short = confirm(&token, "short").refused(422, "VALIDATION_FAILED").await;
    assert_eq!(short.faults(), ["/password too_short"]);
    assert_eq!(confirm(&token, NEW_PASSWORD).send().await.status, 204);
    confirm(&token, "and another password").refused(401, "INVALID_TOKEN").await;
    Program::of(&platform, &login).call("GET", ME).refused(401, "SESSION_TERMINATED").await;
    log_in(&platform, EMAIL, PASSWORD).await.is_problem("the old one", 401, "INVALID_CREDENTIALS");
    let again = log_in(&platform, EMAIL, NEW_PASSWORD).await;
    assert_eq!(again.status, 200);
    let me = Program::of(&platform, &again).call("GET", ME).send().await;
    assert_eq!(me.body["email_verified"], true, "whoever opened the link reads the address");
    assert_eq!(mailed(&platform, folder.path()).await.len(), 2, "the owner is told");
}

#[tokio::test]
async fn a_link_expires_and_few_are_mailed() {
    let (platform, folder) = with_mail().await;
    sign_up(&platform, EMAIL).await;
    let ask = |email: &str, ip: &str| platform.post(RESET, &json!({"email": email})).from(ip);
    assert_eq!(ask(EMAIL, HOME).send().await.status, 202);
    let mails = mailed(&platform, folder.path()).await;
    let token = link_token(mails.iter().find(|mail| mail.contains("reset-password")).unwrap());
    execute(&platform, "update cvault.portal_links set expires_at = now()").await;
    platform.post(CONFIRM, &json!({"token": token, "password": NEW_PASSWORD})).refused(401, "INVALID_TOKEN").await;
    for (email, left) in [(EMAIL, 4), ("nobody@example.com", 5)] {
        for number in 0..left {
            assert_eq!(ask(email, &format!("198.51.100.{number}")).send().await.status, 202);
        }
        ask(email, "203.0.113.1").refused(429, "RATE_LIMITED").await;
    }
}

#[tokio::test]
async fn nothing_secret_of_the_portal_is_stored_in_clear() {
    let (platform, folder) = with_mail().await;
    let program = sign_up(&platform, EMAIL).await;
    let browser = by_browser(platform.post(LOGIN, &credentials(EMAIL, PASSWORD))).send().await;
    let session = Program::of(&platform, &program);
    let challenge = session.answer(&challenged(session.change(NEW_PASSWORD)).await).await;
    let link = link_token(&mailed(&platform, folder.path()).await[0]);
    let everything = strings(
        &platform,
        "select t::text from cvault.tenant_admins t union all select t::text from cvault.portal_sessions t
         union all select t::text from cvault.portal_refresh_tokens t union all select t::text from cvault.portal_links t
         union all select t::text from cvault.step_up_challenges t union all select t::text from platform.portal_attempts t
         union all select t::text from cvault.auth_events t union all select t::text from cvault.audit_log t
         union all select t::text from cvault.outbox t",
    )
    .await
    .join(" ");
    let cookie = cookie(&browser).split_once('=').unwrap().1.to_owned();
    for secret in
        [PASSWORD, &challenge, &link, &cookie, &token(&program, "refresh_token"), &token(&program, "access_token")]
    {
        assert!(!everything.contains(secret) && !everything.contains(&hex::encode(secret)), "{secret}");
    }
}

#[test]
fn the_roles_of_the_wire_are_those_of_the_database() {
    let sql = include_str!("../../../migrations/0010_portal.sql");
    let roles = [TenantRole::Owner, TenantRole::Admin, TenantRole::Developer, TenantRole::Billing, TenantRole::Viewer];
    let list: Vec<String> = roles.iter().map(|role| format!("'{}'", role.as_str())).collect();
    assert!(sql.contains(&format!("check (role in ({}))", list.join(", "))));
}
