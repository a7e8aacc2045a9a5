//! The engine and Debian's wireguard-go, either of them in either role.

use std::net::SocketAddr;

use anyhow::{Context, Result, anyhow, ensure};
use cvault_tests::lab::{Machine, Network, Signal, eventually};
use cvault_tests::platform::dropped;
use cvault_tests::tunnel::{Both, End, Flood, Hostility, Inner, Keys, Outer, Program, Tunnel, preshared_key};

const BYTES: u64 = 8_000_000;
const FEWER_BYTES: u64 = 1_000_000;

/// One of fifty datagrams of either direction is lost on the way.
fn lose_some(both: &Both) -> Result<()> {
    both.lab
        .internet()
        .sh("nft 'add table inet way; add chain inet way through { type filter hook forward priority 0; }
             add rule inet way through udp dport 51820 numgen random mod 50 < 1 counter drop
             add rule inet way through udp sport 51820 numgen random mod 50 < 1 counter drop'")
        .map(drop)
}

fn lost(both: &Both) -> Result<Vec<u64>> {
    let text = both.lab.internet().run("nft", ["list", "chain", "inet", "way", "through"])?;
    let counts = text.lines().filter_map(|line| line.split("counter packets ").nth(1)?.split(' ').next()?.parse().ok());
    Ok(counts.collect())
}

fn everything_arrives(server: Program, client: Program) -> Result<()> {
    let both = Both::start(server, client)?;
    for outer in [Outer::V4, Outer::V6] {
        both.meet(outer)?;
        for inner in [Inner::V4, Inner::V6] {
            both.transfer(inner, BYTES)?;
        }
    }
    lose_some(&both)?;
    for outer in [Outer::V4, Outer::V6] {
        both.meet(outer)?;
        for inner in [Inner::V4, Inner::V6] {
            both.transfer(inner, FEWER_BYTES)?;
        }
    }
    // What is one buffer to the network can be many datagrams, so that chance may have spared a direction.
    eventually("something is lost in either direction", 100, || {
        let lost = lost(&both)?;
        if lost.contains(&0) {
            both.transfer(Inner::V4, FEWER_BYTES)?;
        }
        ensure!(lost.len() == 2 && !lost.contains(&0), "{lost:?}");
        Ok(())
    })?;
    both.agree()
}

#[test]
fn what_wireguard_go_begins_the_engine_answers_and_every_byte_arrives_despite_losses() {
    everything_arrives(Program::Engine, Program::WireguardGo).unwrap();
}

#[test]
fn what_the_engine_begins_wireguard_go_answers_and_every_byte_arrives_despite_losses() {
    everything_arrives(Program::WireguardGo, Program::Engine).unwrap();
}

#[test]
fn the_engine_speaks_to_itself_despite_losses() {
    everything_arrives(Program::Engine, Program::Engine).unwrap();
}

#[test]
fn without_the_right_preshared_key_there_is_no_session_either_way() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    let wrong = preshared_key().unwrap();
    let file = cvault_tests::tunnel::secret_file(&both.client.machine, "psk", &wrong).unwrap();
    let server_key = &both.server.keys.public;
    both.client.tunnel.wg_set(&both.client.machine, &format!("peer {server_key} preshared-key {file}")).unwrap();
    let at = format!("{}:51820", both.server.at.v4);
    both.client.tunnel.wg_set(&both.client.machine, &format!("peer {server_key} endpoint {at}")).unwrap();
    assert!(!both.client.pings("10.8.0.1"));
    // The server has answered, for who is right is seen by the client alone; neither sends anything on it.
    assert!(!both.server.pings("10.8.0.2"));
    assert_eq!(both.client.tunnel.last_handshake(&both.client.machine, &both.server.keys).unwrap(), None);
    assert_eq!(both.server.tunnel.figure(&both.server.machine, "cvault_rx_packets").unwrap(), 0);

    let right = cvault_tests::tunnel::secret_file(&both.client.machine, "psk", &both.preshared_key).unwrap();
    both.client.tunnel.wg_set(&both.client.machine, &format!("peer {server_key} preshared-key {right}")).unwrap();
    both.client.reaches("10.8.0.1", 20).unwrap();
    both.agree().unwrap();
}

