//! The engine's counters beside those of the kernels on both sides, while TCP goes as fast as it can.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use cvault_tests::lab::{eventually, promptly, quiescent};
use cvault_tests::platform::Counters;
use cvault_tests::tunnel::{Account, Both, End, Flood, Hostility, Inner, Outer, Program};

/// What the client's kernel got through wireguard-go, which hands over every packet by itself, is what the engine says it
/// sent, but for packets lost between the two; these are of some size from a bare header to the MTU.
fn agrees_with_the_client(server: &Account, client: Counters) -> Result<()> {
    for (what, sent, arrived, sent_packets, arrived_packets) in [
        ("to the client", server.tx_inner, client.rx_bytes, server.tx_packets, client.rx_packets),
        ("from the client", client.tx_bytes, server.rx_inner, client.tx_packets, server.rx_packets),
    ] {
        ensure!(sent_packets >= arrived_packets, "{what}: {server:?}, {client:?}");
        let (lost, packets) = (sent.checked_sub(arrived), sent_packets - arrived_packets);
        ensure!(
            lost.is_some_and(|lost| (packets * 28..=packets * 1420).contains(&lost)),
            "{what}: {packets} packets and {lost:?} bytes were lost: {server:?}, {client:?}"
        );
    }
    Ok(())
}

#[test]
fn under_full_load_the_engine_counts_what_the_kernels_count_to_the_byte() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    for inner in [Inner::V4, Inner::V6] {
        both.transfer(inner, 30_000_000).unwrap();
        let server = Account::settled(&both.server.machine, "wg0").unwrap();
        server.agrees().unwrap();
        assert!(server.rx_inner > 30_000_000 && server.tx_inner > 30_000_000, "{server:?}");
        agrees_with_the_client(&server, Counters::read(&both.client.machine, "wg0").unwrap()).unwrap();
    }
}

/// UDP payload that passed the router to and from the server.
fn passed(both: &Both, outer: Outer) -> Result<[u64; 2]> {
    let headers = match outer {
        Outer::V4 => 20 + 8,
        Outer::V6 => 40 + 8,
    };
    let text = both.lab.internet().run("nft", ["list", "chain", "inet", "wire", "through"])?;
    let payload = |line: &str| -> Option<u64> {
        let mut words = line.split("counter packets ").nth(1)?.split(" bytes ");
        let (packets, bytes) = (words.next()?.parse::<u64>().ok()?, words.next()?.trim().parse::<u64>().ok()?);
        bytes.checked_sub(packets * headers)
    };
    let counts: Vec<u64> = text.lines().filter_map(payload).collect();
    <[u64; 2]>::try_from(counts).map_err(|_| anyhow!("nft said: {text}"))
}

#[test]
fn on_the_wire_the_engine_counts_what_the_router_counts() {
    for outer in [Outer::V4, Outer::V6] {
        let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
        // The kernel is to take runs of datagrams apart where the router still sees each of them.
        both.server.machine.sh("ip link set dev up0 gso_max_segs 1").unwrap();
        let table = "add table inet wire; add chain inet wire through { type filter hook forward priority 0; }
                     add rule inet wire through udp dport 51820 counter; add rule inet wire through udp sport 51820 counter";
        both.lab.internet().sh(&format!("nft '{table}'")).unwrap();
        both.meet(outer).unwrap();
        both.transfer(Inner::V4, 3_000_000).unwrap();
        both.transfer(Inner::V6, 3_000_000).unwrap();
        both.agree().unwrap();
        let figure = |name: &str| both.server.tunnel.figure(&both.server.machine, name).unwrap();
        let counts = || [figure("rx_bytes"), figure("tx_bytes")];
        let counted =
            quiescent("the counters", Duration::from_millis(500), 20, || Ok((counts(), passed(&both, outer)?)));
        let (engine, router) = counted.unwrap();
        assert!(engine[0] > 6_000_000 && engine[1] > 6_000_000, "{engine:?}");
        assert_eq!(engine, router, "{outer:?}");
    }
}

#[test]
fn two_engines_and_their_kernels_agree_too() {
    let both = Both::start(Program::Engine, Program::Engine).unwrap();
    both.meet(Outer::V6).unwrap();
    both.transfer(Inner::V4, 30_000_000).unwrap();
    both.agree().unwrap();
}

