//! Handshakes as the network can deliver them: replayed, forged, in floods, and after a restart.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};

use super::load::{LOADED, MAX_WAITING};
use super::tests::*;
use super::*;
use crate::change::PeerChange;
use crate::noise::Seed;

/// Of the client, to the server, although one may be under way.
fn initiation(client: &mut Host) -> Vec<u8> {
    let slot = client.engine.directory.get().by_key[&public(1)];
    if client.engine.peers[usize::from(slot)].as_ref().unwrap().tunnel.is_none() {
        client.engine.initiate(client.now, slot, &mut client.out);
        return client.sent().remove(0).1;
    }
    let mut room = [0; MIN_ROOM];
    let now = client.now;
    let peer = client.engine.peers[usize::from(slot)].as_mut().unwrap();
    let len = peer.tunnel.as_mut().unwrap().initiate_again(now, &mut room).unwrap();
    room[..len].to_vec()
}

fn origin(from: SocketAddr) -> Origin {
    Origin { from, to: None, ecn: Ecn::NotEct }
}

/// Corrects MAC1 for server 1: anybody who knows its public key can.
fn sign(message: &mut [u8]) {
    let key = Blake2s256::new().chain(b"mac1----").chain(public(1)).finalize_fixed();
    let end = message.len() - 32;
    let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key).unwrap().chain(&message[..end]).finalize_fixed();
    message[end..end + 16].copy_from_slice(&mac);
}

/// Cheap to make: random but for MAC1.
pub(super) fn junk(number: u32) -> Vec<u8> {
    let mut message = vec![0; 148];
    message[0] = 1;
    message[8..12].copy_from_slice(&number.to_le_bytes());
    message[12] = 1;
    sign(&mut message);
    message
}

fn is_cold(server: &Host) -> bool {
    server.engine.peers.iter().flatten().all(|peer| peer.tunnel.is_none() && peer.live_at.is_none())
}

fn go_cold(server: &mut Host, key: u8) {
    let slot = server.engine.directory.get().by_key[&public(key)];
    server.engine.drop_tunnel(slot);
    server.now.mono_ms += 1000;
}

fn server_of(dir: &std::path::Path) -> Host {
    let counters = CounterTable::open(dir, 16, [3; 16], [1; 16]).unwrap();
    let mut server = Host::with(counters, 1, SERVER);
    server.peer(2, |p| p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap()]).unwrap();
    server
}

#[test]
fn an_initiation_from_before_a_restart_is_refused_and_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut client) = pair();
    let (oldest, old) = (initiation(&mut client), initiation(&mut client));
    let mut server = server_of(dir.path());
    server.udp(&old, CLIENT);
    assert_eq!(server.sent().len(), 1);
    drop(server);

    let mut server = server_of(dir.path());
    for replayed in [&old, &oldest] {
        server.udp(replayed, ELSEWHERE);
        server.now.mono_ms += 100;
    }
    assert_eq!((server.drops(Drop::Replay), server.sent().len()), (2, 0));
    assert!(is_cold(&server));
    assert_eq!(server.view(2).counts.rx_wire, 148, "only the first");
    server.udp(&initiation(&mut client), CLIENT);
    assert_eq!(server.sent().len(), 1, "a new one is welcome");
}

#[test]
fn an_initiation_from_before_the_host_booted_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut client) = pair();
    let old = initiation(&mut client);
    for boot in 1..=3 {
        let counters = CounterTable::open(dir.path(), 16, [boot; 16], [boot; 16]).unwrap();
        let mut server = Host::with(counters, 1, SERVER);
        server.peer(2, |p| p.allowed_ips = vec!["10.8.0.2/32".parse().unwrap()]).unwrap();
        server.udp(&old, CLIENT);
        assert_eq!(server.sent().len(), usize::from(boot == 1), "boot {boot}");
    }
}

