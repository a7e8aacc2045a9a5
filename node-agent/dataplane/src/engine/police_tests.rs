//! Policy through whole engines: a server with two tenants' peers, each a client engine of its own.

use std::net::IpAddr;

use super::*;
use crate::change::PeerChange;
use crate::ecn::Ecn;
use crate::noise::Seed;
use crate::policy::lease::Then;
use crate::policy::{PeerLimitsChange, PolicyChange, TenantChange};

const SERVER: &str = "192.0.2.1:51820";
const SERVER_KEY: u8 = 1;
const OURS: [u8; 16] = [1; 16];
const THEIRS: [u8; 16] = [2; 16];

struct Host {
    engine: Engine,
    out: Out,
    addr: SocketAddr,
}

/// A server and clients 2, 3 (of one tenant), 4 (of another) and 5 (of none), at 10.8.0.n, fd00:cafe::n and
/// 198.51.100.n.
struct Net {
    now: Now,
    server: Host,
    clients: Vec<(u8, Host)>,
}

fn public(key: u8) -> [u8; 32] {
    Identity::new(&Secret::new([key; 32]), Seed::random()).public_key()
}

impl Host {
    fn new(key: u8, addr: &str) -> Self {
        let counters = CounterTable::anonymous(16, [key; 16]).unwrap();
        let mut engine = Engine::new(EngineConfig { counters, seed: u64::from(key) });
        engine.set_private_key(&Secret::new([key; 32]));
        Self { engine, out: Out::default(), addr: addr.parse().unwrap() }
    }

    fn set(&mut self, now: Now, key: u8, change: impl FnOnce(&mut PeerChange)) {
        let mut peer = PeerChange { public_key: public(key), ..PeerChange::default() };
        change(&mut peer);
        self.engine.apply_peer(now, peer, &mut self.out).unwrap();
    }

    fn sent(&mut self) -> Vec<(SocketAddr, Vec<u8>)> {
        let mut sent = Vec::new();
        for d in self.out.net().to_vec() {
            sent.push((d.to, self.out.net_bytes()[d.start..d.start + d.len].to_vec()));
            self.engine.sent(d.slot, 1, d.inner as u64, d.len as u64);
        }
        self.out.clear_net();
        sent
    }

    fn delivered(&mut self) -> Vec<Vec<u8>> {
        let packets: Vec<Vec<u8>> = self.out.tun().iter().map(|p| p.of(self.out.tun_bytes()).to_vec()).collect();
        for packet in self.out.tun() {
            self.engine.delivered(packet.slot, 1, packet.len as u64);
        }
        self.out.clear_tun();
        packets
    }
}

impl Net {
    fn new() -> Self {
        let now = Now { mono_ms: 10_000, unix_ms: 1_800_000_000_000 };
        let mut server = Host::new(SERVER_KEY, SERVER);
        server.engine.set_overlay(true, &["10.8.0.0/16".parse().unwrap(), "fd00:cafe::/64".parse().unwrap()]).unwrap();
        let mut clients = Vec::new();
        for (key, tenant) in [(2, Some(OURS)), (3, Some(OURS)), (4, Some(THEIRS)), (5, None)] {
            server.set(now, key, |p| {
                p.tenant = tenant;
                p.allowed_ips =
                    vec![format!("10.8.0.{key}/32").parse().unwrap(), format!("fd00:cafe::{key}/128").parse().unwrap()];
            });
            let mut client = Host::new(key, &format!("198.51.100.{key}:1000"));
            client.set(now, SERVER_KEY, |p| {
                p.endpoint = Some(SERVER.parse().unwrap());
                p.allowed_ips = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
            });
            clients.push((key, client));
        }
        let mut net = Self { now, server, clients };
        for key in 2..=5 {
            net.up(key, &packet(&format!("10.8.0.{key}"), "192.0.2.9", 17, 53, 100));
        }
        assert_eq!(net.server.delivered().len(), 4, "all are connected");
        net
    }

    fn client(&mut self, key: u8) -> &mut Host {
        &mut self.clients.iter_mut().find(|(k, _)| *k == key).unwrap().1
    }

    /// A packet from a client, and everything that follows on the wire.
    fn up(&mut self, key: u8, packet: &[u8]) {
        let now = self.now;
        let client = self.client(key);
        client.engine.on_tun(now, packet, &mut client.out);
        self.carry();
    }

