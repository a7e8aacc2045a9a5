//! New keys for tokens and tenant contexts while two replicas serve.

use std::time::Duration;

use cvault_control_plane::db::DbError;
use cvault_control_plane::keys::{self, Replaced, Replacement, Stage};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::platform::{Answer, Call, Platform, Tenant};

/// Two replicas of one installation, neither of which reads keys by itself: the periodic tasks do not run.
struct Two {
    one: Platform,
    other: Platform,
    tenant: Tenant,
}

impl Two {
    async fn start() -> Self {
        let one = Platform::start().await;
        let tenant = one.tenant().await;
        Self { other: one.replica().await, one, tenant }
    }

    fn both(&self) -> [&Platform; 2] {
        [&self.one, &self.other]
    }

    async fn tokens(&self, how: Replacement) -> Replaced {
        keys::replace_token_key(&self.one.app, how, "cli", &mut StdRng::from_os_rng()).await.unwrap()
    }

    async fn contexts(&self, how: Replacement) -> Replaced {
        keys::replace_context_key(&self.one.app, how, "cli", &mut StdRng::from_os_rng()).await.unwrap()
    }

    /// As if what happened to the keys had happened so much earlier.
    async fn pass(&self, time: &str) {
        let sql = "update platform.secrets set signs_from = signs_from - $1::interval where signs_from is not null";
        let mut superuser = self.one.superuser().await;
        sqlx::query(sql).bind(time).execute(&mut superuser).await.unwrap();
        let sql = "update platform.context_keys set created_at = created_at - $1::interval";
        sqlx::query(sql).bind(time).execute(&mut superuser).await.unwrap();
    }

    async fn reload(&self) {
        for platform in self.both() {
            keys::reload(&platform.app).await.unwrap();
        }
    }

    async fn stages(&self) -> Vec<Stage> {
        keys::token_key_states(&self.one.app).await.unwrap().iter().map(|key| key.stage).collect()
    }

    async fn audited(&self, noun: &str) -> Vec<(String, String)> {
        let path = format!("/admin/audit?action={noun}&limit=100");
        let answer = self.one.admin("GET", &path).send().await;
        let entries = answer.body["data"].as_array().unwrap_or_else(|| panic!("{}", answer.text));
        let text = |entry: &Value, name: &str| entry[name].as_str().unwrap().to_owned();
        let mut actions: Vec<_> = entries.iter().map(|entry| (text(entry, "action"), text(entry, "actor"))).collect();
        actions.sort();
        actions
    }
}

fn devices<'a>(platform: &'a Platform, tenant: &Tenant, token: &str) -> Call<'a> {
    let call = platform.call("GET", "/api/v1/devices").header("x-api-key", &tenant.key);
    call.header("authorization", &format!("Bearer {token}"))
}

fn refresh<'a>(platform: &'a Platform, tenant: &Tenant, session: &Answer) -> Call<'a> {
    let body = json!({"refresh_token": session.text("refresh_token")});
    platform.post("/api/v1/auth/refresh", &body).backend(tenant)
}

async fn staffed(platform: &Platform, token: &str) -> Answer {
    platform.call("GET", "/admin/tenants").header("authorization", &format!("Bearer {token}")).send().await
}

fn kid(token: &str) -> String {
    jsonwebtoken::decode_header(token).unwrap().kid.unwrap()
}

fn entries(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(action, actor)| ((*action).to_owned(), (*actor).to_owned())).collect()
}

