//! What every replica reads from the database now and then, and what counts for a bounded time after it was read: so whoever
//! changes it there knows when nobody goes by the old any more, whatever has become of a replica meanwhile.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::db::DbError;

/// What was read longer ago than this is read again before it is used.
pub(crate) const LEASE: Duration = Duration::from_secs(15);

/// For a connection and a statement, and for waiting until another one has tried.
const PATIENCE: Duration = Duration::from_secs(4);

/// A value that was read at some time.
pub(crate) struct Leased<T> {
    held: RwLock<Held<T>>,
    /// One reads for all that need it.
    reading: tokio::sync::Mutex<()>,
}

struct Held<T> {
    value: Arc<T>,
    /// Before it was asked for.
    asked: Instant,
}

impl<T> Leased<T> {
    /// Reads for the first time.
    ///
    /// # Errors
    /// Those of `read`.
    pub(crate) async fn first<E>(read: impl AsyncFnOnce() -> Result<T, E>) -> Result<Self, E> {
        let asked = Instant::now();
        let value = Arc::new(read().await?);
        Ok(Self { held: RwLock::new(Held { value, asked }), reading: tokio::sync::Mutex::new(()) })
    }

    /// What counts at `now`, read again if it must be.
    ///
    /// # Errors
    /// Those of `read`, when what is held does not count any more; [`DbError::Unavailable`] when that takes too long, for oneself or
    /// for those before.
    pub(crate) async fn at(
        &self,
        now: Instant,
        read: impl AsyncFnOnce() -> Result<T, DbError>,
    ) -> Result<Arc<T>, DbError> {
        if let Some(value) = self.counts(now) {
            return Ok(value);
        }
        in_time(async {
            let _reading = self.reading.lock().await;
            match self.counts(now) {
                Some(read_meanwhile) => Ok(read_meanwhile),
                None => self.read(read).await,
            }
        })
        .await
    }

    /// Reads again, whatever is held.
    ///
    /// # Errors
    /// Those of `read`, or that it takes too long; what is held stays then.
    pub(crate) async fn read(&self, read: impl AsyncFnOnce() -> Result<T, DbError>) -> Result<Arc<T>, DbError> {
        let asked = Instant::now();
        let value = Arc::new(in_time(read()).await?);
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        // two may read at once, and the earlier be answered last
        if held.asked <= asked {
            *held = Held { value: Arc::clone(&value), asked };
        }
        Ok(value)
    }

    /// What was read last, however long ago.
    #[must_use]
    pub(crate) fn last(&self) -> Arc<T> {
        Arc::clone(&self.held.read().unwrap_or_else(PoisonError::into_inner).value)
    }

    fn counts(&self, now: Instant) -> Option<Arc<T>> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        (now.saturating_duration_since(held.asked) < LEASE).then(|| Arc::clone(&held.value))
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T, DbError>>) -> Result<T, DbError> {
    let late = |_| DbError::Unavailable(sqlx::Error::PoolTimedOut);
    tokio::time::timeout(PATIENCE, work).await.map_err(late)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_read_counts_for_the_lease_and_is_then_read_again_or_refused() {
        let leased = Leased::first(async || Ok::<_, ()>(1)).await.unwrap();
        let away = || DbError::Unavailable(sqlx::Error::PoolClosed);
        let now = Instant::now();
        assert_eq!(*leased.at(now, async || Err(away())).await.unwrap(), 1);
        let late = now + LEASE;
        let refused = leased.at(late, async || Err(away())).await.unwrap_err();
        assert!(matches!(refused, DbError::Unavailable(sqlx::Error::PoolClosed)), "{refused}");
        assert_eq!(*leased.last(), 1);
        assert_eq!(*leased.at(late, async || Ok(2)).await.unwrap(), 2);
        assert_eq!(*leased.at(Instant::now(), async || Err(away())).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn nobody_waits_for_the_attempts_of_all_who_came_before() {
        let leased = Leased::first(async || Ok::<_, ()>(1)).await.unwrap();
        let late = Instant::now() + LEASE;
        // a connection that is dead in silence
        let all =
            futures::future::join_all((0..100).map(|_| leased.at(late, std::future::pending::<Result<i32, DbError>>)));
        let told =
            tokio::time::timeout(PATIENCE * 10, all).await.expect("one after the other, it is a hundred times as long");
        assert!(told.iter().all(Result::is_err));
    }

    #[tokio::test]
    async fn an_answer_that_comes_late_does_not_take_the_place_of_a_later_one() {
        let leased = Leased::first(async || Ok::<_, ()>(1)).await.unwrap();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let slow = leased.read(async || {
            wait.await.unwrap();
            Ok(2)
        });
        let quick = async {
            leased.read(async || Ok(3)).await.unwrap();
            go.send(()).unwrap();
        };
        let (slow, ()) = tokio::join!(slow, quick);
        assert_eq!((*slow.unwrap(), *leased.last()), (2, 3));
    }
}
