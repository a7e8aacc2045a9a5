//! `wg` on the engine: what it writes down can be read in again, and what it changes holds for the packets at once.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Result, ensure};
use cvault_tests::lab::{Lab, Network, eventually};
use cvault_tests::platform::dropped;
use cvault_tests::tunnel::{Both, Inner, Keys, Outer, Program, Tunnel, preshared_key};

#[test]
fn what_showconf_writes_setconf_reads_and_it_is_the_same() {
    let lab = Lab::build().unwrap();
    let (machine, _) = lab.machine("server", Network::Servers, 10).unwrap();
    let tunnel = Tunnel::start(&machine, Program::Engine, "wg0").unwrap();
    let peers: Vec<Keys> = (0..4).map(|_| Keys::random().unwrap()).collect();
    let text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51999\nFwMark = 0x1234\n\
         [Peer]\nPublicKey = {}\nPresharedKey = {}\nAllowedIPs = 10.0.0.0/8, fd00::/8\nEndpoint = 192.0.2.1:1\nPersistentKeepalive = 25\n\
         [Peer]\nPublicKey = {}\nAllowedIPs = 10.1.0.0/16, 10.1.2.3/32, 128.0.0.0/1, 2001:db8::/33\nEndpoint = [2001:db8::1]:65535\n\
         [Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\n\
         [Peer]\nPublicKey = {}\n",
        Keys::random().unwrap().private,
        peers[0].public,
        preshared_key().unwrap(),
        peers[1].public,
        peers[2].public,
        peers[3].public
    );
    tunnel.load(&machine, "setconf", &text).unwrap();
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(sorted_values).collect();
        lines.sort();
        lines.retain(|line| !line.is_empty());
        lines
    };
    let first = machine.run("wg", ["showconf", "wg0"]).unwrap();
    assert_eq!(sorted(&first), sorted(&text));
    // Into a tunnel that holds something else, twice.
    for how in ["setconf", "syncconf", "setconf"] {
        tunnel.wg_set(&machine, &format!("listen-port 52000 fwmark 0 peer {} remove", peers[0].public)).unwrap();
        tunnel.wg_set(&machine, &format!("peer {} allowed-ips 10.0.0.0/9", Keys::random().unwrap().public)).unwrap();
        tunnel.load(&machine, how, &first).unwrap();
        assert_eq!(sorted(&machine.run("wg", ["showconf", "wg0"]).unwrap()), sorted(&first), "{how}");
    }
    // Without the private key and peers: setconf takes away what it does not name.
    tunnel.load(&machine, "setconf", "[Interface]\n").unwrap();
    assert_eq!(machine.run("wg", ["show", "wg0", "peers"]).unwrap(), "");
    assert_eq!(machine.run("wg", ["show", "wg0", "public-key"]).unwrap().trim(), "(none)");
}

fn sorted_values(line: &str) -> String {
    let Some((key, values)) = line.split_once(" = ") else { return line.to_owned() };
    let mut values: Vec<&str> = values.split(", ").collect();
    values.sort_unstable();
    format!("{key} = {}", values.join(", "))
}

#[test]
fn syncconf_leaves_the_session_of_a_peer_that_stays_and_ends_that_of_one_that_does_not() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let shaken = server.last_handshake(machine, &both.client.keys).unwrap();
    let download = both.begin_download(8_000_000, "2M").unwrap();

    let now = machine.run("wg", ["showconf", "wg0"]).unwrap();
    let other = Keys::random().unwrap();
    server
        .load(machine, "syncconf", &format!("{now}\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.8.9.9/32\n", other.public))
        .unwrap();
    assert_eq!(server.shown(machine, "allowed-ips", &other).unwrap(), "10.8.9.9/32");
    server.load(machine, "syncconf", &now).unwrap();
    assert!(server.shown(machine, "allowed-ips", &other).is_err(), "it is gone");
    download.finish().unwrap();
    assert_eq!(server.last_handshake(machine, &both.client.keys).unwrap(), shaken, "the session is still the same");

    let none = format!("[Interface]\nPrivateKey = {}\nListenPort = 51820\n", both.server.keys.private);
    server.load(machine, "syncconf", &none).unwrap();
    assert!(!both.client.pings("10.8.0.1"));
    both.agree().unwrap();
}

