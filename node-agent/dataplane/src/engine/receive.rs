//! Datagrams from the network: handshakes, and data on its way to the TUN.

use super::police::Way;
use super::{Engine, Now, Origin, ParcelKind, push};
use crate::counters::Field;
use crate::drops::Drop;
use crate::ecn::{self, Ecn};
use crate::out::{Datagram, NO_SLOT, Out};
use crate::policy::Direction;
use crate::tunnel::{Admission, MIN_ROOM, OVERHEAD, REJECT_AFTER_MESSAGES, Received, Tunnel};

/// The least time between two initiations of one peer, as in the kernel.
const INITIATION_GAP_MS: u64 = 20;

/// The message types, by their first four bytes and their length.
enum Message {
    Initiation,
    /// Addressed by the index at this offset.
    Response {
        index: u32,
    },
    Cookie {
        index: u32,
    },
    Data {
        index: u32,
        counter: u64,
    },
}

fn message(datagram: &[u8]) -> Option<Message> {
    let word = |at: usize| {
        let bytes = datagram.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    match (word(0)?, datagram.len()) {
        (1, 148) => Some(Message::Initiation),
        (2, 92) => Some(Message::Response { index: word(8)? }),
        (3, 64) => Some(Message::Cookie { index: word(4)? }),
        (4, len) if len >= OVERHEAD => {
            let counter = u64::from(word(8)?) | u64::from(word(12)?) << 32;
            Some(Message::Data { index: word(4)?, counter })
        }
        _ => None,
    }
}

impl Engine {
    /// One datagram (one segment of a GRO buffer) from the network.
    pub fn on_udp(&mut self, now: Now, datagram: &[u8], origin: Origin, out: &mut Out) {
        let kind = message(datagram);
        if let Some(Message::Response { index } | Message::Cookie { index } | Message::Data { index, .. }) = kind
            && self.hand_on_datagram(index, origin, datagram)
        {
            return;
        }
        let result = match kind {
            Some(Message::Initiation) => self.on_initiation(now, datagram, origin, out),
            Some(Message::Response { index }) => self.on_response(now, datagram, index, origin, out),
            Some(Message::Cookie { index }) => self.on_cookie(now, datagram, index, origin, out),
            Some(Message::Data { index, counter }) => {
                let result = self.on_data(now, datagram, index, counter, origin, out);
                result.inspect_err(|reason| self.blame_index(index, *reason))
            }
            None => Err(Drop::Garbage),
        };
        if let Err(reason) = result {
            self.drops.one(reason, datagram.len());
        }
    }

    /// Bucket of the source, MAC1 or cookie, whose key, then the peer's own verification.
    fn on_initiation(&mut self, now: Now, datagram: &[u8], origin: Origin, out: &mut Out) -> Result<(), Drop> {
        self.admit(datagram, origin, out)?;
        let identity = self.identity.as_ref().ok_or(Drop::UnknownPeer)?;
        let key = identity.claimed_initiator(datagram).ok_or(Drop::Handshake)?;
        let slot = *self.directory.get().by_key.get(&key).ok_or(Drop::UnknownPeer)?;
        if !self.shard.owns(slot) {
            self.hand_on(slot, ParcelKind::Initiation(origin, key), datagram);
            return Ok(());
        }
        self.answer_initiation(now, slot, datagram, origin, out)
    }

    /// An initiation that passed the gate and claims to be of this peer.
    pub(super) fn answer_initiation(
        &mut self,
        now: Now,
        slot: u16,
        datagram: &[u8],
        origin: Origin,
        out: &mut Out,
    ) -> Result<(), Drop> {
        self.freshen(now, slot, out);

        let index = self.index_of(slot);
        let identity = self.identity.as_ref().ok_or(Drop::UnknownPeer)?;
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownPeer)?;
        if peer.last_ephemeral == datagram[8..40] {
            return Err(Drop::Replay);
        }
        if peer.last_init_ms.is_some_and(|last| now.mono_ms.saturating_sub(last) < INITIATION_GAP_MS) {
            return Err(Drop::Handshake);
        }
        let room = out.net_room(MIN_ROOM).ok_or(Drop::TxNoRoom)?;
        let mut tunnel = peer.tunnel.take().unwrap_or_else(|| {
            let psk = peer.preshared_key.as_deref();
            Box::new(Tunnel::new(identity, &peer.public_key, psk, index, now.mono_ms))
        });
        let was_live = peer.live_at.is_some();
        let received = tunnel.receive(origin.from.ip(), datagram, room);
        let Received::Answer(len) = received else {
            // A forged initiation must not leave a tunnel behind.
            if was_live {
                peer.tunnel = Some(tunnel);
            }
            return Err(if let Received::Refused(reason) = received { reason } else { Drop::Handshake });
        };
        tunnel.answered(&room[..len]);
        peer.tunnel = Some(tunnel);
        peer.last_init_ms = Some(now.mono_ms);
        peer.last_attempt_ms = now.mono_ms;
        peer.last_ephemeral.copy_from_slice(&datagram[8..40]);
        // The answer goes where the question came from; the endpoint follows when the peer proves itself (trap 15).
        let start = out.net_start();
        out.push_net(Datagram { start, len, to: origin.from, via: origin.to, slot, inner: 0, ecn: Ecn::NotEct });
        self.counters.add(slot, Field::RxWire, datagram.len() as u64);
        self.handshakes += 1;
        self.make_live(slot);
        Ok(())
    }

    fn on_response(
        &mut self,
        now: Now,
        datagram: &[u8],
        index: u32,
        origin: Origin,
        out: &mut Out,
    ) -> Result<(), Drop> {
        let slot = self.slot_of(index).ok_or(Drop::UnknownIndex)?;
        self.admit(datagram, origin, out)?;
        self.freshen(now, slot, out);
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownIndex)?;
        let tunnel = peer.tunnel.as_mut().ok_or(Drop::NoSession)?;
        let room = out.net_room(MIN_ROOM).ok_or(Drop::TxNoRoom)?;
        match tunnel.receive(origin.from.ip(), datagram, room) {
            Received::Answer(len) => {
                tunnel.established();
                self.handshakes += 1;
                self.authenticated(now, slot, origin, datagram.len());
                let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownIndex)?;
                push(peer, slot, len, 0, out);
                self.counters.set_last_handshake(slot, now.unix_ms);
                self.flush_queue(now, slot, out);
                Ok(())
            }
            Received::Refused(reason) => Err(reason),
            Received::Nothing | Received::Packet(_) => Err(Drop::Handshake),
        }
    }

    /// A cookie proves nothing about the peer: no roaming, no counters (trap 13).
    fn on_cookie(&mut self, now: Now, datagram: &[u8], index: u32, origin: Origin, out: &mut Out) -> Result<(), Drop> {
        let slot = self.slot_of(index).ok_or(Drop::UnknownIndex)?;
        self.freshen(now, slot, out);
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownIndex)?;
        let tunnel = peer.tunnel.as_mut().ok_or(Drop::NoSession)?;
        let room = out.net_room(MIN_ROOM).ok_or(Drop::TxNoRoom)?;
        match tunnel.receive(origin.from.ip(), datagram, room) {
            Received::Nothing => Ok(()),
            Received::Refused(reason) => Err(reason),
            Received::Packet(_) | Received::Answer(_) => Err(Drop::Handshake),
        }
    }

    fn on_data(
        &mut self,
        now: Now,
        datagram: &[u8],
        index: u32,
        counter: u64,
        origin: Origin,
        out: &mut Out,
    ) -> Result<(), Drop> {
        let slot = self.slot_of(index).ok_or(Drop::UnknownIndex)?;
        if counter >= REJECT_AFTER_MESSAGES {
            return Err(Drop::Replay);
        }
        self.freshen(now, slot, out);
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownIndex)?;
        let tunnel = peer.tunnel.as_mut().ok_or(Drop::NoSession)?;
        let room = out.tun_room(datagram.len().max(MIN_ROOM)).ok_or(Drop::TunWrite)?;
        let packet_len = match tunnel.receive(origin.from.ip(), datagram, room) {
            Received::Nothing => 0,
            Received::Packet(len) => len,
            Received::Refused(reason) => return Err(reason),
            Received::Answer(_) => return Err(Drop::Handshake),
        };
        let completed = tunnel.authenticated(datagram);
        let has_queue = !peer.queue.is_empty() && tunnel.has_session();
        self.authenticated(now, slot, origin, datagram.len());
        if completed {
            self.counters.set_last_handshake(slot, now.unix_ms);
        }
        if has_queue {
            self.flush_queue(now, slot, out);
        }
        if packet_len == 0 {
            return Ok(());
        }
        let way = self.way(slot, out.tun_written(packet_len))?;
        self.charge(now, slot, Direction::Up, packet_len)?;
        ecn::decapsulate(origin.ecn, out.tun_written(packet_len))?;
        match way {
            Way::Tun => out.push_tun(packet_len, slot),
            Way::Peer(other) => self.hairpin(now, slot, other, packet_len, out),
        }
        Ok(())
    }

    /// The peer proved itself: it may be somewhere else by now.
    fn authenticated(&mut self, now: Now, slot: u16, origin: Origin, wire_len: usize) {
        self.counters.add(slot, Field::RxWire, wire_len as u64);
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        peer.last_traffic_ms = Some(now.mono_ms);
        peer.via = origin.to;
        if peer.endpoint != Some(origin.from) {
            peer.endpoint = Some(origin.from);
            self.counters.set_endpoint(slot, origin.from);
        }
    }

    /// The gate in front of all public-key work.
    fn admit(&mut self, datagram: &[u8], origin: Origin, out: &mut Out) -> Result<(), Drop> {
        let source = origin.from.ip();
        if !self.sources.admit(source) {
            return Err(Drop::SourceLimited);
        }
        let identity = self.identity.as_ref().ok_or(Drop::UnknownPeer)?;
        let room = out.net_room(MIN_ROOM).ok_or(Drop::TxNoRoom)?;
        match identity.admit(source, datagram, room) {
            Admission::Pass => Ok(()),
            Admission::Cookie(len) => {
                let start = out.net_start();
                out.push_net(Datagram {
                    start,
                    len,
                    to: origin.from,
                    via: origin.to,
                    slot: NO_SLOT,
                    inner: 0,
                    ecn: Ecn::NotEct,
                });
                Err(Drop::UnderLoad)
            }
            Admission::Refused(reason) => Err(reason),
        }
    }
}
