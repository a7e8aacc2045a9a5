//! Rate limits by the generic cell rate algorithm (ITU-T I.371): a token bucket whose whole state is one point in time.
//!
//! The state is the time at which the bucket would be full again. A packet moves it on by its own transmission time and
//! conforms if that leaves it no further ahead of now than the burst. No timers, no refills, and 64 bits that several
//! workers can share by compare-and-swap. A packet that does not conform is not charged.

use std::sync::atomic::{AtomicU64, Ordering};

/// Times are in sixteenths of a nanosecond: precise for 64 bytes at 100 Gbit/s, and 36 years fit into 64 bits.
const UNITS_PER_NS: u64 = 16;
/// Binary digits of [`Rate::cost`] below one unit.
const FRACTION: u32 = 24;
/// Four super-packets of 64 KiB: with less, a single TCP flow starves.
const MIN_BURST_BYTES: u64 = 4 * 64 * 1024;
/// The burst is at least what the rate gives in a quarter of a second. After losses TCP is silent for its least
/// retransmission timeout, 200 ms; a bucket that is full earlier wastes the rest. One flow used 51 % of a rate with a tenth
/// of a second, and 98 % with a quarter.
pub(super) const BURSTS_PER_SECOND: u64 = 4;

/// A rate with the burst it tolerates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Time units per byte, times 2^[`FRACTION`].
    cost: u64,
    /// How far ahead of now the bucket may be, in time units.
    burst: u64,
}

impl Rate {
    /// The rate with the burst of a rate limit; 0 is no limit.
    #[must_use]
    pub fn bits_per_second(bits: u64) -> Option<Self> {
        Self::with_burst(bits, MIN_BURST_BYTES.max(bits / 8 / BURSTS_PER_SECOND))
    }

    /// The rate with a burst of so many bytes. Larger packets never conform.
    #[must_use]
    pub fn with_burst(bits: u64, burst_bytes: u64) -> Option<Self> {
        const BITS_OF_A_SECOND: u64 = (8 * UNITS_PER_NS * 1_000_000_000) << FRACTION;
        let cost = BITS_OF_A_SECOND.checked_div(bits)?;
        let rate = Self { cost, burst: 0 };
        Some(Self { burst: rate.time(burst_bytes), ..rate })
    }

    /// The state of an empty bucket.
    fn empty_at(self, now_ns: u64) -> u64 {
        now_ns.wrapping_mul(UNITS_PER_NS).saturating_add(self.burst)
    }

    /// How long so many bytes take, in units.
    #[inline]
    fn time(self, bytes: u64) -> u64 {
        u64::try_from((u128::from(bytes) * u128::from(self.cost)) >> FRACTION).unwrap_or(u64::MAX)
    }

    /// The state after a packet that conforms.
    #[inline]
    fn next(self, full_at: u64, now_ns: u64, bytes: usize) -> Option<u64> {
        let now = now_ns.wrapping_mul(UNITS_PER_NS);
        let ahead = full_at.saturating_sub(now).saturating_add(self.time(bytes as u64));
        (ahead <= self.burst).then(|| now.saturating_add(ahead))
    }
}

/// The state of one limit, owned by one worker. It begins with a full burst.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    full_at: u64,
}

/// A packet that conforms, not charged yet.
#[derive(Clone, Copy, Debug)]
pub struct Conforming {
    full_at: u64,
}

impl Bucket {
    /// A bucket without any credit.
    #[must_use]
    pub fn empty(rate: Rate, now_ns: u64) -> Self {
        Self { full_at: rate.empty_at(now_ns) }
    }

    /// To be called when the rate was changed: what a slower one charged would take a faster one very long to work off.
    pub fn refit(&mut self, rate: Rate, now_ns: u64) {
        self.full_at = self.full_at.min(rate.empty_at(now_ns));
    }

    /// Whether a packet conforms; it is charged by [`Self::charge`].
    #[must_use]
    #[inline]
    pub fn check(self, rate: Rate, now_ns: u64, bytes: usize) -> Option<Conforming> {
        rate.next(self.full_at, now_ns, bytes).map(|full_at| Conforming { full_at })
    }

