//! What holds for one peer: its tenant, its limits, and what was dropped of it. 32 bytes while it has none of the last.

use super::gcra::{Bucket, Rate};
use super::lease::{Lease, Then};
use super::tenants::{TenantRef, Tenants};
use super::{Clock, Direction};
use crate::drops::Drop;

/// Limits as they were set. 0 is no rate limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerLimits {
    /// From the peer, bits a second.
    pub rate_up: u64,
    /// To the peer, bits a second.
    pub rate_down: u64,
    /// The inner bytes of both directions together at which the peer's lease ends.
    pub lease: Option<u64>,
    /// What happens then.
    pub then: Then,
}

/// Changes of the limits. `None` leaves a field as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerLimitsChange {
    /// See [`PeerLimits::rate_up`].
    pub rate_up: Option<u64>,
    /// See [`PeerLimits::rate_down`].
    pub rate_down: Option<u64>,
    /// See [`PeerLimits::lease`]; `Some(None)` takes it away.
    pub lease: Option<Option<u64>>,
    /// See [`PeerLimits::then`].
    pub then: Option<Then>,
}

/// Which limit a packet exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exceeded {
    /// The peer's or the tenant's rate.
    Rate,
    /// The peer's lease.
    Lease,
}

/// Packets of one peer dropped, by reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerDrops([u64; Drop::ALL.len()]);

/// See the module.
#[derive(Debug, Default)]
pub struct PeerPolicy {
    tenant: Option<TenantRef>,
    limits: Option<Box<Limits>>,
    drops: Option<Box<PeerDrops>>,
}

#[derive(Debug, Default)]
struct Limits {
    set: PeerLimits,
    rates: [Option<Rate>; 2],
    buckets: [Bucket; 2],
    lease: Option<Lease>,
}

impl PeerLimitsChange {
    /// What is not named is to be as for a new peer. What was charged to limits that stay, stays charged.
    pub(crate) fn default_the_rest(&mut self) {
        let PeerLimits { rate_up, rate_down, lease, then } = PeerLimits::default();
        self.rate_up.get_or_insert(rate_up);
        self.rate_down.get_or_insert(rate_down);
        self.lease.get_or_insert(lease);
        self.then.get_or_insert(then);
    }
}

impl PeerPolicy {
    /// Puts the peer under its tenant.
    pub fn belong_to(&mut self, tenant: TenantRef) {
        self.tenant = Some(tenant);
    }

    /// The peer's tenant.
    #[must_use]
    pub fn tenant(&self) -> Option<&TenantRef> {
        self.tenant.as_ref()
    }

    /// Takes the peer out of its tenant.
    pub fn leave_tenant(&mut self) {
        self.tenant = None;
    }

    /// The limits as they were set.
    #[must_use]
    pub fn limits(&self) -> PeerLimits {
        self.limits.as_deref().map(|limits| limits.set).unwrap_or_default()
    }

    /// Sets limits. `total` reads the peer's counters. What was charged so far stays charged.
    pub fn limit(&mut self, now: Clock, change: PeerLimitsChange, total: impl FnOnce() -> u64) {
        let old = self.limits();
        let set = PeerLimits {
            rate_up: change.rate_up.unwrap_or(old.rate_up),
            rate_down: change.rate_down.unwrap_or(old.rate_down),
            lease: change.lease.unwrap_or(old.lease),
            then: change.then.unwrap_or(old.then),
        };
        if set == old {
            return;
        }
        if set == PeerLimits::default() {
            self.limits = None;
            return;
        }
        let limits = self.limits.get_or_insert_with(Box::default);
        limits.set = set;
        limits.rates = [Rate::bits_per_second(set.rate_up), Rate::bits_per_second(set.rate_down)];
        for (bucket, rate) in limits.buckets.iter_mut().zip(limits.rates) {
            if let Some(rate) = rate {
                bucket.refit(rate, now.0);
            }
        }
        match (set.lease, &mut limits.lease) {
            (Some(until), Some(lease)) => lease.renew(until, set.then),
            (Some(until), none) => *none = Some(Lease::new(until, set.then, total())),
            (None, lease) => *lease = None,
        }
    }

    /// Charges a packet to the peer's lease and rate and to the tenant's rate: to all of them or to none. `total` reads
    /// the peer's counters.
    ///
    /// # Errors
    /// Which of them it exceeds.
    #[inline]
    pub fn charge(
        &mut self,
        tenants: &Tenants,
        now: Clock,
        direction: Direction,
        bytes: usize,
        total: impl FnOnce() -> u64,
    ) -> Result<(), Exceeded> {
        let tenant_allows = || match &self.tenant {
            Some(tenant) => tenants.take(tenant, now, direction, bytes),
            None => true,
        };
        let Some(limits) = self.limits.as_deref_mut() else {
            return if tenant_allows() { Ok(()) } else { Err(Exceeded::Rate) };
        };
        let covered = match &mut limits.lease {
            Some(lease) => Some(lease.check(now, direction, bytes, total).ok_or(Exceeded::Lease)?),
            None => None,
        };
        let bucket = &mut limits.buckets[direction as usize];
        let conforming = match limits.rates[direction as usize] {
            Some(rate) => Some(bucket.check(rate, now.0, bytes).ok_or(Exceeded::Rate)?),
            None => None,
        };
        if !tenant_allows() {
            return Err(Exceeded::Rate);
        }
        if let Some(conforming) = conforming {
            bucket.charge(conforming);
        }
        if let (Some(lease), Some(covered)) = (&mut limits.lease, covered) {
            lease.charge(now, direction, bytes, covered);
        }
        Ok(())
    }

