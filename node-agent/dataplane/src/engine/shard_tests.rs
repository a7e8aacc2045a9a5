//! Several engines as one server: whatever reaches the wrong one is handed on.

use std::net::SocketAddr;

use super::handshake_tests::junk;
use super::load::{LOADED, MAX_HELD};
use super::tests::{START, TENANT, packet, public, secret};
use super::*;
use crate::change::PeerChange;
use crate::policy::{PolicyChange, TenantChange};

const SERVER: &str = "192.0.2.1:51820";
const CLIENT: &str = "198.51.100.7:40000";

/// A server of several engines.
struct Server {
    engines: Vec<Engine>,
    outs: Vec<Out>,
}

impl Server {
    fn new(count: u16, capacity: u32) -> Self {
        let counters = CounterTable::anonymous(capacity, [1; 16]).unwrap();
        let mut engines = Engine::sharded(EngineConfig { counters, seed: 7 }, count);
        for engine in &mut engines {
            engine.enter();
            engine.set_private_key(&secret(1));
            engine.leave();
        }
        let outs = engines.iter().map(|_| Out::default()).collect();
        Self { engines, outs }
    }

    /// Lets one engine do something, delivers what it hands on, and tells the others what it changed.
    fn at<T>(&mut self, at: usize, act: impl FnOnce(&mut Engine, &mut Out) -> T) -> T {
        self.engines[at].enter();
        let result = act(&mut self.engines[at], &mut self.outs[at]);
        while self.engines[at].on_handshakes(START, &mut self.outs[at]) {}
        self.engines[at].leave();
        let first: Vec<_> = self.engines[at].take_parcels().map(|parcel| (at, parcel)).collect();
        let second = self.hand_over(first);
        assert!(second.iter().all(|(_, parcel)| matches!(parcel.kind, ParcelKind::Neighbour(_))), "handed on once");
        assert!(self.hand_over(second).is_empty(), "or twice");
        for notice in self.engines[at].take_notices() {
            let to = usize::from(self.engines[at].shard().owner(notice.slot()));
            assert_ne!(to, at);
            self.engines[to].enter();
            self.engines[to].on_notices(vec![notice]);
            self.engines[to].leave();
        }
        result
    }

    /// Gives parcels to their owners; returns what those hand on.
    fn hand_over(&mut self, parcels: Vec<(usize, Parcel)>) -> Vec<(usize, Parcel)> {
        let mut more = Vec::new();
        for (from, parcel) in parcels {
            let to = usize::from(parcel.to);
            assert_ne!(to, from);
            self.engines[to].enter();
            self.engines[to].on_parcel(START, &parcel, &mut self.outs[to]);
            while self.engines[to].on_handshakes(START, &mut self.outs[to]) {}
            self.engines[to].leave();
            more.extend(self.engines[to].take_parcels().map(|parcel| (to, parcel)));
        }
        more
    }

    fn peer(&mut self, at: usize, key: u8, addr: &str) {
        let change = PeerChange {
            public_key: public(key),
            tenant: Some(TENANT),
            allowed_ips: vec![addr.parse().unwrap()],
            ..PeerChange::default()
        };
        self.at(at, |engine, out| engine.apply_peer(START, change, out)).unwrap();
    }

    fn view(&mut self, at: usize, key: u8) -> PeerView {
        let views = self.at(at, |engine, _| engine.peers(0, 100).0);
        views.into_iter().find(|view| view.public_key == public(key)).unwrap()
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        self.sent_to().into_iter().map(|(_, bytes)| bytes).collect()
    }

    fn sent_to(&mut self) -> Vec<(SocketAddr, Vec<u8>)> {
        let of = |out: &mut Out| {
            let bytes = |d: &Datagram| (d.to, out.net_bytes()[d.start..d.start + d.len].to_vec());
            let sent: Vec<_> = out.net().iter().map(bytes).collect();
            out.clear_net();
            sent
        };
        self.outs.iter_mut().flat_map(of).collect()
    }

    fn delivered(&mut self) -> Vec<Vec<u8>> {
        let of = |out: &mut Out| {
            let packets: Vec<_> = out.tun().iter().map(|packet| packet.of(out.tun_bytes()).to_vec()).collect();
            out.clear_tun();
            packets
        };
        self.outs.iter_mut().flat_map(of).collect()
    }
}

