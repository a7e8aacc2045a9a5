//! Handshake messages: a gate, a bounded queue behind it, and public-key work a little at a time, after the data.
//!
//! The gate costs microseconds: MAC1, and while the queue is long a cookie, which proves the source, then a bucket for
//! each source. A queue as the measure of load (as in the kernel) lets a thousand clients behind one address connect at
//! once and still notices a flood of messages that are cheap to make and dear to read.
//! An initiation is opened to its timestamp before anything is made for it: a replay creates nothing, even if the peer
//! is cold or this process is new.

use std::collections::VecDeque;
use std::sync::Arc;

use super::load::Load;
use super::{Engine, Now, Origin, ParcelKind, push};
use crate::counters::Field;
use crate::drops::Drop;
use crate::ecn::Ecn;
use crate::noise::{Agreed, Opened, Proved, Timestamp};
use crate::out::{Datagram, NO_SLOT, Out};
use crate::tunnel::{Admission, Gate, INITIATION_BYTES, MIN_ROOM, Tunnel};

/// The least time between two initiations of one peer, as in the kernel.
const INITIATION_GAP_MS: u64 = 20;
/// Messages worked off in one pass, some 1.3 ms. Initiations fill the lanes of key agreement twice to be opened, four times to be answered.
const PER_PASS: usize = 8;

/// A message that passed the gate.
struct Waiting {
    origin: Origin,
    message: Message,
    bytes: [u8; INITIATION_BYTES],
    len: u8,
}

enum Message {
    Initiation,
    /// By another worker, who found that the peer is ours.
    Opened(Opened),
    Response {
        index: u32,
    },
}

/// Initiations to be answered.
struct Due {
    questions: Vec<Question>,
    /// Of each.
    proved: Vec<Proved>,
}

struct Question {
    slot: u16,
    origin: Origin,
    len: usize,
}

/// What waits, and who is let in.
pub(super) struct Handshakes {
    waiting: VecDeque<Waiting>,
    pub(super) load: Arc<Load>,
    /// Answered, or completed as the initiator.
    pub(super) done: u64,
}

impl Handshakes {
    pub(super) fn with(load: Arc<Load>) -> Self {
        Self { waiting: VecDeque::new(), load, done: 0 }
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn push(&mut self, message: Message, datagram: &[u8], origin: Origin) -> Result<(), Drop> {
        let mut bytes = [0; INITIATION_BYTES];
        let len = u8::try_from(datagram.len()).map_err(|_| Drop::Garbage)?;
        bytes.get_mut(..datagram.len()).ok_or(Drop::Garbage)?.copy_from_slice(datagram);
        if !self.load.take_place() {
            return Err(Drop::UnderLoad);
        }
        self.waiting.push_back(Waiting { origin, message, bytes, len });
        Ok(())
    }

    fn pop(&mut self) -> Option<Waiting> {
        let waiting = self.waiting.pop_front()?;
        self.load.free_place();
        Some(waiting)
    }
}

impl Engine {
    /// Works off some of the handshakes that wait; says whether others still do. Once a pass, after the data.
    pub fn on_handshakes(&mut self, now: Now, out: &mut Out) -> bool {
        if self.handshakes.waiting.is_empty() {
            return false;
        }
        let batch: Vec<_> = std::iter::from_fn(|| self.handshakes.pop()).take(PER_PASS).collect();
        let opened = self.open(&batch);
        let mut opened = opened.iter();
        // Without growing: what a vector moves out of is not wiped.
        let mut due = Due { questions: Vec::new(), proved: Vec::with_capacity(batch.len()) };
        for Waiting { origin, message, bytes, len } in &batch {
            let datagram = &bytes[..usize::from(*len)];
            let result = match message {
                Message::Initiation => self.place(now, opened.next(), datagram, *origin, out, &mut due),
                Message::Opened(opened) => self.place_opened(now, opened, datagram, *origin, out, &mut due),
                Message::Response { index } => self.complete(now, datagram, *index, *origin, out),
            };
            if let Err(reason) = result {
                self.drops.one(reason, datagram.len());
            }
        }
        self.answer_all(now, &due, out);
        !self.handshakes.waiting.is_empty()
    }

