//! Headers of segmentation offload as the kernel may write them, and packets of peers on their way to be merged.

use tun_rs::{VIRTIO_NET_HDR_LEN, VirtioNetHdr, checksum};

use super::input::Input;
use super::scratch::with_gro;
use crate::io::merge::{MAX_SEGMENTS, group, is_merged, merge};
use crate::io::split::{finish_checksum, split};
use crate::out::{TUN_HEADROOM, TunPacket};

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

/// Merging loses, adds and alters nothing: split again, the packets are what they were.
fn from_peers(uso: bool, input: &mut Input<'_>) {
    let mut packets = Vec::new();
    while packets.len() < MAX_PACKETS
        && let Some(packet) = packet(input)
    {
        packets.push(packet);
    }
    let mut before: Vec<_> = packets.iter().map(|packet| essence(packet)).collect();
    let bytes: usize = packets.iter().map(Vec::len).sum();
    let mut bufs: Vec<TunPacket> = packets.iter().map(|packet| for_tun(packet)).collect();
    with_gro(|gro| merge(gro, &mut bufs, uso)).expect("there is room for the headers");
    let (mut after, mut told) = (Vec::new(), (0, 0));
    for merged in bufs.iter().filter(|packet| !is_merged(packet)) {
        let group = group(&merged.buf);
        told = (told.0 + group.packets, told.1 + group.bytes);
        let header = VirtioNetHdr::decode(&merged.buf).expect("as long as a header");
        let packet = &merged.buf[TUN_HEADROOM..];
        if header.gso_type == 0 {
            assert!(packets.iter().any(|before| before == packet), "a packet that was not merged is as it was");
            after.push(essence(packet));
            continue;
        }
        let datagrams = header.gso_type == GSO_UDP;
        assert!(!datagrams || group.packets <= MAX_SEGMENTS as u64, "the kernel would refuse it");
        let count = after.len();
        split(&header, &mut packet.to_vec(), |piece| after.push(essence(piece))).expect("our own header");
        assert_eq!(after.len() - count, usize::try_from(group.packets).expect("a few"), "what is billed");
    }
    assert_eq!(told, (packets.len() as u64, bytes as u64), "packets and bytes");
    before.sort();
    after.sort();
    assert_eq!(before, after);
}

fn for_tun(packet: &[u8]) -> TunPacket {
    let mut buf = vec![0; TUN_HEADROOM];
    buf.extend(packet);
    let mut tun = TunPacket::default();
    tun.buf = buf;
    tun
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

/// The packet without what merging may change: identification and checksums, the flow label, and of TCP the window, the
/// urgent pointer, the reserved bits and PSH; of UDP its own length. As wireguard-go merges, and the kernel nearly so.
fn essence(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let v6 = packet[0] >> 4 == 6;
    let (protocol, transport) = if v6 { (packet[6], 40) } else { (packet[9], usize::from(packet[0] & 0x0f) * 4) };
    if v6 {
        packet[1] &= 0xf0;
        put(&mut packet, 2, 0);
    } else {
        put(&mut packet, 4, 0);
        put(&mut packet, 10, 0);
    }
    match packet.get_mut(transport..) {
        Some(tcp) if protocol == TCP && tcp.len() >= 20 => {
            tcp[12] &= 0xf0;
            tcp[13] &= !0x08;
            tcp[14..20].fill(0);
        }
        Some(udp) if protocol == UDP && udp.len() >= 8 => udp[4..8].fill(0),
        Some(_) | None => {}
    }
    packet
}