/// A second client machine, with an interface and keys of its own.
fn second_client(both: &Both, address: &str) -> Result<(cvault_tests::lab::Machine, Tunnel, Keys)> {
    let (machine, _) = both.lab.machine("client2", Network::Clients, 50)?;
    let tunnel = Tunnel::start(&machine, Program::WireguardGo, "wg0")?;
    let keys = Keys::random()?;
    let text = format!(
        "[Interface]\nPrivateKey = {}\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.0.0.0/8\nEndpoint = {}:51820\n",
        keys.private, both.server.keys.public, both.server.at.v4
    );
    tunnel.load(&machine, "setconf", &text)?;
    machine.sh(&format!("ip addr add {address} dev wg0; ip link set wg0 up; ip route replace 10.0.0.0/8 dev wg0"))?;
    Ok((machine, tunnel, keys))
}

#[test]
fn an_address_that_moves_to_another_peer_takes_its_packets_along() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (second, _tunnel, keys) = second_client(&both, "10.8.0.2/32").unwrap();
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    server.wg_set(machine, &format!("peer {} allowed-ips 10.8.0.2/32", keys.public)).unwrap();
    assert_eq!(server.shown(machine, "allowed-ips", &both.client.keys).unwrap(), "fd00:cafe::2/128");
    eventually("the second client is who has 10.8.0.2", 15, || {
        second.run("ping", ["-c1", "-W1", "10.8.0.1"]).map(drop)
    })
    .unwrap();
    let before = dropped(machine, "wg0", "spoofed").unwrap();
    assert!(!both.client.pings("10.8.0.1"), "the first client has it no more");
    assert_eq!(dropped(machine, "wg0", "spoofed").unwrap() - before, 1);
    assert!(both.client.pings("fd00:cafe::1"), "its other address is still its own");

    // Line by line: the first takes it from who has it, the second from who has got it.
    let comes_and_goes = "allowed_ip=10.8.0.2/32\nallowed_ip=-10.8.0.2/32\n";
    server.set(machine, &format!("public_key={}\n{comes_and_goes}", both.client.keys.public_hex)).unwrap();
    for keys in [&keys, &both.client.keys] {
        assert!(!server.shown(machine, "allowed-ips", keys).unwrap().contains("10.8.0.2"), "nobody has it");
    }
    server
        .wg_set(machine, &format!("peer {} allowed-ips 10.8.0.2/32,fd00:cafe::2/128", both.client.keys.public))
        .unwrap();
    assert_eq!(server.shown(machine, "allowed-ips", &keys).unwrap(), "(none)");
    both.transfer(Inner::V4, 100_000).unwrap();
    both.agree().unwrap();
}

#[test]
fn of_several_prefixes_the_longest_decides_where_a_packet_goes_and_where_it_may_come_from() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (second, _tunnel, keys) = second_client(&both, "10.9.200.1/32").unwrap();
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let wide = format!("peer {} allowed-ips 10.8.0.2/32,fd00:cafe::2/128,10.9.0.0/16", both.client.keys.public);
    server.wg_set(machine, &wide).unwrap();
    server.wg_set(machine, &format!("peer {} allowed-ips 10.9.128.0/17", keys.public)).unwrap();
    machine.sh("ip route add 10.9.0.0/16 dev wg0").unwrap();
    both.client.machine.sh("ip addr add 10.9.1.1/32 dev wg0; ip addr add 10.9.200.2/32 dev wg0").unwrap();

    eventually("the second client is connected", 15, || second.run("ping", ["-c1", "-W1", "10.8.0.1"]).map(drop))
        .unwrap();
    both.server.reaches("10.9.1.1", 5).unwrap();
    both.server.reaches("10.9.200.1", 5).unwrap();
    assert!(!both.server.pings("10.9.200.2"), "that address is of the second client, who has not got it");
    let before = dropped(machine, "wg0", "spoofed").unwrap();
    assert!(both.client.machine.run("ping", ["-c1", "-W1", "-I", "10.9.200.2", "10.8.0.1"]).is_err());
    assert_eq!(dropped(machine, "wg0", "spoofed").unwrap() - before, 1);

    // When the longer prefix goes, the wider one has it all.
    server.wg_set(machine, &format!("peer {} remove", keys.public)).unwrap();
    both.server.reaches("10.9.200.2", 5).unwrap();
    both.agree().unwrap();
}

