//! Packets from the TUN, on their way to a peer.

use super::{Engine, Now, ParcelKind, QUEUE_PER_PEER, push_marked};
use crate::drops::Drop;
use crate::ecn::Ecn;
use crate::out::Out;
use crate::packet;
use crate::policy::Direction;
use crate::tunnel::{MIN_ROOM, OVERHEAD, padded};

impl Engine {
    /// One IP packet from the TUN.
    pub fn on_tun(&mut self, now: Now, packet: &[u8], out: &mut Out) {
        if let Err(reason) = self.route(now, packet, out) {
            self.drops.one(reason, packet.len());
        }
    }

    fn route(&mut self, now: Now, packet: &[u8], out: &mut Out) -> Result<(), Drop> {
        let addresses = packet::addresses(packet).ok_or(Drop::TxMalformed)?;
        let slot = self.directory.get().routes.find(addresses.destination).ok_or(Drop::TxNoRoute)?;
        if !self.shard.owns(slot) {
            self.hand_on(slot, ParcelKind::Packet, packet);
            return Ok(());
        }
        let peer = self.peers[usize::from(slot)].as_deref().ok_or(Drop::TxNoRoute)?;
        // Peer to peer ends where it comes in, in a refusal or a hairpin; should the host forward it all the same, here.
        let isolated = peer.tenant.is_some() && self.directory.get().routes.host(addresses.source).is_some();
        let sent = if isolated { Err(Drop::TxIsolation) } else { self.send_to(now, slot, packet, out) };
        sent.inspect_err(|reason| self.blame(slot, *reason))
    }

    /// Sends to a peer that may have the packet.
    pub(super) fn send_to(&mut self, now: Now, slot: u16, packet: &[u8], out: &mut Out) -> Result<(), Drop> {
        self.freshen(now, slot, out);
        if self.encrypt(now, slot, packet, out)? {
            return Ok(());
        }
        self.hold(now, slot, packet, out)
    }

    /// Encrypts if there is a session; says whether it did.
    fn encrypt(&mut self, now: Now, slot: u16, packet: &[u8], out: &mut Out) -> Result<bool, Drop> {
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::TxNoRoute)?;
        if !peer.tunnel.as_ref().is_some_and(|tunnel| tunnel.has_session()) {
            return Ok(false);
        }
        if peer.endpoint.is_none() {
            return Err(Drop::TxNoEndpoint);
        }
        let room = out.net_room(MIN_ROOM.max(padded(packet.len(), self.mtu) + OVERHEAD)).ok_or(Drop::TxNoRoom)?;
        self.charge(now, slot, Direction::Down, packet.len())?;
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::TxNoRoute)?;
        let tunnel = peer.tunnel.as_mut().ok_or(Drop::TxNoSession)?;
        let len = tunnel.encrypt(packet, self.mtu, room).ok_or(Drop::TxNoSession)?;
        let rekey = tunnel.take_wants_rekey();
        peer.last_traffic_ms = Some(now.mono_ms);
        push_marked(peer, slot, len, packet.len(), Ecn::of(packet), out);
        if rekey {
            self.initiate(now, slot, out);
        }
        Ok(true)
    }

    /// Keeps a few packets while a handshake runs, and begins one.
    fn hold(&mut self, now: Now, slot: u16, packet: &[u8], out: &mut Out) -> Result<(), Drop> {
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::TxNoRoute)?;
        if peer.endpoint.is_none() {
            return Err(Drop::TxNoEndpoint);
        }
        if self.identity.is_none() {
            return Err(Drop::TxNoSession);
        }
        let full = peer.queue.len() >= QUEUE_PER_PEER || !self.handshakes.load.hold();
        if !full {
            peer.queue.push(packet.to_vec());
        }
        self.initiate(now, slot, out);
        if full { Err(Drop::TxNoSession) } else { Ok(()) }
    }

    /// There is a session now: sends what waited for it.
    pub(super) fn flush_queue(&mut self, now: Now, slot: u16, out: &mut Out) {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        let queue = std::mem::take(&mut peer.queue);
        self.handshakes.load.release(queue.len());
        for packet in queue {
            let reason = match self.encrypt(now, slot, &packet, out) {
                Ok(true) => continue,
                Ok(false) => Drop::TxNoSession,
                Err(reason) => reason,
            };
            self.drops.one(reason, packet.len());
            self.blame(slot, reason);
        }
    }
}