fn client(key: u8) -> (Engine, Out) {
    let counters = CounterTable::anonymous(4, [key; 16]).unwrap();
    let mut engine = Engine::new(EngineConfig { counters, seed: u64::from(key) });
    let mut out = Out::default();
    engine.set_private_key(&secret(key));
    let change = PeerChange {
        public_key: public(1),
        endpoint: Some(SERVER.parse().unwrap()),
        allowed_ips: vec!["0.0.0.0/0".parse().unwrap()],
        ..PeerChange::default()
    };
    engine.apply_peer(START, change, &mut out).unwrap();
    (engine, out)
}

fn origin(addr: &str) -> Origin {
    let from: SocketAddr = addr.parse().unwrap();
    Origin { from, to: None, ecn: crate::ecn::Ecn::NotEct }
}

fn take(out: &mut Out) -> Vec<Vec<u8>> {
    let bytes = |d: &Datagram| out.net_bytes()[d.start..d.start + d.len].to_vec();
    let sent = out.net().iter().map(bytes).collect();
    out.clear_net();
    sent
}

/// Every message goes to `wire`, whoever owns the peer, and every packet to `tun`.
fn talk(count: u16, owner: usize, wire: usize, tun: usize) {
    let mut server = Server::new(count, 512);
    server.peer(owner, 2, "10.8.0.2/32");
    let (mut client, mut out) = client(2);
    let up = packet("10.8.0.2", "192.0.2.99", 100);
    client.on_tun(START, &up, &mut out);
    loop {
        let (from_client, from_server) = (take(&mut out), server.sent());
        if from_client.is_empty() && from_server.is_empty() {
            break;
        }
        for datagram in from_client {
            server.at(wire, |engine, out| engine.on_udp(START, &datagram, origin(CLIENT), out));
        }
        for datagram in from_server {
            client.on_udp(START, &datagram, origin(SERVER), &mut out);
            while client.on_handshakes(START, &mut out) {}
        }
    }
    assert_eq!(server.delivered(), [up]);
    let down = packet("192.0.2.99", "10.8.0.2", 1420);
    server.at(tun, |engine, out| engine.on_tun(START, &down, out));
    for datagram in server.sent() {
        client.on_udp(START, &datagram, origin(SERVER), &mut out);
        while client.on_handshakes(START, &mut out) {}
    }
    assert_eq!(out.tun().len(), 1);
    assert_eq!(server.view(owner, 2).counts.rx_packets, 0, "the shell counts, and there is none here");
    assert_eq!(server.view(owner, 2).endpoint, Some(CLIENT.parse().unwrap()));
}

#[test]
fn it_does_not_matter_who_receives_a_message() {
    talk(1, 0, 0, 0);
    for owner in 0..2 {
        for wire in 0..2 {
            for tun in 0..2 {
                talk(2, owner, wire, tun);
            }
        }
    }
    talk(3, 2, 0, 1);
}

