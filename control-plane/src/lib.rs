//! CVault's control plane: the HTTP API for tenants, the gRPC gateway for servers, and everything behind them.
//!
//! A request goes `http` -> an operation in a noun's folder -> `tenancy::TenantTx` -> PostgreSQL, and nothing else keeps
//! state. Deliberately absent: anything that touches a packet (`node-agent/`).
#![forbid(unsafe_code)]

pub mod admin;
pub mod app;
pub mod audit;
pub mod auth;
pub mod catalogue;
pub mod clock;
pub mod config;
pub mod dashboard;
pub mod db;
pub mod desired;
pub mod dev;
pub mod devices;
pub mod http;
pub mod ipam;
pub mod keys;
pub mod mail;
pub mod metrics;
pub mod network;
pub mod nodes;
pub mod portal;
pub mod postgres;
pub mod request_logs;
pub mod serve;
pub mod servers;
pub mod sessions;
pub mod step_up;
pub mod tasks;
pub mod telemetry;
pub mod tenancy;
pub mod tenants;
pub mod text;
pub mod together;
pub mod trim;
pub mod usage;
pub mod users;

#[cfg(test)]
mod testing;
