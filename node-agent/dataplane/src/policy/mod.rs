//! Policy at the packet: where a tenant's peers may send to, how fast, and how much.
//!
//! Pure: packets, sizes and the time go in, decisions come out. A packet from a tenant's peer passes, in this order, the
//! check of its source (in the engine), isolation, [`Destinations`], then for both directions the peer's quota
//! [`lease`], the peer's rate and the tenant's rate ([`gcra`]); it is charged to all of them or to none. Peers without a
//! tenant are under plain cryptokey routing; rates and leases of their own hold for them as well.
//! Sizes are IP bytes, as in the counters.

mod destinations;
pub mod gcra;
pub mod lease;
mod peer;
mod ranges;
mod rule;
mod tenants;
pub(crate) mod transport;

use std::net::IpAddr;

pub use destinations::{Destinations, Forbidden, Hosts, MAX_RULES};
pub use peer::{Exceeded, PeerDrops, PeerLimits, PeerLimitsChange, PeerPolicy};
pub use rule::{DenyRule, NotARule};
pub use tenants::{MAX_TENANTS, SharedRates, TenantChange, TenantId, TenantRef, TenantSettings, Tenants, TooMany};

/// Nanoseconds on a clock that only goes forward, the same for all workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Clock(pub u64);

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Direction {
    /// From the peer.
    Up,
    /// To the peer.
    Down,
}

/// Changes of what holds for the whole interface.
#[derive(Clone, Debug, Default)]
pub struct PolicyChange {
    /// First forget the server's own addresses.
    pub replace_hosts: bool,
    /// Addresses of the server itself.
    pub hosts: Vec<IpAddr>,
    /// Settings of tenants, in order.
    pub tenants: Vec<TenantChange>,
}

impl PolicyChange {
    /// Whether it leaves everything as it is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { replace_hosts, hosts, tenants } = self;
        !replace_hosts && hosts.is_empty() && tenants.is_empty()
    }
}

/// What holds for the whole interface.
#[derive(Debug, Default)]
pub struct Policy {
    /// The server's own addresses.
    pub hosts: Hosts,
    /// All tenants.
    pub tenants: Tenants,
}

impl Policy {
    /// Applies the whole change or nothing of it.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn change(&mut self, now: Clock, change: PolicyChange) -> Result<(), TooMany> {
        if change.hosts.len() > MAX_RULES {
            return Err(TooMany);
        }
        let mut hosts = if change.replace_hosts { Hosts::default() } else { self.hosts.clone() };
        if !change.hosts.into_iter().all(|address| hosts.add(address)) {
            return Err(TooMany);
        }
        self.tenants.change(now, change.tenants)?;
        self.hosts = hosts;
        Ok(())
    }
}
