//! What an enemy on the network, and a peer that has its keys, can send. Each ends with a packet through the tunnel that
//! was there before.

use super::tests::*;
use super::*;
use crate::ecn::Ecn;
use crate::tunnel::{OVERHEAD, REJECT_AFTER_MESSAGES};

const MAX_DATAGRAM: usize = 65_507;

/// Like `Host::udp`; returns why it was dropped. Exactly one thing happens to a datagram.
fn fate(server: &mut Host, datagram: &[u8], from: &str) -> Option<Drop> {
    let before = server.engine.device().drops;
    let taken = server.view(2).counts.rx_wire;
    server.udp(datagram, from);
    let after = server.engine.device().drops;
    let mut reasons = Drop::ALL.into_iter().filter(|reason| after.get(*reason) != before.get(*reason));
    let reason = reasons.next();
    assert_eq!(reasons.next(), None, "for one reason only");
    if let Some(reason) = reason {
        assert_eq!(after.get(reason).packets, before.get(reason).packets + 1);
    }
    assert!(reason.is_some() || server.view(2).counts.rx_wire > taken, "neither taken nor dropped");
    reason
}

/// The session of before, without another handshake, and the endpoint of before.
fn still_delivers(server: &mut Host, client: &mut Host) {
    assert_eq!((server.delivered(), server.sent()), (Packets::new(), vec![]));
    assert_eq!(server.view(2).endpoint, Some(client.addr));
    let handshakes = server.engine.device().handshakes;
    let (up, down) = (packet("10.8.0.2", "192.0.2.99", 700), packet("2001:db8::1", "fd00:cafe::2", 800));
    client.tun(&up);
    server.tun(&down);
    settle(server, client);
    assert_eq!((server.delivered(), client.delivered()), (vec![up], vec![down]));
    assert_eq!(server.engine.device().handshakes, handshakes);
}

/// The message that a client's engine would send for any bytes at all.
fn encrypted(client: &mut Host, inner: &[u8]) -> Vec<u8> {
    let slot = client.engine.directory.get().by_key[&public(1)];
    let mut room = vec![0; MIN_ROOM.max(inner.len() + OVERHEAD)];
    let tunnel = client.engine.peers[usize::from(slot)].as_mut().unwrap().tunnel.as_mut().unwrap();
    let len = tunnel.encrypt(inner, 0, &mut room).unwrap();
    room.truncate(len);
    room
}

fn lengths() -> impl Iterator<Item = usize> {
    (0..200).chain([575, 576, 1279, 1280, 1419, 1420, 1452, 1500, 4096, 9000, 16_384, 65_506, MAX_DATAGRAM])
}

#[test]
fn datagrams_of_every_type_and_length_are_counted_by_what_is_wrong_with_them() {
    let (mut server, mut client) = connected();
    let live = encrypted(&mut client, &[])[4..8].to_vec();
    let unknown: Vec<u8> = live.iter().map(|byte| byte ^ 0x55).collect();
    for kind in (0..=6).chain([0x7f, 0x80, 0xff]) {
        for len in lengths() {
            for (index, is_live) in [(&live, true), (&unknown, false)] {
                let mut datagram = vec![0xa5; len];
                let header = [&[kind, 0, 0, 0], &index[..], &index[..]].concat();
                let shown = len.min(header.len());
                datagram[..shown].copy_from_slice(&header[..shown]);
                let expected = match (kind, len) {
                    (1, 148) => Drop::BadMac,
                    (2, 92) if is_live => Drop::BadMac,
                    (3, 64) | (4, 32..) if is_live => Drop::Decrypt,
                    (2, 92) | (3, 64) | (4, 32..) => Drop::UnknownIndex,
                    _ => Drop::Garbage,
                };
                let reason = fate(&mut server, &datagram, ELSEWHERE);
                assert_eq!(reason, Some(expected), "type {kind}, {len} bytes, live: {is_live}");
            }
        }
    }
    still_delivers(&mut server, &mut client);
}

