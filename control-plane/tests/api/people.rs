//! Somebody of a tenant who is logged in to the portal, for tests of what they may do there.

use serde_json::{Value, json};

use crate::platform::{Answer, Call, PASSWORD, Platform, Tenant};

pub(crate) struct Person<'a> {
    platform: &'a Platform,
    /// With the first key of the tenant.
    pub(crate) tenant: Tenant,
    bearer: String,
}

/// As one program, from one place: nothing looks odd.
fn at_home(call: Call<'_>) -> Call<'_> {
    call.from("192.0.2.7").header("user-agent", "test/1")
}

impl<'a> Person<'a> {
    /// The owner of a new tenant.
    pub(crate) async fn owner(platform: &'a Platform, email: &str) -> Self {
        let form = json!({"business_name": "Acme", "email": email, "password": PASSWORD});
        let answer = at_home(platform.post("/api/v1/tenant/auth/signup", &form)).send().await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        let tenant =
            Tenant { id: answer.text("tenant_id"), key: answer.text("api_key"), secret: answer.text("api_secret") };
        let token = answer.body["tokens"]["access_token"].as_str().unwrap();
        Self { platform, tenant, bearer: format!("Bearer {token}") }
    }

    /// From now on.
    pub(crate) async fn has_role(&self, role: &str) {
        sqlx::query("update cvault.tenant_admins set role = $1 where tenant_id = (select tenant_id from cvault.api_keys where key_text = $2)")
            .bind(role)
            .bind(&self.tenant.key)
            .execute(&mut self.platform.superuser().await)
            .await
            .unwrap();
    }

    pub(crate) fn call(&self, method: &str, path: &str) -> Call<'a> {
        at_home(self.platform.call(method, path)).header("authorization", &self.bearer)
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        let answer = self.call("GET", path).send().await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer
    }

    /// Sends it, answers the challenge, and sends it again.
    pub(crate) async fn sure(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        self.sure_with(method, path, body, &[]).await
    }

    pub(crate) async fn sure_with(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, &str)],
    ) -> Answer {
        let call = || {
            let call = self.call(method, path);
            let call = headers.iter().fold(call, |call, (name, value)| call.header(name, value));
            match body {
                Some(body) => call.json(body),
                None => call,
            }
        };
        let challenged = call().refused(428, "CHALLENGE_REQUIRED").await;
        let verify = challenged.body["challenge"]["verify_url"].as_str().unwrap();
        let path = &verify[verify.find("/api/v1/").unwrap()..];
        let proof = json!({"method": "password", "password": PASSWORD});
        let token = self.call("POST", path).json(&proof).send().await;
        assert_eq!(token.status, 200, "{}", token.text);
        call().header("x-challenge-token", &token.text("challenge_token")).send().await
    }
}