#[test]
fn an_interface_set_down_and_up_again_in_the_middle_goes_on_and_counts_on() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let download = both.begin_download(12_000_000, "3M").unwrap();
    for _ in 0..3 {
        both.server.machine.sh("ip link set wg0 down").unwrap();
        assert!(!both.client.pings("10.8.0.1"));
        both.server.machine.sh("ip link set wg0 up; ip -6 addr replace fd00:cafe::1/64 dev wg0 nodad").unwrap();
        both.client.reaches("10.8.0.1", 5).unwrap();
        download.progress().unwrap();
    }
    download.finish().unwrap();
    both.transfer(Inner::V6, 500_000).unwrap();
    both.server.tunnel.process().check_running().unwrap();
    both.agree().unwrap();
}

const RATE_UP: u64 = 4_000_000;
const RATE_DOWN: u64 = 6_000_000;
/// Of what a rate lets through, whether it holds is told from so many seconds' worth.
const WINDOW_S: u64 = 1;
const ERROR: f64 = 0.02;

/// IP bits each second that arrive at an interface, as the kernel counts them; an engine tells what merging has saved.
fn arriving(end: &End, rate: u64) -> Result<f64> {
    let arrived = || -> Result<u64> {
        let merged = end.tunnel.figure(&end.machine, "cvault_tun_merged_bytes").unwrap_or(0);
        Ok(Counters::read(&end.machine, "wg0")?.rx_bytes + merged)
    };
    let (begun, before) = (Instant::now(), arrived()?);
    let (bytes, took) = promptly("packets arrive", 60, || {
        let (bytes, took) = (arrived()? - before, begun.elapsed());
        ensure!(bytes >= WINDOW_S * rate / 8, "{bytes} bytes");
        Ok((u32::try_from(bytes)?, took))
    })?;
    Ok(f64::from(bytes) * 8.0 / took.as_secs_f64())
}

/// The first window may hold what was saved up, and another a moment without a processor.
fn rates_hold(both: &Both) -> Result<()> {
    for (end, rate) in [(&both.server, RATE_UP), (&both.client, RATE_DOWN)] {
        eventually("the rate holds", 60, || {
            let seen = arriving(end, rate)?;
            let error = seen / f64::from(u32::try_from(rate)?) - 1.0;
            ensure!(error.abs() <= ERROR, "{seen:.0} bit/s at {rate}: {:+.2} %", error * 100.0);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_rates_of_a_peer_and_of_its_tenant_are_what_arrives_each_second() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    let (server, client) = (&both.server, &both.client);
    // Nobody answers there.
    client
        .machine
        .sh(&format!(
            "wg set wg0 peer {} allowed-ips 10.8.0.0/16,fd00:cafe::/64,203.0.113.9/32; ip route add 203.0.113.9/32 dev wg0",
            server.keys.public
        ))
        .unwrap();
    let flood = |end: &End, target: &str| {
        Flood::start(&end.machine, target.parse().unwrap(), server.keys.public_bytes(), Hostility::Garbage).unwrap()
    };
    let floods = [flood(client, "203.0.113.9:9"), flood(server, "10.8.0.2:9")];
    let (tenant, key) = (format!("{:032x}", 7), &client.keys.public_hex);
    let rates = |prefix: &str, up, down| format!("{prefix}rate_up={up}\n{prefix}rate_down={down}\n");
    let of_peer = format!("public_key={key}\n{}", rates("cvault_", RATE_UP, RATE_DOWN));
    server.tunnel.set(&server.machine, &of_peer).unwrap();
    rates_hold(&both).unwrap();
    let of_tenant = rates("cvault_tenant_", RATE_UP, RATE_DOWN);
    let none_of_peer = format!("public_key={key}\ncvault_tenant={tenant}\n{}", rates("cvault_", 0, 0));
    let lines = format!("cvault_tenant_settings={tenant}\n{of_tenant}{none_of_peer}");
    server.tunnel.set(&server.machine, &lines).unwrap();
    rates_hold(&both).unwrap();
    drop(floods);
    both.agree().unwrap();
}
