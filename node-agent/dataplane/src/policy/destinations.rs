//! Where a tenant's peers may send to: everything that is the internet, unless a rule says otherwise.
//!
//! In this order: what the tenant denies, the server's own addresses, and the ranges that are not the internet; of the
//! last, what the tenant allows by a prefix inside the range. An IPv6 address that stands for an IPv4 one (6to4, Teredo,
//! NAT64) is judged as both. Then ports: SMTP, and what the tenant denies. Documentation and benchmarking ranges are
//! routed like any other: private internets use them. Prefixes are compiled into sorted ranges when they are set.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::ranges::Ranges;
use super::rule::DenyRule;
use super::transport::{self, Transport, transport};

/// Prefixes and rules of one tenant, and addresses of one server.
pub const MAX_RULES: usize = 256;
const SMTP_PORT: u16 = 25;

/// Why a packet may not go where it wants to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forbidden {
    /// Its address.
    Destination,
    /// Its port, or that it hides it.
    Port,
}

/// The server's own addresses.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    listed: Vec<IpAddr>,
    ranges: Ranges,
}

impl Hosts {
    /// Adds an address; false when there are too many.
    pub fn add(&mut self, address: IpAddr) -> bool {
        if self.listed.contains(&address) {
            return true;
        }
        if self.listed.len() == MAX_RULES {
            return false;
        }
        self.listed.push(address);
        self.ranges = Ranges::of(self.listed.iter().map(|address| IpNet::from(*address)));
        true
    }

    /// All of them.
    #[must_use]
    pub fn listed(&self) -> &[IpAddr] {
        &self.listed
    }
}

/// The rules of one tenant, compiled.
#[derive(Clone, Debug, Default)]
pub struct Destinations {
    smtp: bool,
    closed: Ranges,
    opened: Ranges,
    /// Rules that also ask for a protocol.
    partial: Box<[DenyRule]>,
}

impl Destinations {
    /// Compiles what a tenant allows and denies.
    #[must_use]
    pub fn new(smtp: bool, allowed: &[IpNet], denied: &[DenyRule]) -> Self {
        let whole = denied.iter().filter(|rule| rule.protocol.is_none()).map(|rule| rule.net);
        let partial = denied.iter().filter(|rule| rule.protocol.is_some()).cloned().collect();
        Self { smtp, closed: Ranges::of(whole), opened: Ranges::of(allowed.iter().copied().filter(opens)), partial }
    }

    /// Whether a well-formed packet may go to its destination.
    ///
    /// # Errors
    /// What is forbidden about it.
    #[inline]
    pub fn check(&self, hosts: &Hosts, packet: &[u8], destination: IpAddr) -> Result<(), Forbidden> {
        let open = match destination {
            IpAddr::V4(addr) => self.open4(hosts, addr.to_bits()),
            IpAddr::V6(addr) => self.open6(hosts, addr.to_bits()),
        };
        if !open {
            return Err(Forbidden::Destination);
        }
        if self.smtp && self.partial.is_empty() {
            return Ok(());
        }
        self.check_port(transport(packet), destination)
    }

    #[inline]
    fn open4(&self, hosts: &Hosts, addr: u32) -> bool {
        if self.closed.v4.contain(addr) || hosts.ranges.v4.contain(addr) {
            return false;
        }
        not_internet4(addr).is_none() || self.opened.v4.contain(addr)
    }

    #[inline]
    fn open6(&self, hosts: &Hosts, addr: u128) -> bool {
        if self.closed.v6.contain(addr) || hosts.ranges.v6.contain(addr) {
            return false;
        }
        match kind6(addr) {
            Kind6::Internet => true,
            Kind6::Other(_) => self.opened.v6.contain(addr),
            Kind6::Embedding(_, embedded) => {
                self.opened.v6.contain(addr) || embedded.iter().all(|addr| self.open4(hosts, *addr))
            }
        }
    }

    #[inline]
    fn check_port(&self, transport: Transport, destination: IpAddr) -> Result<(), Forbidden> {
        let forbidden = match transport {
            Transport::Hidden => true,
            Transport::Port { protocol: transport::TCP, port: SMTP_PORT } if !self.smtp => true,
            Transport::Port { .. } | Transport::NoPort { .. } if self.partial.is_empty() => false,
            Transport::Port { protocol, port } => self.partial.iter().any(|rule| {
                rule.protocol == Some(protocol)
                    && rule.ports.as_ref().is_none_or(|ports| ports.contains(&port))
                    && rule.covers(destination)
            }),
            Transport::NoPort { protocol } => self
                .partial
                .iter()
                .any(|rule| rule.protocol == Some(protocol) && rule.ports.is_none() && rule.covers(destination)),
        };
        if forbidden { Err(Forbidden::Port) } else { Ok(()) }
    }
}