    /// A packet from the server's TUN, and everything that follows.
    fn down(&mut self, packet: &[u8]) {
        self.server.engine.on_tun(self.now, packet, &mut self.server.out);
        self.carry();
    }

    fn carry(&mut self) {
        loop {
            let mut quiet = true;
            for (_, client) in &mut self.clients {
                for (to, datagram) in client.sent() {
                    assert_eq!(to, self.server.addr);
                    let origin = Origin { from: client.addr, to: None, ecn: Ecn::NotEct };
                    self.server.engine.on_udp(self.now, &datagram, origin, &mut self.server.out);
                    while self.server.engine.on_handshakes(self.now, &mut self.server.out) {}
                    quiet = false;
                }
            }
            for (to, datagram) in self.server.sent() {
                let client = &mut self.clients.iter_mut().find(|(_, c)| c.addr == to).unwrap().1;
                let origin = Origin { from: self.server.addr, to: None, ecn: Ecn::NotEct };
                client.engine.on_udp(self.now, &datagram, origin, &mut client.out);
                while client.engine.on_handshakes(self.now, &mut client.out) {}
                quiet = false;
            }
            if quiet {
                return;
            }
        }
    }

    fn later(&mut self, ms: u64) {
        self.now.mono_ms += ms;
    }

    fn limit(&mut self, key: u8, limits: PeerLimitsChange) {
        self.server.set(self.now, key, |p| p.limits = limits);
    }

    fn tenant(&mut self, tenant: [u8; 16], set: impl FnOnce(&mut TenantChange)) {
        let mut change = TenantChange { tenant, ..TenantChange::default() };
        set(&mut change);
        let policy = PolicyChange { tenants: vec![change], ..PolicyChange::default() };
        self.server.engine.change_policy(self.now, policy).unwrap();
    }

    fn view(&self, key: u8) -> PeerView {
        self.server.engine.peers(0, 100).0.into_iter().find(|p| p.public_key == public(key)).unwrap()
    }

    /// Inner bytes of both directions.
    fn total(&self, key: u8) -> u64 {
        self.view(key).counts.rx_inner + self.view(key).counts.tx_inner
    }

    /// Drops of one peer.
    fn blamed(&self, key: u8) -> Vec<(Drop, u64)> {
        self.view(key).drops.iter().flat_map(|drops| drops.reasons().collect::<Vec<_>>()).collect()
    }

    fn drops(&self, reason: Drop) -> u64 {
        self.server.engine.device().drops.get(reason).packets
    }
}

fn packet(source: &str, destination: &str, protocol: u8, port: u16, len: usize) -> Vec<u8> {
    let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
    let mut packet = vec![0_u8; len];
    let ports = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
            packet[8] = 64;
            packet[9] = protocol;
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&destination.octets());
            20
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&u16::try_from(len - 40).unwrap().to_be_bytes());
            packet[6] = protocol;
            packet[7] = 64;
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&destination.octets());
            40
        }
        _ => panic!("one family"),
    };
    packet[ports + 2..ports + 4].copy_from_slice(&port.to_be_bytes());
    packet
}

fn own(key: u8, destination: &str) -> String {
    if destination.contains(':') { format!("fd00:cafe::{key}") } else { format!("10.8.0.{key}") }
}

fn udp(key: u8, destination: &str, len: usize) -> Vec<u8> {
    packet(&own(key, destination), destination, 17, 53, len)
}

#[test]
fn a_tenants_peer_reaches_the_internet_and_no_other_place() {
    let mut net = Net::new();
    let hosts = vec!["203.0.113.1".parse().unwrap(), "2001:db8:1::1".parse().unwrap()];
    net.server.engine.change_policy(net.now, PolicyChange { hosts, ..PolicyChange::default() }).unwrap();
    let closed = [
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "127.0.0.1",
        "224.0.0.251",
        "203.0.113.1",
        "fc00::1",
        "fe80::1",
        "ff02::fb",
        "::1",
        "64:ff9b::10.0.0.1",
        "2001:db8:1::1",
    ];
    for destination in closed {
        net.up(2, &udp(2, destination, 100));
    }
    assert!(net.server.delivered().is_empty());
    assert_eq!(net.blamed(2), [(Drop::Destination, 13)]);
    assert_eq!(net.drops(Drop::Destination), 13);
    for destination in ["198.51.100.10", "198.18.0.1", "203.0.113.2", "2001:db8:1::2"] {
        net.up(2, &udp(2, destination, 100));
    }
    assert_eq!(net.server.delivered().len(), 4);
    for destination in ["10.0.0.1", "fc00::1"] {
        net.up(5, &udp(5, destination, 100));
    }
    assert_eq!(net.server.delivered().len(), 2, "a peer without tenant is under no policy");
}

