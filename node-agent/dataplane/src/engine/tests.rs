//! Two engines back to back: what one sends is what the other receives. No sockets, no clock.

use std::net::{Ipv4Addr, SocketAddr};

use proptest::prelude::*;

use super::*;
use crate::change::{PeerChange, Refused};
use crate::ecn::Ecn;
use crate::noise::Seed;
use crate::policy::PeerLimitsChange;
use crate::tunnel::{REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES};

pub(super) const SERVER: &str = "192.0.2.1:51820";
pub(super) const CLIENT: &str = "198.51.100.7:40000";
pub(super) const ELSEWHERE: &str = "203.0.113.9:50000";
pub(super) const START: Now = Now { mono_ms: 1_000, unix_ms: 1_800_000_000_000 };
pub(super) const TENANT: [u8; 16] = [1; 16];

pub(super) struct Host {
    pub(super) engine: Engine,
    pub(super) out: Out,
    pub(super) addr: SocketAddr,
    pub(super) now: Now,
}

pub(super) type Packets = Vec<Vec<u8>>;

impl Host {
    pub(super) fn new(key: u8, addr: &str) -> Self {
        let counters = CounterTable::anonymous(16, [key; 16]).unwrap();
        Self::with(counters, key, addr)
    }

    pub(super) fn with(counters: CounterTable, key: u8, addr: &str) -> Self {
        let mut engine = Engine::new(EngineConfig { counters, seed: u64::from(key) * 0x1234_5678_9abc });
        engine.set_private_key(&secret(key));
        Self { engine, out: Out::default(), addr: addr.parse().unwrap(), now: START }
    }

    pub(super) fn peer(&mut self, key: u8, change: impl FnOnce(&mut PeerChange)) -> Result<(), Refused> {
        let mut peer = PeerChange { public_key: public(key), ..PeerChange::default() };
        change(&mut peer);
        self.engine.apply_peer(self.now, peer, &mut self.out)
    }

    pub(super) fn udp(&mut self, datagram: &[u8], from: &str) {
        let origin = Origin { from: from.parse().unwrap(), to: None, ecn: Ecn::NotEct };
        self.engine.on_udp(self.now, datagram, origin, &mut self.out);
        while self.engine.on_handshakes(self.now, &mut self.out) {}
    }

    pub(super) fn tun(&mut self, packet: &[u8]) {
        self.engine.on_tun(self.now, packet, &mut self.out);
    }

    pub(super) fn tick(&mut self, ms: u64) {
        self.now.mono_ms += ms;
        self.now.unix_ms += ms;
        self.engine.on_tick(self.now, &mut self.out);
    }

    /// Takes all datagrams as if the socket had sent them.
    pub(super) fn sent(&mut self) -> Vec<(SocketAddr, Vec<u8>)> {
        let datagrams: Vec<Datagram> = self.out.net().to_vec();
        let bytes = |d: &Datagram| self.out.net_bytes()[d.start..d.start + d.len].to_vec();
        let sent = datagrams.iter().map(|d| (d.to, bytes(d))).collect();
        for d in datagrams {
            self.engine.sent(d.slot, 1, d.inner as u64, d.len as u64);
        }
        self.out.clear_net();
        sent
    }

    /// Takes all packets as if the TUN had taken them.
    pub(super) fn delivered(&mut self) -> Packets {
        let packets: Packets = self.out.tun().iter().map(|p| p.of(self.out.tun_bytes()).to_vec()).collect();
        for packet in self.out.tun() {
            self.engine.delivered(packet.slot, 1, packet.len as u64);
        }
        self.out.clear_tun();
        packets
    }

    pub(super) fn drops(&self, reason: Drop) -> u64 {
        self.engine.device().drops.get(reason).packets
    }

    pub(super) fn view(&self, key: u8) -> PeerView {
        self.engine.peers(0, 100).0.into_iter().find(|p| p.public_key == public(key)).unwrap()
    }
}

/// Takes the final counters as if the journal had them.
pub(super) fn closed(host: &mut Host) -> Vec<ClosedPeer> {
    let mut closed = Vec::new();
    let take = |peers: &[ClosedPeer]| {
        closed.extend_from_slice(peers);
        Ok::<(), ()>(())
    };
    host.engine.settle(100, take).unwrap();
    closed
}

pub(super) fn secret(key: u8) -> Secret {
    Secret::new([key; 32])
}

pub(super) fn public(key: u8) -> [u8; 32] {
    Identity::new(&secret(key), Seed::random()).public_key()
}

pub(super) fn packet(source: &str, destination: &str, len: usize) -> Vec<u8> {
    let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
    let mut packet = vec![0_u8; len];
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
            packet[8] = 64;
            packet[12..16].copy_from_slice(&source.octets());
            packet[16..20].copy_from_slice(&destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&u16::try_from(len - 40).unwrap().to_be_bytes());
            packet[6] = 59; // no next header
            packet[7] = 64;
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&destination.octets());
        }
        _ => panic!("one family"),
    }
    packet
}

/// Lets both talk until nothing is on the wire.
pub(super) fn settle(server: &mut Host, client: &mut Host) {
    loop {
        let (from_client, from_server) = (client.sent(), server.sent());
        if from_client.is_empty() && from_server.is_empty() {
            return;
        }
        for (to, datagram) in from_client {
            assert_eq!(to, server.addr);
            server.udp(&datagram, &client.addr.to_string());
        }
        for (_, datagram) in from_server {
            client.udp(&datagram, &server.addr.to_string());
        }
    }
}

/// A server with a tenant's peer 2 at 10.8.0.2, and that peer as client with everything routed to the server.
pub(super) fn pair() -> (Host, Host) {
    let mut server = Host::new(1, SERVER);
    server.engine.set_overlay(true, &["10.8.0.0/16".parse().unwrap(), "fd00:cafe::/64".parse().unwrap()]).unwrap();
    server
        .peer(2, |p| {
            p.tenant = Some(TENANT);
            p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap(), "fd00:cafe::2/128".parse().unwrap()];
        })
        .unwrap();
    let mut client = Host::new(2, CLIENT);
    client
        .peer(1, |p| {
            p.endpoint = Some(SERVER.parse().unwrap());
            p.allowed_ips = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
        })
        .unwrap();
    (server, client)
}

pub(super) fn connected() -> (Host, Host) {
    let (mut server, mut client) = pair();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered().len(), 1, "the packet that began the handshake is not lost");
    (server, client)
}

