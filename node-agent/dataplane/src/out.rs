//! What one pass of the engine produced: datagrams for the sockets and packets for the TUN, in reused buffers.
//!
//! Datagrams lie one behind the other, so that a run to one endpoint is one slice for segmentation offload. Packets for
//! the TUN have room in front for the virtio header.

use std::net::{IpAddr, SocketAddr};

use crate::ecn::Ecn;

/// Room in front of every packet for the TUN (`VIRTIO_NET_HDR_LEN`).
pub(crate) const TUN_HEADROOM: usize = 10;
/// No peer: handshake replies to unknown places.
pub(crate) const NO_SLOT: u16 = u16::MAX;

const NET_BYTES: usize = 512 * 1024;
const MAX_TUN_PACKETS: usize = 2048;
/// Merged packets grow to 64 KB: keeping this many such buffers costs 8 MB.
const MAX_LARGE_BUFFERS: usize = 128;
const LARGE_BUFFER: usize = 4096;

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

/// One packet for the TUN.
#[derive(Debug, Default)]
pub struct TunPacket {
    /// Headroom and the packet.
    pub buf: Vec<u8>,
    /// Whose counters it belongs to.
    pub slot: u16,
    /// Its buffer grew by merging and is kept.
    large: bool,
}

/// The output of a pass.
#[derive(Debug)]
pub struct Out {
    arena: Vec<u8>,
    used: usize,
    net: Vec<Datagram>,
    tun: Vec<TunPacket>,
    tun_used: usize,
    large: usize,
}

impl Default for Out {
    fn default() -> Self {
        Self {
            arena: vec![0; NET_BYTES],
            used: 0,
            net: Vec::with_capacity(1024),
            tun: Vec::new(),
            tun_used: 0,
            large: 0,
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
        &self.tun[..self.tun_used]
    }

    /// The same, to be merged in place.
    pub fn tun_mut(&mut self) -> &mut [TunPacket] {
        &mut self.tun[..self.tun_used]
    }

    /// Forgets all datagrams.
    pub fn clear_net(&mut self) {
        self.net.clear();
        self.used = 0;
    }

    /// Forgets all packets; their buffers are kept, but only a few of those that grew by merging.
    pub fn clear_tun(&mut self) {
        for packet in &mut self.tun[..self.tun_used] {
            if packet.large || packet.buf.capacity() <= LARGE_BUFFER {
                continue;
            }
            if self.large < MAX_LARGE_BUFFERS {
                self.large += 1;
                packet.large = true;
            } else {
                packet.buf = Vec::new();
            }
        }
        self.tun_used = 0;
    }

    /// Whether the shell should send before it feeds more.
    #[must_use]
    pub fn wants_flush(&self) -> bool {
        self.used > NET_BYTES / 2 || self.tun_used > MAX_TUN_PACKETS / 4
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
        if self.tun_used == MAX_TUN_PACKETS {
            return None;
        }
        if self.tun_used == self.tun.len() {
            self.tun.push(TunPacket::default());
        }
        let buf = &mut self.tun[self.tun_used].buf;
        buf.resize(TUN_HEADROOM + len, 0);
        Some(&mut buf[TUN_HEADROOM..])
    }

    /// The first `len` bytes written into [`Self::tun_room`].
    pub(crate) fn tun_written(&mut self, len: usize) -> &mut [u8] {
        &mut self.tun[self.tun_used].buf[TUN_HEADROOM..TUN_HEADROOM + len]
    }

    /// Takes the first `len` bytes of what was written into [`Self::tun_room`].
    pub(crate) fn push_tun(&mut self, len: usize, slot: u16) {
        let packet = &mut self.tun[self.tun_used];
        packet.buf.truncate(TUN_HEADROOM + len);
        packet.slot = slot;
        self.tun_used += 1;
    }
}