/// The client gets another address and another port in the middle of a download.
fn roams(client: Program) -> Result<()> {
    let both = Both::start(Program::Engine, client)?;
    both.meet(Outer::V4)?;
    let endpoint = || both.server.tunnel.shown(&both.server.machine, "endpoints", &both.client.keys);
    let is = |wanted: &str| {
        // A client whose last word was lost begins again after 15 s.
        eventually("the server's endpoint follows", 40, || {
            ensure!(endpoint()? == wanted, "it is {}", endpoint()?);
            Ok(())
        })
    };
    is("192.0.2.11:40000")?;

    let download = both.begin_download(12_000_000, "2M")?;
    both.client.tunnel.wg_set(&both.client.machine, "listen-port 40001")?;
    is("192.0.2.11:40001")?;
    download.progress()?;
    both.client.machine.sh("sysctl -qw net.ipv4.conf.up0.promote_secondaries=1
         ip addr add 192.0.2.77/24 dev up0
         ip addr del 192.0.2.11/24 dev up0
         ip route replace default via 192.0.2.1")?;
    is("192.0.2.77:40001")?;
    download.progress()?;
    // A datagram that is still on its way to the old address leads the client back to IPv4.
    both.client.machine.sh("ip addr del 192.0.2.77/24 dev up0")?;
    let v6 = format!("[{}]:51820", both.server.at.v6);
    eventually("the client finds the server by IPv6", 20, || {
        both.client
            .tunnel
            .wg_set(&both.client.machine, &format!("peer {} endpoint '{v6}'", both.server.keys.public))?;
        ensure!(both.client.pings("10.8.0.1"), "no echo");
        Ok(())
    })?;
    is("[2001:db8:1::11]:40001")?;
    download.finish()?;
    both.agree()
}

#[test]
fn a_wireguard_go_that_changes_port_address_and_family_keeps_its_transfer() {
    roams(Program::WireguardGo).unwrap();
}

#[test]
fn an_engine_that_changes_port_address_and_family_keeps_its_transfer() {
    roams(Program::Engine).unwrap();
}

#[test]
fn devices_behind_one_address_each_have_their_tunnel() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let mut devices = Vec::new();
    for number in 3..=5_u8 {
        let machine = both.lab.machine_behind(&both.client.machine, number).unwrap();
        let tunnel = Tunnel::start(&machine, Program::WireguardGo, "wg0").unwrap();
        let keys = Keys::random().unwrap();
        both.server
            .tunnel
            .wg_set(&both.server.machine, &format!("peer {} allowed-ips 10.8.0.{number}/32", keys.public))
            .unwrap();
        // All of them from the same port, as devices do that were set up alike.
        let text = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = 51820\n{}",
            keys.private,
            both.server.as_peer(&format!("Endpoint = {}:51820", both.server.at.v4))
        );
        tunnel.load(&machine, "setconf", &text).unwrap();
        machine.sh(&format!("ip addr add 10.8.0.{number}/16 dev wg0; ip link set wg0 up")).unwrap();
        devices.push((machine, tunnel, keys));
    }
    let mut ports = Vec::new();
    for (machine, _, keys) in &devices {
        machine.run("ping", ["-c3", "-i0.05", "-W5", "10.8.0.1"]).unwrap();
        let endpoint = both.server.tunnel.shown(&both.server.machine, "endpoints", keys).unwrap();
        let (address, port) = endpoint.rsplit_once(':').unwrap();
        assert_eq!(address, both.client.at.v4, "all that is seen of them is the address they share");
        ports.push(port.to_owned());
    }
    ports.sort();
    ports.dedup();
    assert_eq!(ports.len(), devices.len());
    // All at the same time, and in the other direction too.
    both.transfer(Inner::V4, FEWER_BYTES).unwrap();
    for number in 3..=5 {
        both.server.reaches(&format!("10.8.0.{number}"), 5).unwrap();
    }
    both.agree().unwrap();
}

#[test]
fn a_persistent_keepalive_is_sent_without_traffic_by_either_side() {
    for server in [Program::Engine, Program::WireguardGo] {
        let client = if server == Program::Engine { Program::WireguardGo } else { Program::Engine };
        let both = Both::start(server, client).unwrap();
        both.meet(Outer::V4).unwrap();
        for (from, to) in [(&both.server, &both.client), (&both.client, &both.server)] {
            let heard = || -> Result<u64> {
                let bytes = to.tunnel.peer(&to.machine, &from.keys, "rx_bytes")?.context("rx_bytes")?;
                Ok(bytes.parse()?)
            };
            from.tunnel.wg_set(&from.machine, &format!("peer {} persistent-keepalive 1", to.keys.public)).unwrap();
            let before = heard().unwrap();
            eventually("three keepalives of 32 bytes", 15, || {
                let now = heard()?;
                ensure!(now >= before + 3 * 32, "{before}, {now}");
                Ok(())
            })
            .unwrap();
            from.tunnel.wg_set(&from.machine, &format!("peer {} persistent-keepalive off", to.keys.public)).unwrap();
        }
        both.agree().unwrap();
    }
}

