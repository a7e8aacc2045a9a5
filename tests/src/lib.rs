//! The Lab and what runs in it: whole machines as Linux namespaces, the platform's real programs, real WireGuard clients.
//!
//! `lab` knows machines, links and processes and nothing of CVault. `internet` is what a client reaches through its
//! tunnel. `platform` starts control plane, server agents and clients in a lab and speaks the HTTP API.
//! `tunnel` is one WireGuard interface by itself, with the load and the hostility that tests put on it.
//! `bench` is what the measuring programs share.
//! The end-to-end tests are in `e2e/`; the demonstration is `src/bin/demo/main.rs`.

#![forbid(unsafe_code)]

pub mod bench;
pub mod internet;
pub mod lab;
pub mod platform;
pub mod tunnel;
