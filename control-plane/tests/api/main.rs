//! The control plane through its real router and a real PostgreSQL, and the binary as an operator runs it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod admin;
mod auth;
mod bad_input;
mod binary;
mod dashboard;
mod devices;
mod idempotency;
mod keys;
mod limits;
mod people;
mod platform;
mod portal;
mod telemetry;
mod throttle;
mod transport;
mod users;
