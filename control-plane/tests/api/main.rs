//! The control plane through its real router and a real PostgreSQL, and the binary as an operator runs it.

mod admin;
mod auth;
mod bad_input;
mod binary;
mod limits;
mod platform;
mod telemetry;