#[test]
fn smtp_is_refused_in_one_piece_and_in_fragments() {
    let mut net = Net::new();
    for destination in ["192.0.2.25", "2001:db8::25"] {
        let smtp = packet(&own(2, destination), destination, 6, 25, 100);
        net.up(2, &smtp);
        let mut fragment = smtp.clone();
        if destination.contains(':') {
            // A fragment header that says TCP follows, and no TCP.
            fragment.truncate(48);
            fragment[4..6].copy_from_slice(&8_u16.to_be_bytes());
            fragment[6] = 44;
            fragment[40..48].copy_from_slice(&[6, 0, 0, 1, 0, 0, 0, 0]);
        } else {
            fragment.truncate(20 + 3);
            fragment[2..4].copy_from_slice(&23_u16.to_be_bytes());
            fragment[6] = 0x20;
        }
        net.up(2, &fragment);
        net.up(2, &packet(&own(2, destination), destination, 6, 587, 100));
    }
    assert_eq!(net.server.delivered().len(), 2, "submission");
    assert_eq!(net.blamed(2), [(Drop::Port, 4)]);
    net.tenant(OURS, |t| t.smtp = Some(true));
    net.up(2, &packet("10.8.0.2", "192.0.2.25", 6, 25, 100));
    net.up(4, &packet("10.8.0.4", "192.0.2.25", 6, 25, 100));
    assert_eq!(net.server.delivered().len(), 1, "the other tenant's stays closed");
}

#[test]
fn a_tenant_has_destinations_of_its_own() {
    let mut net = Net::new();
    net.tenant(OURS, |t| {
        t.allow_to = vec!["10.0.0.0/8".parse().unwrap()];
        t.deny_to = vec!["198.51.100.0/24".parse().unwrap(), "2001:db8::/32 udp 53".parse().unwrap()];
    });
    for key in [2, 4] {
        for destination in ["10.1.2.3", "198.51.100.10", "2001:db8::1"] {
            net.up(key, &udp(key, destination, 100));
        }
    }
    assert_eq!(net.server.delivered().len(), 3);
    assert_eq!(net.blamed(2), [(Drop::Destination, 1), (Drop::Port, 1)]);
    assert_eq!(net.blamed(4), [(Drop::Destination, 1)]);
    net.up(2, &udp(2, "10.8.7.7", 100));
    assert_eq!(net.drops(Drop::Isolation), 1, "what a tenant allows does not open the overlay");
}

#[test]
fn a_spoofed_source_is_seen_at_its_peer() {
    let mut net = Net::new();
    net.up(2, &packet("10.8.0.3", "192.0.2.9", 17, 53, 100));
    net.up(2, &packet("fd00:cafe::3", "2001:db8::9", 17, 53, 100));
    assert!(net.server.delivered().is_empty());
    assert_eq!((net.blamed(2), net.blamed(3)), (vec![(Drop::Spoofed, 2)], vec![]));
}

