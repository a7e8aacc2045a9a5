//! Two UDP sockets on one port, IPv4 and IPv6, with segmentation offload both ways where the kernel has it.

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use quinn_udp::{EcnCodepoint, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol, Socket, Type};

use super::attempt::{Fate, Patience, Singly, Source, attempt};
use super::mailbox::ShellState;
use super::offloads::Offloads;
use super::{sockopt, steer};
use crate::drops::Drop;
use crate::ecn::Ecn;
use crate::engine::{Engine, Shard};
use crate::out::{Datagram, Out};

/// Datagram buffers of one receive call, each large enough for a GRO super-packet.
pub(crate) const BATCH: usize = 8;
pub(crate) const BUFFER_BYTES: usize = 65_536;

const RECEIVE_BUFFER: i32 = 8 * 1024 * 1024;
const SEND_BUFFER: i32 = 2 * 1024 * 1024;
/// The largest UDP payload that every kernel segments.
const MAX_RUN_BYTES: usize = 65_000;
const MAX_RUN_SEGMENTS: usize = 64;
/// How long a full socket may hold up the worker in one flush.
const SEND_PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };

struct Half {
    socket: Socket,
    state: UdpSocketState,
    v6: bool,
    allowed: Offloads,
    singly: Singly,
    /// A failure made quinn-udp give up offloads that work elsewhere.
    worn: bool,
}

/// Both sockets.
pub(crate) struct Sockets {
    v4: Option<Half>,
    v6: Option<Half>,
    port: u16,
}

impl Sockets {
    /// Binds both families to one port; 0 lets the kernel choose. Of several
    /// workers the first one binds first. A host without IPv6 (or IPv4) gets one socket.
    pub(crate) fn bind(port: u16, fwmark: u32, allowed: Offloads, shard: Shard) -> io::Result<Self> {
        const ATTEMPTS: usize = 10;
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for _ in 0..if port == 0 { ATTEMPTS } else { 1 } {
            match Self::bind_once(port, fwmark, allowed, shard) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
                other => return other,
            }
        }
        Err(last)
    }

    fn bind_once(port: u16, fwmark: u32, allowed: Offloads, shard: Shard) -> io::Result<Self> {
        let v4 = optional(Half::bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port), fwmark, allowed, shard))?;
        let bound = v4.as_ref().map(Half::port).transpose()?.unwrap_or(port);
        let v6 = optional(Half::bind(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), bound), fwmark, allowed, shard))?;
        let port = v6.as_ref().map(Half::port).transpose()?.unwrap_or(bound);
        Ok(Self { v4, v6, port })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn set_fwmark(&self, fwmark: u32) -> io::Result<()> {
        self.v4.iter().chain(&self.v6).try_for_each(|half| half.socket.set_mark(fwmark))
    }

    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.v4.iter().chain(&self.v6).map(|half| half.socket.as_fd())
    }

    pub(crate) fn describe(&self, shell: &mut ShellState) {
        let mut halves = self.v4.iter().chain(&self.v6);
        shell.udp_gso = halves.clone().all(|half| half.max_segments() > 1);
        shell.udp_gso_refused = halves.clone().map(|half| half.singly.paths()).sum();
        shell.udp_gro = halves.all(|half| half.allowed.udp_gro && half.state.gro_segments() > 1);
    }

    /// Datagrams that the kernel has dropped before they were received.
    pub(crate) fn dropped(&self) -> u64 {
        let halves = self.v4.iter().chain(&self.v6);
        halves.filter_map(|half| sockopt::dropped(&half.socket).ok()).map(u64::from).sum()
    }

    /// Receives from the sockets that are `ready`, in the order of [`Self::fds`], into `buffers` ([`BATCH`] ×
    /// [`BUFFER_BYTES`]), handing each datagram to `each`. What did not fill them has nothing more and is not ready any
    /// more; says whether anything is.
    ///
    /// # Errors
    /// That of the last socket that could not be read; the others were.
    pub(crate) fn receive(
        &self,
        ready: &mut [bool; 2],
        buffers: &mut [u8],
        mut each: impl FnMut(&[u8], &RecvMeta),
    ) -> io::Result<bool> {
        let (mut more, mut error) = (false, None);
        for (half, ready) in self.v4.iter().chain(&self.v6).zip(ready).filter(|(_, ready)| **ready) {
            let mut meta = [RecvMeta::default(); BATCH];
            let count = half.receive(buffers, &mut meta).unwrap_or_else(|failed| {
                error = Some(failed).filter(|failed| failed.kind() != io::ErrorKind::WouldBlock).or(error.take());
                0
            });
            *ready = count == BATCH;
            more |= *ready;
            for (buffer, meta) in buffers.chunks_exact(BUFFER_BYTES).zip(&meta).take(count) {
                // A super-packet may end with a shorter message of another kind: every segment is looked at.
                for segment in buffer[..meta.len].chunks(meta.stride.max(1)) {
                    each(segment, meta);
                }
                if meta.len == 0 {
                    each(&[], meta);
                }
            }
        }
        error.map_or(Ok(more), Err)
    }

    /// Sends all datagrams of `out`, runs to one endpoint in one call, and tells the engine what left.
    pub(crate) fn send(&mut self, out: &mut Out, engine: &mut Engine) {
        for half in self.v4.iter_mut().chain(&mut self.v6).filter(|half| half.worn) {
            half.mend();
        }
        let mut rest = out.net();
        let mut patience = Patience::Left;
        while let Some(first) = rest.first() {
            let half = if first.to.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
            let Some(half) = half else {
                lose(engine, std::slice::from_ref(first));
                rest = &rest[1..];
                continue;
            };
            let count = run(rest, half.max_segments());
            let (these, others) = rest.split_at(count);
            let size = if count > 1 && half.singly.takes(first.to.ip()) { 1 } else { count };
            for these in these.chunks(size) {
                half.send_run(these, out.net_bytes(), engine, &mut patience);
            }
            rest = others;
        }
        out.clear_net();
    }
}

