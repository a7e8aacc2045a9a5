//! AES-256-GCM envelopes. Layout of every sealed value: format (1 byte) ‖ nonce (12 bytes) ‖ ciphertext and tag.
//!
//! Nonces are random: with 2³² values under one key the chance of a repeat stays below 2⁻³² (NIST SP 800-38D §8.3), and
//! each tenant has its own key.

use std::fmt;

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use cvault_types::TenantId;
use rand::{CryptoRng, RngCore};
use uuid::Uuid;
use zeroize::Zeroizing;

const FORMAT: u8 = 1;
const NONCE_BYTES: usize = 12;

/// Where a sealed value lives; it opens nowhere else.
#[derive(Debug, Clone, Copy)]
pub struct Aad {
    pub table: &'static str,
    pub column: &'static str,
    pub tenant: TenantId,
    pub row: Uuid,
}

impl Aad {
    fn bytes(self) -> Vec<u8> {
        format!("{}.{}:{}:{}", self.table, self.column, self.tenant.uuid().simple(), self.row.simple()).into_bytes()
    }
}

/// A tenant's data key as the database keeps it.
#[derive(Clone)]
pub struct SealedDataKey {
    pub sealed: Vec<u8>,
    pub kek_version: i16,
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("a sealed value does not open: wrong key, wrong place, or damaged")]
    DoesNotOpen,
    #[error("a sealed value has a layout this version does not know")]
    Layout,
    #[error("no key-encryption key can be used")]
    NoKek,
    #[error("two key-encryption keys have one version")]
    TwoOfOneVersion,
}

/// The key-encryption keys of this process, by version; the highest one wraps new data keys.
#[derive(Clone)]
pub struct KeyRing {
    keks: Vec<Kek>,
}

#[derive(Clone)]
struct Kek {
    version: i16,
    key: Zeroizing<[u8; 32]>,
}

impl KeyRing {
    /// One key, version 1.
    #[must_use]
    pub fn single(key: Zeroizing<[u8; 32]>) -> Self {
        Self { keks: vec![Kek { version: 1, key }] }
    }

    /// Several keys, while data keys are being re-wrapped from an older to a newer one.
    ///
    /// # Errors
    /// [`KeyError::NoKek`] when there is none, [`KeyError::TwoOfOneVersion`].
    pub fn versions(keys: impl IntoIterator<Item = (i16, Zeroizing<[u8; 32]>)>) -> Result<Self, KeyError> {
        let mut keks: Vec<Kek> = keys.into_iter().map(|(version, key)| Kek { version, key }).collect();
        keks.sort_by_key(|kek| kek.version);
        if keks.windows(2).any(|two| two[0].version == two[1].version) {
            return Err(KeyError::TwoOfOneVersion);
        }
        if keks.is_empty() { Err(KeyError::NoKek) } else { Ok(Self { keks }) }
    }

    fn newest(&self) -> &Kek {
        self.keks.last().expect("a ring has at least one key")
    }

    /// Version of the key that wraps new values.
    #[must_use]
    pub fn version(&self) -> i16 {
        self.newest().version
    }

    /// The versions of all keys, ascending.
    pub fn known(&self) -> impl Iterator<Item = i16> {
        self.keks.iter().map(|kek| kek.version)
    }

    /// Wraps a tenant's data key with the newest key, whichever it is wrapped with now. What it seals stays as it is.
    ///
    /// # Errors
    /// When no key of the ring opens it, or it would not open afterwards.
    pub fn rewrap(&self, tenant: TenantId, sealed: &[u8]) -> Result<SealedDataKey, KeyError> {
        Ok(SealedDataKey { sealed: self.rewrap_at(&data_key_aad(tenant), sealed)?, kek_version: self.version() })
    }

    /// Whether a tenant's data key opens with any key of the ring.
    ///
    /// # Errors
    /// Why it does not.
    pub fn opens(&self, tenant: TenantId, sealed: &[u8]) -> Result<(), KeyError> {
        self.data_key(sealed, tenant).map(|_| ())
    }

    pub(super) fn rewrap_at(&self, aad: &[u8], sealed: &[u8]) -> Result<Vec<u8>, KeyError> {
        let plaintext = self.unwrap(aad, sealed)?;
        let rewrapped = self.wrap(aad, &plaintext);
        // the old wrapping is overwritten with this: it is looked at first
        let opened = decrypt(&self.newest().key, aad, &rewrapped)?;
        if *opened == *plaintext { Ok(rewrapped) } else { Err(KeyError::DoesNotOpen) }
    }

    /// Draws a data key for `tenant` and wraps it.
    #[must_use]
    pub fn new_data_key(&self, tenant: TenantId, rng: &mut impl CryptoRng) -> SealedDataKey {
        let mut key = Zeroizing::new([0; 32]);
        rng.fill_bytes(key.as_mut());
        SealedDataKey { sealed: self.wrap(&data_key_aad(tenant), key.as_ref()), kek_version: self.version() }
    }

    /// Seals `plaintext` with the tenant's data key.
    ///
    /// # Errors
    /// When the data key does not open.
    pub fn seal(&self, sealed_data_key: &[u8], aad: Aad, plaintext: &[u8]) -> Result<Vec<u8>, KeyError> {
        let key = self.data_key(sealed_data_key, aad.tenant)?;
        Ok(encrypt(&key, &aad.bytes(), plaintext))
    }