/// Counts at an end what somebody who asks it in does about cookies.
fn watch_cookies(at: &End, guest: &str) -> Result<()> {
    at.machine
        .sh(&format!(
            "nft 'add table inet cookies
                  add chain inet cookies out {{ type filter hook output priority 0; }}
                  add chain inet cookies in {{ type filter hook input priority 0; }}
                  add rule inet cookies out udp sport 51820 @th,64,8 3 counter
                  add rule inet cookies out ip daddr {guest} udp sport 51820 @th,64,8 3 counter
                  add rule inet cookies in ip saddr {guest} udp dport 51820 @th,64,8 1 counter
                  add rule inet cookies in ip saddr {guest} udp dport 51820 @th,64,8 1 @th,1120,128 != 0 counter'",
        ))
        .map(drop)
}

/// What [`watch_cookies`] has counted.
struct Cookies {
    /// Cookie replies to anybody.
    replies: u64,
    /// Those to the guest.
    asked: u64,
    /// The guest's initiations.
    initiations: u64,
    /// Those with a second MAC.
    brought: u64,
}

fn cookies(at: &End) -> Result<Cookies> {
    let text = at.machine.run("nft", ["list", "table", "inet", "cookies"])?;
    let counts = text.split("counter packets ").skip(1).filter_map(|rest| rest.split(' ').next()?.parse().ok());
    let [replies, asked, initiations, brought] =
        counts.collect::<Vec<_>>().try_into().map_err(|_| anyhow!("nft said: {text}"))?;
    Ok(Cookies { replies, asked, initiations, brought })
}

#[test]
fn wireguard_go_under_load_asks_for_a_cookie_and_the_engine_brings_it() {
    let both = Both::start(Program::WireguardGo, Program::Engine).unwrap();
    let server = &both.server;
    watch_cookies(server, &both.client.at.v4).unwrap();
    let (stranger, _) = both.lab.machine("stranger", Network::Clients, 66).unwrap();
    let target = format!("{}:51820", server.at.v4).parse().unwrap();
    let key = server.keys.public_bytes();
    let floods = [(); 4].map(|()| Flood::start(&stranger, target, key, Hostility::Initiations).unwrap());
    eventually("it is under load", 60, || {
        let replies = cookies(server)?.replies;
        ensure!(replies > 1000, "{replies}");
        Ok(())
    })
    .unwrap();
    both.meet(Outer::V4).unwrap();
    let Cookies { asked, brought, .. } = cookies(server).unwrap();
    assert!(asked > 0 && brought > 0, "cookies: {asked} asked for, {brought} brought");
    drop(floods);
    both.transfer(Inner::V4, FEWER_BYTES).unwrap();
    both.agree().unwrap();
}

/// It is held still until more initiations wait for each of its workers than it works off at once, and wireguard-go's comes
/// behind them. They come from everywhere: the kernel chooses the worker by address and port.
#[test]
fn the_engine_under_load_asks_for_a_cookie_and_wireguard_go_brings_it() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    let (server, client) = (&both.server, &both.client);
    watch_cookies(server, &client.at.v4).unwrap();
    let (stranger, _) = both.lab.machine("stranger", Network::Clients, 66).unwrap();
    let target = format!("{}:51820", server.at.v4).parse().unwrap();
    server.tunnel.process().signal(&server.machine, Signal::Stop).unwrap();
    let held = hold_initiations(&both, &stranger, target);
    server.tunnel.process().signal(&server.machine, Signal::Continue).unwrap();
    held.unwrap();
    // It says it again after five seconds, by then with what it was asked for.
    client.reaches("10.8.0.1", 30).unwrap();
    let Cookies { asked, brought, .. } = cookies(server).unwrap();
    assert!(asked > 0 && brought > 0, "cookies: {asked} asked for, {brought} brought");
    assert!(dropped(&server.machine, "wg0", "under_load").unwrap() > 1000, "of all the others");
    both.transfer(Inner::V4, FEWER_BYTES).unwrap();
    both.agree().unwrap();
}

fn hold_initiations(both: &Both, stranger: &Machine, target: SocketAddr) -> Result<()> {
    let (server, client) = (&both.server, &both.client);
    let flood = Flood::start(stranger, target, server.keys.public_bytes(), Hostility::SpoofedInitiations)?;
    flood.sends(12_000)?;
    drop(flood);
    client.tunnel.wg_set(&client.machine, &format!("peer {} endpoint {target}", server.keys.public))?;
    ensure!(!client.pings("10.8.0.1"), "who is held still answers nobody");
    ensure!(cookies(server)?.initiations > 0, "its initiation has not come");
    Ok(())
}
