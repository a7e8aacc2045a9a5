//! Beginnings, ends, and changes to the interface while it carries traffic.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use cvault_tests::lab::{Lab, Machine, Network, Signal, binary, eventually};
use cvault_tests::platform::Counters;
use cvault_tests::tunnel::{Account, Both, Flood, Hostility, Inner, Keys, Load, Outer, Program, Tunnel, closed};

/// More than one for each worker.
const PEERS: usize = 6;

#[test]
fn another_port_under_traffic_costs_no_session_and_a_taken_one_changes_nothing() {
    for outer in [Outer::V4, Outer::V6] {
        changes_port(outer).unwrap();
    }
}

fn changes_port(outer: Outer) -> Result<()> {
    let both = Both::start(Program::Engine, Program::WireguardGo)?;
    both.meet(outer)?;
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let shaken = server.last_handshake(machine, &both.client.keys)?;
    let download = both.begin_download(10_000_000, "2M")?;

    let other = Tunnel::start(machine, Program::WireguardGo, "wg1")?;
    other.wg_set(machine, "listen-port 51999")?;
    machine.sh("ip link set wg1 up")?;
    let refused = server.wg_set(machine, "listen-port 51999").err().context("the port is taken")?.to_string();
    ensure!(refused.contains("in use"), "{refused}");
    ensure!(machine.run("wg", ["show", "wg0", "listen-port"])?.trim() == "51820");
    download.progress()?;
    ensure!(both.client.pings("10.8.0.1"));

    server.wg_set(machine, "listen-port 51821")?;
    // The client learns of it from the next packet the server sends.
    both.server.reaches("10.8.0.2", 5)?;
    let seen = both.client.tunnel.shown(&both.client.machine, "endpoints", &both.server.keys)?;
    let expected = match outer {
        Outer::V4 => format!("{}:51821", both.server.at.v4),
        Outer::V6 => format!("[{}]:51821", both.server.at.v6),
    };
    ensure!(seen == expected, "{seen} for {expected}");
    download.finish()?;
    ensure!(server.last_handshake(machine, &both.client.keys)? == shaken, "it had to shake hands again");
    both.agree()
}

#[test]
fn who_got_no_port_goes_on_asking_for_the_same_one_and_then_serves_every_peer() {
    let lab = Lab::build().unwrap();
    let (machine, at) = lab.machine("server", Network::Servers, 10).unwrap();
    let (clients, _) = lab.machine("clients", Network::Clients, 10).unwrap();
    let holder = Tunnel::start(&machine, Program::WireguardGo, "wg1").unwrap();
    holder.wg_set(&machine, "listen-port 51999").unwrap();
    machine.sh("ip link set wg1 up").unwrap();
    let late = Tunnel::start_counting(&machine, Program::Engine, "wg2").unwrap();
    machine.sh("ip addr add 10.8.0.1/16 dev wg2; ip link set wg2 up").unwrap();
    let (own, keys) = (Keys::random().unwrap(), Load::keys(PEERS));
    let peers = Load::as_peers(&keys, 1);
    late.set(&machine, &format!("private_key={}\nlisten_port=51999\n", own.private_hex)).unwrap_err();
    late.set(&machine, &peers).unwrap_err();
    machine.sh("ip link del wg1").unwrap();
    eventually("the port is free", 20, || late.set(&machine, &peers)).unwrap();
    assert_eq!(machine.run("wg", ["show", "wg2", "listen-port"]).unwrap().trim(), "51999");
    let endpoint = format!("{}:51999", at.v4).parse().unwrap();
    let load = Load::start(&clients, PEERS, endpoint, &own, Ipv4Addr::new(10, 8, 0, 1)).unwrap();
    load.answered(PEERS, 5, 20).unwrap();
    drop(load);

    // A change of which not all can be made: what is made holds for every peer.
    let holder = Tunnel::start(&machine, Program::WireguardGo, "wg1").unwrap();
    holder.wg_set(&machine, "listen-port 51998").unwrap();
    machine.sh("ip link set wg1 up").unwrap();
    let new = Keys::random().unwrap();
    late.set(&machine, &format!("private_key={}\nlisten_port=51998\n", new.private_hex)).unwrap_err();
    assert_eq!(machine.run("wg", ["show", "wg2", "public-key"]).unwrap().trim(), new.public);
    assert_eq!(machine.run("wg", ["show", "wg2", "listen-port"]).unwrap().trim(), "51999");
    let load = Load::start(&clients, PEERS, endpoint, &new, Ipv4Addr::new(10, 8, 0, 1)).unwrap();
    load.answered(PEERS, 5, 20).unwrap();
    drop(load);
    Account::settled(&machine, "wg2").unwrap().agrees().unwrap();
}

