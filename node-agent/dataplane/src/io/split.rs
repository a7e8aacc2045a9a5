//! A super-packet from the kernel, taken apart without copying: each packet's headers are written in front of its
//! payload, over the end of the packet before, which is gone by then.

use std::io;

use tun_rs::{VirtioNetHdr, checksum};

/// More than IP and TCP with all their options take; the kernel offloads nothing with longer headers.
const MAX_HEADERS: usize = 256;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
const FIN_AND_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Hands every packet of a super-packet to `each`; returns the bytes of all of them.
///
/// # Errors
/// When the header of the super-packet makes no sense; nothing was handed out then.
pub(crate) fn split(header: &VirtioNetHdr, packet: &mut [u8], mut each: impl FnMut(&[u8])) -> io::Result<usize> {
    let layout = Layout::of(header, packet).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let headers = layout.headers;
    let mut template = [0; MAX_HEADERS];
    template[..headers].copy_from_slice(&packet[..headers]);
    let payload = packet.len() - headers;
    let mut total = 0;
    let mut done = 0;
    let mut number = 0;
    while done < payload {
        let len = layout.segment.min(payload - done);
        let piece = &mut packet[done..done + headers + len];
        piece[..headers].copy_from_slice(&template[..headers]);
        layout.finish(piece, Position { number, offset: done, last: done + len == payload });
        each(piece);
        total += piece.len();
        done += len;
        number += 1;
    }
    Ok(total)
}

