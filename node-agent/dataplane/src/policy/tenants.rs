//! The tenants of one worker: their settings, compiled, and the state of their rate limits, shared by all workers.
//!
//! A peer refers to its tenant by a small index, so that the packet path needs no map. A tenant that nobody set anything
//! for has the strict defaults; its entry is used again once no peer refers to it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;

use super::destinations::{Destinations, MAX_RULES};
use super::gcra::{Rate, SharedBucket};
use super::rule::DenyRule;
use super::{Clock, Direction};

/// As many as there can be peers.
pub const MAX_TENANTS: usize = 65_536;

/// Who it is.
pub type TenantId = [u8; 16];

/// What a tenant is allowed. The default is strict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TenantSettings {
    /// Its peers reach each other.
    pub allow_intra: bool,
    /// From all its peers together, bits a second; 0 is no limit.
    pub rate_up: u64,
    /// To all its peers together, bits a second; 0 is no limit.
    pub rate_down: u64,
    /// Its peers may send mail: TCP port 25.
    pub smtp: bool,
    /// Prefixes outside the internet that its peers reach.
    pub allow_to: Vec<IpNet>,
    /// Destinations that its peers do not reach.
    pub deny_to: Vec<DenyRule>,
}

/// Changes the settings of one tenant. `None` leaves a field as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TenantChange {
    /// Whose.
    pub tenant: TenantId,
    /// Back to the defaults; the rest is ignored.
    pub remove: bool,
    /// First back to the defaults.
    pub replace: bool,
    /// See [`TenantSettings::allow_intra`].
    pub allow_intra: Option<bool>,
    /// See [`TenantSettings::rate_up`].
    pub rate_up: Option<u64>,
    /// See [`TenantSettings::rate_down`].
    pub rate_down: Option<u64>,
    /// See [`TenantSettings::smtp`].
    pub smtp: Option<bool>,
    /// Prefixes to add.
    pub allow_to: Vec<IpNet>,
    /// Rules to add.
    pub deny_to: Vec<DenyRule>,
}

/// More rules or tenants than there is room for. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many tenants, or too many rules for one of them")]
pub struct TooMany;

/// Where the workers of one interface meet: both buckets of each tenant with a limit.
#[derive(Clone, Debug, Default)]
pub struct SharedRates(Arc<Mutex<HashMap<TenantId, Arc<Buckets>>>>);

type Buckets = [SharedBucket; 2];

impl SharedRates {
    /// Only when settings change: never on the way of a packet.
    fn of(&self, tenant: TenantId) -> Arc<Buckets> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(tenant).or_default())
    }

    /// Forgets the tenant unless another worker still uses it.
    fn leave(&self, tenant: TenantId) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.get(&tenant).is_some_and(|buckets| Arc::strong_count(buckets) == 1) {
            all.remove(&tenant);
        }
    }
}

/// A peer's way to its tenant.
#[derive(Clone, Debug)]
pub struct TenantRef {
    index: u32,
    /// Counts the references.
    _held: Arc<()>,
}

#[derive(Debug)]
struct Tenant {
    id: TenantId,
    settings: TenantSettings,
    destinations: Destinations,
    rates: [Option<Rate>; 2],
    /// There while there is a rate.
    buckets: Option<Arc<Buckets>>,
    held: Arc<()>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Tenants {
    all: Vec<Tenant>,
    by_id: HashMap<TenantId, u32>,
    free: Vec<u32>,
    shared: SharedRates,
    /// With so many entries, unused ones are looked for before another is made.
    sweep_at: usize,
}

/// Fewer entries are never swept.
const MIN_SWEEP: usize = 64;

impl Tenants {
    /// Tenants whose limits are shared with other workers.
    #[must_use]
    pub fn sharing(shared: SharedRates) -> Self {
        Self { shared, ..Self::default() }
    }

    /// What other workers need to share the limits.
    #[must_use]
    pub fn shared(&self) -> SharedRates {
        self.shared.clone()
    }

    /// A reference for a peer.
    pub fn hold(&mut self, id: TenantId) -> TenantRef {
        let index = self.index(id);
        TenantRef { index, _held: Arc::clone(&self.entry(index).held) }
    }

    /// Applies all changes or none.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn change(&mut self, now: Clock, changes: Vec<TenantChange>) -> Result<(), TooMany> {
        let mut staged: HashMap<TenantId, TenantSettings> = HashMap::new();
        for change in changes {
            // Before each is compared with all: there may be very many.
            if change.allow_to.len() + change.deny_to.len() > MAX_RULES {
                return Err(TooMany);
            }
            let settings = staged.entry(change.tenant).or_insert_with(|| self.settings(change.tenant));
            change.apply(settings);
            if settings.allow_to.len() + settings.deny_to.len() > MAX_RULES {
                return Err(TooMany);
            }
        }
        let new = staged.keys().filter(|id| !self.by_id.contains_key(*id)).count();
        if self.by_id.len() + new > MAX_TENANTS {
            self.sweep();
            if self.by_id.len() + new > MAX_TENANTS {
                return Err(TooMany);
            }
        }
        for (id, settings) in staged {
            self.set(now, id, settings);
        }
        Ok(())
    }