#[test]
fn the_limits_of_handshakes_hold_for_all_workers_together() {
    const AT_ONCE: u64 = 1000;
    const A_SECOND: u64 = 500;
    let mut server = Server::new(2, 512);
    let later = Now { mono_ms: START.mono_ms + 1000, ..START };
    let both = |server: &mut Server, act: &mut dyn FnMut(&mut Engine, &mut Out)| {
        for (engine, out) in server.engines.iter_mut().zip(&mut server.outs) {
            engine.enter();
            act(engine, out);
            engine.leave();
        }
    };
    let dropped =
        |server: &Server, reason| -> u64 { server.engines.iter().map(|engine| engine.drops.get(reason).packets).sum() };
    both(&mut server, &mut |engine, out| engine.on_tick(START, out));
    let mut number = 0;
    for _ in 0..LOADED / 2 + 5 {
        both(&mut server, &mut |engine, out| {
            number += 1;
            engine.on_udp(START, &junk(number), origin("203.0.113.9:9"), out);
            out.clear_net();
        });
    }
    assert_eq!(dropped(&server, Drop::UnderLoad), 10, "what waits at either is load");

    let (mut flooder, mut out) = client(7);
    flooder.on_tun(START, &packet("10.8.0.7", "192.0.2.99", 100), &mut out);
    let plain = take(&mut out).remove(0);
    server.engines[0].enter();
    server.engines[0].on_udp(START, &plain, origin(CLIENT), &mut server.outs[0]);
    server.engines[0].leave();
    let cookie = take(&mut server.outs[0]).remove(0);
    flooder.on_udp(START, &cookie, origin(SERVER), &mut out);
    let mut proved = [0; MIN_ROOM];
    let tunnel = flooder.peers.iter_mut().flatten().find_map(|peer| peer.tunnel.as_mut()).unwrap();
    tunnel.initiate_again(START, &mut proved).unwrap();
    let refused = dropped(&server, Drop::UnderLoad);
    for _ in 0..AT_ONCE {
        both(&mut server, &mut |engine, out| engine.on_udp(START, &proved, origin(CLIENT), out));
    }
    assert_eq!(dropped(&server, Drop::UnderLoad), refused, "the cookie of one is good for the other");
    assert_eq!(dropped(&server, Drop::SourceLimited), AT_ONCE, "and the source has one bucket");
    both(&mut server, &mut |engine, out| engine.on_tick(later, out));
    for _ in 0..A_SECOND {
        both(&mut server, &mut |engine, out| engine.on_udp(later, &proved, origin(CLIENT), out));
    }
    assert_eq!(dropped(&server, Drop::SourceLimited), AT_ONCE + A_SECOND, "which is refilled once");
}

#[test]
fn peers_of_one_tenant_reach_each_other_wherever_they_are_served() {
    const ADDRESSES: [&str; 2] = [CLIENT, "198.51.100.8:40000"];
    for owners in [[0, 1], [1, 0], [0, 0]] {
        let mut server = Server::new(2, 512);
        for at in 0..2 {
            let tenants = vec![TenantChange { tenant: TENANT, allow_intra: Some(true), ..TenantChange::default() }];
            let change = PolicyChange { tenants, ..PolicyChange::default() };
            server.at(at, |engine, _| engine.change_policy(START, change)).unwrap();
        }
        server.peer(owners[0], 2, "10.8.0.2/32");
        server.peer(owners[1], 3, "10.8.0.3/32");
        let mut clients = [client(2), client(3)];
        let exchange = |server: &mut Server, clients: &mut [(Engine, Out); 2]| {
            loop {
                let from_server = server.sent_to();
                let silent = from_server.is_empty() && clients.iter().all(|(_, out)| out.net().is_empty());
                if silent {
                    break;
                }
                for (to, datagram) in from_server {
                    let number = ADDRESSES.iter().position(|address| to == address.parse().unwrap()).unwrap();
                    let (engine, out) = &mut clients[number];
                    engine.on_udp(START, &datagram, origin(SERVER), out);
                    while engine.on_handshakes(START, out) {}
                }
                for ((_, out), address) in clients.iter_mut().zip(ADDRESSES) {
                    for datagram in take(out) {
                        server.at(0, |engine, out| engine.on_udp(START, &datagram, origin(address), out));
                    }
                }
            }
        };
        for ((engine, out), address) in clients.iter_mut().zip(["10.8.0.2", "10.8.0.3"]) {
            engine.on_tun(START, &packet(address, "192.0.2.99", 100), out);
        }
        exchange(&mut server, &mut clients);
        assert_eq!(server.delivered().len(), 2);

        let greeting = packet("10.8.0.2", "10.8.0.3", 200);
        let (engine, out) = &mut clients[0];
        engine.on_tun(START, &greeting, out);
        exchange(&mut server, &mut clients);
        assert_eq!(server.delivered(), Vec::<Vec<u8>>::new(), "not by way of the host");
        let out = &clients[1].1;
        let arrived: Vec<_> = out.tun().iter().map(|packet| packet.of(out.tun_bytes()).to_vec()).collect();
        let mut forwarded = greeting;
        assert!(crate::packet::spend_hop(&mut forwarded));
        assert_eq!(arrived, [forwarded], "served at {owners:?}");

        let stranger = PeerChange { public_key: public(3), remove: true, ..PeerChange::default() };
        server.at(owners[1], |engine, out| engine.apply_peer(START, stranger, out)).unwrap();
        let other = PeerChange {
            public_key: public(4),
            tenant: Some([9; 16]),
            allowed_ips: vec!["10.8.0.3/32".parse().unwrap()],
            ..PeerChange::default()
        };
        server.at(owners[1], |engine, out| engine.apply_peer(START, other, out)).unwrap();
        let (engine, out) = &mut clients[0];
        engine.on_tun(START, &packet("10.8.0.2", "10.8.0.3", 200), out);
        exchange(&mut server, &mut clients);
        let refused: u64 = (0..2).map(|at| server.at(at, |e, _| e.device().drops).get(Drop::Isolation).packets).sum();
        assert_eq!(refused, 1, "another tenant's");
    }
}

