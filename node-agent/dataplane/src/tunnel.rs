//! A tunnel to one live peer: its sessions, the handshake under way, and when which of them is due.
//!
//! Timers are those of the WireGuard paper, section 6, in the engine's time. A responder's new session waits until the
//! initiator has used it, as in the kernel, so that nothing is encrypted which nobody may be able to read.

use std::net::SocketAddr;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::change::Secret;
use crate::drops::Drop;
use crate::engine::Now;
pub(crate) use crate::noise::Stamp;
use crate::noise::{Agreed, Initiated, Jar, Local, Opened, Proof, Remote, Seed, Session, Shared, Unopened, Warden};
pub(crate) use crate::noise::{INITIATION_BYTES, OVERHEAD, REJECT_AFTER_MESSAGES, RESPONSE_BYTES};

/// How old the timers may be when a tunnel is used.
const FRESH_MS: u64 = 250;
pub(crate) const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
const REKEY_AFTER_TIME_MS: u64 = 120_000;
const REJECT_AFTER_TIME_MS: u64 = 180_000;
const REKEY_ATTEMPT_TIME_MS: u64 = 90_000;
const REKEY_TIMEOUT_MS: u64 = 5_000;
const KEEPALIVE_TIMEOUT_MS: u64 = 10_000;
/// So long after data was sent, and nothing received since, the session is taken for lost.
const UNANSWERED_MS: u64 = KEEPALIVE_TIMEOUT_MS + REKEY_TIMEOUT_MS;
/// An initiator renews the session when something comes in it at this age.
const REKEY_ON_RECEIVE_MS: u64 = REJECT_AFTER_TIME_MS - UNANSWERED_MS;
/// Room that every message but data fits in.
pub(crate) const MIN_ROOM: usize = INITIATION_BYTES;

/// Our private key, and what follows from it.
pub(crate) struct Identity {
    secret: Secret,
    local: Arc<Local>,
    warden: Warden,
}

/// What a handshake message must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// MAC1.
    Open,
    /// MAC1 and a cookie.
    Cookie,
}

/// What the gate says about a handshake message.
pub(crate) enum Admission {
    Pass,
    /// A cookie reply of this length lies in the buffer.
    Cookie(usize),
    Refused(Drop),
}

impl Identity {
    /// `seed` is that of all whose cookies it believes.
    pub(crate) fn new(secret: &Secret, seed: Seed) -> Self {
        let local = Arc::new(Local::new(&secret.0));
        Self { secret: secret.clone(), warden: Warden::new(local.public(), seed), local }
    }

    pub(crate) fn public_key(&self) -> [u8; 32] {
        *self.local.public()
    }

    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Checks MAC1 and, if the gate asks for it, the cookie.
    pub(crate) fn admit(
        &self,
        gate: Gate,
        now: Now,
        source: SocketAddr,
        message: &[u8],
        reply: &mut [u8],
    ) -> Admission {
        match (self.warden.check(now.mono_ms, source, message), gate) {
            (Proof::Nothing, _) => Admission::Refused(Drop::BadMac),
            (Proof::Key, Gate::Cookie) => match self.warden.reply(now.mono_ms, source, message, reply) {
                Some(len) => Admission::Cookie(len),
                None => Admission::Refused(Drop::UnderLoad),
            },
            (Proof::Key, Gate::Open) | (Proof::Address, _) => Admission::Pass,
        }
    }

    /// Whose initiations these claim to be. It changes nothing: any worker can say where they belong.
    pub(crate) fn open_all(&self, initiations: &[&[u8]]) -> Vec<Option<Opened>> {
        self.local.open_all(initiations)
    }

    /// The secret shared with a peer, worth keeping.
    pub(crate) fn shared_with(&self, public_key: &[u8; 32]) -> Option<Shared> {
        self.local.shared_with(public_key)
    }

    /// [`Self::shared_with`] each.
    pub(crate) fn shared_with_all(&self, public_keys: &[[u8; 32]]) -> Vec<Option<Shared>> {
        self.local.shared_with_all(public_keys)
    }
}

/// What a data message turned into.
pub(crate) enum Received {
    /// A keepalive.
    Nothing,
    /// An IP packet of this length lies in the buffer; of none at all if it says so itself.
    Packet(usize),
    Refused(Drop),
}

/// What the timers want.
pub(crate) enum Timers {
    Nothing,
    /// Send this many bytes of the buffer.
    Send(usize),
    /// Send them too; the peer has not answered, perhaps because it cannot from where we sent.
    SendAnew(usize),
    /// The tunnel is of no use any more.
    Expired,
}