    /// Those with settings of their own, from entry `from` on, with the entry of each.
    pub fn configured(&self, from: usize) -> impl Iterator<Item = (usize, TenantId, &TenantSettings)> {
        let strict = TenantSettings::default();
        let entries = self.all.iter().enumerate().skip(from).filter(move |(_, tenant)| tenant.settings != strict);
        entries.map(|(entry, tenant)| (entry, tenant.id, &tenant.settings))
    }

    /// Whether the tenant's peers reach each other.
    #[must_use]
    pub fn allows_intra(&self, tenant: &TenantRef) -> bool {
        self.entry(tenant.index).settings.allow_intra
    }

    /// Where the tenant's peers may send to.
    #[must_use]
    pub fn destinations(&self, tenant: &TenantRef) -> &Destinations {
        &self.entry(tenant.index).destinations
    }

    /// Charges the tenant's limit; false when it is reached.
    #[must_use]
    #[inline]
    pub fn take(&self, tenant: &TenantRef, now: Clock, direction: Direction, bytes: usize) -> bool {
        let tenant = self.entry(tenant.index);
        match (tenant.rates[direction as usize], &tenant.buckets) {
            (Some(rate), Some(buckets)) => {
                let bucket = &buckets[direction as usize];
                // One reference is ours and one the registry's: no other worker has this tenant.
                if Arc::strong_count(buckets) == 2 {
                    bucket.take_alone(rate, now.0, bytes)
                } else {
                    bucket.take(rate, now.0, bytes)
                }
            }
            (None, _) | (_, None) => true,
        }
    }

    fn entry(&self, index: u32) -> &Tenant {
        &self.all[index as usize]
    }

    fn settings(&self, id: TenantId) -> TenantSettings {
        self.by_id.get(&id).map(|index| self.entry(*index).settings.clone()).unwrap_or_default()
    }

    fn set(&mut self, now: Clock, id: TenantId, settings: TenantSettings) {
        let index = self.index(id);
        let tenant = &mut self.all[index as usize];
        let rules = |of: &TenantSettings| (of.smtp, of.allow_to == settings.allow_to, of.deny_to == settings.deny_to);
        if rules(&tenant.settings) != rules(&settings) {
            tenant.destinations = Destinations::new(settings.smtp, &settings.allow_to, &settings.deny_to);
        }
        tenant.rates = [Rate::bits_per_second(settings.rate_up), Rate::bits_per_second(settings.rate_down)];
        let limited = tenant.rates.iter().any(Option::is_some);
        let left = !limited && tenant.buckets.take().is_some();
        if limited && tenant.buckets.is_none() {
            tenant.buckets = Some(self.shared.of(id));
        }
        for (bucket, rate) in tenant.buckets.iter().flat_map(|buckets| buckets.iter()).zip(tenant.rates) {
            if let Some(rate) = rate {
                bucket.refit(rate, now.0);
            }
        }
        tenant.settings = settings;
        if left {
            self.shared.leave(id);
        }
    }

    fn index(&mut self, id: TenantId) -> u32 {
        if let Some(index) = self.by_id.get(&id) {
            return *index;
        }
        if self.free.is_empty() && self.all.len() >= self.sweep_at.max(MIN_SWEEP) {
            self.sweep();
            self.sweep_at = (self.all.len() - self.free.len()) * 2;
        }
        let tenant = Tenant {
            id,
            settings: TenantSettings::default(),
            destinations: Destinations::default(),
            rates: [None; 2],
            buckets: None,
            held: Arc::default(),
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.all[index as usize] = tenant;
                index
            }
            None => {
                self.all.push(tenant);
                u32::try_from(self.all.len() - 1).expect("there are no more tenants than peers and settings")
            }
        };
        self.by_id.insert(id, index);
        index
    }

    /// Frees the entries that no peer refers to and nobody set anything for.
    fn sweep(&mut self) {
        for (index, tenant) in (0_u32..).zip(&self.all) {
            let unused = Arc::strong_count(&tenant.held) == 1 && tenant.settings == TenantSettings::default();
            if unused && self.by_id.get(&tenant.id) == Some(&index) {
                self.by_id.remove(&tenant.id);
                self.free.push(index);
            }
        }
    }
}

