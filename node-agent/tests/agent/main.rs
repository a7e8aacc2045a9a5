//! The real agent against an in-process control plane with the real protocol and TLS.
//!
//! `enrolment` needs no privilege. The others run themselves again in private namespaces (all their processes end with
//! them), with the real tunnel, netlink, nftables and a WireGuard client; without root they fail and say so.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "everything here is test code: it panics and prints figures"
)]

mod enrolment;
mod gateway;
mod isolation;
mod namespaces;
mod restarts;
mod serving;

use std::process::Command;
use std::time::{Duration, Instant};

fn agent() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvault-node-agent"));
    command.env("CVAULT_LOG", "debug").env_remove("CVAULT_LOG_FORMAT");
    command
}

/// Polls until the check holds. Blocking work is fine: these tests run on several threads.
async fn eventually(what: &str, deadline: Duration, mut check: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !check() {
        assert!(began.elapsed() < deadline, "not within {deadline:?}: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    began.elapsed()
}
