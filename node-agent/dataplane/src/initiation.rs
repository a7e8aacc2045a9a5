//! Opening a handshake initiation: who sent it, and the timestamp that tells a new one from a replay.
//!
//! boringtun keeps the greatest timestamp inside a tunnel and forgets it with the tunnel (trap 15), so it is read here,
//! before there is one. Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s as in the WireGuard paper, 5.4.2, the responder's half up
//! to the timestamp. The rest of the handshake is boringtun's.

use blake2::digest::{FixedOutput, Update};
use blake2::{Blake2s256, Digest};
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit};
use hmac::{Mac, SimpleHmac};
use x25519_dalek::{PublicKey, SharedSecret, StaticSecret};

const CONSTRUCTION: &[u8] = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const IDENTIFIER: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Length of an initiation.
pub(crate) const INITIATION_BYTES: usize = 148;
const TAG_BYTES: usize = 16;
/// TAI64 counts from here to 1970 (and ten leap seconds).
const TAI64_1970: u64 = 1 << 62;

/// Opens what is addressed to one key pair.
pub(crate) struct Opener {
    private: StaticSecret,
    /// Of the construction alone, and of everything known before the message.
    chaining_key: [u8; 32],
    hash: [u8; 32],
}

/// An initiation whose static key was decrypted. Anybody can write any public key there: only a timestamp that decrypts
/// proves it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) public_key: [u8; 32],
    chaining_key: [u8; 32],
    hash: [u8; 32],
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opened(..)")
    }
}

impl Opener {
    pub(crate) fn new(private: StaticSecret, public: &PublicKey) -> Self {
        let chaining_key = hash(CONSTRUCTION, &[]);
        Self { private, chaining_key, hash: hash(&hash(&chaining_key, IDENTIFIER), public.as_bytes()) }
    }

    /// Costs one X25519. The MACs are the caller's business.
    pub(crate) fn open(&self, initiation: &[u8]) -> Option<Opened> {
        let initiation: &[u8; INITIATION_BYTES] = initiation.try_into().ok()?;
        let ephemeral: [u8; 32] = initiation[8..40].try_into().ok()?;
        let sealed = &initiation[40..88];
        let hash_before = hash(&self.hash, &ephemeral);
        let [chaining_key] = derive(&self.chaining_key, &ephemeral);
        let shared = self.private.diffie_hellman(&PublicKey::from(ephemeral));
        if !shared.was_contributory() {
            return None;
        }
        let [chaining_key, key] = derive(&chaining_key, shared.as_bytes());
        let public_key = unseal(&key, sealed, &hash_before)?;
        Some(Opened { public_key, chaining_key, hash: hash(&hash_before, sealed) })
    }

    /// The secret shared with another static key. Costs one X25519: it is worth keeping.
    pub(crate) fn shared_with(&self, public_key: &[u8; 32]) -> SharedSecret {
        self.private.diffie_hellman(&PublicKey::from(*public_key))
    }
}

impl Opened {
    /// The timestamp, if the sender has the private key of `public_key`. `shared` is that with `public_key`.
    pub(crate) fn timestamp(&self, shared: &SharedSecret, initiation: &[u8]) -> Option<Timestamp> {
        if !shared.was_contributory() {
            return None;
        }
        let [_, key] = derive(&self.chaining_key, shared.as_bytes());
        unseal(&key, initiation.get(88..116)?, &self.hash).map(Timestamp::of)
    }
}

/// A TAI64N timestamp in 64 bits that keep its order: 34 of seconds since 1970 (enough until 2514), 30 of nanoseconds.
/// What lies beyond is as the end of the range. 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Timestamp(pub(crate) u64);

impl Timestamp {
    fn of(tai64n: [u8; 12]) -> Self {
        const MAX_SECONDS: u64 = (1 << 34) - 1;
        const MAX_NANOS: u64 = (1 << 30) - 1;
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3] = tai64n;
        let seconds = u64::from_be_bytes([s0, s1, s2, s3, s4, s5, s6, s7]).checked_sub(TAI64_1970);
        let nanos = u64::from(u32::from_be_bytes([n0, n1, n2, n3])).min(MAX_NANOS);
        match seconds {
            None => Self(0),
            Some(seconds) if seconds > MAX_SECONDS => Self(u64::MAX),
            Some(seconds) => Self(seconds << 30 | nanos),
        }
    }

    /// Whether an initiation with this timestamp may follow one with `greatest`. Whoever counts beyond the range is not
    /// locked out: only the tunnel's own guard tells its messages apart.
    pub(crate) fn may_follow(self, greatest: Self) -> bool {
        greatest == Self(0) || self > greatest || self == Self(u64::MAX)
    }
}

fn hash(data1: &[u8], data2: &[u8]) -> [u8; 32] {
    Blake2s256::new().chain(data1).chain(data2).finalize_fixed().into()
}

fn mac(key: &[u8; 32], parts: [&[u8]; 2]) -> [u8; 32] {
    let mut mac = <SimpleHmac<Blake2s256> as Mac>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        Mac::update(&mut mac, part);
    }
    mac.finalize().into_bytes().into()
}

