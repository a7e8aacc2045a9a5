//! Packets for the TUN that continue each other, merged into one that the kernel takes at once.

use std::io;

use tun_rs::{ExpandBuffer, GROTable, VirtioNetHdr};

use crate::out::{TUN_HEADROOM, TunPacket};

/// The largest packet the TUN takes.
pub(super) const MAX_PACKET: usize = 65_535;
/// No virtio header begins like this: what still does after merging was merged into another packet.
const MERGED: u8 = 0xff;

/// The datagrams that every kernel takes as one (`UDP_MAX_SEGMENTS`; newer ones take 128).
pub(crate) const MAX_SEGMENTS: usize = 64;
/// Of larger ones fewer than that fill the largest packet.
const SMALL: usize = MAX_PACKET / MAX_SEGMENTS + 48;
const UDP: u8 = 17;
/// How many flows are told apart when datagrams are counted: those that are not are merged a little less.
const FLOWS: usize = 64;

/// Merges packets in place and writes the headers of those that are left.
///
/// # Errors
/// Only if a buffer has no room for the header.
pub(crate) fn merge(gro: &mut GROTable, mut packets: &mut [TunPacket], uso: bool) -> io::Result<()> {
    for packet in &mut *packets {
        packet.buf[0] = MERGED;
    }
    while !packets.is_empty() {
        let (run, rest) = packets.split_at_mut(run_length(packets));
        gro.apply_gro(run, TUN_HEADROOM, uso)?;
        packets = rest;
    }
    Ok(())
}

/// How many packets may be merged at a time, so that no datagrams become one that the kernel refuses.
fn run_length(packets: &[TunPacket]) -> usize {
    let mut counts = [0; FLOWS];
    for (at, packet) in packets.iter().enumerate() {
        let Some(flow) = small_datagram(&packet.buf[TUN_HEADROOM..]) else {
            continue;
        };
        counts[flow] += 1;
        if counts[flow] > MAX_SEGMENTS {
            return at;
        }
    }
    packets.len()
}

/// Of a datagram of which many make one packet a number below [`FLOWS`] that all of its flow have.
fn small_datagram(packet: &[u8]) -> Option<usize> {
    let first = packet.first().filter(|_| packet.len() < SMALL)?;
    let v6 = first >> 4 == 6;
    let (protocol, transport) = if v6 { (packet.get(6), 40) } else { (packet.get(9), usize::from(first & 0x0f) * 4) };
    let ports = packet.get(transport..transport + 4).filter(|_| protocol == Some(&UDP))?;
    let ports = u32::from_be_bytes(ports.try_into().expect("four bytes"));
    Some((ports.wrapping_mul(0x9e37_79b1) >> (u32::BITS - FLOWS.ilog2())) as usize)
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

#[cfg(test)]
mod tests {
    use tun_rs::checksum;

    use super::*;

    /// One of a flow of datagrams with `payload` bytes each.
    fn datagram(v6: bool, payload: usize) -> TunPacket {
        let transport = if v6 { 40 } else { 20 };
        let be = |len: usize| u16::try_from(len).unwrap().to_be_bytes();
        let mut packet = vec![0; transport + 8 + payload];
        if v6 {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&be(8 + payload));
            (packet[6], packet[7], packet[23], packet[39]) = (UDP, 64, 1, 2);
        } else {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&be(28 + payload));
            packet[6..10].copy_from_slice(&[0x40, 0, 64, UDP]);
            packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = !checksum(&packet[..20], 0);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet[transport..transport + 4].copy_from_slice(&[1, 0, 2, 0]);
        packet[transport + 4..transport + 6].copy_from_slice(&be(8 + payload));
        let addresses = if v6 { 8..40 } else { 12..20 };
        let pseudo = u64::from(checksum(&packet[addresses], 0)) + u64::from(UDP) + (8 + payload) as u64;
        let sum = !checksum(&packet[transport..], pseudo);
        packet[transport + 6..transport + 8].copy_from_slice(&sum.to_be_bytes());
        let mut tun = TunPacket::default();
        tun.buf = vec![0; TUN_HEADROOM];
        tun.buf.extend(packet);
        tun
    }

    #[test]
    fn no_more_datagrams_become_one_than_every_kernel_takes() {
        for (v6, payload, largest) in [(false, 100, 64), (true, 100, 64), (false, 1000, 64), (false, 1200, 54)] {
            let mut packets: Vec<_> = std::iter::repeat_with(|| datagram(v6, payload)).take(200).collect();
            merge(&mut GROTable::new(), &mut packets, true).unwrap();
            let left: Vec<_> = packets.iter().filter(|packet| !is_merged(packet)).collect();
            let groups: Vec<_> = left.iter().map(|packet| group(&packet.buf).packets).collect();
            assert_eq!(groups.iter().sum::<u64>(), 200);
            assert_eq!(groups.iter().copied().max(), Some(largest), "{payload}: {groups:?}");
            assert!(groups.len() <= 4, "still merged: {groups:?}");
        }
    }
}