#[test]
fn a_replacement_without_its_tenant_takes_a_peer_from_its_neighbours_elsewhere() {
    let mut server = Server::new(2, 512);
    server.peer(1, 3, "10.8.0.3/32");
    let slot = server.at(1, |engine, _| engine.directory.get().by_key[&public(3)]);
    let tenant = |server: &mut Server| server.at(0, |engine, _| engine.directory.get().tenants.get(&slot).copied());
    assert_eq!(tenant(&mut server), Some(TENANT));
    let plain = PeerChange {
        public_key: public(3),
        allowed_ips: vec!["10.8.0.3/32".parse().unwrap()],
        ..PeerChange::default()
    };
    server.at(1, |engine, out| {
        engine.begin_replace();
        engine.apply_peer(START, plain, out).unwrap();
        engine.end_replace();
    });
    assert_eq!(tenant(&mut server), None);
}

#[test]
fn a_prefix_that_moves_leaves_the_peer_of_the_other_worker() {
    let mut server = Server::new(2, 512);
    server.peer(0, 2, "10.8.0.2/32");
    server.peer(1, 3, "10.8.0.2/32");
    assert!(server.view(0, 2).allowed_ips.is_empty());
    assert_eq!(server.view(1, 3).allowed_ips.len(), 1);
    server.peer(0, 2, "10.8.0.2/32");
    assert_eq!(server.view(0, 2).allowed_ips.len(), 1, "and comes back");
    assert!(server.view(1, 3).allowed_ips.is_empty());
}

#[test]
fn a_parcel_for_somebody_else_is_not_handed_on_for_ever() {
    let mut server = Server::new(2, 512);
    server.peer(0, 2, "10.8.0.2/32");
    let bytes = packet("192.0.2.99", "10.8.0.2", 100);
    let parcel = Parcel { to: 1, slot: 0, kind: ParcelKind::Packet, bytes };
    server.at(1, |engine, out| engine.on_parcel(START, &parcel, out));
    let drops = server.at(1, |engine, _| engine.device().drops);
    assert_eq!(drops.get(Drop::TxForward).packets, 1);
}

#[test]
fn what_goes_astray_between_workers_is_shown_at_the_peer_it_was_for() {
    let mut server = Server::new(2, 512);
    server.peer(0, 2, "10.8.0.2/32");
    server.peer(1, 3, "10.8.0.3/32");
    server.peer(1, 4, "10.8.0.4/32");
    let astray = |server: &mut Server, at: usize, message: &[u8], from_tun: bool| {
        let engine = &mut server.engines[at];
        engine.enter();
        match from_tun {
            true => engine.on_tun(START, message, &mut server.outs[at]),
            false => engine.on_udp(START, message, origin(CLIENT), &mut server.outs[at]),
        }
        engine.leave();
        let lost: Vec<_> = engine.take_parcels().collect();
        assert_eq!(lost.len(), 1);
        let owner = &mut server.engines[usize::from(lost[0].to)];
        Astray::of(&lost[0]).into_iter().for_each(|astray| owner.went_astray(lost[0].slot, astray));
    };
    let to_third = packet("192.0.2.99", "10.8.0.3", 100);
    astray(&mut server, 0, &to_third, true);
    astray(&mut server, 0, &to_third, true);
    // Whoever guesses the index of a peer without a tunnel does not have it blamed, nor does a handshake.
    for (kind, len) in [(4_u8, 100), (2, 92)] {
        let index = server.engines[1].index_of(3) << 8;
        let mut message = vec![0; len];
        message[0] = kind;
        let at = if kind == 4 { 4 } else { 8 };
        message[at..at + 4].copy_from_slice(&index.to_le_bytes());
        astray(&mut server, 0, &message, false);
    }
    let drops = |server: &mut Server, at, key| -> Vec<_> {
        server.view(at, key).drops.iter().flat_map(|drops| drops.reasons().collect::<Vec<_>>()).collect()
    };
    assert_eq!(drops(&mut server, 1, 3), [(Drop::TxForward, 2)]);
    assert!(drops(&mut server, 1, 4).is_empty() && drops(&mut server, 0, 2).is_empty());
}