#[test]
fn data_flows_both_ways_and_is_counted_to_the_byte() {
    let (mut server, mut client) = connected();
    let up = packet("fd00:cafe::2", "2001:db8::1", 1280);
    client.tun(&up);
    settle(&mut server, &mut client);
    assert_eq!(server.delivered(), [up]);
    let down = packet("192.0.2.99", "10.8.0.2", 1420);
    server.tun(&down);
    settle(&mut server, &mut client);
    assert_eq!(client.delivered(), [down]);
    let counts = server.view(2).counts;
    assert_eq!((counts.rx_inner, counts.rx_packets), (1380, 2));
    assert_eq!((counts.tx_inner, counts.tx_packets), (1420, 1));
    assert_eq!(counts.rx_wire, 148 + 132 + 1312, "initiation, two packets");
    assert_eq!(counts.tx_wire, 92 + 1452);
    assert_eq!(counts.last_handshake_ms, START.unix_ms);
    assert_eq!(server.view(2).endpoint, Some(CLIENT.parse().unwrap()));
}

#[test]
fn lengths_are_rounded_up_as_far_as_the_mtu_and_the_counters_do_not_see_it() {
    let (mut server, mut client) = connected();
    client.engine.set_mtu(1420);
    let before = server.view(2).counts;
    for (len, wire) in [(33, 48), (48, 48), (100, 112), (1409, 1420), (1420, 1420), (1421, 1421)] {
        let up = packet("10.8.0.2", "192.0.2.99", len);
        client.tun(&up);
        let sent = client.sent();
        assert_eq!(sent[0].1.len(), wire + 32);
        server.udp(&sent[0].1, CLIENT);
        assert_eq!(server.delivered(), [up]);
    }
    let (at_server, at_client) = (server.view(2).counts, client.view(1).counts);
    assert_eq!(at_server.rx_inner - before.rx_inner, 33 + 48 + 100 + 1409 + 1420 + 1421);
    assert_eq!(at_client.tx_inner, at_server.rx_inner);
}

#[test]
fn a_cold_server_peer_has_no_tunnel_and_cannot_be_called_without_endpoint() {
    let (mut server, _) = pair();
    server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
    assert_eq!(server.drops(Drop::TxNoEndpoint), 1);
    assert_eq!(server.engine.device().live_peers, 0);
    server.tun(&packet("192.0.2.99", "10.9.9.9", 100));
    assert_eq!(server.drops(Drop::TxNoRoute), 1);
}