#[test]
fn an_initiation_from_before_the_tunnel_went_cold_is_refused() {
    let (mut server, mut client) = pair();
    let (oldest, old) = (initiation(&mut client), initiation(&mut client));
    server.udp(&old, CLIENT);
    server.sent();
    server.now.mono_ms += 100;
    server.udp(&oldest, ELSEWHERE);
    assert_eq!(server.drops(Drop::Replay), 1, "live");
    go_cold(&mut server, 2);
    for replayed in [&old, &oldest] {
        server.udp(replayed, ELSEWHERE);
    }
    assert_eq!((server.drops(Drop::Replay), server.sent().len()), (3, 0), "cold");
    assert!(is_cold(&server));
}

#[test]
fn another_generation_remembers_and_a_removal_forgets() {
    let (mut server, mut client) = pair();
    let old = initiation(&mut client);
    server.udp(&old, CLIENT);
    server.sent();
    server.peer(2, |p| p.generation = Some(1)).unwrap();
    server.udp(&old, CLIENT);
    assert_eq!(server.drops(Drop::Replay), 1);
    server.peer(2, |p| p.remove = true).unwrap();
    closed(&mut server);
    server.peer(2, |p| p.generation = Some(2)).unwrap();
    server.udp(&old, CLIENT);
    assert_eq!((server.drops(Drop::Replay), server.sent().len()), (1, 1), "as with the kernel");
}

#[test]
fn a_life_of_an_earlier_process_is_remembered_by_the_next_generation() {
    let dir = tempfile::tempdir().unwrap();
    let (_, mut client) = pair();
    let old = initiation(&mut client);
    let mut server = server_of(dir.path());
    server.udp(&old, CLIENT);
    drop(server);
    let counters = CounterTable::open(dir.path(), 16, [3; 16], [1; 16]).unwrap();
    let mut server = Host::with(counters, 1, SERVER);
    server.peer(2, |p| p.generation = Some(1)).unwrap();
    server.udp(&old, CLIENT);
    assert_eq!(server.drops(Drop::Replay), 1);
}

#[test]
fn whoever_claims_a_key_without_having_it_leaves_nothing_behind() {
    let (mut server, mut client) = pair();
    let mut forged = initiation(&mut client);
    forged[100] ^= 1;
    sign(&mut forged);
    server.udp(&forged, ELSEWHERE);
    assert_eq!((server.drops(Drop::Handshake), server.sent().len()), (1, 0));
    assert!(is_cold(&server) && server.engine.peers.iter().flatten().all(|peer| peer.static_shared.is_none()));
    server.udp(&initiation(&mut client), CLIENT);
    assert_eq!(server.sent().len(), 1);
}

#[test]
fn another_private_key_of_ours_forgets_what_it_shared() {
    let (mut server, _client) = connected();
    server.engine.set_private_key(&secret(60));
    assert!(server.engine.peers.iter().flatten().all(|peer| peer.static_shared.is_none()));
}

#[test]
fn what_is_shared_with_new_peers_is_worked_out_ahead_and_anew_for_another_key() {
    let shared = |host: &Host| {
        let peers = host.engine.peers.iter().flatten();
        peers.map(|peer| peer.static_shared.as_deref().map(|shared| *shared.as_bytes())).collect::<Vec<_>>()
    };
    let work = |host: &mut Host| {
        while host.engine.has_work_ahead() {
            host.engine.work_ahead();
        }
    };
    let (mut server, mut client) = pair();
    work(&mut server);
    let before = shared(&server);
    assert!(!before.is_empty() && before.iter().all(Option::is_some));
    server.udp(&initiation(&mut client), CLIENT);
    assert_eq!((server.sent().len(), shared(&server)), (1, before.clone()));
    server.engine.set_private_key(&secret(60));
    assert!(shared(&server).iter().all(Option::is_none));
    work(&mut server);
    assert!(shared(&server).iter().zip(before).all(|(now, then)| now.is_some() && *now != then));
    server.engine.set_private_key(&crate::change::Secret::new([0; 32]));
    server.peer(9, |_| {}).unwrap();
    assert!(!server.engine.has_work_ahead(), "without a key of ours nothing is shared");
    server.engine.set_private_key(&secret(1));
    work(&mut server);
    assert!(shared(&server).iter().all(Option::is_some));
}