/// A handshake that we began.
struct UnderWay {
    initiated: Initiated,
    /// An earlier initiation, of which the response may still come.
    earlier: Option<Initiated>,
    /// It has come: there is a session, of which the other side may know nothing any more once it answers the last one.
    is_answered: bool,
    began_ms: u64,
    sent_ms: u64,
}

/// As the protocol mixes it in: all zeroes are none.
fn preshared(psk: Option<&Secret>) -> Zeroizing<[u8; 32]> {
    psk.map_or_else(|| Zeroizing::new([0; 32]), |psk| psk.0.clone())
}

/// How long a packet becomes, so that its length says less about it (section 5.4.6): a multiple of 16, but no more than
/// what the interface takes.
pub(crate) fn padded(len: usize, mtu: usize) -> usize {
    len.next_multiple_of(16).min(len.max(mtu))
}

/// State of one live peer, about 4 KB with a session.
pub(crate) struct Tunnel {
    local: Arc<Local>,
    remote: Remote,
    jar: Jar,
    /// The high 24 bits of our session indices; the low ones count.
    index: u32,
    indices: u8,
    stamp: Stamp,
    current: Option<Box<Session>>,
    /// Those before, the youngest first: messages of them may still be under way. Two handshakes that cross end two each time,
    /// and the other side may have gone on in the older one.
    previous: [Option<Box<Session>>; 3],
    /// A session we answered with, until the initiator uses it.
    next: Option<Box<Session>>,
    under_way: Option<Box<UnderWay>>,
    updated_ms: u64,
    wants_rekey: bool,
    /// Data came in the current session.
    heard: bool,
    /// When data was sent first after the last message received.
    unanswered_since_ms: Option<u64>,
    /// When data was received first after the last message sent.
    unconfirmed_since_ms: Option<u64>,
}

impl Tunnel {
    /// `shared` is that of the identity with the peer, `index` of 24 bits, `stamp` that of the peer's last tunnel.
    pub(crate) fn new(
        identity: &Identity,
        peer: &[u8; 32],
        psk: Option<&Secret>,
        shared: Shared,
        index: u32,
        stamp: Stamp,
        now: Now,
    ) -> Self {
        let preshared = preshared(psk);
        Self {
            local: Arc::clone(&identity.local),
            remote: Remote { public: *peer, preshared, shared },
            jar: Jar::new(peer),
            index: index << 8,
            indices: 0,
            stamp,
            current: None,
            previous: [None, None, None],
            next: None,
            under_way: None,
            updated_ms: now.mono_ms,
            wants_rekey: false,
            heard: false,
            unanswered_since_ms: None,
            unconfirmed_since_ms: None,
        }
    }

    /// For the next tunnel to the same peer.
    pub(crate) fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Whether a packet can be encrypted now.
    pub(crate) fn has_session(&self) -> bool {
        self.current.as_ref().is_some_and(|session| session.sent() < REJECT_AFTER_MESSAGES)
    }

    /// Nothing was sent in its session: the other side cannot know that it is good.
    pub(crate) fn is_silent(&self) -> bool {
        self.current.as_ref().is_some_and(|session| session.sent() == 0)
    }

    /// Neither has it a session nor did we answer an initiation.
    pub(crate) fn awaits_session(&self) -> bool {
        !self.has_session() && self.next.is_none()
    }

    pub(crate) fn is_fresh(&self, now: Now) -> bool {
        now.mono_ms.saturating_sub(self.updated_ms) < FRESH_MS
    }

