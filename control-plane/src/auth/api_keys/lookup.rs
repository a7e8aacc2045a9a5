//! Looking keys up, those of requests that arrive together in one statement. Each request is judged by what was committed when
//! it arrived, on every replica, and the statements do not grow with the requests.

use std::collections::HashMap;
use std::sync::Arc;

use cvault_types::{ErrorCode, TenantId};
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::{DbError, Kept};
use crate::http::Problem;
use crate::together::{Serve, Together, Waiting};

/// A key that is not revoked, of a tenant that is not deleted.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) tenant: TenantId,
    pub(super) api_key_id: Uuid,
    pub(super) secret_hash: Vec<u8>,
    pub(super) previous_secret_hash: Option<Vec<u8>>,
    pub(super) previous_valid_until: Option<OffsetDateTime>,
    pub(super) expires_at: Option<OffsetDateTime>,
    pub(super) scopes: Vec<String>,
    pub(super) suspended: bool,
    pub(super) public_clients: bool,
    pub(super) allowed_origins: Vec<String>,
    pub(super) rate_limit_per_minute: Option<i32>,
    pub(super) user_rate_limit_per_minute: Option<i32>,
}

type Answer = Result<Option<Arc<Row>>, Problem>;

/// One for the process.
#[derive(Debug, Default, Clone)]
pub struct Lookups(Together<Searching>);

struct Searching(Kept);

impl Lookups {
    /// # Errors
    /// Those of the database.
    pub(super) async fn find(&self, sys: &PgPool, key: &str) -> Answer {
        let found = self.0.ask((), key.to_owned(), || Searching(Kept::of(sys.clone()))).await;
        found.unwrap_or_else(|| Err(unavailable()))
    }
}

impl Serve for Searching {
    type Line = ();
    type Item = String;
    type Answer = Answer;

    const MOST: usize = 256;

    async fn serve(&mut self, (): &(), batch: Vec<Waiting<Self>>) {
        let keys: Vec<String> = batch.iter().map(|waiting| waiting.item.clone()).collect();
        let found = self.load(&keys).await.map_err(Problem::from);
        for Waiting { item: key, answer } in batch {
            // whoever asked may be gone
            let _ = answer.send(found.as_ref().map(|rows| rows.get(&key).cloned()).map_err(Clone::clone));
        }
    }
}

impl Searching {
    async fn load(&mut self, keys: &[String]) -> Result<HashMap<String, Arc<Row>>, DbError> {
        let mut session = self.0.session().await?;
        let found = load(session.conn(), keys).await?;
        self.0.keep(session);
        Ok(found)
    }
}

async fn load(conn: &mut PgConnection, keys: &[String]) -> Result<HashMap<String, Arc<Row>>, DbError> {
    let rows = sqlx::query!(
        r#"select k.key_text, k.tenant_id, k.api_key_id, k.secret_hash, k.previous_secret_hash, k.previous_valid_until,
                  k.expires_at, k.scopes, t.status, t.rate_limit_per_minute, t.public_clients,
                  t.allowed_origins, t.user_rate_limit_per_minute
           from cvault.api_keys k join cvault.tenants t using (tenant_id)
           where k.key_text = any ($1) and k.revoked_at is null and t.status <> 'deleted'"#,
        keys
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let key = Row {
                tenant: TenantId::from_uuid(row.tenant_id),
                api_key_id: row.api_key_id,
                secret_hash: row.secret_hash,
                previous_secret_hash: row.previous_secret_hash,
                previous_valid_until: row.previous_valid_until,
                expires_at: row.expires_at,
                scopes: row.scopes,
                suspended: row.status == "suspended",
                public_clients: row.public_clients,
                allowed_origins: row.allowed_origins,
                rate_limit_per_minute: row.rate_limit_per_minute,
                user_rate_limit_per_minute: row.user_rate_limit_per_minute,
            };
            (row.key_text, Arc::new(key))
        })
        .collect())
}