#[test]
fn a_spoofed_source_is_dropped() {
    let (mut server, mut client) = connected();
    for source in ["10.8.0.3", "192.0.2.5"] {
        client.tun(&packet(source, "192.0.2.99", 100));
    }
    client.tun(&packet("fd00:cafe::3", "2001:db8::1", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered(), Packets::new());
    assert_eq!(server.drops(Drop::Spoofed), 3);
    assert_eq!(server.view(2).counts.rx_packets, 1);
}

#[test]
fn tenants_reach_neither_each_other_nor_their_own_nor_the_gateway() {
    let (mut server, mut client) = connected();
    server
        .peer(3, |p| {
            p.tenant = Some([9; 16]);
            p.allowed_ips = vec!["10.8.0.3/32".parse().unwrap(), "172.20.0.3/32".parse().unwrap()];
        })
        .unwrap();
    for destination in ["10.8.0.3", "10.8.0.1", "10.8.255.255", "172.20.0.3"] {
        client.tun(&packet("10.8.0.2", destination, 100));
    }
    client.tun(&packet("fd00:cafe::2", "fd00:cafe::3", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered(), Packets::new());
    assert_eq!(server.drops(Drop::Isolation), 5);
    server.tun(&packet("10.8.0.3", "10.8.0.2", 100));
    assert_eq!(server.drops(Drop::TxIsolation), 1, "should the host forward it all the same");
}

#[test]
fn a_tenants_peer_may_only_have_single_addresses() {
    let (mut server, _) = pair();
    let wide = |p: &mut PeerChange| p.allowed_ips = vec!["10.0.0.0/8".parse().unwrap()];
    assert_eq!(server.peer(2, wide), Err(Refused::TenantPrefix));
    assert_eq!(server.view(2).allowed_ips.len(), 2, "nothing was changed");
    server.peer(4, wide).unwrap();
    assert_eq!(server.peer(4, |p| p.tenant = Some(TENANT)), Err(Refused::TenantPrefix));
}

#[test]
fn a_peer_roams_only_with_authenticated_messages() {
    let (mut server, mut client) = connected();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    let (_, datagram) = client.sent().remove(0);
    let mut forged = datagram.clone();
    *forged.last_mut().unwrap() ^= 1;
    server.udp(&forged, ELSEWHERE);
    assert_eq!(server.view(2).endpoint, Some(CLIENT.parse().unwrap()));
    assert_eq!(server.drops(Drop::Decrypt), 1);
    server.udp(&datagram, ELSEWHERE);
    assert_eq!(server.view(2).endpoint, Some(ELSEWHERE.parse().unwrap()));
    server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
    assert_eq!(server.sent()[0].0, ELSEWHERE.parse().unwrap());
}

#[test]
fn replays_are_dropped_and_move_no_endpoint() {
    let (mut server, mut client) = pair();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    let (_, initiation) = client.sent().remove(0);
    server.udp(&initiation, CLIENT);
    let (_, response) = server.sent().remove(0);
    assert_eq!(server.view(2).endpoint, None, "an initiation alone proves nothing");
    server.now.mono_ms += 100;
    server.udp(&initiation, ELSEWHERE);
    assert_eq!((server.drops(Drop::Replay), server.sent().len()), (1, 0));
    client.udp(&response, SERVER);
    let datagrams = client.sent();
    assert_eq!(datagrams.len(), 1, "the held packet");
    for (_, datagram) in datagrams.iter().chain(&datagrams) {
        server.udp(datagram, CLIENT);
    }
    assert_eq!((server.delivered().len(), server.drops(Drop::Replay)), (1, 2));
}

#[test]
fn counters_at_the_end_of_their_range_are_refused() {
    let (mut server, mut client) = connected();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    let (_, mut datagram) = client.sent().remove(0);
    for counter in [REJECT_AFTER_MESSAGES, u64::MAX] {
        datagram[8..16].copy_from_slice(&counter.to_le_bytes());
        server.udp(&datagram, CLIENT);
    }
    assert_eq!(server.drops(Drop::Replay), 2);
}

#[test]
fn handshakes_due_with_many_peers_at_once_are_begun_a_few_at_a_time() {
    const PEERS: u16 = 600;
    let mut server = Host::with(CounterTable::anonymous(PEERS.into(), [1; 16]).unwrap(), 1, SERVER);
    for number in 0..PEERS {
        let mut public_key = [9; 32];
        public_key[..2].copy_from_slice(&number.to_le_bytes());
        let endpoint = Some(format!("198.51.100.7:{}", 10_000 + number).parse().unwrap());
        let peer = PeerChange { public_key, endpoint, persistent_keepalive: Some(25), ..PeerChange::default() };
        server.engine.apply_peer(server.now, peer, &mut server.out).unwrap();
    }
    let (mut begun, mut passed_ms) = (0, 0);
    while passed_ms < 1500 {
        let ms = server.engine.tick_interval_ms();
        server.tick(ms);
        passed_ms += ms;
        let sent = server.sent();
        assert!(sent.len() <= 10, "{} at once", sent.len());
        assert!(sent.iter().all(|(_, datagram)| datagram[0] == 1));
        begun += sent.len();
    }
    assert_eq!(begun, usize::from(PEERS), "each once in little more than a second");
}

#[test]
fn very_many_prefixes_go_a_few_at_a_time_before_the_change_that_ends_them() {
    const PREFIXES: u32 = 10_000;
    let nets = || (0..PREFIXES).map(|n| IpNet::new(Ipv4Addr::from(0x0b00_0000 + n).into(), 32).unwrap()).collect();
    let mut server = Host::new(1, SERVER);
    let few = || vec!["11.0.0.0/8".parse().unwrap()];
    let of = |change: &dyn Fn(&mut PeerChange)| {
        let mut one = PeerChange { public_key: public(7), ..PeerChange::default() };
        change(&mut one);
        [one]
    };
    let replaces = |one: &mut PeerChange, nets| (one.replace_allowed_ips, one.allowed_ips) = (true, nets);
    let is_heavy = |server: &Host, changes: &[PeerChange]| server.engine.light(changes) < changes.len();
    let wide: [&dyn Fn(&mut PeerChange); 3] = [&|one| one.remove = true, &|one| replaces(one, few()), &|one| {
        (one.generation, one.allowed_ips) = (Some(7), few())
    }];
    for change in wide {
        server.peer(7, |p| p.remove = true).unwrap();
        closed(&mut server);
        server.peer(7, |p| p.allowed_ips = nets()).unwrap();
        assert!(!is_heavy(&server, &of(&|one| replaces(one, nets()))), "they are the same");
        assert!(!is_heavy(&server, &of(&|one| (one.tenant, one.allowed_ips) = (Some(TENANT), few()))), "refused");
        let change = of(change);
        let mut times = 0;
        while is_heavy(&server, &change) {
            server.engine.trim(&change[0]);
            times += 1;
        }
        assert_eq!((times, server.view(7).allowed_ips.len()), (2, 10_000 - 2 * 4096));
        let [change] = change;
        let left = change.allowed_ips.clone();
        server.engine.apply_peer(server.now, change, &mut server.out).unwrap();
        closed(&mut server);
        let views = server.engine.peers(0, 10).0;
        assert!(views.iter().all(|view| view.allowed_ips == left), "all others are gone");
        assert_eq!(server.engine.directory.get().routes.find("11.0.0.7".parse().unwrap()).is_some(), !left.is_empty());
    }

    server.peer(7, |p| (p.replace_allowed_ips, p.allowed_ips) = (true, nets())).unwrap();
    let last: IpNet = nets().pop().unwrap();
    let [narrowed] =
        of(&|one| (one.generation, one.replace_allowed_ips, one.allowed_ips) = (Some(7), true, vec![last]));
    while is_heavy(&server, std::slice::from_ref(&narrowed)) {
        server.engine.trim(&narrowed);
        assert!(server.engine.directory.get().routes.owner(last).is_some(), "what is named stays");
    }
    server.engine.apply_peer(server.now, narrowed, &mut server.out).unwrap();
    closed(&mut server);
    assert_eq!(server.view(7).allowed_ips, [last]);

    let mut crowded = Host::new(1, SERVER);
    crowded.peer(7, |p| p.allowed_ips = nets()).unwrap();
    let next_life = of(&|one| (one.generation, one.replace_allowed_ips, one.allowed_ips) = (Some(8), true, few()));
    let fills = |number: u32| {
        let mut public_key = [0; 32];
        public_key[..4].copy_from_slice(&number.to_le_bytes());
        PeerChange { public_key, ..PeerChange::default() }
    };
    assert!(is_heavy(&crowded, &next_life));
    let refused = (1..).map(fills).find_map(|one| crowded.engine.apply_peer(crowded.now, one, &mut crowded.out).err());
    assert_eq!(refused, Some(Refused::Full));
    assert!(!is_heavy(&crowded, &next_life), "it will be refused");
    crowded.engine.apply_peer(crowded.now, next_life[0].clone(), &mut crowded.out).unwrap_err();
    assert_eq!(crowded.view(7).allowed_ips.len(), 10_000, "nothing of it was applied");

    server.peer(7, |p| (p.replace_allowed_ips, p.allowed_ips) = (true, nets())).unwrap();
    server.peer(8, |p| p.allowed_ips = vec!["10.8.0.8/32".parse().unwrap()]).unwrap();
    server.engine.begin_replace();
    server.peer(8, |p| p.allowed_ips = vec!["10.8.0.8/32".parse().unwrap()]).unwrap();
    server.engine.end_replace();
    let mut slices = 1;
    while server.engine.settle(100, |_| Ok::<(), ()>(())).unwrap() == Settled::More {
        slices += 1;
    }
    assert_eq!((slices, server.engine.peers(0, 10).0.len()), (3, 1));
    assert!(server.engine.directory.get().routes.find("11.0.0.7".parse().unwrap()).is_none());
}

#[test]
fn after_so_many_messages_either_side_makes_a_new_session() {
    let directions = [packet("192.0.2.99", "10.8.0.2", 100), packet("10.8.0.2", "192.0.2.99", 100)];
    for (sender, packet) in directions.into_iter().enumerate() {
        let mut hosts = <[Host; 2]>::from(connected());
        let later = |hosts: &mut [Host; 2]| hosts.iter_mut().for_each(|host| host.tick(10_000));
        let skip = |hosts: &mut [Host; 2], counter| {
            let tunnel = hosts[sender].engine.peers.iter_mut().flatten().find_map(|peer| peer.tunnel.as_mut());
            tunnel.unwrap().skip_to(counter);
        };
        let leaving = |hosts: &[Host; 2]| {
            let out = &hosts[sender].out;
            out.net().iter().map(|datagram| out.net_bytes()[datagram.start]).collect::<Vec<_>>()
        };
        let arrived = |hosts: &mut [Host; 2]| {
            let [server, client] = hosts;
            settle(server, client);
            hosts[1 - sender].delivered().len()
        };

        later(&mut hosts);
        arrived(&mut hosts);
        skip(&mut hosts, REKEY_AFTER_MESSAGES - 1);
        hosts[sender].tun(&packet);
        assert_eq!(leaving(&hosts), [4], "the last one that may wait");
        hosts[sender].tun(&packet);
        assert_eq!(leaving(&hosts), [4, 4, 1], "a new session is asked for, and the old one goes on");
        let handshakes = hosts[0].engine.device().handshakes;
        assert_eq!(arrived(&mut hosts), 2);
        assert_eq!(hosts[0].engine.device().handshakes, handshakes + 1);

        later(&mut hosts);
        arrived(&mut hosts);
        skip(&mut hosts, REJECT_AFTER_MESSAGES);
        hosts[sender].tun(&packet);
        assert_eq!(leaving(&hosts), [1], "nothing leaves in the old one");
        assert_eq!(arrived(&mut hosts), 1, "what waited is not lost");
    }
}

#[test]
fn a_forged_initiation_leaves_no_tunnel_behind() {
    let (mut server, mut client) = pair();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    let (_, mut initiation) = client.sent().remove(0);
    initiation[147 - 16] ^= 1;
    server.udp(&initiation, CLIENT);
    assert_eq!(server.drops(Drop::BadMac), 1);
    let mut stranger = Host::new(7, ELSEWHERE);
    stranger
        .peer(1, |p| {
            p.endpoint = Some(SERVER.parse().unwrap());
            p.allowed_ips = vec!["0.0.0.0/0".parse().unwrap()];
        })
        .unwrap();
    stranger.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    server.udp(&stranger.sent()[0].1, ELSEWHERE);
    assert_eq!(server.drops(Drop::UnknownPeer), 1);
    assert_eq!(server.engine.device().live_peers, 0);
}

#[test]
fn a_wrong_preshared_key_gives_no_session_and_the_right_one_does() {
    let (mut server, mut client) = pair();
    server.peer(2, |p| p.preshared_key = Some(secret(50))).unwrap();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered(), Packets::new());
    client.peer(1, |p| p.preshared_key = Some(secret(50))).unwrap();
    server.now.mono_ms += 100;
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered().len(), 1);
}

