//! MAC1, MAC2 and cookies: who may cost us an X25519.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{KeyInit, XChaCha20Poly1305};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::keys::random;
use super::symmetric::{TAG_BYTES, hash, keyed};

/// MAC1 and MAC2 at the end of a handshake message.
pub(crate) const MACS_BYTES: usize = 32;
/// Length of a cookie reply.
pub(crate) const COOKIE_REPLY_BYTES: usize = 64;
/// A cookie is good for the period it was made in and for the next.
const PERIOD_MS: u64 = 60_000;
/// How long an initiator uses a cookie: `COOKIE_EXPIRATION_TIME` less the way here.
const KEPT_MS: u64 = 115_000;

/// What a message proves before any public-key work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    Nothing,
    /// MAC1: the sender knows our public key.
    Key,
    /// MAC2 too: the sender receives what is sent to its address.
    Address,
}

/// The responder's side.
pub(crate) struct Warden {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    seed: Seed,
}

/// What cookies are made of. Those that share one believe each other's.
#[derive(Clone)]
pub(crate) struct Seed(Arc<Zeroizing<[u8; 32]>>);

impl Seed {
    pub(crate) fn random() -> Self {
        Self(Arc::new(Zeroizing::new(random())))
    }
}

impl Warden {
    pub(crate) fn new(public: &[u8; 32], seed: Seed) -> Self {
        Self { mac1_key: mac1_key(public), cookie_key: cookie_key(public), seed }
    }

    pub(crate) fn check(&self, now_ms: u64, source: SocketAddr, message: &[u8]) -> Proof {
        let Some((body, [mac1, mac2])) = split(message) else {
            return Proof::Nothing;
        };
        if !bool::from(keyed(&self.mac1_key, body).ct_eq(mac1)) {
            return Proof::Nothing;
        }
        let signed = &message[..message.len() - 16];
        let period = now_ms / PERIOD_MS;
        let proves = |period| bool::from(keyed(&self.cookie(period, source), signed).ct_eq(mac2));
        let has_mac2 = mac2.iter().any(|byte| *byte != 0);
        if has_mac2 && (proves(period) || period.checked_sub(1).is_some_and(proves)) {
            Proof::Address
        } else {
            Proof::Key
        }
    }

    /// Writes a cookie reply to a message that proved the key.
    pub(crate) fn reply(&self, now_ms: u64, source: SocketAddr, message: &[u8], room: &mut [u8]) -> Option<usize> {
        let (_, [mac1, _]) = split(message)?;
        let room = room.first_chunk_mut::<COOKIE_REPLY_BYTES>()?;
        let nonce: [u8; 24] = random();
        room[..4].copy_from_slice(&3_u32.to_le_bytes());
        room[4..8].copy_from_slice(&message[4..8]);
        room[8..32].copy_from_slice(&nonce);
        let mut cookie = self.cookie(now_ms / PERIOD_MS, source);
        let cipher = XChaCha20Poly1305::new(&self.cookie_key.into());
        let tag = cipher.encrypt_in_place_detached(&nonce.into(), mac1, &mut cookie).ok()?;
        room[32..48].copy_from_slice(&cookie);
        room[48..].copy_from_slice(&tag);
        Some(COOKIE_REPLY_BYTES)
    }

    /// For address and port: many share an address.
    fn cookie(&self, period: u64, source: SocketAddr) -> [u8; 16] {
        let secret = hash(&**self.seed.0, &period.to_le_bytes());
        let mut bytes = [0; 18];
        match source.ip() {
            IpAddr::V4(addr) => bytes[..4].copy_from_slice(&addr.octets()),
            IpAddr::V6(addr) => bytes[..16].copy_from_slice(&addr.octets()),
        }
        bytes[16..].copy_from_slice(&source.port().to_be_bytes());
        keyed(&secret, &bytes)
    }
}

/// The sender's side: what it signs its messages to one peer with.
pub(crate) struct Jar {
    mac1_key: [u8; 32],
    /// Whose cookies: their key is made when there is one.
    peer: [u8; 32],
    last_mac1: Option<[u8; 16]>,
    cookie: Option<([u8; 16], u64)>,
}

impl Jar {
    pub(crate) fn new(peer: &[u8; 32]) -> Self {
        Self { mac1_key: mac1_key(peer), peer: *peer, last_mac1: None, cookie: None }
    }

