//! A token bucket for each source of handshake messages. It is
//! asked under load only, about sources that proved themselves by a cookie: many clients may share one NAT address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

/// Messages a second that one IPv4 address or one IPv6 /64 may send.
const RATE: u32 = 500;
/// How many may come at once.
const BURST: u32 = 1000;
/// Sources beyond this many share one bucket: whoever has many networks cannot make room for himself.
const MAX_SOURCES: usize = 16_384;

#[derive(Debug)]
pub(crate) struct SourceLimit {
    tokens: HashMap<IpAddr, u32>,
    /// Of all the sources that have none of their own.
    shared: u32,
}

impl Default for SourceLimit {
    fn default() -> Self {
        Self { tokens: HashMap::new(), shared: BURST }
    }
}

impl SourceLimit {
    /// Takes one token of the source; false when it has none left.
    pub(crate) fn admit(&mut self, source: IpAddr) -> bool {
        let key = network(source);
        if let Some(tokens) = self.tokens.get_mut(&key) {
            return take(tokens);
        }
        if self.tokens.len() < MAX_SOURCES {
            self.tokens.insert(key, BURST - 1);
            return true;
        }
        take(&mut self.shared)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Refills; called once a second. Full buckets are forgotten.
    pub(crate) fn refill(&mut self) {
        self.shared = (self.shared + RATE).min(BURST);
        self.tokens.retain(|_, tokens| {
            *tokens += RATE;
            *tokens < BURST
        });
    }
}

fn take(tokens: &mut u32) -> bool {
    let left = tokens.checked_sub(1);
    *tokens = left.unwrap_or(0);
    left.is_some()
}

fn network(source: IpAddr) -> IpAddr {
    match source {
        IpAddr::V4(_) => source,
        IpAddr::V6(addr) => IpAddr::V6(Ipv6Addr::from_bits(addr.to_bits() & (u128::MAX << 64))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_is_limited_and_another_is_not() {
        let mut limit = SourceLimit::default();
        let flooder: IpAddr = "2001:db8::1".parse().unwrap();
        let same_net: IpAddr = "2001:db8::ffff".parse().unwrap();
        assert_eq!((0..5000).filter(|_| limit.admit(flooder)).count(), BURST as usize);
        assert!(!limit.admit(same_net));
        assert!(limit.admit("192.0.2.1".parse().unwrap()));
        limit.refill();
        assert_eq!((0..5000).filter(|_| limit.admit(flooder)).count(), RATE as usize);
    }

    #[test]
    fn whoever_has_a_network_full_of_networks_shares_one_bucket_at_the_end() {
        let net = |number: u32| IpAddr::from(Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(number) << 64));
        let mut limit = SourceLimit::default();
        let regular: IpAddr = "192.0.2.1".parse().unwrap();
        assert!(limit.admit(regular));
        let admitted = (0..65_536).filter(|number| limit.admit(net(*number))).count();
        assert_eq!(admitted, MAX_SOURCES - 1 + BURST as usize);
        assert_eq!(limit.len(), MAX_SOURCES);
        assert!(limit.admit(regular), "who was there has a bucket");
    }
}
