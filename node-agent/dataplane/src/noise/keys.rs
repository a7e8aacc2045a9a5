//! X25519, by the fastest code this processor can run.
//!
//! graviola's is half the time of x25519-dalek's (s2n-bignum's proven assembly), and most of a handshake is X25519; it
//! needs instructions that processors have had since 2014, so the other stays for those that have not.

use graviola::key_agreement::x25519::{PublicKey, StaticPrivateKey};
use rand::TryRngCore;
use rand::rngs::OsRng;
use zeroize::{Zeroize, ZeroizeOnDrop};

#[cfg(target_arch = "x86_64")]
use super::lanes;

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

/// [`agree`] for each pair of a private and a public key; where the processor can, four at a time, which takes some three
/// quarters of the time.
pub(super) fn agree_all(pairs: &[(&[u8; 32], &[u8; 32])]) -> Vec<Option<Shared>> {
    // Without growing: what it moves out of is not wiped.
    let mut all = Vec::with_capacity(pairs.len());
    let (fours, rest) = pairs.as_chunks();
    for four in fours {
        all.extend(agree_in_lanes(four).unwrap_or_else(|| four.map(|(private, public)| agree(private, public))));
    }
    all.extend(rest.iter().map(|(private, public)| agree(private, public)));
    all
}

#[cfg(target_arch = "x86_64")]
fn agree_in_lanes(pairs: &[(&[u8; 32], &[u8; 32]); 4]) -> Option<[Option<Shared>; 4]> {
    use subtle::ConstantTimeEq;
    let products = lanes::multiply(pairs.map(|(private, _)| private), pairs.map(|(_, public)| public))?;
    Some(products.each_ref().map(|product| (!bool::from(product.ct_eq(&[0; 32]))).then(|| Shared(*product))))
}

#[cfg(not(target_arch = "x86_64"))]
fn agree_in_lanes(_: &[(&[u8; 32], &[u8; 32]); 4]) -> Option<[Option<Shared>; 4]> {
    None
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

        let scalar = bytes("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4");
        let point = bytes("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c");
        let product = bytes("c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552");
        let (one, other) = ((&bob, &alice), (&scalar, &point));
        let four = agree_all(&[one, other, other, one]);
        let said: Vec<_> = four.iter().flatten().map(|shared| shared.0).collect();
        assert_eq!(said, [shared, product, product, shared]);
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

    /// RFC 7748, section 5.2: what was said last is the next key, and the key before it the next point.
    #[test]
    fn a_thousand_of_rfc_7748_one_after_another() {
        let nine = std::array::from_fn(|at| if at == 0 { 9 } else { 0 });
        let (mut key, mut point) = (nine, nine);
        for _ in 0..1000 {
            let four: Vec<_> = agree_all(&[(&key, &point); 4]).iter().flatten().map(|shared| shared.0).collect();
            assert_eq!(four, [four[0]; 4]);
            (key, point) = (four[0], key);
        }
        assert_eq!(hex::encode(key), "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51");
    }

    /// Beside zero, one and the prime: those around the prime and its double, and the two others of small order.
    #[test]
    fn points_at_the_edges() {
        let low = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800";
        let other_low = "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157";
        let mut points: Vec<[u8; 32]> =
            [low, other_low].iter().map(|text| hex::decode(text).unwrap().try_into().unwrap()).collect();
        for last in [0x7f, 0xff] {
            for first in 0xe0..=0xff {
                let mut point = [0xff; 32];
                (point[0], point[31]) = (first, last);
                points.push(point);
            }
        }
        points.extend((0..40).map(|first| std::array::from_fn(|at| if at == 0 { first } else { 0 })));
        let private = [0x5a; 32];
        // All of them in lanes.
        points.resize(points.len().next_multiple_of(4), [9; 32]);
        let pairs: Vec<_> = points.iter().map(|point| (&private, point)).collect();
        for (point, shared) in points.iter().zip(agree_all(&pairs)) {
            let shared = shared.map(|shared| shared.0);
            for other in [agree_portably(&private, point), agree(&private, point)] {
                assert_eq!(shared, other.map(|other| other.0), "{}", hex::encode(point));
            }
        }
    }

    proptest! {
        #[test]
        fn many_are_as_each_by_itself(pairs: Vec<([u8; 32], [u8; 32])>) {
            let shared = agree_all(&pairs.iter().map(|(private, public)| (private, public)).collect::<Vec<_>>());
            let said: Vec<_> = shared.into_iter().map(|shared| shared.map(|shared| shared.0)).collect();
            let portable = pairs.iter().map(|(private, public)| agree_portably(private, public));
            prop_assert_eq!(said, portable.map(|shared| shared.map(|shared| shared.0)).collect::<Vec<_>>());
        }

        #[test]
        fn both_say_the_same(private: [u8; 32], other: [u8; 32]) {
            let portable = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(private)).to_bytes();
            prop_assert_eq!(public(&private), portable);
            let (one, two) = (agree(&private, &other), agree_portably(&private, &other));
            prop_assert_eq!(one.map(|shared| shared.0), two.map(|shared| shared.0));
        }
    }
}
