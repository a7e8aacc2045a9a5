//! The bodies of the fuzz targets in `fuzz/`, here so that the tests can replay their corpora with a stable compiler.
//!
//! Each takes any bytes at all and panics where an invariant is broken. Nothing else uses them.

mod datagram;
mod inner;
mod input;
mod offload;
#[cfg(test)]
mod replay;
mod scratch;
mod server;
mod uapi;

pub use datagram::datagram;
pub use inner::inner_packet;
pub use offload::offload;
pub use uapi::uapi;