/// The mark that the datagrams of a receive call arrived with.
pub(crate) fn ecn(meta: &RecvMeta) -> Ecn {
    match meta.ecn {
        None => Ecn::NotEct,
        Some(EcnCodepoint::Ect1) => Ecn::Ect1,
        Some(EcnCodepoint::Ect0) => Ecn::Ect0,
        Some(EcnCodepoint::Ce) => Ecn::Ce,
    }
}

fn codepoint(ecn: Ecn) -> Option<EcnCodepoint> {
    match ecn {
        Ecn::NotEct => None,
        Ecn::Ect1 => Some(EcnCodepoint::Ect1),
        Ecn::Ect0 => Some(EcnCodepoint::Ect0),
        Ecn::Ce => Some(EcnCodepoint::Ce),
    }
}

/// How many datagrams from the front can leave in one call.
fn run(datagrams: &[Datagram], max_segments: usize) -> usize {
    let first = &datagrams[0];
    let mut total = first.len;
    let mut count = 1;
    for next in &datagrams[1..] {
        let same = next.to == first.to && next.via == first.via && next.slot == first.slot && next.ecn == first.ecn;
        let kind = (next.inner == 0) == (first.inner == 0);
        total += next.len;
        if count >= max_segments || !same || !kind || next.len > first.len || total > MAX_RUN_BYTES {
            break;
        }
        count += 1;
        if next.len < first.len {
            break;
        }
    }
    count
}

