//! A lab: an "internet" in the middle, a control machine, servers and clients around it, all on one computer.
//!
//! ```text
//!  clients 192.0.2.0/24, 2001:db8:1::/64 ─┐              ┌─ servers 203.0.113.0/24, 2001:db8:2::/64
//!                                         ├─ internet ───┤
//!  services 198.51.100.0/24, 2001:db8:3::/64 (.10 HTTP, .53 DNS, .2 the control machine)
//! ```
//!
//! Every machine is a set of anonymous namespaces held by one process, so nothing of a lab is visible outside it, any
//! number of labs run side by side with the same addresses, and when the program that built a lab ends, in whatever
//! way, the kernel ends every process of the lab with it. Only the folder of logs has a name; a later lab sweeps it.

mod expose;
mod folder;
mod interrupt;
mod machine;
mod nat;
mod needs;
mod pair;
mod process;
mod wait;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};

pub use folder::binary;
pub use interrupt::await_interrupt;
pub use machine::Machine;
pub use pair::{CLIENT_V4, Pair, SERVER_V4};
pub use process::{Process, Signal};
pub use wait::{eventually, eventually_some, promptly, quiescent};

/// Where the lab's HTTP server answers.
pub const HTTP_V4: &str = "198.51.100.10";
pub const HTTP_V6: &str = "2001:db8:3::10";
/// Where the lab's DNS server answers.
pub const DNS_V4: &str = "198.51.100.53";
pub const DNS_V6: &str = "2001:db8:3::53";
/// The control machine.
pub const CONTROL_V4: &str = "198.51.100.2";

/// The network a machine is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    Clients,
    Servers,
    Services,
}

impl Network {
    fn bridge(self) -> &'static str {
        match self {
            Self::Clients => "clients",
            Self::Servers => "servers",
            Self::Services => "services",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Clients => 1,
            Self::Servers => 2,
            Self::Services => 3,
        }
    }

    fn v4_prefix(self) -> &'static str {
        match self {
            Self::Clients => "192.0.2",
            Self::Servers => "203.0.113",
            Self::Services => "198.51.100",
        }
    }

    fn v6_prefix(self) -> &'static str {
        match self {
            Self::Clients => "2001:db8:1:",
            Self::Servers => "2001:db8:2:",
            Self::Services => "2001:db8:3:",
        }
    }
}

/// The addresses of a machine on its network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    pub v4: String,
    pub v6: String,
}

impl Addresses {
    fn of(network: Network, host: u8) -> Self {
        Self { v4: format!("{}.{host}", network.v4_prefix()), v6: format!("{}:{host}", network.v6_prefix()) }
    }
}

/// The internet and the folder of one lab. Machines belong to whoever asked for them.
pub struct Lab {
    internet: Machine,
    ports: AtomicU32,
    secrets: Mutex<Vec<Secret>>,
    // last: it is removed when no machine writes to it any more
    folder: folder::Folder,
}

struct Secret {
    what: String,
    forms: Vec<String>,
}

impl Lab {
    /// Builds the internet machine and starts its HTTP and DNS servers.
    pub fn build() -> Result<Self> {
        needs::check()?;
        interrupt::watch()?;
        let folder = folder::Folder::create()?;
        let internet = Machine::boot("internet", folder.path())?;
        internet.sh(INTERNET)?;
        let servers = internet.spawn("services", &binary("cvault-lab")?, ["internet"], [])?;
        let lab = Self { internet, ports: AtomicU32::new(0), secrets: Mutex::new(Vec::new()), folder };
        eventually("the lab's HTTP server answers", 10, || {
            if let Err(ended) = servers.check_running() {
                return Ok(Err(ended));
            }
            lab.internet.sh(&format!("curl -sf -m 2 http://{HTTP_V4}/ip")).map(|_| Ok(()))
        })
        .and_then(|up| up)
        .inspect_err(|_| lab.print_logs())?;
        Ok(lab)
    }

    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    pub fn internet(&self) -> &Machine {
        &self.internet
    }

    /// Keep logs and folder after the lab has ended.
    pub fn keep_folder(&mut self) {
        self.folder.keep();
    }

