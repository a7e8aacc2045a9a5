//! The host around the tunnel: link, addresses, sysctls, firewall. Everything is idempotent: it is set up again at each
//! start and after each restart of the tunnel.

mod firewall;
mod link;
mod sysctl;

use crate::interface::Interface;

pub(crate) use link::delete as delete_link;

/// Brings the host into the state that `interface` needs. The link must exist.
pub(crate) async fn set_up(name: &str, interface: &Interface) -> anyhow::Result<()> {
    link::set_up(name, interface).await?;
    sysctl::set_up(name)?;
    firewall::set_up(name, interface).await
}

/// Refuses at once, in one sentence, what cannot work.
pub(crate) fn check() -> anyhow::Result<()> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "a server agent sets up network interfaces: run it as root"
    );
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        anyhow::bail!("/dev/net/tun cannot be opened ({error}): load the kernel module `tun`, or give the container the device");
    }
    firewall::check()
}