#[test]
fn peers_of_one_tenant_reach_each_other_only_if_it_allows_and_never_others() {
    let mut net = Net::new();
    let attempt = |net: &mut Net, from: u8, to: &str| {
        let packet = udp(from, to, 200);
        net.up(from, &packet);
        let got = net.clients.iter_mut().find_map(|(key, client)| (!client.delivered().is_empty()).then_some(*key));
        assert!(net.server.delivered().is_empty(), "nothing of it reaches the host");
        got
    };
    for (from, to) in [(2, "10.8.0.3"), (3, "fd00:cafe::2"), (2, "10.8.0.4"), (2, "10.8.0.1"), (2, "10.8.0.2")] {
        assert_eq!(attempt(&mut net, from, to), None);
    }
    assert_eq!(net.drops(Drop::Isolation), 5);
    net.tenant(OURS, |t| t.allow_intra = Some(true));
    let before = (net.view(2).counts, net.view(3).counts);
    assert_eq!(attempt(&mut net, 2, "10.8.0.3"), Some(3));
    assert_eq!(attempt(&mut net, 3, "fd00:cafe::2"), Some(2));
    assert_eq!(attempt(&mut net, 3, "10.8.0.2"), Some(2));
    for (from, to) in [(2, "10.8.0.4"), (4, "10.8.0.2"), (2, "10.8.0.5"), (2, "10.8.0.1"), (2, "10.8.0.2")] {
        assert_eq!(attempt(&mut net, from, to), None, "{from} to {to}");
    }
    let after = (net.view(2).counts, net.view(3).counts);
    assert_eq!((after.0.rx_inner - before.0.rx_inner, after.0.tx_inner - before.0.tx_inner), (200, 400));
    assert_eq!((after.1.rx_inner - before.1.rx_inner, after.1.tx_inner - before.1.tx_inner), (400, 200));
    assert_eq!(net.server.engine.device().hairpin, crate::drops::Dropped { packets: 3, bytes: 600 });
    net.down(&packet("10.8.0.2", "10.8.0.3", 17, 53, 100));
    assert_eq!(net.drops(Drop::TxIsolation), 1, "around the engine there is no way");
    net.tenant(OURS, |t| t.remove = true);
    assert_eq!(attempt(&mut net, 2, "10.8.0.3"), None);
}

#[test]
fn a_packet_between_peers_spends_a_hop_and_on_its_last_goes_no_further() {
    let mut net = Net::new();
    net.tenant(OURS, |t| t.allow_intra = Some(true));
    for (to, at) in [("10.8.0.3", 8), ("fd00:cafe::3", 7)] {
        let with_hops = |hops| {
            let mut packet = udp(2, to, 100);
            packet[at] = hops;
            packet
        };
        net.up(2, &with_hops(2));
        let got = net.client(3).delivered();
        assert_eq!((got.len(), got[0][at]), (1, 1));
        let charged = net.view(2).counts;
        for last in [0, 1] {
            net.up(2, &with_hops(last));
        }
        assert!(net.client(3).delivered().is_empty());
        assert_eq!(net.view(2).counts.rx_inner, charged.rx_inner, "what is dropped is not charged");
        // to the host it is, which spends hops itself
        let outward = if at == 8 { "192.0.2.9" } else { "2001:db8::9" };
        let mut packet = udp(2, outward, 100);
        packet[at] = 1;
        net.up(2, &packet);
        assert_eq!(net.server.delivered(), [packet]);
    }
    assert_eq!(net.blamed(2), [(Drop::HopLimit, 4)]);
}

#[test]
fn a_hairpin_to_a_peer_that_is_away_is_its_drop_and_is_charged_to_both_limits() {
    let mut net = Net::new();
    net.tenant(OURS, |t| t.allow_intra = Some(true));
    let now = net.now;
    net.server.set(now, 6, |p| {
        p.tenant = Some(OURS);
        p.allowed_ips = vec!["10.8.0.6/32".parse().unwrap()];
    });
    net.up(2, &udp(2, "10.8.0.6", 100));
    assert_eq!(net.blamed(6), [(Drop::TxNoEndpoint, 1)]);
    net.limit(3, PeerLimitsChange { lease: Some(Some(net.total(3) + 150)), ..Default::default() });
    for _ in 0..3 {
        net.up(2, &udp(2, "10.8.0.3", 100));
    }
    assert_eq!((net.client(3).delivered().len(), net.blamed(3)), (1, vec![(Drop::TxLeaseEnded, 2)]));
}