#[test]
fn another_preshared_key_holds_from_the_next_handshake_on() {
    let (mut server, mut client) = connected();
    let handshakes = server.engine.device().handshakes;
    let (up, down) = (packet("10.8.0.2", "192.0.2.99", 100), packet("192.0.2.99", "10.8.0.2", 100));
    let both_ways = |server: &mut Host, client: &mut Host| {
        client.tun(&up);
        server.tun(&down);
        settle(server, client);
        (server.delivered().len(), client.delivered().len())
    };
    server.peer(2, |p| p.preshared_key = Some(secret(50))).unwrap();
    assert_eq!(both_ways(&mut server, &mut client), (1, 1));
    pass(&mut server, &mut client, 119);
    client.peer(1, |p| p.preshared_key = Some(secret(50))).unwrap();
    assert_eq!(both_ways(&mut server, &mut client), (1, 1));
    assert_eq!(server.engine.device().handshakes, handshakes, "in the same session");
    pass(&mut server, &mut client, 2);
    assert_eq!(both_ways(&mut server, &mut client), (1, 1));
    assert_eq!(server.engine.device().handshakes, handshakes + 1, "with the new key on both sides");
    server.peer(2, |p| p.preshared_key = Some(secret(51))).unwrap();
    pass(&mut server, &mut client, 121);
    both_ways(&mut server, &mut client);
    pass(&mut server, &mut client, 60);
    assert_eq!(both_ways(&mut server, &mut client), (0, 0), "only one side has it");
}

/// Seconds in which both do what is due, and talk.
fn pass(server: &mut Host, client: &mut Host, seconds: u64) {
    for _ in 0..seconds * 10 {
        server.tick(100);
        client.tick(100);
        settle(server, client);
    }
}

#[test]
fn who_began_a_session_renews_it_by_age_when_it_is_used_and_nobody_else_does() {
    let (up, down) = (packet("10.8.0.2", "192.0.2.99", 100), packet("192.0.2.99", "10.8.0.2", 100));
    // After so many seconds, what is sent by whom, and whether a new session is made of it within a second.
    for (seconds, from_initiator, renews) in
        [(118, true, false), (121, true, true), (121, false, false), (163, false, false), (166, false, true)]
    {
        let (mut server, mut client) = connected();
        pass(&mut server, &mut client, seconds);
        let handshakes = server.engine.device().handshakes;
        if from_initiator {
            client.tun(&up)
        } else {
            server.tun(&down)
        }
        pass(&mut server, &mut client, 1);
        let made = server.engine.device().handshakes - handshakes;
        assert_eq!(made, u64::from(renews), "{seconds} s, from the initiator: {from_initiator}");
        assert_eq!(server.delivered().len() + client.delivered().len(), 1);
    }
}

#[test]
fn a_session_that_nobody_uses_ends_in_silence_after_three_minutes() {
    let (mut server, mut client) = connected();
    pass(&mut server, &mut client, 15);
    let wire = |host: &Host, key| (host.view(key).counts.rx_wire, host.view(key).counts.tx_wire);
    let before = (wire(&server, 2), wire(&client, 1));
    pass(&mut server, &mut client, 163);
    let live = |host: &Host| {
        host.engine.peers.iter().flatten().any(|peer| peer.tunnel.as_ref().is_some_and(|t| t.has_session()))
    };
    assert!(live(&server) && live(&client));
    pass(&mut server, &mut client, 4);
    assert!(!live(&server) && !live(&client));
    assert_eq!((wire(&server, 2), wire(&client, 1)), before);
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered().len(), 1, "and there is a new one when it is wanted");
}

#[test]
fn a_handshake_that_nobody_answers_is_repeated_for_ninety_seconds_and_given_up() {
    let (_, mut client) = pair();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    let mut sent_at = Vec::new();
    for ms in (0..150_000_u64).step_by(100) {
        sent_at.extend(client.sent().iter().map(|_| ms));
        client.tick(100);
        if ms == 85_000 {
            assert_eq!(client.drops(Drop::TxNoSession), 0);
        }
    }
    assert!(sent_at.windows(2).all(|two| (5_000..=5_500).contains(&(two[1] - two[0]))), "{sent_at:?}");
    assert!((84_000..=90_000).contains(sent_at.last().unwrap()), "{sent_at:?}");
    assert_eq!(client.drops(Drop::TxNoSession), 1, "what waited is dropped with it");
}

#[test]
fn packets_wait_for_the_handshake_in_a_bounded_queue() {
    let (mut server, mut client) = pair();
    for _ in 0..QUEUE_PER_PEER + 5 {
        client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    }
    assert_eq!(client.out.net().len(), 1, "one initiation");
    settle(&mut server, &mut client);
    assert_eq!(server.delivered().len(), QUEUE_PER_PEER);
    assert_eq!(client.drops(Drop::TxNoSession), 5);
    assert_eq!(client.engine.handshakes.load.held(), 0);
}