#[test]
fn a_message_cut_short_or_with_more_behind_it_is_none() {
    let (mut server, mut client) = connected();
    let data = encrypted(&mut client, &packet("10.8.0.2", "192.0.2.99", 100));
    for len in 0..data.len() {
        let expected = if len < OVERHEAD { Drop::Garbage } else { Drop::Decrypt };
        assert_eq!(fate(&mut server, &data[..len], CLIENT), Some(expected), "{len} bytes");
    }
    for more in [1, 16, 1000, MAX_DATAGRAM - data.len()] {
        let longer = [&data[..], &vec![0; more]].concat();
        assert_eq!(fate(&mut server, &longer, CLIENT), Some(Drop::Decrypt), "{more} more");
    }
    assert_eq!(fate(&mut server, &data, CLIENT), None, "and in its length it is one");
    assert_eq!(server.delivered().len(), 1);
    still_delivers(&mut server, &mut client);
}

#[test]
fn every_bit_of_a_data_message_matters() {
    let (mut server, mut client) = connected();
    let data = encrypted(&mut client, &packet("10.8.0.2", "192.0.2.99", 60));
    for bit in 0..data.len() * 8 {
        let mut flipped = data.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let reason = fate(&mut server, &flipped, ELSEWHERE);
        let expected: &[Drop] = match bit / 8 {
            // A longer initiation, for instance.
            0..4 => &[Drop::Garbage],
            // Another session of the peer, or another peer.
            4..8 => &[Drop::NoSession, Drop::UnknownIndex],
            8..16 => &[Drop::Decrypt, Drop::Replay],
            _ => &[Drop::Decrypt],
        };
        assert!(reason.is_some_and(|reason| expected.contains(&reason)), "bit {bit}: {reason:?}");
    }
    assert_eq!(fate(&mut server, &data, CLIENT), None, "nothing of it has used up the counter");
    assert_eq!(server.delivered().len(), 1);
    still_delivers(&mut server, &mut client);
}

/// But for MAC2, which nobody looks at without load.
#[test]
fn every_bit_of_a_handshake_matters() {
    const MAC2: usize = 16;
    let (mut server, mut client) = pair();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    let (_, initiation) = client.sent().remove(0);
    for bit in 0..(initiation.len() - MAC2) * 8 {
        let mut flipped = initiation.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let expected = if bit < 32 { Drop::Garbage } else { Drop::BadMac };
        assert_eq!(fate(&mut server, &flipped, ELSEWHERE), Some(expected), "bit {bit} of the initiation");
    }
    assert_eq!(server.engine.device().live_peers, 0);
    server.udp(&initiation, CLIENT);
    let (_, response) = server.sent().remove(0);
    for bit in 0..(response.len() - MAC2) * 8 {
        let mut flipped = response.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let before = client.engine.device().drops;
        client.udp(&flipped, ELSEWHERE);
        let expected = match bit / 8 {
            0..4 => Drop::Garbage,
            9..12 => Drop::UnknownIndex,
            _ => Drop::BadMac,
        };
        let counted = client.drops(expected) - before.get(expected).packets;
        assert_eq!(counted, 1, "bit {bit} of the response");
    }
    client.udp(&response, SERVER);
    settle(&mut server, &mut client);
    assert_eq!(server.delivered().len(), 1);
    still_delivers(&mut server, &mut client);
}

#[test]
fn what_was_recorded_is_refused_in_any_order_and_from_anywhere() {
    const MESSAGES: usize = 9000;
    let (mut server, mut client) = connected();
    let inner = packet("10.8.0.2", "192.0.2.99", 40);
    let late = encrypted(&mut client, &inner);
    let recorded: Vec<_> = (0..MESSAGES).map(|_| encrypted(&mut client, &inner)).collect();
    // Pairs the wrong way round, as a network may deliver them.
    for pair in recorded.chunks(2) {
        for message in pair.iter().rev() {
            assert_eq!(fate(&mut server, message, CLIENT), None);
        }
        assert_eq!(server.delivered().len(), 2);
    }
    for message in recorded.iter().chain(recorded.iter().rev()) {
        assert_eq!(fate(&mut server, message, ELSEWHERE), Some(Drop::Replay));
    }
    assert_eq!(fate(&mut server, &late, CLIENT), Some(Drop::Replay), "older than the window remembers");
    let counts = server.view(2).counts;
    assert_eq!((counts.rx_packets, counts.rx_inner), (1 + MESSAGES as u64, 100 + 40 * MESSAGES as u64));
    still_delivers(&mut server, &mut client);
}

