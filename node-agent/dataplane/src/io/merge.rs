//! Packets for the TUN that continue each other, found so that the kernel takes them in one call.
//!
//! Nothing is copied: a call names the payloads where they lie. Taken apart again by the kernel they are the very packets
//! that were merged, but for the identification of those that must not be fragmented, which means nothing (RFC 6864).

use std::io::IoSlice;

use tun_rs::{VIRTIO_NET_HDR_LEN, VirtioNetHdr, checksum};

use super::split::{Pseudo, TCP, UDP, pseudo_header};
use crate::out::TunPacket;

/// The largest packet the TUN takes.
pub(super) const MAX_PACKET: usize = 65_535;
/// The datagrams that every kernel takes as one (`UDP_MAX_SEGMENTS`; newer ones take 128).
pub(crate) const MAX_DATAGRAMS: usize = 64;
/// The segments of a stream in one call; of the usual ones fewer than fifty fill the largest packet.
const MAX_SEGMENTS: usize = 128;
/// A virtio header, IPv6, and TCP with all its options.
const MAX_HEADERS: usize = VIRTIO_NET_HDR_LEN + 40 + 60;
/// How many flows are told apart: those that are not are merged less.
const FLOWS: usize = 512;
/// No group, in their place.
const NONE: u16 = u16::MAX;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const DONT_FRAGMENT: u8 = 0x40;
/// The sum of bytes that hold their own checksum.
const SOUND: u16 = 0xffff;

/// The segments and datagrams of each pass in groups, each of which is one call.
#[derive(Debug)]
pub(crate) struct Merger {
    groups: Vec<Group>,
    /// Of each packet the next one in its group, if there is one.
    next: Vec<usize>,
    /// By flow the group that may go on.
    open: [u16; FLOWS],
}

/// Packets of one flow in their order. They are numbered as they lie in the pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub(crate) slot: u16,
    pub(crate) packets: usize,
    /// Of all packets, each with its headers.
    pub(crate) bytes: usize,
    /// As they are written, with the headers of the first; no virtio header is counted.
    pub(crate) written: usize,
    pub(super) first: usize,
    last: usize,
    /// What all of them have, if there may be more than the first.
    shape: Option<Shape>,
}

/// A segment or datagram that may be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    v6: bool,
    protocol: u8,
    /// Where the transport header starts.
    transport: usize,
    /// Where the payload starts.
    headers: usize,
    /// The payload of the first, which all but the last have, too.
    payload: usize,
}

impl Default for Merger {
    fn default() -> Self {
        Self { groups: Vec::new(), next: Vec::new(), open: [NONE; FLOWS] }
    }
}

impl Merger {
    /// Groups the packets of a pass; UDP only if the kernel takes `datagrams`. The order within each flow stays, but fragments
    /// and what has IPv6 extension headers may be overtaken, as by the kernel's own merging.
    pub(crate) fn merge(&mut self, packets: &[TunPacket], arena: &[u8], datagrams: bool) {
        self.begin();
        for (number, packet) in packets.iter().enumerate() {
            let bytes = packet.of(arena);
            let shape = Shape::of(bytes, datagrams);
            // What cannot be merged ends the group of its flow: nothing behind it overtakes it.
            let mut flow = flow(bytes).map(|flow| &mut self.open[flow]);
            let open = flow.as_mut().map_or(NONE, |open| std::mem::replace(open, NONE));
            let at = match (usize::from(open), shape) {
                (at, Some(shape)) if open != NONE && self.groups[at].goes_on(packets, arena, packet, shape) => {
                    self.next[self.groups[at].last] = number;
                    self.groups[at].add(number, shape);
                    at
                }
                _ => {
                    self.groups.push(Group::of_one(number, packet, shape));
                    self.groups.len() - 1
                }
            };
            self.next.push(number);
            if let (Some(open), Some(shape)) = (flow, shape)
                && self.groups[at].may_go_on(bytes, shape)
            {
                *open = u16::try_from(at).unwrap_or(NONE);
            }
        }
    }

    /// Makes each packet of a pass a group.
    pub(crate) fn leave_apart(&mut self, packets: &[TunPacket]) {
        self.begin();
        self.groups.extend(packets.iter().enumerate().map(|(number, packet)| Group::of_one(number, packet, None)));
        self.next.extend(0..packets.len());
    }

    fn begin(&mut self) {
        self.groups.clear();
        self.next.clear();
        self.open.fill(NONE);
    }