#[tokio::test]
async fn tokens_go_on_through_a_new_key_on_replicas_that_learn_of_it_late() {
    let two = Two::start().await;
    let session = two.one.register(&two.tenant, "a@example.com").await;
    let old = session.text("access_token");
    assert_eq!(two.tokens(Replacement::Overlapping).await, Replaced::Begun);
    assert_eq!(two.tokens(Replacement::Overlapping).await, Replaced::UnderWay, "a second call is the same one");
    assert_eq!(two.stages().await, [Stage::Signs, Stage::Next]);
    let session = refresh(&two.one, &two.tenant, &session).send().await;
    assert_eq!(kid(&session.text("access_token")), kid(&old), "nobody could verify a token of the next key yet");
    let jwks = two.one.call("GET", "/.well-known/jwks.json").send().await;
    assert_eq!(jwks.body["keys"].as_array().unwrap().len(), 2, "{}", jwks.text);

    two.pass("10 minutes").await;
    keys::reload(&two.one.app).await.unwrap();
    assert_eq!(two.stages().await, [Stage::Verifies, Stage::Signs]);
    let session = refresh(&two.one, &two.tenant, &session).send().await;
    let new = session.text("access_token");
    assert_ne!(kid(&new), kid(&old));
    assert_eq!(two.other.app.token_keys.last().iter().count(), 1, "it has not heard of the key");
    for platform in two.both() {
        for token in [&new, &old] {
            assert_eq!(devices(platform, &two.tenant, token).send().await.status, 200);
        }
    }
    assert_eq!(keys::retire(&two.one.app).await.unwrap(), 0, "tokens of the old key may live");

    two.pass("12 hours 5 minutes").await;
    assert_eq!(keys::retire(&two.other.app).await.unwrap(), 1);
    assert_eq!(keys::retire(&two.one.app).await.unwrap(), 0);
    two.reload().await;
    for platform in two.both() {
        assert_eq!(devices(platform, &two.tenant, &new).send().await.status, 200);
        devices(platform, &two.tenant, &old).refused(401, "INVALID_TOKEN").await;
    }
    let third = two.one.replica().await;
    assert_eq!(third.app.token_keys.last().iter().count(), 1, "a replica that starts draws no first key again");
    assert_eq!(devices(&third, &two.tenant, &new).send().await.status, 200);
    assert_eq!(two.audited("token_key").await, entries(&[("token_key.create", "cli"), ("token_key.remove", "system")]));
}

#[tokio::test]
async fn a_key_for_tokens_that_was_seen_ends_at_once_and_nobody_logs_in_again() {
    let two = Two::start().await;
    let session = two.one.register(&two.tenant, "a@example.com").await;
    let (old, staff) = (session.text("access_token"), two.one.admin_token());
    // remembered as verified, by both
    for platform in two.both() {
        assert_eq!(devices(platform, &two.tenant, &old).send().await.status, 200);
    }
    two.tokens(Replacement::Overlapping).await;
    assert_eq!(two.tokens(Replacement::AtOnce).await, Replaced::Begun);
    assert_eq!(two.stages().await, [Stage::Signs], "the one that was next has ended too");
    devices(&two.one, &two.tenant, &old).refused(401, "INVALID_TOKEN").await;
    assert_eq!(staffed(&two.one, &staff).await.status, 401);
    let session = refresh(&two.one, &two.tenant, &session).send().await;
    assert_eq!(session.status, 200, "{}", session.text);
    // the first token of the new key tells the other replica
    assert_eq!(devices(&two.other, &two.tenant, &session.text("access_token")).send().await.status, 200);
    devices(&two.other, &two.tenant, &old).refused(401, "INVALID_TOKEN").await;
    assert_eq!(staffed(&two.other, &staff).await.status, 401);
    assert_eq!(staffed(&two.other, &two.one.admin_token()).await.status, 200);
    let removed = ("token_key.remove", "cli");
    let created = ("token_key.create", "cli");
    assert_eq!(two.audited("token_key").await, entries(&[created, created, removed, removed]));
}

