//! Keys in the forms that tools and sockets want.

use std::io::Read;

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::x25519::{PublicKey, StaticSecret};

#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    pub private: String,
    pub private_hex: String,
    pub public: String,
    pub public_hex: String,
}

impl Keys {
    /// As `wg genkey` makes them: the bits that are not used are set (RFC 7748, section 5).
    pub fn random() -> Result<Self> {
        let mut secret: [u8; 32] = random()?;
        secret[0] &= 0xf8;
        secret[31] = secret[31] & 0x7f | 0x40;
        Ok(Self::of(&StaticSecret::from(secret)))
    }

    #[must_use]
    pub fn of(secret: &StaticSecret) -> Self {
        let public = PublicKey::from(secret);
        Self {
            private: STANDARD.encode(secret.as_bytes()),
            private_hex: hex::encode(secret.as_bytes()),
            public: STANDARD.encode(public.as_bytes()),
            public_hex: hex::encode(public.as_bytes()),
        }
    }

    #[must_use]
    pub fn public_bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        hex::decode_to_slice(&self.public_hex, &mut bytes).expect("made from 32 bytes");
        bytes
    }
}

/// A preshared key as configuration files have it.
pub fn preshared_key() -> Result<String> {
    Ok(STANDARD.encode(random()?))
}

fn random() -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
