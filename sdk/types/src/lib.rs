//! The words CVault's API is made of: ids, error codes, requests and responses. No I/O, no policy.
//!
//! The control plane renders its OpenAPI document from these types and the SDKs are written against them, so a field
//! exists here or nowhere.
#![forbid(unsafe_code)]

pub mod admin;
pub mod auth;
pub mod device;
pub mod error_code;
pub mod health;
pub mod id;
pub mod problem;
pub mod secret;
pub mod server;
pub mod tenant;
pub mod usage;
pub mod vpn;

pub use error_code::ErrorCode;
pub use id::{ApiKeyId, AuditId, DeviceId, PoolId, RequestId, ServerId, SessionId, TenantId, UserId};
pub use secret::Secret;
