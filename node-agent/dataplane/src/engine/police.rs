//! Policy on the way of a packet: who may send it where, and at whose expense.

use std::net::IpAddr;

use super::{Engine, Now, ParcelKind, Peer};
use crate::counters::CounterTable;
use crate::drops::{Drop, Dropped};
use crate::out::Out;
use crate::packet;
use crate::policy::{Clock, Direction, Exceeded, Forbidden, PolicyChange, SharedRates, TenantId, Tenants, TooMany};

/// Where an authenticated packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Tun,
    /// To a peer of the same tenant.
    Peer(u16),
}

/// Packets from peer to peer. The host never sees them, so that its firewall can stay closed between peers.
#[derive(Debug, Default)]
pub(super) struct Hairpin {
    passed: Dropped,
    scratch: Vec<u8>,
}

impl Hairpin {
    pub(super) fn passed(&self) -> Dropped {
        self.passed
    }
}

impl Now {
    /// The clock of the rate limits. Milliseconds are fine enough: their bursts are hundreds of times longer.
    pub(super) fn clock(self) -> Clock {
        Clock(self.mono_ms.saturating_mul(1_000_000))
    }
}

impl Engine {
    /// Changes the server's own addresses and the settings of tenants.
    ///
    /// # Errors
    /// [`TooMany`]; nothing was changed then.
    pub fn change_policy(&mut self, now: Now, change: PolicyChange) -> Result<(), TooMany> {
        self.policy.change(now.clock(), change)
    }

    /// Makes this engine charge tenants' limits together with others; before any peer or setting is there.
    pub fn share_rates(&mut self, rates: SharedRates) {
        self.policy.tenants = Tenants::sharing(rates);
    }

    /// Exact source; and, for a tenant's peer, where it may send to.
    pub(super) fn way(&self, slot: u16, packet: &[u8]) -> Result<Way, Drop> {
        let addresses = packet::addresses(packet).ok_or(Drop::Malformed)?;
        let peer = self.peers[usize::from(slot)].as_deref().ok_or(Drop::Spoofed)?;
        let Some(tenant) = peer.policy.tenant() else {
            let plain = peer.tenant.is_none() && self.directory.get().routes.find(addresses.source) == Some(slot);
            return if plain { Ok(Way::Tun) } else { Err(Drop::Spoofed) };
        };
        if !peer.owns(addresses.source) {
            return Err(Drop::Spoofed);
        }
        let other = self.directory.get().routes.host(addresses.destination);
        if other.is_some() || self.in_overlay(addresses.destination) {
            let reachable = other.filter(|other| *other != slot && self.policy.tenants.allows_intra(tenant));
            let neighbour = reachable.filter(|other| self.tenant_of(*other) == peer.tenant);
            return neighbour.map(Way::Peer).ok_or(Drop::Isolation);
        }
        let destinations = self.policy.tenants.destinations(tenant);
        match destinations.check(&self.policy.hosts, packet, addresses.destination) {
            Ok(()) => Ok(Way::Tun),
            Err(Forbidden::Destination) => Err(Drop::Destination),
            Err(Forbidden::Port) => Err(Drop::Port),
        }
    }

    fn in_overlay(&self, addr: IpAddr) -> bool {
        self.directory.get().overlay.iter().any(|net| net.contains(&addr))
    }

