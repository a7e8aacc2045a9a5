//! How many panics the worker survives: one costs the packets of a pass, a stream of them means a broken state.

use std::collections::VecDeque;

/// Panics within a minute after which the process ends, to be started anew from its counter file.
const TOO_MANY: usize = 5;
const MINUTE_MS: u64 = 60_000;

/// Whether to go on after a panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    GoOn,
    GiveUp,
}

/// The panics of the last minute.
#[derive(Debug, Default)]
pub(crate) struct Panics(VecDeque<u64>);

impl Panics {
    /// Counts one.
    pub(crate) fn one(&mut self, now_ms: u64) -> Verdict {
        self.0.retain(|at| now_ms.saturating_sub(*at) < MINUTE_MS);
        self.0.push_back(now_ms);
        if self.0.len() < TOO_MANY { Verdict::GoOn } else { Verdict::GiveUp }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_now_and_then_are_survived_and_a_stream_of_them_is_not() {
        let mut panics = Panics::default();
        for minute in 0..100 {
            assert_eq!(panics.one(minute * MINUTE_MS), Verdict::GoOn);
        }
        let now = 100 * MINUTE_MS;
        let verdicts: Vec<_> = (0..5).map(|i| panics.one(now + i)).collect();
        assert_eq!(verdicts[..4], [Verdict::GoOn; 4]);
        assert_eq!(verdicts[4], Verdict::GiveUp);
    }
}