#[test]
fn what_waited_in_vain_and_what_the_shell_lost_is_shown_at_the_peer() {
    let (_, mut client) = pair();
    let shown = |client: &Host| -> Vec<_> { client.view(1).drops.unwrap().reasons().collect() };
    for _ in 0..3 {
        client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    }
    client.sent();
    let slot = client.engine.directory.get().by_key[&public(1)];
    client.engine.drop_tunnel(slot);
    assert_eq!((client.drops(Drop::TxNoSession), shown(&client)), (3, vec![(Drop::TxNoSession, 3)]));
    client.engine.lost(Drop::TunWrite, slot, 4, 400);
    client.engine.lost(Drop::TunWrite, NO_SLOT, 1, 100);
    assert_eq!(client.drops(Drop::TunWrite), 5);
    assert_eq!(shown(&client), [(Drop::TunWrite, 4), (Drop::TxNoSession, 3)]);
}

#[test]
fn a_persistent_keepalive_makes_and_keeps_the_session() {
    let (mut server, mut client) = pair();
    client.peer(1, |p| p.persistent_keepalive = Some(25)).unwrap();
    client.tick(100);
    settle(&mut server, &mut client);
    assert_eq!(server.view(2).endpoint, Some(CLIENT.parse().unwrap()), "without any packet");
    let before = server.view(2).counts.rx_wire;
    for _ in 0..24 {
        client.tick(1000);
    }
    assert_eq!(client.sent().len(), 0);
    client.tick(1100);
    settle(&mut server, &mut client);
    assert_eq!(server.view(2).counts.rx_wire, before + 32);
}

/// What is sent right after something was received is an acknowledgement, and the last word before a path is gone.
#[test]
fn data_without_an_answer_for_fifteen_seconds_begins_a_handshake() {
    let (mut server, mut client) = connected();
    server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
    settle(&mut server, &mut client);
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    assert_eq!(client.sent().len(), 1, "lost on the way");
    for _ in 0..14 {
        client.tick(1000);
    }
    assert!(client.sent().iter().all(|(_, datagram)| datagram[0] != 1), "not yet");
    for _ in 0..2 {
        client.tick(1000);
    }
    let sent = client.sent();
    assert_eq!(sent.iter().filter(|(_, datagram)| datagram[0] == 1).count(), 1, "one initiation");
    // For the server as much time has passed: initiations may not follow each other at once.
    server.tick(16_000);
    server.sent();
    for (_, datagram) in sent {
        server.udp(&datagram, ELSEWHERE);
    }
    assert_eq!(server.sent()[0].0, ELSEWHERE.parse().unwrap(), "the answer finds the way");
}

#[test]
fn data_that_nothing_follows_is_confirmed_after_ten_seconds() {
    let (mut server, mut client) = connected();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
    for (_, datagram) in server.sent() {
        client.udp(&datagram, SERVER);
    }
    assert_eq!(client.delivered().len(), 1);
    for _ in 0..9 {
        client.tick(1000);
    }
    assert_eq!(client.sent(), [], "not yet");
    for _ in 0..5 {
        client.tick(1000);
    }
    let sent = client.sent();
    assert_eq!(sent.iter().map(|(_, datagram)| (datagram[0], datagram.len())).collect::<Vec<_>>(), [(4, 32)]);
    server.udp(&sent[0].1, ELSEWHERE);
    assert_eq!(server.view(2).endpoint, ELSEWHERE.parse().ok(), "which tells where the client is now");
}

#[test]
fn answered_data_and_keepalives_begin_no_handshake() {
    let (mut server, mut client) = connected();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
    settle(&mut server, &mut client);
    client.peer(1, |p| p.persistent_keepalive = Some(5)).unwrap();
    for _ in 0..20 {
        client.tick(1000);
    }
    assert!(client.sent().iter().all(|(_, datagram)| datagram[0] == 4));
}

#[test]
fn another_private_key_ends_the_sessions() {
    let (mut server, mut client) = connected();
    server.engine.set_private_key(&secret(1));
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered().len(), 1, "the same key changes nothing");
    server.engine.set_private_key(&secret(60));
    assert_eq!(server.engine.device().live_peers, 0);
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!((server.delivered().len(), server.drops(Drop::NoSession)), (0, 1));
}

#[test]
fn removal_journals_the_final_counters_before_the_slot_is_used_again() {
    let (mut server, _client) = connected();
    let slot = server.engine.directory.get().by_key[&public(2)];
    server.peer(2, |p| p.remove = true).unwrap();
    server.peer(5, |_| {}).unwrap();
    assert_ne!(server.engine.directory.get().by_key[&public(5)], slot, "not before the journal has it");
    assert!(server.engine.settle(10, |_| Err("disk full")).is_err());
    let closed = closed(&mut server);
    assert_eq!(closed.len(), 1);
    assert_eq!((closed[0].public_key, closed[0].epoch, closed[0].counts.rx_inner), (public(2), [1; 16], 100));
    server.peer(6, |_| {}).unwrap();
    assert_eq!(server.engine.directory.get().by_key[&public(6)], slot);
    assert_eq!(server.view(6).counts, crate::counters::Counts::default());
}

#[test]
fn another_generation_starts_at_zero_and_the_same_goes_on() {
    let (mut server, mut client) = connected();
    server.peer(2, |p| p.generation = Some(0)).unwrap();
    assert_eq!(server.view(2).counts.rx_inner, 100);
    server
        .peer(2, |p| {
            p.generation = Some(1);
            p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap()];
        })
        .unwrap();
    assert_eq!(server.view(2).counts.rx_inner, 0);
    assert_eq!(closed(&mut server)[0].counts.rx_inner, 100);
    client.peer(1, |p| p.remove = true).unwrap();
    assert_eq!(server.engine.device().peers, 1);
}

#[test]
fn a_life_that_is_removed_and_added_again_is_counted_on() {
    let (mut server, mut client) = connected();
    let add = |server: &mut Host, generation| {
        server
            .peer(2, |p| {
                p.generation = generation;
                p.tenant = Some(TENANT);
                p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap()];
            })
            .unwrap();
    };
    add(&mut server, Some(3));
    closed(&mut server);
    for host in [&mut server, &mut client] {
        host.now.mono_ms += 200_000;
        host.now.unix_ms += 200_000;
    }
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered().len(), 1);
    for generation in [Some(3), None] {
        server.peer(2, |p| p.remove = true).unwrap();
        let last = closed(&mut server)[0].counts;
        assert_eq!((last.rx_inner, last.rx_packets), (100, 1));
        add(&mut server, generation);
        let expected = if generation.is_some() { last } else { crate::counters::Counts::default() };
        assert_eq!(server.view(2).counts, crate::counters::Counts { last_handshake_ms: 0, ..expected });
    }
}

#[test]
fn a_life_that_another_process_closed_is_counted_on_in_its_epoch() {
    let (mut server, _client) = connected();
    let record = |key, epoch, rx_inner| ClosedPeer {
        epoch,
        public_key: public(key),
        generation: 3,
        counts: crate::counters::Counts { rx_inner, ..Default::default() },
    };
    let epoch = [1; 16];
    server.engine.remember(&[record(5, epoch, 40), record(6, [9; 16], 50), record(5, epoch, 70)]);
    for (key, expected) in [(5, 70), (6, 0)] {
        server.peer(key, |p| p.generation = Some(3)).unwrap();
        assert_eq!(server.view(key).counts.rx_inner, expected);
    }
    server.peer(7, |p| p.generation = None).unwrap();
    assert_eq!(server.view(7).counts.rx_inner, 0);
}

