//! Threads that do nothing else, behind a bounded queue in which parties take turns.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use cvault_types::TenantId;
use tokio::sync::oneshot;

use super::PasswordError;
use super::queue::{Pushed, Queue, Ticket};
use crate::metrics;

/// The lowest priority there is: whoever else wants the core gets it (and 70 times as much of it).
const NICE: i32 = 19;

/// Who shares the threads with the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Party {
    Tenant(TenantId),
    /// Everybody who knocks at the portal: whose account it is, is not known before the password was right.
    Portal,
}

/// Tells what the job is to do. Never under the lock: a caller may be woken by it.
type Job = Box<dyn FnOnce(Turn) + Send>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Work,
    GiveUp,
}

/// Ends its threads when it is dropped and its queue is empty.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// One more job waits, or the pool is closed.
    changed: Condvar,
    /// Running and waiting, so that a thread that is between two jobs is no place more.
    places: usize,
}

#[derive(Default)]
struct State {
    queue: Queue<Party, Job>,
    running: usize,
    closed: bool,
}

impl Pool {
    /// # Panics
    /// When the system has no thread to give.
    pub(super) fn start(running: usize, waiting: usize) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), places: running + waiting });
        for index in 0..running {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("cvault-hash-{index}"))
                .spawn(move || work(&shared))
                .expect("a thread can be started");
        }
        Self { shared }
    }

    /// Runs `work` on one of the threads, when it is the turn of `party`. When this is cancelled before, it is left out.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        party: Party,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PasswordError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |turn| {
            let outcome = match turn {
                Turn::Work => Ok(work()),
                Turn::GiveUp => Err(PasswordError::Overloaded),
            };
            // who does not wait any more does not want it
            let _ = answer.send(outcome);
        });
        let _waits = self.push(party, job)?;
        answered.await.map_err(|_| PasswordError::Interrupted)?
    }

    fn push(&self, party: Party, job: Job) -> Result<Waits<'_>, PasswordError> {
        let (pushed, ticket) = {
            let mut state = self.shared.state();
            let places = self.shared.places - state.running;
            let (pushed, ticket) = match state.queue.push(party, job, places) {
                Pushed::Waits(ticket) => (None, ticket),
                Pushed::InPlaceOf(ticket, out) => (Some(out), ticket),
                Pushed::Refused(_) => return Err(PasswordError::Overloaded),
            };
            state.measured();
            (pushed, ticket)
        };
        self.shared.changed.notify_one();
        if let Some(out) = pushed {
            out(Turn::GiveUp);
        }
        Ok(Waits { shared: &self.shared, party, ticket })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.changed.notify_all();
    }
}

/// Gives the place back when nobody waits any more.
struct Waits<'a> {
    shared: &'a Shared,
    party: Party,
    ticket: Ticket,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let given_back = state.queue.remove(self.party, self.ticket);
        if given_back.is_some() {
            state.measured();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job, which runs from now on; `None` when there will be none.
    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.queue.pop() {
                state.running += 1;
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self) {
        let mut state = self.state();
        state.running -= 1;
        state.measured();
    }
}

impl State {
    /// Under the lock, so that the last figure told is the last one there was.
    fn measured(&self) {
        metrics::password_queue(self.running + self.queue.len());
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("places", &self.places).finish_non_exhaustive()
    }
}

fn work(shared: &Shared) {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "password threads keep the usual priority");
    }
    while let Some(job) = shared.next() {
        // a panic ends this job: its caller is told by the answer that never comes
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(Turn::Work))).is_err() {
            tracing::error!("a password check has panicked");
        }
        shared.done();
    }
}

#[cfg(test)]
mod tests;
