//! Where a connection comes from, as far as it can be told apart: what throttles and caps are counted by.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// An IPv4 address, or the /64 of an IPv6 address: whoever has one address of a /64 has them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network(IpAddr);

impl From<Network> for ipnet::IpNet {
    fn from(network: Network) -> Self {
        let length = if network.0.is_ipv4() { 32 } else { 64 };
        Self::new_assert(network.0, length)
    }
}

impl Network {
    #[must_use]
    pub fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V4(ip) => IpAddr::V4(ip),
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
        })
    }
}

/// Places that each network may take a few of. Bounded by what is taken: a network without one is forgotten.
#[derive(Debug, Clone)]
pub struct Places {
    taken: Arc<Mutex<HashMap<Network, u32>>>,
    each: u32,
}

/// A place that is taken until this is dropped.
#[derive(Debug)]
pub struct Place {
    taken: Arc<Mutex<HashMap<Network, u32>>>,
    network: Network,
}

impl Places {
    /// `each` places for each network.
    #[must_use]
    pub fn new(each: u32) -> Self {
        Self { taken: Arc::default(), each }
    }

    /// `None` when the network has all of its places.
    #[must_use]
    pub fn take(&self, network: Network) -> Option<Place> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(network).or_default();
        if *count >= self.each {
            return None;
        }
        *count += 1;
        Some(Place { taken: Arc::clone(&self.taken), network })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Network {
        Network::of(text.parse().unwrap())
    }

    #[test]
    fn a_slash_64_is_one_network_and_a_mapped_address_is_its_ipv4_address() {
        assert_eq!(network("2001:db8:1:2::1"), network("2001:db8:1:2:ffff::1"));
        assert_ne!(network("2001:db8:1:2::1"), network("2001:db8:1:3::1"));
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
        assert_ne!(network("192.0.2.1"), network("192.0.2.2"));
    }

    #[test]
    fn a_network_gets_its_places_and_gives_them_back() {
        let places = Places::new(2);
        let (first, _second) = (places.take(network("192.0.2.1")).unwrap(), places.take(network("192.0.2.1")).unwrap());
        assert!(places.take(network("192.0.2.1")).is_none());
        let other = places.take(network("192.0.2.2")).unwrap();
        drop((first, other));
        assert!(places.take(network("192.0.2.1")).is_some());
        assert_eq!(places.taken.lock().unwrap().len(), 1, "nothing is kept of who left");
    }
}
