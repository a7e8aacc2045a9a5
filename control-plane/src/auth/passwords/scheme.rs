//! The two schemes, and the texts they are stored as.

use argon2::password_hash::{self, PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use cvault_types::Secret;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// How new hashes are made. Passwords of either scheme are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// The bcrypt hash of 32 random bytes nobody kept.
const NOBODY: &str = "49o4uvkpZ3rDrQbwWLaxxuI5LRxY2ooe8uC87Tg400ajLdXM0.Y.K";

#[derive(Debug, thiserror::Error)]
pub enum HashError {
    #[error("bcrypt failed")]
    Bcrypt(#[from] bcrypt::BcryptError),
    #[error("Argon2id failed: {0}")]
    Argon2(password_hash::Error),
    #[error("the stored hash is of no scheme we know")]
    Unknown,
    #[error("the stored hash asks for more than may be configured")]
    TooCostly,
}

impl From<password_hash::Error> for HashError {
    fn from(error: password_hash::Error) -> Self {
        Self::Argon2(error)
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
            Self::Argon2id { .. } => {
                Ok(self.argon2().hash_password(password.expose().as_bytes(), &salt()?)?.to_string())
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
            Self::Argon2id { memory_kib, passes } => format!(
                "$argon2id$v=19$m={memory_kib},t={passes},p=1${}${}",
                STANDARD_NO_PAD.encode(rand::random::<[u8; 16]>()),
                STANDARD_NO_PAD.encode(rand::random::<[u8; 32]>())
            ),
        }
    }

    fn argon2(self) -> Argon2<'static> {
        let (memory, passes) = match self {
            Self::Argon2id { memory_kib, passes } => (memory_kib, passes),
            Self::Bcrypt { .. } => (Params::DEFAULT_M_COST, Params::DEFAULT_T_COST),
        };
        let params = Params::new(memory, passes, 1, None).expect("the configuration has checked the bounds");
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
    }
}

/// 128 bits (RFC 9106 §3.1).
fn salt() -> Result<SaltString, password_hash::Error> {
    SaltString::encode_b64(&rand::random::<[u8; 16]>())
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
    let params = Params::try_from(&parsed)?;
    if params.m_cost() > MAX_MEMORY_KIB || params.t_cost() > MAX_PASSES || params.p_cost() != 1 {
        return Err(HashError::TooCostly);
    }
    match Argon2::default().verify_password(password.expose().as_bytes(), &parsed) {
        Ok(()) => Ok(true),
        Err(password_hash::Error::Password) => Ok(false),
        Err(error) => Err(error.into()),
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
