//! A program that runs in a machine, and how to end it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, kill_process};

use super::{Machine, eventually_some};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Kill,
    Terminate,
    Interrupt,
    Stop,
    Continue,
}

impl Signal {
    pub(super) fn flag(self) -> &'static str {
        match self {
            Self::Kill => "-KILL",
            Self::Terminate => "-TERM",
            Self::Interrupt => "-INT",
            Self::Stop => "-STOP",
            Self::Continue => "-CONT",
        }
    }
}

/// It lives until it ends by itself, is signalled, or its machine is switched off.
pub struct Process {
    name: String,
    log: PathBuf,
    pid_file: PathBuf,
    entered: Mutex<Child>,
}

impl Process {
    pub(super) fn start<'a>(
        machine: &Machine,
        name: &str,
        program: &str,
        arguments: impl IntoIterator<Item = &'a str>,
        environment: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self> {
        let log = machine.dir().join(format!("{name}.log"));
        let pid_file = machine.dir().join(format!("{name}.pid"));
        let _ = std::fs::remove_file(&pid_file);
        let output =
            File::options().create(true).append(true).open(&log).with_context(|| format!("open {}", log.display()))?;
        let entered = machine
            .command("sh")
            .args(["-c", r#"echo $$ > "$1.new"; mv "$1.new" "$1"; shift; exec "$@""#, "sh"])
            .arg(&pid_file)
            .arg(program)
            .args(arguments)
            .envs(environment)
            .stdout(Stdio::from(output.try_clone()?))
            .stderr(Stdio::from(output))
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let process = Self { name: name.to_owned(), log, pid_file, entered: Mutex::new(entered) };
        eventually_some("a process writes its id", 10, || Ok(process.pid_file.exists().then_some(())))?;
        Ok(process)
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its process id as its machine counts.
    pub fn pid(&self, machine: &Machine) -> Result<String> {
        machine.pid_from(&self.pid_file)
    }

    pub fn signal(&self, machine: &Machine, signal: Signal) -> Result<()> {
        machine.kill(signal, &self.pid(machine)?)?;
        if matches!(signal, Signal::Continue) {
            // Who entered the machine for it has stopped with it.
            let entered = self.entered.lock().expect("no holder of this lock panics");
            kill_process(Pid::from_child(&entered), rustix::process::Signal::CONT)?;
        }
        Ok(())
    }

    /// Sends `signal` and waits until the process has ended.
    pub fn end(&self, machine: &Machine, signal: Signal) -> Result<()> {
        self.signal(machine, signal)?;
        eventually_some(&format!("{} ends", self.name), 20, || Ok(self.exit_status()?.map(drop)))
    }

    /// How it ended, if it has.
    pub fn exit_status(&self) -> Result<Option<std::process::ExitStatus>> {
        Ok(self.entered.lock().expect("no holder of this lock panics").try_wait()?)
    }

    /// An error with the end of its log when it has ended.
    pub fn check_running(&self) -> Result<()> {
        if let Some(status) = self.exit_status()? {
            bail!("{} has ended ({status}): {}", self.name, self.last_lines(8));
        }
        Ok(())
    }

    /// The end of what it has written.
    pub fn last_lines(&self, count: usize) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }
}
