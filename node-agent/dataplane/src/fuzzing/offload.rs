//! Headers of segmentation offload as the kernel may write them, and packets of peers on their way to be merged.

use std::collections::HashMap;

use tun_rs::{VIRTIO_NET_HDR_LEN, VirtioNetHdr, checksum};

use super::input::Input;
use crate::io::merge::{MAX_DATAGRAMS, Merger};
use crate::io::split::{finish_checksum, split};
use crate::out::TunPacket;

const MAX_PACKETS: usize = 256;
const MAX_PACKET: usize = 65_535;
const TCP: u8 = 6;
const UDP: u8 = 17;
const GSO_UDP: u8 = 5;

/// One byte for the way, then what comes from there.
pub fn offload(input: &[u8]) {
    let mut input = Input(input);
    match input.byte() {
        Some(way) if way & 1 == 0 => from_kernel(input.0),
        Some(way) => from_peers(way & 2 == 2, &mut input),
        None => {}
    }
}

/// A header and a packet behind it.
fn from_kernel(read: &[u8]) {
    let Some((header, packet)) = read.split_at_checked(VIRTIO_NET_HDR_LEN) else {
        return;
    };
    let header = VirtioNetHdr::decode(header).expect("as long as a header");
    let packet = &packet[..packet.len().min(MAX_PACKET)];
    finish_checksum(&header, &mut packet.to_vec());
    let (mut pieces, mut bytes) = (0, 0);
    let total = split(&header, &mut packet.to_vec(), |piece| {
        pieces += 1;
        bytes += piece.len();
        assert!(piece.len() <= packet.len());
        assert_eq!(piece[0], packet[0]);
    });
    match total {
        Ok(total) => {
            assert_eq!(total, bytes);
            assert!(pieces > 0 && total >= packet.len());
        }
        Err(_) => assert_eq!(pieces, 0, "refused as a whole"),
    }
}

/// Merging loses, adds and alters nothing, nor the order within a flow: split again, the packets are what they were.
fn from_peers(uso: bool, input: &mut Input<'_>) {
    let mut packets = Vec::new();
    while packets.len() < MAX_PACKETS
        && let Some(packet) = packet(input)
    {
        packets.push(packet);
    }
    let (listed, arena) = TunPacket::lay_out(&packets);
    let mut merger = Merger::default();
    merger.merge(&listed, &arena, uso);
    let mut after: Vec<Option<Vec<u8>>> = vec![None; packets.len()];
    let mut last_of = HashMap::new();
    for group in merger.groups() {
        let members: Vec<_> = merger.members(group).collect();
        for number in &members {
            if let Some(flow) = flow(&packets[*number]) {
                let before = last_of.insert(flow, *number);
                assert!(before < Some(*number), "packet {number} of a flow behind {before:?}");
            }
        }
        let written = merger.in_one(group, &listed, &arena, |slices| {
            slices.iter().flat_map(|slice| slice.to_vec()).collect::<Vec<u8>>()
        });
        let (header, packet) = written.split_at(VIRTIO_NET_HDR_LEN);
        let header = VirtioNetHdr::decode(header).expect("as long as a header");
        assert_eq!((group.packets, group.written), (members.len(), packet.len()));
        let mut pieces = Vec::new();
        if header.gso_type == 0 {
            assert_eq!(packet, packets[members[0]], "what is not merged is as it was");
            pieces.push(packet.to_vec());
        } else {
            assert!(header.gso_type != GSO_UDP || group.packets <= MAX_DATAGRAMS, "the kernel would refuse it");
            split(&header, &mut packet.to_vec(), |piece| pieces.push(piece.to_vec())).expect("our own header");
        }
        assert_eq!((group.packets, group.bytes), (pieces.len(), pieces.iter().map(Vec::len).sum()), "what is billed");
        for (number, piece) in members.into_iter().zip(pieces) {
            assert_eq!(after[number].replace(piece), None, "written once");
        }
    }
    for (before, after) in packets.iter().zip(after) {
        assert_eq!(after.as_deref().map(essence), Some(essence(before)));
    }
}

