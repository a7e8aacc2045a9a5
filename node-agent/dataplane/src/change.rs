//! What the control socket can ask of the engine: changes of the device and of peers, parsed once at the edge.

use std::net::SocketAddr;

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::journal::JournalAck;
use crate::policy::{PeerLimitsChange, PolicyChange};

/// A secret of 32 bytes, wiped when dropped and never printed.
#[derive(Clone, PartialEq, Eq)]
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
