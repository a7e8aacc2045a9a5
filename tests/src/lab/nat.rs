//! Machines behind one that translates their addresses, as at home.

use anyhow::Result;

use super::{Lab, Machine, run_ip};

impl Lab {
    /// Boots machine `number` (1–250) behind `router`, whose addresses are all that the internet sees of it.
    pub fn machine_behind(&self, router: &Machine, number: u8) -> Result<Machine> {
        let machine = Machine::boot(&format!("{}-{number}", router.name()), self.dir())?;
        let port = format!("home{number}");
        let (inside, outside) = (machine.holder(), router.holder());
        run_ip(&["link", "add", "up0", "netns", &inside, "type", "veth", "peer", "name", &port, "netns", &outside])?;
        router.sh(&format!(
            "sysctl -qw net.ipv4.ip_forward=1
             ip addr add 192.168.{number}.1/24 dev {port}
             ip link set {port} up
             nft 'add table ip home; add chain ip home post {{ type nat hook postrouting priority 100; }}; flush chain ip home post; add rule ip home post oifname up0 masquerade'"
        ))?;
        machine.sh(&format!(
            "ip addr add 192.168.{number}.2/24 dev up0
             ip link set up0 up
             ip route add default via 192.168.{number}.1"
        ))?;
        Ok(machine)
    }
}
