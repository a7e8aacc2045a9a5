//! Passwords: bcrypt at cost 12 or Argon2id, in processes of their own.
//!
//! One check takes about 0.2 s of a core (bcrypt) or some megabytes (Argon2id), so as many run as there are cores, a few
//! wait, and the rest is answered OVERLOADED at once. Tenants take turns, so that one that has many checks waiting keeps no other
//! one waiting longer, or out. They yield to everything else, PostgreSQL included: nothing waits for them but logins. What
//! they hold at most is the memory of one Argon2id hash for each core.
//!
//! A stored hash tells its scheme by its prefix; one of another scheme or cost than the configured is made anew by the next
//! login that brings the password. bcrypt reads 72 bytes and stops at a NUL: longer passwords and those with a NUL are
//! hashed with SHA-256 first, never cut.

mod apart;
mod pool;
mod queue;
mod scheme;

pub use apart::{COMMAND, answer_all};
pub use pool::Party;
pub use scheme::{HashError, MAX_MEMORY_KIB, MAX_PASSES, Scheme};

use std::path::PathBuf;
use std::sync::OnceLock;

use cvault_types::Secret;

use self::apart::{Answer, Question};
use self::pool::Pool;
use crate::http::Problem;

/// Of a password that can be chosen: 128 characters of four bytes.
const LONGEST_BYTES: usize = 512;

/// Adds a fault at `pointer` when `password` is too short or too long to be chosen.
#[must_use]
pub fn checked(problem: Problem, pointer: &str, password: &Secret) -> Problem {
    match password.expose().chars().count() {
        0..8 => problem.field(pointer, "too_short", "must have 8 characters or more"),
        8..=128 => problem,
        _ => problem.field(pointer, "too_long", "must have 128 characters or fewer"),
    }
}

/// Hashes and checks, for the whole process.
#[derive(Debug)]
pub struct Passwords {
    pool: Pool,
    scheme: Scheme,
    /// Checked in the place of an unknown user's, so that both take the same time.
    nobody: String,
    /// Whose children compute; the threads themselves, as long as none is named.
    program: OnceLock<PathBuf>,
}

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub right: bool,
    /// To be stored in the place of the old hash, if that is still the same.
    pub rehashed: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    #[error("too many password checks are waiting")]
    Overloaded,
    #[error("the password hash cannot be computed")]
    Hash(#[source] HashError),
    #[error("the password check was interrupted")]
    Interrupted,
}

impl Default for Passwords {
    fn default() -> Self {
        Self::new(Scheme::default())
    }
}

