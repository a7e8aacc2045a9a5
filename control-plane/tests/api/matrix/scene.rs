//! A tenant under attack, another one, and people of both.

use cvault_control_plane::auth::api_keys::{self, KeySettings};
use cvault_control_plane::auth::passwords::Scheme;
use cvault_control_plane::mail::Sink;
use cvault_control_plane::tenants::Actor;
use cvault_types::api_key::Scope;
use cvault_types::{ApiKeyId, RequestId, TenantAdminId, TenantId, UserId};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use sqlx::Connection;
use uuid::Uuid;

use super::rows::Caller;
use crate::platform::{Answer, Call, PASSWORD, Platform, Tenant};
use crate::scene::{Person, with_server};

pub(super) const LOGIN: &str = "/api/v1/tenant/auth/login";
pub(super) const CHANGE_PASSWORD: &str = "/api/v1/tenant/auth/password";
pub(super) const EXTERNAL_ID: &str = "the-victims-own-name";

/// One in the audit log or among the logins.
#[derive(Debug)]
pub(super) struct Entry {
    /// Nil: the platform's own.
    pub(super) tenant: Uuid,
    pub(super) actor: String,
    pub(super) action: String,
}

pub(super) struct Scene {
    pub(super) platform: Platform,
    pub(super) victim: Person,
    pub(super) foreigner: Person,
    pub(super) foreign_tenant: Tenant,
    pub(super) device: String,
    pub(super) server: String,
    /// Of the victim.
    pub(super) tenant: String,
    pub(super) user: String,
    /// A key of the victim's tenant.
    pub(super) key_id: String,
    /// Of the owner, who is nobody of the callers.
    pub(super) session: String,
    /// Of the victim with that key.
    pub(super) request: String,
    /// The server's.
    pub(super) pool: String,
    /// Where mails go.
    pub(super) mails: tempfile::TempDir,
    neighbour: Person,
    /// Of the victim's tenant, for its usage alone.
    narrow: Tenant,
    foreign_owner: String,
    /// Access tokens of the people of the victim's tenant.
    viewer: String,
    billing: String,
    developer: String,
    admin: String,
    challenge: String,
}

impl Scene {
    /// As an installation is without any setting.
    pub(super) async fn new() -> Self {
        Self::with_approvals(true).await
    }

    pub(super) async fn with_approvals(admin_step_up: bool) -> Self {
        let mails = tempfile::tempdir().unwrap();
        let platform = Platform::with(|config| {
            config.passwords = Scheme::Argon2id { memory_kib: 64, passes: 1 };
            config.admin_step_up = admin_step_up;
            config.mail.sink = Sink::Directory(mails.path().to_owned());
        })
        .await;
        let server = with_server(&platform).await;
        let (tenant, owner) = sign_up(&platform, "owner@victim.example").await;
        let (foreign_tenant, foreign) = sign_up(&platform, "owner@foreign.example").await;
        let challenged = platform.post(CHANGE_PASSWORD, &json!({"password": "another fine password"}));
        let challenged = challenged.header("authorization", &access_token(&owner));
        let challenged = challenged.refused(428, "CHALLENGE_REQUIRED").await;
        let victim = Person::of(&platform, &tenant, "victim@example.com").await;
        let neighbour = Person::of(&platform, &tenant, "neighbour@example.com").await;
        let foreigner = Person::of(&platform, &foreign_tenant, "foreigner@example.com").await;
        let device = victim.device(&platform, "d").await["device_id"].as_str().unwrap().to_owned();
        let user = named(&platform, &tenant).await;
        let (narrow, key_id) = narrow_key(&platform, &tenant).await;
        let asked = platform.call("GET", "/api/v1/usage").header("x-api-key", &narrow.key);
        let asked = asked.header("authorization", &format!("Bearer {}", victim.token)).send().await;
        assert_eq!(asked.status, 200, "{}", asked.text);
        let pools = platform.admin("GET", "/admin/pools").send().await;
        Self {
            viewer: colleague(&platform, "viewer").await,
            billing: colleague(&platform, "billing").await,
            developer: colleague(&platform, "developer").await,
            admin: colleague(&platform, "admin").await,
            foreign_owner: access_token(&foreign),
            session: owner.text("session_id"),
            tenant: tenant.id,
            request: asked.header("x-request-id").to_owned(),
            pool: pools.body["data"][0]["id"].as_str().unwrap().to_owned(),
            challenge: challenged.body["challenge"]["id"].as_str().unwrap().to_owned(),
            platform,
            victim,
            neighbour,
            foreigner,
            foreign_tenant,
            device,
            server,
            mails,
            narrow,
            user,
            key_id,
        }
    }