#[test]
fn replacing_all_peers_keeps_the_sessions_of_those_that_stay() {
    let (mut server, mut client) = connected();
    server.peer(3, |p| p.allowed_ips = vec!["10.8.0.3/32".parse().unwrap()]).unwrap();
    server.engine.begin_replace();
    server
        .peer(2, |p| {
            p.tenant = Some(TENANT);
            p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap()];
        })
        .unwrap();
    let down = packet("192.0.2.99", "10.8.0.3", 100);
    let unroutable = server.drops(Drop::TxNoRoute);
    server.tun(&down);
    assert_eq!(server.drops(Drop::TxNoRoute), unroutable, "until the end peer 3 goes on");
    server.engine.end_replace();
    assert_eq!(closed(&mut server).len(), 1, "only peer 3 is closed");
    server.tun(&down);
    assert_eq!(server.drops(Drop::TxNoRoute), unroutable + 1);
    assert_eq!(server.view(2).allowed_ips.len(), 1);
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!((server.delivered().len(), server.view(2).counts.rx_inner), (1, 200));
}

#[test]
fn a_peer_named_in_a_replacement_is_as_new_but_for_session_endpoint_and_counters() {
    let (mut server, mut client) = connected();
    server.peer(2, |p| p.persistent_keepalive = Some(25)).unwrap();
    let (endpoint, before) = (server.view(2).endpoint, server.view(2).counts);
    server.engine.begin_replace();
    server.peer(2, |p| p.update_only = true).unwrap();
    assert_eq!(server.view(2).tenant, Some(TENANT), "an update names nobody new");
    // What a tenant's peer may not have is no matter any more.
    server.peer(2, |p| p.allowed_ips = vec!["10.0.0.0/8".parse().unwrap()]).unwrap();
    server.peer(2, |p| p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap()]).unwrap();
    server.engine.end_replace();
    assert_eq!(closed(&mut server), []);
    let view = server.view(2);
    assert_eq!((view.tenant, view.persistent_keepalive, view.allowed_ips.len()), (None, 0, 2));
    assert_eq!((view.endpoint, view.counts), (endpoint, before));
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    assert_eq!(server.delivered().len(), 1, "in the same session");
    assert_eq!(server.sent(), []);
}

#[test]
fn the_end_of_a_replacement_is_swept_in_slices_and_waits_for_the_journal() {
    let mut server = Host::new(1, SERVER);
    for key in 2..14 {
        server.peer(key, |_| {}).unwrap();
    }
    server.engine.begin_replace();
    server.peer(7, |_| {}).unwrap();
    server.engine.end_replace();
    assert!(server.engine.settle(4, |_| Err("disk full")).is_err());
    assert!(server.engine.settle(4, |_| Err("disk full")).is_err());
    assert_eq!(server.engine.device().peers, 8, "the others go on while nobody can say what they used");
    let mut slices = Vec::new();
    let mut settled = Settled::More;
    while settled == Settled::More {
        settled = server
            .engine
            .settle(4, |peers| {
                slices.push(peers.len());
                Ok::<(), ()>(())
            })
            .unwrap();
    }
    assert_eq!(slices, [4, 4, 3]);
    assert_eq!((server.engine.device().peers, server.view(7).generation), (1, 0));
    server.peer(3, |_| {}).unwrap();
}

#[test]
fn a_change_waits_for_the_journal_only_if_it_needs_what_a_removed_peer_holds() {
    let mut server = Host::new(1, SERVER);
    let all = 2..18;
    for key in all.clone() {
        server.peer(key, |_| {}).unwrap();
    }
    let change = |key: u8| PeerChange { public_key: public(key), ..PeerChange::default() };
    for key in all.clone() {
        server.peer(key, |p| p.remove = true).unwrap();
    }
    assert!(server.engine.waits_for_settling(&change(99)), "there is no free slot");
    server.engine.settle(4, |_| Ok::<(), ()>(())).unwrap();
    assert!(!server.engine.waits_for_settling(&change(99)));
    assert_eq!(server.peer(2, |_| {}), Err(Refused::Closing));
    for key in all {
        while server.engine.waits_for_settling(&change(key)) {
            server.engine.settle(4, |_| Ok::<(), ()>(())).unwrap();
        }
        server.peer(key, |_| {}).unwrap();
    }
    assert_eq!(server.engine.device().peers, 16);
}

#[test]
fn after_a_restart_counters_go_on_and_recent_peers_are_called_back() {
    let dir = tempfile::tempdir().unwrap();
    let open = || CounterTable::open(dir.path(), 16, [3; 16], [1; 16]).unwrap();
    let mut server = Host::with(open(), 1, SERVER);
    let mut client = Host::new(2, CLIENT);
    let configure = |server: &mut Host| {
        server
            .peer(2, |p| {
                p.generation = Some(7);
                p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap()];
            })
            .unwrap();
    };
    configure(&mut server);
    client
        .peer(1, |p| {
            p.endpoint = Some(SERVER.parse().unwrap());
            p.allowed_ips = vec!["0.0.0.0/0".parse().unwrap()];
        })
        .unwrap();
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    server.delivered();
    drop(server);

    let mut server = Host::with(open(), 1, SERVER);
    server.now.unix_ms += 60_000;
    configure(&mut server);
    assert_eq!(server.view(2).counts.rx_inner, 100);
    assert!(server.engine.tick_interval_ms() < 100, "at once");
    server.tick(10);
    settle(&mut server, &mut client);
    let down = packet("192.0.2.99", "10.8.0.2", 100);
    server.tun(&down);
    settle(&mut server, &mut client);
    assert_eq!(client.delivered(), [down], "nobody had to wait for the client");
}

#[test]
fn a_hundred_peers_are_called_back_within_a_second_a_few_at_a_time() {
    const PEERS: u8 = 100;
    let counters = CounterTable::anonymous(256, [3; 16]).unwrap();
    for (slot, key) in (0..).zip(100..100 + PEERS) {
        counters.occupy(slot, &public(key), 1);
        counters.set_endpoint(slot, CLIENT.parse().unwrap());
        counters.set_last_handshake(slot, START.unix_ms);
    }
    let mut server = Host::with(counters, 1, SERVER);
    for key in 100..100 + PEERS {
        server.peer(key, |p| p.generation = Some(1)).unwrap();
    }
    let began = server.now.mono_ms;
    let mut called = 0;
    while called < PEERS.into() {
        let interval = server.engine.tick_interval_ms();
        server.tick(interval);
        let these = server.out.net().len();
        assert!(these <= 10, "{these} at a time keep everybody waiting");
        called += these;
        server.out.clear_net();
        assert!(server.now.mono_ms - began <= 1000, "{called} of {PEERS}");
    }
}

