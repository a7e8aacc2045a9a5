//! Peers by number: keys drawn from their number alone, so that the program that configures a server and the one that
//! plays its peers need not exchange them.

use std::net::Ipv4Addr;

use boringtun::x25519::{PublicKey, StaticSecret};
use sha2::{Digest, Sha256};

/// The addresses that generated peers send from: the first is not used. A machine that plays them has all of it.
pub const SOURCES: &str = "198.18.0.0/15";
const FIRST_SOURCE: u32 = 0xc612_0000;
/// Addresses inside the tunnel: 10.128.0.0/9.
const FIRST_INNER: u32 = 0x0a80_0000;

/// One that can shake hands.
pub struct GeneratedPeer {
    pub secret: StaticSecret,
    pub public: PublicKey,
}

impl GeneratedPeer {
    #[must_use]
    pub fn numbered(number: u32) -> Self {
        Self::of(StaticSecret::from(drawn("peer", number)))
    }

    fn of(secret: StaticSecret) -> Self {
        let public = PublicKey::from(&secret);
        Self { secret, public }
    }
}

/// The server that generated peers know.
#[must_use]
pub fn server_secret() -> GeneratedPeer {
    GeneratedPeer::of(StaticSecret::from(drawn("server", 0)))
}

/// The public key of a peer that nobody plays: quicker to make, because nobody knows its secret.
#[must_use]
pub fn idle_peer_key(number: u32) -> [u8; 32] {
    let mut key = drawn("idle", number);
    key[31] &= 0x7f;
    key
}

/// Where a peer sends from.
#[must_use]
pub fn endpoint_address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST_SOURCE + 1 + number)
}

/// The address a peer has inside the tunnel.
#[must_use]
pub fn inner_address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST_INNER + 1 + number)
}

fn drawn(what: &str, number: u32) -> [u8; 32] {
    Sha256::new().chain_update(what).chain_update(number.to_be_bytes()).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_own_keys_and_addresses() {
        assert_eq!(GeneratedPeer::numbered(4).public, GeneratedPeer::numbered(4).public);
        assert_ne!(GeneratedPeer::numbered(4).public, GeneratedPeer::numbered(5).public);
        assert_ne!(idle_peer_key(0), idle_peer_key(1));
        assert_eq!(endpoint_address(0).to_string(), "198.18.0.1");
        assert_eq!(endpoint_address(131_069).to_string(), "198.19.255.254");
        assert_eq!(inner_address(65_535).to_string(), "10.129.0.0");
    }
}
