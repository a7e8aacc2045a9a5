//! The I/O shell: worker threads, each between its engine, a queue of the TUN device and its UDP sockets.

mod attempt;
pub(crate) mod desk;
pub(crate) mod fleet;
pub(crate) mod mailbox;
pub(crate) mod memory;
pub(crate) mod merge;
pub(crate) mod offloads;
pub(crate) mod panics;
pub(crate) mod ring;
pub(crate) mod signals;
mod sockopt;
pub(crate) mod split;
mod steer;
pub(crate) mod tun;
pub(crate) mod udp;
mod wait;
pub(crate) mod watch;
pub(crate) mod worker;
