//! Allowed-ips of all peers: a hash map for single addresses, and longest-prefix match over the few lengths in use.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use foldhash::{HashMap, HashMapExt};
use ipnet::IpNet;

/// Who owns a prefix. A prefix has one owner; adding it for another peer moves it, as in every WireGuard.
#[derive(Debug, Default)]
pub(crate) struct AllowedIps {
    /// Apart, because the small entries of the first are what every packet's cache misses are made of.
    hosts4: HashMap<Ipv4Addr, u16>,
    hosts6: HashMap<Ipv6Addr, u16>,
    nets: HashMap<IpNet, u16>,
    lengths4: Lengths,
    lengths6: Lengths,
}

impl AllowedIps {
    /// With room for so many addresses of each family. A table of 65,000 that has to grow stops everything for
    /// milliseconds; room that is not used takes no memory.
    pub(crate) fn with_room(hosts: usize) -> Self {
        let (hosts4, hosts6) = (HashMap::with_capacity(hosts), HashMap::with_capacity(hosts));
        Self { hosts4, hosts6, ..Self::default() }
    }

    /// Gives the prefix to `slot` and returns its former owner, which may be the same.
    pub(crate) fn insert(&mut self, net: IpNet, slot: u16) -> Option<u16> {
        let net = net.trunc();
        match net.addr() {
            IpAddr::V4(addr) if is_host(net) => self.hosts4.insert(addr, slot),
            IpAddr::V6(addr) if is_host(net) => self.hosts6.insert(addr, slot),
            IpAddr::V4(_) | IpAddr::V6(_) => {
                let former = self.nets.insert(net, slot);
                if former.is_none() {
                    self.lengths(net).add(net.prefix_len());
                }
                former
            }
        }
    }

    /// Takes the prefix away if `slot` owns it.
    pub(crate) fn remove(&mut self, net: IpNet, slot: u16) {
        let net = net.trunc();
        if is_host(net) {
            if self.host(net.addr()) == Some(slot) {
                match net.addr() {
                    IpAddr::V4(addr) => self.hosts4.remove(&addr),
                    IpAddr::V6(addr) => self.hosts6.remove(&addr),
                };
            }
        } else if self.nets.get(&net) == Some(&slot) {
            self.nets.remove(&net);
            self.lengths(net).take(net.prefix_len());
        }
    }

    /// The owner of exactly this prefix.
    pub(crate) fn owner(&self, net: IpNet) -> Option<u16> {
        if is_host(net) { self.host(net.addr()) } else { self.nets.get(&net).copied() }
    }

    /// The owner of exactly this address.
    pub(crate) fn host(&self, addr: IpAddr) -> Option<u16> {
        match addr {
            IpAddr::V4(addr) => self.hosts4.get(&addr).copied(),
            IpAddr::V6(addr) => self.hosts6.get(&addr).copied(),
        }
    }

    /// The owner of the longest prefix that contains the address.
    pub(crate) fn find(&self, addr: IpAddr) -> Option<u16> {
        if let Some(slot) = self.host(addr) {
            return Some(slot);
        }
        let lengths = if addr.is_ipv4() { &self.lengths4 } else { &self.lengths6 };
        lengths.0.iter().find_map(|(length, _)| {
            let net = IpNet::new(addr, *length).ok()?.trunc();
            self.nets.get(&net).copied()
        })
    }

    fn lengths(&mut self, net: IpNet) -> &mut Lengths {
        match net {
            IpNet::V4(_) => &mut self.lengths4,
            IpNet::V6(_) => &mut self.lengths6,
        }
    }
}

/// The prefix lengths in use with how many prefixes have them, longest first.
#[derive(Debug, Default)]
struct Lengths(Vec<(u8, usize)>);

impl Lengths {
    fn add(&mut self, length: u8) {
        match self.0.binary_search_by(|(l, _)| length.cmp(l)) {
            Ok(at) => self.0[at].1 += 1,
            Err(at) => self.0.insert(at, (length, 1)),
        }
    }

    fn take(&mut self, length: u8) {
        if let Ok(at) = self.0.binary_search_by(|(l, _)| length.cmp(l)) {
            self.0[at].1 -= 1;
            if self.0[at].1 == 0 {
                self.0.remove(at);
            }
        }
    }
}

pub(crate) fn is_host(net: IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn the_longest_prefix_wins_and_prefixes_move() {
        let mut table = AllowedIps::default();
        assert_eq!(table.insert(net("0.0.0.0/0"), 1), None);
        assert_eq!(table.insert(net("10.0.0.0/8"), 2), None);
        assert_eq!(table.insert(net("10.1.2.3/32"), 3), None);
        assert_eq!(table.find("10.1.2.3".parse().unwrap()), Some(3));
        assert_eq!(table.find("10.1.2.4".parse().unwrap()), Some(2));
        assert_eq!(table.find("192.0.2.1".parse().unwrap()), Some(1));
        assert_eq!(table.find("2001:db8::1".parse().unwrap()), None);
        assert_eq!(table.insert(net("10.0.0.0/8"), 4), Some(2));
        table.remove(net("10.0.0.0/8"), 2);
        assert_eq!(table.find("10.1.2.4".parse().unwrap()), Some(4), "only the owner can take it away");
        table.remove(net("10.0.0.0/8"), 4);
        assert_eq!(table.find("10.1.2.4".parse().unwrap()), Some(1));
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_linear_search(
            nets in proptest::collection::vec((any::<u32>(), 0_u8..=32, 0_u16..8, any::<bool>()), 0..40),
            addrs in proptest::collection::vec(any::<u32>(), 0..40),
        ) {
            let mut table = AllowedIps::default();
            let mut naive: HashMap<IpNet, u16> = HashMap::new();
            for (bits, length, slot, remove) in nets {
                // Few distinct high bits, so that prefixes nest.
                let net = IpNet::new(Ipv4Addr::from(bits & 0x0303_0303).into(), length).unwrap().trunc();
                if remove && naive.get(&net) == Some(&slot) {
                    naive.remove(&net);
                    table.remove(net, slot);
                } else {
                    table.insert(net, slot);
                    naive.insert(net, slot);
                }
            }
            for bits in addrs {
                let addr = IpAddr::from(Ipv4Addr::from(bits & 0x0303_0303));
                let best = naive.iter().filter(|(n, _)| n.contains(&addr)).max_by_key(|(n, _)| n.prefix_len());
                prop_assert_eq!(table.find(addr), best.map(|(_, s)| *s));
            }
        }
    }
}