    /// Counts packets of this peer that were dropped.
    #[cold]
    pub fn dropped(&mut self, reason: Drop, packets: u64) {
        self.drops.get_or_insert_with(|| Box::new(PeerDrops([0; Drop::ALL.len()]))).0[reason as usize] += packets;
    }

    /// What was dropped, if anything was.
    #[must_use]
    pub fn drops(&self) -> Option<&PeerDrops> {
        self.drops.as_deref()
    }
}

impl PeerDrops {
    /// The reasons there were, with packets.
    pub fn reasons(&self) -> impl Iterator<Item = (Drop, u64)> + '_ {
        Drop::ALL.into_iter().map(|reason| (reason, self.0[reason as usize])).filter(|(_, packets)| *packets > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::TenantChange;

    const NOW: Clock = Clock(0);
    const BURST: u64 = 256 * 1024;

    /// How many packets of 1,024 bytes pass at once, up to a thousand.
    fn passed(peer: &mut PeerPolicy, tenants: &Tenants, direction: Direction) -> u64 {
        (0..1000).map(|_| u64::from(peer.charge(tenants, NOW, direction, 1024, || 0).is_ok())).sum()
    }

    fn tenant_with(rate_up: u64) -> (Tenants, TenantRef) {
        let mut tenants = Tenants::default();
        let change = TenantChange { tenant: [1; 16], rate_up: Some(rate_up), ..TenantChange::default() };
        tenants.change(NOW, vec![change]).unwrap();
        let held = tenants.hold([1; 16]);
        (tenants, held)
    }

    #[test]
    fn an_idle_peer_is_small() {
        assert!(size_of::<PeerPolicy>() <= 32);
        let mut peer = PeerPolicy::default();
        peer.limit(NOW, PeerLimitsChange { rate_up: Some(1), ..Default::default() }, || 0);
        peer.limit(NOW, PeerLimitsChange { rate_up: Some(0), ..Default::default() }, || 0);
        assert!(peer.limits.is_none(), "no limits, no memory");
    }

    #[test]
    fn each_direction_has_its_own_rate() {
        let mut peer = PeerPolicy::default();
        peer.limit(NOW, PeerLimitsChange { rate_up: Some(1000), ..Default::default() }, || 0);
        let tenants = Tenants::default();
        assert_eq!(passed(&mut peer, &tenants, Direction::Up), BURST / 1024);
        assert_eq!(passed(&mut peer, &tenants, Direction::Down), 1000);
        peer.limit(NOW, PeerLimitsChange { rate_down: Some(1000), ..Default::default() }, || 0);
        assert_eq!(passed(&mut peer, &tenants, Direction::Up), 0, "setting limits fills no bucket");
        assert_eq!(passed(&mut peer, &tenants, Direction::Down), BURST / 1024);
    }

    #[test]
    fn peers_of_one_tenant_share_its_rate() {
        let (tenants, held) = tenant_with(1000);
        let (mut one, mut other) = (PeerPolicy::default(), PeerPolicy::default());
        one.belong_to(held.clone());
        other.belong_to(held);
        for _ in 0..100 {
            assert_eq!(one.charge(&tenants, NOW, Direction::Up, 1024, || 0), Ok(()));
        }
        assert_eq!(passed(&mut other, &tenants, Direction::Up), BURST / 1024 - 100);
        assert_eq!(one.charge(&tenants, NOW, Direction::Up, 1024, || 0), Err(Exceeded::Rate));
    }

    #[test]
    fn a_packet_that_one_limit_refuses_is_charged_to_none() {
        let (tenants, held) = tenant_with(1000);
        let mut limited = PeerPolicy::default();
        limited.belong_to(held.clone());
        limited.limit(
            NOW,
            PeerLimitsChange { rate_up: Some(1000), lease: Some(Some(100 * 1024)), ..Default::default() },
            || 0,
        );
        assert_eq!(passed(&mut limited, &tenants, Direction::Up), 100);
        assert_eq!(limited.charge(&tenants, NOW, Direction::Up, 1024, || 0), Err(Exceeded::Lease));
        limited.limit(NOW, PeerLimitsChange { lease: Some(None), ..Default::default() }, || 0);
        assert_eq!(passed(&mut limited, &tenants, Direction::Up), BURST / 1024 - 100);
        let mut other = PeerPolicy::default();
        other.belong_to(held);
        other.limit(NOW, PeerLimitsChange { lease: Some(Some(1024)), ..Default::default() }, || 0);
        assert_eq!(other.charge(&tenants, NOW, Direction::Up, 1024, || 0), Err(Exceeded::Rate), "the tenant's");
        assert_eq!(other.charge(&tenants, NOW, Direction::Down, 1024, || 0), Ok(()), "the lease was not charged");
    }

    #[test]
    fn drops_are_kept_by_reason() {
        let mut peer = PeerPolicy::default();
        assert_eq!(peer.drops(), None);
        peer.dropped(Drop::Spoofed, 1);
        peer.dropped(Drop::Spoofed, 1);
        peer.dropped(Drop::Isolation, 1);
        let drops: Vec<_> = peer.drops().unwrap().reasons().collect();
        assert_eq!(drops, [(Drop::Spoofed, 2), (Drop::Isolation, 1)]);
    }
}