impl DenyRule {
    fn covers(&self, destination: IpAddr) -> bool {
        let IpAddr::V6(addr) = destination else {
            return self.net.contains(&destination);
        };
        let embedded = match kind6(addr.to_bits()) {
            Kind6::Embedding(_, embedded) => embedded,
            Kind6::Internet | Kind6::Other(_) => return self.net.contains(&destination),
        };
        self.net.contains(&destination)
            || embedded.iter().any(|addr| self.net.contains(&IpAddr::from(Ipv4Addr::from_bits(*addr))))
    }
}

/// The length of the prefix that keeps the address out of the internet.
#[inline]
fn not_internet4(addr: u32) -> Option<u8> {
    let [a, b, c, _] = addr.to_be_bytes();
    match a {
        0 | 10 | 127 => Some(8),
        100 if b & 0xc0 == 64 => Some(10),
        169 if b == 254 => Some(16),
        172 if b & 0xf0 == 16 => Some(12),
        192 if b == 168 => Some(16),
        192 if b == 0 && c == 0 => Some(24),
        224..=255 => Some(4),
        _ => None,
    }
}

#[derive(Clone, Copy)]
enum Kind6 {
    Internet,
    /// Kept out of it by a prefix of this length.
    Other(u8),
    /// By a prefix of this length it stands for these IPv4 addresses (one of them twice if there is only one).
    Embedding(u8, [u32; 2]),
}

#[inline]
fn kind6(addr: u128) -> Kind6 {
    let head = word(addr, 96);
    if head >> 29 == 1 && head != 0x2001_0000 && head >> 16 != 0x2002 {
        return Kind6::Internet;
    }
    special6(addr)
}

fn word(addr: u128, shift: u32) -> u32 {
    u32::try_from((addr >> shift) & u128::from(u32::MAX)).expect("masked to 32 bits")
}

fn special6(addr: u128) -> Kind6 {
    const NAT64: u128 = 0x0064_ff9b_0000_0000_0000_0000;
    let word = |shift| word(addr, shift);
    let head = word(96);
    match head >> 16 {
        0x2001 if head == 0x2001_0000 => Kind6::Embedding(32, [word(64), !word(0)]),
        0x2002 => Kind6::Embedding(16, [word(80); 2]),
        0x2000..=0x3fff => Kind6::Internet,
        0x0064 if addr >> 32 == NAT64 => Kind6::Embedding(96, [word(0); 2]),
        // Loopback, unspecified, IPv4-mapped and -compatible, local NAT64.
        0x0000..=0x00ff | 0xff00..=0xffff => Kind6::Other(8),
        0xfe80..=0xfebf => Kind6::Other(10),
        0xfc00..=0xfdff => Kind6::Other(7),
        // Not assigned, or of old.
        _ => Kind6::Other(3),
    }
}

