//! The risk check in front of staff's sensitive requests. A staff token has no network or program that it belongs to: what is
//! seen of it is how fast it is used, and how often it brings an approval that is none. Counted by each replica for itself.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use time::OffsetDateTime;
use uuid::Uuid;

use super::RATE_WINDOW;
use super::risk::{self, Signals, Verdict};

/// Tokens known at once: 48 bytes each. When there are more, those that have done nothing lately are forgotten, or all.
const MAX_TOKENS: usize = 1_024;

/// What a request brought as its approval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Approval {
    Missing,
    /// For something else, used, expired or invented.
    Wrong,
    Right,
}

/// One for the process.
#[derive(Debug, Default)]
pub struct StaffWatch(Mutex<HashMap<Uuid, Seen>>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    since: OffsetDateTime,
    requests: u32,
    /// In a row.
    wrong: u32,
}

impl StaffWatch {
    /// Counts a sensitive request of a token. [`Verdict::Block`]: the token is to be revoked.
    pub fn judge(&self, token: Uuid, approval: Approval, now: OffsetDateTime) -> Verdict {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= MAX_TOKENS && !tokens.contains_key(&token) {
            tokens.retain(|_, seen| now - seen.since < RATE_WINDOW);
            if tokens.len() >= MAX_TOKENS {
                tokens.clear();
            }
        }
        let seen = tokens.entry(token).or_insert(Seen { since: now, requests: 0, wrong: 0 });
        if now - seen.since >= RATE_WINDOW {
            (seen.since, seen.requests) = (now, 0);
        }
        seen.requests = seen.requests.saturating_add(1);
        seen.wrong = match approval {
            Approval::Missing => seen.wrong,
            Approval::Wrong => seen.wrong.saturating_add(1),
            Approval::Right => 0,
        };
        risk::judge(Signals {
            network_known: true,
            same_user_agent: true,
            requests_per_minute: seen.requests,
            challenge_failures: seen.wrong,
            recent_login_failures: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_800_000_000 + seconds).unwrap()
    }

    #[test]
    fn a_token_ends_at_the_fifth_wrong_approval_in_a_row_or_at_a_speed_that_nobody_has() {
        let (watch, token) = (StaffWatch::default(), Uuid::from_u128(1));
        let wrong = || watch.judge(token, Approval::Wrong, at(0));
        assert!((0..4).all(|_| wrong() < Verdict::Block));
        assert!(watch.judge(token, Approval::Right, at(0)) < Verdict::Block);
        assert!((0..4).all(|_| wrong() < Verdict::Block), "counted from the right one");
        assert!(watch.judge(token, Approval::Missing, at(3_600)) < Verdict::Block);
        assert_eq!(watch.judge(token, Approval::Wrong, at(3_600)), Verdict::Block, "however long it takes");

        let other = Uuid::from_u128(2);
        let fast = |second| watch.judge(other, Approval::Right, at(second));
        assert!((0..60).all(|_| fast(0) < Verdict::Block));
        assert_eq!(fast(59), Verdict::Block);
        assert!(fast(60) < Verdict::Block, "in another minute");
    }

    #[test]
    fn no_more_tokens_are_known_than_there_is_room_for() {
        let watch = StaffWatch::default();
        for number in 0..3 * MAX_TOKENS {
            watch.judge(Uuid::from_u128(number as u128), Approval::Missing, at(0));
        }
        assert!(watch.0.lock().unwrap().len() <= MAX_TOKENS);
    }
}
