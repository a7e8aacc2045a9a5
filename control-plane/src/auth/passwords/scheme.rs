//! The two schemes, and the texts they are stored as.

use std::cell::RefCell;

use argon2::password_hash::{self, Output, ParamsString, PasswordHash, SaltString};
use argon2::{ARGON2ID_IDENT, Algorithm, Argon2, Block, Params, Version};
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
            Self::Argon2id { memory_kib, passes } => {
                let params = Params::new(memory_kib, passes, 1, None).map_err(password_hash::Error::from)?;
                let salt = SaltString::encode_b64(&rand::random::<[u8; 16]>())?;
                let output = argon2id(password, &salt, &params)?;
                let text = PasswordHash {
                    algorithm: ARGON2ID_IDENT,
                    version: Some(Version::V0x13.into()),
                    params: ParamsString::try_from(&params)?,
                    salt: Some(salt.as_salt()),
                    hash: Some(output),
                };
                Ok(text.to_string())
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
}

thread_local! {
    /// The threads of the pool last as long as the process: each keeps its memory, as much as its largest hash needed, and the
    /// allocator has no part in it.
    static MEMORY: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

/// Always of 32 bytes (RFC 9106 §3.1).
fn argon2id(password: &Secret, salt: &SaltString, params: &Params) -> Result<Output, password_hash::Error> {
    let mut bytes = [0; Params::DEFAULT_OUTPUT_LEN];
    let mut salt_bytes = [0; 64];
    let salt_bytes = salt.decode_b64(&mut salt_bytes)?;
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params.clone());
    MEMORY.with_borrow_mut(|memory| {
        let blocks = params.block_count();
        if memory.len() < blocks {
            *memory = vec![Block::default(); blocks];
        }
        argon2.hash_password_into_with_memory(
            password.expose().as_bytes(),
            salt_bytes,
            &mut bytes,
            &mut memory[..blocks],
        )
    })?;
    Output::new(&bytes)
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
    let (Some(salt), Some(expected), Some(19)) = (parsed.salt, parsed.hash, parsed.version) else {
        return Err(HashError::Unknown);
    };
    let salt = SaltString::from_b64(salt.as_str())?;
    // outputs are compared in constant time
    Ok(argon2id(password, &salt, &params)? == expected)
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
