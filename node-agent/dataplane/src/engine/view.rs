//! What the engine shows: device and peers as they are, for the control socket.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::Engine;
use super::trim::AT_ONCE;
use crate::change::Secret;
use crate::counters::{Counts, Epoch};
use crate::drops::{Dropped, Drops};
use crate::policy::{PeerDrops, PeerLimits, TenantId, TenantSettings};
use crate::tunnel::Identity;

/// The device.
#[derive(Clone, Debug)]
pub struct DeviceView {
    /// Our private key.
    pub private_key: Option<Secret>,
    /// Our public key.
    pub public_key: Option<[u8; 32]>,
    /// The life of the counters.
    pub epoch: Epoch,
    /// Drops by reason.
    pub drops: Drops,
    /// Handshakes answered and completed.
    pub handshakes: u64,
    /// The prefixes in which peers live.
    pub overlay: Vec<IpNet>,
    /// How many peers are configured.
    pub peers: usize,
    /// How many of them have a tunnel in memory.
    pub live_peers: usize,
    /// The server's own addresses.
    pub hosts: Vec<IpAddr>,
    /// What went from peer to peer without the TUN.
    pub hairpin: Dropped,
}

/// One peer.
#[derive(Clone, Debug)]
pub struct PeerView {
    /// Its key.
    pub public_key: [u8; 32],
    /// The pre-shared key.
    pub preshared_key: Option<Secret>,
    /// Where it was last seen.
    pub endpoint: Option<SocketAddr>,
    /// Seconds; 0 is off.
    pub persistent_keepalive: u16,
    /// Its prefixes.
    pub allowed_ips: Vec<IpNet>,
    /// Its tenant.
    pub tenant: Option<[u8; 16]>,
    /// Which life of the key.
    pub generation: u64,
    /// Its counters.
    pub counts: Counts,
    /// Its rates and its lease.
    pub limits: PeerLimits,
    /// What was dropped of it, if anything was.
    pub drops: Option<PeerDrops>,
}

impl Engine {
    /// The device now.
    #[must_use]
    pub fn device(&self) -> DeviceView {
        DeviceView {
            private_key: self.identity.as_ref().map(|identity| identity.secret().clone()),
            public_key: self.identity.as_ref().map(Identity::public_key),
            epoch: self.counters.epoch(),
            drops: self.drops,
            handshakes: self.handshakes.done,
            overlay: self.directory.get().overlay.clone(),
            peers: self.directory.get().by_key.len(),
            live_peers: self.live.len(),
            hosts: self.policy.hosts.listed().to_vec(),
            hairpin: self.hairpin.passed(),
        }
    }

    /// Up to `limit` tenants with settings of their own, from entry `from` on, and the entry to go on with.
    #[must_use]
    pub fn tenants(&self, from: usize, limit: usize) -> (Vec<(TenantId, TenantSettings)>, Option<usize>) {
        let mut configured = self.policy.tenants.configured(from);
        let tenants = configured.by_ref().take(limit).map(|(_, id, settings)| (id, settings.clone())).collect();
        (tenants, configured.next().map(|(entry, ..)| entry))
    }

    /// Up to `limit` peers from slot `from` on, fewer if they have very many prefixes, and the slot to go on with.
    #[must_use]
    pub fn peers(&self, from: u16, limit: usize) -> (Vec<PeerView>, Option<u16>) {
        let (mut views, mut prefixes) = (Vec::new(), 0);
        for slot in from..=u16::MAX {
            if u32::from(slot) >= self.unused.min(self.counters.capacity()) {
                break;
            }
            if views.len() == limit || prefixes > AT_ONCE {
                return (views, Some(slot));
            }
            prefixes += self.prefixes_of(slot);
            views.extend(self.view(slot));
        }
        (views, None)
    }

    fn view(&self, slot: u16) -> Option<PeerView> {
        let peer = self.peers[usize::from(slot)].as_deref()?;
        Some(PeerView {
            public_key: peer.public_key,
            preshared_key: peer.preshared_key.as_deref().cloned(),
            endpoint: peer.endpoint,
            persistent_keepalive: peer.persistent_keepalive,
            allowed_ips: peer.allowed_ips.to_vec(),
            tenant: peer.tenant,
            generation: peer.generation,
            counts: self.counters.peer(slot).map(|line| line.counts).unwrap_or_default(),
            limits: peer.policy.limits(),
            drops: peer.policy.drops().cloned(),
        })
    }
}
