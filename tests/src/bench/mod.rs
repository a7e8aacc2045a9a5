//! What the bench suites share: the row they print, medians, and the keys and addresses of generated peers.

mod peers;
mod row;
mod stats;

pub use peers::{GeneratedPeer, SOURCES, endpoint_address, idle_peer_key, inner_address, server_secret};
pub use row::{Better, Must, Row};
pub use stats::{median, quantile};
