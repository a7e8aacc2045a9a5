//! Whether the database answers, asked at most once a second however often `/health` is called without credentials.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::db::Db;

const FRESH: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub struct HealthCache(Mutex<Option<Seen>>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    answers: bool,
    at: Instant,
}

impl HealthCache {
    /// Whether both roles got an answer within the last second or so.
    pub async fn database(&self, db: &Db) -> bool {
        if let Some(answers) = self.known(Instant::now()) {
            return answers;
        }
        let answers = db.ping().await.is_ok();
        self.note(Seen { answers, at: Instant::now() });
        answers
    }

    /// `None` makes the caller the one that asks; the others get the last answer meanwhile.
    fn known(&self, now: Instant) -> Option<bool> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = (*seen)?;
        if now.saturating_duration_since(last.at) < FRESH {
            return Some(last.answers);
        }
        *seen = Some(Seen { at: now, ..last });
        None
    }

    fn note(&self, seen: Seen) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_good_for_a_second_and_then_one_caller_asks_again() {
        let (cache, start) = (HealthCache::default(), Instant::now());
        assert_eq!(cache.known(start), None);
        cache.note(Seen { answers: true, at: start });
        assert_eq!(cache.known(start + FRESH / 2), Some(true));
        let later = start + FRESH;
        assert_eq!((cache.known(later), cache.known(later)), (None, Some(true)));
        cache.note(Seen { answers: false, at: later });
        assert_eq!(cache.known(later), Some(false));
    }
}
