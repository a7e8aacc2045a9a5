//! Quota leases: a peer may transfer until its counters reach a total, and what happens then.
//!
//! The lease is a cumulative value of the counters (inner bytes, both directions together), not an amount: telling it
//! twice grants nothing twice, and after a restart the counters in the file say what is left. The check runs before the
//! shell reports what it really carried, so packets under way are counted here; what was lost on the way is given back
//! after a second without traffic, when nothing can be under way any more.

use super::gcra::{BURSTS_PER_SECOND, Bucket, Conforming, Rate};
use super::{Clock, Direction};

/// Nothing stays between the check and the counters for so long.
const UNDER_WAY_NS: u64 = 1_000_000_000;
/// One packet of any size, so that none is held up for good.
const THROTTLED_BURST_BYTES: u64 = 64 * 1024;

/// What happens to packets beyond the lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Then {
    /// They are dropped.
    #[default]
    Block,
    /// They pass at this many bits a second in each direction; never 0.
    Throttle(u64),
}

/// A lease and what was used of it.
#[derive(Clone, Debug)]
pub struct Lease {
    until: u64,
    used: u64,
    last_ns: u64,
    then: Then,
    throttled: [Option<Bucket>; 2],
}

/// A packet within the lease or the throttle, not charged yet.
#[derive(Clone, Copy, Debug)]
pub enum Covered {
    /// The lease has room for it.
    Within,
    /// It passes all the same, slowly.
    Throttled(Conforming),
}

impl Lease {
    /// Up to `until` bytes in total, of which `total` are used.
    #[must_use]
    pub fn new(until: u64, then: Then, total: u64) -> Self {
        Self { until, used: total, last_ns: 0, then, throttled: [None; 2] }
    }

    /// The total at which it ends.
    #[must_use]
    pub fn until(&self) -> u64 {
        self.until
    }

    /// Replaces the end; what is under way stays counted.
    pub fn renew(&mut self, until: u64, then: Then) {
        self.until = until;
        if self.then != then {
            self.throttled = [None; 2];
        }
        self.then = then;
    }

    /// Whether a packet may pass. `total` reads the peer's counters.
    #[must_use]
    #[inline]
    pub fn check(
        &mut self,
        now: Clock,
        direction: Direction,
        bytes: usize,
        total: impl FnOnce() -> u64,
    ) -> Option<Covered> {
        if self.covers(bytes) {
            return Some(Covered::Within);
        }
        self.beyond(now, direction, bytes, total)
    }

    #[cold]
    fn beyond(
        &mut self,
        now: Clock,
        direction: Direction,
        bytes: usize,
        total: impl FnOnce() -> u64,
    ) -> Option<Covered> {
        if now.0.saturating_sub(self.last_ns) >= UNDER_WAY_NS {
            self.used = total();
            if self.covers(bytes) {
                return Some(Covered::Within);
            }
        }
        let Then::Throttle(bits) = self.then else {
            return None;
        };
        let rate = Rate::with_burst(bits, THROTTLED_BURST_BYTES.max(bits / 8 / BURSTS_PER_SECOND))?;
        // The quota was the burst: the throttle begins without any.
        let bucket = self.throttled[direction as usize].get_or_insert_with(|| Bucket::empty(rate, now.0));
        bucket.check(rate, now.0, bytes).map(Covered::Throttled)
    }

    /// Charges a packet that was checked.
    #[inline]
    pub fn charge(&mut self, now: Clock, direction: Direction, bytes: usize, covered: Covered) {
        self.used = self.used.saturating_add(bytes as u64);
        self.last_ns = now.0;
        if let (Covered::Throttled(packet), Some(bucket)) = (covered, &mut self.throttled[direction as usize]) {
            bucket.charge(packet);
        }
    }

    fn covers(&self, bytes: usize) -> bool {
        self.used.saturating_add(bytes as u64) <= self.until
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Clock = Clock(1_000_000_000);

    /// Offers one packet; what passes is in the counters at once.
    fn offer(lease: &mut Lease, now: Clock, bytes: usize, total: &mut u64) -> bool {
        let Some(covered) = lease.check(now, Direction::Up, bytes, || *total) else {
            return false;
        };
        lease.charge(now, Direction::Up, bytes, covered);
        *total += bytes as u64;
        true
    }

    #[test]
    fn it_ends_to_the_byte_and_goes_on_when_renewed() {
        let (mut lease, mut total) = (Lease::new(3000, Then::Block, 1000), 1000);
        assert!(offer(&mut lease, SECOND, 1999, &mut total));
        assert!(!offer(&mut lease, SECOND, 2, &mut total));
        assert!(offer(&mut lease, SECOND, 1, &mut total));
        assert!(!offer(&mut lease, SECOND, 1, &mut total));
        lease.renew(3000, Then::Block);
        assert!(!offer(&mut lease, SECOND, 1, &mut total), "telling it again grants nothing");
        lease.renew(4000, Then::Block);
        assert!(offer(&mut lease, SECOND, 1000, &mut total));
        assert!(!offer(&mut lease, SECOND, 1, &mut total));
        assert_eq!(total, 4000);
    }

    #[test]
    fn what_was_lost_on_the_way_is_given_back_once_nothing_is_under_way() {
        let mut lease = Lease::new(1000, Then::Block, 0);
        let covered = lease.check(SECOND, Direction::Up, 1000, || 0).unwrap();
        lease.charge(SECOND, Direction::Up, 1000, covered);
        assert!(lease.check(Clock(1_999_999_999), Direction::Up, 1, || 600).is_none());
        assert!(lease.check(Clock(2_000_000_000), Direction::Up, 401, || 600).is_none());
        assert!(lease.check(Clock(2_000_000_000), Direction::Up, 400, || 600).is_some());
    }

    #[test]
    fn a_throttle_begins_at_its_rate_without_a_burst() {
        let (mut lease, mut total) = (Lease::new(0, Then::Throttle(64_000), 0), 0);
        for ms in 1..=10_000 {
            offer(&mut lease, Clock(ms * 1_000_000), 100, &mut total);
        }
        assert!((79_800..=80_000).contains(&total), "8,000 bytes a second for ten seconds: {total}");
    }

    proptest! {
        #[test]
        fn never_a_byte_over(
            until in 0_u64..100_000,
            packets in proptest::collection::vec((0_u64..3_000_000_000, 1_usize..3000, any::<bool>()), 1..200),
        ) {
            let (mut lease, mut total, mut now) = (Lease::new(until, Then::Block, 0), 0, 0);
            for (pause, bytes, lost) in packets {
                now += pause;
                let before = total;
                if offer(&mut lease, Clock(now), bytes, &mut total) && lost {
                    total = before;
                }
                prop_assert!(total <= until);
            }
            // After a pause exactly the rest fits.
            let rest = usize::try_from(until - total).unwrap();
            now += 2_000_000_000;
            prop_assert!(!offer(&mut lease, Clock(now), rest + 1, &mut total));
            prop_assert!(offer(&mut lease, Clock(now), rest, &mut total));
        }
    }
}
