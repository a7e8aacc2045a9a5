//! Keys whose callers have just been refused for their rate. While the bucket is full, saying so again needs no look at the
//! database: one that sends ten times what it may costs the others next to nothing. Only refusals rest on what is remembered,
//! and for a second; the first request that the bucket lets pass is judged by a lookup of its own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::lookup::Row;

/// A kilobyte each, or, with very many allowed origins, some twenty. When there are more, all are forgotten.
const MAX_KEYS: usize = 1_024;
/// So soon does a rate that was raised count.
const REMEMBERED: Duration = Duration::from_secs(1);

/// One for the process.
#[derive(Debug, Default)]
pub struct OverRate(Mutex<HashMap<String, (Instant, Arc<Row>)>>);

impl OverRate {
    pub(super) fn note(&self, key: &str, row: &Arc<Row>, now: Instant) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KEYS && !known.contains_key(key) {
            known.retain(|_, (until, _)| *until > now);
            if known.len() >= MAX_KEYS {
                known.clear();
            }
        }
        known.insert(key.to_owned(), (now + REMEMBERED, Arc::clone(row)));
    }

    pub(super) fn get(&self, key: &str, now: Instant) -> Option<Arc<Row>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(key).filter(|(until, _)| *until > now).map(|(_, row)| Arc::clone(row))
    }
}

#[cfg(test)]
mod tests {
    use cvault_types::TenantId;
    use uuid::Uuid;

    use super::*;

    fn row() -> Arc<Row> {
        Arc::new(Row {
            tenant: TenantId::from_uuid(Uuid::nil()),
            api_key_id: Uuid::nil(),
            secret_hash: Vec::new(),
            previous_secret_hash: None,
            previous_valid_until: None,
            expires_at: None,
            scopes: Vec::new(),
            suspended: false,
            public_clients: false,
            allowed_origins: Vec::new(),
            rate_limit_per_minute: None,
            user_rate_limit_per_minute: None,
        })
    }

    #[test]
    fn what_is_remembered_is_forgotten_after_a_second_and_when_there_is_too_much_of_it() {
        let (known, row, now) = (OverRate::default(), row(), Instant::now());
        known.note("one", &row, now);
        assert!(known.get("one", now).is_some() && known.get("two", now).is_none());
        assert!(known.get("one", now + REMEMBERED).is_none());
        for number in 0..MAX_KEYS * 2 {
            known.note(&number.to_string(), &row, now);
        }
        assert!(known.0.lock().unwrap().len() <= MAX_KEYS);
    }
}
