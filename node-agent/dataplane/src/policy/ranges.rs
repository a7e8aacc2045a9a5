//! Sets of addresses, made of prefixes when they are set and asked for each packet.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    pub(super) v4: Sorted<u32>,
    pub(super) v6: Sorted<u128>,
}

impl Ranges {
    pub(super) fn of(nets: impl Iterator<Item = IpNet>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for net in nets {
            match net {
                IpNet::V4(net) => v4.push(ends4(net)),
                IpNet::V6(net) => v6.push(ends6(net)),
            }
        }
        Self { v4: Sorted::of(v4), v6: Sorted::of(v6) }
    }
}

fn ends4(net: Ipv4Net) -> (u32, u32) {
    (net.network().to_bits(), net.broadcast().to_bits())
}

fn ends6(net: Ipv6Net) -> (u128, u128) {
    (net.network().to_bits(), net.broadcast().to_bits())
}

/// Disjoint ranges in order, first and last included.
#[derive(Clone, Debug, Default)]
pub(super) struct Sorted<T> {
    ranges: Box<[(T, T)]>,
    /// One bit for each block of addresses that a range touches: most others are told apart by one look.
    blocks: Box<[u64]>,
}

const BLOCKS: u32 = 4096;

pub(super) trait Address: Ord + Copy {
    /// The /12 of an IPv4 address; of an IPv6 address its /32, modulo [`BLOCKS`].
    fn block(self) -> u32;
}

impl Address for u32 {
    fn block(self) -> u32 {
        self >> 20
    }
}

impl Address for u128 {
    fn block(self) -> u32 {
        u32::try_from(self >> 96).expect("the upper 32 bits")
    }
}

impl<T: Address> Sorted<T> {
    /// Prefixes nest or are disjoint: only those inside another are left out.
    fn of(mut ranges: Vec<(T, T)>) -> Self {
        ranges.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        ranges.dedup_by(|inner, outer| inner.1 <= outer.1);
        let mut blocks = vec![0_u64; if ranges.is_empty() { 0 } else { BLOCKS as usize / 64 }];
        for (first, last) in &ranges {
            let (first, last) = (first.block(), last.block());
            for block in first..=last.min(first.saturating_add(BLOCKS - 1)) {
                blocks[(block % BLOCKS) as usize / 64] |= 1 << (block % 64);
            }
        }
        Self { ranges: ranges.into(), blocks: blocks.into() }
    }

    #[inline]
    pub(super) fn contain(&self, value: T) -> bool {
        let block = value.block() % BLOCKS;
        match self.blocks.get(block as usize / 64) {
            Some(bits) if bits >> (block % 64) & 1 != 0 => self.search(value),
            Some(_) | None => false,
        }
    }

    fn search(&self, value: T) -> bool {
        let after = self.ranges.partition_point(|(first, _)| *first <= value);
        after > 0 && value <= self.ranges[after - 1].1
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ranges_of_ipv6_agree_with_their_prefixes(
            nets in proptest::collection::vec((any::<u64>(), 0_u8..=128), 0..30),
            addrs in proptest::collection::vec(any::<u64>(), 1..50),
        ) {
            // Few values in every part of the address.
            let squeeze = |bits: u64| {
                let spread = u128::from(bits & 3) << 126 | u128::from(bits >> 2 & 7) << 107 | u128::from(bits >> 5 & 3) << 94;
                spread | u128::from(bits >> 7 & 3)
            };
            let nets: Vec<_> = nets
                .into_iter()
                .map(|(bits, length)| IpNet::new(Ipv6Addr::from_bits(squeeze(bits)).into(), length).unwrap())
                .collect();
            let ranges = Ranges::of(nets.iter().copied());
            for bits in addrs {
                let addr = Ipv6Addr::from_bits(squeeze(bits));
                let expected = nets.iter().any(|net| net.contains(&IpAddr::from(addr)));
                prop_assert_eq!(ranges.v6.contain(addr.to_bits()), expected, "{}", addr);
            }
        }
    }
}
