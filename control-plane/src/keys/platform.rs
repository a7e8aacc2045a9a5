//! Secrets that every replica shares, in `platform.secrets`, sealed with the KEK: the TLS identity of the node gateway, and
//! the pepper of API secrets and refresh tokens. The keys of tokens lie there too; see `token_keys`.
//!
//! Whichever replica starts first draws them: insert, on conflict do nothing, then read what is there.

use std::fmt;

use cvault_node_protocol::tls::{Identity, IdentityError};
use hmac::{Hmac, Mac};
use rand::CryptoRng;
use sha2::Sha256;
use sqlx::PgPool;
use zeroize::Zeroizing;

use super::{KeyError, KeyRing};

/// The installation's own secrets, in clear, in memory only.
pub struct PlatformSecrets {
    pub node_identity: Identity,
    pub pepper: Zeroizing<[u8; 32]>,
}

#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    #[error("the installation's secrets cannot be read")]
    Database(#[from] sqlx::Error),
    #[error(
        "the key-encryption key does not open the secrets of this database ({name}): give the key this database was \
         set up with, in CVAULT_KEK_FILE or API_ENCRYPTION_KEY"
    )]
    WrongKek { name: String, source: KeyError },
    #[error("the stored secret {name} is damaged")]
    Damaged { name: String },
    #[error("no TLS identity can be made")]
    Identity(#[from] IdentityError),
}

impl PlatformSecrets {
    /// Reads the secrets, after drawing those that do not exist yet.
    ///
    /// # Errors
    /// When the database does not answer, or the KEK is not the one they were sealed with.
    pub async fn load(sys: &PgPool, keys: &KeyRing, rng: &mut impl CryptoRng) -> Result<Self, SecretsError> {
        let mut pepper = Zeroizing::new([0; 32]);
        rng.fill_bytes(pepper.as_mut());
        let identity = Identity::generate()?;
        let pepper = drawn_once(sys, keys, "pepper", pepper.as_ref()).await?;
        let identity = drawn_once(sys, keys, "node_identity", identity.private_key()).await?;
        Ok(Self { node_identity: Identity::from_pkcs8(&identity)?, pepper: bytes32(&pepper, "pepper")? })
    }

    /// HMAC-SHA-256 of `text` under the pepper: how API secrets and refresh tokens are stored, and what a
    /// request with an `Idempotency-Key` was. `domain` keeps the uses
    /// apart.
    #[must_use]
    pub fn peppered(&self, domain: &str, text: &(impl AsRef<[u8]> + ?Sized)) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.pepper.as_ref()).expect("HMAC takes keys of any length");
        mac.update(domain.as_bytes());
        mac.update(&[0]);
        mac.update(text.as_ref());
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for PlatformSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlatformSecrets").field("node_identity", &self.node_identity).finish_non_exhaustive()
    }
}

async fn drawn_once(
    sys: &PgPool,
    keys: &KeyRing,
    name: &'static str,
    drawn: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SecretsError> {
    let aad = secret_aad(name);
    sqlx::query!(
        "insert into platform.secrets (name, kek_version, sealed) values ($1, $2, $3) on conflict do nothing",
        name,
        keys.version(),
        keys.wrap(&aad, drawn)
    )
    .execute(sys)
    .await?;
    let sealed =
        sqlx::query_scalar!("select sealed from platform.secrets where name = $1", name).fetch_one(sys).await?;
    keys.unwrap(&aad, &sealed).map_err(|source| SecretsError::WrongKek { name: name.to_owned(), source })
}

pub(super) fn secret_aad(name: &str) -> Vec<u8> {
    format!("platform.secrets:{name}").into_bytes()
}

/// The place of an answer kept for platform staff. Neither part holds a NUL.
pub(crate) fn kept_answer_aad(principal: &str, key: &str) -> Vec<u8> {
    format!("platform.idempotency_keys.response_sealed:{principal}\0{key}").into_bytes()
}

pub(super) fn bytes32(bytes: &[u8], name: &str) -> Result<Zeroizing<[u8; 32]>, SecretsError> {
    <[u8; 32]>::try_from(bytes).map(Zeroizing::new).map_err(|_| SecretsError::Damaged { name: name.to_owned() })
}
