//! The words CVault's API is made of: ids, error codes, requests and responses. No I/O, no policy.
//!
//! The control plane renders its OpenAPI document from these types and the SDKs are written against them, so a field
//! exists here or nowhere.
#![forbid(unsafe_code)]

pub mod admin;
pub mod api_key;
pub mod audit;
pub mod auth;
pub mod dashboard;
pub mod device;
pub mod error_code;
pub mod health;
pub mod id;
pub mod portal;
pub mod problem;
pub mod request_log;
pub mod secret;
pub mod server;
pub mod settings;
pub mod tenant;
pub mod usage;
pub mod user;
pub mod vpn;

pub use error_code::ErrorCode;
pub use id::MailId;
pub use id::{
    ApiKeyId, AuditId, ChallengeId, DeviceId, PoolId, PortalSessionId, RequestId, ServerId, SessionId, TenantAdminId,
    TenantId, UserId,
};
pub use portal::TenantRole;
pub use secret::Secret;
