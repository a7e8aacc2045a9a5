//! Rate limits in memory: GCRA (the leaky bucket as a meter, ITU-T I.371), one number per key.
//!
//! A key may use what its allowance lets it use at once, and then one each `window / count`. Each replica counts for
//! itself. The table is bounded: when it is full, idle keys are dropped first; a key that was dropped starts afresh.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Keys remembered at once: 64 bytes each, so about 6 MiB at most.
const MAX_KEYS: usize = 100_000;

/// Whoever may send more than this in a minute may not send all of it at once: others wait behind it.
const AT_ONCE: u32 = 100;

/// So many in each window, and so many of them at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    count: u32,
    window: Duration,
    at_once: u32,
}

impl Allowance {
    /// All of them at once, if need be.
    #[must_use]
    pub const fn new(count: u32, window: Duration) -> Self {
        Self { count, window, at_once: count }
    }

    #[must_use]
    pub const fn per_minute(count: u32) -> Self {
        Self::new(count, Duration::from_secs(60))
    }

    /// At most a hundred of them at once, or what a second brings, if that is more.
    #[must_use]
    pub fn paced(count: u32) -> Self {
        Self { at_once: count.min(AT_ONCE.max(count / 60)), ..Self::per_minute(count) }
    }

    fn interval(self) -> Duration {
        self.window / self.count.max(1)
    }

    /// How full a bucket may be.
    fn depth(self) -> Duration {
        if self.at_once == self.count { self.window } else { self.interval() * self.at_once }
    }
}

/// What the limiter said about one request; rendered as the `RateLimit` headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// The whole allowance.
    pub quota: u32,
    pub remaining: u32,
    /// Until all that may be used at once is there again.
    pub reset_seconds: u64,
    /// Until the next request is allowed; 0 when one is allowed now.
    pub retry_after_seconds: u64,
}

/// Counts requests of keys.
#[derive(Debug)]
pub struct Limiter<K> {
    /// When each key's bucket is empty again.
    empty_at: Mutex<HashMap<K, Instant>>,
    max_keys: usize,
}

impl<K> Default for Limiter<K> {
    fn default() -> Self {
        Self { empty_at: Mutex::new(HashMap::new()), max_keys: MAX_KEYS }
    }
}

impl<K: Eq + Hash + Copy> Limiter<K> {
    /// Counts one request of `key` at `now`, if it is allowed.
    pub fn charge(&self, key: K, allowance: Allowance, now: Instant) -> Decision {
        let mut table = self.empty_at.lock().unwrap_or_else(PoisonError::into_inner);
        let level = level(&table, key, now);
        let decision = decide(level, allowance);
        if level > allowance.depth() {
            // it was filled when it was a deeper one
            table.insert(key, now + allowance.depth());
        }
        if decision.allowed {
            let level = level + allowance.interval();
            if table.len() >= self.max_keys && !table.contains_key(&key) {
                make_room(&mut table, now);
            }
            table.insert(key, now + level);
        }
        decision
    }

    /// What [`Limiter::charge`] would say, without counting.
    pub fn ask(&self, key: K, allowance: Allowance, now: Instant) -> Decision {
        let table = self.empty_at.lock().unwrap_or_else(PoisonError::into_inner);
        decide(level(&table, key, now), allowance)
    }

    /// Takes one counted request back.
    pub fn give_back(&self, key: K, allowance: Allowance) {
        let mut table = self.empty_at.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(earlier) = table.get(&key).and_then(|at| at.checked_sub(allowance.interval())) {
            table.insert(key, earlier);
        }
    }
}

fn level<K: Eq + Hash>(table: &HashMap<K, Instant>, key: K, now: Instant) -> Duration {
    table.get(&key).map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
}

/// What a bucket filled up to `level` says to one more request.
fn decide(level: Duration, allowance: Allowance) -> Decision {
    let (interval, depth) = (allowance.interval(), allowance.depth());
    let level = level.min(depth);
    let allowed = level + interval <= depth;
    let level = if allowed { level + interval } else { level };
    Decision {
        allowed,
        quota: allowance.count.max(1),
        remaining: u32::try_from(depth.saturating_sub(level).as_nanos() / interval.as_nanos())
            .unwrap_or(allowance.count),
        reset_seconds: ceil_seconds(level),
        retry_after_seconds: ceil_seconds((level + interval).saturating_sub(depth)),
    }
}

