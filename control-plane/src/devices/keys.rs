//! The keys of a device: its pair, made here or by the client, and a preshared key on request; sealed for the database.

use cvault_types::{DeviceId, TenantId};
use rand::CryptoRng;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::config::{ConfigKey, ConfigKeys};
use super::name::PublicKey;
use super::read::{preshared_key_aad, private_key_aad};
use crate::keys::{KeyError, KeyRing};

/// What a client says of a device's keys.
#[derive(Clone, Debug)]
pub struct KeyRequest {
    /// Made by the client; otherwise the platform makes the pair.
    pub public_key: Option<PublicKey>,
    pub preshared: bool,
}

/// Keys, open for the answer and sealed for the row.
pub(super) struct NewKeys {
    pub(super) public: PublicKey,
    pub(super) open: ConfigKeys,
    pub(super) private_sealed: Option<Vec<u8>>,
    pub(super) preshared_sealed: Option<Vec<u8>>,
    /// SHA-256, zeros without one: what the digest of a server's peers covers.
    pub(super) preshared_hash: [u8; 32],
}

impl KeyRequest {
    /// # Errors
    /// When the tenant's data key does not open.
    pub(super) fn make(
        self,
        tenant: TenantId,
        keys: &KeyRing,
        data_key: &[u8],
        device: DeviceId,
        rng: &mut impl CryptoRng,
    ) -> Result<NewKeys, KeyError> {
        let mut random = || {
            let mut bytes = Zeroizing::new([0; 32]);
            rng.fill_bytes(bytes.as_mut());
            bytes
        };
        let (public, private, private_sealed) = match self.public_key {
            Some(public) => (public, ConfigKey::OnlyAtTheClient, None),
            None => {
                let private = random();
                let secret = x25519_dalek::StaticSecret::from(*private);
                let public = PublicKey::from_bytes(x25519_dalek::PublicKey::from(&secret).to_bytes());
                let sealed = keys.seal(data_key, private_key_aad(tenant, device), private.as_ref())?;
                (public, ConfigKey::Known(private), Some(sealed))
            }
        };
        let preshared = self.preshared.then(random);
        let preshared_sealed = preshared
            .as_ref()
            .map(|key| keys.seal(data_key, preshared_key_aad(tenant, device), key.as_ref()))
            .transpose()?;
        let preshared_hash = preshared.as_ref().map_or([0; 32], |key| Sha256::digest(**key).into());
        let open = ConfigKeys { private, preshared };
        Ok(NewKeys { public, open, private_sealed, preshared_sealed, preshared_hash })
    }
}