/// One pass of a server in a flood: some of it, then a packet of the live client.
fn pass(server: &mut Host, client: &mut Host, flood: &[(Vec<u8>, SocketAddr)]) -> usize {
    for (message, from) in flood {
        server.engine.on_udp(server.now, message, origin(*from), &mut server.out);
    }
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    for (_, datagram) in client.sent() {
        server.engine.on_udp(server.now, &datagram, origin(client.addr), &mut server.out);
    }
    let delivered = server.delivered().len();
    server.engine.on_handshakes(server.now, &mut server.out);
    assert!(server.engine.handshakes.waiting() <= MAX_WAITING);
    delivered
}

/// Passes of 100 messages, one each millisecond.
fn flood(passes: u32, source: impl Fn(u32) -> SocketAddr) -> (Host, Host, u64) {
    const PASS: u32 = 100;
    let (mut server, mut client) = connected();
    server.now.mono_ms += 100;
    let mut cookies = 0;
    for round in 0..passes {
        let messages: Vec<_> = (0..PASS).map(|n| round * PASS + n).map(|n| (junk(n), source(n))).collect();
        assert_eq!(pass(&mut server, &mut client, &messages), 1, "the live peer's packet, pass {round}");
        cookies += server.sent().iter().filter(|(_, m)| m.len() == 64 && m[0] == 3).count() as u64;
        server.tick(1);
    }
    assert_eq!(server.engine.device().live_peers, 1);
    (server, client, cookies)
}

#[test]
fn a_flood_from_one_source_costs_cookies_and_no_packet_of_the_others() {
    let (server, _, cookies) = flood(1000, |_| ELSEWHERE.parse().unwrap());
    assert_eq!(server.drops(Drop::UnderLoad), cookies);
    assert!(cookies > 90_000, "{cookies}");
}

#[test]
fn a_flood_from_everywhere_costs_cookies_and_no_packet_of_the_others() {
    let (server, _, cookies) = flood(1000, |n| SocketAddr::new(Ipv4Addr::from(0xcb00_0000 | n).into(), 9));
    assert!(cookies > 90_000, "{cookies}");
    assert_eq!(server.engine.handshakes.load.sources_known(), 0, "who proves no address takes no memory");
}

#[test]
fn who_honours_the_cookie_gets_in_under_load_and_only_from_there() {
    let (mut server, _, _) = flood(100, |n| SocketAddr::new(Ipv4Addr::from(0xcb00_0000 | n).into(), 9));
    server.peer(3, |_| {}).unwrap();
    let mut late = Host::new(3, ELSEWHERE);
    late.peer(1, |p| p.endpoint = Some(SERVER.parse().unwrap())).unwrap();
    let plain = initiation(&mut late);
    server.engine.on_udp(server.now, &plain, origin(late.addr), &mut server.out);
    let answers = server.sent();
    assert_eq!((answers.len(), answers[0].1.len()), (1, 64), "a cookie");
    late.udp(&answers[0].1, SERVER);
    let proved = initiation(&mut late);
    let port: SocketAddr = "203.0.113.9:50001".parse().unwrap();
    let refused = server.drops(Drop::UnderLoad);
    server.engine.on_udp(server.now, &proved, origin(port), &mut server.out);
    assert_eq!(server.drops(Drop::UnderLoad), refused + 1, "a cookie is for one port");
    server.sent();
    server.engine.on_udp(server.now, &proved, origin(late.addr), &mut server.out);
    assert_eq!(server.drops(Drop::UnderLoad), refused + 1);
    while server.engine.on_handshakes(server.now, &mut server.out) {}
    let answers = server.sent();
    assert_eq!((answers.len(), answers[0].1.len()), (1, 92), "what waited before it is worked off, and it is answered");
}

#[test]
fn when_the_queue_is_short_again_no_cookie_is_asked_for() {
    let (mut server, mut client) = connected();
    let burst: Vec<_> =
        (0..u32::try_from(LOADED).unwrap() + 10).map(|n| (junk(n), ELSEWHERE.parse().unwrap())).collect();
    pass(&mut server, &mut client, &burst);
    assert_eq!(server.drops(Drop::UnderLoad), 10);
    while server.engine.on_handshakes(server.now, &mut server.out) {}
    server.engine.on_udp(server.now, &junk(1), origin(client.addr), &mut server.out);
    assert_eq!(server.drops(Drop::UnderLoad), 11, "not at once");
    server.now.mono_ms += 1000;
    server.engine.on_udp(server.now, &junk(1), origin(client.addr), &mut server.out);
    assert_eq!(server.drops(Drop::UnderLoad), 11);
}

