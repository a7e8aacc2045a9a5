//! One file per noun: parse, authorise, call the operation, answer.

pub mod admin;
pub mod admin_audit;
pub mod admin_pools;
pub mod admin_servers;
pub mod auth;
pub mod devices;
pub mod health;
pub mod portal;
pub mod portal_account;
mod portal_attempt;
pub mod portal_email;
mod portal_link;
pub mod servers;
pub mod tenant_api_keys;
pub mod tenant_dashboard;
pub mod tenant_lists;
pub mod tenant_request_logs;
pub mod tenant_settings;
pub mod usage;
pub mod users;
pub mod vpn;
