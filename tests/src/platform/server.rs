//! A server machine with the node agent on it.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::client::{Counters, dropped, uapi};
use super::control::{self, Control};
use crate::lab::{self, Addresses, Lab, Machine, Network, Process, Signal, eventually};

/// The tunnel's interface on a server.
pub(super) const INTERFACE: &str = "cv0";

pub struct Server {
    pub id: String,
    pub addresses: Addresses,
    number: u8,
    machine: Machine,
    program: String,
    state_dir: PathBuf,
    agent: Process,
}

/// The kernel's counters, and the engine's count of the packets of peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    kernel: Counters,
    rx_packets: u64,
    tx_packets: u64,
    /// Bytes of headers that merging saved, and that splitting added.
    merged: u64,
    split: u64,
    /// From peer to peer, past the kernel.
    hairpin: u64,
    /// What the kernel or a peer handed to the engine and no peer got: multicast of the server's own, for one.
    not_sent: u64,
}

impl Tally {
    /// What the kernel counted, with the packets that it or the engine aggregates (TSO, GRO) counted as they are on the wire.
    ///
    /// An aggregate is one packet with one header to the kernel; the engine tells how many it was, and what the headers of the
    /// others are. The tunnel's process must be the same.
    pub fn on_wire_since(self, before: Self) -> Counters {
        let since = |of: fn(&Self) -> u64| of(&self) - of(&before);
        let kernel = self.kernel - before.kernel;
        let hairpin = since(|tally| tally.hairpin);
        Counters {
            rx_bytes: kernel.rx_bytes + since(|tally| tally.merged) + hairpin,
            tx_bytes: kernel.tx_bytes + since(|tally| tally.split) + hairpin - since(|tally| tally.not_sent),
            rx_packets: since(|tally| tally.rx_packets),
            tx_packets: since(|tally| tally.tx_packets),
        }
    }
}

impl Server {
    pub(super) fn join(lab: &Lab, control: &Control, number: u8) -> Result<Self> {
        let (machine, addresses) = lab.machine(&format!("server{number}"), Network::Servers, 9 + number)?;
        let created = control.admin([
            "server",
            "create",
            "--name",
            machine.name(),
            "--region",
            "lab-1",
            "--public-ip",
            &addresses.v4,
        ])?;
        let id = created["server_id"].as_str().context("server create printed no server_id")?.to_owned();
        let token = created["token"].as_str().context("server create printed no token")?;
        lab.secret("server token", token);
        let program = lab::binary("cvault-node-agent")?;
        let state_dir = machine.dir().join("state");
        let folder = state_dir.display().to_string();
        machine.run(
            &program,
            ["enroll", "--control-plane", &control::node_endpoint(), "--token", token, "--state-dir", &folder],
        )?;
        let agent = start_agent(&machine, &program, &folder)?;
        let server = Self { id, addresses, number, machine, program, state_dir, agent };
        server.wait_until_up()?;
        let key = eventually("the server's tunnel has its private key", 10, || {
            let key = server.machine.run("wg", ["show", INTERFACE, "private-key"])?;
            ensure!(key.trim().len() == 44, "{INTERFACE} has none");
            Ok(key)
        })?;
        lab.secret("the server's private key", key.trim());
        Ok(server)
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The engine answers and the interface exists.
    pub fn wait_until_up(&self) -> Result<()> {
        eventually("the server's tunnel is up", 30, || {
            if let Err(ended) = self.agent.check_running() {
                return Ok(Err(ended));
            }
            self.machine.run("wg", ["show", INTERFACE, "listen-port"])?;
            self.counters()?;
            Ok(Ok(()))
        })?
    }

    /// What the kernel counted on the tunnel's interface.
    pub fn counters(&self) -> Result<Counters> {
        Counters::read(&self.machine, INTERFACE)
    }

    /// What kernel and engine have counted on the tunnel's interface.
    pub fn tally(&self) -> Result<Tally> {
        let kernel = self.counters()?;
        let text = uapi(&self.machine, INTERFACE, "get=1\n\n")?;
        let sum = |name: &str| -> u64 {
            text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok()).sum()
        };
        let not_sent = text.lines().filter_map(|line| {
            let (_, bytes) = line.strip_prefix("cvault_dropped_bytes_tx_")?.split_once('=')?;
            bytes.parse::<u64>().ok()
        });
        Ok(Tally {
            kernel,
            rx_packets: sum("cvault_rx_packets"),
            tx_packets: sum("cvault_tx_packets"),
            merged: sum("cvault_tun_merged_bytes"),
            split: sum("cvault_tun_split_bytes"),
            hairpin: sum("cvault_hairpin_bytes"),
            not_sent: not_sent.sum(),
        })
    }

    /// As `Tally::on_wire_since`, from the beginning.
    pub fn counters_on_wire(&self) -> Result<Counters> {
        Ok(self.tally()?.on_wire_since(Tally::default()))
    }

    /// How many packets the engine has dropped for `reason`.
    pub fn dropped(&self, reason: &str) -> Result<u64> {
        dropped(&self.machine, INTERFACE, reason)
    }

    /// The peers' public keys, as `wg show` tells.
    pub fn peers(&self) -> Result<Vec<String>> {
        Ok(self.machine.run("wg", ["show", INTERFACE, "peers"])?.split_whitespace().map(str::to_owned).collect())
    }

    /// Kills the control process only.
    pub fn kill_agent(&self) -> Result<()> {
        self.agent.end(&self.machine, Signal::Kill)
    }

    /// Asks the control process to end, as an upgrade does.
    pub fn stop_agent(&self) -> Result<()> {
        self.agent.end(&self.machine, Signal::Terminate)
    }

    pub fn start_agent(&mut self) -> Result<()> {
        self.agent = start_agent(&self.machine, &self.program, &self.state_dir.display().to_string())?;
        Ok(())
    }

    pub fn tunnel_pid(&self) -> Result<String> {
        self.machine.pid_from(&self.state_dir.join("tunnel.pid"))
    }

    /// Kills the tunnel process only.
    pub fn kill_tunnel(&self) -> Result<()> {
        self.machine.kill(Signal::Kill, &self.tunnel_pid()?)
    }

    /// Power off without warning, then boot with the same addresses and disk, and start the agent.
    pub fn reboot(self, lab: &Lab) -> Result<Self> {
        let Self { id, number, machine, program, state_dir, agent, .. } = self;
        drop(agent);
        drop(machine);
        let (machine, addresses) = lab.machine(&format!("server{number}"), Network::Servers, 9 + number)?;
        let agent = start_agent(&machine, &program, &state_dir.display().to_string())?;
        let server = Self { id, addresses, number, machine, program, state_dir, agent };
        server.wait_until_up()?;
        Ok(server)
    }
}

fn start_agent(machine: &Machine, program: &str, state_dir: &str) -> Result<Process> {
    machine.spawn(
        "node-agent",
        program,
        ["run", "--state-dir", state_dir, "--interface", INTERFACE, "--metrics-listen", "127.0.0.1:9090"],
        [("CVAULT_LOG", "trace"), ("CVAULT_LOG_FORMAT", "text")],
    )
}