#[test]
fn with_another_private_key_only_who_knows_the_public_one_comes_in() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let new = Keys::random().unwrap();
    let download = both.begin_download(20_000_000, "2M").unwrap();
    server.set(machine, &format!("private_key={}\n", new.private_hex)).unwrap();
    assert!(!both.client.pings("10.8.0.1"), "the session was of the former key");
    assert!(download.is_under_way());
    drop(download);
    assert_eq!(machine.run("wg", ["show", "wg0", "public-key"]).unwrap().trim(), new.public);
    // A new client of the old key is not let in.
    let client = &both.client;
    client.tunnel.wg_set(&client.machine, &format!("peer {} remove", both.server.keys.public)).unwrap();
    let at = format!("Endpoint = {}:51820\nPresharedKey = {}", both.server.at.v4, both.preshared_key);
    client.tunnel.load(&client.machine, "addconf", &both.server.as_peer(&at)).unwrap();
    assert!(!client.pings("10.8.0.1"));
    assert_eq!(client.tunnel.last_handshake(&client.machine, &both.server.keys).unwrap(), None);
    // One of the new key is.
    client.tunnel.wg_set(&client.machine, &format!("peer {} remove", both.server.keys.public)).unwrap();
    let as_new = both.server.as_peer(&at).replace(&both.server.keys.public, &new.public);
    client.tunnel.load(&client.machine, "addconf", &as_new).unwrap();
    client.reaches("10.8.0.1", 15).unwrap();
    both.transfer(Inner::V6, 500_000).unwrap();
    both.agree().unwrap();
}

#[test]
fn a_peer_removed_while_it_sends_is_heard_no_more_until_it_is_back() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let before = machine.run("wg", ["showconf", "wg0"]).unwrap();
    let flood = Flood::start(
        &both.client.machine,
        "10.8.0.1:9".parse().unwrap(),
        both.server.keys.public_bytes(),
        Hostility::Garbage,
    )
    .unwrap();
    let heard = || Counters::read(machine, "wg0").unwrap().rx_packets;
    for _ in 0..3 {
        flood.sends(500).unwrap();
        server.wg_set(machine, &format!("peer {} remove", both.client.keys.public)).unwrap();
        let last = heard();
        flood.sends(500).unwrap();
        assert_eq!(heard(), last, "nothing more came through");
        server.load(machine, "setconf", &before).unwrap();
        both.server.reaches("10.8.0.2", 15).unwrap();
        eventually("it is heard again", 20, || {
            ensure!(heard() > last + 100);
            Ok(())
        })
        .unwrap();
    }
    drop(flood);
    assert_eq!(closed(machine, "wg0").unwrap().len(), 3, "each of its lives");
    both.agree().unwrap();
}

#[test]
fn a_peer_removed_while_it_receives_stops_there_and_goes_on_when_it_is_back() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let before = machine.run("wg", ["showconf", "wg0"]).unwrap();
    for _ in 0..3 {
        let download = both.begin_download(6_000_000, "2M").unwrap();
        server.wg_set(machine, &format!("peer {} remove", both.client.keys.public)).unwrap();
        assert!(!both.client.pings("10.8.0.1"));
        assert!(download.is_under_way());
        server.load(machine, "setconf", &before).unwrap();
        // The server has lost the session and says so to nobody: it asks for a new one when it has something to send.
        both.server.reaches("10.8.0.2", 15).unwrap();
        download.finish().unwrap();
    }
    server.process().check_running().unwrap();
    assert_eq!(closed(machine, "wg0").unwrap().len(), 3, "each of its lives");
    both.agree().unwrap();
}

