//! The only file that names boringtun: our key with its limiters, and one peer's Noise state.
//!
//! It hides boringtun's habits that a server must not inherit. The numbers are those of the trap list in the study:
//! sessions are known before anything is encrypted (6), timers are fresh before a tunnel is touched (8), persistent
//! keepalive is ours (10), counters near 2^64 are refused (7). That what was sent stays without an answer is noticed
//! here too: boringtun's clock stands still between two looks at its timers, and what is sent right after something was
//! received counts as answered.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use blake2::digest::consts::U16;
use blake2::{Blake2s, Digest};
use boringtun::noise::errors::WireGuardError;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, SharedSecret, StaticSecret};

use crate::change::Secret;
use crate::drops::Drop;
use crate::initiation::{Opened, Opener};

type Blake2s128 = Blake2s<U16>;

/// How old the timers may be when a tunnel is used (trap 8).
const FRESH_MS: u64 = 250;
/// `KEEPALIVE_TIMEOUT` + `REKEY_TIMEOUT` of the protocol: so long after data was sent, and nothing received since, the
/// session is taken for lost.
const UNANSWERED_MS: u64 = 15_000;
/// `KEEPALIVE_TIMEOUT`: so long after data was received, and nothing sent since, a keepalive says that it was.
const UNCONFIRMED_MS: u64 = 10_000;
/// `REKEY_AFTER_MESSAGES` of the protocol.
const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
/// `REJECT_AFTER_MESSAGES` of the protocol.
pub(crate) const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
/// The least room that boringtun needs to answer.
pub(crate) const MIN_ROOM: usize = 148;
/// Bytes that encryption adds.
pub(crate) const OVERHEAD: usize = 32;

/// Our key pair with the limiters that belong to it.
pub(crate) struct Identity {
    secret: Secret,
    private: StaticSecret,
    public: PublicKey,
    opener: Opener,
    /// Always under load: it demands a cookie. When, is not left to its count (traps 2 and 3).
    strict: RateLimiter,
    /// Never under load; shared by all tunnels so that they do not count again (trap 1).
    inner: Arc<RateLimiter>,
}

/// What a handshake message must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// MAC1.
    Open,
    /// MAC1 and a cookie.
    Cookie,
}

/// What the limiter says about a handshake message.
pub(crate) enum Admission {
    Pass,
    /// Send this many bytes of the buffer back.
    Cookie(usize),
    Refused(Drop),
}

impl Identity {
    pub(crate) fn new(secret: &Secret) -> Self {
        let private = StaticSecret::from(*secret.0);
        let public = PublicKey::from(&private);
        Self {
            secret: secret.clone(),
            opener: Opener::new(private.clone(), &public),
            strict: RateLimiter::new(&public, 0),
            inner: Arc::new(RateLimiter::new(&public, u64::MAX)),
            private,
            public,
        }
    }

    pub(crate) fn public_key(&self) -> [u8; 32] {
        self.public.to_bytes()
    }

    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Checks MAC1 and, if the gate asks for it, the cookie. The address is always given (trap 4).
    pub(crate) fn admit(&self, gate: Gate, source: SocketAddr, message: &[u8], reply: &mut [u8]) -> Admission {
        let (limiter, source) = match gate {
            Gate::Open => (&*self.inner, source.ip()),
            Gate::Cookie => (&self.strict, with_port(source)),
        };
        match limiter.verify_packet(Some(source), message, reply) {
            Ok(_) => Admission::Pass,
            Err(TunnResult::WriteToNetwork(cookie)) => Admission::Cookie(cookie.len()),
            Err(TunnResult::Err(WireGuardError::InvalidMac)) => Admission::Refused(Drop::BadMac),
            Err(_) => Admission::Refused(Drop::Garbage),
        }
    }

    /// The secret shared with a peer, worth keeping.
    pub(crate) fn shared_with(&self, public_key: &[u8; 32]) -> SharedSecret {
        self.opener.shared_with(public_key)
    }
}

/// Whose initiation this claims to be. It changes nothing and needs no engine: any worker can say where it belongs.
pub(crate) fn open_initiation(identity: &Identity, datagram: &[u8]) -> Option<Opened> {
    identity.opener.open(datagram)
}

