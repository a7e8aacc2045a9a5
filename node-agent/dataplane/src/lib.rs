//! The CVault data plane: a userspace WireGuard server for many tenants on one interface, and the process around it.
//!
//! The core ([`engine`]) is pure: datagrams, packets, ticks and changes go in, datagrams and packets come out, and the
//! time is an argument. The I/O shell (`io`) moves bytes between the core, one TUN device and UDP sockets on
//! worker threads that share the peers. The control socket (`uapi`) speaks the WireGuard cross-platform protocol on
//! threads of its own.
//! [`process`] is the tunnel process; [`counters`] and [`journal`] are what the control process reads without IPC.
//!
//! Deliberately absent: addresses, routes, nftables and quotas. The control process owns those.

pub mod change;
pub mod counters;
pub mod drops;
pub mod ecn;
pub mod engine;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod journal;
pub mod policy;
pub mod process;
pub mod uapi;

mod allowed;
mod index;
mod io;
mod limit;
mod noise;
mod out;
mod packet;
mod tunnel;

pub use out::Out;