#[test]
fn a_source_that_proves_itself_has_its_bucket_under_load() {
    let (mut server, mut client) = connected();
    let burst: Vec<_> = (0..=u32::try_from(LOADED).unwrap()).map(|n| (junk(n), ELSEWHERE.parse().unwrap())).collect();
    pass(&mut server, &mut client, &burst);
    let mut flooder = Host::new(7, ELSEWHERE);
    flooder.peer(1, |p| p.endpoint = Some(SERVER.parse().unwrap())).unwrap();
    server.engine.on_udp(server.now, &initiation(&mut flooder), origin(flooder.addr), &mut server.out);
    let cookie = server.sent().pop().unwrap().1;
    flooder.udp(&cookie, SERVER);
    let proved = initiation(&mut flooder);
    for _ in 0..1500 {
        server.engine.on_udp(server.now, &proved, origin(flooder.addr), &mut server.out);
    }
    assert_eq!(server.drops(Drop::SourceLimited), 500);
}

/// Peer `number` of many.
fn key_of(number: u16) -> Secret {
    let mut key = [9; 32];
    key[4..6].copy_from_slice(&number.to_le_bytes());
    Secret::new(key)
}

/// A client of its own key, without memory for more than one peer.
fn client_of(number: u16) -> Host {
    let mut client = Host::with(CounterTable::anonymous(1, [1; 16]).unwrap(), 2, CLIENT);
    client.engine.set_private_key(&key_of(number));
    client
        .peer(1, |p| {
            p.endpoint = Some(SERVER.parse().unwrap());
            p.allowed_ips = vec!["0.0.0.0/0".parse().unwrap()];
        })
        .unwrap();
    client.addr.set_port(1000 + number);
    client
}

fn server_of_many(counters: CounterTable, count: u16) -> Host {
    let mut server = Host::with(counters, 1, SERVER);
    for number in 0..count {
        let public_key = Identity::new(&key_of(number), Seed::random()).public_key();
        let change = PeerChange { public_key, ..PeerChange::default() };
        server.engine.apply_peer(server.now, change, &mut server.out).unwrap();
    }
    server
}

#[test]
fn a_thousand_clients_behind_one_address_all_connect_at_once() {
    let mut server = server_of_many(CounterTable::anonymous(1000, [1; 16]).unwrap(), 1000);
    let initiations: Vec<_> = (0..1000).map(|number| initiation(&mut client_of(number))).collect();
    for (port, message) in (1000..).zip(&initiations) {
        let from = SocketAddr::new(Ipv4Addr::new(198, 51, 100, 7).into(), port);
        server.engine.on_udp(server.now, message, origin(from), &mut server.out);
    }
    let mut passes = 0;
    while server.engine.on_handshakes(server.now, &mut server.out) {
        passes += 1;
    }
    let answers = server.sent();
    assert_eq!(answers.iter().filter(|(_, m)| m.len() == 92).count(), 1000);
    assert_eq!((server.drops(Drop::UnderLoad), server.drops(Drop::SourceLimited)), (0, 0));
    assert!(passes > 100, "a few a pass, {passes}");
}

