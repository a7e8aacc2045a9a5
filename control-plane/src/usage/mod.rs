//! Metering: cumulative counters from servers become bytes per hour, exactly once; tenants read them.
//!
//! Deliberately absent: any counting of packets (the servers do that) and any delta on the wire.

pub mod arithmetic;
pub mod drops;
mod export;
mod jobs;
pub mod leases;
mod ledger;
mod report;

pub use export::{DeviceDay, Place, page};
pub use jobs::{Verified, ensure_partitions, refresh_daily, refresh_week, verify_ledger};
pub use ledger::{Ingested, ingest};
pub use report::{Day, Limits, Period, Report, Reports, Totals, of_users, report};

#[cfg(test)]
mod tests;
