//! What one pass of the engine produced: datagrams for the sockets and packets for the TUN, in reused buffers.
//!
//! Datagrams lie one behind the other, so that a run to one endpoint is one slice for segmentation offload; so do packets
//! for the TUN.

use std::net::{IpAddr, SocketAddr};

use crate::ecn::Ecn;

/// No peer: handshake replies to unknown places.
pub(crate) const NO_SLOT: u16 = u16::MAX;

/// All that the receive calls on two sockets may bring, behind what is there before it should be sent or written: it may all be
/// from peer to peer.
const NET_BYTES: usize = 2 * 1024 * 1024;
const TUN_BYTES: usize = 2 * 1024 * 1024;
const FLUSH_BYTES: usize = 256 * 1024;
const MAX_TUN_PACKETS: usize = 2048;

/// One datagram to send; its bytes are `Out::net_bytes()[start..start + len]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Where it starts in the arena.
    pub start: usize,
    /// Its length.
    pub len: usize,
    /// Where it goes.
    pub to: SocketAddr,
    /// The local address the peer knows us by.
    pub via: Option<IpAddr>,
    /// Whose counters it belongs to.
    pub slot: u16,
    /// IP bytes inside; 0 for handshakes and keepalives.
    pub inner: usize,
    /// The mark of the outer header.
    pub ecn: Ecn,
}

/// One packet for the TUN; its bytes are `Out::tun_bytes()[start..start + len]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunPacket {
    /// Where it starts in the arena.
    pub start: usize,
    /// Its length.
    pub len: usize,
    /// Whose counters it belongs to.
    pub slot: u16,
}

impl TunPacket {
    /// Its bytes, of those of all packets.
    #[must_use]
    pub fn of<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[self.start..self.start + self.len]
    }

    /// Packets as a pass would leave them: one behind the other.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn lay_out(packets: &[Vec<u8>]) -> (Vec<Self>, Vec<u8>) {
        let mut arena = Vec::new();
        let lay = |packet: &Vec<u8>| {
            let start = arena.len();
            arena.extend_from_slice(packet);
            Self { start, len: packet.len(), slot: 0 }
        };
        (packets.iter().map(lay).collect(), arena)
    }
}

/// The output of a pass.
#[derive(Debug)]
pub struct Out {
    arena: Vec<u8>,
    used: usize,
    net: Vec<Datagram>,
    tun_arena: Vec<u8>,
    tun_used: usize,
    tun: Vec<TunPacket>,
}

impl Default for Out {
    fn default() -> Self {
        Self {
            arena: vec![0; NET_BYTES],
            used: 0,
            net: Vec::with_capacity(1024),
            tun_arena: vec![0; TUN_BYTES],
            tun_used: 0,
            tun: Vec::with_capacity(1024),
        }
    }
}

impl Out {
    /// The datagrams in order.
    #[must_use]
    pub fn net(&self) -> &[Datagram] {
        &self.net
    }

    /// The arena the datagrams point into.
    #[must_use]
    pub fn net_bytes(&self) -> &[u8] {
        &self.arena
    }

    /// The packets for the TUN in order.
    #[must_use]
    pub fn tun(&self) -> &[TunPacket] {
        &self.tun
    }

    /// The arena the packets for the TUN point into.
    #[must_use]
    pub fn tun_bytes(&self) -> &[u8] {
        &self.tun_arena
    }

    /// Forgets all datagrams.
    pub fn clear_net(&mut self) {
        self.net.clear();
        self.used = 0;
    }

    /// Forgets all packets for the TUN.
    pub fn clear_tun(&mut self) {
        self.tun.clear();
        self.tun_used = 0;
    }

    /// Whether the shell should send before it feeds more.
    #[must_use]
    pub fn wants_flush(&self) -> bool {
        self.used > FLUSH_BYTES || self.tun_used > FLUSH_BYTES || self.tun.len() > MAX_TUN_PACKETS / 4
    }

    /// Room for a datagram of up to `len` bytes.
    pub(crate) fn net_room(&mut self, len: usize) -> Option<&mut [u8]> {
        self.arena.get_mut(self.used..self.used + len)
    }

    /// Takes what was written into [`Self::net_room`].
    pub(crate) fn push_net(&mut self, datagram: Datagram) {
        self.used += datagram.len;
        self.net.push(datagram);
    }

    pub(crate) fn net_start(&self) -> usize {
        self.used
    }

    /// Room for a packet of up to `len` bytes.
    pub(crate) fn tun_room(&mut self, len: usize) -> Option<&mut [u8]> {
        if self.tun.len() == MAX_TUN_PACKETS {
            return None;
        }
        self.tun_arena.get_mut(self.tun_used..self.tun_used + len)
    }

    /// The first `len` bytes written into [`Self::tun_room`].
    pub(crate) fn tun_written(&mut self, len: usize) -> &mut [u8] {
        &mut self.tun_arena[self.tun_used..self.tun_used + len]
    }

    /// Takes the first `len` bytes of what was written into [`Self::tun_room`].
    pub(crate) fn push_tun(&mut self, len: usize, slot: u16) {
        self.tun.push(TunPacket { start: self.tun_used, len, slot });
        self.tun_used += len;
    }
}
