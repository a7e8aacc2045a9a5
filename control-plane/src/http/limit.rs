//! Rate limits in memory: GCRA (the leaky bucket as a meter, ITU-T I.371), one number per key.
//!
//! A tenant may send `per_minute` requests at once and then one each `60 / per_minute` seconds. Each replica counts for
//! itself. The table is bounded: when it is full, idle keys are dropped first; a key that was dropped starts afresh.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Keys remembered at once: 64 bytes each, so about 6 MiB at most.
const MAX_KEYS: usize = 100_000;
const WINDOW: Duration = Duration::from_secs(60);

/// What the limiter said about one request; rendered as the `RateLimit` headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    pub per_minute: u32,
    pub remaining: u32,
    /// Until the whole allowance is back.
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
    /// Counts one request of `key` at `now`.
    pub fn check(&self, key: K, per_minute: u32, now: Instant) -> Decision {
        let per_minute = per_minute.max(1);
        let interval = WINDOW / per_minute;
        let mut table = self.empty_at.lock().unwrap_or_else(PoisonError::into_inner);
        let level = table.get(&key).map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let allowed = level + interval <= WINDOW;
        let level = if allowed { level + interval } else { level };
        if allowed {
            if table.len() >= self.max_keys && !table.contains_key(&key) {
                make_room(&mut table, now);
            }
            table.insert(key, now + level);
        }
        let free = WINDOW.saturating_sub(level);
        let wait = (level + interval).saturating_sub(WINDOW);
        Decision {
            allowed,
            per_minute,
            remaining: u32::try_from(free.as_nanos() / interval.as_nanos()).unwrap_or(per_minute),
            reset_seconds: ceil_seconds(level),
            retry_after_seconds: ceil_seconds(wait),
        }
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

    #[test]
    fn a_burst_of_the_whole_allowance_passes_and_the_next_request_waits() {
        let limiter = Limiter::default();
        let start = Instant::now();
        for used in 1..=100 {
            let decision = limiter.check(1, 100, start);
            assert!(decision.allowed);
            assert_eq!(decision.remaining, 100 - used);
        }
        let refused = limiter.check(1, 100, start);
        assert_eq!((refused.allowed, refused.retry_after_seconds, refused.reset_seconds), (false, 1, 60));
        assert!(limiter.check(1, 100, start + Duration::from_millis(600)).allowed);
        assert!(!limiter.check(1, 100, start + Duration::from_millis(601)).allowed);
        assert!(limiter.check(2, 100, start).allowed, "another tenant is not slowed");
    }

    #[test]
    fn no_minute_admits_more_than_twice_the_allowance_and_an_hour_admits_its_share() {
        let limiter = Limiter::default();
        let start = Instant::now();
        let admitted =
            (0..36_000u64).filter(|i| limiter.check(1, 100, start + Duration::from_millis(i * 100)).allowed).count();
        assert!((6_000..=6_100).contains(&admitted), "{admitted}");
    }

    #[test]
    fn the_table_never_grows_past_its_bound() {
        let limiter = Limiter { max_keys: 10, ..Limiter::default() };
        let now = Instant::now();
        for key in 0..1_000 {
            limiter.check(key, 100, now);
            assert!(limiter.empty_at.lock().unwrap().len() <= 10);
        }
    }
}