#[test]
fn rates_hold_for_each_direction_and_family_over_seconds() {
    const BITS: u64 = 8_000_000;
    let mut net = Net::new();
    net.limit(2, PeerLimitsChange { rate_up: Some(BITS), rate_down: Some(BITS / 2), ..Default::default() });
    // Spend the bursts, then count three seconds at three times the rate.
    let (mut up, mut down) = (0, 0);
    for ms in 0..3500_u64 {
        net.later(1);
        for packet in [udp(2, "192.0.2.9", 1000), udp(2, "2001:db8::9", 1000), udp(2, "192.0.2.9", 1000)] {
            net.up(2, &packet);
        }
        net.down(&packet("192.0.2.9", "10.8.0.2", 17, 53, 1000));
        net.down(&packet("2001:db8::9", "fd00:cafe::2", 17, 53, 1000));
        let (received, sent) = (net.server.delivered().len(), net.client(2).delivered().len());
        if ms >= 500 {
            up += received;
            down += sent;
        }
    }
    let close = |packets: usize, expected: f64| (packets as f64 - expected).abs() <= expected * 0.02;
    assert!(close(up, 3000.0) && close(down, 1500.0), "{up} up, {down} down");
    let blamed = net.blamed(2);
    let dropped = |reason| blamed.iter().find(|(r, _)| *r == reason).unwrap().1;
    assert_eq!(net.drops(Drop::RateLimited), dropped(Drop::RateLimited));
    assert_eq!(net.drops(Drop::TxRateLimited), dropped(Drop::TxRateLimited));
    assert!(dropped(Drop::RateLimited) > 6000 && dropped(Drop::TxRateLimited) > 4500);
}

#[test]
fn a_tenants_rates_hold_over_seconds_however_its_peers_share_them() {
    const BITS: u64 = 8_000_000;
    let mut net = Net::new();
    net.tenant(OURS, |t| {
        t.rate_up = Some(BITS);
        t.rate_down = Some(BITS / 2);
    });
    let (mut up, mut down) = (0, 0);
    for ms in 0..3500_u64 {
        net.later(1);
        // By turns one of them is silent; together they send three times the rate.
        for key in [2, 2, 3].map(|key| if ms / 700 % 2 == 0 { key } else { 5 - key }) {
            net.up(key, &udp(key, "192.0.2.9", 1000));
        }
        net.down(&packet("192.0.2.9", &own(if ms % 3 == 0 { 2 } else { 3 }, "192.0.2.9"), 17, 53, 1000));
        net.down(&packet("192.0.2.9", &own(2, "192.0.2.9"), 17, 53, 1000));
        let (received, sent) = (net.server.delivered().len(), [2, 3].map(|key| net.client(key).delivered().len()));
        if ms >= 500 {
            up += received;
            down += sent[0] + sent[1];
        }
    }
    let close = |packets: usize, expected: f64| (packets as f64 - expected).abs() <= expected * 0.02;
    assert!(close(up, 3000.0) && close(down, 1500.0), "{up} up, {down} down");
}

#[test]
fn a_tenants_rate_holds_for_all_its_peers_together() {
    let mut net = Net::new();
    net.tenant(OURS, |t| {
        t.rate_up = Some(1);
        t.rate_down = Some(1);
    });
    let burst = 256 * 1024 / 1024;
    for _ in 0..burst / 2 {
        for key in [2, 3, 4, 5] {
            net.up(key, &udp(key, "192.0.2.9", 1024));
            net.down(&packet("192.0.2.9", &own(key, "192.0.2.9"), 17, 53, 1024));
        }
    }
    assert_eq!(net.drops(Drop::RateLimited) + net.drops(Drop::TxRateLimited), 0);
    for key in [2, 3, 4, 5] {
        net.up(key, &udp(key, "192.0.2.9", 1024));
        net.down(&packet("192.0.2.9", &own(key, "192.0.2.9"), 17, 53, 1024));
    }
    for key in [2, 3] {
        assert_eq!(net.blamed(key), [(Drop::RateLimited, 1), (Drop::TxRateLimited, 1)]);
    }
    assert_eq!((net.blamed(4), net.blamed(5)), (vec![], vec![]));
}

