//! X25519, by the fastest code this processor can run.
//!
//! graviola's is half the time of x25519-dalek's (s2n-bignum's proven assembly), and most of a handshake is X25519; it
//! needs instructions that processors have had since 2014, so the other stays for those that have not.

use graviola::key_agreement::x25519::{PublicKey, StaticPrivateKey};
use rand::TryRngCore;
use rand::rngs::OsRng;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// What two keys share. Never all zeroes.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub(crate) struct Shared([u8; 32]);

impl Shared {
    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// The public key of a private one.
pub(super) fn public(private: &[u8; 32]) -> [u8; 32] {
    if is_fast() {
        StaticPrivateKey::from_array(private).public_key().as_bytes()
    } else {
        x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(*private)).to_bytes()
    }
}

/// `None`: the public key is of small order, and what is "shared" would be known to everybody.
pub(super) fn agree(private: &[u8; 32], public: &[u8; 32]) -> Option<Shared> {
    if is_fast() {
        let shared = StaticPrivateKey::from_array(private).diffie_hellman(&PublicKey::from_array(public)).ok()?;
        Some(Shared(shared.0))
    } else {
        agree_portably(private, public)
    }
}

fn agree_portably(private: &[u8; 32], public: &[u8; 32]) -> Option<Shared> {
    let private = x25519_dalek::StaticSecret::from(*private);
    let shared = private.diffie_hellman(&x25519_dalek::PublicKey::from(*public));
    shared.was_contributory().then(|| Shared(shared.to_bytes()))
}

/// Of the operating system.
pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    OsRng.try_fill_bytes(&mut bytes).expect("a kernel that runs WireGuard has random numbers");
    bytes
}

/// What graviola demands of a processor.
fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected;
        is_x86_feature_detected!("aes")
            && is_x86_feature_detected!("ssse3")
            && is_x86_feature_detected!("avx")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("adx")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("pclmulqdq")
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected;
        is_aarch64_feature_detected!("aes")
            && is_aarch64_feature_detected!("sha2")
            && is_aarch64_feature_detected!("pmull")
            && is_aarch64_feature_detected!("neon")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_vectors_of_rfc_7748() {
        let bytes = |text: &str| -> [u8; 32] { hex::decode(text).unwrap().try_into().unwrap() };
        let (alice, bob) = (
            bytes("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"),
            bytes("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"),
        );
        assert_eq!(public(&bob), bytes("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"));
        let shared = bytes("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742");
        assert_eq!(agree(&bob, &alice).unwrap().0, shared);
    }

    #[test]
    fn keys_of_small_order_share_nothing() {
        for low in [[0; 32], {
            let mut one = [0; 32];
            one[0] = 1;
            one
        }] {
            assert!(agree(&[7; 32], &low).is_none() && agree_portably(&[7; 32], &low).is_none());
        }
    }

    proptest! {
        #[test]
        fn both_say_the_same(private: [u8; 32], other: [u8; 32]) {
            let portable = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(private)).to_bytes();
            prop_assert_eq!(public(&private), portable);
            let (one, two) = (agree(&private, &other), agree_portably(&private, &other));
            prop_assert_eq!(one.map(|shared| shared.0), two.map(|shared| shared.0));
        }
    }
}