/// A table in which an earlier process left two lives of peer 2 and one of peer 3.
fn left_behind(dir: &std::path::Path) -> CounterTable {
    let counters = CounterTable::open(dir, 16, [3; 16], [1; 16]).unwrap();
    counters.occupy(0, &public(2), 6);
    counters.add(0, Field::RxInner, 600);
    counters.occupy(1, &public(2), 7);
    counters.add(1, Field::RxInner, 700);
    counters.occupy(2, &public(3), 1);
    counters
}

fn lives(closed: &[ClosedPeer]) -> Vec<([u8; 32], u64)> {
    let mut lives: Vec<_> = closed.iter().map(|c| (c.public_key, c.generation)).collect();
    lives.sort_by_key(|(_, generation)| *generation);
    lives
}

#[test]
fn the_end_of_a_replace_closes_what_an_earlier_process_left_and_nobody_added() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Host::with(left_behind(dir.path()), 1, SERVER);
    server.peer(2, |p| p.generation = Some(7)).unwrap();
    server.engine.end_replace();
    assert_eq!(lives(&closed(&mut server)), [(public(3), 1), (public(2), 6)]);
    assert_eq!(server.view(2).counts.rx_inner, 700, "this one goes on");
    server.engine.end_replace();
    assert_eq!(closed(&mut server), [], "nothing is closed twice");
}

#[test]
fn removing_a_peer_closes_its_lives_of_an_earlier_process_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Host::with(left_behind(dir.path()), 1, SERVER);
    server.peer(2, |p| p.generation = Some(7)).unwrap();
    server.peer(2, |p| p.remove = true).unwrap();
    let closed = closed(&mut server);
    assert_eq!(lives(&closed), [(public(2), 6), (public(2), 7)]);
    let bytes: u64 = closed.iter().map(|c| c.counts.rx_inner).sum();
    assert_eq!(bytes, 1300);
}

#[test]
fn a_life_that_is_not_in_the_journal_yet_is_not_added_a_second_time() {
    let mut server = Host::new(1, SERVER);
    server.peer(2, |p| p.generation = Some(7)).unwrap();
    server.peer(2, |p| p.remove = true).unwrap();
    let add = |p: &mut PeerChange| p.generation = Some(7);
    assert_eq!(server.peer(2, add), Err(Refused::Closing));
    assert_eq!(server.engine.device().peers, 0);
    server.peer(2, |p| p.generation = Some(8)).unwrap();
    assert_eq!(server.peer(2, add), Err(Refused::Closing));
    assert_eq!(server.view(2).generation, 8, "nothing was changed");
    closed(&mut server);
    server.peer(2, add).unwrap();
    assert_eq!(server.view(2).generation, 7);
}

#[test]
fn allowed_ips_move_to_the_peer_that_is_told_last() {
    let (mut server, _) = pair();
    server.peer(3, |p| p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap()]).unwrap();
    assert_eq!(server.view(2).allowed_ips, ["fd00:cafe::2/128".parse::<IpNet>().unwrap()]);
    assert_eq!(server.view(3).allowed_ips, ["10.8.0.2/32".parse::<IpNet>().unwrap()]);
    server.peer(3, |p| p.removed_ips = vec!["10.8.0.2/32".parse().unwrap()]).unwrap();
    assert_eq!(server.view(3).allowed_ips, []);
}

#[test]
fn many_prefixes_move_and_go_together() {
    let mut server = Host::new(1, SERVER);
    let nets: Vec<IpNet> =
        (0..1000).map(|bits| IpNet::from(IpAddr::from(Ipv4Addr::from(0x0a00_0000 + bits)))).collect();
    server.peer(2, |p| p.allowed_ips.clone_from(&nets)).unwrap();
    server.peer(3, |p| p.allowed_ips = vec!["10.9.0.1/32".parse().unwrap()]).unwrap();
    server
        .peer(4, |p| p.allowed_ips = nets[100..].iter().copied().chain(["10.9.0.1/32".parse().unwrap()]).collect())
        .unwrap();
    assert_eq!((server.view(2).allowed_ips[..].to_vec(), server.view(3).allowed_ips.len()), (nets[..100].to_vec(), 0));
    server.peer(4, |p| p.removed_ips = nets[50..900].to_vec()).unwrap();
    assert_eq!(server.view(4).allowed_ips.len(), 101);
    assert_eq!(server.view(2).allowed_ips.len(), 100, "only the owner's go");
    consistent(&server.engine).unwrap();
}

#[test]
fn more_prefixes_of_the_overlay_than_a_packet_can_be_compared_with_are_refused() {
    let mut server = Host::new(1, SERVER);
    let nets: Vec<IpNet> = (0..257).map(|bits| IpNet::from(IpAddr::from(Ipv4Addr::from(0x0a00_0000 + bits)))).collect();
    server.engine.set_overlay(true, &nets[..256]).unwrap();
    assert!(server.engine.set_overlay(false, &nets[256..]).is_err());
    server.engine.set_overlay(false, &nets[..10]).unwrap();
    assert_eq!(server.engine.device().overlay.len(), 256);
}

#[test]
fn a_full_table_refuses_and_changes_nothing() {
    let mut server = Host::new(1, SERVER);
    for key in 2..18 {
        server.peer(key, |_| {}).unwrap();
    }
    assert_eq!(server.peer(100, |_| {}), Err(Refused::Full));
    assert_eq!(server.engine.device().peers, 16);
}

#[test]
fn our_own_key_is_no_peer() {
    let mut server = Host::new(1, SERVER);
    server.peer(1, |_| {}).unwrap();
    assert_eq!(server.engine.device().peers, 0);
    server.peer(9, |_| {}).unwrap();
    server.engine.set_private_key(&secret(9));
    assert_eq!(server.engine.device().peers, 0);
}