/// `KDF_N` of the paper.
fn derive<const N: usize>(key: &[u8; 32], input: &[u8]) -> [[u8; 32]; N] {
    let secret = mac(key, [input, &[]]);
    let mut last: &[u8] = &[];
    let mut outputs = [[0; 32]; N];
    for (number, output) in (1_u8..).zip(&mut outputs) {
        *output = mac(&secret, [last, &[number]]);
        last = output;
    }
    outputs
}

/// Opens a message of `N` bytes under a key that is used once.
fn unseal<const N: usize>(key: &[u8; 32], sealed: &[u8], hash: &[u8; 32]) -> Option<[u8; N]> {
    let (text, tag) = sealed.split_at_checked(sealed.len().checked_sub(TAG_BYTES)?)?;
    let tag: [u8; TAG_BYTES] = tag.try_into().ok()?;
    let mut opened: [u8; N] = text.try_into().ok()?;
    let cipher = ChaCha20Poly1305::new(key.into());
    cipher.decrypt_in_place_detached(&[0; 12].into(), hash, &mut opened, &tag.into()).ok()?;
    Some(opened)
}

#[cfg(test)]
mod tests {
    use boringtun::noise::{Tunn, TunnResult};
    use proptest::prelude::*;

    use super::*;

    fn pair(key: u8) -> (StaticSecret, PublicKey) {
        let private = StaticSecret::from([key; 32]);
        let public = PublicKey::from(&private);
        (private, public)
    }

    fn initiation() -> Vec<u8> {
        let mut tunn = Tunn::new(pair(2).0, pair(1).1, None, None, 7, None);
        let mut room = [0; INITIATION_BYTES];
        match tunn.format_handshake_initiation(&mut room, false) {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {
                panic!("no initiation")
            }
        }
    }

    fn opener(key: u8) -> Opener {
        let (private, public) = pair(key);
        Opener::new(private, &public)
    }

    #[test]
    fn what_boringtun_sends_is_opened_to_key_and_time() {
        let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let initiation = initiation();
        let opener = opener(1);
        let opened = opener.open(&initiation).unwrap();
        assert_eq!(opened.public_key, pair(2).1.to_bytes());
        let shared = opener.shared_with(&opened.public_key);
        let seconds = opened.timestamp(&shared, &initiation).unwrap().0 >> 30;
        assert!((before..before + 100).contains(&seconds), "{seconds} is now, give or take the leap seconds");
    }

    #[test]
    fn nothing_else_is_opened() {
        let initiation = initiation();
        assert!(opener(3).open(&initiation).is_none(), "another server");
        assert!(opener(1).open(&initiation[..147]).is_none());
        let opened = opener(1).open(&initiation).unwrap();
        let somebody = opener(1).shared_with(&pair(4).1.to_bytes());
        assert!(opened.timestamp(&somebody, &initiation).is_none(), "the claim is not proved");
        let shared = opener(1).shared_with(&opened.public_key);
        for at in 8..116 {
            let mut changed = initiation.clone();
            changed[at] ^= 1;
            let time = opener(1).open(&changed).and_then(|opened| opened.timestamp(&shared, &changed));
            assert!(time.is_none(), "byte {at}");
        }
    }

    #[test]
    fn an_ephemeral_key_of_small_order_is_refused() {
        let mut initiation = initiation();
        initiation[8..40].fill(0);
        assert!(opener(1).open(&initiation).is_none());
        let opened = opener(1).open(&self::initiation()).unwrap();
        assert!(opened.timestamp(&opener(1).shared_with(&[0; 32]), &initiation).is_none());
    }

    fn tai64n(seconds: u64, nanos: u32) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&seconds.to_be_bytes());
        bytes[8..].copy_from_slice(&nanos.to_be_bytes());
        bytes
    }

    #[test]
    fn beyond_the_range_nobody_is_locked_out() {
        let (early, late) = (Timestamp::of(tai64n(0, 5)), Timestamp::of([0xff; 12]));
        let now = Timestamp::of(tai64n(TAI64_1970 + 1_800_000_000, 1));
        assert!(early.may_follow(Timestamp(0)) && !early.may_follow(now));
        assert!(late.may_follow(now) && late.may_follow(late));
        assert!(!now.may_follow(now) && !now.may_follow(late));
    }

    proptest! {
        #[test]
        fn packing_keeps_the_order(
            a in 0_u64..1 << 34, b in 0_u64..1 << 34, n in 0_u32..1_000_000_000, m in 0_u32..1_000_000_000,
        ) {
            let (one, other) = (tai64n(TAI64_1970 + a, n), tai64n(TAI64_1970 + b, m));
            prop_assert_eq!(Timestamp::of(one).cmp(&Timestamp::of(other)), one.cmp(&other));
            prop_assert_eq!(Timestamp::of(tai64n(TAI64_1970 + a, n)).cmp(&Timestamp::of(tai64n(TAI64_1970 + a, m))), n.cmp(&m));
        }
    }
}