fn unavailable() -> Problem {
    Problem::new(ErrorCode::DatabaseUnavailable).retry_after(1)
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;
    use crate::testing::{World, kill_waiting};

    /// A tenant with the key `cvk_one`.
    async fn keyed(world: &World, superuser: &mut PgConnection) -> TenantId {
        let tenant = world.person().await.tenant;
        sqlx::query(
            "insert into cvault.api_keys (tenant_id, api_key_id, key_text, secret_hash)
             values ($1, gen_random_uuid(), 'cvk_one', sha256('x'))",
        )
        .bind(tenant.uuid())
        .execute(superuser)
        .await
        .unwrap();
        tenant
    }

    #[tokio::test]
    async fn a_session_that_is_kept_sees_what_was_revoked_since() {
        let (world, _) = World::with_server().await;
        let mut superuser = world.superuser().await;
        keyed(&world, &mut superuser).await;
        let (mut searching, one) = (Searching(Kept::of(world.app.db.sys.clone())), ["cvk_one".to_owned()]);
        assert_eq!(searching.load(&one).await.unwrap().len(), 1);
        sqlx::query("update cvault.api_keys set revoked_at = now()").execute(&mut superuser).await.unwrap();
        assert_eq!(searching.load(&one).await.unwrap().len(), 0);
    }

    /// More than one statement takes, by turns for a key that is there and for one that is not.
    fn ask_all(lookups: &Lookups, sys: &PgPool) -> JoinSet<(bool, Answer)> {
        let mut asked = JoinSet::new();
        for number in 0..Searching::MOST * 2 + 3 {
            let (lookups, sys) = (lookups.clone(), sys.clone());
            let key = if number % 2 == 0 { "cvk_one" } else { "cvk_none" };
            asked.spawn(async move { (number % 2 == 0, lookups.find(&sys, key).await) });
        }
        asked
    }

    #[tokio::test]
    async fn who_waits_for_a_backend_that_is_killed_is_told_and_the_next_ones_are_answered() {
        let world = World::new().await;
        let (mut superuser, mut holder) = (world.superuser().await, world.superuser().await);
        let tenant = keyed(&world, &mut superuser).await;
        let (lookups, sys) = (Lookups::default(), world.app.db.sys.clone());
        sqlx::raw_sql("begin; lock table cvault.api_keys").execute(&mut holder).await.unwrap();
        let asked = ask_all(&lookups, &sys);
        let (all, told) = (asked.len(), tokio::spawn(asked.join_all()));
        let killed = kill_waiting(&mut superuser, "cvault_sys", || told.is_finished()).await;
        for (_, outcome) in told.await.unwrap() {
            assert_eq!(outcome.unwrap_err().code(), ErrorCode::DatabaseUnavailable);
        }
        assert!((1..all).contains(&killed.len()), "{killed:?}: none of them waited together");
        sqlx::raw_sql("rollback").execute(&mut holder).await.unwrap();
        for (there, found) in ask_all(&lookups, &sys).join_all().await {
            assert_eq!(found.unwrap().map(|row| row.tenant), there.then_some(tenant));
        }
    }

    #[tokio::test]
    async fn everybody_is_answered_by_what_is_true_when_they_ask_also_when_the_database_is_gone() {
        let world = World::new().await;
        let mut superuser = world.superuser().await;
        let tenant = keyed(&world, &mut superuser).await;
        let (lookups, sys) = (Lookups::default(), world.app.db.sys.clone());
        for (there, found) in ask_all(&lookups, &sys).join_all().await {
            assert_eq!(found.unwrap().map(|row| row.tenant), there.then_some(tenant));
        }
        sqlx::query("update cvault.api_keys set revoked_at = now()").execute(&mut superuser).await.unwrap();
        assert!(lookups.find(&sys, "cvk_one").await.unwrap().is_none(), "revoked");
        sys.close().await;
        for _ in 0..2 {
            let refused = lookups.find(&sys, "cvk_one").await.unwrap_err();
            assert_eq!(refused.code(), ErrorCode::DatabaseUnavailable);
        }
    }
}
