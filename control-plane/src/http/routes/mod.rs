//! One file per noun: parse, authorise, call the operation, answer.

pub mod admin;
pub mod admin_audit;
pub mod admin_pools;
pub mod admin_servers;
pub mod auth;
pub mod devices;
pub mod health;
pub mod servers;
pub mod usage;
pub mod vpn;