/// Whether an allowed prefix opens something: it does if it lies inside a range that is not the internet. A shorter one
/// such as `0.0.0.0/0` does not open all of them by the way.
fn opens(net: &IpNet) -> bool {
    let range = match net {
        IpNet::V4(net) => not_internet4(net.network().to_bits()),
        IpNet::V6(net) => match kind6(net.network().to_bits()) {
            Kind6::Internet => None,
            Kind6::Other(length) | Kind6::Embedding(length, _) => Some(length),
        },
    };
    range.is_some_and(|length| net.prefix_len() >= length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn rule(text: &str) -> DenyRule {
        text.parse().unwrap()
    }

    /// A packet to `destination` of a protocol and to a port.
    fn packet(destination: IpAddr, protocol: u8, port: u16) -> Vec<u8> {
        let mut packet = vec![0_u8; if destination.is_ipv4() { 20 } else { 40 }];
        match destination {
            IpAddr::V4(addr) => {
                packet[0] = 0x45;
                packet[3] = 28;
                packet[9] = protocol;
                packet[16..].copy_from_slice(&addr.octets());
            }
            IpAddr::V6(addr) => {
                packet[0] = 0x60;
                packet[5] = 8;
                packet[6] = protocol;
                packet[24..].copy_from_slice(&addr.octets());
            }
        }
        packet.extend_from_slice(&[0x9c, 0x40]);
        packet.extend_from_slice(&port.to_be_bytes());
        packet.extend_from_slice(&[0; 4]);
        packet
    }

    fn judge(rules: &Destinations, hosts: &Hosts, destination: &str, protocol: u8, port: u16) -> Result<(), Forbidden> {
        let destination = destination.parse().unwrap();
        rules.check(hosts, &packet(destination, protocol, port), destination)
    }

    fn udp(rules: &Destinations, destination: &str) -> Result<(), Forbidden> {
        judge(rules, &Hosts::default(), destination, transport::UDP, 53)
    }

    const DENIED: [&str; 40] = [
        "0.0.0.0",
        "0.255.255.255",
        "10.0.0.0",
        "10.255.255.255",
        "100.64.0.0",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.255",
        "169.254.0.0",
        "169.254.169.254",
        "172.16.0.0",
        "172.31.255.255",
        "192.0.0.0",
        "192.0.0.255",
        "192.168.0.0",
        "192.168.255.255",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:192.0.2.1",
        "::192.0.2.1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",
        "2002:a00:1::1",
        "2002:7f00:1::1",
        "2001:0:a00:1::1",
        "2001:0:c000:201:0:0:f5ff:fffe",
        "100::1",
        "4000::1",
    ];

    const OPEN: [&str; 25] = [
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.1",
        "169.253.255.255",
        "169.255.0.0",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.0",
        "192.0.2.1",
        "192.167.0.1",
        "192.169.0.1",
        "198.18.0.1",
        "198.51.100.10",
        "203.0.113.9",
        "223.255.255.255",
        "2001:db8::1",
        "2000::1",
        "3fff::1",
        "64:ff9b::192.0.2.1",
        "2002:c000:201::1",
        "2001:0:c000:201:0:0:3fff:fdfe",
    ];

    #[test]
    fn by_default_the_internet_is_open_and_nothing_else() {
        let rules = Destinations::default();
        for denied in DENIED {
            assert_eq!(udp(&rules, denied), Err(Forbidden::Destination), "{denied}");
        }
        for open in OPEN {
            assert_eq!(udp(&rules, open), Ok(()), "{open}");
        }
    }

    #[test]
    fn smtp_is_closed_by_default_in_both_families_and_can_be_opened() {
        let hosts = Hosts::default();
        for destination in ["192.0.2.1", "2001:db8::1", "64:ff9b::192.0.2.1"] {
            let closed = Destinations::default();
            assert_eq!(judge(&closed, &hosts, destination, transport::TCP, 25), Err(Forbidden::Port));
            for (protocol, port) in [(transport::TCP, 24), (transport::TCP, 465), (transport::TCP, 587), (17, 25)] {
                assert_eq!(judge(&closed, &hosts, destination, protocol, port), Ok(()));
            }
            let open = Destinations::new(true, &[], &[]);
            assert_eq!(judge(&open, &hosts, destination, transport::TCP, 25), Ok(()));
        }
    }

    #[test]
    fn an_allowed_prefix_opens_what_lies_inside_a_closed_range() {
        let rules = Destinations::new(false, &[net("10.0.0.0/8"), net("fd00:1::/32"), net("192.168.7.0/24")], &[]);
        for open in ["10.1.2.3", "192.168.7.9", "fd00:1::1", "64:ff9b::10.1.2.3"] {
            assert_eq!(udp(&rules, open), Ok(()), "{open}");
        }
        for closed in ["192.168.8.1", "fd00:2::1", "169.254.169.254", "127.0.0.1"] {
            assert_eq!(udp(&rules, closed), Err(Forbidden::Destination), "{closed}");
        }
        let everything = Destinations::new(false, &[net("0.0.0.0/0"), net("::/0"), net("8.0.0.0/6")], &[]);
        for closed in DENIED {
            assert_eq!(udp(&everything, closed), Err(Forbidden::Destination), "{closed}: too wide to be meant");
        }
    }

    #[test]
    fn what_a_tenant_denies_is_closed_even_where_it_allows() {
        let denied = [rule("10.9.0.0/16"), rule("198.51.100.0/24"), rule("2001:db8:bad::/48")];
        let rules = Destinations::new(false, &[net("10.0.0.0/8")], &denied);
        for closed in ["10.9.1.1", "198.51.100.1", "2001:db8:bad::1", "64:ff9b::198.51.100.1"] {
            assert_eq!(udp(&rules, closed), Err(Forbidden::Destination), "{closed}");
        }
        for open in ["10.8.1.1", "198.51.101.1", "2001:db8::1"] {
            assert_eq!(udp(&rules, open), Ok(()), "{open}");
        }
    }

    #[test]
    fn the_server_itself_is_closed_even_where_the_tenant_allows() {
        let mut hosts = Hosts::default();
        for address in ["192.0.2.1", "10.0.0.5", "2001:db8::5"] {
            assert!(hosts.add(address.parse().unwrap()));
        }
        let rules = Destinations::new(false, &[net("10.0.0.0/8")], &[]);
        for closed in ["192.0.2.1", "10.0.0.5", "2001:db8::5", "64:ff9b::192.0.2.1", "2002:a00:5::1"] {
            assert_eq!(judge(&rules, &hosts, closed, 17, 53), Err(Forbidden::Destination), "{closed}");
        }
        assert_eq!(judge(&rules, &hosts, "10.0.0.6", 17, 53), Ok(()));
        let many = (0..300).filter(|last| hosts.add(Ipv4Addr::from_bits(0xc633_6400 + last).into())).count();
        assert_eq!((many, hosts.listed().len()), (MAX_RULES - 3, MAX_RULES));
    }

    #[test]
    fn rules_with_ports_close_these_and_no_others() {
        let denied = [rule("0.0.0.0/0 udp 6881-6999"), rule("2001:db8::/32 tcp 22"), rule("203.0.113.0/24 icmp")];
        let rules = Destinations::new(true, &[], &denied);
        let hosts = Hosts::default();
        for (destination, protocol, port) in
            [("192.0.2.1", 17, 6881), ("64:ff9b::192.0.2.1", 17, 6999), ("2001:db8::1", 6, 22), ("203.0.113.1", 1, 0)]
        {
            let verdict = judge(&rules, &hosts, destination, protocol, port);
            assert_eq!(verdict, Err(Forbidden::Port), "{destination} {protocol} {port}");
        }
        for (destination, protocol, port) in
            [("192.0.2.1", 17, 6880), ("192.0.2.1", 6, 6881), ("2001:db9::1", 6, 22), ("203.0.114.1", 1, 0)]
        {
            assert_eq!(judge(&rules, &hosts, destination, protocol, port), Ok(()), "{destination} {protocol} {port}");
        }
    }

    /// The same decision, written down range by range.
    fn naive(allowed: &[IpNet], denied: &[IpNet], addr: Ipv4Addr) -> bool {
        let ranges = [
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.168.0.0/16",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ];
        let addr = IpAddr::from(addr);
        let range = ranges.iter().map(|range| net(range)).find(|range| range.contains(&addr));
        let opened = |range: IpNet| allowed.iter().any(|net| range.contains(net) && net.contains(&addr));
        !denied.iter().any(|net| net.contains(&addr)) && range.is_none_or(opened)
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_list_of_ranges(
            allowed in proptest::collection::vec((any::<u32>(), 0_u8..=32), 0..20),
            denied in proptest::collection::vec((any::<u32>(), 0_u8..=32), 0..20),
            addrs in proptest::collection::vec(any::<u32>(), 1..50),
            near in any::<bool>(),
        ) {
            // Few first bytes, so that prefixes, ranges and addresses meet.
            let squeeze = |bits: u32| if near {
                u32::from_be_bytes([[0, 10, 100, 169, 172, 192, 224, 255][bits as usize >> 29], bits.to_be_bytes()[1], 0, 1])
            } else { bits };
            let nets = |list: Vec<(u32, u8)>| -> Vec<IpNet> {
                let net = |(bits, length)| IpNet::new(Ipv4Addr::from_bits(squeeze(bits)).into(), length).unwrap().trunc();
                list.into_iter().map(net).collect()
            };
            let (allowed, denied) = (nets(allowed), nets(denied));
            let whole: Vec<_> = denied.iter().map(|net| DenyRule { net: *net, protocol: None, ports: None }).collect();
            let rules = Destinations::new(false, &allowed, &whole);
            for bits in addrs {
                let addr = Ipv4Addr::from_bits(squeeze(bits));
                prop_assert_eq!(rules.open4(&Hosts::default(), addr.to_bits()), naive(&allowed, &denied, addr), "{}", addr);
            }
        }
    }
}
