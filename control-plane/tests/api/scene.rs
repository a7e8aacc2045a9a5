//! A platform with a live server, and callers of every kind.

use cvault_types::ServerId;
use serde_json::{Value, json};

use crate::platform::{Call, Platform, Tenant};

/// A tenant's user and where it logs in.
pub(crate) struct Person {
    pub(crate) key: String,
    pub(crate) token: String,
    pub(crate) refresh: String,
}

impl Person {
    pub(crate) async fn of(platform: &Platform, tenant: &Tenant, email: &str) -> Self {
        let answer = platform.register(tenant, email).await;
        let (token, refresh) = (answer.text("access_token"), answer.text("refresh_token"));
        Self { key: tenant.key.clone(), token, refresh }
    }

    pub(crate) fn signs<'a>(&self, call: Call<'a>) -> Call<'a> {
        call.header("x-api-key", &self.key).header("authorization", &format!("Bearer {}", self.token))
    }

    pub(crate) fn call<'a>(&self, platform: &'a Platform, method: &str, path: &str) -> Call<'a> {
        self.signs(platform.call(method, path))
    }

    pub(crate) async fn device(&self, platform: &Platform, name: &str) -> Value {
        let call = self.call(platform, "POST", "/api/v1/devices").json(&json!({"device_name": name}));
        let answer = call.send().await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        answer.body
    }
}

/// The pool named `default` and a server that looks alive; its id.
pub(crate) async fn with_server(platform: &Platform) -> String {
    with_server_and_pool(platform, "10.8.0.0/16").await
}

pub(crate) async fn with_server_and_pool(platform: &Platform, ipv4: &str) -> String {
    let pool = json!({"name": "default", "ipv4": ipv4});
    let made = platform.admin("POST", "/admin/pools").json(&pool).send().await;
    assert_eq!(made.status, 201, "{}", made.text);
    let body = json!({"name": "s1", "region": "lab-1", "public_ip": "203.0.113.10"});
    let made = platform.admin("POST", "/admin/servers").json(&body).send().await;
    assert_eq!(made.status, 201, "{}", made.text);
    let id = made.body["server"]["id"].as_str().unwrap().to_owned();
    let key: [u8; 32] = rand::random();
    sqlx::query(
        "update platform.servers set public_key = $2, identity_pin = $2, last_seen_at = now() where server_id = $1",
    )
    .bind(id.parse::<ServerId>().unwrap().uuid())
    .bind(key.as_slice())
    .execute(&platform.app.db.sys)
    .await
    .unwrap();
    id
}
