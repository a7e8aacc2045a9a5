//! One engine that runs on a machine: its control socket, its CPU time, its memory.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use cvault_tests::lab::{Machine, Process, Signal, eventually};

use crate::engine::Engine;

pub(crate) const INTERFACE: &str = "cv0";
const SOCKET_DIR: &str = "/run/wireguard";
const SOCKET: &str = "cv0.sock";
/// What the daemons' own standard is (WireGuard over IPv6 in Ethernet).
const MTU: u32 = 1420;
/// An answer to anything but a change of many peers.
pub(crate) const SOON: Duration = Duration::from_secs(30);
const ENVIRONMENT: [(&str, &str); 3] = [("WG_PROCESS_FOREGROUND", "1"), ("LOG_LEVEL", "error"), ("CVAULT_LOG", "warn")];
const CHUNK: usize = 64 * 1024;

pub(crate) struct Daemon<'m> {
    machine: &'m Machine,
    process: Process,
    pid: String,
    state_dir: PathBuf,
}

/// See [`Daemon::beside`]. The process is in that directory until this is dropped. From outside the machine the way to the socket,
/// through `/proc`, takes a tenth of the time of a small change.
pub(crate) struct Beside<'d> {
    daemon: &'d Daemon<'d>,
    before: PathBuf,
}

impl Beside<'_> {
    /// As [`Daemon::set`].
    pub(crate) fn set(&self, request: &str, limit: Duration) -> Result<Duration> {
        self.daemon.set_at(Path::new(SOCKET), request, limit)
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        // What is written later has paths relative to it, and says so if it is gone.
        let _ = std::env::set_current_dir(&self.before);
    }
}

impl<'m> Daemon<'m> {
    /// Starts it, waits for its control socket, and gives its interface an address.
    pub(crate) fn start(engine: &Engine, machine: &'m Machine, address: &str) -> Result<Self> {
        let state_dir = machine.dir().join("state");
        std::fs::create_dir_all(&state_dir)?;
        let folder = state_dir.display().to_string();
        let process = machine.spawn("engine", &engine.path, engine.arguments(INTERFACE, &folder), ENVIRONMENT)?;
        let pid = process.pid(machine)?;
        let daemon = Self { machine, process, pid, state_dir };
        eventually("the engine answers on its control socket", 10, || {
            daemon.process.check_running()?;
            daemon.exchange(&daemon.socket(), b"get=1\n\n", SOON).map(drop)
        })
        .with_context(|| format!("start {}", engine.name))?;
        machine.sh(&format!("ip addr add {address}/24 dev {INTERFACE}\nip link set {INTERFACE} mtu {MTU} up"))?;
        Ok(daemon)
    }

    /// One change; the time until it was answered.
    pub(crate) fn set(&self, request: &str, limit: Duration) -> Result<Duration> {
        self.set_at(&self.socket(), request, limit)
    }