impl TenantChange {
    fn apply(self, settings: &mut TenantSettings) {
        if self.remove || self.replace {
            *settings = TenantSettings::default();
        }
        if self.remove {
            return;
        }
        settings.allow_intra = self.allow_intra.unwrap_or(settings.allow_intra);
        settings.rate_up = self.rate_up.unwrap_or(settings.rate_up);
        settings.rate_down = self.rate_down.unwrap_or(settings.rate_down);
        settings.smtp = self.smtp.unwrap_or(settings.smtp);
        for net in self.allow_to {
            if !settings.allow_to.contains(&net) {
                settings.allow_to.push(net);
            }
        }
        for rule in self.deny_to {
            if !settings.deny_to.contains(&rule) {
                settings.deny_to.push(rule);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = [1; 16];
    const B: TenantId = [2; 16];
    const NOW: Clock = Clock(1_000_000);

    fn change(tenant: TenantId, set: impl FnOnce(&mut TenantChange)) -> TenantChange {
        let mut change = TenantChange { tenant, ..TenantChange::default() };
        set(&mut change);
        change
    }

    #[test]
    fn settings_are_changed_replaced_and_removed() {
        let mut tenants = Tenants::default();
        let a = tenants.hold(A);
        assert!(!tenants.allows_intra(&a) && tenants.configured(0).next().is_none());
        let allow = change(A, |c| {
            c.allow_intra = Some(true);
            c.rate_up = Some(1000);
            c.allow_to = vec!["10.0.0.0/8".parse().unwrap(); 2];
        });
        tenants.change(NOW, vec![allow.clone(), change(A, |c| c.smtp = Some(true))]).unwrap();
        let (_, id, settings) = tenants.configured(0).next().unwrap();
        assert!(tenants.allows_intra(&a) && settings.smtp && id == A);
        assert_eq!((settings.rate_up, settings.allow_to.len()), (1000, 1));
        tenants.change(NOW, vec![change(A, |c| c.replace = true), change(B, |c| c.smtp = Some(true))]).unwrap();
        assert_eq!(
            tenants.configured(0).map(|(_, id, _)| id).collect::<Vec<_>>(),
            [B],
            "A is as strict as at the beginning"
        );
        tenants.change(NOW, vec![allow, change(A, |c| c.remove = true), change(B, |c| c.remove = true)]).unwrap();
        assert!(tenants.configured(0).next().is_none() && !tenants.allows_intra(&a));
    }

    #[test]
    fn too_many_rules_change_nothing() {
        let mut tenants = Tenants::default();
        let rules = |count: u32| (0..count).map(|n| format!("192.0.{}.{}/32", n >> 8, n & 255).parse().unwrap());
        let many = vec![
            change(B, |c| c.smtp = Some(true)),
            change(A, |c| c.deny_to = rules(256).collect()),
            change(A, |c| c.allow_to = vec!["10.0.0.0/8".parse().unwrap()]),
        ];
        assert_eq!(tenants.change(NOW, many), Err(TooMany));
        assert!(tenants.configured(0).next().is_none());
        tenants.change(NOW, vec![change(A, |c| c.deny_to = rules(256).collect())]).unwrap();
        // To compare each with all of them would take hours.
        let millions = change(B, |c| c.deny_to = rules(1 << 16).cycle().take(1 << 22).collect());
        assert_eq!(tenants.change(NOW, vec![millions]), Err(TooMany));
    }

    #[test]
    fn workers_share_the_limit_of_a_tenant() {
        let mut first = Tenants::default();
        let mut second = Tenants::sharing(first.shared());
        let limit = || vec![change(A, |c| c.rate_down = Some(1_000_000))];
        first.change(NOW, limit()).unwrap();
        second.change(NOW, limit()).unwrap();
        let (one, other) = (first.hold(A), second.hold(A));
        let mut passed = 0;
        while first.take(&one, NOW, Direction::Down, 1000) && second.take(&other, NOW, Direction::Down, 1000) {
            passed += 2000;
        }
        assert_eq!(passed, 256 * 1024 / 2000 * 2000, "one burst for both");
        assert!(first.take(&one, NOW, Direction::Up, 1000), "the other direction has no limit");
        first.change(NOW, limit()).unwrap();
        assert!(!first.take(&one, NOW, Direction::Down, 1000), "telling it again fills no bucket");
        let unlimited = vec![change(A, |c| c.remove = true)];
        first.change(NOW, unlimited.clone()).unwrap();
        assert!(first.take(&one, NOW, Direction::Down, 1000));
        assert!(!second.take(&other, NOW, Direction::Down, 1000), "still limited there");
        second.change(NOW, unlimited).unwrap();
        assert!(first.shared.0.lock().unwrap().is_empty());
    }

    #[test]
    fn a_faster_rate_holds_at_once() {
        let mut tenants = Tenants::default();
        let rate = |bits| vec![change(A, |c| c.rate_up = Some(bits))];
        tenants.change(NOW, rate(1)).unwrap();
        let held = tenants.hold(A);
        while tenants.take(&held, NOW, Direction::Up, 1000) {}
        tenants.change(NOW, rate(8_000_000)).unwrap();
        assert!(!tenants.take(&held, NOW, Direction::Up, 1000));
        assert!(tenants.take(&held, Clock(NOW.0 + 1_000_000), Direction::Up, 1000));
    }

    #[test]
    fn entries_of_tenants_without_peers_are_used_again() {
        let mut tenants = Tenants::default();
        let kept = tenants.hold(A);
        tenants.change(NOW, vec![change(B, |c| c.smtp = Some(true))]).unwrap();
        for n in 0..10_000_u32 {
            let mut id = [9; 16];
            id[..4].copy_from_slice(&n.to_le_bytes());
            let _one_peer_for_a_while = tenants.hold(id);
        }
        assert!(tenants.all.len() < 200, "{}", tenants.all.len());
        assert_eq!((tenants.by_id[&A], tenants.configured(0).count()), (kept.index, 1));
    }
}
