//! Datagrams to an engine with a live tunnel: anything at all, and messages of a peer that has the keys.
//!
//! The peer is a bare [`Tunnel`], so that it can encrypt what no engine would. Whatever comes, each datagram is counted,
//! the endpoint follows only what is authentic, what reaches the TUN is what the peer sent from its own addresses and
//! reaches it once, and at the end the session that was there still carries a packet.

use std::net::{IpAddr, SocketAddr};

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};

use super::input::Input;
use super::server::Server;
use crate::change::{PeerChange, Secret};
use crate::ecn::Ecn;
use crate::engine::{Origin, PeerView};
use crate::noise::{Agreed, Seed, Shared};
use crate::packet;
use crate::tunnel::{Identity, MIN_ROOM, OVERHEAD, Received, Stamp, Tunnel};

const PLACES: [&str; 4] = ["198.51.100.7:40000", "198.51.100.7:40001", "203.0.113.9:50000", "[2001:db8::9]:50000"];
const OWN: [&str; 2] = ["10.8.0.2", "fd00:cafe::2"];
const TENANT: [u8; 16] = [1; 16];
const MAX_STEPS: usize = 32;
const MAX_DATAGRAM: usize = 65_507;
/// A session is good for a little longer.
const SESSION_MS: u64 = 170_000;
/// Indices are 24 bits of a peer and 8 of a session.
const CLIENT_INDEX: u32 = 7;

/// One byte of settings, and steps: a number and what belongs to it.
pub fn datagram(input: &[u8]) {
    let mut input = Input(input);
    let Some(settings) = input.byte() else {
        return;
    };
    let mut net = Net::connected(settings);
    for _ in 0..MAX_STEPS {
        if net.step(&mut input).is_none() {
            break;
        }
    }
    net.still_works();
    net.server.end();
}

struct Net {
    server: Server,
    server_key: [u8; 32],
    client_key: [u8; 32],
    identity: Identity,
    /// Between the two static keys.
    shared: Shared,
    client: Tunnel,
    /// Every datagram that came to the engine, for replays.
    seen: Vec<Vec<u8>>,
    /// Encrypted and not delivered yet.
    sent: Vec<Vec<u8>>,
    delivered_bytes: u64,
    endpoint: Option<SocketAddr>,
    renewed_ms: u64,
}

