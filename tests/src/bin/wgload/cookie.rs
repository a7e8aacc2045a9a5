//! The second MAC of an initiation, from the cookie a loaded server asks for (WireGuard paper, section 5.4.7). It is put
//! into the message that was sent, so that asking for cookies costs the initiator next to nothing.

use blake2::digest::Mac;
use blake2::digest::consts::U16;
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use chacha20poly1305::aead::AeadInPlace as _;
use chacha20poly1305::{Key, KeyInit as _, Tag, XChaCha20Poly1305, XNonce};

const MAC1: std::ops::Range<usize> = 116..132;
const MAC2: std::ops::Range<usize> = 132..148;
const NONCE: std::ops::Range<usize> = 8..32;
const COOKIE: std::ops::Range<usize> = 32..48;
const TAG: std::ops::Range<usize> = 48..64;

/// What opens the cookies of one server.
pub(crate) struct Opener {
    cipher: XChaCha20Poly1305,
}

impl Opener {
    pub(crate) fn of_server(public: &[u8; 32]) -> Self {
        let key: [u8; 32] = Blake2s256::new().chain_update(b"cookie--").chain_update(public).finalize().into();
        Self { cipher: XChaCha20Poly1305::new(&Key::from(key)) }
    }

    /// Puts the reply's cookie to use. False when the reply does not open.
    pub(crate) fn seal(&self, reply: &[u8; 64], initiation: &mut [u8]) -> bool {
        let Some(mac1) = initiation.get(MAC1) else { return false };
        let mut cookie: [u8; 16] = part(reply, COOKIE);
        let (nonce, tag) = (XNonce::from(part::<24>(reply, NONCE)), Tag::from(part::<16>(reply, TAG)));
        if self.cipher.decrypt_in_place_detached(&nonce, mac1, &mut cookie, &tag).is_err() {
            return false;
        }
        let mut mac = <Blake2sMac<U16> as Mac>::new_from_slice(&cookie).expect("16 bytes are a key");
        mac.update(&initiation[..MAC1.end]);
        initiation[MAC2].copy_from_slice(&mac.finalize().into_bytes());
        true
    }
}

fn part<const N: usize>(reply: &[u8; 64], range: std::ops::Range<usize>) -> [u8; N] {
    reply[range].try_into().expect("the ranges above have these lengths")
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::Arc;

    use boringtun::noise::rate_limiter::RateLimiter;
    use boringtun::noise::{Tunn, TunnResult};
    use cvault_tests::bench::{GeneratedPeer, server_secret};

    use super::*;

    #[test]
    fn a_loaded_server_takes_the_initiation_with_the_cookie_it_asked_for() {
        let (server, peer) = (server_secret(), GeneratedPeer::numbered(1));
        let mut room = [0; 148];
        let mut tunnel = Tunn::new(peer.secret, server.public, None, None, 1, None);
        let TunnResult::WriteToNetwork(initiation) = tunnel.format_handshake_initiation(&mut room, false) else {
            panic!("no initiation")
        };
        let mut initiation = initiation.to_vec();

        let limiter = Arc::new(RateLimiter::new(&server.public, 0));
        let mut responder = Tunn::new(server.secret, peer.public, None, None, 2, Some(limiter));
        let from = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let mut room = [0; 148];
        let reply: [u8; 64] = {
            let TunnResult::WriteToNetwork(reply) = responder.decapsulate(from, &initiation, &mut room) else {
                panic!("no reply")
            };
            (&*reply).try_into().unwrap()
        };
        assert!(Opener::of_server(server.public.as_bytes()).seal(&reply, &mut initiation));
        let TunnResult::WriteToNetwork(response) = responder.decapsulate(from, &initiation, &mut room) else {
            panic!("still no response")
        };
        assert_eq!((response[0], response.len()), (2, 92));

        assert!(!Opener::of_server(peer.public.as_bytes()).seal(&reply, &mut initiation), "another server's cookie");
    }
}