/// Address and port as one address: a cookie is for both, and boringtun takes only the former (trap 5).
fn with_port(source: SocketAddr) -> IpAddr {
    let mut bytes = [0; 18];
    match source.ip() {
        IpAddr::V4(addr) => bytes[..4].copy_from_slice(&addr.octets()),
        IpAddr::V6(addr) => bytes[..16].copy_from_slice(&addr.octets()),
    }
    bytes[16..].copy_from_slice(&source.port().to_be_bytes());
    let digest: [u8; 16] = Blake2s128::digest(bytes).into();
    IpAddr::V6(Ipv6Addr::from(digest))
}

/// What a received message turned into.
pub(crate) enum Received {
    /// Authenticated and empty (or a cookie was stored).
    Nothing,
    /// An IP packet of this length lies in the buffer.
    Packet(usize),
    /// An answer of this length lies in the buffer.
    Answer(usize),
    Refused(Drop),
}

/// What the timers want.
pub(crate) enum Timers {
    Nothing,
    /// Send this many bytes of the buffer.
    Send(usize),
    /// The tunnel is of no use any more.
    Expired,
}

/// Noise state of one live peer, about 10 KB.
pub(crate) struct Tunnel {
    tunn: Tunn,
    updated_ms: u64,
    session: bool,
    exhausted: bool,
    wants_rekey: bool,
    /// The local index of a session we answered with, until the initiator uses it.
    unconfirmed: Option<u32>,
    /// When data was sent first after the last message received.
    unanswered_since_ms: Option<u64>,
    /// When data was received first after the last message sent. boringtun's timers take what happens between two of
    /// their updates for simultaneous, and owe nothing then.
    unconfirmed_since_ms: Option<u64>,
}

impl Tunnel {
    pub(crate) fn new(identity: &Identity, peer: &[u8; 32], psk: Option<&Secret>, index: u32, now_ms: u64) -> Self {
        let tunn = Tunn::new(
            identity.private.clone(),
            PublicKey::from(*peer),
            psk.map(|psk| *psk.0),
            None,
            index,
            Some(Arc::clone(&identity.inner)),
        );
        Self {
            tunn,
            updated_ms: now_ms,
            session: false,
            exhausted: false,
            wants_rekey: false,
            unconfirmed: None,
            unanswered_since_ms: None,
            unconfirmed_since_ms: None,
        }
    }

    /// Whether a packet can be encrypted now.
    pub(crate) fn has_session(&self) -> bool {
        self.session && !self.exhausted
    }

    /// Neither has it a session nor did we answer an initiation.
    pub(crate) fn awaits_session(&self) -> bool {
        !self.session && self.unconfirmed.is_none()
    }

    pub(crate) fn is_fresh(&self, now_ms: u64) -> bool {
        now_ms.saturating_sub(self.updated_ms) < FRESH_MS
    }

    /// Runs boringtun's timers. `room` must have at least [`MIN_ROOM`] bytes.
    pub(crate) fn update(&mut self, now_ms: u64, room: &mut [u8]) -> Timers {
        self.updated_ms = now_ms;
        let wants = match self.tunn.update_timers(room) {
            TunnResult::WriteToNetwork(message) => Timers::Send(message.len()),
            TunnResult::Err(WireGuardError::ConnectionExpired) => Timers::Expired,
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => Timers::Nothing,
        };
        self.look_for_session();
        let is_due = |since: Option<u64>, after: u64| since.is_some_and(|since| now_ms.saturating_sub(since) >= after);
        match wants {
            Timers::Send(len) if is_data(&room[..len]) => self.unconfirmed_since_ms = None,
            Timers::Nothing if is_due(self.unanswered_since_ms, UNANSWERED_MS) => {
                self.unanswered_since_ms = None;
                return self.initiate(room).map_or(Timers::Nothing, Timers::Send);
            }
            Timers::Nothing if is_due(self.unconfirmed_since_ms, UNCONFIRMED_MS) => {
                self.unconfirmed_since_ms = None;
                return self.encrypt(&[], room).map_or(Timers::Nothing, Timers::Send);
            }
            Timers::Nothing | Timers::Send(_) | Timers::Expired => {}
        }
        wants
    }