#[test]
fn nothing_is_taken_from_a_port_that_nothing_can_be_sent_to() {
    let (mut server, mut client) = connected();
    let data = encrypted(&mut client, &packet("10.8.0.2", "192.0.2.99", 100));
    assert_eq!(fate(&mut server, &data, "198.51.100.7:0"), Some(Drop::Garbage));
    assert_eq!(fate(&mut server, &data, CLIENT), None);
    assert_eq!(server.delivered().len(), 1);
    still_delivers(&mut server, &mut client);
}

#[test]
fn a_genuine_message_under_any_other_index_of_the_peer_is_dropped() {
    let (mut server, mut client) = connected();
    let data = encrypted(&mut client, &packet("10.8.0.2", "192.0.2.99", 100));
    for session in (0..=255).filter(|session| *session != data[4]) {
        let mut forged = data.clone();
        forged[4] = session;
        assert_eq!(fate(&mut server, &forged, ELSEWHERE), Some(Drop::NoSession), "session {session}");
    }
    for peer in 0..1_u32 << 12 {
        let mut forged = data.clone();
        let index = u32::from_le_bytes(*data[4..].first_chunk().unwrap());
        forged[4..8].copy_from_slice(&(index ^ (peer + 1) << 8).to_le_bytes());
        assert_eq!(fate(&mut server, &forged, ELSEWHERE), Some(Drop::UnknownIndex), "peer {peer}");
    }
    assert_eq!(fate(&mut server, &data, CLIENT), None);
    assert_eq!(server.delivered().len(), 1);
    still_delivers(&mut server, &mut client);
}

#[test]
fn a_forged_counter_does_not_move_the_window() {
    let (mut server, mut client) = connected();
    let data = encrypted(&mut client, &packet("10.8.0.2", "192.0.2.99", 100));
    let mut forged = data.clone();
    for counter in [1 << 20, 1 << 32, 1 << 60, u64::MAX / 2, REJECT_AFTER_MESSAGES - 1] {
        forged[8..16].copy_from_slice(&u64::to_le_bytes(counter));
        assert_eq!(fate(&mut server, &forged, ELSEWHERE), Some(Drop::Decrypt), "{counter:#x}");
    }
    for counter in [REJECT_AFTER_MESSAGES, REJECT_AFTER_MESSAGES + 1, u64::MAX - 1, u64::MAX] {
        forged[8..16].copy_from_slice(&u64::to_le_bytes(counter));
        assert_eq!(fate(&mut server, &forged, ELSEWHERE), Some(Drop::Replay), "{counter:#x}");
    }
    assert_eq!(fate(&mut server, &data, CLIENT), None);
    assert_eq!(server.delivered().len(), 1);
    still_delivers(&mut server, &mut client);
}

/// An IPv4 packet of `len` bytes whose header says it is `total` long, with `words` of 4 bytes of header.
fn v4(len: usize, words: u8, total: u16) -> Vec<u8> {
    let mut inner = packet("10.8.0.2", "192.0.2.99", len.max(20));
    inner[0] = 0x40 | words;
    inner[2..4].copy_from_slice(&total.to_be_bytes());
    inner.truncate(len);
    inner
}

/// An IPv6 packet of `len` bytes whose header says that `payload` follow it.
fn v6(len: usize, next_header: u8, payload: u16) -> Vec<u8> {
    let mut inner = packet("fd00:cafe::2", "2001:db8::1", len.max(40));
    inner[4..6].copy_from_slice(&payload.to_be_bytes());
    inner[6] = next_header;
    inner.truncate(len);
    inner
}

fn fragment4(flags: u16) -> Vec<u8> {
    let mut inner = v4(36, 5, 36);
    inner[6..8].copy_from_slice(&flags.to_be_bytes());
    inner[9] = 17;
    inner
}

fn fragment6(offset: u16) -> Vec<u8> {
    let mut inner = v6(64, 44, 24);
    inner[40] = 17;
    inner[42..44].copy_from_slice(&offset.to_be_bytes());
    inner
}