/// The kernel leaves the checksum of a locally made packet to the device.
pub(crate) fn finish_checksum(header: &VirtioNetHdr, packet: &mut [u8]) {
    const NEEDS_CHECKSUM: u8 = 1;
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    if header.flags & NEEDS_CHECKSUM == 0 || at + 2 > packet.len() {
        return;
    }
    let pseudo_header = u16::from_be_bytes([packet[at], packet[at + 1]]);
    packet[at..at + 2].fill(0);
    let sum = !checksum(&packet[start..], u64::from(pseudo_header));
    // Zero means "none" in UDP; all ones is the same sum.
    let sum = if sum == 0 { u16::MAX } else { sum };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// What the checksum of TCP and UDP covers besides its header and payload, and the addresses.
#[derive(Clone, Copy)]
pub(super) struct Pseudo {
    pub(super) v6: bool,
    pub(super) protocol: u8,
    /// Bytes of the transport header and of all behind it.
    pub(super) len: usize,
}

/// The sum of a packet's pseudo header, to begin that of the transport with.
pub(super) fn pseudo_header(packet: &[u8], pseudo: Pseudo) -> u64 {
    let addresses = if pseudo.v6 { 8..40 } else { 12..20 };
    u64::from(checksum(&packet[addresses], 0)) + u64::from(pseudo.protocol) + pseudo.len as u64
}

/// Where the headers lie; all lengths were checked.
struct Layout {
    v6: bool,
    protocol: u8,
    /// Start of the transport header.
    transport: usize,
    headers: usize,
    segment: usize,
}

struct Position {
    number: u16,
    offset: usize,
    last: bool,
}

impl Layout {
    fn of(header: &VirtioNetHdr, packet: &[u8]) -> Option<Self> {
        const GSO_TCP_V4: u8 = 1;
        const GSO_TCP_V6: u8 = 4;
        const GSO_UDP: u8 = 5;
        const GSO_ECN: u8 = 0x80;
        let first = packet.first()?;
        let v6 = first >> 4 == 6;
        let protocol = match header.gso_type & !GSO_ECN {
            GSO_TCP_V4 if !v6 => TCP,
            GSO_TCP_V6 if v6 => TCP,
            GSO_UDP => UDP,
            _ => return None,
        };
        let transport = usize::from(header.csum_start);
        let fits = if v6 { transport >= 40 } else { transport >= 20 && usize::from(first & 0x0f) * 4 == transport };
        // The kernel's own header length can be that of the whole first packet when it forwards.
        let transport_len = match protocol {
            TCP => usize::from(packet.get(transport + 12)? >> 4) * 4,
            _ => 8,
        };
        let headers = transport + transport_len;
        let segment = usize::from(header.gso_size);
        let sound = fits && segment > 0 && headers <= MAX_HEADERS && headers < packet.len();
        let sound = sound && (protocol == UDP || transport_len >= 20);
        sound.then_some(Self { v6, protocol, transport, headers, segment })
    }

    /// Gives one packet the lengths, numbers, flags and checksums it would have had alone.
    fn finish(&self, piece: &mut [u8], position: Position) {
        let len = u16::try_from(piece.len()).expect("a piece of a packet of at most 65,535 bytes");
        let put = |piece: &mut [u8], at: usize, value: u16| piece[at..at + 2].copy_from_slice(&value.to_be_bytes());
        let word = |piece: &[u8], at: usize| u16::from_be_bytes([piece[at], piece[at + 1]]);
        if self.v6 {
            put(piece, 4, len - 40);
        } else {
            put(piece, 2, len);
            let id = word(piece, 4).wrapping_add(position.number);
            put(piece, 4, id);
            put(piece, 10, 0);
            let sum = !checksum(&piece[..self.transport], 0);
            put(piece, 10, sum);
        }
        let at = self.transport;
        let transport_len = piece.len() - at;
        let checksum_at = if self.protocol == TCP {
            let sequence = u32::from_be_bytes([piece[at + 4], piece[at + 5], piece[at + 6], piece[at + 7]]);
            let offset = u32::try_from(position.offset).expect("less than 65,535");
            piece[at + 4..at + 8].copy_from_slice(&sequence.wrapping_add(offset).to_be_bytes());
            if !position.last {
                piece[at + 13] &= !FIN_AND_PSH;
            }
            if position.number > 0 {
                piece[at + 13] &= !CWR;
            }
            at + 16
        } else {
            let len = u16::try_from(transport_len).expect("less than the piece");
            put(piece, at + 4, len);
            at + 6
        };
        put(piece, checksum_at, 0);
        let pseudo = pseudo_header(piece, Pseudo { v6: self.v6, protocol: self.protocol, len: transport_len });
        let sum = !checksum(&piece[at..], pseudo);
        // Zero means "none" in UDP; all ones is the same sum.
        put(piece, checksum_at, if sum == 0 { u16::MAX } else { sum });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::seq::SliceRandom;
    use rand::{Rng, SeedableRng};
    use tun_rs::VIRTIO_NET_HDR_LEN;

    use super::super::merge::{MAX_DATAGRAMS, Merger};
    use super::*;
    use crate::out::TunPacket;

    const ACK: u8 = 0x10;
    const PSH: u8 = 0x08;

    fn naive_sum(bytes: &[u8]) -> u32 {
        let mut sum = 0;
        for (at, byte) in bytes.iter().enumerate() {
            sum += if at % 2 == 0 { u32::from(*byte) << 8 } else { u32::from(*byte) };
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum
    }

    /// Options of both headers, flags, and a payload.
    #[derive(Clone, Debug)]
    struct Whole {
        v6: bool,
        tcp: bool,
        ip_options: usize,
        tcp_options: usize,
        flags: u8,
        id: u16,
        sequence: u32,
        payload: Vec<u8>,
    }

    impl Whole {
        fn transport(&self) -> usize {
            if self.v6 { 40 } else { 20 + self.ip_options * 4 }
        }

        fn headers(&self) -> usize {
            self.transport() + if self.tcp { 20 + self.tcp_options * 4 } else { 8 }
        }

        /// One packet carrying `payload`, built field by field.
        fn packet(&self, id: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
            let total = self.headers() + payload.len();
            let be = |value: usize| u16::try_from(value).unwrap().to_be_bytes();
            let protocol = if self.tcp { 6 } else { 17 };
            let mut bytes = Vec::new();
            if self.v6 {
                bytes.extend([0x60, 0x25, 0xab, 0xcd]);
                bytes.extend(be(total - 40));
                bytes.extend([protocol, 64]);
                bytes.extend((0..32).map(|n| 0xf0 ^ (n * 7)));
            } else {
                bytes.extend([0x40 | u8::try_from(self.transport() / 4).unwrap(), 0x02]);
                bytes.extend(be(total));
                bytes.extend(id.to_be_bytes());
                bytes.extend([0x40, 0, 63, protocol, 0, 0, 10, 9, 8, 7, 192, 0, 2, 200]);
                bytes.extend(vec![1; self.ip_options * 4]);
                let sum = !u16::try_from(naive_sum(&bytes)).unwrap();
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            bytes.extend([0x9c, 0x40, 0x01, 0xbb]);
            if self.tcp {
                bytes.extend(sequence.to_be_bytes());
                bytes.extend([1, 2, 3, 4, u8::try_from((20 + self.tcp_options * 4) / 4).unwrap() << 4, flags]);
                bytes.extend([0xff, 0xee, 0, 0, 0, 9]);
                bytes.extend(vec![1; self.tcp_options * 4]);
            } else {
                bytes.extend(be(8 + payload.len()));
                bytes.extend([0, 0]);
            }
            bytes.extend(payload);
            let addresses = if self.v6 { &bytes[8..40] } else { &bytes[12..20] };
            let mut pseudo = addresses.to_vec();
            pseudo.extend([0, protocol]);
            pseudo.extend(be(total - self.transport()));
            pseudo.extend(&bytes[self.transport()..]);
            let sum = !u16::try_from(naive_sum(&pseudo)).unwrap();
            let sum = if sum == 0 { 0xffff } else { sum };
            let at = self.transport() + if self.tcp { 16 } else { 6 };
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            bytes
        }

        fn header(&self, segment: u16) -> VirtioNetHdr {
            VirtioNetHdr {
                flags: 1,
                gso_type: match (self.tcp, self.v6) {
                    (true, false) => 1,
                    (true, true) => 4,
                    (false, _) => 5,
                },
                // As the kernel says it for a forwarded super-packet.
                hdr_len: u16::MAX,
                gso_size: segment,
                csum_start: u16::try_from(self.transport()).unwrap(),
                csum_offset: if self.tcp { 16 } else { 6 },
            }
        }
    }

    fn whole() -> impl Strategy<Value = Whole> {
        let payload = proptest::collection::vec(any::<u8>(), 1..4000);
        (any::<(bool, bool)>(), 0_usize..=10, 0_usize..=10, any::<(u8, u16, u32)>(), payload).prop_map(
            |((v6, tcp), ip_options, tcp_options, (flags, id, sequence), payload)| Whole {
                v6,
                tcp,
                ip_options,
                tcp_options,
                flags,
                id,
                sequence,
                payload,
            },
        )
    }

    /// A flow of each kind: its packets, built one by one.
    fn pieces(whole: &Whole, segment: usize) -> Vec<Vec<u8>> {
        let last = whole.payload.len().div_ceil(segment) - 1;
        let piece = |(number, chunk): (usize, &[u8])| {
            let flags = if number < last { whole.flags & !PSH } else { whole.flags };
            let id = whole.id.wrapping_add(u16::try_from(number).unwrap());
            let offset = u32::try_from(number * segment).unwrap();
            whole.packet(id, whole.sequence.wrapping_add(offset), flags, chunk)
        };
        whole.payload.chunks(segment).enumerate().map(piece).collect()
    }

    /// TCP over IPv4 and IPv6, and UDP, as they are merged: without IP options, and with nothing but ACK and PSH.
    fn flows() -> impl Strategy<Value = Vec<Whole>> {
        proptest::collection::vec(whole(), 4).prop_map(|mut flows| {
            for (kind, flow) in flows.iter_mut().enumerate() {
                (flow.v6, flow.tcp, flow.ip_options) = (kind & 1 == 1, kind & 2 == 2, 0);
                flow.flags = ACK | (flow.flags & PSH);
            }
            flows
        })
    }

    /// Whether a device that computes the sum which the header leaves to it, and goes by nothing else, sends a good packet.
    fn is_sound_as_one(header: &VirtioNetHdr, packet: &[u8]) -> bool {
        let mut packet = packet.to_vec();
        let (v6, start) = (packet[0] >> 4 == 6, usize::from(header.csum_start));
        let at = start + usize::from(header.csum_offset);
        let sum = !u16::try_from(naive_sum(&packet[start..])).unwrap();
        packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        let protocol = if v6 { packet[6] } else { packet[9] };
        let headers = start + if protocol == TCP { usize::from(packet[start + 12] >> 4) * 4 } else { 8 };
        let mut covered = if v6 { packet[8..40].to_vec() } else { packet[12..20].to_vec() };
        covered.extend([0, protocol]);
        covered.extend(u16::try_from(packet.len() - start).unwrap().to_be_bytes());
        covered.extend(&packet[start..]);
        header.flags == 1
            && usize::from(header.hdr_len) == headers
            && (v6 || naive_sum(&packet[..start]) == 0xffff)
            && naive_sum(&covered) == 0xffff
    }

    /// Merged for the TUN and taken apart again.
    struct Back {
        written: usize,
        /// Each in its old place.
        packets: Vec<Vec<u8>>,
        /// Their old places, as they went to the TUN.
        order: Vec<usize>,
    }

    fn there_and_back(packets: &[Vec<u8>]) -> Back {
        let (listed, arena) = TunPacket::lay_out(packets);
        let mut merger = Merger::default();
        merger.merge(&listed, &arena, true);
        let mut back = vec![Vec::new(); packets.len()];
        let mut order = Vec::new();
        for group in merger.groups() {
            let bytes = |slices: &[std::io::IoSlice<'_>]| slices.iter().flat_map(|slice| slice.to_vec()).collect();
            let mut written: Vec<u8> = merger.in_one(group, &listed, &arena, bytes);
            let (header, packet) = written.split_at_mut(VIRTIO_NET_HDR_LEN);
            let header = VirtioNetHdr::decode(header).unwrap();
            assert_eq!(group.written, packet.len());
            let mut pieces = Vec::new();
            if header.gso_type == 0 {
                pieces.push(packet.to_vec());
            } else {
                assert!(is_sound_as_one(&header, packet), "{header:?} {packet:?}");
                split(&header, packet, |piece| pieces.push(piece.to_vec())).unwrap();
            }
            let told = (pieces.len(), pieces.iter().map(Vec::len).sum());
            assert_eq!((group.packets, group.bytes), told, "what is billed");
            order.extend(merger.members(group));
            merger.members(group).zip(pieces).for_each(|(number, piece)| back[number] = piece);
        }
        Back { written: merger.groups().len(), packets: back, order }
    }

    /// Each flow comes in the order it had.
    fn keep_their_order(packets: &[Vec<u8>], back: &Back) -> bool {
        let kind = |packet: &[u8]| if packet[0] >> 4 == 6 { (6, packet[6]) } else { (4, packet[9]) };
        let kinds = [(4, TCP), (6, TCP), (4, UDP), (6, UDP)];
        kinds.iter().all(|of| back.order.iter().filter(|number| kind(&packets[**number]) == *of).is_sorted())
    }

    proptest! {
        #[test]
        fn what_was_merged_is_split_into_what_it_was(flows in flows(), segment in 100_usize..1500, seed: u64) {
            let mut queues: Vec<_> = flows.iter().map(|flow| pieces(flow, segment).into_iter()).collect();
            let mut random = StdRng::seed_from_u64(seed);
            let mut packets = Vec::new();
            while !queues.is_empty() {
                let at = random.random_range(0..queues.len());
                match queues[at].next() {
                    Some(packet) => packets.push(packet),
                    None => drop(queues.swap_remove(at)),
                }
            }
            let back = there_and_back(&packets);
            let written = back.written;
            // So many small datagrams would be more than the kernel takes, if they were of one flow.
            let datagrams: usize = flows.iter().filter(|flow| !flow.tcp).map(|flow| pieces(flow, segment).len()).sum();
            prop_assert!(written >= flows.len());
            prop_assert!(written == flows.len() || datagrams > MAX_DATAGRAMS, "one for each flow");
            prop_assert!(keep_their_order(&packets, &back));
            prop_assert_eq!(back.packets, packets);
        }

        #[test]
        fn however_mixed_up_they_come_merging_alters_nothing(flows in flows(), segment in 100_usize..1500, seed: u64) {
            let flows = flows.iter().filter(|flow| flow.tcp);
            let mut packets: Vec<_> = flows.flat_map(|flow| pieces(flow, segment)).collect();
            packets.shuffle(&mut StdRng::seed_from_u64(seed));
            let back = there_and_back(&packets);
            prop_assert!(keep_their_order(&packets, &back));
            prop_assert_eq!(back.packets, packets);
        }

        #[test]
        fn every_piece_is_what_it_would_have_been_alone(whole in whole(), segment in 1_u16..1500) {
            let mut packet = whole.packet(whole.id, whole.sequence, whole.flags, &whole.payload);
            let mut pieces = Vec::new();
            let total = split(&whole.header(segment), &mut packet, |piece| pieces.push(piece.to_vec())).unwrap();
            prop_assert_eq!(total, pieces.iter().map(Vec::len).sum::<usize>());
            let chunks: Vec<_> = whole.payload.chunks(usize::from(segment)).collect();
            prop_assert_eq!(pieces.len(), chunks.len());
            let mut offset = 0;
            for (number, (piece, chunk)) in pieces.iter().zip(&chunks).enumerate() {
                let mut flags = whole.flags;
                if number + 1 < chunks.len() {
                    flags &= !0x09;
                }
                if number > 0 {
                    flags &= !0x80;
                }
                let id = whole.id.wrapping_add(u16::try_from(number).unwrap());
                let expected = whole.packet(id, whole.sequence.wrapping_add(offset), flags, chunk);
                prop_assert_eq!(piece, &expected);
                offset += u32::try_from(chunk.len()).unwrap();
            }
        }

        #[test]
        fn any_header_over_any_bytes_is_split_or_refused(
            mut packet in proptest::collection::vec(any::<u8>(), 0..200),
            fields in any::<(u8, u16, u16, u16)>(),
        ) {
            let (gso_type, gso_size, csum_start, csum_offset) = fields;
            let csum_start = csum_start % 80;
            let header = VirtioNetHdr { flags: 1, gso_type: gso_type % 6, hdr_len: 0, gso_size, csum_start, csum_offset };
            let _ = split(&header, &mut packet, |_| ());
        }
    }
}
