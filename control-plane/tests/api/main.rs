//! The control plane through its real router and a real PostgreSQL, and the binary as an operator runs it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod admin;
mod admin_infrastructure;
mod auth;
mod bad_input;
mod binary;
mod dashboard;
mod devices;
mod exact_limits;
mod hostile_input;
mod idempotency;
mod keys;
mod limits;
mod matrix;
mod passwords;
mod people;
mod platform;
mod portal;
mod portal_email;
mod reclaim;
mod replicas;
mod request_lines;
mod request_logs;
mod scene;
mod shutdown;
mod signing_keys;
mod staff;
mod telemetry;
mod throttle;
mod transport;
mod usage_csv;
mod users;