    /// Fills in the MACs of a message.
    pub(crate) fn sign(&mut self, now_ms: u64, message: &mut [u8]) {
        let mac1_at = message.len() - MACS_BYTES;
        let mac2_at = message.len() - 16;
        let mac1 = keyed(&self.mac1_key, &message[..mac1_at]);
        message[mac1_at..mac2_at].copy_from_slice(&mac1);
        self.last_mac1 = Some(mac1);
        let cookie = self.cookie.filter(|(_, since)| now_ms.saturating_sub(*since) < KEPT_MS);
        let mac2 = cookie.map_or([0; 16], |(cookie, _)| keyed(&cookie, &message[..mac2_at]));
        message[mac2_at..].copy_from_slice(&mac2);
    }

    /// Keeps the cookie of a reply to the last message; `false`: it is none.
    pub(crate) fn take(&mut self, now_ms: u64, reply: &[u8]) -> bool {
        let (Some(mac1), Ok(reply)) = (self.last_mac1, <&[u8; COOKIE_REPLY_BYTES]>::try_from(reply)) else {
            return false;
        };
        let nonce: [u8; 24] = reply[8..32].try_into().expect("24 bytes");
        let mut cookie: [u8; 16] = reply[32..48].try_into().expect("16 bytes");
        let tag: [u8; TAG_BYTES] = reply[48..].try_into().expect("16 bytes");
        let cipher = XChaCha20Poly1305::new(&cookie_key(&self.peer).into());
        if cipher.decrypt_in_place_detached(&nonce.into(), &mac1, &mut cookie, &tag.into()).is_err() {
            return false;
        }
        // One reply to one message.
        self.last_mac1 = None;
        self.cookie = Some((cookie, now_ms));
        true
    }
}

fn mac1_key(public: &[u8; 32]) -> [u8; 32] {
    hash(b"mac1----", public)
}

fn cookie_key(public: &[u8; 32]) -> [u8; 32] {
    hash(b"cookie--", public)
}

/// The signed part of a message, MAC1 and MAC2.
fn split(message: &[u8]) -> Option<(&[u8], [&[u8; 16]; 2])> {
    let (rest, mac2) = message.split_last_chunk::<16>()?;
    let (body, mac1) = rest.split_last_chunk::<16>()?;
    (body.len() >= 8).then_some((body, [mac1, mac2]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "192.0.2.1:1000";

    fn message(jar: &mut Jar, now_ms: u64) -> Vec<u8> {
        let mut message = vec![7; 148];
        jar.sign(now_ms, &mut message);
        message
    }

    #[test]
    fn a_cookie_proves_address_and_port_for_a_while() {
        let (warden, mut jar) = (Warden::new(&[1; 32], Seed::random()), Jar::new(&[1; 32]));
        let here = HERE.parse().unwrap();
        let first = message(&mut jar, 0);
        assert_eq!(warden.check(0, here, &first), Proof::Key);
        let mut reply = [0; 64];
        assert_eq!(warden.reply(0, here, &first, &mut reply), Some(64));
        assert_eq!(reply[4..8], first[4..8], "addressed to whoever sent the message");
        assert!(jar.take(10, &reply) && !jar.take(10, &reply), "once");
        let second = message(&mut jar, 20);
        assert_eq!(warden.check(20, here, &second), Proof::Address);
        for elsewhere in ["192.0.2.1:1001", "192.0.2.2:1000", "[2001:db8::1]:1000"] {
            assert_eq!(warden.check(20, elsewhere.parse().unwrap(), &second), Proof::Key);
        }
        assert_eq!(warden.check(PERIOD_MS, here, &second), Proof::Address, "in the next period");
        assert_eq!(warden.check(2 * PERIOD_MS, here, &second), Proof::Key, "not after it");
        let late = message(&mut jar, 10 + KEPT_MS);
        assert_eq!(late[132..], [0; 16], "it is not used any more");
    }

    #[test]
    fn what_is_forged_proves_nothing() {
        let (warden, mut jar) = (Warden::new(&[1; 32], Seed::random()), Jar::new(&[1; 32]));
        let here = HERE.parse().unwrap();
        let good = message(&mut jar, 0);
        for at in 0..132 {
            let mut forged = good.clone();
            forged[at] ^= 1;
            assert_eq!(warden.check(0, here, &forged), Proof::Nothing, "byte {at}");
        }
        for len in 0..40 {
            assert_eq!(warden.check(0, here, &good[..len]), Proof::Nothing);
        }
        let mut reply = [0; 64];
        Warden::new(&[2; 32], Seed::random()).reply(0, here, &good, &mut reply).unwrap();
        assert!(!jar.take(0, &reply), "of somebody else");
        warden.reply(0, here, &message(&mut Jar::new(&[1; 32]), 0), &mut reply).unwrap();
        reply[40] ^= 1;
        assert!(!jar.take(0, &reply));
    }
}
