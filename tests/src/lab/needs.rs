//! What a lab needs of the computer it runs on, checked before anything is built.

use std::path::Path;

use anyhow::{Result, bail};

const TOOLS: [(&str, &str); 11] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("unshare", "util-linux"),
    ("nsenter", "util-linux"),
    ("sysctl", "procps"),
    ("ping", "iputils-ping"),
    ("fping", "fping"),
    ("curl", "curl"),
    ("wg", "wireguard-tools"),
    ("wg-quick", "wireguard-tools"),
    ("wireguard-go", "wireguard-go"),
];

pub(super) fn check() -> Result<()> {
    let mut missing = Vec::new();
    if !rustix::process::geteuid().is_root() {
        missing.push("root: network namespaces and TUN devices need it (run it under sudo)".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        missing.push("/dev/net/tun: the TUN driver (modprobe tun, or give the container the device)".to_owned());
    }
    if !Path::new("/proc/sys/net/ipv6").exists() {
        missing.push("IPv6: the kernel was started with it turned off (ipv6.disable=1)".to_owned());
    }
    for (tool, package) in TOOLS {
        if !in_path(tool) {
            missing.push(format!("{tool}: apt-get install {package}"));
        }
    }
    if !missing.is_empty() {
        bail!("the lab cannot be built here. Missing:\n  {}", missing.join("\n  "));
    }
    Ok(())
}

fn in_path(tool: &str) -> bool {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/bin"]
        .iter()
        .any(|folder| Path::new(folder).join(tool).exists())
}