#[test]
fn a_lease_ends_to_the_byte_in_both_directions_and_renewing_it_goes_on() {
    for key in [2, 5] {
        let mut net = Net::new();
        net.down(&packet("192.0.2.9", &own(key, "192.0.2.9"), 17, 53, 500));
        let before = net.total(key);
        assert_eq!(before, 600, "both directions");
        let lease = |until| PeerLimitsChange { lease: Some(Some(until)), ..Default::default() };
        net.limit(key, lease(before + 10_000));
        for _ in 0..20 {
            net.up(key, &udp(key, "192.0.2.9", 700));
            net.server.delivered();
            net.down(&packet("2001:db8::9", &own(key, "::"), 17, 53, 700));
        }
        let rest: u16 = 10_000 - 14 * 700;
        assert_eq!(net.total(key) - before, 10_000 - u64::from(rest));
        net.up(key, &udp(key, "192.0.2.9", usize::from(rest) + 1));
        net.up(key, &udp(key, "192.0.2.9", usize::from(rest)));
        net.down(&packet("192.0.2.9", &own(key, "192.0.2.9"), 17, 53, 60));
        net.server.delivered();
        assert_eq!(net.total(key) - before, 10_000, "to the byte");
        assert_eq!(net.blamed(key), [(Drop::LeaseEnded, 14), (Drop::TxLeaseEnded, 14)]);
        net.limit(key, lease(before + 10_000));
        net.up(key, &udp(key, "192.0.2.9", 60));
        assert!(net.server.delivered().is_empty(), "the same lease again is no new one");
        net.limit(key, lease(before + 10_060));
        net.up(key, &udp(key, "192.0.2.9", 60));
        assert_eq!(net.server.delivered().len(), 1);
        net.limit(key, PeerLimitsChange { lease: Some(None), ..Default::default() });
        net.up(key, &udp(key, "192.0.2.9", 1000));
        assert_eq!(net.server.delivered().len(), 1);
    }
}

#[test]
fn what_the_host_did_not_take_of_a_lease_is_given_back() {
    let mut net = Net::new();
    net.down(&packet("192.0.2.9", "10.8.0.2", 17, 53, 500));
    let before = net.total(2);
    net.limit(2, PeerLimitsChange { lease: Some(Some(before + 1000)), ..Default::default() });
    net.up(2, &udp(2, "192.0.2.9", 1000));
    net.server.out.clear_tun(); // the TUN took nothing
    net.up(2, &udp(2, "192.0.2.9", 1000));
    assert!(net.server.delivered().is_empty(), "it might have");
    net.later(1000);
    net.up(2, &udp(2, "192.0.2.9", 1001));
    net.up(2, &udp(2, "192.0.2.9", 1000));
    net.server.delivered();
    assert_eq!(net.total(2) - before, 1000);
}

#[test]
fn a_lease_that_ended_throttles_if_told_so() {
    let mut net = Net::new();
    let throttle = Some(Then::Throttle(64_000));
    net.limit(2, PeerLimitsChange { lease: Some(Some(0)), then: throttle, ..Default::default() });
    let (mut up, mut down) = (0, 0);
    for _ in 0..10_000 {
        net.later(1);
        net.up(2, &udp(2, "192.0.2.9", 100));
        net.down(&packet("192.0.2.9", "10.8.0.2", 17, 53, 100));
        up += net.server.delivered().len();
        down += net.client(2).delivered().len();
    }
    assert!((790..=800).contains(&up) && (790..=800).contains(&down), "{up} and {down} of 8,000 bytes a second");
    assert_eq!(net.view(2).limits.then, Then::Throttle(64_000));
}

#[test]
fn a_flow_that_reaches_the_end_of_its_lease_goes_on_at_the_throttles_rate() {
    const LEFT: u64 = 100_500;
    const THROTTLE: u64 = 800_000;
    let mut net = Net::new();
    let throttle = Some(Then::Throttle(THROTTLE));
    let lease = Some(Some(net.total(2) + LEFT));
    net.limit(2, PeerLimitsChange { lease, then: throttle, ..Default::default() });
    let (mut passed, mut ended_ms) = (0, 0);
    for ms in 1..=5000_u64 {
        net.later(1);
        net.up(2, &udp(2, "192.0.2.9", 1000));
        passed += net.server.delivered().len() as u64;
        if passed * 1000 + 1000 > LEFT && ended_ms == 0 {
            ended_ms = ms;
            assert_eq!(passed, LEFT / 1000, "the lease ends at its number");
        }
    }
    assert_eq!(ended_ms, 100, "and nothing held the flow up until then");
    let throttled = (passed - LEFT / 1000) as f64 * 8000.0;
    let expected = THROTTLE as f64 * (5000 - ended_ms) as f64 / 1000.0;
    assert!((throttled - expected).abs() <= expected * 0.02, "{throttled} of {expected} bits");
}