impl Net {
    fn connected(settings: u8) -> Self {
        let (server, client) = (Secret::new([1; 32]), Secret::new([2; 32]));
        let psk = (settings & 1 == 1).then(|| Secret::new([3; 32]));
        let identity = Identity::new(&client, Seed::random());
        let (server_key, client_key) = (Identity::new(&server, Seed::random()).public_key(), identity.public_key());
        let mut engines = Server::new(1 + u16::from(settings >> 2 & 1), &server);
        let own = OWN.map(|addr| addr.parse::<IpAddr>().expect("an address").into());
        let neighbour = "10.8.0.3/32".parse().expect("a prefix");
        for (at, (public_key, allowed_ips)) in
            [(client_key, own.to_vec()), ([9; 32], vec![neighbour])].into_iter().enumerate()
        {
            let preshared_key = psk.clone();
            let tenant = (settings & 2 == 0).then_some(TENANT);
            let change = PeerChange { public_key, preshared_key, tenant, allowed_ips, ..PeerChange::default() };
            engines.peer(at, change);
        }
        let shared = identity.shared_with(&server_key).expect("a good key");
        let client = Tunnel::new(
            &identity,
            &server_key,
            psk.as_ref(),
            shared.clone(),
            CLIENT_INDEX,
            Stamp::default(),
            engines.now,
        );
        let (seen, sent) = (Vec::new(), Vec::new());
        let (delivered_bytes, endpoint) = (0, None);
        let mut net = Self {
            server: engines,
            server_key,
            client_key,
            identity,
            shared,
            client,
            seen,
            sent,
            delivered_bytes,
            endpoint,
            renewed_ms: 0,
        };
        let mut room = [0; MIN_ROOM];
        let len = net.client.initiate(net.server.now, &mut room).expect("the first");
        net.receive(&room[..len], 0);
        net.still_works();
        net
    }

    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let (kind, place) = (input.byte()?, input.byte()?);
        let place = usize::from(place) % PLACES.len();
        match kind % 11 {
            0 => {
                let bytes = input.chunk()?;
                self.receive(bytes, place);
            }
            1 => self.forged(input, place)?,
            2 => {
                let inner = input.chunk()?.to_vec();
                let is_packet = !inner.is_empty();
                let message = self.encrypt(inner);
                let (before, drops) = (self.delivered_bytes, self.server.drops());
                self.receive(&message, place);
                let counted = self.delivered_bytes > before || self.server.drops() > drops;
                assert_eq!(counted, is_packet, "delivered or dropped, unless it is a keepalive");
            }
            3 => {
                let (at, flip) = (input.word()?, input.byte()?.max(1));
                let inner = input.chunk()?.to_vec();
                let mut message = self.encrypt(inner);
                let at = usize::from(at) % message.len();
                message[at] ^= flip;
                let before = self.delivered_bytes;
                self.receive(&message, place);
                assert_eq!(self.delivered_bytes, before, "byte {at} was changed by {flip:#x}");
                message[at] ^= flip;
                self.seen.push(message);
            }
            4 => self.initiation(input, place)?,
            5 => {
                let (number, cut, more) = (input.byte()?, input.word()?, input.byte()?);
                let mut message = self.seen.get(usize::from(number) % self.seen.len().max(1))?.clone();
                message.truncate(message.len().saturating_sub(usize::from(cut)));
                message.extend(std::iter::repeat_n(more, usize::from(more)));
                self.receive(&message, place);
            }
            6 => {
                let number = usize::from(input.byte()?);
                let message = self.seen.get(number % self.seen.len().max(1))?.clone();
                self.receive(&message, place);
            }
            7 => {
                let ms = input.word()?;
                self.server.tick(ms.into());
            }
            8 => self.server.tun(place, input.chunk()?),
            9 => {
                let down = packet("192.0.2.99", OWN[0], input.bytes(1400));
                self.server.tun(place, &down);
            }
            _ => {
                let (first, fill, len) = (input.byte()?, input.byte()?, input.word()?);
                let mut message = vec![fill; usize::from(len).min(MAX_DATAGRAM)];
                message.iter_mut().take(1).for_each(|byte| *byte = first);
                self.receive(&message, place);
            }
        }
        self.settle();
        Some(())
    }

    /// A message of a length that its type has, to a session that lives; the rest from the fuzzer.
    fn forged(&mut self, input: &mut Input<'_>, place: usize) -> Option<()> {
        let (kind, session, body) = (input.byte()?, input.byte()?, input.chunk()?);
        let live = self.seen.iter().rev().find(|message| message.len() >= OVERHEAD && message[0] == 4)?;
        let index = [session, live[5], live[6], live[7]];
        let (kind, len, at) = match kind % 4 {
            0 => (1, 148, 4),
            1 => (2, 92, 8),
            2 => (3, 64, 4),
            _ => (4, body.len().max(16) + 16, 4),
        };
        let mut message = vec![0; len];
        message[0] = kind;
        message[at..at + 4].copy_from_slice(&index);
        let start = at + 4;
        let filled = body.len().min(len - start);
        message[start..start + filled].copy_from_slice(&body[..filled]);
        if kind < 3 && session & 1 == 1 {
            self.sign(&mut message);
        }
        self.receive(&message, place);
        Some(())
    }

    /// Of the peer itself; perhaps with something changed, and then perhaps with a MAC1 that is right again.
    fn initiation(&mut self, input: &mut Input<'_>, place: usize) -> Option<()> {
        let (at, flip, signed) = (input.byte()?, input.byte()?, input.byte()?);
        let mut room = [0; MIN_ROOM];
        let len = self.client.initiate_again(self.server.now, &mut room)?;
        let message = &mut room[..len];
        message[usize::from(at) % len] ^= flip;
        if signed & 1 == 1 {
            self.sign(message);
        }
        let message = message.to_vec();
        self.receive(&message, place);
        Some(())
    }

    /// Corrects MAC1: whoever knows the public key can.
    fn sign(&self, message: &mut [u8]) {
        let key = Blake2s256::new().chain(b"mac1----").chain(self.server_key).finalize_fixed();
        let end = message.len() - 32;
        let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).expect("a key of 32 bytes");
        let mac = mac.chain(&message[..end]).finalize_fixed();
        message[end..end + 16].copy_from_slice(&mac);
    }

    fn encrypt(&mut self, inner: Vec<u8>) -> Vec<u8> {
        self.renew();
        let mut room = vec![0; MIN_ROOM.max(inner.len() + OVERHEAD)];
        let len = self.client.encrypt(&inner, 0, &mut room).expect("a session");
        room.truncate(len);
        self.sent.push(inner);
        room
    }

    /// To the engine, and all that follows.
    fn receive(&mut self, message: &[u8], place: usize) {
        let from = PLACES[place].parse().expect("an address");
        let before = self.view();
        let drops = self.server.drops();
        self.server.udp(place, message, Origin { from, to: None, ecn: Ecn::NotEct });
        let after = self.view();
        let taken = after.counts.rx_wire - before.counts.rx_wire;
        assert!(taken == 0 || taken == message.len() as u64);
        assert!(taken > 0 || self.server.drops() > drops, "neither taken nor dropped: {message:02x?}");
        if taken > 0 && message[0] != 1 {
            self.endpoint = Some(from);
        }
        assert_eq!(after.endpoint, self.endpoint, "only what is authentic moves it");
        if self.seen.len() < MAX_STEPS {
            self.seen.push(message.to_vec());
        }
        self.settle();
    }

    /// Takes what the engine gave out, until it says nothing more.
    fn settle(&mut self) {
        self.deliver();
        for (_, message) in self.server.sent() {
            self.answer(&message);
        }
    }

    /// What the peer says to that.
    fn answer(&mut self, message: &[u8]) {
        let mut room = vec![0; MIN_ROOM.max(message.len())];
        let now = self.server.now;
        let index = |at: usize| u32::from_le_bytes(message[at..at + 4].try_into().expect("four bytes"));
        let len = match message[0] {
            1 => (self.identity.open_all(&[message]).pop().flatten())
                .and_then(|opened| opened.prove(&self.shared, message))
                .and_then(|proved| Agreed::all(&[proved]).pop().flatten())
                .and_then(|agreed| self.client.answer(now, &agreed, &mut room)),
            2 => match self.client.finish(now, index(8), message) {
                Ok(()) => self.client.encrypt(&[], 0, &mut room),
                Err(_) => None,
            },
            3 => {
                self.client.take_cookie(now, message);
                None
            }
            _ => {
                let (Received::Nothing | Received::Packet(_) | Received::Refused(_), _) =
                    self.client.receive(index(4), message, &mut room);
                None
            }
        };
        if let Some(len) = len {
            self.receive(&room[..len], 0);
        }
    }

    fn deliver(&mut self) {
        for packet in self.server.delivered() {
            let addresses = packet::addresses(&packet).expect("only well-formed packets");
            assert!(OWN.contains(&addresses.source.to_string().as_str()), "{}", addresses.source);
            // Padding behind the packet stays behind.
            let sent = self.sent.iter().position(|sent| sent.starts_with(&packet));
            self.sent.swap_remove(sent.expect("it was sent, and not delivered before"));
            self.delivered_bytes += packet.len() as u64;
        }
        assert_eq!(self.view().counts.rx_inner, self.delivered_bytes);
    }

    fn still_works(&mut self) {
        for source in OWN {
            let destination = if source.contains(':') { "2001:db8::1" } else { "192.0.2.99" };
            let inner = packet(source, destination, b"still here");
            let (len, before) = (inner.len() as u64, self.delivered_bytes);
            let message = self.encrypt(inner);
            self.receive(&message, 0);
            assert_eq!(self.delivered_bytes, before + len, "the tunnel does not deliver any more");
        }
    }

    /// Time may have passed: the session is dead at an age that the peer, which has no timers here, does not notice.
    fn renew(&mut self) {
        let now = self.server.now;
        let mut room = [0; MIN_ROOM];
        if now.mono_ms - self.renewed_ms < SESSION_MS {
            return;
        }
        if let Some(len) = self.client.initiate_again(now, &mut room) {
            self.renewed_ms = now.mono_ms;
            let message = room[..len].to_vec();
            self.receive(&message, 0);
        }
    }

    fn view(&mut self) -> PeerView {
        self.server.view(&self.client_key)
    }
}

/// A packet without transport header.
fn packet(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    let addr = |addr: &str| addr.parse::<IpAddr>().expect("an address");
    let mut packet = match (addr(source), addr(destination)) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let total = u16::try_from(20 + payload.len()).expect("a short payload").to_be_bytes();
            let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 253, 0, 0];
            header.extend(source.octets().into_iter().chain(destination.octets()));
            header
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let len = u16::try_from(payload.len()).expect("a short payload").to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, len[0], len[1], 59, 64];
            header.extend(source.octets().into_iter().chain(destination.octets()));
            header
        }
        _ => unreachable!("one family"),
    };
    packet.extend(payload);
    packet
}
