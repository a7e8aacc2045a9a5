//! A token bucket for each source of handshake messages. It is
//! asked under load only, about sources that proved themselves by a cookie: many clients may share one NAT address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};

/// Messages a second that one IPv4 address or one IPv6 /64 may send.
const RATE: u32 = 500;
/// How many may come at once.
const BURST: u32 = 1000;
/// Beyond this many sources the shared limiter alone protects us, which is weaker but bounded in memory.
const MAX_SOURCES: usize = 16_384;

#[derive(Debug, Default)]
pub(crate) struct SourceLimit {
    tokens: HashMap<IpAddr, u32>,
}

impl SourceLimit {
    /// Takes one token of the source; false when it has none left.
    pub(crate) fn admit(&mut self, source: IpAddr) -> bool {
        let key = network(source);
        if let Some(tokens) = self.tokens.get_mut(&key) {
            let left = tokens.checked_sub(1);
            *tokens = left.unwrap_or(0);
            return left.is_some();
        }
        if self.tokens.len() < MAX_SOURCES {
            self.tokens.insert(key, BURST - 1);
        }
        true
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Refills; called once a second. Full buckets are forgotten.
    pub(crate) fn refill(&mut self) {
        self.tokens.retain(|_, tokens| {
            *tokens += RATE;
            *tokens < BURST
        });
    }
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
}
