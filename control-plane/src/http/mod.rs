//! The HTTP API: one router, strict extractors, one form of error, one line of log per request.
//!
//! Handlers parse, authorise and call an operation of a noun's folder; there is no SQL here.

mod bare;
pub mod browser;
pub mod context;
pub mod cors;
pub mod csv;
pub mod cursor;
pub mod extract;
pub mod health_cache;
pub mod idempotency;
pub mod limit;
pub mod middleware;
pub mod openapi;
pub mod problem;
pub mod router;
pub mod routes;
pub mod serve;
pub mod staff;
pub mod strangers;
pub mod tls;
pub mod trace;

pub use extract::{Admin, Caller, ClientKey, Json, Path, Portal, Query, TenantKey, Written};
pub use problem::Problem;
