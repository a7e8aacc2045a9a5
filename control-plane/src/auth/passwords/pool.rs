//! Threads that do nothing else, behind a bounded queue in which parties take turns.
//!
//! Most of the time they wait for the processes that compute ([`super::apart`]), and compute where there are none.
//! They never hold what others wait for: one of the lowest priority that is put aside with a lock in its hands would keep
//! everybody waiting until its next turn. The queue belongs to those who ask; a thread knows of the job it was handed, and no more.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cvault_types::TenantId;
use tokio::sync::oneshot;

use super::PasswordError;
use super::queue::{Pushed, Queue, Ticket};
use crate::metrics;

/// The lowest priority there is: beside another thread of its session it gets one part in seventy of a core.
pub(super) const NICE: i32 = 19;

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

/// What a thread is handed: the job, and how it tells that it is free again.
type Handed = (Job, oneshot::Sender<()>);

/// Ends its threads when it is dropped and nothing runs any more.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Running and waiting.
    places: usize,
}

#[derive(Default)]
struct State {
    queue: Queue<Party, Job>,
    /// Threads without a job: while there are any, nobody waits.
    idle: Vec<SyncSender<Handed>>,
    running: usize,
}

impl Pool {
    /// # Panics
    /// When the system has no thread to give.
    pub(super) fn start(running: usize, waiting: usize) -> Self {
        let threads = (0..running).map(|index| {
            let (thread, jobs) = sync_channel(1);
            std::thread::Builder::new()
                .name(format!("cvault-hash-{index}"))
                .spawn(move || work(&jobs))
                .expect("a thread can be started");
            thread
        });
        let state = State { idle: threads.collect(), ..State::default() };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), places: running + waiting }) }
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

    /// `None`: it has begun.
    fn push(&self, party: Party, job: Job) -> Result<Option<Waits<'_>>, PasswordError> {
        let (out, ticket) = {
            let mut state = self.shared.state();
            if let Some(thread) = state.idle.pop() {
                state.running += 1;
                state.measured();
                drop(state);
                Shared::hand(&self.shared, thread, job);
                return Ok(None);
            }
            let places = self.shared.places - state.running;
            let (out, ticket) = match state.queue.push(party, job, places) {
                Pushed::Waits(ticket) => (None, ticket),
                Pushed::InPlaceOf(ticket, out) => (Some(out), ticket),
                Pushed::Refused(_) => return Err(PasswordError::Overloaded),
            };
            state.measured();
            (out, ticket)
        };
        if let Some(out) = out {
            out(Turn::GiveUp);
        }
        Ok(Some(Waits { shared: &self.shared, party, ticket }))
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

    fn hand(shared: &Arc<Self>, thread: SyncSender<Handed>, job: Job) {
        let (free, freed) = oneshot::channel();
        if thread.send((job, free)).is_err() {
            tracing::error!("a thread for passwords has ended");
        }
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            // also when it panicked
            let _ = freed.await;
            Self::freed(&shared, thread);
        });
    }

    fn freed(shared: &Arc<Self>, thread: SyncSender<Handed>) {
        let next = {
            let mut state = shared.state();
            let next = state.queue.pop();
            if next.is_none() {
                state.running -= 1;
                state.idle.push(thread.clone());
            }
            state.measured();
            next
        };
        if let Some(job) = next {
            Self::hand(shared, thread, job);
        }
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

fn work(jobs: &Receiver<Handed>) {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "password threads keep the usual priority");
    }
    while let Ok((job, free)) = jobs.recv() {
        // a panic ends this job: its caller is told by the answer that never comes
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(Turn::Work))).is_err() {
            tracing::error!("a password check has panicked");
        }
        let _ = free.send(());
    }
}

#[cfg(test)]
mod tests;
