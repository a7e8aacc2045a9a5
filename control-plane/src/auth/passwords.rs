//! Passwords: bcrypt at cost 12, on a bounded number of blocking threads.
//!
//! One check takes about 0.2 s of a core, so as many run as there are cores, a few wait, and the rest is answered
//! OVERLOADED at once; nothing else in the process waits for them. bcrypt reads 72 bytes and stops at a NUL: longer
//! passwords and those with a NUL are hashed with SHA-256 first, never cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use cvault_types::Secret;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use crate::http::Problem;
use crate::metrics;

/// Required by the guide, §3.6.
const COST: u32 = 12;
/// Checks that may wait for each core: about 4 s at 0.2 s each.
const WAITING_PER_CORE: usize = 20;
/// The hash of 32 random bytes nobody kept; checked in the place of an unknown user's, so that both take the same time.
const NOBODY: &str = "$2b$12$49o4uvkpZ3rDrQbwWLaxxuI5LRxY2ooe8uC87Tg400ajLdXM0.Y.K";

/// Adds a fault at `pointer` when `password` is too short or too long to be chosen.
#[must_use]
pub fn checked(problem: Problem, pointer: &str, password: &Secret) -> Problem {
    match password.expose().chars().count() {
        0..8 => problem.field(pointer, "too_short", "must have 8 characters or more"),
        8..=128 => problem,
        _ => problem.field(pointer, "too_long", "must have 128 characters or fewer"),
    }
}

/// The bounded pool.
#[derive(Debug)]
pub struct Passwords {
    running: Arc<Semaphore>,
    admitted: Arc<AtomicUsize>,
    max_admitted: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    #[error("too many password checks are waiting")]
    Overloaded,
    #[error("the password hash cannot be computed")]
    Hash(#[source] bcrypt::BcryptError),
    #[error("the password check was interrupted")]
    Interrupted,
}

impl Default for Passwords {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with_bounds(cores, cores * WAITING_PER_CORE)
    }
}

impl Passwords {
    #[must_use]
    pub fn with_bounds(running: usize, waiting: usize) -> Self {
        Self {
            running: Arc::new(Semaphore::new(running)),
            admitted: Arc::new(AtomicUsize::new(0)),
            max_admitted: running + waiting,
        }
    }

    /// The bcrypt text (`$2b$12$…`) to store.
    ///
    /// # Errors
    /// [`PasswordError::Overloaded`] when the queue is full.
    pub async fn hash(&self, password: Secret) -> Result<String, PasswordError> {
        self.run(move || bcrypt::non_truncating_hash(&*material(&password), COST)).await
    }

    /// Whether `password` is the one of `hash`; without a hash the same work is done and the answer is no.
    ///
    /// # Errors
    /// [`PasswordError::Overloaded`] when the queue is full.
    pub async fn verify(&self, password: Secret, hash: Option<String>) -> Result<bool, PasswordError> {
        self.run(move || {
            let same = bcrypt::non_truncating_verify(&*material(&password), hash.as_deref().unwrap_or(NOBODY))?;
            Ok(same && hash.is_some())
        })
        .await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, bcrypt::BcryptError> + Send + 'static,
    ) -> Result<T, PasswordError> {
        let place = Place::take(&self.admitted, self.max_admitted).ok_or(PasswordError::Overloaded)?;
        let permit = Arc::clone(&self.running).acquire_owned().await.map_err(|_| PasswordError::Interrupted)?;
        tokio::task::spawn_blocking(move || {
            // held until the work is done, even when nobody waits for it any more
            let _held = (place, permit);
            work()
        })
        .await
        .map_err(|_| PasswordError::Interrupted)?
        .map_err(PasswordError::Hash)
    }
}

/// One place in the pool, running or waiting.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(admitted: &Arc<AtomicUsize>, max: usize) -> Option<Self> {
        let taken = admitted
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < max).then_some(count + 1))
            .ok()?;
        metrics::password_queue(taken + 1);
        Some(Self(Arc::clone(admitted)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::password_queue(self.0.fetch_sub(1, Ordering::Relaxed) - 1);
    }
}

/// What bcrypt gets: 71 bytes and its own NUL at most.
fn material(password: &Secret) -> Zeroizing<Vec<u8>> {
    let bytes = password.expose().as_bytes();
    if bytes.len() <= 71 && !bytes.contains(&0) {
        return Zeroizing::new(bytes.to_vec());
    }
    let digest = Sha256::new().chain_update(b"cvault-long-password\0").chain_update(bytes).finalize();
    Zeroizing::new(STANDARD_NO_PAD.encode(digest).into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: impl Into<String>) -> Secret {
        Secret::new(text)
    }

    #[tokio::test]
    async fn long_passwords_differ_in_their_last_byte_and_after_a_nul() {
        let pool = Passwords::default();
        let hash = pool.hash(secret(format!("{}x", "a".repeat(100)))).await.unwrap();
        assert!(hash.starts_with("$2b$12$"), "{hash}");
        assert!(!pool.verify(secret(format!("{}y", "a".repeat(100))), Some(hash.clone())).await.unwrap());
        assert!(pool.verify(secret(format!("{}x", "a".repeat(100))), Some(hash)).await.unwrap());
        assert_ne!(*material(&secret("abcdefgh\0one")), *material(&secret("abcdefgh\0two")));
    }

    #[tokio::test]
    async fn an_unknown_user_costs_the_same_work_and_is_refused() {
        assert!(!Passwords::default().verify(secret("whatever it is"), None).await.unwrap());
    }

    #[tokio::test]
    async fn a_full_queue_answers_at_once() {
        let pool = Arc::new(Passwords::with_bounds(1, 1));
        let busy: Vec<_> = (0..3)
            .map(|_| {
                let pool = Arc::clone(&pool);
                tokio::spawn(async move { pool.hash(secret("correct horse")).await })
            })
            .collect();
        let mut overloaded = 0;
        for task in busy {
            overloaded += usize::from(matches!(task.await.unwrap(), Err(PasswordError::Overloaded)));
        }
        assert_eq!(overloaded, 1);
        assert!(pool.hash(secret("correct horse")).await.is_ok(), "places are given back");
    }
}
