//! An IP packet as a peer may have encrypted it: what the rules read of it.

use std::net::IpAddr;

use crate::ecn::{self, Ecn};
use crate::packet;
use crate::policy::transport::{Transport, any_transport, transport};
use crate::policy::{DenyRule, Destinations, Hosts};

const MARKS: [Ecn; 4] = [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce];

/// One byte for the mark of the datagram, and the packet.
pub fn inner_packet(input: &[u8]) {
    let Some((mark, packet)) = input.split_first() else {
        return;
    };
    let Some(addresses) = packet::addresses(packet) else {
        return;
    };
    let total = total_len(packet).expect("a well-formed packet has a length");
    assert!(total <= packet.len());
    let seen = transport(packet);
    assert_eq!(seen, any_transport(packet), "the shortcut sees what the long way sees");
    assert_eq!(seen, transport(&packet[..total]), "what lies behind the packet is not looked at");
    forbids(packet, addresses.destination, seen);
    marks(*mark, packet);
}

fn total_len(packet: &[u8]) -> Option<usize> {
    let word = |at: usize| packet.get(at..at + 2).map(|two| usize::from(two[0]) << 8 | usize::from(two[1]));
    match packet.first()? >> 4 {
        4 => word(2),
        6 => word(4).map(|payload| payload + 40),
        _ => None,
    }
}

/// A rule for a port forbids it, and whatever hides its port.
fn forbids(packet: &[u8], destination: IpAddr, seen: Transport) {
    let rule = |text: &str| text.parse::<DenyRule>().expect("a rule");
    let everything = ["0.0.0.0/0", "::/0"].map(|net| net.parse().expect("a prefix"));
    let hosts = Hosts::default();
    let check = |denied: &[DenyRule]| Destinations::new(true, &everything, denied).check(&hosts, packet, destination);
    let open = check(&[]);
    let (port, protocol) = match seen {
        Transport::Port { protocol, port } => (Some(port), protocol),
        Transport::NoPort { protocol } => (None, protocol),
        Transport::Hidden => (None, 6),
    };
    for net in ["0.0.0.0/0", "::/0"] {
        let of_port = port.map(|port| rule(&format!("{net} {protocol} {port}")));
        let denied: Vec<_> = of_port.into_iter().chain([rule(&format!("{net} {protocol}"))]).collect();
        let same_family = net.contains(':') == destination.is_ipv6();
        for denied in denied.chunks(1) {
            let closed = check(denied);
            assert!(closed.is_err() || open.is_ok(), "a rule that denies opens nothing");
            assert!(closed.is_err() || !same_family, "{denied:?} lets {seen:?} pass");
        }
    }
    let smtp = Destinations::new(false, &everything, &[]).check(&hosts, packet, destination);
    let looks_like_smtp = matches!(seen, Transport::Hidden | Transport::Port { protocol: 6, port: 25 });
    assert_eq!(smtp.is_ok(), open.is_ok() && !looks_like_smtp);
}

/// A mark changes the mark, and the checksum stays as right or wrong as it was.
fn marks(mark: u8, packet: &[u8]) {
    let mut marked = packet.to_vec();
    if ecn::decapsulate(MARKS[usize::from(mark & 3)], &mut marked).is_err() {
        assert_eq!((Ecn::of(packet), mark & 3), (Ecn::NotEct, 3), "only such are dropped");
        return;
    }
    let is_v4 = packet[0] >> 4 == 4;
    if is_v4 {
        let header = usize::from(packet[0] & 0x0f) * 4;
        assert_eq!(is_right(&marked[..header]), is_right(&packet[..header]));
        marked[10..12].copy_from_slice(&packet[10..12]);
    }
    let mask = if is_v4 { 0b11 } else { 0b11_0000 };
    assert_eq!(marked[1] & !mask, packet[1] & !mask);
    marked[1] = packet[1];
    assert_eq!(marked, packet);
}

fn is_right(header: &[u8]) -> bool {
    let sum: u32 = header.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(two[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) + (sum >> 16) == 0xffff
}
