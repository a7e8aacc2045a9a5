//! The I/O shell: one worker thread between the engine, the TUN device and the UDP sockets.

mod attempt;
pub(crate) mod mailbox;
pub(crate) mod memory;
pub(crate) mod offloads;
pub(crate) mod panics;
pub(crate) mod signals;
mod sockopt;
mod split;
pub(crate) mod tun;
pub(crate) mod udp;
pub(crate) mod worker;
