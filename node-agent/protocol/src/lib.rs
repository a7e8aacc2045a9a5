//! The wire between the control plane and its server agents: messages, limits, digest, tokens, pinned TLS.
//!
//! Both programs are built and tested against this crate, so they cannot disagree about a byte.
//! Deliberately absent: any policy about when to send what. That lives in `control-plane/src/nodes` and
//! `node-agent/src/link.rs`.
#![forbid(unsafe_code)]

pub mod digest;
pub mod tls;
pub mod token;

/// Generated from `proto/node.proto`.
#[expect(clippy::allow_attributes_without_reason, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("cvault.node.v1");
}

/// The protocol version this crate speaks.
pub const PROTOCOL: u32 = 1;
/// Peers in one snapshot chunk or delta: about 64 KiB on the wire.
pub const MAX_CHUNK_PEERS: usize = 500;
/// Peers in one usage window.
pub const MAX_WINDOW_PEERS: usize = 2_000;
/// Usage windows in one report.
pub const MAX_REPORT_WINDOWS: usize = 64;
/// Lives of metered peers in one report: about 1 MiB on the wire. A list of more is told in stretches.
pub const MAX_LEASES: usize = 20_000;
/// Bytes of one message, either way (HTTP/2 clients and servers refuse larger ones).
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// A removal of more than this share of the peers needs to be announced by `expected_removed` …
pub const MASS_REMOVAL_PERCENT: usize = 50;
/// … if it is also more than this many peers.
pub const MASS_REMOVAL_MIN: usize = 10;