#[test]
fn an_authentic_packet_is_delivered_as_long_as_it_says_or_not_at_all() {
    let (mut server, mut client) = connected();
    let delivered = [
        ("a bare header", v4(20, 5, 20), 20),
        ("options", v4(80, 15, 80), 80),
        ("padding behind it", v4(100, 5, 60), 60),
        ("padding behind its options", v4(100, 15, 60), 60),
        ("the first fragment", fragment4(0x2000), 36),
        ("a middle fragment", fragment4(0x2001), 36),
        ("the last fragment there can be", fragment4(0x1fff), 36),
        ("a bare header", v6(40, 59, 0), 40),
        ("padding behind it", v6(200, 59, 20), 60),
        ("a jumbogram is none", v6(200, 59, 0), 40),
        ("the first fragment", fragment6(1), 64),
        ("a later fragment", fragment6(0xfff9), 64),
    ];
    let mut bytes = 100;
    for (what, inner, len) in delivered {
        let message = encrypted(&mut client, &inner);
        assert_eq!(fate(&mut server, &message, CLIENT), None, "{what}");
        assert_eq!(server.delivered(), [&inner[..len]], "{what}");
        bytes += len as u64;
        assert_eq!(server.view(2).counts.rx_inner, bytes, "{what}: billed as delivered");
    }
    let malformed = [
        ("a version of 0", vec![0; 60]),
        ("a version of 5", vec![0x55; 60]),
        ("a version of 15", vec![0xff; 60]),
        ("less than a header", v4(19, 5, 19)),
        ("one byte", v4(1, 5, 1)),
        ("a header of 0", v4(60, 0, 60)),
        ("a header of 16", v4(60, 4, 60)),
        ("a header longer than all", v4(40, 15, 40)),
        ("a total of 0", v4(60, 5, 0)),
        ("a total less than the header", v4(60, 5, 19)),
        ("a total less than the options", v4(60, 15, 59)),
        ("a total of one more", v4(60, 5, 61)),
        ("a total of all there can be", v4(60, 5, u16::MAX)),
        ("less than a header", v6(39, 59, 0)),
        ("one byte", v6(1, 59, 0)),
        ("a payload of one more", v6(60, 59, 21)),
        ("a payload of all there can be", v6(60, 59, u16::MAX)),
    ];
    for (what, inner) in malformed {
        let message = encrypted(&mut client, &inner);
        assert_eq!(fate(&mut server, &message, CLIENT), Some(Drop::Malformed), "{what}");
    }
    assert_eq!(server.view(2).counts.rx_inner, bytes);
    still_delivers(&mut server, &mut client);
}

/// Two peers with live tunnels: the second is key 3 at 10.8.0.3, and lives elsewhere.
fn neighbours() -> (Host, Host, Host) {
    let (mut server, client) = connected();
    server
        .peer(3, |p| {
            p.tenant = Some(TENANT);
            p.allowed_ips = vec!["10.8.0.3/32".parse().unwrap(), "fd00:cafe::3/128".parse().unwrap()];
        })
        .unwrap();
    let mut other = Host::new(3, ELSEWHERE);
    other
        .peer(1, |p| {
            p.endpoint = Some(SERVER.parse().unwrap());
            p.allowed_ips = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
        })
        .unwrap();
    other.tun(&packet("10.8.0.3", "192.0.2.99", 100));
    settle(&mut server, &mut other);
    assert_eq!(server.delivered().len(), 1);
    (server, client, other)
}

