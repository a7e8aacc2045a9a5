//! Sessions of role `cvault_app`, each with the process id of its backend: contexts are signed for one of them. sqlx does not
//! tell the id, so it is asked for once, when the session is made.

use deadpool::Runtime;
use deadpool::managed::{Manager, Metrics, Object, Pool, PoolError, QueueMode, RecycleError, RecycleResult, Timeouts};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};

use crate::db::{ACQUIRE_TIMEOUT, ASKED_AFTER, DbError, Lent, MAX_LIFETIME};

/// Makes sessions.
pub(super) struct Opener(PgConnectOptions);

/// A session, lent by the pool.
pub(super) type Session = Object<Opener>;

#[derive(Debug)]
pub(super) struct Connected {
    pub(super) conn: PgConnection,
    pub(super) backend_pid: i32,
}

impl Manager for Opener {
    type Type = Connected;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<Connected, sqlx::Error> {
        let mut conn = self.0.connect().await?;
        let backend_pid = sqlx::query_scalar!(r#"select pg_backend_pid() as "pid!""#).fetch_one(&mut conn).await?;
        Ok(Connected { conn, backend_pid })
    }

    async fn recycle(&self, session: &mut Connected, metrics: &Metrics) -> RecycleResult<sqlx::Error> {
        if metrics.age() > MAX_LIFETIME {
            return Err(RecycleError::message("old"));
        }
        if metrics.last_used() >= ASKED_AFTER {
            session.conn.ping().await?;
        }
        Ok(())
    }
}

impl Lent for Session {
    fn conn(&mut self) -> &mut PgConnection {
        &mut self.conn
    }

    fn discard(self) {
        drop(Self::take(self));
    }
}

/// A pool of so many sessions, of which one is made at once: whoever starts learns that the database cannot be reached.
pub(super) async fn open(options: PgConnectOptions, sessions: u32) -> Result<Pool<Opener>, sqlx::Error> {
    let wait = Some(ACQUIRE_TIMEOUT);
    let pool = Pool::builder(Opener(options))
        .max_size(usize::try_from(sessions).unwrap_or(usize::MAX))
        .timeouts(Timeouts { wait, create: wait, recycle: wait })
        .runtime(Runtime::Tokio1)
        // the one that was used last has its plans and rows in the processor's cache
        .queue_mode(QueueMode::Lifo)
        .build()
        .expect("a runtime is given");
    match pool.get().await {
        Ok(_) => Ok(pool),
        Err(PoolError::Backend(error)) => Err(error),
        Err(_) => Err(sqlx::Error::PoolTimedOut),
    }
}

/// A session, in time: the pool itself counts the time of each of its steps.
pub(super) async fn session(pool: &Pool<Opener>) -> Result<Session, DbError> {
    match tokio::time::timeout(ACQUIRE_TIMEOUT, pool.get()).await {
        Ok(session) => session.map_err(no_session),
        Err(_) => Err(DbError::Unavailable(sqlx::Error::PoolTimedOut)),
    }
}

fn no_session(error: PoolError<sqlx::Error>) -> DbError {
    match error {
        PoolError::Backend(error) => error.into(),
        PoolError::Closed => DbError::Unavailable(sqlx::Error::PoolClosed),
        PoolError::Timeout(_) | PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
            DbError::Unavailable(sqlx::Error::PoolTimedOut)
        }
    }
}