    /// Does what time has made due. `room` must have at least [`MIN_ROOM`] bytes.
    pub(crate) fn update(&mut self, now: Now, room: &mut [u8]) -> Timers {
        let since = |then: u64| now.mono_ms.saturating_sub(then);
        self.updated_ms = now.mono_ms;
        for session in [&mut self.current, &mut self.next].into_iter().chain(&mut self.previous) {
            if session.as_ref().is_some_and(|session| since(session.born_ms) >= REJECT_AFTER_TIME_MS) {
                *session = None;
            }
        }
        let (mut wants_session, mut unanswered) = (false, false);
        if let Some(under_way) = &self.under_way {
            if since(under_way.began_ms) >= REKEY_ATTEMPT_TIME_MS {
                self.under_way = None;
                if self.current.is_none() && self.next.is_none() {
                    return Timers::Expired;
                }
            } else if since(under_way.sent_ms) >= REKEY_TIMEOUT_MS + self.jitter_ms() {
                if !under_way.is_answered || !self.heard {
                    return self.initiate_again(now, room).map_or(Timers::Nothing, Timers::SendAnew);
                }
                // The session that an earlier initiation brought is good, so the last one has gone astray.
                self.under_way = None;
            }
        } else {
            unanswered = self.unanswered_since_ms.is_some_and(|then| since(then) >= UNANSWERED_MS);
            wants_session = unanswered || std::mem::take(&mut self.wants_rekey);
        }
        if wants_session {
            self.unanswered_since_ms = None;
            let send = if unanswered { Timers::SendAnew } else { Timers::Send };
            return self.initiate(now, room).map_or(Timers::Nothing, send);
        }
        if self.unconfirmed_since_ms.is_some_and(|then| since(then) >= KEEPALIVE_TIMEOUT_MS) {
            self.unconfirmed_since_ms = None;
            return self.encrypt(&[], 0, room).map_or(Timers::Nothing, Timers::Send);
        }
        Timers::Nothing
    }

    /// Up to a third of a second, so that two sides that began together do not go on together.
    fn jitter_ms(&self) -> u64 {
        let drawn = self.under_way.as_ref().map_or(0, |under_way| under_way.initiated.local_index);
        u64::from(drawn.wrapping_mul(0x9e37_79b1) >> 16) % 334
    }

    /// An initiation, unless one is under way. `room` must have at least [`MIN_ROOM`] bytes.
    pub(crate) fn initiate(&mut self, now: Now, room: &mut [u8]) -> Option<usize> {
        if self.under_way.is_some() { None } else { self.initiate_again(now, room) }
    }

    /// Another initiation although one is under way: an answer to either is accepted.
    pub(crate) fn initiate_again(&mut self, now: Now, room: &mut [u8]) -> Option<usize> {
        let index = self.draw_index();
        let initiated = self.local.initiate(&self.remote, index, (&mut self.stamp, now.unix_ms), room)?;
        self.jar.sign(now.mono_ms, &mut room[..INITIATION_BYTES]);
        let (earlier, began_ms) = match self.under_way.take() {
            Some(under_way) => (Some(under_way.initiated), under_way.began_ms),
            None => (None, now.mono_ms),
        };
        let sent_ms = now.mono_ms;
        self.under_way = Some(Box::new(UnderWay { initiated, earlier, is_answered: false, began_ms, sent_ms }));
        Some(INITIATION_BYTES)
    }

    /// Answers an initiation of the peer. `room` must have at least [`MIN_ROOM`] bytes.
    pub(crate) fn answer(&mut self, now: Now, agreed: &Agreed, room: &mut [u8]) -> Option<usize> {
        let index = self.draw_index();
        let keys = agreed.respond(&self.remote, index, room)?;
        self.jar.sign(now.mono_ms, &mut room[..RESPONSE_BYTES]);
        let former = self.next.replace(Box::new(Session::new(&keys, index, false, now.mono_ms)));
        // The other side may have gone on in one that is older than ours.
        self.retire(former.filter(|former| former.born_ms < self.current_born_ms()));
        self.unanswered_since_ms = None;
        Some(RESPONSE_BYTES)
    }

    /// Takes the answer to an initiation of ours: there is a new session. After the answer to an earlier one that to the
    /// last is still awaited: when the other side has given it, it has forgotten the session before.
    pub(crate) fn finish(&mut self, now: Now, index: u32, response: &[u8]) -> Result<(), Drop> {
        let under_way = self.under_way.as_mut().ok_or(Drop::NoSession)?;
        let earlier = under_way.earlier.as_ref().filter(|one| one.local_index == index);
        let is_last = earlier.is_none();
        let initiated = earlier.unwrap_or(&under_way.initiated);
        if initiated.local_index != index {
            return Err(Drop::NoSession);
        }
        let keys = self.local.finish(&self.remote, initiated, response).ok_or(Drop::Decrypt)?;
        let session = Box::new(Session::new(&keys, index, true, now.mono_ms));
        let former = self.current.replace(session);
        if is_last {
            self.under_way = None;
        } else {
            under_way.earlier = None;
            under_way.is_answered = true;
        }
        self.retire(former);
        self.began();
        Ok(())
    }

    /// Keeps a session for what is under way.
    fn retire(&mut self, session: Option<Box<Session>>) {
        if session.is_some() {
            self.previous.rotate_right(1);
            self.previous[0] = session;
        }
    }

    fn began(&mut self) {
        self.wants_rekey = false;
        self.heard = false;
        self.unanswered_since_ms = None;
    }

