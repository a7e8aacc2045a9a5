//! What figures must be read with: the commit and the machine.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The kernel counts the time of all processors in these.
const TICKS_PER_SECOND: f64 = 100.0;
const LOOK: Duration = Duration::from_millis(500);
/// Of one processor: less than this is no disturbance.
const QUIET: f64 = 0.2;

pub(crate) struct Host {
    pub(crate) commit: String,
    pub(crate) machine: String,
}

impl Host {
    /// Of the repository at `root`. What cannot be told is said so.
    pub(crate) fn read(root: &Path) -> Self {
        let git = |arguments: &[&str]| {
            let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let mut commit = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
        if git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|changes| !changes.is_empty()) {
            commit.push_str(" with changes");
        }
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            commit,
            machine: machine(&read("/proc/cpuinfo"), &read("/proc/meminfo"), &read("/proc/sys/kernel/osrelease")),
        }
    }
}

/// Waits, at most `limit`, until the computer does little; whether it does.
pub(crate) fn quiet(limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let before = Processors::now()?.busy;
        std::thread::sleep(LOOK);
        if Processors::now()?.busy - before < QUIET * LOOK.as_secs_f64() {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
    }
}

/// The time of all processors until now, seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Processors {
    /// Waiting for a disk is idle.
    idle: f64,
    busy: f64,
    /// Of the busy time, what the host of a virtual machine kept from it (`steal`).
    kept: f64,
}

impl Processors {
    pub(crate) fn now() -> Result<Self> {
        Self::parse(&std::fs::read_to_string("/proc/stat")?).context("/proc/stat has no processor time")
    }

    /// Which part of all time since then the host has kept, 0 to 1.
    pub(crate) fn kept_since(self) -> Result<f64> {
        let now = Self::now()?;
        let whole = now.idle + now.busy - self.idle - self.busy;
        Ok((now.kept - self.kept) / whole.max(1.0 / TICKS_PER_SECOND))
    }

    /// The line of all processors.
    fn parse(stat: &str) -> Option<Self> {
        let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
        let seconds = |field: &str| field.parse::<f64>().ok().map(|ticks| ticks / TICKS_PER_SECOND);
        let fields: Vec<f64> = fields.map(seconds).collect::<Option<_>>()?;
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = fields[..] else { return None };
        Some(Self { idle: idle + iowait, busy: user + nice + system + irq + softirq + steal, kept: steal })
    }
}

fn machine(cpuinfo: &str, meminfo: &str, release: &str) -> String {
    let value = |text: &str, name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, v)| v.trim().to_owned())
    };
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let model = value(cpuinfo, "model name").unwrap_or_else(|| "unknown processor".to_owned());
    let kilobytes =
        value(meminfo, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok()).unwrap_or(0);
    format!("{cores} cores ({model}), {} GiB, kernel {}", kilobytes.div_ceil(1 << 20), release.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_somebody_used_is_busy() {
        let stat = "cpu  100 10 50 90000 400 0 20 20 0 0\ncpu0 1 1 1 1\n";
        assert_eq!(Processors::parse(stat), Some(Processors { idle: 904.0, busy: 2.0, kept: 0.2 }));
        assert_eq!(Processors::parse("cpu  1 2 3\n"), None);
    }

    #[test]
    fn a_machine_is_described_by_cores_model_memory_and_kernel() {
        let cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n";
        let text = machine(cpuinfo, "MemTotal:       24576000 kB\n", "6.18.44\n");
        assert_eq!(text, "2 cores (AMD EPYC), 24 GiB, kernel 6.18.44");
    }
}