    pub(super) fn sign<'a>(&'a self, caller: Caller, call: Call<'a>) -> Call<'a> {
        let bearer = |call: Call<'a>, token: &str| call.header("authorization", token);
        match caller {
            Caller::Anonymous => call,
            Caller::WrongKey => call
                .header("x-api-key", "cvk_0000000000000000000000000000000000000000")
                .header("x-api-secret", "cvs_0000000000000000000000000000000000000000")
                .header("authorization", "Bearer eyJhbGciOiJFZERTQSJ9.e30.AAAA"),
            Caller::MixedTenants => {
                Person { key: self.victim.key.clone(), token: self.foreigner.token.clone(), refresh: String::new() }
                    .signs(call)
            }
            Caller::ForeignUser => self.foreigner.signs(call),
            Caller::ForeignBackend => call.backend(&self.foreign_tenant),
            Caller::Neighbour => self.neighbour.signs(call),
            Caller::NarrowKey => {
                call.backend(&self.narrow).header("authorization", &format!("Bearer {}", self.neighbour.token))
            }
            Caller::ForeignOwner => bearer(call, &self.foreign_owner),
            Caller::Viewer => bearer(call, &self.viewer),
            Caller::Billing => bearer(call, &self.billing),
            Caller::Developer => bearer(call, &self.developer),
            Caller::Admin => bearer(call, &self.admin),
            Caller::PlatformAdmin => call.header("authorization", &format!("Bearer {}", self.platform.admin_token())),
        }
    }

    /// The path with ids of what is somebody else's; for staff, to whom nothing is, of what is not there.
    pub(super) fn path(&self, template: &str) -> String {
        template
            .replace("{device_id}", &self.device)
            .replace("{user_id}", &self.user)
            .replace("{external_id}", EXTERNAL_ID)
            .replace("{api_key_id}", &self.key_id)
            .replace("{session_id}", &self.session)
            .replace("{challenge_id}", &self.challenge)
            .replace("{tenant_id}", "ten_00000000000000000000000001")
            .replace("{server_id}", "srv_00000000000000000000000001")
            .replace("{pool_id}", "pol_00000000000000000000000001")
    }

    pub(super) fn body(&self, template: &str) -> Value {
        let text = template
            .replace("$device", &self.device)
            .replace("$refresh", &self.victim.refresh)
            .replace("$key", &self.key_id)
            .replace("$password", PASSWORD);
        serde_json::from_str(&text).unwrap()
    }

    /// What somebody of another tenant must not be shown.
    pub(super) fn of_the_victim(&self) -> [&str; 7] {
        [&self.device, &self.user, &self.key_id, &self.session, &self.challenge, &self.victim.key, "victim@example.com"]
    }

    pub(super) async fn entries(&self) -> i64 {
        let mut connection = sqlx::PgConnection::connect_with(&self.platform.database.superuser()).await.unwrap();
        sqlx::query_scalar("select (select count(*) from cvault.audit_log) + (select count(*) from cvault.auth_events)")
            .fetch_one(&mut connection)
            .await
            .unwrap()
    }