    /// Keeps a cookie. `false`: it is none, or not for us.
    pub(crate) fn take_cookie(&mut self, now: Now, reply: &[u8]) -> bool {
        self.jar.take(now.mono_ms, reply)
    }

    /// Opens a data message; `room` must be at least as long as it. `true`: it completes a handshake that the other
    /// side began.
    pub(crate) fn receive(&mut self, index: u32, message: &[u8], room: &mut [u8]) -> (Received, bool) {
        let completes = self.is_confirmed(index);
        let sessions = [&mut self.current, &mut self.next].into_iter().chain(&mut self.previous);
        let Some(session) = sessions.flatten().find(|session| session.local_index == index) else {
            return (Received::Refused(Drop::NoSession), false);
        };
        let len = match session.open(message, room) {
            Ok(len) => len,
            Err(Unopened::Replayed) => return (Received::Refused(Drop::Replay), false),
            Err(Unopened::Forged) => return (Received::Refused(Drop::Decrypt), false),
        };
        if completes {
            let former = std::mem::replace(&mut self.current, self.next.take());
            self.retire(former);
            self.under_way = None;
            self.began();
        }
        self.unanswered_since_ms = None;
        self.wants_rekey |= self.is_aged(REKEY_ON_RECEIVE_MS);
        if len == 0 {
            return (Received::Nothing, completes);
        }
        self.heard |= self.current.as_ref().is_some_and(|session| session.local_index == index);
        self.unconfirmed_since_ms.get_or_insert(self.updated_ms);
        let packet = crate::packet::len(&room[..len]).map_or(Received::Refused(Drop::Malformed), Received::Packet);
        (packet, completes)
    }

    /// Whether a message in this session confirms the one that we answered with. If ours was made after it, both sides go on in
    /// their own.
    fn is_confirmed(&self, index: u32) -> bool {
        self.next.as_ref().is_some_and(|next| next.local_index == index && next.born_ms >= self.current_born_ms())
    }

    fn current_born_ms(&self) -> u64 {
        self.current.as_ref().map_or(0, |current| current.born_ms)
    }

    /// Encrypts a packet (or a keepalive when it is empty). Needs a session and `padded(packet, mtu) + OVERHEAD` bytes.
    pub(crate) fn encrypt(&mut self, packet: &[u8], mtu: usize, room: &mut [u8]) -> Option<usize> {
        let session = self.current.as_mut()?;
        let len = session.seal(packet, padded(packet.len(), mtu), room)?;
        let is_used_up = session.sent() > REKEY_AFTER_MESSAGES;
        self.wants_rekey |= is_used_up || self.is_aged(REKEY_AFTER_TIME_MS);
        self.unconfirmed_since_ms = None;
        if !packet.is_empty() {
            self.unanswered_since_ms.get_or_insert(self.updated_ms);
        }
        Some(len)
    }

    /// Whether we began the session, and so long ago.
    fn is_aged(&self, age_ms: u64) -> bool {
        let session = self.current.as_ref().filter(|session| session.is_ours);
        session.is_some_and(|session| self.updated_ms.saturating_sub(session.born_ms) >= age_ms)
    }

    /// For the handshakes to come; the sessions there are go on.
    pub(crate) fn set_preshared_key(&mut self, psk: Option<&Secret>) {
        self.remote.preshared = preshared(psk);
    }

    /// Whether a new session is due, by age or by messages sent.
    pub(crate) fn take_wants_rekey(&mut self) -> bool {
        std::mem::take(&mut self.wants_rekey)
    }

    /// One that no session and no handshake of this tunnel has: there are at most seven of them.
    fn draw_index(&mut self) -> u32 {
        loop {
            self.indices = self.indices.wrapping_add(1);
            let index = self.index | u32::from(self.indices);
            if !self.uses(index) {
                return index;
            }
        }
    }

    /// As if so many messages had been sent in the session.
    #[cfg(test)]
    pub(crate) fn skip_to(&mut self, counter: u64) {
        self.current.as_mut().expect("a session").skip_to(counter);
    }

    fn uses(&self, index: u32) -> bool {
        let sessions = [&self.current, &self.next].into_iter().chain(&self.previous).flatten();
        let under_way = self.under_way.iter();
        let initiated = under_way.flat_map(|one| [Some(&one.initiated), one.earlier.as_ref()]).flatten();
        sessions
            .map(|session| session.local_index)
            .chain(initiated.map(|one| one.local_index))
            .any(|used| used == index)
    }
}
