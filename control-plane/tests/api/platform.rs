//! A platform of its own for each test, and calls to it.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use cvault_control_plane::app::App;
use cvault_control_plane::auth::tokens;
use cvault_control_plane::config::{Config, Overrides};
use cvault_control_plane::http::router;
use cvault_control_plane::http::serve::Peer;
use cvault_control_plane::keys::KeyRing;
use cvault_control_plane::postgres::scratch::ScratchDatabase;
use cvault_control_plane::serve;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::time::Instant;
use tower::ServiceExt;
use zeroize::Zeroizing;

/// For a thousand requests on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) const PASSWORD: &str = "correct horse battery staple";

pub(crate) struct Platform {
    pub(crate) app: App,
    pub(crate) database: Arc<ScratchDatabase>,
    router: Router,
}

pub(crate) struct Tenant {
    pub(crate) id: String,
    pub(crate) key: String,
    pub(crate) secret: String,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
    pub(crate) text: String,
}

/// One request, written as it would be on the wire.
pub(crate) struct Call<'a> {
    platform: &'a Platform,
    method: Method,
    path: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    peer: Peer,
}

impl Platform {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let database = Arc::new(ScratchDatabase::create().await.unwrap());
        let mut config = Config::from_env(&|_| None, &Overrides::default()).unwrap();
        config.rate_limit_per_minute = 1_000_000;
        config.admin_step_up = false;
        change(&mut config);
        let keys = KeyRing::single(Zeroizing::new([7; 32]));
        let app = serve::open(config, &database.config(), keys).await.unwrap();
        Self { router: router::api(app.clone()), app, database }
    }

    /// The same installation, started anew with other key-encryption keys.
    pub(crate) async fn with_keys(self, keys: &[(i16, u8)]) -> Self {
        let ring = keys.iter().map(|(version, byte)| (*version, Zeroizing::new([*byte; 32])));
        self.started_again(KeyRing::versions(ring).unwrap()).await
    }

    /// Another process of the same installation.
    pub(crate) async fn replica(&self) -> Self {
        self.started_again(self.app.keys.clone()).await
    }

    async fn started_again(&self, keys: KeyRing) -> Self {
        let app = serve::open(self.app.config.clone(), &self.database.config(), keys).await.unwrap();
        Self { router: router::api(app.clone()), app, database: Arc::clone(&self.database) }
    }

    pub(crate) fn admin_token(&self) -> String {
        let now = self.app.clock.now();
        let keys = self.app.token_keys.last();
        tokens::mint_admin(keys.signing(now), &self.app.config.public_url, "test", now).expose().to_owned()
    }

    pub(crate) fn call(&self, method: &str, path: &str) -> Call<'_> {
        let method = method.parse().unwrap();
        Call {
            platform: self,
            method,
            path: path.to_owned(),
            headers: Vec::new(),
            body: Vec::new(),
            peer: Peer::default(),
        }
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Call<'_> {
        self.call("POST", path).json(body)
    }

    pub(crate) fn admin(&self, method: &str, path: &str) -> Call<'_> {
        self.call(method, path).header("authorization", &format!("Bearer {}", self.admin_token()))
    }

    pub(crate) async fn tenant(&self) -> Tenant {
        self.tenant_with(json!({"name": "Acme"})).await
    }

    pub(crate) async fn tenant_with(&self, body: Value) -> Tenant {
        let answer = self.admin("POST", "/admin/tenants").json(&body).send().await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        let text = |name: &str| answer.body[name].as_str().unwrap().to_owned();
        Tenant { id: text("id"), key: text("api_key"), secret: text("api_secret") }
    }

    /// Past every policy.
    pub(crate) async fn superuser(&self) -> sqlx::PgConnection {
        use sqlx::Connection;
        sqlx::PgConnection::connect_with(&self.database.superuser()).await.unwrap()
    }

    pub(crate) async fn register(&self, tenant: &Tenant, email: &str) -> Answer {
        self.post("/api/v1/auth/register", &json!({"email": email, "password": PASSWORD})).backend(tenant).send().await
    }
}

impl Call<'_> {
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// As if it came from this address.
    pub(crate) fn from(mut self, ip: &str) -> Self {
        self.peer = ip.parse::<std::net::IpAddr>().unwrap().into();
        self
    }

    /// Key and secret, as the tenant's backend sends them.
    pub(crate) fn backend(self, tenant: &Tenant) -> Self {
        self.header("x-api-key", &tenant.key).header("x-api-secret", &tenant.secret)
    }

    pub(crate) fn json(self, body: &Value) -> Self {
        self.raw("application/json", body.to_string())
    }

    pub(crate) fn raw(mut self, kind: &str, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self.header("content-type", kind)
    }

    pub(crate) async fn send(self) -> Answer {
        let mut request = Request::builder().method(self.method).uri(&self.path).extension(self.peer);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let request = request.body(Body::from(self.body)).unwrap();
        let response = self.platform.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Answer { status: parts.status, headers: parts.headers, body, text }
    }

    /// Sends, and checks that the answer is a whole problem with this status and code.
    pub(crate) async fn refused(self, status: u16, code: &str) -> Answer {
        let what = format!("{} {}", self.method, self.path);
        let answer = self.send().await;
        answer.is_problem(&what, status, code);
        answer
    }
}

/// The answer to a request that was decided: who is told that the platform is busy asks again.
pub(crate) async fn decided<'a>(call: impl Fn() -> Call<'a>) -> Answer {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = call().send().await;
        let busy = ["OVERLOADED", "DATABASE_UNAVAILABLE"].map(Value::from).contains(&answer.body["code"]);
        if !busy {
            return answer;
        }
        assert!(Instant::now() < deadline, "busy for too long: {}", answer.text);
        assert!(answer.headers.contains_key("retry-after"), "{}", answer.text);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl Answer {
    pub(crate) fn is_problem(&self, what: &str, status: u16, code: &str) {
        assert_eq!((self.status.as_u16(), self.body["code"].as_str()), (status, Some(code)), "{what}: {}", self.text);
        assert_eq!(self.headers["content-type"], "application/problem+json", "{what}");
        assert_eq!(self.body["status"], status, "{what}");
        assert_eq!(self.body["type"], format!("https://docs.cvault.io/errors/{code}"), "{what}");
        assert!(self.body["title"].is_string() && self.body["detail"].is_string(), "{what}: {}", self.text);
        assert!(self.body["retryable"].is_boolean(), "{what}");
        assert_eq!(self.body["request_id"], self.headers["x-request-id"].to_str().unwrap(), "{what}");
        assert_eq!(self.headers.contains_key("www-authenticate"), status == 401, "{what}");
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.body[name].as_str().unwrap_or_else(|| panic!("no {name} in {}", self.text)).to_owned()
    }

    /// `pointer code` of every field fault.
    pub(crate) fn faults(&self) -> Vec<String> {
        let faults = self.body["errors"].as_array().cloned().unwrap_or_default();
        faults.iter().map(|f| format!("{} {}", f["pointer"].as_str().unwrap(), f["code"].as_str().unwrap())).collect()
    }
}