fn optional(half: io::Result<Half>) -> io::Result<Option<Half>> {
    match half {
        Ok(half) => Ok(Some(half)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Half {
    fn bind(addr: SocketAddr, fwmark: u32, allowed: Offloads, shard: Shard) -> io::Result<Self> {
        let v6 = addr.is_ipv6();
        let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        if v6 {
            socket.set_only_v6(true)?;
        }
        if fwmark != 0 {
            socket.set_mark(fwmark)?;
        }
        if let Err(error) = sockopt::force_buffers(&socket, RECEIVE_BUFFER, SEND_BUFFER) {
            tracing::info!(%error, "socket buffers keep the host's limits");
        }
        if shard.index > 0 {
            steer::share_port(&socket)?;
        }
        socket.bind(&addr.into())?;
        if shard.index > 0 {
            steer::steer(&socket, shard.count)?;
        } else if shard.count > 1 {
            // Not before binding: no other program may have the port.
            steer::share_port(&socket)?;
        }
        let state = offloads(&socket, v6, allowed)?;
        Ok(Self { socket, state, v6, allowed, singly: Singly::default(), worn: false })
    }

    fn port(&self) -> io::Result<u16> {
        let addr = self.socket.local_addr()?.as_socket();
        addr.map(|addr| addr.port()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    fn receive(&self, buffers: &mut [u8], meta: &mut [RecvMeta; BATCH]) -> io::Result<usize> {
        let mut chunks = buffers.chunks_exact_mut(BUFFER_BYTES);
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().expect("the worker allocates BATCH buffers")));
        self.state.recv(UdpSockRef::from(&self.socket), &mut slices, meta)
    }

    fn send_run(&mut self, datagrams: &[Datagram], arena: &[u8], engine: &mut Engine, patience: &mut Patience) {
        let (mut unsticky, mut worn) = (false, false);
        let segments = self.state.max_gso_segments();
        let run = attempt(
            datagrams,
            |these, from| {
                let sent = self.transmit(these, arena, from, patience);
                worn |= sent.as_ref().is_err_and(|e| matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EIO)));
                sent
            },
            |these, fate| match fate {
                Fate::Left(Source::Via) => account(engine, these),
                Fate::Left(Source::Any) => {
                    account(engine, these);
                    engine.forget_local_address(these[0].slot);
                    unsticky = true;
                }
                Fate::Lost => lose(engine, these),
            },
        );
        self.singly.learn(datagrams[0].to.ip(), run);
        // quinn-udp gives offloads up for good, and may have sent what had failed by itself.
        self.worn |= worn || self.state.max_gso_segments() < segments;
        if unsticky {
            self.mend();
        }
    }

    fn mend(&mut self) {
        self.worn = false;
        match offloads(&self.socket, self.v6, self.allowed) {
            Ok(state) => self.state = state,
            Err(error) => tracing::debug!(%error, "offloads stay off"),
        }
    }

    /// Datagrams in one call.
    fn max_segments(&self) -> usize {
        if self.allowed.udp_gso { self.state.max_gso_segments().min(MAX_RUN_SEGMENTS) } else { 1 }
    }

    fn transmit(&self, datagrams: &[Datagram], arena: &[u8], from: Source, patience: &mut Patience) -> io::Result<()> {
        let (first, last) = (&datagrams[0], &datagrams[datagrams.len() - 1]);
        let via = match from {
            Source::Via => first.via,
            Source::Any => None,
        };
        let transmit = Transmit {
            destination: first.to,
            ecn: codepoint(first.ecn),
            contents: &arena[first.start..last.start + last.len],
            segment_size: (datagrams.len() > 1).then_some(first.len),
            src_ip: via.filter(|via| via.is_ipv6() == self.v6),
        };
        let send = || self.state.try_send(UdpSockRef::from(&self.socket), &transmit);
        let wait = || poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&SEND_PATIENCE));
        patience.send(send, || matches!(wait(), Ok(1..)))
    }
}

/// Counts what cannot be sent any more, or while there are no sockets.
pub(crate) fn give_up(out: &mut Out, engine: &mut Engine) {
    out.net().chunk_by(|one, other| one.slot == other.slot).for_each(|these| lose(engine, these));
    out.clear_net();
}

/// All of one peer. Handshakes and keepalives count without bytes: nothing from the TUN is in them.
fn lose(engine: &mut Engine, datagrams: &[Datagram]) {
    let bytes: usize = datagrams.iter().map(|datagram| datagram.inner).sum();
    engine.lost(Drop::TxSend, datagrams[0].slot, datagrams.len() as u64, bytes as u64);
}

fn account(engine: &mut Engine, datagrams: &[Datagram]) {
    let inner: usize = datagrams.iter().map(|datagram| datagram.inner).sum();
    let wire: usize = datagrams.iter().map(|datagram| datagram.len).sum();
    engine.sent(datagrams[0].slot, datagrams.len() as u64, inner as u64, wire as u64);
}

