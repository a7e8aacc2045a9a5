//! Secrets that every replica shares, in `platform.secrets`, sealed with the KEK: the Ed25519 key that signs tokens, the
//! TLS identity of the node gateway, and the pepper of API secrets and refresh tokens.
//!
//! Whichever replica starts first draws them: insert, on conflict do nothing, then read what is there.

use std::fmt;

use cvault_node_protocol::tls::{Identity, IdentityError};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePrivateKey;
use hmac::{Hmac, Mac};
use rand::CryptoRng;
use sha2::{Digest, Sha256};
use sqlx::PgPool;
use zeroize::Zeroizing;

use super::{KeyError, KeyRing};

/// The installation's own secrets, in clear, in memory only.
pub struct PlatformSecrets {
    pub node_identity: Identity,
    pub token_key: TokenKey,
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
    WrongKek { name: &'static str, source: KeyError },
    #[error("the stored secret {name} is damaged")]
    Damaged { name: &'static str },
    #[error("no TLS identity can be made")]
    Identity(#[from] IdentityError),
}

impl PlatformSecrets {
    /// Reads the secrets, after drawing those that do not exist yet.
    ///
    /// # Errors
    /// When the database does not answer, or the KEK is not the one they were sealed with.
    pub async fn load(sys: &PgPool, keys: &KeyRing, rng: &mut impl CryptoRng) -> Result<Self, SecretsError> {
        let mut token_key = Zeroizing::new([0; 32]);
        rng.fill_bytes(token_key.as_mut());
        let mut pepper = Zeroizing::new([0; 32]);
        rng.fill_bytes(pepper.as_mut());
        let identity = Identity::generate()?;
        let token_key = drawn_once(sys, keys, "token_key", token_key.as_ref()).await?;
        let pepper = drawn_once(sys, keys, "pepper", pepper.as_ref()).await?;
        let identity = drawn_once(sys, keys, "node_identity", identity.private_key()).await?;
        Ok(Self {
            node_identity: Identity::from_pkcs8(&identity)?,
            token_key: TokenKey::from_seed(&*bytes32(&token_key, "token_key")?),
            pepper: bytes32(&pepper, "pepper")?,
        })
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
    keys.unwrap(&aad, &sealed).map_err(|source| SecretsError::WrongKek { name, source })
}

pub(super) fn secret_aad(name: &str) -> Vec<u8> {
    format!("platform.secrets:{name}").into_bytes()
}

/// The place of an answer kept for platform staff. Neither part holds a NUL.
pub(crate) fn kept_answer_aad(principal: &str, key: &str) -> Vec<u8> {
    format!("platform.idempotency_keys.response_sealed:{principal}\0{key}").into_bytes()
}

fn bytes32(bytes: &[u8], name: &'static str) -> Result<Zeroizing<[u8; 32]>, SecretsError> {
    <[u8; 32]>::try_from(bytes).map(Zeroizing::new).map_err(|_| SecretsError::Damaged { name })
}

/// The Ed25519 key that signs user and admin tokens. `Debug` shows the key id only.
pub struct TokenKey {
    kid: String,
    public: [u8; 32],
    encoding: jsonwebtoken::EncodingKey,
    decoding: jsonwebtoken::DecodingKey,
}

impl TokenKey {
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let key = SigningKey::from_bytes(seed);
        let public = key.verifying_key().to_bytes();
        let der = key.to_pkcs8_der().expect("an Ed25519 key has a PKCS#8 form");
        Self {
            kid: hex::encode(&Sha256::digest(public)[..8]),
            public,
            encoding: jsonwebtoken::EncodingKey::from_ed_der(der.as_bytes()),
            decoding: jsonwebtoken::DecodingKey::from_ed_der(&public),
        }
    }

    /// Names this key in token headers and in the JWKS.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    #[must_use]
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }

    pub(crate) fn encoding(&self) -> &jsonwebtoken::EncodingKey {
        &self.encoding
    }

    pub(crate) fn decoding(&self) -> &jsonwebtoken::DecodingKey {
        &self.decoding
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").field("kid", &self.kid).finish_non_exhaustive()
    }
}