    /// Feeds one message; the caller has checked its type, and that `room` is at least as long as it and [`MIN_ROOM`].
    pub(crate) fn receive(&mut self, source: IpAddr, message: &[u8], room: &mut [u8]) -> Received {
        match self.tunn.decapsulate(Some(source), message, room) {
            TunnResult::Done => Received::Nothing,
            TunnResult::WriteToNetwork(answer) => Received::Answer(answer.len()),
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                self.unconfirmed_since_ms.get_or_insert(self.updated_ms);
                Received::Packet(packet.len())
            }
            TunnResult::Err(error) => Received::Refused(reason(&error)),
        }
    }

    /// An initiation was answered: the session exists once the initiator uses it.
    pub(crate) fn answered(&mut self, answer: &[u8]) {
        self.unconfirmed = index_at(answer, 4);
    }

    /// A response was accepted: we have a new session.
    pub(crate) fn established(&mut self) {
        self.session = true;
        self.exhausted = false;
        self.wants_rekey = false;
        self.unconfirmed = None;
        self.unanswered_since_ms = None;
    }

    /// A data message was authenticated. Returns true when this completes a handshake that the other side began.
    pub(crate) fn authenticated(&mut self, message: &[u8]) -> bool {
        self.unanswered_since_ms = None;
        if self.unconfirmed.is_some() && self.unconfirmed == index_at(message, 4) {
            self.established();
            return true;
        }
        if !self.session {
            self.look_for_session();
        }
        false
    }

    /// Encrypts a packet (or a keepalive when it is empty). Needs a session and `packet.len() + OVERHEAD` bytes.
    pub(crate) fn encrypt(&mut self, packet: &[u8], room: &mut [u8]) -> Option<usize> {
        if !self.has_session() || room.len() < MIN_ROOM.max(packet.len() + OVERHEAD) {
            return None;
        }
        let TunnResult::WriteToNetwork(message) = self.tunn.encapsulate(packet, room) else {
            return None;
        };
        self.unconfirmed_since_ms = None;
        if !packet.is_empty() {
            self.unanswered_since_ms.get_or_insert(self.updated_ms);
        }
        let counter = message.get(8..16).and_then(|c| c.try_into().ok()).map_or(u64::MAX, u64::from_le_bytes);
        if counter >= REKEY_AFTER_MESSAGES {
            self.wants_rekey = true;
            self.exhausted = counter >= REJECT_AFTER_MESSAGES - 1;
        }
        Some(message.len())
    }

    /// Whether so many messages were sent that a new session is due.
    pub(crate) fn take_wants_rekey(&mut self) -> bool {
        std::mem::take(&mut self.wants_rekey)
    }

    /// An initiation, unless one is under way. `room` must have at least [`MIN_ROOM`] bytes.
    pub(crate) fn initiate(&mut self, room: &mut [u8]) -> Option<usize> {
        match self.tunn.format_handshake_initiation(room, false) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => None,
        }
    }

    /// Another initiation although one is under way: an answer to either is accepted.
    pub(crate) fn initiate_again(&mut self, room: &mut [u8]) -> Option<usize> {
        match self.tunn.format_handshake_initiation(room, true) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => None,
        }
    }

    /// What boringtun queued by itself: only keepalives that fell due without a session.
    pub(crate) fn drain(&mut self, room: &mut [u8]) -> Option<usize> {
        match self.tunn.decapsulate(None, &[], room) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => None,
        }
    }

    fn look_for_session(&mut self) {
        self.session = self.tunn.time_since_last_handshake().is_some();
    }
}

fn is_data(message: &[u8]) -> bool {
    message.first() == Some(&4)
}

fn index_at(message: &[u8], at: usize) -> Option<u32> {
    let bytes = message.get(at..at + 4)?.try_into().ok()?;
    Some(u32::from_le_bytes(bytes))
}

fn reason(error: &WireGuardError) -> Drop {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter | WireGuardError::WrongTai64nTimestamp => {
            Drop::Replay
        }
        WireGuardError::NoCurrentSession | WireGuardError::WrongIndex => Drop::NoSession,
        WireGuardError::InvalidAeadTag => Drop::Decrypt,
        WireGuardError::InvalidPacket => Drop::Malformed,
        WireGuardError::InvalidMac => Drop::BadMac,
        WireGuardError::UnderLoad => Drop::UnderLoad,
        WireGuardError::DestinationBufferTooSmall
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::UnexpectedPacket
        | WireGuardError::WrongPacketType
        | WireGuardError::WrongKey
        | WireGuardError::InvalidTai64nTimestamp
        | WireGuardError::LockFailed
        | WireGuardError::ConnectionExpired => Drop::Handshake,
    }
}
