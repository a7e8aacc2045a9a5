//! Sizes: what fits passes whole, what does not is answered with the size that would, and outside anything may be cut.

use anyhow::{Result, bail, ensure};
use cvault_tests::lab::{Machine, eventually};
use cvault_tests::tunnel::{Both, Inner, Outer, Program};

/// An IPv4 header and an ICMP header; an IPv6 header and an ICMPv6 header.
const HEADERS: [usize; 2] = [28, 48];
const MTU: usize = 1420;

/// A ping that must not be cut; what it printed, answered or not.
fn uncut(machine: &Machine, address: &str, payload: usize) -> Result<String> {
    machine.sh(&format!("ping -c1 -W2 -M do -s {payload} {address} 2>&1 || true"))
}

#[test]
fn a_packet_of_exactly_the_mtu_passes_uncut_and_one_byte_more_is_told_the_mtu() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    // Somebody beyond the server sends to the client, without translation of addresses.
    both.server.machine.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1").unwrap();
    let internet = both.lab.internet();
    internet
        .sh(&format!(
            "ip route add 10.8.0.0/16 via {}; ip -6 route add fd00:cafe::/64 via {}",
            both.server.at.v4, both.server.at.v6
        ))
        .unwrap();
    let server = &both.server.keys.public;
    both.client
        .machine
        .sh(&format!(
            "wg set wg0 peer {server} allowed-ips 10.8.0.0/16,fd00:cafe::/64,203.0.113.1/32,2001:db8:2::1/128
             ip route add 203.0.113.1/32 dev wg0; ip -6 route add 2001:db8:2::1/128 dev wg0",
        ))
        .unwrap();
    for outer in [Outer::V4, Outer::V6] {
        both.meet(outer).unwrap();
        for (family, headers) in [Inner::V4, Inner::V6].into_iter().zip(HEADERS) {
            let fits = MTU - headers;
            let (server, client) = (both.server.inner(family), both.client.inner(family));
            let there = uncut(&both.client.machine, &server, fits).unwrap();
            assert!(there.contains(" 0% packet loss"), "{outer:?}, {family:?}: {there}");
            let through = uncut(internet, &client, fits).unwrap();
            assert!(through.contains(" 0% packet loss"), "{outer:?}, {family:?}: {through}");
            let too_big = uncut(internet, &client, fits + 1).unwrap();
            assert!(too_big.contains("mtu = 1420") || too_big.contains("mtu=1420"), "{outer:?}, {family:?}: {too_big}");
            // The size that was told is remembered: it would spare the next family of the outside the telling.
            internet.sh("ip route flush cache; ip -6 route flush cache").unwrap();
        }
    }
    both.agree().unwrap();
}

/// Everything from the internet machine to its servers, and back, goes through so many bytes.
fn make_path(both: &Both, mtu: usize) -> Result<()> {
    both.lab.internet().sh(&format!(
        "for port in /sys/class/net/servers/brif/*; do ip link set \"${{port##*/}}\" mtu {mtu}; done; ip link set servers mtu {mtu}"
    ))?;
    both.server.machine.sh(&format!("ip link set up0 mtu {mtu}")).map(drop)
}

fn passes_a_narrow_path(server: Program, client: Program) -> Result<()> {
    let both = Both::start(server, client)?;
    make_path(&both, 1400)?;
    let figure = |name: &str| both.server.tunnel.figure(&both.server.machine, name);
    let has_runs = server == Program::Engine && figure("cvault_offload_udp_gso")? == 1;
    for outer in [Outer::V4, Outer::V6] {
        both.meet(outer)?;
        for (family, headers) in [Inner::V4, Inner::V6].into_iter().zip(HEADERS) {
            both.transfer(family, 2_000_000)?;
            // The first may be lost to learning the path.
            let _learnt = uncut(&both.client.machine, &both.server.inner(family), MTU - headers)?;
            let whole = uncut(&both.client.machine, &both.server.inner(family), MTU - headers)?;
            if !whole.contains(" 0% packet loss") {
                bail!("{outer:?}, {family:?}: {whole}");
            }
        }
        if has_runs {
            let (paths, offload) = (figure("cvault_udp_gso_refused_paths")?, figure("cvault_offload_udp_gso")?);
            ensure!(paths > 0 && offload == 1, "the kernel takes no runs there: {paths} paths, {offload}");
        }
    }
    if has_runs {
        make_path(&both, 1500)?;
        both.server.machine.sh("ip route flush cache; ip -6 route flush cache")?;
        eventually("runs leave again", 60, || {
            for outer in [Outer::V4, Outer::V6] {
                both.meet(outer)?;
                both.transfer(Inner::V4, 2_000_000)?;
            }
            let paths = figure("cvault_udp_gso_refused_paths")?;
            ensure!(paths == 0, "{paths} paths");
            Ok(())
        })?;
    }
    both.agree()
}

#[test]
fn over_a_path_narrower_than_its_datagrams_everything_still_passes() {
    passes_a_narrow_path(Program::Engine, Program::WireguardGo).unwrap();
}

#[test]
fn over_a_narrow_path_the_engine_passes_as_the_client_too() {
    passes_a_narrow_path(Program::WireguardGo, Program::Engine).unwrap();
}

/// What the rules of a chain have counted, in order.
fn counted(machine: &Machine, chain: &str) -> Result<Vec<u64>> {
    let text = machine.run("nft", ["list", "chain", "inet", "marks", chain])?;
    let counts = text.lines().filter_map(|line| line.split("counter packets ").nth(1)?.split(' ').next()?.parse().ok());
    Ok(counts.collect())
}

#[test]
fn congestion_marks_pass_both_ways_and_the_class_of_service_stays_inside() {
    for (outer, header) in [(Outer::V4, "ip"), (Outer::V6, "ip6")] {
        let both = Both::start(Program::Engine, Program::Engine).unwrap();
        let (internet, server) = (both.lab.internet(), &both.server.machine);
        let way = format!(
            "add table inet marks; add chain inet marks way {{ type filter hook forward priority 0; }}
             add rule inet marks way udp sport 51820 {header} dscp cs0 {header} ecn ect1 counter
             add rule inet marks way udp sport 51820 {header} dscp != cs0 counter
             add rule inet marks way udp dport 51820 {header} ecn ect0 {header} ecn set ce"
        );
        let end = "add table inet marks; add chain inet marks end { type filter hook input priority 0; }
                   add rule inet marks end iifname wg0 ip ecn ce counter; add rule inet marks end iifname wg0 ip ecn ect0 counter";
        internet.sh(&format!("nft '{way}'")).unwrap();
        server.sh(&format!("nft '{end}'")).unwrap();
        both.meet(outer).unwrap();
        // Expedited forwarding with ECT(1), and best effort with ECT(0).
        server.run("ping", ["-c5", "-i0.2", "-W2", "-Q0xb9", "10.8.0.2"]).unwrap();
        let seen = counted(internet, "way").unwrap();
        assert!(seen[0] >= 5 && seen[1] == 0, "{outer:?}: {seen:?}");
        both.client.machine.run("ping", ["-c5", "-i0.2", "-W2", "-Q0x02", "10.8.0.1"]).unwrap();
        assert_eq!(counted(server, "end").unwrap(), [5, 0], "{outer:?}: each was marked on the way");
        both.agree().unwrap();
    }
}
