//! Kernel settings, written straight to `/proc/sys`.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

const ROOT: &str = "/proc/sys/net";

/// Switches forwarding on. An uplink that learns its IPv6 route from router advertisements must go on doing so: with
/// forwarding, the kernel ignores them unless `accept_ra` is 2 (kernel documentation, ip-sysctl).
pub(crate) fn set_up(tunnel: &str) -> anyhow::Result<()> {
    set(&format!("{ROOT}/ipv4/ip_forward"), "1")?;
    // Strict reverse-path filtering on the tunnel would drop answers when the operator routes by policy; the engine
    // itself checks that every source is the peer's own.
    set(&format!("{ROOT}/ipv4/conf/{tunnel}/rp_filter"), "2")?;
    let ipv6 = format!("{ROOT}/ipv6/conf");
    if !Path::new(&ipv6).exists() {
        tracing::warn!("this kernel has no IPv6: the tunnels will carry IPv4 only");
        return Ok(());
    }
    for entry in fs::read_dir(&ipv6).context("cannot list the IPv6 settings")? {
        let name = entry.context("cannot list the IPv6 settings")?.file_name();
        let name = name.to_string_lossy();
        let setting = format!("{ipv6}/{name}/accept_ra");
        if !["all", "lo", tunnel].contains(&name.as_ref()) && read(&setting).as_deref() == Some("1") {
            set(&setting, "2")?;
        }
    }
    set(&format!("{ipv6}/all/forwarding"), "1")
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|value| value.trim().to_owned())
}

/// Writes only what differs, so that a read-only `/proc/sys` that already has the right values is enough.
fn set(path: &str, value: &str) -> anyhow::Result<()> {
    if read(path).as_deref() == Some(value) {
        return Ok(());
    }
    fs::write(path, value).with_context(|| format!("cannot write {value} to {path}: allow it, or set it beforehand"))
}