#[test]
fn limits_end_with_the_life_of_a_peer_and_survive_a_change() {
    let mut net = Net::new();
    net.limit(2, PeerLimitsChange { rate_up: Some(5), ..Default::default() });
    net.limit(2, PeerLimitsChange { lease: Some(Some(7)), ..Default::default() });
    assert_eq!((net.view(2).limits.rate_up, net.view(2).limits.lease), (5, Some(7)));
    let now = net.now;
    net.server.set(now, 2, |p| p.generation = Some(9));
    assert_eq!(net.view(2).limits, crate::policy::PeerLimits::default());
    net.limit(2, PeerLimitsChange { rate_up: Some(5), ..Default::default() });
    net.server.engine.begin_replace();
    net.server.set(now, 2, |p| p.generation = Some(9));
    net.server.engine.end_replace();
    assert_eq!(net.view(2).limits, crate::policy::PeerLimits::default(), "a replaced peer is as good as new");
}

#[test]
fn a_replacement_with_the_same_limits_fills_no_bucket() {
    let mut net = Net::new();
    let limits = PeerLimitsChange { rate_up: Some(1), ..Default::default() };
    net.limit(2, limits);
    net.tenant(THEIRS, |t| t.rate_up = Some(1));
    for key in [2, 4] {
        (0..256).for_each(|_| net.up(key, &udp(key, "192.0.2.9", 1024)));
        assert_eq!((net.server.delivered().len(), net.blamed(key)), (256, vec![]));
    }
    net.server.engine.begin_replace();
    for (key, tenant, limits) in [(2, OURS, limits), (4, THEIRS, Default::default())] {
        net.server.set(net.now, key, |p| {
            p.tenant = Some(tenant);
            p.limits = limits;
            p.allowed_ips = vec![format!("10.8.0.{key}/32").parse().unwrap()];
        });
    }
    net.server.engine.end_replace();
    for key in [2, 4] {
        net.up(key, &udp(key, "192.0.2.9", 1024));
        assert_eq!((net.server.delivered().len(), net.blamed(key)), (0, vec![(Drop::RateLimited, 1)]));
    }
}

#[test]
fn all_that_one_receive_brings_may_go_from_peer_to_peer() {
    let mut net = Net::new();
    net.tenant(OURS, |t| t.allow_intra = Some(true));
    net.up(2, &udp(2, "10.8.0.3", 100));
    net.client(3).delivered();
    // What two sockets hand over in one call is a megabyte.
    let (now, count) = (net.now, 1024 * 1024 / 1452);
    for _ in 0..count {
        let client = net.client(2);
        client.engine.on_tun(now, &udp(2, "10.8.0.3", 1420), &mut client.out);
        for (_, datagram) in client.sent() {
            let origin = Origin { from: "198.51.100.2:1000".parse().unwrap(), to: None, ecn: Ecn::NotEct };
            net.server.engine.on_udp(now, &datagram, origin, &mut net.server.out);
        }
    }
    assert_eq!((net.server.out.net().len(), net.drops(Drop::TxNoRoom)), (count, 0));
    net.carry();
    assert_eq!(net.client(3).delivered().len(), count);
}

#[test]
fn engines_that_share_rates_hold_one_limit_together() {
    let mut one = Net::new();
    let mut other = Net::new();
    let rates = crate::policy::SharedRates::default();
    for net in [&mut one, &mut other] {
        net.server.engine =
            Engine::new(EngineConfig { counters: CounterTable::anonymous(4, [0; 16]).unwrap(), seed: 1 });
        net.server.engine.share_rates(rates.clone());
        net.tenant(OURS, |t| t.rate_down = Some(1));
        let now = net.now;
        net.server.set(now, 2, |p| p.tenant = Some(OURS));
    }
    let slot = |net: &Net| net.server.engine.directory.get().by_key[&public(2)];
    let (a, b) = (slot(&one), slot(&other));
    let mut passed = 0;
    while one.server.engine.charge(one.now, a, crate::policy::Direction::Down, 1024).is_ok()
        && other.server.engine.charge(other.now, b, crate::policy::Direction::Down, 1024).is_ok()
    {
        passed += 2;
    }
    assert_eq!(passed, 256);
}
