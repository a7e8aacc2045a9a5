//! One WireGuard interface on a machine, run by the engine or by Debian's wireguard-go, and Debian's tools to speak to it.

mod account;
mod both;
mod flood;
mod keys;
mod load;

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

pub use account::{Account, closed};
pub use both::{Both, End, Inner, Outer};
pub use flood::{Flood, Hostility};
pub use keys::{Keys, preshared_key};
pub use load::Load;

use crate::lab::{Machine, Process, binary, eventually};
use crate::platform::uapi;

/// Which program runs an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Engine,
    /// The engine with these offloads left out, as `CVAULT_TUNNEL_WITHOUT` names them, whatever the tests' own environment says.
    EngineWithout(&'static str),
    WireguardGo,
}

/// It lives as long as its process; the machine outlives it.
pub struct Tunnel {
    interface: String,
    process: Process,
}

impl Tunnel {
    /// Starts the program in the foreground and waits until its socket answers.
    pub fn start(machine: &Machine, program: Program, interface: &str) -> Result<Self> {
        let process = match program {
            Program::Engine => Self::spawn_engine(machine, interface, &[], None)?,
            Program::EngineWithout(offloads) => Self::spawn_engine(machine, interface, &[], Some(offloads))?,
            Program::WireguardGo => machine.spawn(interface, "wireguard-go", ["-f", interface], [])?,
        };
        Self::answering(machine, interface, process)
    }

    /// The same; an engine journals its removed peers.
    pub fn start_counting(machine: &Machine, program: Program, interface: &str) -> Result<Self> {
        match program {
            Program::Engine => Self::start_with_state(machine, interface, &[], None),
            Program::EngineWithout(offloads) => Self::start_with_state(machine, interface, &[], Some(offloads)),
            Program::WireguardGo => Self::start(machine, program, interface),
        }
    }

    /// The engine as the agent starts it: interface and counters outlive the process.
    pub fn start_persistent(machine: &Machine, interface: &str) -> Result<Self> {
        Self::start_with_state(machine, interface, &["--persist"], None)
    }

    fn start_with_state(machine: &Machine, interface: &str, options: &[&str], without: Option<&str>) -> Result<Self> {
        let state = Self::state(machine, interface);
        std::fs::create_dir_all(&state)?;
        let state = state.display().to_string();
        let options = [&["--state-dir", state.as_str()], options].concat();
        let process = Self::spawn_engine(machine, interface, &options, without)?;
        Self::answering(machine, interface, process)
    }

    /// Where an engine that was started so keeps its counters and its journal.
    #[must_use]
    pub fn state(machine: &Machine, interface: &str) -> PathBuf {
        machine.dir().join(format!("{interface}.state"))
    }

    fn spawn_engine(machine: &Machine, interface: &str, options: &[&str], without: Option<&str>) -> Result<Process> {
        let arguments = ["tunnel", "--foreground"].iter().chain(options).copied().chain([interface]);
        let log = [("CVAULT_LOG", "debug"), ("CVAULT_LOG_FORMAT", "text")];
        let without = without.map(|offloads| ("CVAULT_TUNNEL_WITHOUT", offloads));
        machine.spawn(interface, &binary("cvault-node-agent")?, arguments, log.into_iter().chain(without))
    }

    fn answering(machine: &Machine, interface: &str, process: Process) -> Result<Self> {
        let tunnel = Self { interface: interface.to_owned(), process };
        eventually("the tunnel answers", 10, || {
            tunnel.process.check_running()?;
            tunnel.get(machine)
        })?;
        Ok(tunnel)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The whole answer to `get=1`.
    pub fn get(&self, machine: &Machine) -> Result<String> {
        uapi(machine, &self.interface, "get=1\n\n")
    }

    /// One `set=1`; an error when it is refused.
    pub fn set(&self, machine: &Machine, lines: &str) -> Result<()> {
        let answer = uapi(machine, &self.interface, &format!("set=1\n{lines}\n"))?;
        ensure!(answer.trim() == "errno=0", "the tunnel refused: {answer}");
        Ok(())
    }

    /// The sum of a key over the device or all its peers.
    pub fn figure(&self, machine: &Machine, name: &str) -> Result<u64> {
        let text = self.get(machine)?;
        let values: Vec<u64> =
            text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')?.parse().ok()).collect();
        ensure!(!values.is_empty(), "no {name} in {text}");
        Ok(values.iter().sum())
    }

    /// The value of a key of one peer.
    pub fn peer(&self, machine: &Machine, keys: &Keys, name: &str) -> Result<Option<String>> {
        Ok(value(&self.section(machine, keys)?, name).map(str::to_owned))
    }

    pub fn last_handshake(&self, machine: &Machine, keys: &Keys) -> Result<Option<SystemTime>> {
        // Of one answer: between two there may be a handshake.
        let section = self.section(machine, keys)?;
        let part = |name| -> Result<u64> { Ok(value(&section, name).unwrap_or_default().parse()?) };
        let since = Duration::from_secs(part("last_handshake_time_sec")?)
            + Duration::from_nanos(part("last_handshake_time_nsec")?);
        Ok((!since.is_zero()).then(|| UNIX_EPOCH + since))
    }

    /// What is told of one peer.
    fn section(&self, machine: &Machine, keys: &Keys) -> Result<String> {
        let text = self.get(machine)?;
        let section = text.split("public_key=").find(|section| section.starts_with(&keys.public_hex));
        Ok(section.context("no such peer")?.to_owned())
    }

    /// `wg set <interface> …`.
    pub fn wg_set(&self, machine: &Machine, arguments: &str) -> Result<()> {
        machine.sh(&format!("wg set {} {arguments}", self.interface)).map(drop)
    }

    /// One column of `wg show <interface> <what>` by public key.
    pub fn shown(&self, machine: &Machine, what: &str, keys: &Keys) -> Result<String> {
        let text = machine.run("wg", ["show", &self.interface, what])?;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix(&keys.public) {
                return Ok(rest.trim().to_owned());
            }
        }
        bail!("wg show {what} has no such peer: {text}")
    }

    /// `wg setconf`, or `addconf` or `syncconf`, with this text.
    pub fn load(&self, machine: &Machine, how: &str, text: &str) -> Result<()> {
        let file = secret_file(machine, &format!("{}.{how}", self.interface), text)?;
        machine.run("wg", [how, &self.interface, &file]).map(drop)
    }
}

fn value<'a>(section: &'a str, name: &str) -> Option<&'a str> {
    section.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

/// Writes what only root may read into the machine's folder; its path.
pub fn secret_file(machine: &Machine, name: &str, text: &str) -> Result<String> {
    let path = machine.dir().join(name);
    let mut options = std::fs::File::options();
    options.write(true).create(true).truncate(true).mode(0o600).open(&path)?.write_all(text.as_bytes())?;
    Ok(path.display().to_string())
}
