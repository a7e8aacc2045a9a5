//! What the control socket can ask of the engine: changes of the device and of peers, parsed once at the edge.

use std::net::SocketAddr;

use ipnet::IpNet;
use smallvec::{SmallVec, smallvec};
use zeroize::Zeroizing;

use crate::allowed::is_host;
use crate::journal::JournalAck;
use crate::policy::{PeerLimitsChange, PolicyChange};

/// A secret of 32 bytes, wiped when dropped and never printed. By default all zeroes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub Zeroizing<[u8; 32]>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// Takes over the bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// A private key as everybody keeps it: the bits that X25519 does not use are set as RFC 7748 (section 5) says. All zeroes
    /// stay what they are.
    #[must_use]
    pub fn private_key(bytes: [u8; 32]) -> Self {
        let mut secret = Self::new(bytes);
        if !secret.is_zero() {
            secret.0[0] &= 0xf8;
            secret.0[31] = secret.0[31] & 0x7f | 0x40;
        }
        secret
    }

    /// All zeroes: the protocol's way to say "none".
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0.iter().all(|b| *b == 0)
    }
}

/// Changes of the device. `None` leaves a field as it is.
#[derive(Clone, Debug, Default)]
pub struct DeviceChange {
    /// A new private key; all zeroes removes it.
    pub private_key: Option<Secret>,
    /// A UDP port; 0 lets the kernel choose.
    pub listen_port: Option<u16>,
    /// `SO_MARK` of the sockets; 0 removes it.
    pub fwmark: Option<u32>,
    /// First forget the overlay prefixes.
    pub replace_overlay: bool,
    /// Prefixes in which peers live; tenants' traffic into them is dropped.
    pub overlay: Vec<IpNet>,
    /// This much of the journal has been taken over.
    pub journal_ack: Option<JournalAck>,
    /// The server's own addresses, and settings of tenants.
    pub policy: PolicyChange,
}

impl DeviceChange {
    /// Whether it leaves everything as it is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { private_key, listen_port, fwmark, replace_overlay, overlay, journal_ack, policy } = self;
        let says_nothing = private_key.is_none() && listen_port.is_none() && fwmark.is_none() && journal_ack.is_none();
        says_nothing && !replace_overlay && overlay.is_empty() && policy.is_empty()
    }
}

/// Adds, changes or removes one peer. `None` leaves a field as it is (or at its default for a new peer).
#[derive(Clone, Debug, Default)]
pub struct PeerChange {
    /// Which peer.
    pub public_key: [u8; 32],
    /// Remove every life of the key; the rest is ignored.
    pub remove: bool,
    /// Do nothing unless the peer exists.
    pub update_only: bool,
    /// All zeroes removes it.
    pub preshared_key: Option<Secret>,
    /// Where to send to.
    pub endpoint: Option<SocketAddr>,
    /// Seconds; 0 switches it off.
    pub persistent_keepalive: Option<u16>,
    /// First take away all allowed-ips.
    pub replace_allowed_ips: bool,
    /// Prefixes to add, in order.
    pub allowed_ips: Vec<IpNet>,
    /// Prefixes to take away (`allowed_ip=-…`).
    pub removed_ips: Vec<IpNet>,
    /// The tenant this peer belongs to, from now on and for good.
    pub tenant: Option<[u8; 16]>,
    /// Which life of the key this is: another generation starts its counters at 0.
    pub generation: Option<u64>,
    /// Rates and lease.
    pub limits: PeerLimitsChange,
}

impl PeerChange {
    /// The same as changes of at most `limit` prefixes each, to be applied one after the other.
    pub(crate) fn parts(mut self, limit: usize) -> SmallVec<[Self; 1]> {
        let refused = self.tenant.is_some() && !self.allowed_ips.iter().all(|net| is_host(*net));
        if self.remove || refused || self.removed_ips.len() + self.allowed_ips.len() <= limit {
            return smallvec![self];
        }
        let mut removed = std::mem::take(&mut self.removed_ips).into_iter();
        let mut added = std::mem::take(&mut self.allowed_ips).into_iter();
        let mut parts = SmallVec::new();
        let mut part = self;
        loop {
            part.removed_ips = removed.by_ref().take(limit).collect();
            part.allowed_ips = added.by_ref().take(limit - part.removed_ips.len()).collect();
            let next = Self { public_key: part.public_key, update_only: true, ..Self::default() };
            parts.push(std::mem::replace(&mut part, next));
            if removed.len() + added.len() == 0 {
                return parts;
            }
        }
    }
}

/// A peer's address as the sockets want it: an IPv4-mapped IPv6 address is IPv4. The scope of others is kept.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
            SocketAddr::new(addr.ip().to_canonical(), addr.port())
        }
        SocketAddr::V4(_) | SocketAddr::V6(_) => addr,
    }
}

/// Why a change was refused. Nothing of the refused change was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The counter file has no free slot.
    #[error("no room for another peer")]
    Full,
    /// An earlier removal of the same life is not in the journal yet.
    #[error("the peer is still being removed")]
    Closing,
    /// A tenant's peer may only have single addresses.
    #[error("a peer with a tenant may only have /32 and /128 allowed-ips")]
    TenantPrefix,
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn nets(from: u32, count: u32) -> Vec<IpNet> {
        (from..from + count).map(|bits| IpNet::from(std::net::IpAddr::from(Ipv4Addr::from(bits)))).collect()
    }

    #[test]
    fn a_peer_with_many_prefixes_is_told_in_parts() {
        let change = PeerChange {
            public_key: [7; 32],
            replace_allowed_ips: true,
            removed_ips: nets(0, 700),
            allowed_ips: nets(1000, 900),
            ..PeerChange::default()
        };
        let parts = change.parts(512);
        let lengths: Vec<_> = parts.iter().map(|part| (part.removed_ips.len(), part.allowed_ips.len())).collect();
        assert_eq!(lengths, [(512, 0), (188, 324), (0, 512), (0, 64)]);
        assert!(parts[0].replace_allowed_ips && !parts[0].update_only);
        assert!(parts[1..].iter().all(|part| part.public_key == [7; 32] && part.update_only));
        assert!(parts[1..].iter().all(|part| !part.replace_allowed_ips));
        assert_eq!(parts.iter().flat_map(|part| part.removed_ips.clone()).collect::<Vec<_>>(), nets(0, 700));
        assert_eq!(parts.iter().flat_map(|part| part.allowed_ips.clone()).collect::<Vec<_>>(), nets(1000, 900));
    }

    #[test]
    fn what_will_be_refused_is_refused_as_a_whole() {
        let mut allowed_ips = nets(0, 600);
        allowed_ips.push("10.0.0.0/8".parse().unwrap());
        let change = PeerChange { tenant: Some([1; 16]), allowed_ips, ..PeerChange::default() };
        assert_eq!(change.parts(512).len(), 1);
    }
}