#[test]
fn a_malformed_packet_inside_an_authentic_message_is_dropped() {
    let (mut server, mut client) = connected();
    let slot = client.engine.directory.get().by_key[&public(1)];
    for bytes in [&[0x45][..], &[0x45, 0, 0, 5], &[0x60; 39], &[0; 100], &[0xff; 20]] {
        let mut inner = bytes.to_vec();
        if inner.len() == 4 {
            inner.resize(24, 0);
        }
        let peer = client.engine.peers[usize::from(slot)].as_mut().unwrap();
        let mut room = vec![0; 2000];
        let len = peer.tunnel.as_mut().unwrap().encrypt(&inner, 0, &mut room).unwrap();
        server.udp(&room[..len], CLIENT);
    }
    assert_eq!((server.delivered().len(), server.drops(Drop::Malformed)), (0, 5));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn garbage_never_panics_and_never_reaches_the_tun(
        kind in 0_u8..6, len in 0_usize..2000, seed: u64, index: u32, counter: u64,
    ) {
        let (mut server, _client) = connected();
        let mut bytes = vec![0_u8; len];
        let mut state = seed;
        for byte in &mut bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = state.to_be_bytes()[0];
        }
        let header: Vec<u8> = [&[kind, 0, 0, 0][..], &index.to_le_bytes(), &counter.to_le_bytes()].concat();
        let n = len.min(16);
        bytes[..n].copy_from_slice(&header[..n]);
        server.udp(&bytes, ELSEWHERE);
        // The same for the live session, and at the lengths the protocol has.
        let slot = server.engine.directory.get().by_key[&public(2)];
        let live = server.engine.index_of(slot) << 8;
        for session in 0..3_u32 {
            if len >= 12 {
                bytes[4..8].copy_from_slice(&(live | session).to_le_bytes());
                bytes[8..12].copy_from_slice(&(live | session).to_le_bytes());
                server.udp(&bytes, ELSEWHERE);
            }
            for (kind, size) in [(1, 148), (2, 92), (3, 64), (4, 32), (4, 33)] {
                bytes.resize(size.max(12), 0);
                bytes[0] = kind;
                bytes[1..4].fill(0);
                server.udp(&bytes[..size], ELSEWHERE);
            }
        }
        server.tun(&bytes);
        prop_assert_eq!(server.delivered(), Packets::new());
        prop_assert_eq!(server.view(2).endpoint, Some(CLIENT.parse().unwrap()));
    }

    #[test]
    fn whatever_a_client_sends_only_its_own_source_passes(source: u32, destination: u32, len in 20_usize..1400) {
        let (mut server, mut client) = connected();
        let (source, destination) = (Ipv4Addr::from(source), Ipv4Addr::from(destination));
        client.tun(&packet(&source.to_string(), &destination.to_string(), len));
        client.tun(&packet("10.8.0.2", &destination.to_string(), len));
        settle(&mut server, &mut client);
        let overlay: IpNet = "10.8.0.0/16".parse().unwrap();
        let outside = !overlay.contains(&IpAddr::V4(destination));
        let passed = server.delivered().len() as u64;
        prop_assert_eq!(passed + server.drops(Drop::Destination), u64::from(outside));
        prop_assert_eq!(server.drops(Drop::Spoofed) + server.drops(Drop::Isolation), 2 - u64::from(outside));
    }

    #[test]
    fn changes_in_any_order_keep_the_tables_consistent(
        steps in proptest::collection::vec((0_u8..6, 2_u8..8, 0_u8..4, 0_u64..3), 0..60),
    ) {
        let (mut server, _client) = connected();
        for (what, key, addr, generation) in steps {
            let result = server.peer(key, |p| {
                p.remove = what == 0;
                p.replace_allowed_ips = what == 1;
                p.generation = (what == 2).then_some(generation);
                p.persistent_keepalive = (what == 3).then_some(u16::from(addr));
                p.endpoint = (what == 4).then(|| SocketAddr::new(Ipv4Addr::new(192, 0, 2, key).into(), 1));
                p.preshared_key = (what == 4).then(|| secret(addr));
                p.allowed_ips = vec![IpNet::new(Ipv4Addr::new(10, 8, 0, addr).into(), 32).unwrap()];
            });
            prop_assert!(result.is_ok() || result == Err(Refused::Full));
            if what == 5 {
                server.engine.begin_replace();
                if addr > 1 {
                    server.peer(key, |_| {}).unwrap();
                }
                server.engine.end_replace();
            }
            server.tun(&packet("192.0.2.99", &format!("10.8.0.{addr}"), 60));
            server.tick(500);
            closed(&mut server);
            server.sent();
            consistent(&server.engine)?;
        }
    }
}

fn consistent(engine: &Engine) -> Result<(), TestCaseError> {
    let mut queued = 0;
    for (slot, peer) in engine.peers.iter().enumerate() {
        let Some(peer) = peer else { continue };
        let slot = u16::try_from(slot).unwrap();
        queued += peer.queue.len();
        prop_assert_eq!(engine.directory.get().by_key.get(&peer.public_key), Some(&slot));
        prop_assert_eq!(engine.slot_of(engine.index_of(slot) << 8), Some(slot));
        prop_assert!(peer.allowed_ips.iter().all(|net| engine.directory.get().routes.host(net.addr()) == Some(slot)));
        prop_assert!(peer.live_at.is_none_or(|at| engine.live[at as usize] == slot));
        prop_assert!(peer.tunnel.is_none() || peer.live_at.is_some());
        prop_assert!(!engine.free.contains(&slot));
    }
    prop_assert_eq!(engine.directory.get().by_key.len(), engine.peers.iter().flatten().count());
    prop_assert_eq!(engine.handshakes.load.held(), queued);
    prop_assert!(engine.live.iter().all(|slot| engine.peers[usize::from(*slot)].is_some()));
    Ok(())
}

#[test]
fn congestion_marks_pass_through_the_tunnel_and_what_may_not_carry_them_is_dropped() {
    let (mut server, mut client) = connected();
    // For what was received, and two of three packets: what is dropped takes nothing of it.
    let limits = PeerLimitsChange { lease: Some(Some(300)), ..PeerLimitsChange::default() };
    server.peer(2, |p| p.limits = limits).unwrap();
    let send = |client: &mut Host, class: u8| {
        let mut packet = packet("10.8.0.2", "192.0.2.99", 100);
        packet[1] = class;
        client.tun(&packet);
        let outer = client.out.net().last().unwrap().ecn;
        (outer, client.sent().pop().unwrap().1)
    };
    let mut receive = |datagram: &[u8], ecn: Ecn| {
        let origin = Origin { from: CLIENT.parse().unwrap(), to: None, ecn };
        server.engine.on_udp(server.now, datagram, origin, &mut server.out);
        (server.delivered().pop().map(|packet| packet[1]), server.drops(Drop::Congestion))
    };
    let dscp = 0b1011_1000;
    let (outer, datagram) = send(&mut client, dscp | 0b10);
    assert_eq!(outer, Ecn::Ect0);
    assert_eq!(receive(&datagram, Ecn::Ce), (Some(dscp | 0b11), 0), "the mark comes in, the class stays");
    let (outer, datagram) = send(&mut client, dscp);
    assert_eq!(outer, Ecn::NotEct);
    assert_eq!(receive(&datagram, Ecn::Ce), (None, 1));
    let (outer, _) = send(&mut client, 0b11);
    assert_eq!(outer, Ecn::Ce);
    let (_, empty) = send(&mut client, 0b01);
    assert_eq!(receive(&empty, Ecn::NotEct), (Some(0b01), 1));
    assert_eq!(server.view(2).counts.rx_packets, 3, "what was dropped is not billed");
}
