//! The host around the tunnel: link, addresses, sysctls, firewall. Everything is idempotent: it is set up again at each
//! start and after each restart of the tunnel.

mod conntrack;
mod firewall;
mod link;
mod sysctl;

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::Instant;

use crate::interface::Interface;

pub(crate) use conntrack::Forget;
pub(crate) use link::{delete as delete_link, own_addresses};

/// A table of a million connections is read in about a second.
const CONNTRACK_TIMEOUT: Duration = Duration::from_secs(10);

/// Brings the host into the state that `interface` needs. The link must exist.
pub(crate) async fn set_up(name: &str, interface: &Interface) -> anyhow::Result<()> {
    link::set_up(name, interface).await?;
    sysctl::set_up(name)?;
    firewall::set_up(name, interface).await
}

/// Repairs what somebody changed since [`set_up`]; a firewall that is there is not replaced.
pub(crate) async fn repair(name: &str, interface: &Interface) -> anyhow::Result<()> {
    link::set_up(name, interface).await?;
    sysctl::set_up(name)?;
    if !firewall::is_present().await {
        tracing::error!("the firewall's table is gone: setting it up again");
        firewall::set_up(name, interface).await?;
    }
    Ok(())
}

/// Makes the kernel forget connections that peers began.
pub(crate) async fn forget_connections(which: Forget) -> anyhow::Result<()> {
    if matches!(&which, Forget::Of(addresses) if addresses.is_empty()) {
        return Ok(());
    }
    let began = Instant::now();
    let forget = tokio::task::spawn_blocking(move || conntrack::forget(&which));
    let forgotten =
        tokio::time::timeout(CONNTRACK_TIMEOUT, forget).await.context("connection tracking took too long")?;
    let forgotten = forgotten.context("forgetting connections was interrupted")?;
    let forgotten = forgotten.context("the connections of an address cannot be forgotten")?;
    tracing::debug!(forgotten, took = ?began.elapsed(), "forgot connections");
    Ok(())
}

/// Refuses at once, in one sentence, what cannot work.
pub(crate) fn check() -> anyhow::Result<()> {
    anyhow::ensure!(rustix::process::geteuid().is_root(), "a server agent sets up network interfaces: run it as root");
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        anyhow::bail!(
            "/dev/net/tun cannot be opened ({error}): load the kernel module `tun`, or give the container the device"
        );
    }
    conntrack::check()?;
    firewall::check()
}
