//! Floods from outside and clients of the control socket that mean no good, while a tunnel carries a transfer.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cvault_tests::lab::{Machine, Network, Signal, eventually};
use cvault_tests::platform::{Pings, dropped};
use cvault_tests::tunnel::{Both, Flood, Hostility, Inner, Keys, Outer, Program, Tunnel};

/// How much more memory a flood may take. The engine's buffers are of fixed size and filled by the first traffic.
const MORE_MEMORY_KB: u64 = 16 * 1024;

fn memory_kb(both: &Both) -> Result<u64> {
    let pid = both.server.tunnel.process().pid(&both.server.machine)?;
    let status = both.server.machine.run("cat", [format!("/proc/{pid}/status").as_str()])?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Transfers under a flood of each kind; the session is the same at the end, and the flood was seen and refused as `reasons`.
fn withstands(hostility: Hostility, reasons: &[&str]) -> Result<()> {
    let both = Both::start(Program::Engine, Program::WireguardGo)?;
    both.meet(Outer::V4)?;
    both.transfer(Inner::V4, 4_000_000)?;
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let shaken = server.last_handshake(machine, &both.client.keys)?;
    let before = memory_kb(&both)?;

    let (stranger, _) = both.lab.machine("stranger", Network::Clients, 66)?;
    let target: SocketAddr = format!("{}:51820", both.server.at.v4).parse()?;
    let flood = Flood::start(&stranger, target, both.server.keys.public_bytes(), hostility)?;
    flood.sends(5_000)?;
    both.transfer(Inner::V4, 4_000_000)?;
    both.transfer(Inner::V6, 4_000_000)?;
    let pings = Pings::start(&both.client.machine, "10.8.0.1")?;
    flood.sends(5_000)?;
    pings.wait_for(100)?;
    let count = pings.stop(&both.client.machine)?;
    ensure!(count.lost() == 0, "of {} echoes {} were lost", count.sent, count.lost());
    ensure!(server.last_handshake(machine, &both.client.keys)? == shaken, "it had to shake hands again");
    let now = memory_kb(&both)?;
    ensure!(now < before + MORE_MEMORY_KB, "memory grew from {before} to {now} KB");
    let refused = reasons.iter().map(|reason| dropped(machine, "wg0", reason)).sum::<Result<u64>>()?;
    ensure!(refused > 5_000, "of {} datagrams {refused} were seen and refused as {reasons:?}", flood.sent());

    newcomer(&both)?;
    drop(flood);
    both.transfer(Inner::V4, 500_000)?;
    both.agree()
}

/// Somebody who has not been there before is let in while the flood lasts.
fn newcomer(both: &Both) -> Result<()> {
    let (machine, _) = both.lab.machine("newcomer", Network::Clients, 67)?;
    let tunnel = Tunnel::start(&machine, Program::WireguardGo, "wg0")?;
    let keys = Keys::random()?;
    both.server.tunnel.wg_set(&both.server.machine, &format!("peer {} allowed-ips 10.8.0.9/32", keys.public))?;
    let text = format!(
        "[Interface]\nPrivateKey = {}\n{}",
        keys.private,
        both.server.as_peer(&format!("Endpoint = {}:51820", both.server.at.v4))
    );
    tunnel.load(&machine, "setconf", &text)?;
    machine.sh("ip addr add 10.8.0.9/16 dev wg0; ip link set wg0 up")?;
    eventually("the newcomer is let in", 30, || machine.run("ping", ["-c1", "-W1", "10.8.0.1"]).map(drop))
}

/// More than the buffer of a socket holds, and more than the queue of the interface.
#[test]
fn full_queues_cost_what_finds_no_room_and_nothing_else() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let shaken = server.last_handshake(machine, &both.client.keys).unwrap();
    let (stranger, _) = both.lab.machine("stranger", Network::Clients, 66).unwrap();
    server.process().signal(machine, Signal::Stop).unwrap();
    let filled = fill(&both, &stranger);
    server.process().signal(machine, Signal::Continue).unwrap();
    filled.unwrap();

    both.client.reaches("10.8.0.1", 20).unwrap();
    assert!(server.figure(machine, "cvault_socket_drops").unwrap() > 500);
    both.transfer(Inner::V4, 2_000_000).unwrap();
    assert_eq!(server.last_handshake(machine, &both.client.keys).unwrap(), shaken, "the session is still the same");
    both.agree().unwrap();
}

