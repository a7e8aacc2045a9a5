//! Threads that do nothing else, behind a bounded queue.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use super::PasswordError;
use crate::metrics;

/// The lowest priority there is: whoever else wants the core gets it (and 70 times as much of it).
const NICE: i32 = 19;

type Job = Box<dyn FnOnce() + Send>;

/// Ends its threads when it is dropped and its queue is empty.
#[derive(Debug)]
pub(super) struct Pool {
    queue: SyncSender<Job>,
    admitted: Arc<AtomicUsize>,
    max_admitted: usize,
}

impl Pool {
    /// # Panics
    /// When the system has no thread to give.
    pub(super) fn start(running: usize, waiting: usize) -> Self {
        let max_admitted = running + waiting;
        // places are counted apart, so that a thread that is between two jobs is no place more
        let (queue, jobs) = mpsc::sync_channel(max_admitted);
        let jobs = Arc::new(Mutex::new(jobs));
        for index in 0..running {
            let jobs = Arc::clone(&jobs);
            std::thread::Builder::new()
                .name(format!("cvault-hash-{index}"))
                .spawn(move || work(&jobs))
                .expect("a thread can be started");
        }
        Self { queue, admitted: Arc::new(AtomicUsize::new(0)), max_admitted }
    }

    /// Runs `work` on one of the threads. When nobody waits for it any more, it is left out if it has not begun.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PasswordError> {
        let place = Place::take(&self.admitted, self.max_admitted).ok_or(PasswordError::Overloaded)?;
        let (answer, answered) = oneshot::channel();
        let job = Box::new(move || {
            let _held = place;
            if !answer.is_closed() {
                // who does not wait any more does not want it
                let _ = answer.send(work());
            }
        });
        self.queue.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => PasswordError::Overloaded,
            TrySendError::Disconnected(_) => PasswordError::Interrupted,
        })?;
        answered.await.map_err(|_| PasswordError::Interrupted)
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "password threads keep the usual priority");
    }
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        // a panic ends this job: its caller is told by the answer that never comes
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
            tracing::error!("a password check has panicked");
        }
    }
}

/// One place in the pool, running or waiting.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(admitted: &Arc<AtomicUsize>, max: usize) -> Option<Self> {
        let taken = admitted
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < max).then_some(count + 1))
            .ok()?;
        metrics::password_queue(taken + 1);
        Some(Self(Arc::clone(admitted)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::password_queue(self.0.fetch_sub(1, Ordering::Relaxed) - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_threads_give_way_to_everybody_and_survive_a_panic() {
        let pool = Pool::start(1, 2);
        let own = rustix::process::getpriority_process(None).unwrap();
        let theirs = pool.run(|| rustix::process::getpriority_process(None).unwrap()).await.unwrap();
        assert_eq!((own, theirs), (rustix::process::getpriority_process(None).unwrap(), NICE));
        assert!(own < NICE);
        let panicked = pool.run(|| panic!("a fault of ours")).await;
        assert!(matches!(panicked, Err::<(), _>(PasswordError::Interrupted)));
        assert_eq!(pool.run(|| 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_is_left_out() {
        let pool = Arc::new(Pool::start(1, 4));
        let (go, wait) = mpsc::channel::<()>();
        let busy = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(move || wait.recv().is_ok()).await }
        });
        let done = Arc::new(AtomicUsize::new(0));
        let left = {
            let done = Arc::clone(&done);
            let pool = Arc::clone(&pool);
            tokio::spawn(async move { pool.run(move || done.fetch_add(1, Ordering::Relaxed)).await })
        };
        while pool.admitted.load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
        left.abort();
        assert!(left.await.unwrap_err().is_cancelled());
        go.send(()).unwrap();
        assert!(busy.await.unwrap().unwrap());
        pool.run(|| ()).await.unwrap();
        assert_eq!(done.load(Ordering::Relaxed), 0);
    }
}