#[test]
fn a_request_that_cannot_be_granted_is_refused_with_the_systems_word() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let machine = &both.server.machine;
    let configured = || machine.run("wg", ["showconf", "wg0"]).unwrap();
    let before = configured();
    let refused = |lines: &str| -> Result<String> {
        Ok(cvault_tests::platform::uapi(machine, "wg0", &format!("set=1\n{lines}\n"))?.trim().to_owned())
    };
    let peer = format!("public_key={}\n", both.client.keys.public_hex);
    for lines in [
        "private_key=00\n",
        "listen_port=65536\n",
        "nonsense=1\n",
        "no equals sign\n",
        &format!("{peer}allowed_ip=10.0.0.0/33\n"),
        &format!("{peer}allowed_ip=10.0.0.0\nprotocol_version=2\n"),
        &format!("{peer}endpoint=nowhere\n"),
        "allowed_ip=10.0.0.0/8\n",
    ] {
        assert_eq!(refused(lines).unwrap(), "errno=-22", "EINVAL: {lines}");
    }
    assert_eq!(configured(), before, "nothing of all that was applied");
    assert!(both.client.pings("10.8.0.1"));
    both.agree().unwrap();
}

#[test]
fn each_small_change_on_one_connection_is_made_and_answered() {
    let lab = Lab::build().unwrap();
    let (machine, _) = lab.machine("server", Network::Servers, 10).unwrap();
    let _tunnel = Tunnel::start(&machine, Program::Engine, "wg0").unwrap();
    let connect = || {
        let client = UnixStream::connect(machine.path("/run/wireguard/wg0.sock")).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    };
    let answered = |client: &mut UnixStream, count: usize| {
        let mut answers = vec![0; "errno=0\n\n".len() * count];
        client.read_exact(&mut answers).unwrap();
        assert_eq!(String::from_utf8(answers).unwrap(), "errno=0\n\n".repeat(count));
    };
    let peers = || machine.run("wg", ["show", "wg0", "peers"]).unwrap().lines().count();
    let key = |number: usize| format!("public_key={number:064x}\n");
    let mut client = connect();
    client.write_all(b"set=1\n\n").unwrap();
    answered(&mut client, 1);
    // More answers than fit into a socket unread.
    for number in 1..=300 {
        let request = format!("set=1\n{}allowed_ip=10.9.{}.{}/32\n\n", key(number), number >> 8, number & 0xff);
        client.write_all(request.as_bytes()).unwrap();
    }
    answered(&mut client, 300);
    assert_eq!(peers(), 300);
    // Each after the answer to the one before, on this connection and on one of its own.
    let mut client = connect();
    for number in 1..=300 {
        let mut other = connect();
        let client = if number % 3 == 0 { &mut other } else { &mut client };
        client.write_all(format!("set=1\n{}remove=true\n\n", key(number)).as_bytes()).unwrap();
        answered(client, 1);
    }
    assert_eq!(peers(), 0);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "no request is answered twice");
}

#[test]
fn the_mark_is_on_every_datagram_that_leaves() {
    for outer in [Outer::V4, Outer::V6] {
        marks_all(outer).unwrap();
    }
}

fn marks_all(outer: Outer) -> Result<()> {
    let both = Both::start(Program::Engine, Program::WireguardGo)?;
    both.meet(outer)?;
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    machine.sh("nft 'add table inet marks; add chain inet marks out { type filter hook output priority 0; }
         add rule inet marks out udp sport 51820-51821 meta mark 0x77 counter
         add rule inet marks out udp sport 51820-51821 meta mark != 0x77 counter'")?;
    let counts = || -> Result<Vec<u64>> {
        let text = machine.run("nft", ["list", "chain", "inet", "marks", "out"])?;
        let numbers = text.lines().filter_map(|line| line.split("packets ").nth(1)?.split(' ').next()?.parse().ok());
        let counts: Vec<u64> = numbers.collect();
        ensure!(counts.len() == 2, "two rules: {text}");
        Ok(counts)
    };
    ensure!(both.client.pings("10.8.0.1"));
    let before = counts()?;
    ensure!(before[0] == 0 && before[1] > 0, "{before:?}");
    server.wg_set(machine, "fwmark 0x77")?;
    both.transfer(Inner::V4, 1_000_000)?;
    let after = counts()?;
    ensure!(after[0] > 0 && after[1] == before[1], "{before:?}, {after:?}");
    // Other sockets.
    server.wg_set(machine, "listen-port 51821")?;
    both.server.reaches("10.8.0.2", 5)?;
    both.transfer(Inner::V4, 1_000_000)?;
    let moved = counts()?;
    ensure!(moved[0] > after[0] && moved[1] == before[1], "{after:?}, {moved:?}");
    server.wg_set(machine, "fwmark 0")?;
    ensure!(both.server.pings("10.8.0.2"));
    let unmarked = counts()?;
    ensure!(unmarked[0] == moved[0] && unmarked[1] > moved[1], "{moved:?}, {unmarked:?}");
    both.agree()
}
