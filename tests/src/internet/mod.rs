//! What a client reaches through its tunnel: a web server that tells the caller its address, and a DNS server.

mod dns;
mod noise;
mod web;

use anyhow::Result;

use crate::lab::{DNS_V4, DNS_V6};

pub use noise::{Noise, digest_of};

/// Serves on the internet machine until it is switched off.
pub fn serve() -> Result<()> {
    for address in [DNS_V4, DNS_V6] {
        dns::start(address)?;
    }
    web::serve()
}

/// Serves the web only, on whatever machine: something to connect to.
pub fn serve_web() -> Result<()> {
    web::serve()
}
