//! Packets for the TUN that continue each other, merged into one that the kernel takes at once.

use std::io;

use tun_rs::{ExpandBuffer, GROTable, VirtioNetHdr};

use crate::out::{TUN_HEADROOM, TunPacket};

/// The largest packet the TUN takes.
pub(super) const MAX_PACKET: usize = 65_535;
/// No virtio header begins like this: what still does after merging was merged into another packet.
const MERGED: u8 = 0xff;

/// Merges packets in place and writes the headers of those that are left.
///
/// # Errors
/// Only if a buffer has no room for the header.
pub(crate) fn merge(gro: &mut GROTable, packets: &mut [TunPacket], uso: bool) -> io::Result<()> {
    for packet in &mut *packets {
        packet.buf[0] = MERGED;
    }
    gro.apply_gro(packets, TUN_HEADROOM, uso)
}

/// Whether the packet is part of another one now.
pub(crate) fn is_merged(packet: &TunPacket) -> bool {
    packet.buf[0] == MERGED
}

/// How many packets a (merged) packet for the TUN stands for, and their bytes.
pub(crate) struct Group {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

pub(crate) fn group(buf: &[u8]) -> Group {
    let len = (buf.len() - TUN_HEADROOM) as u64;
    let single = Group { packets: 1, bytes: len };
    let Ok(header) = VirtioNetHdr::decode(&buf[..TUN_HEADROOM]) else {
        return single;
    };
    let (headers, segment) = (u64::from(header.hdr_len), u64::from(header.gso_size));
    if header.gso_type == 0 || segment == 0 || len <= headers {
        return single;
    }
    let packets = (len - headers).div_ceil(segment);
    Group { packets, bytes: len + (packets - 1) * headers }
}

impl AsRef<[u8]> for TunPacket {
    fn as_ref(&self) -> &[u8] {
        &self.buf
    }
}

impl AsMut<[u8]> for TunPacket {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.buf
    }
}

impl ExpandBuffer for TunPacket {
    fn buf_capacity(&self) -> usize {
        // A vector grows.
        TUN_HEADROOM + MAX_PACKET
    }

    fn buf_resize(&mut self, new_len: usize, value: u8) {
        self.buf.resize(new_len, value);
    }

    fn buf_extend_from_slice(&mut self, src: &[u8]) {
        self.buf.extend_from_slice(src);
    }
}
