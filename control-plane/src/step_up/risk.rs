//! What is thought of a sensitive request: let it through, ask who it is, or end its session. Pure: signals in, verdict out.
//!
//! A session is ended only for what the session itself does. What strangers do to the account from outside, such as failing
//! logins, leads to a question at most: otherwise anybody could log its owner out.

/// A person clicks through a page of keys at this speed; more is a script, perhaps a wanted one.
const MANY_PER_MINUTE: u32 = 10;
/// No person does this.
const IMPOSSIBLE_PER_MINUTE: u32 = 60;
/// Failed logins at the account in the last quarter of an hour.
const MANY_LOGIN_FAILURES: u32 = 5;
/// Wrong answers to challenges in a row, in one session.
pub(super) const MAX_CHALLENGE_FAILURES: u32 = 5;

/// What is known when a sensitive request arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signals {
    /// The account has logged in, or answered a challenge, from the request's network before.
    pub network_known: bool,
    /// The session calls itself what it did when it was last seen.
    pub same_user_agent: bool,
    /// Sensitive requests of the session within a minute, this one included.
    pub requests_per_minute: u32,
    pub challenge_failures: u32,
    pub recent_login_failures: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Allow,
    Challenge,
    Block,
}

#[must_use]
pub fn judge(signals: Signals) -> Verdict {
    let stolen = !signals.network_known && !signals.same_user_agent;
    if stolen
        || signals.requests_per_minute > IMPOSSIBLE_PER_MINUTE
        || signals.challenge_failures >= MAX_CHALLENGE_FAILURES
    {
        return Verdict::Block;
    }
    if !signals.network_known
        || !signals.same_user_agent
        || signals.requests_per_minute > MANY_PER_MINUTE
        || signals.recent_login_failures >= MANY_LOGIN_FAILURES
    {
        return Verdict::Challenge;
    }
    Verdict::Allow
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CALM: Signals = Signals {
        network_known: true,
        same_user_agent: true,
        requests_per_minute: 1,
        challenge_failures: 0,
        recent_login_failures: 0,
    };

    #[test]
    fn each_signal_alone_has_its_verdict() {
        let table = [
            (CALM, Verdict::Allow),
            (Signals { network_known: false, ..CALM }, Verdict::Challenge),
            (Signals { same_user_agent: false, ..CALM }, Verdict::Challenge),
            (Signals { network_known: false, same_user_agent: false, ..CALM }, Verdict::Block),
            (Signals { requests_per_minute: 10, ..CALM }, Verdict::Allow),
            (Signals { requests_per_minute: 11, ..CALM }, Verdict::Challenge),
            (Signals { requests_per_minute: 60, ..CALM }, Verdict::Challenge),
            (Signals { requests_per_minute: 61, ..CALM }, Verdict::Block),
            (Signals { challenge_failures: 4, ..CALM }, Verdict::Allow),
            (Signals { challenge_failures: 5, ..CALM }, Verdict::Block),
            (Signals { recent_login_failures: 4, ..CALM }, Verdict::Allow),
            (Signals { recent_login_failures: 5, ..CALM }, Verdict::Challenge),
        ];
        for (signals, verdict) in table {
            assert_eq!(judge(signals), verdict, "{signals:?}");
        }
    }

    #[test]
    fn nobody_outside_of_a_session_can_end_it() {
        assert_eq!(judge(Signals { recent_login_failures: u32::MAX, ..CALM }), Verdict::Challenge);
    }

    fn signals() -> impl Strategy<Value = Signals> {
        (any::<bool>(), any::<bool>(), 0..100_u32, 0..10_u32, 0..10_u32).prop_map(
            |(network_known, same_user_agent, requests_per_minute, challenge_failures, recent_login_failures)| {
                Signals {
                    network_known,
                    same_user_agent,
                    requests_per_minute,
                    challenge_failures,
                    recent_login_failures,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn what_looks_worse_is_never_judged_milder(signals in signals()) {
            let worse = [
                Signals { network_known: false, ..signals },
                Signals { same_user_agent: false, ..signals },
                Signals { requests_per_minute: signals.requests_per_minute + 1, ..signals },
                Signals { challenge_failures: signals.challenge_failures + 1, ..signals },
                Signals { recent_login_failures: signals.recent_login_failures + 1, ..signals },
            ];
            for worse in worse {
                prop_assert!(judge(worse) >= judge(signals), "{signals:?} {worse:?}");
            }
        }
    }
}
