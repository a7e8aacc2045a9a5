//! Many live tunnels in one thread: every peer sends an echo request each 20 ms and notes when answers come.
//!
//! Hundreds of wireguard-go processes would measure the computer. These peers are boringtun's, one UDP socket each.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;

use super::Keys;
use super::flood::enter;
use crate::lab::{Machine, eventually};

const INTERVAL: Duration = Duration::from_millis(20);
/// As boringtun wants its timers called.
const TIMERS: Duration = Duration::from_millis(250);
const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
const ROOM: usize = 2048;

/// The peers run until it is dropped.
pub struct Load {
    shared: Arc<Shared>,
    keys: Vec<Keys>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    answers: Mutex<Vec<Answers>>,
}

impl Shared {
    fn answers(&self) -> MutexGuard<'_, Vec<Answers>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone, Copy, Default)]
struct Answers {
    count: u64,
    last: Option<Instant>,
    longest_gap: Duration,
}

impl Load {
    /// The inner address of a peer: 10.8.1.1 and on.
    #[must_use]
    pub fn address(number: usize) -> Ipv4Addr {
        let first = u32::from(Ipv4Addr::new(10, 8, 1, 1));
        Ipv4Addr::from(first + u32::try_from(number).expect("a few hundred"))
    }

    /// `count` peers of `server`, whose address inside the tunnel is `gateway`, begin to send.
    pub fn start(
        from: &Machine,
        count: usize,
        server: SocketAddr,
        server_keys: &Keys,
        gateway: Ipv4Addr,
    ) -> Result<Self> {
        let secrets = (0..count).map(secret).collect::<Vec<_>>();
        let keys = secrets.iter().map(Keys::of).collect();
        let public = PublicKey::from(server_keys.public_bytes());
        let shared =
            Arc::new(Shared { stop: AtomicBool::new(false), answers: Mutex::new(vec![Answers::default(); count]) });
        let (network, of_thread) = (from.network()?, Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("load".to_owned()).spawn(move || {
            let result = enter(network.as_fd())
                .and_then(|()| {
                    let peers = secrets.into_iter().enumerate();
                    peers.map(|(number, secret)| Peer::new(number, secret, public, server, gateway)).collect()
                })
                .and_then(|peers| run(peers, &of_thread));
            if let Err(error) = result {
                eprintln!("the load ended: {error:#}");
            }
        })?;
        Ok(Self { shared, keys, thread: Some(thread) })
    }

    /// The keys that [`Load::start`] gives to its first `count` peers.
    #[must_use]
    pub fn keys(count: usize) -> Vec<Keys> {
        (0..count).map(|number| Keys::of(&secret(number))).collect()
    }

    /// What a server is told of them, all in their life `generation`.
    #[must_use]
    pub fn as_peers(keys: &[Keys], generation: u64) -> String {
        let peer = |(number, keys): (usize, &Keys)| {
            format!(
                "public_key={}\nreplace_allowed_ips=true\nallowed_ip={}/32\ncvault_generation={generation}\n",
                keys.public_hex,
                Self::address(number)
            )
        };
        keys.iter().enumerate().map(peer).collect()
    }

    /// Waits until each of the first `count` peers has got `answers` more answers.
    pub fn answered(&self, count: usize, answers: u64, seconds: u64) -> Result<()> {
        let counts = || self.shared.answers().iter().take(count).map(|peer| peer.count).collect::<Vec<_>>();
        let before = counts();
        eventually("every peer's echoes are answered", seconds, || {
            let missing = before.iter().zip(counts()).filter(|(before, now)| now < &(*before + answers)).count();
            ensure!(missing == 0, "{missing} of {} peers without", self.keys.len());
            Ok(())
        })
    }

    /// Gaps are measured anew from the last answer before now.
    pub fn forget_gaps(&self) {
        self.shared.answers().iter_mut().for_each(|peer| peer.longest_gap = Duration::ZERO);
    }

    /// The longest time between two answers of each of the first `count` peers, in seconds.
    #[must_use]
    pub fn gaps(&self, count: usize) -> Vec<f64> {
        self.shared.answers().iter().take(count).map(|peer| peer.longest_gap.as_secs_f64()).collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

fn secret(number: usize) -> StaticSecret {
    crate::bench::GeneratedPeer::numbered(u32::try_from(number).expect("a few hundred")).secret
}

struct Peer {
    tunnel: Tunn,
    socket: UdpSocket,
    echo: Vec<u8>,
}

impl Peer {
    fn new(
        number: usize,
        secret: StaticSecret,
        server_key: PublicKey,
        server: SocketAddr,
        gateway: Ipv4Addr,
    ) -> Result<Self> {
        let index = u32::try_from(number)?;
        let socket = UdpSocket::bind("0.0.0.0:0").context("open a socket")?;
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
        let tunnel = Tunn::new(secret, server_key, None, None, index, None);
        Ok(Self { tunnel, socket, echo: echo_request(Load::address(number), gateway) })
    }

    /// A server that is just starting refuses, and a full queue loses: both are what the echoes are to show.
    fn send(&self, datagram: &[u8]) {
        let _ = self.socket.send(datagram);
    }

    fn send_echo(&mut self, room: &mut [u8]) {
        if let TunnResult::WriteToNetwork(datagram) = self.tunnel.encapsulate(&self.echo, room) {
            let _ = self.socket.send(datagram);
        }
    }

    fn update_timers(&mut self, room: &mut [u8]) {
        if let TunnResult::WriteToNetwork(datagram) = self.tunnel.update_timers(room) {
            let _ = self.socket.send(datagram);
        }
    }

    /// How many answers there were.
    fn receive(&mut self, room: &mut [u8]) -> u64 {
        let mut answers = 0;
        let mut datagram = [0; ROOM];
        while let Ok(length) = self.socket.recv(&mut datagram) {
            let mut next = &datagram[..length];
            loop {
                match self.tunnel.decapsulate(None, next, room) {
                    TunnResult::WriteToNetwork(reply) => {
                        let reply = reply.to_vec();
                        self.send(&reply);
                        // What it had queued until there was a session comes with further calls.
                        next = &[];
                    }
                    TunnResult::WriteToTunnelV4(..) => {
                        answers += 1;
                        break;
                    }
                    TunnResult::WriteToTunnelV6(..) | TunnResult::Done | TunnResult::Err(_) => break,
                }
            }
        }
        answers
    }
}

fn run(mut peers: Vec<Peer>, shared: &Shared) -> Result<()> {
    let mut room = vec![0; ROOM];
    let (mut echo_at, mut timers_at) = (Instant::now(), Instant::now());
    while !shared.stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        if now >= echo_at {
            echo_at = now + INTERVAL;
            peers.iter_mut().for_each(|peer| peer.send_echo(&mut room));
        }
        if now >= timers_at {
            timers_at = now + TIMERS;
            peers.iter_mut().for_each(|peer| peer.update_timers(&mut room));
        }
        let mut waiting: Vec<PollFd<'_>> = peers.iter().map(|peer| PollFd::new(&peer.socket, PollFlags::IN)).collect();
        poll(&mut waiting, Some(&WAIT))?;
        let ready: Vec<bool> = waiting.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (number, (peer, ready)) in peers.iter_mut().zip(ready).enumerate() {
            let answers = if ready { peer.receive(&mut room) } else { 0 };
            if answers > 0 {
                shared.answers()[number].note(answers);
            }
        }
    }
    Ok(())
}

impl Answers {
    fn note(&mut self, answers: u64) {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            self.longest_gap = self.longest_gap.max(now - last);
        }
        self.count += answers;
    }
}

/// IPv4 without options and an ICMP echo request of eight bytes (RFC 791, RFC 792).
fn echo_request(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 36, 0, 0, 0x40, 0, 64, 1, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    let header = checksum(&packet);
    packet[10..12].copy_from_slice(&header);
    let mut message = vec![8, 0, 0, 0, 0, 1, 0, 1];
    message.extend([0x5a; 8]);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);
    packet.extend(message);
    packet
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).expect("folded to 16 bits")).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_request_checks_out() {
        let packet = echo_request(Load::address(0), Ipv4Addr::new(10, 8, 0, 1));
        assert_eq!(packet.len(), 36);
        assert_eq!(checksum(&packet[..20]), [0, 0]);
        assert_eq!(checksum(&packet[20..]), [0, 0]);
        assert_eq!(Load::address(300).to_string(), "10.8.2.45");
    }
}
