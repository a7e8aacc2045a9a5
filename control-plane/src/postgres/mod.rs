//! A private PostgreSQL cluster, run as a child process: the database of `dev` and of the tests.
//!
//! Reached through a unix socket in a folder of mode 0700 only; who connects is known from the kernel (peer
//! authentication), so there is no password to keep. Started with dropped privileges when we are root. It outlives a
//! crash of its parent and is adopted by the next one. Deliberately absent: TCP, backups, tuning beyond the size of its cache.

mod binaries;
mod cluster;
mod memory;
pub mod scratch;
mod settings;

pub use cluster::{Cluster, ClusterError, Durability};