    /// What the request left, in the audit log and among the logins of users.
    pub(super) async fn entries_of(&self, request: RequestId) -> Vec<Entry> {
        let mut connection = self.platform.superuser().await;
        let audited: Vec<(Uuid, String, String)> =
            sqlx::query_as("select tenant_id, actor, action from cvault.audit_log where request_id = $1")
                .bind(request.uuid())
                .fetch_all(&mut connection)
                .await
                .unwrap();
        let sql = "select tenant_id, user_id, admin_id, kind from cvault.auth_events where request_id = $1";
        let logins: Vec<(Uuid, Option<Uuid>, Option<Uuid>, String)> =
            sqlx::query_as(sql).bind(request.uuid()).fetch_all(&mut connection).await.unwrap();
        let of_people = logins.into_iter().map(|(tenant, user, admin, action)| {
            let user = user.map(|id| UserId::from_uuid(id).to_string());
            let actor = user.or(admin.map(|id| TenantAdminId::from_uuid(id).to_string())).unwrap_or_default();
            Entry { tenant, actor, action }
        });
        let audited = audited.into_iter().map(|(tenant, actor, action)| Entry { tenant, actor, action });
        audited.chain(of_people).collect()
    }

    /// `key_…` of a key.
    pub(super) async fn id_of(&self, tenant: &Tenant) -> String {
        let sql = "select api_key_id from cvault.api_keys where key_text = $1";
        let id = sqlx::query_scalar(sql).bind(&tenant.key).fetch_one(&mut self.platform.superuser().await).await;
        ApiKeyId::from_uuid(id.unwrap()).to_string()
    }

    /// The tenant under attack, and `usr_…` of its user whom a write is made by.
    pub(super) fn victim_is(&self) -> (&str, &str) {
        (&self.narrow.id, &self.user)
    }
}

pub(super) fn access_token(login: &Answer) -> String {
    let token = login.body["tokens"]["access_token"].as_str();
    format!("Bearer {}", token.unwrap_or_else(|| panic!("no token in {}", login.text)))
}

async fn sign_up(platform: &Platform, email: &str) -> (Tenant, Answer) {
    let form = json!({"business_name": "Acme", "email": email, "password": PASSWORD});
    let answer = platform.post("/api/v1/tenant/auth/signup", &form).send().await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    let tenant =
        Tenant { id: answer.text("tenant_id"), key: answer.text("api_key"), secret: answer.text("api_secret") };
    (tenant, answer)
}

/// Somebody of the victim's tenant, with the owner's password and a role of their own; the access token.
async fn colleague(platform: &Platform, role: &str) -> String {
    let email = format!("{role}@victim.example");
    sqlx::query(
        "insert into cvault.tenant_admins (tenant_id, admin_id, email, password_hash, role)
         select tenant_id, gen_random_uuid(), $1, password_hash, $2 from cvault.tenant_admins
         where email = 'owner@victim.example'",
    )
    .bind(&email)
    .bind(role)
    .execute(&mut platform.superuser().await)
    .await
    .unwrap();
    let answer = platform.post(LOGIN, &json!({"email": email, "password": PASSWORD})).send().await;
    assert_eq!((answer.status.as_u16(), answer.text("role").as_str()), (200, role), "{}", answer.text);
    access_token(&answer)
}

/// The id of the victim, who gets a name of the tenant's own.
async fn named(platform: &Platform, tenant: &Tenant) -> String {
    let found = platform.call("GET", "/api/v1/users?email=victim@example.com").backend(tenant).send().await;
    let id = found.body["data"][0]["user_id"].as_str().unwrap().to_owned();
    let name = platform.call("PATCH", &format!("/api/v1/users/{id}")).json(&json!({"external_id": EXTERNAL_ID}));
    let answer = name.backend(tenant).send().await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    id
}

async fn narrow_key(platform: &Platform, tenant: &Tenant) -> (Tenant, String) {
    let settings = KeySettings { name: "statistics".to_owned(), scopes: vec![Scope::Usage], expires_at: None };
    let actor = Actor { name: "adm_test".to_owned(), request_id: None };
    let (secrets, now) = (&platform.app.secrets, platform.app.clock.now());
    let mut tx = platform.app.db.tenancy.begin(tenant.id.parse::<TenantId>().unwrap()).await.unwrap();
    let made = api_keys::add(&mut tx, secrets, &settings, &actor, now, &mut StdRng::from_os_rng()).await;
    let (key, secret) = made.unwrap();
    tx.commit().await.unwrap();
    let id = key.id.to_string();
    (Tenant { id: tenant.id.clone(), key: key.api_key, secret: secret.expose().to_owned() }, id)
}