    /// Charges a packet to the peer's and its tenant's limits.
    pub(super) fn charge(&mut self, now: Now, slot: u16, direction: Direction, bytes: usize) -> Result<(), Drop> {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return Ok(());
        };
        let charged =
            peer.policy.charge(&self.policy.tenants, now.clock(), direction, bytes, || total(&self.counters, slot));
        charged.map_err(|exceeded| match (exceeded, direction) {
            (Exceeded::Rate, Direction::Up) => Drop::RateLimited,
            (Exceeded::Rate, Direction::Down) => Drop::TxRateLimited,
            (Exceeded::Lease, Direction::Up) => Drop::LeaseEnded,
            (Exceeded::Lease, Direction::Down) => Drop::TxLeaseEnded,
        })
    }

    /// Hands the packet just written into `out` to another peer. It counts as received, as if the host had taken it; what
    /// comes after is the other peer's affair.
    pub(super) fn hairpin(&mut self, now: Now, from: u16, to: u16, len: usize, out: &mut Out) {
        let mut packet = std::mem::take(&mut self.hairpin.scratch);
        packet.clear();
        packet.extend_from_slice(out.tun_written(len));
        self.hairpin.passed.packets += 1;
        self.hairpin.passed.bytes += len as u64;
        self.delivered(from, 1, len as u64);
        if self.shard.owns(to) {
            self.arrive_from_neighbour(now, to, &packet, out);
        } else if let Some(tenant) = self.tenant_of(from) {
            self.hand_on(to, ParcelKind::Neighbour(tenant), &packet);
        }
        self.hairpin.scratch = packet;
    }

    /// The second half of [`Self::hairpin`], where the other peer is served.
    pub(super) fn arrive_from_neighbour(&mut self, now: Now, to: u16, packet: &[u8], out: &mut Out) {
        if let Err(reason) = self.send_to(now, to, packet, out) {
            self.drops.one(reason, packet.len());
            self.blame(to, reason);
        }
    }

    /// A packet from a peer of the tenant that another worker serves, to one of ours.
    pub(super) fn on_neighbour(
        &mut self,
        now: Now,
        tenant: TenantId,
        packet: &[u8],
        out: &mut Out,
    ) -> Result<(), Drop> {
        let addresses = packet::addresses(packet).ok_or(Drop::TxMalformed)?;
        let slot = self.directory.get().routes.host(addresses.destination).ok_or(Drop::TxNoRoute)?;
        if !self.shard.owns(slot) {
            return Err(Drop::TxForward);
        }
        // It may be somebody else's by now.
        if self.tenant_of(slot) != Some(tenant) {
            return Err(Drop::TxIsolation);
        }
        self.arrive_from_neighbour(now, slot, packet, out);
        Ok(())
    }

    fn tenant_of(&self, slot: u16) -> Option<TenantId> {
        if self.shard.owns(slot) {
            self.peers[usize::from(slot)].as_ref().and_then(|peer| peer.tenant)
        } else {
            self.directory.get().tenants.get(&slot).copied()
        }
    }

    /// Counts a drop for a peer too.
    #[cold]
    pub(super) fn blame(&mut self, slot: u16, reason: Drop) {
        self.blame_for(slot, reason, 1);
    }

    #[cold]
    pub(super) fn blame_for(&mut self, slot: u16, reason: Drop, packets: u64) {
        if let Some(peer) = self.peers.get_mut(usize::from(slot)).and_then(Option::as_mut) {
            peer.policy.dropped(reason, packets);
        }
    }

    /// The same by the index on the wire. Only for peers with a tunnel: anybody can guess indices, and should not be able
    /// to make us remember something for each of them.
    #[cold]
    pub(super) fn blame_index(&mut self, index: u32, reason: Drop) {
        let Some(slot) = self.slot_of(index) else {
            return;
        };
        if self.peers[usize::from(slot)].as_ref().is_some_and(|peer| peer.tunnel.is_some()) {
            self.blame(slot, reason);
        }
    }
}

/// What a lease is compared with.
pub(super) fn total(counters: &CounterTable, slot: u16) -> u64 {
    counters.peer(slot).map_or(0, |line| line.counts.rx_inner.saturating_add(line.counts.tx_inner))
}

impl Peer {
    /// Whether this is one of the peer's single addresses.
    fn owns(&self, addr: IpAddr) -> bool {
        self.allowed_ips.iter().any(|net| net.addr() == addr && net.prefix_len() == net.max_prefix_len())
    }
}