/// Turns offloads on, and off again what quinn-udp turns on besides.
fn offloads(socket: &Socket, v6: bool, allowed: Offloads) -> io::Result<UdpSocketState> {
    let state = UdpSocketState::new(UdpSockRef::from(socket))?;
    sockopt::allow_fragmentation(socket, v6)?;
    sockopt::disable_timestamps(socket)?;
    if !allowed.udp_gro && state.gro_segments() > 1 {
        sockopt::disable_gro(socket)?;
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::PeerChange;
    use crate::counters::CounterTable;
    use crate::drops::Dropped;
    use crate::engine::{EngineConfig, Now};
    use crate::out::NO_SLOT;

    #[test]
    fn what_cannot_be_sent_is_shown_at_the_peer_it_was_for() {
        let counters = CounterTable::anonymous(4, [1; 16]).unwrap();
        let mut engine = Engine::new(EngineConfig { counters, seed: 7 });
        let mut out = Out::default();
        for key in [2, 3] {
            let peer = PeerChange { public_key: [key; 32], ..PeerChange::default() };
            engine.apply_peer(Now::default(), peer, &mut out).unwrap();
        }
        let push = |out: &mut Out, slot, to: &str, len: usize| {
            out.net_room(len).unwrap();
            let start = out.net_start();
            out.push_net(Datagram { start, slot, ..datagram(to, len) });
        };
        // No datagram can go to port 0.
        let nowhere = "127.0.0.1:0";
        let to_all = |out: &mut Out| [0, 1, 1, NO_SLOT].map(|slot| push(out, slot, nowhere, 132));
        let mut sockets = Sockets::bind(0, 0, Offloads::without("").unwrap(), Shard::ALONE).unwrap();
        to_all(&mut out);
        push(&mut out, 0, &format!("127.0.0.1:{}", sockets.port()), 132);
        sockets.send(&mut out, &mut engine);
        to_all(&mut out);
        give_up(&mut out, &mut engine);
        assert!(out.net().is_empty());
        let shown = |engine: &Engine, at: usize| -> Vec<_> {
            engine.peers(0, 4).0[at].drops.iter().flat_map(|drops| drops.reasons().collect::<Vec<_>>()).collect()
        };
        assert_eq!((shown(&engine, 0), shown(&engine, 1)), (vec![(Drop::TxSend, 2)], vec![(Drop::TxSend, 4)]));
        assert_eq!(engine.device().drops.get(Drop::TxSend), Dropped { packets: 8, bytes: 800 });
        assert_eq!(engine.peers(0, 4).0[0].counts.tx_inner, 100);
    }

    #[test]
    fn what_the_kernel_drops_and_what_is_empty_is_seen() {
        const SENT: u64 = 1000;
        let sockets = Sockets::bind(0, 0, Offloads::without("").unwrap(), Shard::ALONE).unwrap();
        let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.connect(("127.0.0.1", sockets.port())).unwrap();
        sender.send(&[]).unwrap();
        for _ in 1..SENT {
            sender.send(&[7; 60_000]).unwrap();
        }
        let mut lengths = Vec::new();
        let (mut ready, mut buffers) = ([true; 2], vec![0; BATCH * BUFFER_BYTES]);
        while sockets.receive(&mut ready, &mut buffers, |datagram, _| lengths.push(datagram.len())).unwrap() {}
        assert_eq!((lengths[0], lengths[1]), (0, 60_000));
        assert!(sockets.dropped() > 0, "more was sent than the buffer holds");
        assert_eq!(lengths.len() as u64 + sockets.dropped(), SENT);
    }

    fn datagram(to: &str, len: usize) -> Datagram {
        Datagram { start: 0, len, to: to.parse().unwrap(), via: None, slot: 1, inner: len - 32, ecn: Ecn::NotEct }
    }

    #[test]
    fn a_run_is_one_endpoint_with_equal_lengths_and_perhaps_a_shorter_end() {
        let a = |len| datagram("192.0.2.1:1", len);
        let b = |len| datagram("192.0.2.2:1", len);
        assert_eq!(run(&[a(100), a(100), a(60), a(60)], 64), 3);
        assert_eq!(run(&[a(100), a(100), a(101)], 64), 2);
        assert_eq!(run(&[a(100), b(100)], 64), 1);
        assert_eq!(run(&[a(100); 100], 64), 64);
        assert_eq!(run(&[a(100); 100], 1), 1);
        assert_eq!(run(&[a(1452); 64], 64), MAX_RUN_BYTES / 1452);
        let keepalive = Datagram { inner: 0, ..a(32) };
        assert_eq!(run(&[a(100), keepalive], 64), 1, "counted apart");
        let marked = Datagram { ecn: Ecn::Ce, ..a(100) };
        assert_eq!(run(&[a(100), marked], 64), 1, "one call has one mark");
    }
}