impl Passwords {
    #[must_use]
    pub fn new(scheme: Scheme) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with_bounds(scheme, cores, cores * scheme.waiting_per_core())
    }

    /// # Panics
    /// When the system has no thread to give at the start.
    #[must_use]
    pub fn with_bounds(scheme: Scheme, running: usize, waiting: usize) -> Self {
        Self { pool: Pool::start(running, waiting), scheme, nobody: scheme.nobody(), program: OnceLock::new() }
    }

    /// From now on children of `program` compute, which [`answer_all`] when they are called with [`COMMAND`].
    pub fn compute_apart(&self, program: PathBuf) {
        let _ = self.program.set(program);
    }

    /// The text to store: `$2b$12$…` or `$argon2id$…`.
    ///
    /// # Errors
    /// [`PasswordError::Overloaded`] when the queue is full, and `party` holds its share of it.
    pub async fn hash(&self, party: Party, password: Secret) -> Result<String, PasswordError> {
        match self.run(party, Question::Hash { scheme: self.scheme, password }).await? {
            Answer::Hash(hash) => Ok(hash),
            Answer::Right(_) => Err(PasswordError::Hash(HashError::OtherAnswer)),
        }
    }

    /// Whether `password` is the one of `hash`; without a hash the same work is done and the answer is no.
    ///
    /// # Errors
    /// [`PasswordError::Overloaded`] when the queue is full, and `party` holds its share of it.
    pub async fn verify(&self, party: Party, password: Secret, hash: Option<String>) -> Result<bool, PasswordError> {
        // one as long has never been chosen; its check costs what others cost
        let (password, hash) = match password.expose().len() {
            0..=LONGEST_BYTES => (password, hash),
            _ => (Secret::new(""), None),
        };
        let known = hash.is_some();
        let hash = hash.unwrap_or_else(|| self.nobody.clone());
        match self.run(party, Question::Verify { password, hash }).await? {
            Answer::Right(right) => Ok(right && known),
            Answer::Hash(_) => Err(PasswordError::Hash(HashError::OtherAnswer)),
        }
    }

    /// As [`Passwords::verify`], and makes a right password's hash anew where the configuration wants another than is
    /// stored. A queue that is full by then leaves the old one for the next login.
    ///
    /// # Errors
    /// [`PasswordError::Overloaded`] when the queue is full, and `party` holds its share of it.
    pub async fn verify_login(
        &self,
        party: Party,
        password: Secret,
        hash: Option<String>,
    ) -> Result<Verified, PasswordError> {
        let wanted = hash.as_deref().is_some_and(|hash| !self.scheme.made(hash));
        let right = self.verify(party, password.clone(), hash).await?;
        let rehashed = match right && wanted {
            true => match self.hash(party, password).await {
                Ok(rehashed) => Some(rehashed),
                Err(PasswordError::Overloaded) => None,
                Err(error) => return Err(error),
            },
            false => None,
        };
        Ok(Verified { right, rehashed })
    }

    async fn run(&self, party: Party, question: Question) -> Result<Answer, PasswordError> {
        let program = self.program.get().cloned();
        let work = move || match program {
            Some(program) => apart::ask(&program, &question),
            None => question.answer(),
        };
        self.pool.run(party, work).await?.map_err(PasswordError::Hash)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn secret(text: impl Into<String>) -> Secret {
        Secret::new(text)
    }

    const SMALL: Scheme = Scheme::Argon2id { memory_kib: 8192, passes: 1 };

    #[tokio::test]
    async fn long_passwords_differ_in_their_last_byte_and_after_a_nul() {
        for scheme in [Scheme::default(), SMALL] {
            let pool = Passwords::new(scheme);
            let hash = pool.hash(Party::Portal, secret(format!("{}x", "a".repeat(100)))).await.unwrap();
            assert!(
                !pool.verify(Party::Portal, secret(format!("{}y", "a".repeat(100))), Some(hash.clone())).await.unwrap()
            );
            assert!(
                pool.verify(Party::Portal, secret(format!("{}x", "a".repeat(100))), Some(hash.clone())).await.unwrap()
            );
            assert!(!pool.verify(Party::Portal, secret("a".repeat(1_000_000)), Some(hash)).await.unwrap());
            let hash = pool.hash(Party::Portal, secret("abcdefgh\0one")).await.unwrap();
            assert!(!pool.verify(Party::Portal, secret("abcdefgh\0two"), Some(hash)).await.unwrap());
        }
    }

    #[tokio::test]
    async fn an_unknown_user_costs_the_same_work_and_is_refused() {
        for scheme in [Scheme::default(), SMALL] {
            let pool = Passwords::new(scheme);
            assert!(!pool.verify(Party::Portal, secret("whatever it is"), None).await.unwrap());
            assert!(scheme.made(&pool.nobody), "{}", pool.nobody);
        }
    }

    #[tokio::test]
    async fn a_login_replaces_a_hash_of_another_scheme_or_cost_and_no_other() {
        let old = Passwords::new(Scheme::Bcrypt { cost: 10 });
        let new = Passwords::new(SMALL);
        let stored = old.hash(Party::Portal, secret("correct horse")).await.unwrap();
        let wrong = new.verify_login(Party::Portal, secret("wrong horse"), Some(stored.clone())).await.unwrap();
        assert_eq!(wrong, Verified { right: false, rehashed: None });
        let right = new.verify_login(Party::Portal, secret("correct horse"), Some(stored)).await.unwrap();
        let fresh = right.rehashed.unwrap();
        assert!(fresh.starts_with("$argon2id$v=19$m=8192,t=1,p=1$"), "{fresh}");
        let again = new.verify_login(Party::Portal, secret("correct horse"), Some(fresh.clone())).await.unwrap();
        assert_eq!(again, Verified { right: true, rehashed: None });
        // and back, when somebody changes their mind
        let back = old.verify_login(Party::Portal, secret("correct horse"), Some(fresh)).await.unwrap();
        assert!(back.rehashed.unwrap().starts_with("$2b$10$"));
        assert_eq!(
            new.verify_login(Party::Portal, secret("x"), None).await.unwrap(),
            Verified { right: false, rehashed: None }
        );
    }

    #[tokio::test]
    async fn a_damaged_hash_is_an_error_and_not_a_wrong_password() {
        let pool = Passwords::new(SMALL);
        for hash in [
            "",
            "$1$md5",
            "$2b$12$short",
            "$argon2id$v=19$m=1",
            // not the salt's length, and a parameter, of ours
            "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
            "$argon2id$v=19$m=8192,t=1,p=1,keyid=Zm9v$c29tZXNhbHRzb21lc2FsdA$/DO3gTkjHTS3Fia9YkXB1y76GQrWBcPYFmpyrc7fosI",
            "$argon2id$v=19$m=4194304,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
        ] {
            let outcome = pool.verify(Party::Portal, secret("x"), Some(hash.to_owned())).await;
            assert!(matches!(outcome, Err(PasswordError::Hash(_))), "{hash}: {outcome:?}");
        }
    }

    #[tokio::test]
    async fn hashes_of_the_reference_implementations_are_understood() {
        let pool = Passwords::new(SMALL);
        // `argon2 -id` of phc-winner-argon2, and crypt(3)
        for (password, hash) in [
            (
                "password",
                "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHRzb21lc2FsdA$/DO3gTkjHTS3Fia9YkXB1y76GQrWBcPYFmpyrc7fosI",
            ),
            ("U*U", "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"),
        ] {
            assert!(pool.verify(Party::Portal, secret(password), Some(hash.to_owned())).await.unwrap(), "{hash}");
            assert!(!pool.verify(Party::Portal, secret("another"), Some(hash.to_owned())).await.unwrap(), "{hash}");
        }
    }

    #[tokio::test]
    async fn a_full_queue_answers_at_once() {
        let pool = Arc::new(Passwords::with_bounds(Scheme::default(), 1, 1));
        let busy: Vec<_> = (0..3)
            .map(|_| {
                let pool = Arc::clone(&pool);
                tokio::spawn(async move { pool.hash(Party::Portal, secret("correct horse")).await })
            })
            .collect();
        let mut overloaded = 0;
        for task in busy {
            overloaded += usize::from(matches!(task.await.unwrap(), Err(PasswordError::Overloaded)));
        }
        assert_eq!(overloaded, 1);
        assert!(pool.hash(Party::Portal, secret("correct horse")).await.is_ok(), "places are given back");
    }
}
