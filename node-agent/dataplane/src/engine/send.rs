//! Packets from the TUN, on their way to a peer.

use super::{Engine, Now, ParcelKind, QUEUE_PER_PEER, QUEUE_TOTAL, push};
use crate::drops::Drop;
use crate::out::Out;
use crate::packet;
use crate::tunnel::{MIN_ROOM, OVERHEAD};

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
        // Peer to peer is refused where it comes in; should the host forward such a packet all the same, it ends here.
        if peer.tenant.is_some() && self.directory.get().routes.host(addresses.source).is_some() {
            return Err(Drop::TxIsolation);
        }
        self.freshen(now, slot, out);
        if self.encrypt(now, slot, packet, out)? {
            return Ok(());
        }
        self.hold(now, slot, packet, out)
    }

    /// Encrypts if there is a session; says whether it did.
    fn encrypt(&mut self, now: Now, slot: u16, packet: &[u8], out: &mut Out) -> Result<bool, Drop> {
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::TxNoRoute)?;
        let Some(tunnel) = peer.tunnel.as_mut().filter(|tunnel| tunnel.has_session()) else {
            return Ok(false);
        };
        if peer.endpoint.is_none() {
            return Err(Drop::TxNoEndpoint);
        }
        let room = out.net_room(MIN_ROOM.max(packet.len() + OVERHEAD)).ok_or(Drop::TxNoRoom)?;
        let len = tunnel.encrypt(packet, room).ok_or(Drop::TxNoSession)?;
        let rekey = tunnel.take_wants_rekey();
        peer.last_traffic_ms = Some(now.mono_ms);
        push(peer, slot, len, packet.len(), out);
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
        let full = peer.queue.len() >= QUEUE_PER_PEER || self.queued >= QUEUE_TOTAL;
        if !full {
            peer.queue.push_back(packet.to_vec());
            self.queued += 1;
        }
        self.initiate(now, slot, out);
        if full { Err(Drop::TxNoSession) } else { Ok(()) }
    }

    /// There is a session now: sends what waited for it.
    pub(super) fn flush_queue(&mut self, now: Now, slot: u16, out: &mut Out) {
        while let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() {
            let (Some(tunnel), Some(room)) = (peer.tunnel.as_mut(), out.net_room(MIN_ROOM)) else {
                break;
            };
            let Some(len) = tunnel.drain(room) else { break };
            push(peer, slot, len, 0, out);
        }
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        let queue = std::mem::take(&mut peer.queue);
        self.queued -= queue.len();
        for packet in queue {
            match self.encrypt(now, slot, &packet, out) {
                Ok(true) => {}
                Ok(false) => self.drops.one(Drop::TxNoSession, packet.len()),
                Err(reason) => self.drops.one(reason, packet.len()),
            }
        }
    }
}
