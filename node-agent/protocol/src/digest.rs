//! The digest of a server's peers: a keyed sum modulo 2^128 over peer records.
//!
//! A sum, so that adding or removing one peer is one addition or subtraction, in any order; keyed, so that nobody can
//! choose records that cancel; modulo 2^128 and not XOR, because XOR loses a record that is present twice.
//! The same arithmetic stands in SQL (`platform.peer_record_digest` in `migrations/`); a test compares both.
//! The policies of tenants have a plain hash of their own ([`of_policies`]): they are few, and always told whole first.

use sha2::{Digest as _, Sha256};

use crate::v1::TenantPolicy;

/// What the digest covers of one peer. Byte order and field order are part of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerRecord {
    pub device_id: [u8; 16],
    pub tenant_id: [u8; 16],
    pub public_key: [u8; 32],
    /// SHA-256 of the preshared key; zeros when there is none. The digest never sees the key itself.
    pub preshared_key_hash: [u8; 32],
    pub ipv4: [u8; 4],
    pub ipv6: [u8; 16],
    pub generation: u64,
}

/// A digest over any number of records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(u128);

impl Digest {
    /// Parses the 16 big-endian bytes of the wire.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(u128::from_be_bytes(bytes.try_into().ok()?)))
    }

    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    pub fn add(&mut self, key: &[u8; 32], record: &PeerRecord) {
        self.0 = self.0.wrapping_add(record.value(key));
    }

    pub fn remove(&mut self, key: &[u8; 32], record: &PeerRecord) {
        self.0 = self.0.wrapping_sub(record.value(key));
    }
}

impl PeerRecord {
    /// The first 128 bits of SHA-256(key ‖ SHA-256(key ‖ record)): a keyed hash that plain SQL can compute too, and
    /// that cannot be extended.
    fn value(&self, key: &[u8; 32]) -> u128 {
        let inner = Sha256::new()
            .chain_update(key)
            .chain_update(self.device_id)
            .chain_update(self.tenant_id)
            .chain_update(self.public_key)
            .chain_update(self.preshared_key_hash)
            .chain_update(self.ipv4)
            .chain_update(self.ipv6)
            .chain_update(self.generation.to_be_bytes())
            .finalize();
        let out = Sha256::new().chain_update(key).chain_update(inner).finalize();
        u128::from_be_bytes(out[..16].try_into().expect("SHA-256 has 32 bytes"))
    }
}

/// The digest of all policies of a server: SHA-256 over (tenant, revision), in the order of the tenants. A tenant and its
/// revision stand for the content.
#[must_use]
pub fn of_policies<'a>(policies: impl Iterator<Item = &'a TenantPolicy>) -> [u8; 32] {
    let mut records: Vec<_> = policies.map(|policy| (&policy.tenant_id, policy.revision)).collect();
    records.sort_unstable();
    let mut hash = Sha256::new();
    for (tenant, revision) in records {
        hash.update(tenant);
        hash.update(revision.to_be_bytes());
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(n: u8) -> PeerRecord {
        PeerRecord {
            device_id: [n; 16],
            tenant_id: [1; 16],
            public_key: [n; 32],
            preshared_key_hash: [0; 32],
            ipv4: [10, 8, 0, n],
            ipv6: [n; 16],
            generation: u64::from(n),
        }
    }

    #[test]
    fn the_digest_of_one_known_record_never_changes() {
        let mut digest = Digest::default();
        digest.add(&[7; 32], &record(1));
        assert_eq!(hex::encode(digest.to_bytes()), "1710617b66c6b2645ad532f2187047ce");
    }

    proptest! {
        #[test]
        fn adding_and_removing_in_any_order_gives_the_same_digest(mut peers: Vec<u8>, removed in 0usize..20) {
            let key = [9; 32];
            let mut forward = Digest::default();
            for n in &peers { forward.add(&key, &record(*n)); }
            for n in peers.iter().take(removed) { forward.remove(&key, &record(*n)); }
            let mut rest = peers.split_off(removed.min(peers.len()));
            rest.reverse();
            let mut backward = Digest::default();
            for n in &rest { backward.add(&key, &record(*n)); }
            prop_assert_eq!(forward, backward);
        }
    }
}
