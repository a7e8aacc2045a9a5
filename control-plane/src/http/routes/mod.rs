//! One file per noun: parse, authorise, call the operation, answer.

pub mod admin;
pub mod auth;
pub mod devices;
pub mod health;
pub mod portal;
pub mod portal_account;
mod portal_attempt;
pub mod servers;
pub mod usage;
pub mod users;
pub mod vpn;
