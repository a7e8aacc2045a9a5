//! The HTTP API: one router, strict extractors, one form of error, one line of log per request.
//!
//! Handlers parse, authorise and call an operation of a noun's folder; there is no SQL here.

pub mod context;
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

pub use extract::{Admin, Caller, Json, Path, Query, TenantKey};
pub use problem::Problem;
