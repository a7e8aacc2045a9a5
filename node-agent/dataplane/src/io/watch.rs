//! Whether a worker still finishes its passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A pass takes milliseconds, and a worker that was poked begins one at once.
const STALLED_MS: u64 = 2_000;
/// Nobody waits longer for a worker that hangs: the process ends, to be started anew from its counter file.
const STUCK_MS: u64 = 10_000;

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
    at_ms: u64,
}

impl Watch {
    pub(crate) fn new(pulse: Arc<Pulse>, now_ms: u64) -> Self {
        Self { pulse, seen: Seen { passes: 0, at_ms: now_ms } }
    }

    /// To be called now and then, each time after the worker was poked.
    pub(crate) fn look(&mut self, now_ms: u64) -> Health {
        let health = verdict(&mut self.seen, self.pulse.passes.load(Ordering::Relaxed), now_ms);
        self.pulse.stalled.store(health != Health::Well, Ordering::Relaxed);
        health
    }
}

fn verdict(seen: &mut Seen, passes: u64, now_ms: u64) -> Health {
    if passes != seen.passes {
        *seen = Seen { passes, at_ms: now_ms };
    }
    match now_ms.saturating_sub(seen.at_ms) {
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
        let mut seen = Seen { passes: 7, at_ms: 1_000 };
        assert_eq!(verdict(&mut seen, 7, 2_999), Health::Well);
        assert_eq!(verdict(&mut seen, 7, 3_000), Health::Stalled);
        assert_eq!(verdict(&mut seen, 8, 3_500), Health::Well, "it came back");
        assert_eq!(verdict(&mut seen, 8, 5_499), Health::Well);
        assert_eq!(verdict(&mut seen, 8, 13_499), Health::Stalled);
        assert_eq!(verdict(&mut seen, 8, 13_500), Health::Stuck);
        assert_eq!(verdict(&mut seen, 8, 1_000), Health::Well, "a clock that goes back proves nothing");
    }
}