    /// Charges a packet that was checked.
    #[inline]
    pub fn charge(&mut self, packet: Conforming) {
        self.full_at = packet.full_at;
    }

    /// Checks and charges.
    pub fn take(&mut self, rate: Rate, now_ns: u64, bytes: usize) -> bool {
        self.check(rate, now_ns, bytes).map(|packet| self.charge(packet)).is_some()
    }
}

/// The state of one limit that several workers share. Exact: each packet is charged once, whoever carries it.
#[derive(Debug, Default)]
pub struct SharedBucket {
    full_at: AtomicU64,
}

impl SharedBucket {
    /// Checks and charges when nobody else does at the same time: without the price of a locked instruction.
    #[inline]
    pub fn take_alone(&self, rate: Rate, now_ns: u64, bytes: usize) -> bool {
        let Some(full_at) = rate.next(self.full_at.load(Ordering::Relaxed), now_ns, bytes) else {
            return false;
        };
        self.full_at.store(full_at, Ordering::Relaxed);
        true
    }

    /// Checks and charges. The workers' clocks must have the same zero.
    #[inline]
    pub fn take(&self, rate: Rate, now_ns: u64, bytes: usize) -> bool {
        let next = |full_at| rate.next(full_at, now_ns, bytes);
        self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }

    /// As [`Bucket::refit`].
    pub fn refit(&self, rate: Rate, now_ns: u64) {
        self.full_at.fetch_min(rate.empty_at(now_ns), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    /// The textbook: tokens that drip in with time.
    struct TokenBucket {
        bytes_per_ns: f64,
        capacity: f64,
        tokens: f64,
        at_ns: u64,
    }

    impl TokenBucket {
        fn new(bits: u64, capacity: u64) -> Self {
            let capacity = capacity as f64;
            Self { bytes_per_ns: bits as f64 / 8e9, capacity, tokens: capacity, at_ns: 0 }
        }

        fn take(&mut self, now_ns: u64, bytes: usize) -> (bool, f64) {
            let dripped = (now_ns - self.at_ns) as f64 * self.bytes_per_ns;
            self.tokens = (self.tokens + dripped).min(self.capacity);
            self.at_ns = now_ns;
            let left = self.tokens - bytes as f64;
            if left >= 0.0 {
                self.tokens = left;
            }
            (left >= 0.0, left)
        }
    }

    /// 64 kbit/s times 2^`doublings` to 10 Gbit/s, evenly in the exponent.
    fn rates(doublings: u32) -> impl Strategy<Value = u64> {
        let rate = |(doublings, more): (u32, u64)| ((64_000 + more) << doublings).min(10_000_000_000);
        (doublings..=17, 0_u64..64_000).prop_map(rate)
    }

    fn burst_of(bits: u64) -> u64 {
        MIN_BURST_BYTES.max(bits / 8 / BURSTS_PER_SECOND)
    }

    /// Offers more than the rate at irregular times for `seconds` after the burst is spent; bytes passed and the longest
    /// packet.
    fn overload(bits: u64, sizes: (usize, usize), seconds: u64, resolution_ns: u64, seed: u64) -> (f64, f64) {
        let rate = Rate::bits_per_second(bits).unwrap();
        let mut bucket = Bucket::empty(rate, 0);
        let (mut passed, mut now, mut random) = (0_u64, 0, seed | 1);
        let mut longest = 0;
        while now < seconds * SECOND_NS {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let bytes = sizes.0 + usize::try_from(random >> 20).unwrap() % (sizes.1 - sizes.0 + 1);
            // On average 1.5 to 2 times the rate.
            let pause = bytes as u64 * 8 * SECOND_NS / bits;
            now += (random % (pause + 1)).max(1);
            if bucket.take(rate, now / resolution_ns * resolution_ns, bytes) {
                passed += bytes as u64;
                longest = longest.max(bytes);
            }
        }
        (passed as f64, longest as f64)
    }

    #[test]
    fn a_rate_of_nothing_is_no_limit_and_extremes_do_not_overflow() {
        assert_eq!(Rate::bits_per_second(0), None);
        let slowest = Rate::bits_per_second(1).unwrap();
        let mut bucket = Bucket::default();
        assert!((0..4).all(|_| bucket.take(slowest, 0, 65_535)));
        assert!(!bucket.take(slowest, SECOND_NS, 65_535));
        let fastest = Rate::bits_per_second(u64::MAX).unwrap();
        assert!((0..1000).all(|_| bucket.take(fastest, u64::MAX / UNITS_PER_NS, 65_535)));
    }

    #[test]
    fn a_faster_rate_is_not_held_up_by_what_a_slower_one_charged() {
        let (slow, fast) = (Rate::bits_per_second(64_000).unwrap(), Rate::bits_per_second(1_000_000_000).unwrap());
        let mut bucket = Bucket::default();
        while bucket.take(slow, 0, 1400) {}
        bucket.refit(fast, 0);
        assert!(!bucket.take(fast, 0, 1400));
        assert!(bucket.take(fast, 1_000_000, 1400), "a millisecond later there is credit");
    }

    #[test]
    fn a_packet_that_does_not_conform_is_not_charged() {
        let rate = Rate::bits_per_second(8_000_000).unwrap();
        let mut bucket = Bucket::empty(rate, 0);
        for _ in 0..1000 {
            assert!(!bucket.take(rate, 1_000_000, 1001));
        }
        assert!(bucket.take(rate, 1_000_000, 1000), "a megabyte a second is a thousand bytes in a millisecond");
    }

    #[test]
    fn a_shared_bucket_passes_what_one_would_whoever_asks() {
        let rate = Rate::bits_per_second(80_000_000).unwrap();
        let shared = SharedBucket::default();
        let passed = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for now_us in 0..100_000 {
                        if shared.take(rate, now_us * 1000, 500) {
                            passed.fetch_add(500, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let most = burst_of(80_000_000) + 10_000_000 / 10;
        assert!(passed.load(Ordering::Relaxed) <= most);
        assert!(passed.load(Ordering::Relaxed) > burst_of(80_000_000) - 500);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn it_decides_as_a_token_bucket_does(
            bits in 64_000_u64..10_000_000_000,
            packets in proptest::collection::vec((0_u64..2_000_000_000, 64_usize..=65_535), 1..400),
            hurry in 0_u32..24,
        ) {
            let rate = Rate::bits_per_second(bits).unwrap();
            let mut bucket = Bucket::default();
            let mut model = TokenBucket::new(bits, burst_of(bits));
            let mut now = 0;
            for (pause, bytes) in packets {
                now += pause >> hurry;
                let (expected, left) = model.take(now, bytes);
                if left.abs() > 1.0 {
                    prop_assert_eq!(bucket.take(rate, now, bytes), expected, "{} bytes from the edge", left);
                } else if expected {
                    bucket.take(rate, now, bytes);
                }
            }
        }

        #[test]
        fn over_a_second_the_error_is_below_two_percent(
            bits in rates(0), smallest in 64_usize..1500, spread in 0_usize..1500, seed: u64,
            clock in prop_oneof![Just(1_u64), Just(1_000), Just(1_000_000)],
        ) {
            // The clock ticks in nanoseconds, microseconds or milliseconds.
            let (passed, longest) = overload(bits, (smallest, smallest + spread), 1, clock, seed);
            let expected = bits as f64 / 8.0;
            prop_assert!((passed - expected).abs() <= expected * 0.02 + longest, "{passed} of {expected}");
        }

        #[test]
        fn large_packets_are_limited_as_exactly(bits in rates(7), seed: u64) {
            let (passed, longest) = overload(bits, (1500, 65_535), 1, 1, seed);
            let expected = bits as f64 / 8.0;
            prop_assert!((passed - expected).abs() <= expected * 0.02 + longest, "{passed} of {expected}");
        }
    }
}