    /// A client in the directory of the control socket.
    pub(crate) fn beside(&self) -> Result<Beside<'_>> {
        let before = std::env::current_dir()?;
        std::env::set_current_dir(self.machine.path(SOCKET_DIR))?;
        Ok(Beside { daemon: self, before })
    }

    fn socket(&self) -> PathBuf {
        self.machine.path(&format!("{SOCKET_DIR}/{SOCKET}"))
    }

    fn set_at(&self, socket: &Path, request: &str, limit: Duration) -> Result<Duration> {
        let (took, answer) = self.exchange(socket, request.as_bytes(), limit)?;
        let answer = String::from_utf8_lossy(&answer);
        if answer.trim() != "errno=0" {
            bail!("the engine refused a change: {}", answer.trim());
        }
        Ok(took)
    }

    /// Reads everything; the time until it was there.
    pub(crate) fn get(&self) -> Result<Duration> {
        let (took, answer) = self.exchange(&self.socket(), b"get=1\n\n", SOON)?;
        if !answer.ends_with(b"errno=0\n\n") {
            bail!("a read of the configuration failed");
        }
        Ok(took)
    }

    /// One exchange on a connection of its own.
    fn exchange(&self, socket: &Path, request: &[u8], limit: Duration) -> Result<(Duration, Vec<u8>)> {
        let mut block = vec![0; CHUNK];
        let started = Instant::now();
        let mut socket = UnixStream::connect(socket).context("connect to the control socket")?;
        let left = || {
            let left = limit.saturating_sub(started.elapsed());
            if left.is_zero() { Err(std::io::Error::from(ErrorKind::TimedOut)) } else { Ok(Some(left)) }
        };
        let mut talk = || -> std::io::Result<Vec<u8>> {
            for chunk in request.chunks(CHUNK) {
                socket.set_write_timeout(left()?)?;
                match socket.write_all(chunk) {
                    // It has heard enough: the answer says why.
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
                    written => written?,
                }
            }
            let mut answer = Vec::new();
            while !is_complete(&answer) {
                socket.set_read_timeout(left()?)?;
                match socket.read(&mut block)? {
                    0 => return Err(std::io::Error::other("closed without an answer")),
                    length => answer.extend_from_slice(&block[..length]),
                }
            }
            Ok(answer)
        };
        let answer = talk().map_err(|error| {
            let is_late = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            if is_late {
                anyhow!("no answer within {} s", limit.as_secs())
            } else {
                anyhow!("the control socket: {error}")
            }
        })?;
        Ok((started.elapsed(), answer))
    }

    /// CPU time of all its threads, by the scheduler's clock: `stat` counts in hundredths of a second, which is more than
    /// an idle engine takes while it is watched.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        let mut nanoseconds = 0;
        let tasks = self.machine.path(&format!("/proc/{}/task", self.pid));
        for task in std::fs::read_dir(&tasks).context("the engine has ended")? {
            // A thread may end between the listing and the reading.
            if let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) {
                nanoseconds += run_time(&text).context("schedstat has no run time")?;
            }
        }
        Ok(Duration::from_nanos(nanoseconds).as_secs_f64())
    }

    /// CPU time from now on.
    pub(crate) fn cpu_from_now(&self) -> Result<impl Fn() -> Result<f64>> {
        let before = self.cpu_seconds()?;
        Ok(move || Ok(self.cpu_seconds()? - before))
    }

    /// Resident memory, bytes.
    pub(crate) fn resident_bytes(&self) -> Result<f64> {
        let path = self.machine.path(&format!("/proc/{}/smaps_rollup", self.pid));
        let text = std::fs::read_to_string(&path).context("the engine has ended")?;
        let kilobytes = resident_kilobytes(&text).context("smaps_rollup has no Rss")?;
        Ok(kilobytes * 1024.0)
    }

    /// Where ours keeps its counters.
    pub(crate) fn state_dir(&self) -> &std::path::Path {
        &self.state_dir
    }

    /// Fails when it has not survived the measurement.
    pub(crate) fn check_running(&self) -> Result<()> {
        self.process.check_running()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // The machine would end it too, but not wait for the memory of it to be free.
        let _ = self.process.end(self.machine, Signal::Kill);
    }
}

fn is_complete(answer: &[u8]) -> bool {
    let tail = &answer[answer.len().saturating_sub(32)..];
    answer.ends_with(b"\n\n") && tail.windows(6).any(|window| window == b"errno=")
}

/// The first word of `schedstat`.
fn run_time(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

fn resident_kilobytes(text: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix("Rss:"))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_complete_with_its_errno_and_an_empty_line() {
        assert!(is_complete(b"errno=0\n\n"));
        assert!(is_complete(b"private_key=00\nerrno=-22\n\n"));
        assert!(!is_complete(b"errno=0\n"));
        assert!(!is_complete(b"public_key=00\n\n"));
        assert!(!is_complete(b""));
    }

    #[test]
    fn the_kernels_figures_are_read() {
        assert_eq!(run_time("123456789 42 7\n"), Some(123_456_789));
        let rollup = "55d0-7fff ---p 00000000 00:00 0 [rollup]\nRss:                1524 kB\nPss:  301 kB\n";
        assert_eq!(resident_kilobytes(rollup), Some(1524.0));
        assert_eq!(resident_kilobytes("Pss: 3 kB\n"), None);
    }
}