#[test]
fn in_one_pass_each_is_answered_as_it_would_be_alone() {
    let mut server = server_of_many(CounterTable::anonymous(16, [1; 16]).unwrap(), 6);
    let mut clients: Vec<_> = (0..6).map(client_of).collect();
    let initiations: Vec<_> = clients.iter_mut().map(initiation).collect();
    let mut forged = initiations[3].clone();
    forged[100] ^= 1;
    sign(&mut forged);
    // Twice the same, one of nobody, and one with a wrong timestamp before the genuine one.
    let stranger = initiation(&mut client_of(77));
    let order = [&initiations[0], &initiations[0], &stranger, &forged, &initiations[3], &junk(1), &initiations[5]];
    for (port, message) in (1000..).zip(order) {
        let from = SocketAddr::new(Ipv4Addr::new(198, 51, 100, 7).into(), port);
        server.engine.on_udp(server.now, message, origin(from), &mut server.out);
    }
    assert!(!server.engine.on_handshakes(server.now, &mut server.out), "all in one pass");
    let answers = server.sent();
    let to: Vec<_> = answers.iter().map(|(to, _)| to.port()).collect();
    assert_eq!(to, [1000, 1004, 1006]);
    for ((_, answer), client) in answers.iter().zip([0, 3, 5]) {
        let client = &mut clients[client];
        client.udp(answer, SERVER);
        let confirmation = client.sent().remove(0).1;
        let addr = client.addr.to_string();
        server.udp(&confirmation, &addr);
    }
    let confirmed = server.engine.peers(0, 100).0.into_iter().filter(|peer| peer.counts.last_handshake_ms > 0).count();
    assert_eq!(confirmed, 3);
    assert_eq!((server.drops(Drop::Handshake), server.drops(Drop::UnknownPeer)), (3, 1));
}

/// A hundred live clients, the death of the server, and how many milliseconds until each has a session with the next
/// one. The first `lost` datagrams of the new server do not arrive.
fn restart(lost: usize) -> Vec<u64> {
    const CLIENTS: u16 = 100;
    let dir = tempfile::tempdir().unwrap();
    let counters = || CounterTable::open(dir.path(), 256, [3; 16], [1; 16]).unwrap();
    let mut clients: HashMap<SocketAddr, Host> =
        (0..CLIENTS).map(client_of).map(|client| (client.addr, client)).collect();
    let mut server = server_of_many(counters(), CLIENTS);
    for client in clients.values_mut() {
        client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    }
    while exchange(&mut server, &mut clients, &mut 0) {}
    assert_eq!(server.engine.device().live_peers, usize::from(CLIENTS));
    drop(server);

    let mut server = server_of_many(counters(), CLIENTS);
    let mut left = lost;
    let mut done = Vec::new();
    for elapsed in (0..5000).step_by(10) {
        server.tick(10);
        while exchange(&mut server, &mut clients, &mut left) {}
        let sessions = server
            .engine
            .peers
            .iter()
            .flatten()
            .filter(|peer| peer.tunnel.as_ref().is_some_and(|tunnel| tunnel.has_session()));
        done.resize(sessions.count(), elapsed + 10);
        if done.len() == usize::from(CLIENTS) {
            return done;
        }
    }
    panic!("{} of {CLIENTS} are back", done.len());
}

fn exchange(server: &mut Host, clients: &mut HashMap<SocketAddr, Host>, lost: &mut usize) -> bool {
    let from_server = server.sent();
    let mut any = !from_server.is_empty();
    for (to, datagram) in from_server {
        if *lost > 0 {
            *lost -= 1;
        } else {
            clients.get_mut(&to).unwrap().udp(&datagram, SERVER);
        }
    }
    for (from, client) in clients.iter_mut() {
        for (_, datagram) in client.sent() {
            any = true;
            server.udp(&datagram, &from.to_string());
        }
    }
    any
}

#[test]
fn a_hundred_live_clients_are_called_back_within_a_second_of_a_restart() {
    assert!(restart(0).into_iter().all(|ms| ms <= 200));
}

#[test]
fn a_call_that_is_lost_is_repeated_long_before_the_protocols_five_seconds() {
    let times = restart(50);
    assert!(times.iter().all(|ms| *ms <= 1000), "{times:?}");
}

