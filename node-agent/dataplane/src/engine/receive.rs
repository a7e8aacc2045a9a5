//! Datagrams from the network: handshakes to their queue, data on its way to the TUN.

use super::police::Way;
use super::{Engine, Now, Origin};
use crate::counters::Field;
use crate::drops::Drop;
use crate::ecn;
use crate::noise::{COOKIE_REPLY_BYTES, RESPONSE_BYTES};
use crate::out::Out;
use crate::packet;
use crate::policy::Direction;
use crate::tunnel::{INITIATION_BYTES, MIN_ROOM, OVERHEAD, REJECT_AFTER_MESSAGES, Received};

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
        (1, INITIATION_BYTES) => Some(Message::Initiation),
        (2, RESPONSE_BYTES) => Some(Message::Response { index: word(8)? }),
        (3, COOKIE_REPLY_BYTES) => Some(Message::Cookie { index: word(4)? }),
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
        // From port 0 nothing could be answered: the kernel refuses to send there.
        let kind = if origin.from.port() == 0 { None } else { message(datagram) };
        if let Some(Message::Response { index } | Message::Cookie { index } | Message::Data { index, .. }) = kind
            && self.hand_on_datagram(index, origin, datagram)
        {
            return;
        }
        let result = match kind {
            Some(Message::Initiation) => self.on_initiation(now, datagram, origin, out),
            Some(Message::Response { index }) => self.on_response(now, datagram, index, origin, out),
            Some(Message::Cookie { index }) => self.on_cookie(now, datagram, index),
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
        let (received, completed) = tunnel.receive(index, datagram, room);
        let packet = match received {
            Received::Nothing => Ok(None),
            Received::Packet(len) => Ok(Some(len)),
            // No packet, but the peer's own.
            Received::Refused(Drop::Malformed) => Err(Drop::Malformed),
            Received::Refused(reason) => return Err(reason),
        };
        let has_queue = !peer.queue.is_empty() && tunnel.has_session();
        self.authenticated(now, slot, origin, datagram.len());
        if completed {
            self.counters.set_last_handshake(slot, now.unix_ms);
        }
        if has_queue {
            self.flush_queue(now, slot, out);
        }
        let Some(packet_len) = packet? else {
            return Ok(());
        };
        let way = self.way(slot, out.tun_written(packet_len))?;
        // What is dropped is not charged.
        ecn::decapsulate(origin.ecn, out.tun_written(packet_len))?;
        if way != Way::Tun && !packet::spend_hop(out.tun_written(packet_len)) {
            return Err(Drop::HopLimit);
        }
        self.charge(now, slot, Direction::Up, packet_len)?;
        match way {
            Way::Tun => out.push_tun(packet_len, slot),
            Way::Peer(other) => self.hairpin(now, slot, other, packet_len, out),
        }
        Ok(())
    }

    /// The peer proved itself: it may be somewhere else by now.
    pub(super) fn authenticated(&mut self, now: Now, slot: u16, origin: Origin, wire_len: usize) {
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
}
