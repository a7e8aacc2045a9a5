//! The two schemes, and the texts they are stored as.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use cvault_types::Secret;
use libsodium_rs::SodiumError;
use libsodium_rs::crypto_pwhash::{self, ALG_ARGON2ID13, SALTBYTES};
use password_hash::{Output, PasswordHash, Salt};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// How new hashes are made. Passwords of either scheme are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scheme {
    Bcrypt {
        cost: u32,
    },
    /// One lane: a login has one core.
    Argon2id {
        memory_kib: u32,
        passes: u32,
    },
}

/// What a stored hash may ask of us: the most that can be configured.
pub const MAX_MEMORY_KIB: u32 = 262_144;
pub const MAX_PASSES: u32 = 10;

/// RFC 9106 §3.1.
const OUTPUT_LEN: usize = 32;

/// The bcrypt hash of 32 random bytes nobody kept.
const NOBODY: &str = "49o4uvkpZ3rDrQbwWLaxxuI5LRxY2ooe8uC87Tg400ajLdXM0.Y.K";

#[derive(Debug, thiserror::Error)]
pub enum HashError {
    #[error("bcrypt failed")]
    Bcrypt(#[from] bcrypt::BcryptError),
    #[error("Argon2id failed")]
    Argon2(#[from] SodiumError),
    #[error("the stored hash cannot be read: {0}")]
    Unreadable(password_hash::Error),
    #[error("the stored hash is of no scheme we know")]
    Unknown,
    #[error("the stored hash asks for more than may be configured")]
    TooCostly,
    #[error("{0}")]
    Child(String),
    #[error("the process that checks passwords does not answer")]
    Silent,
    #[error("the process that checks passwords has answered something else")]
    OtherAnswer,
}

impl From<password_hash::Error> for HashError {
    fn from(error: password_hash::Error) -> Self {
        Self::Unreadable(error)
    }
}

impl Default for Scheme {
    /// Required by the guide, §3.6.
    fn default() -> Self {
        Self::Bcrypt { cost: 12 }
    }
}

impl Scheme {
    pub(super) fn hash(self, password: &Secret) -> Result<String, HashError> {
        match self {
            Self::Bcrypt { cost } => Ok(bcrypt::non_truncating_hash(&*material(password), cost)?),
            Self::Argon2id { memory_kib, passes } => {
                let salt = rand::random();
                let output = argon2id(password, &salt, memory_kib, passes)?;
                Ok(text(memory_kib, passes, &salt, output.as_bytes()))
            }
        }
    }

    /// Checks that may wait for each core: some seconds of bcrypt at 0.2 s each, or one or two of Argon2id, so that a hundred
    /// who log in at the same moment are all served by two cores; fewer of a dearer Argon2id.
    pub(super) fn waiting_per_core(self) -> usize {
        match self {
            Self::Bcrypt { .. } => 20,
            Self::Argon2id { memory_kib, passes } => {
                // of those that cost what they do by default
                let dearer = u64::from(memory_kib) * u64::from(passes) / (7 * 1024 * 5);
                100_usize.div_ceil(usize::try_from(dearer).unwrap_or(usize::MAX).max(1)).max(20)
            }
        }
    }

    /// Whether `hash` is what this scheme makes.
    pub(super) fn made(self, hash: &str) -> bool {
        match self {
            Self::Bcrypt { cost } => hash.starts_with(&format!("$2b${cost:02}$")),
            Self::Argon2id { memory_kib, passes } => {
                hash.starts_with(&format!("$argon2id$v=19$m={memory_kib},t={passes},p=1$"))
            }
        }
    }

    /// A hash that no password is known for, and that costs what others cost.
    pub(super) fn nobody(self) -> String {
        match self {
            Self::Bcrypt { cost } => format!("$2b${cost:02}${NOBODY}"),
            // 32 bytes that are the outcome of nothing
            Self::Argon2id { memory_kib, passes } => {
                text(memory_kib, passes, &rand::random(), &rand::random::<[u8; OUTPUT_LEN]>())
            }
        }
    }
}

/// One lane, as the PHC string format has it.
fn text(memory_kib: u32, passes: u32, salt: &[u8; SALTBYTES], output: &[u8]) -> String {
    let (salt, output) = (STANDARD_NO_PAD.encode(salt), STANDARD_NO_PAD.encode(output));
    format!("$argon2id$v=19$m={memory_kib},t={passes},p=1${salt}${output}")
}

fn argon2id(password: &Secret, salt: &[u8; SALTBYTES], memory_kib: u32, passes: u32) -> Result<Output, HashError> {
    let password = password.expose().as_bytes();
    let memory = usize::try_from(memory_kib).unwrap_or(usize::MAX).saturating_mul(1024);
    let bytes = crypto_pwhash::pwhash(OUTPUT_LEN, password, salt, passes.into(), memory, ALG_ARGON2ID13)?;
    Ok(Output::new(&bytes)?)
}

/// Checks against a hash of either scheme, told by its prefix.
pub(super) fn verify(password: &Secret, hash: &str) -> Result<bool, HashError> {
    if hash.starts_with("$2") {
        return Ok(bcrypt::non_truncating_verify(&*material(password), hash)?);
    }
    if !hash.starts_with("$argon2id$") {
        return Err(HashError::Unknown);
    }
    let parsed = PasswordHash::new(hash)?;
    let number = |name| parsed.params.get_decimal(name);
    let (Some(memory_kib), Some(passes), Some(1), Some(19), Some(salt), Some(expected)) =
        (number("m"), number("t"), number("p"), parsed.version, parsed.salt, parsed.hash)
    else {
        return Err(HashError::Unknown);
    };
    if parsed.params.iter().count() != 3 {
        return Err(HashError::Unknown);
    }
    if memory_kib > MAX_MEMORY_KIB || passes > MAX_PASSES {
        return Err(HashError::TooCostly);
    }
    // outputs are compared in constant time
    Ok(argon2id(password, &salt_bytes(salt)?, memory_kib, passes)? == expected)
}

/// As many as libsodium takes, and as we make.
fn salt_bytes(salt: Salt<'_>) -> Result<[u8; SALTBYTES], HashError> {
    let mut bytes = [0; Salt::MAX_LENGTH];
    let salt = salt.decode_b64(&mut bytes)?;
    salt.try_into().map_err(|_| HashError::Unknown)
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
