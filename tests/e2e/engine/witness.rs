//! The engine's counters beside those of the kernels on both sides, while TCP goes as fast as it can.

use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use cvault_tests::lab::quiescent;
use cvault_tests::platform::Counters;
use cvault_tests::tunnel::{Account, Both, Inner, Outer, Program};

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
