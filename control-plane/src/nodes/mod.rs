//! The gateway for server agents: gRPC over TLS 1.3, both sides pinned by key, agents dial out.
//!
//! `Watch` carries desired state to a server, `Report` brings back what it has applied and measured and is answered after
//! COMMIT. Deliberately absent: any state that another replica could not rebuild from the database.

mod hub;
mod listener;
mod policies;
mod report;
mod service;
mod stream;

pub use hub::Hub;
pub use listener::{ServeError, serve};

#[cfg(test)]
mod tests;