    /// What is to be written, in this order.
    pub(crate) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The packets of a group in their order.
    pub(crate) fn members(&self, group: &Group) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(group.first), |number| Some(self.next[*number]).filter(|next| next != number))
    }

    /// Hands a group to `write` as the kernel takes it: a virtio header, the first packet's headers, and all payloads.
    pub(crate) fn in_one<R>(
        &self,
        group: &Group,
        packets: &[TunPacket],
        arena: &[u8],
        write: impl FnOnce(&[IoSlice<'_>]) -> R,
    ) -> R {
        let first = packets[group.first].of(arena);
        let mut headers = [0; MAX_HEADERS];
        let Some(shape) = group.shape.filter(|_| group.packets > 1) else {
            return write(&[IoSlice::new(&headers[..VIRTIO_NET_HDR_LEN]), IoSlice::new(first)]);
        };
        let len = shape.write_headers(first, packets[group.last].of(arena), group.written, &mut headers);
        let mut slices = [IoSlice::new(&[]); MAX_SEGMENTS + 1];
        slices[0] = IoSlice::new(&headers[..len]);
        for (slice, number) in slices[1..].iter_mut().zip(self.members(group)) {
            *slice = IoSlice::new(&packets[number].of(arena)[shape.headers..]);
        }
        write(&slices[..=group.packets])
    }
}

impl Group {
    fn of_one(number: usize, packet: &TunPacket, shape: Option<Shape>) -> Self {
        let (slot, len) = (packet.slot, packet.len);
        Self { slot, packets: 1, bytes: len, written: len, first: number, last: number, shape }
    }

    fn add(&mut self, number: usize, shape: Shape) {
        self.packets += 1;
        self.bytes += shape.headers + shape.payload;
        self.written += shape.payload;
        self.last = number;
    }

    /// Whether another one may follow the packet that was added last.
    fn may_go_on(&self, last: &[u8], shape: Shape) -> bool {
        let is_full = Some(shape.payload) == self.shape.map(|first| first.payload);
        let is_pushed = shape.protocol == TCP && last[shape.transport + 13] & PSH != 0;
        let most = if shape.protocol == TCP { MAX_SEGMENTS } else { MAX_DATAGRAMS };
        is_full && !is_pushed && self.packets < most
    }

    /// Whether the packet is what the kernel would make if it took another one off this group.
    fn goes_on(&self, packets: &[TunPacket], arena: &[u8], packet: &TunPacket, shape: Shape) -> bool {
        let (head, bytes) = (packets[self.first].of(arena), packet.of(arena));
        let Some(first) = self.shape else {
            return false;
        };
        packet.slot == self.slot
            && (Shape { payload: first.payload, ..shape }) == first
            && shape.payload <= first.payload
            && self.written + shape.payload <= MAX_PACKET
            && shape.follows(head, bytes, self.packets, first.payload)
            // One that came damaged must not get a good checksum.
            && (self.packets > 1 || first.is_sound(head))
            && shape.is_sound(bytes)
    }
}

impl Shape {
    fn of(packet: &[u8], datagrams: bool) -> Option<Self> {
        let len_at = |at: usize| usize::from(word(packet, at));
        let (v6, protocol, transport) = match packet.first()? {
            0x45 if packet.len() > 20 => {
                let is_whole = packet[6] & !DONT_FRAGMENT == 0 && packet[7] == 0;
                (false, packet[9], (is_whole && len_at(2) == packet.len()).then_some(20)?)
            }
            first if first >> 4 == 6 && packet.len() > 40 => {
                (true, packet[6], (len_at(4) + 40 == packet.len()).then_some(40)?)
            }
            _ => return None,
        };
        let headers = match protocol {
            TCP if packet.len() > transport + 20 && packet[transport + 13] & !PSH == ACK => {
                let len = usize::from(packet[transport + 12] >> 4) * 4;
                (len >= 20).then_some(transport + len)?
            }
            UDP if datagrams && packet.len() > transport + 8 => {
                let is_summed = word(packet, transport + 6) != 0;
                (is_summed && len_at(transport + 4) == packet.len() - transport).then_some(transport + 8)?
            }
            _ => return None,
        };
        let payload = packet.len().checked_sub(headers).filter(|payload| *payload > 0)?;
        Some(Self { v6, protocol, transport, headers, payload })
    }

    /// Whether the headers are those of the `number`-th packet behind `head`, which has `payload` bytes as all between.
    fn follows(&self, head: &[u8], packet: &[u8], number: usize, payload: usize) -> bool {
        let same = |range: std::ops::Range<usize>| head[range.clone()] == packet[range];
        let at = self.transport;
        let ip = if self.v6 {
            same(0..4) && same(6..40)
        } else {
            let id = usize::from(word(packet, 4).wrapping_sub(word(head, 4)));
            same(0..2) && same(6..10) && same(12..20) && (packet[6] & DONT_FRAGMENT != 0 || id == number)
        };
        let transport = match self.protocol {
            TCP => {
                let sequence = |packet: &[u8]| u32::from_be_bytes([4, 5, 6, 7].map(|byte| packet[at + byte]));
                let distance = sequence(packet).wrapping_sub(sequence(head));
                usize::try_from(distance) == Ok(number * payload)
                    && same(at..at + 4)
                    && same(at + 8..at + 13)
                    && same(at + 14..at + 16)
                    && same(at + 18..self.headers)
            }
            _ => same(at..at + 4),
        };
        ip && transport
    }

    /// Whether its checksums are right.
    fn is_sound(&self, packet: &[u8]) -> bool {
        let pseudo = Pseudo { v6: self.v6, protocol: self.protocol, len: packet.len() - self.transport };
        (self.v6 || checksum(&packet[..self.transport], 0) == SOUND)
            && checksum(&packet[self.transport..], pseudo_header(packet, pseudo)) == SOUND
    }

    /// The headers of one packet of `len` bytes that begins with the payload of `first`, for the kernel to take apart; the
    /// sum of the transport is left to it. Says how long they are.
    fn write_headers(&self, first: &[u8], last: &[u8], len: usize, room: &mut [u8; MAX_HEADERS]) -> usize {
        let (virtio, packet) = room.split_at_mut(VIRTIO_NET_HDR_LEN);
        let packet = &mut packet[..self.headers];
        packet.copy_from_slice(&first[..self.headers]);
        let (at, behind) = (self.transport, len - self.transport);
        if self.v6 {
            put(packet, 4, behind);
        } else {
            put(packet, 2, len);
            put(packet, 10, 0);
            let sum = !checksum(&packet[..at], 0);
            put(packet, 10, usize::from(sum));
        }
        let (kind, sum_at) = match (self.protocol, self.v6) {
            (TCP, v6) => {
                packet[at + 13] = last[at + 13];
                (if v6 { 4 } else { 1 }, 16)
            }
            _ => {
                put(packet, at + 4, behind);
                (5, 6)
            }
        };
        let pseudo = Pseudo { v6: self.v6, protocol: self.protocol, len: behind };
        let sum = checksum(&[], pseudo_header(packet, pseudo));
        put(packet, at + sum_at, usize::from(sum));
        let header = VirtioNetHdr {
            flags: 1,
            gso_type: kind,
            hdr_len: short(self.headers),
            gso_size: short(self.payload),
            csum_start: short(at),
            csum_offset: short(sum_at),
        };
        header.encode(virtio).expect("room for a virtio header");
        VIRTIO_NET_HDR_LEN + self.headers
    }
}

/// Of a TCP or UDP packet a number below [`FLOWS`] that all of its flow have.
fn flow(packet: &[u8]) -> Option<usize> {
    let v6 = packet.first()? >> 4 == 6;
    let (protocol, transport) = if v6 { (6, 40) } else { (9, usize::from(packet[0] & 0x0f) * 4) };
    let protocol = *packet.get(protocol).filter(|protocol| [TCP, UDP].contains(protocol))?;
    let word = |at: usize| Some(u64::from(u32::from_be_bytes(packet.get(at..at + 4)?.try_into().ok()?)));
    let (source, destination) = if v6 { (word(20)?, word(36)?) } else { (word(12)?, word(16)?) };
    let addresses = (source << 32 | destination).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let all = (addresses.rotate_right(32) ^ word(transport)? ^ u64::from(protocol)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    usize::try_from(all >> (u64::BITS - FLOWS.ilog2())).ok()
}

fn word(packet: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

fn put(packet: &mut [u8], at: usize, value: usize) {
    packet[at..at + 2].copy_from_slice(&short(value).to_be_bytes());
}

/// All lengths are those of packets.
fn short(value: usize) -> u16 {
    u16::try_from(value).expect("at most 65,535")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of a flow, whole and with the right sums, after `change` has had its way with the headers.
    fn packet(v6: bool, protocol: u8, payload: usize, change: impl FnOnce(&mut [u8], usize)) -> Vec<u8> {
        let transport = if v6 { 40 } else { 20 };
        let headers = if protocol == TCP { 20 } else { 8 };
        let mut packet = vec![7; transport + headers + payload];
        let behind = packet.len() - transport;
        packet[..transport + headers].fill(0);
        if v6 {
            packet[0] = 0x60;
            put(&mut packet, 4, behind);
            (packet[6], packet[7], packet[23], packet[39]) = (protocol, 64, 1, 2);
        } else {
            packet[0] = 0x45;
            put(&mut packet, 2, transport + behind);
            packet[6..10].copy_from_slice(&[DONT_FRAGMENT, 0, 64, protocol]);
            packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        }
        packet[transport..transport + 4].copy_from_slice(&[1, 0, 2, 0]);
        if protocol == TCP {
            (packet[transport + 12], packet[transport + 13]) = (5 << 4, ACK);
        } else {
            put(&mut packet, transport + 4, behind);
        }
        change(&mut packet, transport);
        if !v6 {
            let sum = !checksum(&packet[..20], 0);
            put(&mut packet, 10, usize::from(sum));
        }
        let sum = !checksum(&packet[transport..], pseudo_header(&packet, Pseudo { v6, protocol, len: behind }));
        put(&mut packet, transport + if protocol == TCP { 16 } else { 6 }, usize::from(sum));
        packet
    }

    /// How many packets each group has.
    fn groups(packets: &[Vec<u8>]) -> Vec<usize> {
        let (listed, arena) = TunPacket::lay_out(packets);
        let mut merger = Merger::default();
        merger.merge(&listed, &arena, true);
        merger.groups().iter().map(|group| group.packets).collect()
    }

    #[test]
    fn no_more_datagrams_become_one_than_every_kernel_takes() {
        for (v6, payload, expected) in [
            (false, 100, [64, 64, 64, 8].as_slice()),
            (true, 100, &[64, 64, 64, 8]),
            (false, 1000, &[64, 64, 64, 8]),
            (false, 1200, &[54, 54, 54, 38]),
        ] {
            let packets = vec![packet(v6, UDP, payload, |_, _| ()); 200];
            assert_eq!(groups(&packets), expected, "{payload}");
        }
    }

    /// The `number`-th of a stream of segments of 100 bytes.
    fn segment(number: usize, payload: usize, change: impl FnOnce(&mut [u8], usize)) -> Vec<u8> {
        packet(false, TCP, payload, |packet, at| {
            put(packet, at + 6, number * 100);
            change(packet, at);
        })
    }

    #[test]
    fn a_stream_is_merged_as_long_as_its_segments_differ_in_nothing_but_their_place() {
        let plain = |number| segment(number, 100, |_, _| ());
        let with = |change: fn(&mut [u8], usize)| groups(&[plain(0), segment(1, 100, change), plain(2)]);
        assert_eq!(with(|_, _| ()), [3]);
        assert_eq!(groups(&[plain(0), plain(2), plain(3)]), [1, 2], "one is missing");
        assert_eq!(
            groups(&[plain(0), segment(1, 50, |_, _| ()), segment(2, 50, |_, _| ())]),
            [2, 1],
            "a short one ends it"
        );
        assert_eq!(groups(&[segment(0, 50, |_, _| ()), plain(1)]), [1, 1], "and begins none");
        assert_eq!(with(|packet, at| packet[at + 13] |= PSH), [2, 1]);
        assert_eq!(with(|packet, _| put(packet, 4, 77)), [3], "what must not be fragmented needs no identification");
        for change in [
            |packet: &mut [u8], at: usize| packet[at + 13] |= 1,
            |packet: &mut [u8], at: usize| packet[at + 11] = 1,
            |packet: &mut [u8], at: usize| packet[at + 12] |= 1,
            |packet: &mut [u8], at: usize| packet[at + 14] = 1,
            |packet: &mut [u8], at: usize| packet[at + 19] = 1,
            |packet: &mut [u8], _| packet[1] = 1,
            |packet: &mut [u8], _| packet[6] = 0,
            |packet: &mut [u8], _| packet[7] = 1,
            |packet: &mut [u8], _| packet[8] = 63,
        ] {
            assert_eq!(with(change), [1, 1, 1]);
        }
        let fragmentable = |number, id| segment(number, 100, move |packet, _| (packet[6], packet[5]) = (0, id));
        assert_eq!(groups(&[fragmentable(0, 1), fragmentable(1, 2), fragmentable(2, 4)]), [2, 1]);
    }

    #[test]
    fn what_came_damaged_gets_no_good_checksum() {
        for (damaged, expected) in [[1, 2].as_slice(), &[1, 1, 1], &[2, 1]].into_iter().enumerate() {
            for at in [10, 36, 60] {
                let mut packets: Vec<_> = (0..3).map(|number| segment(number, 100, |_, _| ())).collect();
                packets[damaged][at] ^= 1;
                assert_eq!(groups(&packets), expected, "byte {at} of packet {damaged}");
            }
        }
    }

    #[test]
    fn nothing_of_a_flow_overtakes_another_of_it() {
        let plain = |number| segment(number, 100, |_, _| ());
        let probe = segment(1, 0, |_, _| ());
        assert_eq!(groups(&[plain(0), probe, plain(1)]), [1, 1, 1]);
        let other = |number| segment(number, 100, |packet, _| packet[19] = 9);
        assert_eq!(groups(&[plain(0), other(0), plain(1), other(1), plain(2)]), [3, 2], "another flow is no obstacle");
    }
}
