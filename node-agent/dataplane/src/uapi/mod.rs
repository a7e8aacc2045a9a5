//! The control socket: the WireGuard cross-platform protocol (<https://www.wireguard.com/xplatform/>) with CVault's keys.
//!
//! A few clients at a time, with bounds on size and time. One that wants more than a few peers changed, or is slow to say so,
//! gets a thread: it holds up neither packets nor the others. A request is read to its end before anything of it is applied.

mod door;
pub(crate) mod format;
mod parse;
pub(crate) mod server;

pub use parse::{Invalid, SetParser, SetRequest};

/// Where the sockets of all userspace WireGuard implementations are.
pub const SOCKET_DIR: &str = "/var/run/wireguard";
