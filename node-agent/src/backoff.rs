//! When to try again: full jitter over a doubling ladder, so that a fleet does not come back in step.
//!
//! (Brooker, "Exponential Backoff And Jitter", 2015.) The top of the ladder depends on who suffers from an attempt: while
//! the control plane cannot be reached at all it costs only a SYN, and a healed partition must be noticed within
//! seconds; a control plane that answers and refuses is left alone for longer.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(250);
const MAX_UNREACHABLE: Duration = Duration::from_secs(3);
const MAX_REFUSED: Duration = Duration::from_secs(30);

/// Why the last attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The control plane was not reached.
    Unreachable,
    /// It was reached, and refused or broke off.
    Refused,
    /// We ended the session ourselves, to be told the state anew.
    Replaced,
}

/// Whether a session of this length was a good one, after which the ladder begins at its foot again. A state that we
/// refuse may take long to arrive: if that counted as good, it would be asked for without a pause for ever.
pub(crate) fn was_good(session: Duration, ended: Ended) -> bool {
    session
        >= match ended {
            Ended::Unreachable | Ended::Refused => Duration::from_secs(10),
            Ended::Replaced => Duration::from_secs(300),
        }
}

/// The wait before the next attempt. `failures` counts attempts since the last good session, `random` is in 0..1.
pub(crate) fn delay(failures: u32, ended: Ended, random: f64) -> Duration {
    let max = match ended {
        Ended::Unreachable => MAX_UNREACHABLE,
        Ended::Refused | Ended::Replaced => MAX_REFUSED,
    };
    let ceiling = FIRST.saturating_mul(1 << failures.min(16)).min(max);
    ceiling.mul_f64(random.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_ladder_starts_low_and_its_top_depends_on_who_suffers() {
        assert_eq!(delay(0, Ended::Refused, 1.0), FIRST);
        assert_eq!(delay(2, Ended::Refused, 1.0), Duration::from_secs(1));
        assert_eq!(delay(40, Ended::Refused, 1.0), MAX_REFUSED);
        assert_eq!(delay(40, Ended::Unreachable, 1.0), MAX_UNREACHABLE);
    }

    #[test]
    fn a_refused_state_that_takes_long_to_arrive_does_not_begin_the_ladder_again() {
        let arrival = Duration::from_secs(20);
        assert!(was_good(arrival, Ended::Unreachable) && !was_good(arrival, Ended::Replaced));
        assert!(was_good(Duration::from_secs(3_600), Ended::Replaced));
    }

    proptest! {
        #[test]
        fn the_jitter_is_full_and_never_above_the_ceiling(failures: u32, random in 0.0f64..1.0) {
            let ceiling = delay(failures, Ended::Refused, 1.0);
            let wait = delay(failures, Ended::Refused, random);
            prop_assert!(wait <= ceiling && wait <= MAX_REFUSED);
            prop_assert!((wait.as_secs_f64() - ceiling.as_secs_f64() * random).abs() < 0.001);
        }
    }
}