    /// Opens what [`KeyRing::seal`] made for the same place.
    ///
    /// # Errors
    /// When the key, the place or the bytes are not the same.
    pub fn open(&self, sealed_data_key: &[u8], aad: Aad, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let key = self.data_key(sealed_data_key, aad.tenant)?;
        decrypt(&key, &aad.bytes(), sealed)
    }

    /// Seals what belongs to the platform itself, at its place.
    #[must_use]
    pub(crate) fn wrap(&self, aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
        encrypt(&self.newest().key, aad, plaintext)
    }

    /// The version is not needed to open: the few keys of a ring are tried, newest first.
    pub(crate) fn unwrap(&self, aad: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let mut failure = KeyError::NoKek;
        for kek in self.keks.iter().rev() {
            match decrypt(&kek.key, aad, sealed) {
                Ok(plaintext) => return Ok(plaintext),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn data_key(&self, sealed: &[u8], tenant: TenantId) -> Result<Zeroizing<[u8; 32]>, KeyError> {
        let bytes = self.unwrap(&data_key_aad(tenant), sealed)?;
        let key: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| KeyError::Layout)?;
        Ok(Zeroizing::new(*key))
    }
}

fn data_key_aad(tenant: TenantId) -> Vec<u8> {
    Aad { table: "tenants", column: "data_key_sealed", tenant, row: tenant.uuid() }.bytes()
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keks.iter().map(|kek| kek.version)).finish()
    }
}

fn encrypt(key: &[u8; 32], aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
    let mut nonce = [0; NONCE_BYTES];
    rand::rng().fill_bytes(&mut nonce);
    let ciphertext = Aes256Gcm::new(key.into())
        .encrypt(&nonce.into(), Payload { msg: plaintext, aad })
        .expect("AES-GCM refuses only messages of 64 GiB and more");
    let mut sealed = Vec::with_capacity(1 + NONCE_BYTES + ciphertext.len());
    sealed.push(FORMAT);
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(&ciphertext);
    sealed
}

fn decrypt(key: &[u8; 32], aad: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let Some((&[FORMAT], rest)) = sealed.split_first_chunk::<1>() else { return Err(KeyError::Layout) };
    let Some((nonce, ciphertext)) = rest.split_first_chunk::<NONCE_BYTES>() else { return Err(KeyError::Layout) };
    Aes256Gcm::new(key.into())
        .decrypt(nonce.into(), Payload { msg: ciphertext, aad })
        .map(Zeroizing::new)
        .map_err(|_| KeyError::DoesNotOpen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(byte: u8) -> KeyRing {
        KeyRing::single(Zeroizing::new([byte; 32]))
    }

    fn place(tenant: u128, row: u128) -> Aad {
        Aad {
            table: "devices",
            column: "private_key_sealed",
            tenant: TenantId::from_uuid(Uuid::from_u128(tenant)),
            row: Uuid::from_u128(row),
        }
    }

    #[test]
    fn a_sealed_value_opens_in_its_own_place_only() {
        let ring = ring(1);
        let key = ring.new_data_key(place(1, 1).tenant, &mut rand::rng());
        let sealed = ring.seal(&key.sealed, place(1, 1), b"secret").unwrap();
        assert_eq!(ring.open(&key.sealed, place(1, 1), &sealed).unwrap().as_slice(), b"secret");
        assert!(ring.open(&key.sealed, place(1, 2), &sealed).is_err(), "another row");
        assert!(ring.open(&key.sealed, place(2, 1), &sealed).is_err(), "another tenant");
        let other = ring.new_data_key(place(1, 1).tenant, &mut rand::rng());
        assert!(ring.open(&other.sealed, place(1, 1), &sealed).is_err(), "another data key");
    }

    #[test]
    fn a_damaged_or_cut_value_is_refused() {
        let ring = ring(1);
        let key = ring.new_data_key(place(1, 1).tenant, &mut rand::rng());
        let sealed = ring.seal(&key.sealed, place(1, 1), b"secret").unwrap();
        for length in 0..sealed.len() {
            assert!(ring.open(&key.sealed, place(1, 1), &sealed[..length]).is_err());
        }
        for index in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[index] ^= 1;
            assert!(ring.open(&key.sealed, place(1, 1), &damaged).is_err(), "byte {index}");
        }
    }

    #[test]
    fn a_new_kek_still_opens_what_the_old_one_wrapped() {
        let old = ring(1);
        let key = old.new_data_key(place(1, 1).tenant, &mut rand::rng());
        let both = KeyRing::versions([(2, Zeroizing::new([2; 32])), (1, Zeroizing::new([1; 32]))]).unwrap();
        assert!(both.seal(&key.sealed, place(1, 1), b"x").is_ok());
        assert_eq!(both.new_data_key(place(1, 1).tenant, &mut rand::rng()).kek_version, 2);
        assert!(ring(2).seal(&key.sealed, place(1, 1), b"x").is_err());
    }

    #[test]
    fn debug_output_shows_versions_only() {
        assert_eq!(format!("{:?}", ring(7)), "[1]");
    }
}