#[test]
fn a_peer_can_speak_for_no_other_peer() {
    let (mut server, mut client, mut other) = neighbours();
    let before = (server.view(2), server.view(3));
    let spoofed = [
        packet("10.8.0.2", "192.0.2.99", 100),
        packet("fd00:cafe::2", "2001:db8::1", 100),
        packet("10.8.0.1", "192.0.2.99", 100),
        packet("192.0.2.99", "10.8.0.2", 100),
        packet("0.0.0.0", "255.255.255.255", 100),
        packet("::", "ff02::1", 100),
    ];
    for inner in &spoofed {
        let message = encrypted(&mut other, inner);
        assert_eq!(fate(&mut server, &message, ELSEWHERE), Some(Drop::Spoofed));
    }
    // Its own message under the other's index, and the other's under its own.
    let (theirs, ours) = (encrypted(&mut other, &spoofed[0]), encrypted(&mut client, &spoofed[0]));
    let mut forged = [theirs.clone(), ours.clone()];
    forged[0][4..8].copy_from_slice(&ours[4..8]);
    forged[1][4..8].copy_from_slice(&theirs[4..8]);
    for message in &forged {
        let reason = fate(&mut server, message, ELSEWHERE);
        assert!(matches!(reason, Some(Drop::Decrypt | Drop::Replay)), "{reason:?}");
    }
    let blamed = |view: &PeerView| view.drops.as_ref().map_or(0, |drops| drops.reasons().map(|(_, n)| n).sum::<u64>());
    assert_eq!((blamed(&server.view(2)), blamed(&server.view(3))), (1, spoofed.len() as u64 + 1));
    assert_eq!(server.view(2).counts, before.0.counts, "nothing of it is the other's");
    assert_eq!(server.view(3).counts.rx_inner, before.1.counts.rx_inner);
    assert_eq!(fate(&mut server, &ours, CLIENT), None);
    assert_eq!(server.delivered().len(), 1);
    still_delivers(&mut server, &mut client);
}

#[test]
fn when_the_tun_takes_nothing_more_packets_are_dropped_and_counted() {
    let (mut server, mut client) = connected();
    let inner = packet("10.8.0.2", "192.0.2.99", 100);
    let mut passed = 0;
    for _ in 0..3000 {
        let message = encrypted(&mut client, &inner);
        match fate(&mut server, &message, CLIENT) {
            None => passed += 1,
            reason => assert_eq!(reason, Some(Drop::TunWrite)),
        }
    }
    assert_eq!((server.out.tun().len(), server.drops(Drop::TunWrite)), (passed, 3000 - passed as u64));
    assert!((1..3000).contains(&passed));
    assert_eq!(server.delivered().len(), passed);
    assert_eq!(server.view(2).counts.rx_packets, 1 + passed as u64);
    still_delivers(&mut server, &mut client);
}

#[test]
fn when_the_socket_takes_nothing_more_packets_and_handshakes_are_dropped_and_counted() {
    const MORE_THAN_FIT: u64 = 2000;
    let (mut server, mut client) = connected();
    let down = packet("192.0.2.99", "10.8.0.2", 1400);
    for _ in 0..MORE_THAN_FIT {
        server.tun(&down);
    }
    let sent = server.out.net().len() as u64;
    assert_eq!(server.drops(Drop::TxNoRoom), MORE_THAN_FIT - sent);
    server.peer(7, |_| {}).unwrap();
    let mut stranger = Host::new(7, ELSEWHERE);
    stranger.peer(1, |p| p.endpoint = Some(SERVER.parse().unwrap())).unwrap();
    let slot = stranger.engine.directory.get().by_key[&public(1)];
    stranger.engine.initiate(stranger.now, slot, &mut stranger.out);
    let (_, initiation) = stranger.sent().remove(0);
    let mut refused = 0;
    while server.out.net().len() as u64 - sent < 10 && refused == 0 {
        // Smaller ones still fit into what is left.
        server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
        refused = server.drops(Drop::TxNoRoom) + sent - MORE_THAN_FIT;
    }
    assert_eq!(fate(&mut server, &initiation, ELSEWHERE), Some(Drop::TxNoRoom));
    let datagrams = server.sent();
    assert_eq!(server.view(2).counts.tx_packets, datagrams.len() as u64);
    for (_, datagram) in datagrams {
        client.udp(&datagram, SERVER);
    }
    client.delivered();
    still_delivers(&mut server, &mut client);
    server.udp(&initiation, ELSEWHERE);
    assert_eq!(server.sent().len(), 1, "a repetition is answered: it was not remembered");
}

#[test]
fn the_mark_of_a_hostile_datagram_counts_for_nothing() {
    let (mut server, mut client) = connected();
    let mut forged = encrypted(&mut client, &packet("10.8.0.2", "192.0.2.99", 100));
    *forged.last_mut().unwrap() ^= 1;
    let origin = Origin { from: ELSEWHERE.parse().unwrap(), to: None, ecn: Ecn::Ce };
    server.engine.on_udp(server.now, &forged, origin, &mut server.out);
    assert_eq!((server.drops(Drop::Decrypt), server.drops(Drop::Congestion)), (1, 0));
    still_delivers(&mut server, &mut client);
}
