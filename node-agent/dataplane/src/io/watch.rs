//! Whether a worker still finishes its passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A pass takes milliseconds, and a worker that was poked begins one at once.
const STALLED_MS: u64 = 2_000;
/// Nobody waits longer for a worker that hangs: the process ends, to be started anew from its counter file.
const STUCK_MS: u64 = 10_000;
/// No more than this counts between two looks: in a longer time the host stood still, and everything on it.
const LONGEST_MS: u64 = 1_000;

/// What a worker shows of itself, and the watch of it.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    passes: AtomicU64,
    stalled: AtomicBool,
}

impl Pulse {
    /// A pass is finished.
    pub(crate) fn beat(&self) {
        self.passes.store(self.passes.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    pub(crate) fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }
}

/// How a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Well,
    /// It should have finished a pass long ago.
    Stalled,
    /// It will not come back.
    Stuck,
}

/// The watch of one worker.
#[derive(Debug)]
pub(crate) struct Watch {
    pulse: Arc<Pulse>,
    seen: Seen,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    passes: u64,
    looked_ms: u64,
    silent_ms: u64,
}

impl Watch {
    pub(crate) fn new(pulse: Arc<Pulse>, now_ms: u64) -> Self {
        Self { pulse, seen: Seen { looked_ms: now_ms, ..Seen::default() } }
    }

    /// To be called now and then, each time after the worker was poked.
    pub(crate) fn look(&mut self, now_ms: u64) -> Health {
        let health = verdict(&mut self.seen, self.pulse.passes.load(Ordering::Relaxed), now_ms);
        self.pulse.stalled.store(health != Health::Well, Ordering::Relaxed);
        health
    }
}

fn verdict(seen: &mut Seen, passes: u64, now_ms: u64) -> Health {
    let since_ms = now_ms.saturating_sub(seen.looked_ms).min(LONGEST_MS);
    let silent_ms = if passes == seen.passes { seen.silent_ms + since_ms } else { 0 };
    *seen = Seen { passes, looked_ms: now_ms, silent_ms };
    match silent_ms {
        STUCK_MS.. => Health::Stuck,
        STALLED_MS.. => Health::Stalled,
        _ => Health::Well,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_stalled_after_two_seconds_and_stuck_after_ten() {
        let mut seen = Seen { passes: 7, looked_ms: 1_000, silent_ms: 0 };
        let at = |seen: &mut Seen, passes, seconds: u64| verdict(seen, passes, seconds * 1_000);
        assert_eq!(at(&mut seen, 7, 2), Health::Well);
        assert_eq!(at(&mut seen, 7, 3), Health::Stalled);
        assert_eq!(at(&mut seen, 8, 4), Health::Well, "it came back");
        assert_eq!(at(&mut seen, 8, 5), Health::Well);
        assert!((6..14).all(|seconds| at(&mut seen, 8, seconds) == Health::Stalled));
        assert_eq!(at(&mut seen, 8, 1), Health::Stalled, "a clock that goes back proves nothing");
        assert_eq!(at(&mut seen, 8, 2), Health::Stuck);
    }

    #[test]
    fn a_host_that_stood_still_for_an_hour_ends_no_process() {
        let mut seen = Seen { passes: 7, looked_ms: 1_000, silent_ms: 0 };
        assert_eq!(verdict(&mut seen, 7, 3_601_000), Health::Well);
        assert_eq!(verdict(&mut seen, 8, 3_601_500), Health::Well);
    }
}