    /// Boots a machine and connects it to `network` with the host number `host`.
    pub fn machine(&self, name: &str, network: Network, host: u8) -> Result<(Machine, Addresses)> {
        let machine = Machine::boot(name, self.dir())?;
        let addresses = Addresses::of(network, host);
        let gateway = Addresses::of(network, 1);
        // A machine that boots again has the hardware address it had before; its old port may still be on its way out.
        let hardware = format!("02:00:00:00:{:02x}:{host:02x}", network.number());
        let port = format!("port{}", self.ports.fetch_add(1, Ordering::Relaxed));
        run_ip(&[
            "link",
            "add",
            "up0",
            "address",
            &hardware,
            "netns",
            &machine.holder(),
            "type",
            "veth",
            "peer",
            "name",
            &port,
            "netns",
            &self.internet.holder(),
        ])?;
        self.internet.sh(&format!("ip link set {port} master {} up", network.bridge()))?;
        machine.sh(&format!(
            "ip link set up0 up
             ip addr add {v4}/24 dev up0
             ip -6 addr add {v6}/64 dev up0 nodad
             ip route add default via {gateway4}
             ip -6 route add default via {gateway6}",
            v4 = addresses.v4,
            v6 = addresses.v6,
            gateway4 = gateway.v4,
            gateway6 = gateway.v6,
        ))?;
        Ok((machine, addresses))
    }

    /// Remembers a value that must never appear in a log, a key in none of its usual forms.
    pub fn secret(&self, what: &str, value: &str) {
        if value.len() >= 8 {
            self.secrets
                .lock()
                .expect("no holder of this lock panics")
                .push(Secret { what: what.to_owned(), forms: forms(value) });
        }
    }

    /// Fails when any log of any process holds a remembered secret; says which, where, never the value.
    pub fn check_logs_hold_no_secret(&self) -> Result<usize> {
        let secrets = self.secrets.lock().expect("no holder of this lock panics");
        let mut hits = Vec::new();
        for log in self.logs()? {
            let text = std::fs::read(&log).with_context(|| format!("read {}", log.display()))?;
            let text = String::from_utf8_lossy(&text);
            for secret in secrets.iter() {
                if let Some(line) = text.lines().position(|line| secret.forms.iter().any(|form| line.contains(form))) {
                    hits.push(format!("{} in {} line {}", secret.what, log.display(), line + 1));
                }
            }
        }
        if !hits.is_empty() {
            self.copy_logs_aside();
            bail!("secrets in logs:\n  {}", hits.join("\n  "));
        }
        Ok(secrets.len())
    }

    /// Every log file of the lab: of processes it started, and those they wrote below their own folders.
    pub fn logs(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        folder::find_logs(self.dir(), &mut found)?;
        found.sort();
        Ok(found)
    }

    /// Prints the end of every log on standard error.
    pub fn print_logs(&self) {
        self.copy_logs_aside();
        for log in self.logs().unwrap_or_default() {
            folder::print_tail(&log, 25);
        }
    }

    fn copy_logs_aside(&self) {
        if let Ok(folder) = std::env::var("CVAULT_LAB_LOGS") {
            let _ = std::process::Command::new("cp").args(["-r", "--"]).arg(self.dir()).arg(folder).status();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
    }
}

/// How a value may be written: as it is, and a key of 32 bytes as hex, base64 and base64url, padded or not.
fn forms(value: &str) -> Vec<String> {
    let key = hex::decode(value).or_else(|_| STANDARD.decode(value)).unwrap_or_default();
    if key.len() != 32 {
        return vec![value.to_owned()];
    }
    vec![hex::encode(&key), hex::encode_upper(&key), STANDARD_NO_PAD.encode(&key), URL_SAFE_NO_PAD.encode(&key)]
}

/// Bridges and addresses of the internet machine; it routes between its three networks.
const INTERNET: &str = "
sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
for network in 'clients 192.0.2.1 2001:db8:1::1 1' 'servers 203.0.113.1 2001:db8:2::1 2' 'services 198.51.100.1 2001:db8:3::1 3'; do
  set -- $network
  # a bridge without an address of its own changes it as ports come and go, and neighbours lose packets
  ip link add $1 address 02:00:00:00:0$4:01 type bridge
  ip link set $1 up
  ip addr add $2/24 dev $1
  ip -6 addr add $3/64 dev $1 nodad
done
for host in 10 53; do
  ip addr add 198.51.100.$host/24 dev services
  ip -6 addr add 2001:db8:3::$host/64 dev services nodad
done
";

fn run_ip(arguments: &[&str]) -> Result<()> {
    let output = std::process::Command::new("ip").args(arguments).output().context("run ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_in_each_of_its_forms_and_other_secrets_as_they_are() {
        let hex = "fb".repeat(32);
        let base64 = STANDARD.encode([0xfb; 32]);
        assert_eq!(forms(&hex), forms(&base64));
        assert!(base64.starts_with(&forms(&hex)[2]) && base64.contains('+'));
        assert!(forms(&hex)[3].starts_with("-_v7"), "{:?}", forms(&hex));
        assert_eq!(forms("cvs_something"), ["cvs_something"]);
    }
}
