//! Looking keys up, those of requests that arrive together in one statement: one is under way at a time, and who arrives
//! meanwhile is answered by the next. So each request is judged by what was committed when it arrived, on every replica,
//! and the statements do not grow with the requests.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cvault_types::{ErrorCode, TenantId};
use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::db::DbError;
use crate::http::Problem;

/// Longer than a connection and a statement may take.
const PATIENCE: Duration = Duration::from_secs(9);
/// In one statement; the rest waits for the next.
const MOST: usize = 256;

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

/// One for the process. Bounded by the requests that are served at once.
#[derive(Debug, Default, Clone)]
pub struct Lookups(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<(String, oneshot::Sender<Answer>)>,
    /// A task is at it.
    served: bool,
}

/// Whoever empties the queue. When it is dropped half-way, those who wait learn it.
struct Serving(Lookups);

impl Lookups {
    /// # Errors
    /// Those of the database.
    pub(super) async fn find(&self, sys: &PgPool, key: &str) -> Answer {
        let (answer, answered) = oneshot::channel();
        let begin = {
            let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            queue.waiting.push((key.to_owned(), answer));
            !std::mem::replace(&mut queue.served, true)
        };
        if begin {
            tokio::spawn(Serving(self.clone()).run(sys.clone()));
        }
        answered.await.unwrap_or_else(|_| Err(unavailable()))
    }
}

impl Serving {
    async fn run(self, sys: PgPool) {
        while let Some(batch) = self.next() {
            let keys: Vec<String> = batch.iter().map(|(key, _)| key.clone()).collect();
            let found = match tokio::time::timeout(PATIENCE, load(&sys, &keys)).await {
                Ok(found) => found.map_err(Problem::from),
                Err(_) => Err(unavailable()),
            };
            for (key, answer) in batch {
                // whoever asked may be gone
                let _ = answer.send(found.as_ref().map(|rows| rows.get(&key).cloned()).map_err(Clone::clone));
            }
        }
    }

    fn next(&self) -> Option<Vec<(String, oneshot::Sender<Answer>)>> {
        let mut queue = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let some = queue.waiting.len().min(MOST);
        queue.served = some > 0;
        (some > 0).then(|| queue.waiting.drain(..some).collect())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let mut queue = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        // the end of `run` has left the queue to the next; anything else leaves it unserved
        if std::thread::panicking() {
            *queue = Queue::default();
        }
    }
}

async fn load(sys: &PgPool, keys: &[String]) -> Result<HashMap<String, Arc<Row>>, DbError> {
    let rows = sqlx::query!(
        r#"select k.key_text, k.tenant_id, k.api_key_id, k.secret_hash, k.previous_secret_hash, k.previous_valid_until,
                  k.expires_at, k.scopes, t.status, t.rate_limit_per_minute, t.public_clients,
                  t.allowed_origins, t.user_rate_limit_per_minute
           from cvault.api_keys k join cvault.tenants t using (tenant_id)
           where k.key_text = any ($1) and k.revoked_at is null and t.status <> 'deleted'"#,
        keys
    )
    .fetch_all(sys)
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
    use crate::testing::World;

    #[tokio::test]
    async fn everybody_is_answered_by_what_is_true_when_they_ask_also_when_the_database_is_gone() {
        let world = World::new().await;
        let tenant = world.person().await.tenant;
        let mut superuser = world.superuser().await;
        sqlx::query(
            "insert into cvault.api_keys (tenant_id, api_key_id, key_text, secret_hash)
             values ($1, gen_random_uuid(), 'cvk_one', sha256('x'))",
        )
        .bind(tenant.uuid())
        .execute(&mut superuser)
        .await
        .unwrap();
        let (lookups, sys) = (Lookups::default(), world.app.db.sys.clone());
        let mut asked = JoinSet::new();
        // more than one statement takes
        for number in 0..MOST * 2 + 3 {
            let (lookups, sys) = (lookups.clone(), sys.clone());
            let key = if number % 2 == 0 { "cvk_one" } else { "cvk_none" };
            asked.spawn(async move { (number % 2 == 0, lookups.find(&sys, key).await.unwrap()) });
        }
        for (there, found) in asked.join_all().await {
            assert_eq!(found.map(|row| row.tenant), there.then_some(tenant));
        }
        sqlx::query("update cvault.api_keys set revoked_at = now()").execute(&mut superuser).await.unwrap();
        assert!(lookups.find(&sys, "cvk_one").await.unwrap().is_none(), "revoked");
        sys.close().await;
        for _ in 0..2 {
            let refused = lookups.find(&sys, "cvk_one").await.unwrap_err();
            assert_eq!(refused.code(), ErrorCode::DatabaseUnavailable);
        }
        assert!(lookups.0.lock().unwrap().waiting.is_empty(), "somebody waits");
    }
}