#[tokio::test]
async fn requests_go_on_through_a_new_key_for_contexts() {
    let two = Two::start().await;
    let token = two.one.register(&two.tenant, "a@example.com").await.text("access_token");
    let served = async || {
        for platform in two.both() {
            let answer = devices(platform, &two.tenant, &token).send().await;
            assert_eq!(answer.status, 200, "{}", answer.text);
        }
    };
    // of a transaction that is under way all the time
    let mut long = two.other.app.db.tenancy.begin(two.tenant.id.parse().unwrap()).await.unwrap();
    assert_eq!(two.contexts(Replacement::Overlapping).await, Replaced::Begun);
    assert_eq!(two.contexts(Replacement::Overlapping).await, Replaced::UnderWay, "the database tries two keys");
    served().await;
    assert_eq!(keys::retire(&two.one.app).await.unwrap(), 0);
    served().await;
    let users = sqlx::query_scalar::<_, i64>("select count(*) from cvault.users").fetch_one(long.conn()).await.unwrap();
    assert_eq!(users, 1);
    long.commit().await.unwrap();
    // the task of every replica has run by then
    two.reload().await;
    two.pass("15 minutes").await;
    assert_eq!(keys::retire(&two.other.app).await.unwrap(), 1);
    served().await;
    let states = keys::context_key_states(&two.one.app).await.unwrap();
    assert_eq!(states.iter().map(|key| (key.name.as_str(), key.stage)).collect::<Vec<_>>(), [("2", Stage::Signs)]);
    let created = ("context_key.create", "cli");
    assert_eq!(two.audited("context_key").await, entries(&[created, ("context_key.remove", "system")]));
}

#[tokio::test]
async fn a_key_for_contexts_that_was_seen_ends_at_once() {
    let two = Two::start().await;
    let token = two.one.register(&two.tenant, "a@example.com").await.text("access_token");
    let mut long = two.other.app.db.tenancy.begin(two.tenant.id.parse().unwrap()).await.unwrap();
    two.contexts(Replacement::Overlapping).await;
    two.contexts(Replacement::AtOnce).await;
    let users = sqlx::query_scalar::<_, i64>("select count(*) from cvault.users").fetch_one(long.conn()).await.unwrap();
    assert_eq!(users, 0, "a context of an ended key shows nothing");
    let refused = long.commit().await.unwrap_err();
    assert!(matches!(refused, DbError::Unavailable(_)), "what may be half of the work is not kept: {refused}");
    assert_eq!(devices(&two.one, &two.tenant, &token).send().await.status, 200);
    devices(&two.other, &two.tenant, &token).refused(503, "DATABASE_UNAVAILABLE").await;
    keys::reload(&two.other.app).await.unwrap();
    assert_eq!(devices(&two.other, &two.tenant, &token).send().await.status, 200);
}

#[tokio::test]
async fn many_calls_at_once_and_one_that_is_cut_off_make_one_key() {
    let two = Two::start().await;
    let mut holder = two.one.superuser().await;
    sqlx::raw_sql("begin; select pg_advisory_xact_lock(731992418)").execute(&mut holder).await.unwrap();
    let app = two.one.app.clone();
    let cut_off = tokio::spawn(async move {
        keys::replace_token_key(&app, Replacement::Overlapping, "cli", &mut StdRng::from_os_rng()).await
    });
    let mut watcher = two.one.superuser().await;
    let sql = "select exists (select from pg_locks where locktype = 'advisory' and not granted
                   and database = (select oid from pg_database where datname = current_database()))";
    let deadline = tokio::time::Instant::now() + Duration::from_secs(120);
    while !sqlx::query_scalar::<_, bool>(sql).fetch_one(&mut watcher).await.unwrap() {
        assert!(tokio::time::Instant::now() < deadline, "it never waited");
    }
    cut_off.abort();
    assert!(cut_off.await.unwrap_err().is_cancelled());
    sqlx::raw_sql("rollback").execute(&mut holder).await.unwrap();
    assert_eq!(two.stages().await, [Stage::Signs]);
    let calls = (0..6).flat_map(|_| two.both()).map(|platform| async move {
        let mut rng = StdRng::from_os_rng();
        let tokens = keys::replace_token_key(&platform.app, Replacement::Overlapping, "cli", &mut rng).await.unwrap();
        let contexts =
            keys::replace_context_key(&platform.app, Replacement::Overlapping, "cli", &mut rng).await.unwrap();
        [tokens, contexts]
    });
    let outcomes = futures::future::join_all(calls).await;
    for kind in 0..2 {
        assert_eq!(outcomes.iter().filter(|outcome| outcome[kind] == Replaced::Begun).count(), 1);
    }
    assert_eq!(two.stages().await, [Stage::Signs, Stage::Next]);
    assert_eq!(keys::context_key_states(&two.one.app).await.unwrap().len(), 2);
}