fn server(lab: &Lab) -> Result<Machine> {
    Ok(lab.machine("server", Network::Servers, 10)?.0)
}

#[test]
fn a_second_start_is_refused_and_the_first_goes_on() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let program = binary("cvault-node-agent").unwrap();
    for arguments in [&["tunnel", "wg0"][..], &["tunnel", "--foreground", "wg0"], &["tunnel", "--persist", "wg0"]] {
        let error = both.server.machine.run(&program, arguments.iter().copied()).unwrap_err().to_string();
        assert!(error.contains("already served by another process"), "{error}");
    }
    both.transfer(Inner::V4, 500_000).unwrap();
    both.agree().unwrap();
}

#[test]
fn names_that_no_interface_can_have_are_refused_and_leave_nothing() {
    let lab = Lab::build().unwrap();
    let machine = server(&lab).unwrap();
    let program = binary("cvault-node-agent").unwrap();
    let links = machine.run("ip", ["-o", "link"]).unwrap();
    for name in ["", "a/b", "..", "sixteen-letters-", "has space", "a%d"] {
        let error = machine.run(&program, ["tunnel", "--foreground", name]).unwrap_err().to_string();
        assert!(error.contains("cannot be the name of an interface"), "{name}: {error}");
    }
    // One that exists and is no TUN.
    let error = machine.run(&program, ["tunnel", "--foreground", "up0"]).unwrap_err().to_string();
    assert!(error.contains("up0"), "{error}");
    assert_eq!(machine.run("ip", ["-o", "link"]).unwrap(), links);
    assert_eq!(machine.run("ls", ["/run/wireguard"]).unwrap(), "");
    let unknown = machine.run("wg", ["show", "nobody0"]).unwrap_err().to_string();
    assert!(unknown.contains("Unable to access interface"), "{unknown}");
}

#[test]
fn asked_to_end_it_leaves_nothing_behind() {
    let lab = Lab::build().unwrap();
    let machine = server(&lab).unwrap();
    for signal in [Signal::Terminate, Signal::Interrupt] {
        let tunnel = Tunnel::start(&machine, Program::Engine, "wg0").unwrap();
        machine.sh("ip addr add 10.8.0.1/16 dev wg0; ip link set wg0 up").unwrap();
        tunnel.process().end(&machine, signal).unwrap();
        let status = tunnel.process().exit_status().unwrap().unwrap();
        assert!(status.success(), "{signal:?}: {status}");
        assert!(machine.run("ip", ["link", "show", "wg0"]).is_err(), "{signal:?}: the interface is there");
        assert_eq!(machine.run("ls", ["/run/wireguard"]).unwrap(), "", "{signal:?}");
    }
}

#[test]
fn killed_it_leaves_a_socket_that_the_next_one_takes_over() {
    let lab = Lab::build().unwrap();
    let machine = server(&lab).unwrap();
    let tunnel = Tunnel::start(&machine, Program::Engine, "wg0").unwrap();
    tunnel.process().end(&machine, Signal::Kill).unwrap();
    assert!(machine.run("ip", ["link", "show", "wg0"]).is_err(), "without --persist the kernel takes it away");
    let tunnel = Tunnel::start(&machine, Program::Engine, "wg0").unwrap();
    tunnel.process().check_running().unwrap();
}

#[test]
fn when_its_interface_is_deleted_it_ends_and_leaves_nothing_behind() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let machine = &both.server.machine;
    let _download = both.begin_download(50_000_000, "10M").unwrap();
    machine.sh("ip link del wg0").unwrap();
    eventually("the process ends", 10, || {
        ensure!(both.server.tunnel.process().exit_status()?.is_some(), "it runs");
        Ok(())
    })
    .unwrap();
    assert_eq!(machine.run("ls", ["/run/wireguard"]).unwrap(), "");
    let again = Tunnel::start(machine, Program::Engine, "wg0").unwrap();
    again.process().check_running().unwrap();
}