#[test]
fn packets_held_for_handshakes_are_limited_for_all_workers_together() {
    let mut server = Server::new(2, 512);
    let peers = MAX_HELD / QUEUE_PER_PEER;
    let address = |number: usize| format!("10.8.{}.{}", number / 200, number % 200 + 1);
    for number in 0..=peers {
        let change = PeerChange {
            public_key: public(u8::try_from(number + 2).unwrap()),
            endpoint: Some(CLIENT.parse().unwrap()),
            allowed_ips: vec![format!("{}/32", address(number)).parse().unwrap()],
            ..PeerChange::default()
        };
        server.at(number % 2, |engine, out| engine.apply_peer(START, change, out)).unwrap();
    }
    let send = |server: &mut Server, number: usize| {
        server.at(number % 2, |engine, out| {
            engine.on_tun(START, &packet("192.0.2.99", &address(number), 100), out);
            out.clear_net();
            engine.device().drops.get(Drop::TxNoSession).packets
        })
    };
    for number in 0..peers {
        (0..QUEUE_PER_PEER).for_each(|_| assert_eq!(send(&mut server, number), 0));
    }
    assert_eq!((send(&mut server, peers), send(&mut server, 1)), (1, 1), "whoever has the peer");
    let gone = PeerChange { public_key: public(3), remove: true, ..PeerChange::default() };
    server.at(1, |engine, out| engine.apply_peer(START, gone, out)).unwrap();
    assert_eq!(send(&mut server, peers), 1, "what one gives up another may hold");
    assert_eq!(server.engines[0].handshakes.load.held(), MAX_HELD - QUEUE_PER_PEER + 1);
}

#[test]
fn all_slots_can_be_used_whatever_the_number_of_workers() {
    for count in [1_u16, 2, 3, 64] {
        let counters = CounterTable::anonymous(crate::counters::MAX_PEERS, [1; 16]).unwrap();
        let mut engines = Engine::sharded(EngineConfig { counters, seed: 1 }, count);
        let mut taken = vec![false; crate::counters::MAX_PEERS as usize];
        for engine in &mut engines {
            while let Some(slot) = engine.take_free_slot() {
                assert!(engine.shard().owns(slot));
                assert!(!std::mem::replace(&mut taken[usize::from(slot)], true));
            }
            engine.enter();
            assert_eq!(engine.peers(u16::MAX - 1, 2).1, None, "looking ends with the last slot");
            engine.leave();
        }
        assert!(taken.into_iter().all(|taken| taken), "{count} workers");
    }
}

#[test]
fn one_changes_while_the_other_forwards() {
    let mut server = Server::new(2, 512);
    server.peer(0, 2, "10.8.0.2/32");
    let mut engines = std::mem::take(&mut server.engines).into_iter();
    let (mut forwards, mut changes) = (engines.next().unwrap(), engines.next().unwrap());
    std::thread::scope(|scope| {
        let changing = scope.spawn(move || {
            let mut out = Out::default();
            for round in 0..2000_u16 {
                let [high, low] = round.to_be_bytes();
                let change = PeerChange {
                    public_key: public(3),
                    replace_allowed_ips: true,
                    allowed_ips: vec![format!("10.9.{high}.{low}/32").parse().unwrap()],
                    ..PeerChange::default()
                };
                changes.enter();
                changes.apply_peer(START, change, &mut out).unwrap();
                changes.leave();
            }
        });
        let mut out = Out::default();
        let down = packet("192.0.2.99", "10.8.0.2", 100);
        let mut packets = 0;
        while !changing.is_finished() || packets == 0 {
            forwards.enter();
            forwards.on_tun(START, &down, &mut out);
            packets += 1;
            assert_eq!(forwards.device().drops.get(Drop::TxNoEndpoint).packets, packets, "always its own peer");
            forwards.leave();
        }
    });
}