#[test]
fn calls_that_cross_with_their_answers_end_in_a_session_that_both_have() {
    for rtt_ms in [400, 700] {
        let dir = tempfile::tempdir().unwrap();
        let counters = || CounterTable::open(dir.path(), 16, [3; 16], [1; 16]).unwrap();
        let (up, down) = (packet("10.8.0.2", "192.0.2.99", 100), packet("192.0.2.99", "10.8.0.2", 100));
        let mut client = client_of(0);
        let of_the_client = || {
            let mut server = server_of_many(counters(), 1);
            let public_key = Identity::new(&key_of(0), Seed::random()).public_key();
            let allowed_ips = vec!["10.8.0.2/32".parse().unwrap()];
            let change = PeerChange { public_key, allowed_ips, ..PeerChange::default() };
            server.engine.apply_peer(server.now, change, &mut server.out).unwrap();
            server
        };
        let mut server = of_the_client();
        client.tun(&up);
        settle(&mut server, &mut client);
        drop(server);

        let mut server = of_the_client();
        let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
        let mut delivered = (0, 0);
        for ms in (0..6000).step_by(10) {
            server.tick(10);
            client.tick(10);
            if (2000..5000).contains(&ms) && ms % 100 == 0 {
                server.tun(&down);
                client.tun(&up);
            }
            let due = ms + rtt_ms / 2;
            to_client.extend(server.sent().into_iter().map(|(_, datagram)| (due, datagram)));
            to_server.extend(client.sent().into_iter().map(|(_, datagram)| (due, datagram)));
            for (_, datagram) in to_client.extract_if(.., |(due, _)| *due <= ms) {
                client.udp(&datagram, SERVER);
            }
            for (_, datagram) in to_server.extract_if(.., |(due, _)| *due <= ms) {
                server.udp(&datagram, &client.addr.to_string());
            }
            delivered = (delivered.0 + server.delivered().len(), delivered.1 + client.delivered().len());
        }
        assert_eq!(delivered, (30, 30), "{rtt_ms} ms");
    }
}

#[test]
fn initiations_that_nobody_completes_disturb_no_session() {
    let (mut server, mut client) = connected();
    let (up, down) = (packet("10.8.0.2", "192.0.2.99", 100), packet("192.0.2.99", "10.8.0.2", 100));
    for round in 0..300 {
        for host in [&mut server, &mut client] {
            host.now.mono_ms += 25;
            host.now.unix_ms += 25;
        }
        let initiation = initiation(&mut client);
        server.udp(&initiation, CLIENT);
        assert_eq!(server.sent().len(), 1, "an answer that is lost");
        client.tun(&up);
        server.tun(&down);
        settle(&mut server, &mut client);
        assert_eq!((server.delivered().len(), client.delivered().len()), (1, 1), "{round}");
    }
}

#[test]
fn whoever_has_just_begun_a_handshake_is_not_called() {
    let (mut server, mut client) = connected();
    server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
    for second in 1..=20 {
        server.tick(1000);
        client.tick(1000);
        if second == 10 {
            let initiation = initiation(&mut client);
            server.udp(&initiation, CLIENT);
        }
    }
    let sent = server.sent();
    assert_eq!(sent.iter().filter(|(_, datagram)| datagram[0] == 2).count(), 1, "an answer, which is lost");
    assert_eq!(sent.iter().filter(|(_, datagram)| datagram[0] == 1).count(), 0);
}

#[test]
fn an_initiation_after_silence_goes_out_by_the_way_the_kernel_knows_now() {
    let (mut server, _client) = connected();
    let slot = server.engine.directory.get().by_key[&public(2)];
    server.engine.peers[usize::from(slot)].as_mut().unwrap().via = Some("192.0.2.1".parse().unwrap());
    server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
    assert!(server.out.net().iter().all(|datagram| datagram.via.is_some()));
    server.sent();
    while server.out.net().is_empty() {
        server.tick(100);
    }
    let call = server.out.net()[0];
    assert_eq!((call.len, call.via), (148, None));
}

#[test]
fn call_backs_wait_for_the_private_key() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = client_of(0);
    let counters = || CounterTable::open(dir.path(), 16, [3; 16], [1; 16]).unwrap();
    let mut server = server_of_many(counters(), 1);
    client.tun(&packet("10.8.0.2", "192.0.2.99", 100));
    settle(&mut server, &mut client);
    drop(server);
    let mut server = server_of_many(counters(), 0);
    server.engine.set_private_key(&Secret::new([0; 32]));
    let public_key = Identity::new(&key_of(0), Seed::random()).public_key();
    let change = PeerChange { public_key, ..PeerChange::default() };
    server.engine.apply_peer(server.now, change, &mut server.out).unwrap();
    server.tick(10);
    assert_eq!(server.sent().len(), 0);
    server.engine.set_private_key(&secret(1));
    server.tick(10);
    assert_eq!(server.sent().len(), 1);
}