fn fill(both: &Both, stranger: &Machine) -> Result<()> {
    let target: SocketAddr = format!("{}:51820", both.server.at.v4).parse()?;
    let flood = Flood::start(stranger, target, both.server.keys.public_bytes(), Hostility::Garbage)?;
    flood.sends(30_000)?;
    drop(flood);
    // One socket each: what is queued for the interface fills the buffer of its sender.
    both.server.machine.run("bash", ["-c", "for i in {1..3000}; do echo $i > /dev/udp/10.8.0.2/9; done"])?;
    let dropped = both.server.machine.run("cat", ["/sys/class/net/wg0/statistics/tx_dropped"])?;
    ensure!(dropped.trim().parse::<u64>()? > 1000, "the interface dropped {dropped}");
    Ok(())
}

#[test]
fn garbage_of_every_length_harms_no_tunnel() {
    withstands(Hostility::Garbage, &["garbage", "bad_mac", "unknown_index"]).unwrap();
}

#[test]
fn initiations_with_a_valid_first_mac_from_one_address_harm_no_tunnel() {
    withstands(Hostility::Initiations, &["source_limited", "under_load", "handshake", "unknown_peer"]).unwrap();
}

#[test]
fn initiations_with_a_valid_first_mac_from_everywhere_harm_no_tunnel() {
    withstands(Hostility::SpoofedInitiations, &["source_limited", "under_load", "handshake", "unknown_peer"]).unwrap();
}

#[test]
fn clients_of_the_control_socket_that_stall_lie_or_never_read_stop_no_traffic() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let path = both.server.machine.path("/run/wireguard/wg0.sock");
    let before = memory_kb(&both).unwrap();
    let mut held = Vec::new();
    for beginning in [
        &b""[..],
        b"set=1\n",
        b"set=1\npublic_key=00",
        b"get=1\n",
        b"get=1\n\nget=1\n\nget=1\n\n",
        b"\0\0\0\0\n\n",
        b"set=1\nlisten_port=1\n",
    ] {
        for _ in 0..4 {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.set_nonblocking(true).unwrap();
            // It may be shown the door already.
            let _ = stream.write_all(beginning);
            held.push(stream);
        }
    }
    // A line without an end, and a request without an end.
    let mut endless = UnixStream::connect(&path).unwrap();
    endless.set_nonblocking(true).unwrap();
    let _ = endless.write_all(&vec![b'a'; 4 << 20]);

    both.transfer(Inner::V4, 8_000_000).unwrap();
    assert!(both.client.pings("10.8.0.1"));
    assert_eq!(memory_kb(&both).unwrap().saturating_sub(before) / MORE_MEMORY_KB, 0, "memory");
    // Those who say nothing are sent away: others are served while they still hold on.
    eventually("somebody else is served", 60, || {
        let text = both.server.tunnel.get(&both.server.machine)?;
        ensure!(text.ends_with("errno=0\n\n") && text.contains("listen_port=51820"), "{text}");
        Ok(())
    })
    .unwrap();
    drop(held);
    both.transfer(Inner::V6, 500_000).unwrap();
    both.agree().unwrap();
}

/// Some act for the worker while it sleeps, others have to wait for it.
#[test]
fn clients_that_change_peers_all_the_time_are_all_answered_and_stop_no_traffic() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let path = both.server.machine.path("/run/wireguard/wg0.sock");
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|number: u8| {
            let (stream, stop) = (UnixStream::connect(&path).unwrap(), Arc::clone(&stop));
            std::thread::spawn(move || changes_a_peer(&stream, number, &stop))
        })
        .collect();
    both.transfer(Inner::V4, 8_000_000).unwrap();
    assert!(both.client.pings("10.8.0.1"));
    both.transfer(Inner::V6, 4_000_000).unwrap();
    stop.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().unwrap().unwrap());
    let text = both.server.tunnel.get(&both.server.machine).unwrap();
    assert_eq!(text.matches("public_key=").count(), 1, "the client's: {text}");
    both.transfer(Inner::V4, 500_000).unwrap();
    both.agree().unwrap();
}