    pub(super) fn on_initiation(
        &mut self,
        now: Now,
        datagram: &[u8],
        origin: Origin,
        out: &mut Out,
    ) -> Result<(), Drop> {
        self.admit(now, datagram, origin, out)?;
        self.handshakes.push(Message::Initiation, datagram, origin)
    }

    /// From another worker, who let it in.
    pub(super) fn on_opened(&mut self, opened: Opened, datagram: &[u8], origin: Origin) -> Result<(), Drop> {
        self.handshakes.push(Message::Opened(opened), datagram, origin)
    }

    pub(super) fn on_response(
        &mut self,
        now: Now,
        datagram: &[u8],
        index: u32,
        origin: Origin,
        out: &mut Out,
    ) -> Result<(), Drop> {
        let slot = self.slot_of(index).ok_or(Drop::UnknownIndex)?;
        let peer = self.peers[usize::from(slot)].as_deref().ok_or(Drop::UnknownIndex)?;
        if peer.tunnel.is_none() {
            return Err(Drop::NoSession);
        }
        self.admit(now, datagram, origin, out)?;
        self.handshakes.push(Message::Response { index }, datagram, origin)
    }

    /// A cookie proves nothing about the peer: no roaming, no counters (trap 13).
    pub(super) fn on_cookie(&mut self, now: Now, datagram: &[u8], index: u32) -> Result<(), Drop> {
        let slot = self.slot_of(index).ok_or(Drop::UnknownIndex)?;
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownIndex)?;
        let tunnel = peer.tunnel.as_mut().ok_or(Drop::NoSession)?;
        if tunnel.take_cookie(now, datagram) { Ok(()) } else { Err(Drop::Decrypt) }
    }

