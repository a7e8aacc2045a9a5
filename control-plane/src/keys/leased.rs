//! What every replica reads from the database now and then, and what counts for a bounded time after it was read: so whoever
//! changes it there knows when nobody goes by the old any more, whatever has become of a replica meanwhile.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// What was read longer ago than this is read again before it is used.
pub(crate) const LEASE: Duration = Duration::from_secs(15);

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
    /// Those of `read`, when what is held does not count any more.
    pub(crate) async fn at<E>(&self, now: Instant, read: impl AsyncFnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        if let Some(value) = self.counts(now) {
            return Ok(value);
        }
        let _reading = self.reading.lock().await;
        match self.counts(now) {
            Some(read_meanwhile) => Ok(read_meanwhile),
            None => self.read(read).await,
        }
    }

    /// Reads again, whatever is held.
    ///
    /// # Errors
    /// Those of `read`; what is held stays then.
    pub(crate) async fn read<E>(&self, read: impl AsyncFnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        let asked = Instant::now();
        let value = Arc::new(read().await?);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_read_counts_for_the_lease_and_is_then_read_again_or_refused() {
        let leased = Leased::first(async || Ok::<_, ()>(1)).await.unwrap();
        let now = Instant::now();
        assert_eq!(*leased.at(now, async || Err(())).await.unwrap(), 1);
        let late = now + LEASE;
        assert_eq!(leased.at(late, async || Err("away")).await.unwrap_err(), "away");
        assert_eq!(*leased.last(), 1);
        assert_eq!(*leased.at(late, async || Ok::<_, ()>(2)).await.unwrap(), 2);
        assert_eq!(*leased.at(Instant::now(), async || Err(())).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn an_answer_that_comes_late_does_not_take_the_place_of_a_later_one() {
        let leased = Leased::first(async || Ok::<_, ()>(1)).await.unwrap();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let slow = leased.read(async || {
            wait.await.unwrap();
            Ok::<_, ()>(2)
        });
        let quick = async {
            leased.read(async || Ok::<_, ()>(3)).await.unwrap();
            go.send(()).unwrap();
        };
        let (slow, ()) = tokio::join!(slow, quick);
        assert_eq!((*slow.unwrap(), *leased.last()), (2, 3));
    }
}