/// What those of one flow have in common. None of later fragments, and behind IPv6 extension headers.
fn flow(packet: &[u8]) -> Option<(Vec<u8>, u8, Vec<u8>)> {
    let v6 = packet[0] >> 4 == 6;
    let (protocol, transport) = if v6 { (packet[6], 40) } else { (packet[9], usize::from(packet[0] & 0x0f) * 4) };
    let is_first = v6 || word(packet, 6) & 0x1fff == 0;
    let ports = packet.get(transport..transport + 4).filter(|_| is_first && [TCP, UDP].contains(&protocol))?;
    Some((packet[if v6 { 8..40 } else { 12..20 }].to_vec(), protocol, ports.to_vec()))
}

/// As it comes out of a tunnel: well-formed, without anything behind it. From the fuzzer as it is, or a segment of TCP
/// or UDP with checksums that are right.
fn packet(input: &mut Input<'_>) -> Option<Vec<u8>> {
    let kind = input.byte()?;
    if kind & 1 == 0 {
        let packet = input.chunk()?.to_vec();
        let addresses = crate::packet::addresses(&packet)?;
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        let total = if addresses.source.is_ipv4() { total } else { 40 + usize::from(word(&packet, 4)) };
        return Some(packet[..total].to_vec());
    }
    let (v6, tcp, options) = (kind & 2 == 2, kind & 4 == 4, usize::from(kind >> 6));
    let (flags, sequence, fields, len) = (input.byte()?, input.word()?, input.byte()?, input.word()?);
    let len = usize::from(len % 2048);
    let transport = if v6 { 40 } else { 20 };
    let header = if tcp { 20 + options * 4 } else { 8 };
    let mut packet = vec![0; transport + header];
    packet.extend(std::iter::repeat_n(flags ^ fields, len));
    let total = u16::try_from(packet.len()).expect("a few thousand");
    if v6 {
        packet[0] = 0x60;
        put(&mut packet, 4, total - 40);
        packet[6] = if tcp { TCP } else { UDP };
        packet[7] = 64 + (fields & 1);
        packet[39] = fields >> 1 & 1;
    } else {
        packet[0] = 0x45;
        packet[1] = fields & 3;
        put(&mut packet, 2, total);
        packet[6] = fields << 5;
        packet[8] = 64;
        packet[9] = if tcp { TCP } else { UDP };
        packet[19] = fields >> 3 & 1;
        let sum = !checksum(&packet[..20], 0);
        put(&mut packet, 10, sum);
    }
    packet[transport + 1] = fields >> 4 & 1;
    if tcp {
        put(&mut packet, transport + 6, sequence);
        packet[transport + 12] = u8::try_from(header / 4).expect("up to eight") << 4;
        packet[transport + 13] = if kind & 8 == 8 { 0x10 } else { flags };
    } else {
        put(&mut packet, transport + 4, total - u16::from(if v6 { 40_u8 } else { 20 }));
    }
    if kind & 16 == 0 {
        let at = transport + if tcp { 16 } else { 6 };
        let addresses = if v6 { 8..40 } else { 12..20 };
        let protocol = u64::from(if tcp { TCP } else { UDP });
        let pseudo = u64::from(checksum(&packet[addresses], 0)) + protocol + (packet.len() - transport) as u64;
        let sum = !checksum(&packet[transport..], pseudo);
        put(&mut packet, at, if sum == 0 { u16::MAX } else { sum });
    }
    Some(packet)
}

fn word(packet: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

fn put(packet: &mut [u8], at: usize, value: u16) {
    packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// The packet without what merging may change: the identification of one that must not be fragmented, and which of its
/// two zeros a sum has.
fn essence(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let v6 = packet[0] >> 4 == 6;
    let (protocol, transport) = if v6 { (packet[6], 40) } else { (packet[9], usize::from(packet[0] & 0x0f) * 4) };
    if !v6 && packet[6] & 0x40 != 0 {
        put(&mut packet, 4, 0);
        put(&mut packet, 10, 0);
    }
    let sums = [(!v6).then_some(10), (protocol == TCP && packet.len() >= transport + 20).then_some(transport + 16)];
    for at in sums.into_iter().flatten() {
        if word(&packet, at) == u16::MAX {
            put(&mut packet, at, 0);
        }
    }
    packet
}