    /// The gate in front of all public-key work.
    fn admit(&mut self, now: Now, datagram: &[u8], origin: Origin, out: &mut Out) -> Result<(), Drop> {
        let gate = if self.handshakes.load.is_high(now) { Gate::Cookie } else { Gate::Open };
        let identity = self.identity.as_ref().ok_or(Drop::UnknownPeer)?;
        let room = out.net_room(MIN_ROOM).ok_or(Drop::TxNoRoom)?;
        match identity.admit(gate, now, origin.from, datagram, room) {
            // Only now is it certain whose bucket this is.
            Admission::Pass if gate == Gate::Cookie && !self.handshakes.load.admit(origin.from.ip()) => {
                Err(Drop::SourceLimited)
            }
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

    /// The initiations among these, in order.
    fn open(&self, batch: &[Waiting]) -> Vec<Option<Opened>> {
        let Some(identity) = &self.identity else {
            return Vec::new();
        };
        let initiations = batch.iter().filter(|waiting| matches!(waiting.message, Message::Initiation));
        identity.open_all(&initiations.map(|waiting| &waiting.bytes[..usize::from(waiting.len)]).collect::<Vec<_>>())
    }

    /// Whose key, and therefore whose work it is.
    fn place(
        &mut self,
        now: Now,
        opened: Option<&Option<Opened>>,
        datagram: &[u8],
        origin: Origin,
        out: &mut Out,
        due: &mut Due,
    ) -> Result<(), Drop> {
        if self.identity.is_none() {
            return Err(Drop::UnknownPeer);
        }
        let opened = opened.and_then(Option::as_ref).ok_or(Drop::Handshake)?;
        let slot = *self.directory.get().by_key.get(&opened.public_key).ok_or(Drop::UnknownPeer)?;
        if !self.shard.owns(slot) {
            self.hand_on(slot, ParcelKind::Initiation(origin, opened.clone()), datagram);
            return Ok(());
        }
        due.proved.push(self.prove(now, slot, opened, datagram, out)?);
        due.questions.push(Question { slot, origin, len: datagram.len() });
        Ok(())
    }

    fn place_opened(
        &mut self,
        now: Now,
        opened: &Opened,
        datagram: &[u8],
        origin: Origin,
        out: &mut Out,
        due: &mut Due,
    ) -> Result<(), Drop> {
        // The peer may have moved meanwhile; it is not handed on again.
        let slot = self.directory.get().by_key.get(&opened.public_key).copied();
        let slot = slot.filter(|slot| self.shard.owns(*slot)).ok_or(Drop::UnknownPeer)?;
        due.proved.push(self.prove(now, slot, opened, datagram, out)?);
        due.questions.push(Question { slot, origin, len: datagram.len() });
        Ok(())
    }

    /// Whether the initiation is the peer's own, and newer than all before. Nothing is made for the peer until it is.
    fn prove(&mut self, now: Now, slot: u16, opened: &Opened, datagram: &[u8], out: &mut Out) -> Result<Proved, Drop> {
        let identity = self.identity.as_ref().ok_or(Drop::UnknownPeer)?;
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownPeer)?;
        if peer.last_init_ms.is_some_and(|last| now.mono_ms.saturating_sub(last) < INITIATION_GAP_MS) {
            return Err(Drop::Handshake);
        }
        let proved = match &peer.static_shared {
            Some(shared) => opened.prove(shared, datagram),
            None => {
                let shared = identity.shared_with(&peer.public_key).ok_or(Drop::Handshake)?;
                let proved = opened.prove(&shared, datagram);
                peer.static_shared = proved.is_some().then(|| Box::new(shared));
                proved
            }
        };
        let proved = proved.ok_or(Drop::Handshake)?;
        if !proved.timestamp.may_follow(Timestamp(self.counters.greatest_timestamp(slot))) {
            return Err(Drop::Replay);
        }
        // Before the work of an answer.
        out.net_room(MIN_ROOM).ok_or(Drop::TxNoRoom)?;
        // Another of the same pass comes too early now.
        peer.last_init_ms = Some(now.mono_ms);
        self.freshen(now, slot, out);
        Ok(proved)
    }

    fn answer_all(&mut self, now: Now, due: &Due, out: &mut Out) {
        for (question, agreed) in due.questions.iter().zip(&Agreed::all(&due.proved)) {
            if let Err(reason) = self.answer(now, question, agreed.as_ref(), out) {
                self.drops.one(reason, question.len);
            }
        }
    }

    fn answer(&mut self, now: Now, question: &Question, agreed: Option<&Agreed>, out: &mut Out) -> Result<(), Drop> {
        let (slot, origin) = (question.slot, question.origin);
        let agreed = agreed.ok_or(Drop::Handshake)?;
        let index = self.index_of(slot);
        let identity = self.identity.as_ref().ok_or(Drop::UnknownPeer)?;
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownPeer)?;
        let room = out.net_room(MIN_ROOM).ok_or(Drop::TxNoRoom)?;
        if peer.tunnel.is_none() {
            peer.tunnel = Tunnel::to(peer, identity, index, now).map(Box::new);
        }
        let tunnel = peer.tunnel.as_mut().ok_or(Drop::Handshake)?;
        let len = tunnel.answer(now, agreed, room).ok_or(Drop::Handshake)?;
        peer.last_attempt_ms = now.mono_ms;
        self.counters.set_greatest_timestamp(slot, agreed.timestamp().0);
        // The answer goes where the question came from; the endpoint follows when the peer proves itself (trap 15).
        let start = out.net_start();
        out.push_net(Datagram { start, len, to: origin.from, via: origin.to, slot, inner: 0, ecn: Ecn::NotEct });
        self.counters.add(slot, Field::RxWire, question.len as u64);
        self.handshakes.done += 1;
        self.make_live(slot);
        Ok(())
    }

    /// The answer to an initiation of ours.
    fn complete(&mut self, now: Now, datagram: &[u8], index: u32, origin: Origin, out: &mut Out) -> Result<(), Drop> {
        let slot = self.slot_of(index).ok_or(Drop::UnknownIndex)?;
        self.freshen(now, slot, out);
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownIndex)?;
        let tunnel = peer.tunnel.as_mut().ok_or(Drop::NoSession)?;
        tunnel.finish(now, index, datagram)?;
        self.handshakes.done += 1;
        self.authenticated(now, slot, origin, datagram.len());
        self.counters.set_last_handshake(slot, now.unix_ms);
        self.flush_queue(now, slot, out);
        // The peer may use the session once it has heard from us in it.
        let peer = self.peers[usize::from(slot)].as_deref_mut().ok_or(Drop::UnknownIndex)?;
        if let Some(tunnel) = peer.tunnel.as_mut().filter(|tunnel| tunnel.is_silent())
            && let Some(room) = out.net_room(MIN_ROOM)
            && let Some(len) = tunnel.encrypt(&[], 0, room)
        {
            push(peer, slot, len, 0, out);
        }
        Ok(())
    }
}
