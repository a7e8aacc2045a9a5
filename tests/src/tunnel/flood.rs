//! Somebody who means harm: datagrams from a machine of the lab, as many as a small computer sends, until it is dropped.
//!
//! What is sent is drawn from a fixed seed. The flood pauses between bursts: it shall show what the server does with
//! what it gets, not how two processors are shared.

use std::io::Read;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use blake2::digest::Mac;
use blake2::digest::consts::U16;
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use rustix::event::{Timespec, poll};
use rustix::fd::AsFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::bench::endpoint_address;
use crate::internet::Noise;
use crate::lab::{Machine, eventually};

const BURST: usize = 64;
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 4_000_000 };
/// How many of the addresses in [`crate::bench::SOURCES`] a flood from everywhere has.
const SOURCES: u32 = 200;
const INITIATION: usize = 148;
const MAC1_AT: usize = 116;
const LARGEST: usize = 65_507;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hostility {
    /// Every type and every length.
    Garbage,
    /// Initiations that nothing is wrong with until they are decrypted, from one address.
    Initiations,
    /// The same from many addresses.
    SpoofedInitiations,
}

pub struct Flood {
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Floods `server`, of whom nothing but its public key is known.
    pub fn start(from: &Machine, server: SocketAddr, key: [u8; 32], hostility: Hostility) -> Result<Self> {
        let sources = if hostility == Hostility::SpoofedInitiations { SOURCES } else { 0 };
        if sources > 0 {
            from.sh(&format!("ip route replace local {} dev lo", crate::bench::SOURCES))?;
        }
        let network = from.network()?;
        let (sent, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, stopped) = (Arc::clone(&sent), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("flood".to_owned()).spawn(move || {
            let result = enter(network.as_fd())
                .and_then(|()| sockets(sources, server))
                .and_then(|sockets| run(&sockets, key, hostility, &counter, &stopped));
            if let Err(error) = result {
                eprintln!("the flood ended: {error:#}");
            }
        })?;
        Ok(Self { sent, stop, thread: Some(thread) })
    }

    /// How many datagrams were sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until `count` more were sent.
    pub fn sends(&self, count: u64) -> Result<()> {
        let goal = self.sent() + count;
        eventually("the flood goes on", 30, || {
            (self.sent() >= goal).then_some(()).ok_or_else(|| anyhow!("{} of {goal}", self.sent()))
        })
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

pub(super) fn enter(network: impl AsFd) -> Result<()> {
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).context("enter the machine's network")
}

fn sockets(sources: u32, server: SocketAddr) -> Result<Vec<UdpSocket>> {
    let unspecified = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let one = || UdpSocket::bind(unspecified).map(|socket| vec![socket]);
    let many =
        || (0..sources).map(|number| UdpSocket::bind((endpoint_address(number), 0))).collect::<std::io::Result<_>>();
    let sockets: Vec<UdpSocket> = if sources == 0 { one()? } else { many()? };
    for socket in &sockets {
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
    }
    Ok(sockets)
}

fn run(sockets: &[UdpSocket], key: [u8; 32], hostility: Hostility, sent: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    let mut noise = Noise::of(u64::MAX);
    let mut room = vec![0; LARGEST];
    let mut next = sockets.iter().cycle();
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            let datagram = match hostility {
                Hostility::Garbage => garbage(&mut noise, &mut room)?,
                Hostility::Initiations | Hostility::SpoofedInitiations => initiation(&mut noise, &key, &mut room)?,
            };
            let socket = next.next().context("there is a socket")?;
            // A full queue and a refusal by the other side are what a flood may meet.
            if socket.send(datagram).is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        poll(&mut [], Some(&PAUSE))?;
    }
    Ok(())
}

/// Lengths around those of the real messages for the most part; now and then the largest there is.
fn garbage<'a>(noise: &mut Noise, room: &'a mut [u8]) -> Result<&'a [u8]> {
    let mut choice = [0; 8];
    noise.read_exact(&mut choice)?;
    let length = match choice[0] {
        0 => LARGEST,
        1..=9 => usize::from(choice[1]) * 100,
        _ => usize::from(choice[1]),
    };
    noise.read_exact(&mut room[..length])?;
    if length >= 4 && choice[2] < 200 {
        room[..4].copy_from_slice(&[choice[2] % 6, 0, 0, 0]);
    }
    Ok(&room[..length])
}

/// Only its MAC1 is right (WireGuard paper, section 5.4.4).
fn initiation<'a>(noise: &mut Noise, key: &[u8; 32], room: &'a mut [u8]) -> Result<&'a [u8]> {
    noise.read_exact(&mut room[..MAC1_AT])?;
    room[..4].copy_from_slice(&[1, 0, 0, 0]);
    let label: [u8; 32] = Blake2s256::new().chain_update(b"mac1----").chain_update(key).finalize().into();
    let mut mac = <Blake2sMac<U16> as Mac>::new_from_slice(&label).context("32 bytes are a key")?;
    mac.update(&room[..MAC1_AT]);
    room[MAC1_AT..MAC1_AT + 16].copy_from_slice(&mac.finalize().into_bytes());
    room[MAC1_AT + 16..INITIATION].fill(0);
    Ok(&room[..INITIATION])
}

#[cfg(test)]
mod tests {
    use boringtun::noise::rate_limiter::RateLimiter;
    use boringtun::noise::{Packet, Tunn};
    use boringtun::x25519::{PublicKey, StaticSecret};

    use super::*;

    #[test]
    fn an_initiation_passes_its_servers_first_check() {
        let public = PublicKey::from(&StaticSecret::from([7; 32]));
        let mut room = [0; LARGEST];
        let message = initiation(&mut Noise::of(u64::MAX), public.as_bytes(), &mut room).unwrap();
        let mut answer = [0; INITIATION];
        let limiter = RateLimiter::new(&public, 10);
        assert!(matches!(limiter.verify_packet(None, message, &mut answer), Ok(Packet::HandshakeInit(_))));
        assert!(Tunn::parse_incoming_packet(message).is_ok());
        let other = RateLimiter::new(&PublicKey::from(&StaticSecret::from([8; 32])), 10);
        assert!(other.verify_packet(None, message, &mut answer).is_err());
    }

    #[test]
    fn garbage_has_every_length_there_is_room_for() {
        let (mut noise, mut room) = (Noise::of(u64::MAX), vec![0; LARGEST]);
        let lengths: Vec<usize> = (0..5000).map(|_| garbage(&mut noise, &mut room).unwrap().len()).collect();
        assert!(lengths.contains(&LARGEST) && lengths.contains(&0) && lengths.contains(&148));
    }
}
