//! Many WireGuard initiators in one process: each generated peer shakes hands once with one responder, from an address
//! and a socket of its own, as after a restart. Prints one JSON object.
//!
//! The initiations are made before the clock starts and the responses are used after it has stopped, so that the
//! figure is the responder's. It runs in the client machine of a [`cvault_tests::lab::Pair`].

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "what it prints is the product")]

mod cookie;
mod flood;
mod initiator;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use cvault_tests::bench::quantile;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

/// Shakes hands as many generated peers with one WireGuard server
#[derive(Parser)]
struct Options {
    /// Where the server listens
    #[arg(long)]
    server: SocketAddr,
    /// How many peers
    #[arg(long, default_value_t = 5000)]
    count: u32,
    /// The number of the first
    #[arg(long, default_value_t = 0)]
    first: u32,
    /// How many handshakes are under way at the same time
    #[arg(long, default_value_t = 32)]
    window: usize,
    /// How long to try
    #[arg(long, default_value_t = 30)]
    limit_s: u64,
    /// Confirm the sessions afterwards, so that the server may send
    #[arg(long)]
    confirm: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    allow_files(u64::from(options.count) + 64)?;
    let mut initiators = initiator::all(options.first, options.count, options.server)?;
    let flood = flood::run(&mut initiators, options.window, Duration::from_secs(options.limit_s))?;
    let confirmed = if options.confirm { initiator::confirm(&mut initiators)? } else { 0 };
    let microseconds: Vec<f64> = flood.latencies.iter().map(|latency| latency.as_secs_f64() * 1e6).collect();
    let line = json!({
        "peers": options.count,
        "answered": flood.latencies.len(),
        "elapsed_s": flood.elapsed.as_secs_f64(),
        "cookies": flood.cookies,
        "resent": flood.resent,
        "confirmed": confirmed,
        "latency_us_p50": quantile(&microseconds, 50),
        "latency_us_p99": quantile(&microseconds, 99),
    });
    println!("{line}");
    Ok(())
}

/// A socket each.
fn allow_files(wanted: u64) -> Result<()> {
    let now = getrlimit(Resource::Nofile);
    if now.current.is_some_and(|limit| limit < wanted) {
        let maximum = now.maximum.map(|maximum| maximum.max(wanted));
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })
            .with_context(|| format!("raise the limit of open files to {wanted}"))?;
    }
    Ok(())
}
