//! What policy costs a packet: `cargo bench -p cvault-dataplane --bench policy`. Nanoseconds; the budget is 20.
//!
//! 256 peers of 16 tenants in turn, as a busy server has them in its caches; packets as hot as decryption leaves them.
//! `-- <text>` runs the cases whose names contain it.

use std::hint::black_box;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use cvault_dataplane::policy::{
    Clock, Direction, Hosts, PeerLimitsChange, PeerPolicy, Policy, PolicyChange, TenantChange, Tenants,
};

const PEERS: usize = 256;
const PACKETS: usize = 64;
const ROUNDS: usize = 4_000_000;
/// The best of so many: the others were disturbed.
const ATTEMPTS: usize = 7;

fn main() -> std::io::Result<()> {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let mut report = std::io::stdout().lock();
    for (name, ipv6, rules, limits, workers) in [
        ("defaults, IPv4", false, 0, false, 1),
        ("defaults, IPv6", true, 0, false, 1),
        ("all limits, IPv4", false, 0, true, 1),
        ("all limits, IPv6", true, 0, true, 1),
        ("all limits, 256 rules, IPv4", false, 240, true, 1),
        ("all limits, 256 rules, IPv6", true, 240, true, 1),
        ("all limits, two workers, IPv4", false, 0, true, 2),
        ("all limits, two workers, IPv6", true, 0, true, 2),
    ] {
        if !name.contains(&wanted) {
            continue;
        }
        let (policy, mut peers) = world(rules, limits);
        let _colleagues: Vec<_> = (1..workers).map(|_| colleague(&policy, rules, limits)).collect();
        let packets: Vec<_> =
            (0..PACKETS).map(|n| packet(u16::try_from(n * 1021).expect("64 packets"), ipv6)).collect();
        let mut best = |judged| {
            let attempts = (0..ATTEMPTS).map(|_| nanoseconds(&policy, &mut peers, &packets, judged));
            attempts.fold(f64::MAX, f64::min)
        };
        let (all, alone) = (best(true), best(false));
        writeln!(report, "{name:<30} {:6.2} ns a packet (and {alone:.2} ns the loop)", all - alone)?;
    }
    Ok(())
}

fn rate(limits: bool) -> Option<u64> {
    limits.then_some(1 << 50)
}

fn settings(rules: u8, limits: bool) -> PolicyChange {
    let tenant = |id: u8| TenantChange {
        tenant: [id; 16],
        rate_up: rate(limits),
        rate_down: rate(limits),
        allow_to: (0..rules / 16 + 1).map(|n| format!("10.{n}.0.0/16").parse().expect("a prefix")).collect(),
        deny_to: (0..rules / 2)
            .flat_map(|n| [format!("{}.{n}.0.0/25", 100 + n), format!("2001:{n:x}::/48")])
            .map(|rule| rule.parse().expect("a rule"))
            .collect(),
        ..TenantChange::default()
    };
    let hosts = (0..4).flat_map(|n| {
        [Ipv4Addr::new(192, 0, 2, n).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()).into()]
    });
    PolicyChange { replace_hosts: false, hosts: hosts.collect(), tenants: (1..17).map(tenant).collect() }
}

/// Another worker with the same tenants, which does nothing: the limits of tenants are shared with it.
fn colleague(policy: &Policy, rules: u8, limits: bool) -> Policy {
    let mut other = Policy { tenants: Tenants::sharing(policy.tenants.shared()), ..Policy::default() };
    other.change(Clock(0), settings(rules, limits)).expect("few rules");
    other
}

fn world(rules: u8, limits: bool) -> (Policy, Vec<PeerPolicy>) {
    let mut policy = Policy::default();
    policy.change(Clock(0), settings(rules, limits)).expect("few rules");
    let peers = (0..=u8::MAX).map(|n| {
        let mut peer = PeerPolicy::default();
        peer.belong_to(policy.tenants.hold([n % 16 + 1; 16]));
        if limits {
            let (rate_up, rate_down) = (rate(limits), rate(limits));
            let all = PeerLimitsChange { rate_up, rate_down, lease: Some(Some(u64::MAX)), then: None };
            peer.limit(Clock(0), all, || 0);
        }
        peer
    });
    let peers = peers.collect();
    (policy, peers)
}

fn packet(n: u16, ipv6: bool) -> ([u8; 64], IpAddr) {
    let [high, low] = n.to_be_bytes();
    let mut bytes = [0; 64];
    if ipv6 {
        let destination = Ipv6Addr::new(0x2001, 0xdb8, n, 1, 2, 3, 4, n);
        bytes[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 24, 6, 64]);
        bytes[24..40].copy_from_slice(&destination.octets());
        bytes[42..44].copy_from_slice(&443_u16.to_be_bytes());
        (bytes, destination.into())
    } else {
        let destination = Ipv4Addr::new(198, 51, high, low);
        bytes[..10].copy_from_slice(&[0x45, 0, 0, 64, 0, 0, 0, 0, 64, 6]);
        bytes[16..20].copy_from_slice(&destination.octets());
        bytes[22..24].copy_from_slice(&443_u16.to_be_bytes());
        (bytes, destination.into())
    }
}

/// One upward packet each: destination, lease, the peer's and the tenant's rate. Without `judged` the loop alone.
fn nanoseconds(policy: &Policy, peers: &mut [PeerPolicy], packets: &[([u8; 64], IpAddr)], judged: bool) -> f64 {
    let hosts: &Hosts = &policy.hosts;
    let mut passed = 0_usize;
    let started = Instant::now();
    for round in 0..ROUNDS {
        let peer = black_box(&mut peers[round % PEERS]);
        let (packet, destination) = black_box(&packets[round % PACKETS]);
        let now = Clock((round as u64 / 64) << 10);
        passed += usize::from(!judged || passes(policy, hosts, peer, packet, *destination, now));
    }
    let took = started.elapsed();
    assert_eq!(passed, ROUNDS, "the path that is measured is the one of packets that pass");
    took.as_secs_f64() * 1e9 / ROUNDS as f64
}

#[inline]
fn passes(policy: &Policy, hosts: &Hosts, peer: &mut PeerPolicy, packet: &[u8], to: IpAddr, now: Clock) -> bool {
    let Some(tenant) = peer.tenant() else { return false };
    policy.tenants.destinations(tenant).check(hosts, packet, to).is_ok()
        && peer.charge(&policy.tenants, now, Direction::Up, 1420, || 0).is_ok()
}
