//! A session of role `cvault_sys` that is kept from one statement to the next while they follow each other closely: sqlx asks
//! every session that is given back whether it lives, a round trip more for each statement.

use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};

use super::DbError;

/// Then it is given back, and the pool sees to its age.
const KEPT_FOR: Duration = Duration::from_secs(1);

/// Whoever works alone, statement after statement, has one.
#[derive(Debug)]
pub struct Kept {
    sys: PgPool,
    session: Option<Session>,
}

/// Given back to the pool when it is dropped instead of kept, which closes it when it is not in order.
#[derive(Debug)]
pub struct Session {
    conn: PoolConnection<Postgres>,
    since: Instant,
}

impl Kept {
    pub fn of(sys: PgPool) -> Self {
        Self { sys, session: None }
    }

    /// The session that was kept, or another one.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] when no connection could be had in time.
    pub async fn session(&mut self) -> Result<Session, DbError> {
        match self.session.take().filter(|session| session.since.elapsed() < KEPT_FOR && !self.sys.is_closed()) {
            Some(session) => Ok(session),
            None => Ok(Session { conn: self.sys.acquire().await?, since: Instant::now() }),
        }
    }

    /// For the next statement. Only after the last one has succeeded.
    pub fn keep(&mut self, session: Session) {
        self.session = Some(session);
    }
}

impl Session {
    pub fn conn(&mut self) -> &mut PgConnection {
        &mut self.conn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;

    async fn backend(session: &mut Session) -> i32 {
        sqlx::query_scalar("select pg_backend_pid()").fetch_one(session.conn()).await.unwrap()
    }

    #[tokio::test]
    async fn what_is_kept_is_used_again_and_what_has_failed_is_not() {
        let (world, _) = World::with_server().await;
        let mut kept = Kept::of(world.app.db.sys.clone());
        let mut first = kept.session().await.unwrap();
        let pid = backend(&mut first).await;
        kept.keep(first);
        let mut again = kept.session().await.unwrap();
        assert_eq!(backend(&mut again).await, pid);

        sqlx::query("select pg_terminate_backend(pg_backend_pid())").execute(again.conn()).await.unwrap_err();
        drop(again);
        let mut other = kept.session().await.unwrap();
        assert_ne!(backend(&mut other).await, pid);
    }

    #[tokio::test]
    async fn nothing_is_kept_for_long() {
        let (world, _) = World::with_server().await;
        let mut kept = Kept::of(world.app.db.sys.clone());
        let mut old = kept.session().await.unwrap();
        old.since = old.since.checked_sub(KEPT_FOR).unwrap();
        kept.keep(old);
        assert!(kept.session().await.unwrap().since.elapsed() < KEPT_FOR);
    }
}