/// More than one pass of a worker changes: 256.
#[test]
fn a_set_of_many_peers_is_made_whole_or_as_far_as_the_first_that_is_refused() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let set = |what: &dyn Fn(u32) -> String| {
        let peers: String =
            (0..700).map(|number| format!("public_key={:064x}\n{}\n", number + 1, what(number))).collect();
        both.server.tunnel.set(&both.server.machine, &peers)
    };
    let others = || both.server.tunnel.get(&both.server.machine).unwrap().matches("public_key=").count() - 1;
    let address = |number: u32| format!("allowed_ip=10.9.{}.{}/32", number >> 8, number & 255);
    set(&address).unwrap();
    assert_eq!(others(), 700);
    set(&|_| "remove=true".to_owned()).unwrap();
    assert_eq!(others(), 0);
    let wide = |number| match number {
        500 => format!("cvault_tenant={:032x}\nallowed_ip=10.10.0.0/24", 7),
        number => address(number),
    };
    assert!(set(&wide).unwrap_err().to_string().contains("-22"), "a tenant's peer has single addresses");
    assert!((256..512).contains(&others()), "{} were added", others());
    both.transfer(Inner::V4, 500_000).unwrap();
    both.agree().unwrap();
}

#[test]
fn peers_with_very_many_prefixes_come_change_and_go_while_traffic_flows() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (server, machine) = (&both.server.tunnel, &both.server.machine);
    let before = machine.run("wg", ["showconf", "wg0"]).unwrap();
    let download = both.begin_download(12_000_000, "2M").unwrap();
    let wide = |number: u8| {
        let prefix = |n: u32| format!("allowed_ip={}.{}.{}.{}/32\n", 10 + number, n >> 16, n >> 8 & 255, n & 255);
        (0..20_000).map(prefix).fold(format!("public_key={number:064x}\n"), |text, line| text + &line)
    };
    let listed = || {
        let text = server.get(machine).unwrap();
        text.lines().filter(|line| line.starts_with("allowed_ip=1") && !line.starts_with("allowed_ip=10.")).count()
    };
    server.set(machine, &(wide(1) + &wide(2))).unwrap();
    assert_eq!(listed(), 40_000);
    let few = format!("public_key={:064x}\nreplace_allowed_ips=true\nallowed_ip=11.0.0.0/8\n", 1);
    server.set(machine, &few).unwrap();
    assert_eq!(listed(), 20_001);
    server.set(machine, &(wide(1) + &wide(3))).unwrap();
    let gone = |number: u8| format!("public_key={number:064x}\nremove=true\n");
    server.set(machine, &(gone(1) + &gone(2))).unwrap();
    assert_eq!(listed(), 20_000, "the third is left");
    server.set(machine, &wide(1)).unwrap();
    server.load(machine, "setconf", &before).unwrap();
    assert_eq!(listed(), 0);
    download.finish().unwrap();
    both.agree().unwrap();
}

/// Adds a peer of its own and removes it, again and again, and at least a hundred times.
fn changes_a_peer(stream: &UnixStream, number: u8, stop: &AtomicBool) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut answers = BufReader::new(stream).lines();
    let peer = format!("public_key={:064x}\n", u32::from(number) + 1);
    let mut changed = 0;
    while changed < 100 || !stop.load(Ordering::Relaxed) {
        for what in [format!("allowed_ip=10.8.9.{number}/32\n"), "remove=true\n".to_owned()] {
            let mut stream = stream;
            stream.write_all(format!("set=1\n{peer}{what}\n").as_bytes())?;
            let answer = [answers.next().context("an answer")??, answers.next().context("its end")??];
            ensure!(answer == ["errno=0", ""], "{answer:?}");
        }
        changed += 1;
    }
    Ok(())
}