/// Drops the empty buckets; when there are none, half of the table, so that this stays rare.
fn make_room<K: Eq + Hash + Copy>(table: &mut HashMap<K, Instant>, now: Instant) {
    let before = table.len();
    table.retain(|_, empty_at| *empty_at > now);
    if table.len() == before {
        let mut keep = false;
        table.retain(|_, _| {
            keep = !keep;
            keep
        });
    }
}

fn ceil_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUNDRED: Allowance = Allowance::per_minute(100);

    #[test]
    fn a_burst_of_the_whole_allowance_passes_and_the_next_request_waits() {
        let limiter = Limiter::default();
        let start = Instant::now();
        for used in 1..=100 {
            let decision = limiter.charge(1, HUNDRED, start);
            assert!(decision.allowed);
            assert_eq!(decision.remaining, 100 - used);
        }
        let refused = limiter.charge(1, HUNDRED, start);
        assert_eq!((refused.allowed, refused.retry_after_seconds, refused.reset_seconds), (false, 1, 60));
        assert!(limiter.charge(1, HUNDRED, start + Duration::from_millis(600)).allowed);
        assert!(!limiter.charge(1, HUNDRED, start + Duration::from_millis(601)).allowed);
        assert!(limiter.charge(2, HUNDRED, start).allowed, "another tenant is not slowed");
    }

    #[test]
    fn no_minute_admits_more_than_twice_the_allowance_and_an_hour_admits_its_share() {
        let limiter = Limiter::default();
        let start = Instant::now();
        let admitted = (0..36_000u64)
            .filter(|i| limiter.charge(1, HUNDRED, start + Duration::from_millis(i * 100)).allowed)
            .count();
        assert!((6_000..=6_100).contains(&admitted), "{admitted}");
    }

    #[test]
    fn who_may_send_much_may_not_send_all_of_it_at_once() {
        for (per_minute, at_once) in [(1, 1), (100, 100), (101, 100), (6_000, 100), (60_000, 1_000)] {
            let (limiter, allowance, start) = (Limiter::default(), Allowance::paced(per_minute), Instant::now());
            let admitted = |now| (0..2_000).take_while(|_| limiter.charge(1, allowance, now).allowed).count();
            assert_eq!(admitted(start), at_once, "{per_minute}");
            let refused = limiter.ask(1, allowance, start);
            assert_eq!((refused.quota, refused.remaining), (per_minute, 0));
            assert!((1..=60).contains(&refused.retry_after_seconds) && refused.reset_seconds <= 60, "{refused:?}");
            let interval = Duration::from_secs(60) / per_minute;
            assert_eq!(admitted(start + interval * 3), at_once.min(3), "{per_minute}");
        }
    }

    #[test]
    fn a_rate_that_is_raised_counts_from_then_on() {
        let (limiter, start) = (Limiter::default(), Instant::now());
        while limiter.charge(1, Allowance::paced(5), start).allowed {}
        let raised = Allowance::paced(1_000);
        assert_eq!(limiter.charge(1, raised, start).retry_after_seconds, 1);
        assert!(limiter.charge(1, raised, start + Duration::from_millis(60)).allowed);
    }

    #[test]
    fn the_table_never_grows_past_its_bound() {
        let limiter = Limiter { max_keys: 10, ..Limiter::default() };
        let now = Instant::now();
        for key in 0..1_000 {
            limiter.charge(key, HUNDRED, now);
            assert!(limiter.empty_at.lock().unwrap().len() <= 10);
        }
    }

    #[test]
    fn what_is_given_back_may_be_used_again_and_asking_costs_nothing() {
        let (limiter, now) = (Limiter::default(), Instant::now());
        let two = Allowance::new(2, Duration::from_secs(300));
        assert!(limiter.charge(1, two, now).allowed && limiter.charge(1, two, now).allowed);
        assert_eq!(limiter.charge(1, two, now).retry_after_seconds, 150);
        limiter.give_back(1, two);
        assert!(limiter.ask(1, two, now).allowed && limiter.ask(1, two, now).allowed);
        assert!(limiter.charge(1, two, now).allowed && !limiter.ask(1, two, now).allowed);
    }
}
