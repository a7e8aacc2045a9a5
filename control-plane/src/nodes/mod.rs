//! The gateway for server agents (gRPC over mutual TLS) and the wake-ups between it and the rest of the process.

mod hub;

pub use hub::Hub;