#[test]
fn messages_of_wrong_lengths_or_with_reserved_bits_are_garbage() {
    let (mut server, mut client) = connected();
    let good = initiation(&mut client);
    let mut sent = 0;
    for (kind, len) in [(1, 148), (2, 92), (3, 64)] {
        for wrong in [0, 1, 4, len - 1, len + 1, 2000] {
            let mut message = good.clone();
            message[0] = kind;
            message.resize(wrong, 0);
            server.udp(&message, CLIENT);
            sent += 1;
        }
    }
    for at in 1..4 {
        let mut message = good.clone();
        message[at] = 1;
        server.udp(&message, CLIENT);
        sent += 1;
    }
    assert_eq!((server.drops(Drop::Garbage), server.sent().len()), (sent, 0));
}

/// The server calls the client, which answers.
fn answered_call() -> (Host, Host, Vec<u8>) {
    let (mut server, mut client) = pair();
    server.peer(2, |p| p.endpoint = Some(CLIENT.parse().unwrap())).unwrap();
    server.tun(&packet("192.0.2.99", "10.8.0.2", 100));
    let call = server.sent().remove(0).1;
    client.udp(&call, SERVER);
    let response = client.sent().remove(0).1;
    (server, client, response)
}

#[test]
fn a_response_moves_the_endpoint_only_if_it_verifies_and_only_once() {
    let (mut server, mut client, response) = answered_call();
    let mut forged = response.clone();
    forged[50] ^= 1;
    server.udp(&forged, ELSEWHERE);
    assert_eq!(server.drops(Drop::BadMac), 1);
    sign(&mut forged);
    server.udp(&forged, ELSEWHERE);
    let mut misled = response.clone();
    misled[8..12].copy_from_slice(&0xffff_ff00_u32.to_le_bytes());
    sign(&mut misled);
    server.udp(&misled, ELSEWHERE);
    assert_eq!((server.drops(Drop::Decrypt), server.drops(Drop::UnknownIndex)), (1, 1));
    assert_eq!((server.view(2).endpoint, server.sent().len()), (Some(CLIENT.parse().unwrap()), 0));

    server.udp(&response, ELSEWHERE);
    assert_eq!(server.view(2).endpoint, Some(ELSEWHERE.parse().unwrap()));
    let held = server.sent();
    assert_eq!(held.len(), 1, "the packet that waited");
    server.udp(&response, CLIENT);
    assert_eq!(server.view(2).endpoint, Some(ELSEWHERE.parse().unwrap()), "a replayed one moves nothing");
    for (_, datagram) in held {
        client.udp(&datagram, SERVER);
    }
    assert_eq!(client.delivered().len(), 1);
}

#[test]
fn a_cookie_nobody_asked_for_changes_nothing() {
    let (mut server, _client, response) = answered_call();
    let mut cookie = vec![3, 0, 0, 0];
    cookie.extend_from_slice(&response[8..12]);
    cookie.resize(64, 7);
    server.udp(&cookie, ELSEWHERE);
    assert_eq!((server.drops(Drop::Decrypt), server.view(2).endpoint), (1, Some(CLIENT.parse().unwrap())));
    server.udp(&response, CLIENT);
    assert_eq!(server.sent().len(), 1);
}

#[test]
fn both_sides_may_begin_at_the_same_time() {
    let (mut server, mut client) = pair();
    server.peer(2, |p| p.endpoint = Some(CLIENT.parse().unwrap())).unwrap();
    let (down, up) = (packet("192.0.2.99", "10.8.0.2", 100), packet("10.8.0.2", "192.0.2.99", 100));
    server.tun(&down);
    client.tun(&up);
    settle(&mut server, &mut client);
    assert_eq!((server.delivered(), client.delivered()), (vec![up.clone()], vec![down.clone()]));
    server.tun(&down);
    client.tun(&up);
    settle(&mut server, &mut client);
    assert_eq!((server.delivered(), client.delivered()), (vec![up], vec![down]));
}
