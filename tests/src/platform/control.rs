//! The control machine: `cvault-control-plane dev` with its own PostgreSQL.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::http::{Http, Request};
use crate::lab::{self, CONTROL_V4, DNS_V4, DNS_V6, Lab, Machine, Network, Process, Signal, eventually};

const READY_SECONDS: u64 = 60;

/// Settings that tests change; the rest is the product's default.
#[derive(Clone, Debug)]
pub struct ControlOptions {
    pub quarantine_seconds: u32,
    pub rate_limit_per_minute: u32,
    pub log: String,
}

impl Default for ControlOptions {
    fn default() -> Self {
        Self { quarantine_seconds: 60, rate_limit_per_minute: 1_000_000, log: "trace".to_owned() }
    }
}

pub struct Control {
    machine: Machine,
    program: String,
    data_dir: PathBuf,
    options: ControlOptions,
    process: Mutex<Process>,
}

/// Where the API is, within the lab.
pub(super) fn url() -> &'static str {
    "http://198.51.100.2:8080"
}

pub(super) fn node_endpoint() -> String {
    format!("{CONTROL_V4}:8443")
}

impl Control {
    pub(super) fn start(lab: &Lab, options: ControlOptions) -> Result<Self> {
        let (machine, _) = lab.machine("control", Network::Services, 2)?;
        let program = lab::binary("cvault-control-plane")?;
        let data_dir = machine.dir().join("data");
        let process = start_dev(&machine, &program, &data_dir, &options)?;
        Ok(Self { machine, program, data_dir, options, process: Mutex::new(process) })
    }

    pub(super) fn wait_until_ready(&self, http: &Http) -> Result<()> {
        eventually("the control plane is ready", READY_SECONDS, || {
            if let Err(ended) = self.with_process(Process::check_running) {
                return Ok(Err(ended));
            }
            http.send(&Request::get("/health/ready"))?.expect(200)?;
            Ok(Ok(()))
        })?
    }

    /// The key-encryption key must not be in a log either.
    pub(super) fn remember_key(&self, lab: &Lab) -> Result<()> {
        let file = self.data_dir.join("kek");
        let key = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        ensure!(key.trim().len() == 64, "{} does not hold 64 hexadecimal digits", file.display());
        lab.secret("key-encryption key", key.trim());
        Ok(())
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Runs `admin … --json` and returns its one object.
    pub fn admin<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Value> {
        let data_dir = self.data_dir.display().to_string();
        let mut command = self.machine.command(&self.program);
        command
            .args(["admin", "--data-dir", &data_dir])
            .args(arguments)
            .arg("--json")
            .env("CVAULT_LOG", "warn")
            .env("CVAULT_PUBLIC_URL", url());
        let output = self.machine.finish("cvault-control-plane admin", command)?;
        serde_json::from_str(output.trim()).with_context(|| format!("admin printed no JSON: {output}"))
    }

    /// Kills the control plane's process; its PostgreSQL stays, as after a crash.
    pub fn kill(&self) -> Result<()> {
        self.with_process(|process| process.end(&self.machine, Signal::Kill))
    }

    pub fn restart(&self, http: &Http) -> Result<()> {
        let process = start_dev(&self.machine, &self.program, &self.data_dir, &self.options)?;
        *self.process.lock().expect("no holder of this lock panics") = process;
        self.wait_until_ready(http)
    }

    /// Kills PostgreSQL's first process and everything of the cluster with it, as the kernel would for lack of memory.
    pub fn kill_postgres(&self) -> Result<()> {
        let pid = self.machine.pid_from(&self.data_dir.join("pg/postmaster.pid"))?;
        // some of its children may have ended by themselves in between
        self.machine.sh(&format!("kill -KILL {pid} $(pgrep -P {pid}) || true"))?;
        eventually("PostgreSQL has ended", 10, || {
            self.machine.sh(&format!("case \"$(ps -o stat= -p {pid} || true)\" in ''|Z*) ;; *) exit 1 ;; esac"))
        })?;
        Ok(())
    }

    /// Asks the database as its superuser; rows as lines, columns separated by `|`.
    pub fn sql(&self, query: &str) -> Result<String> {
        let socket = self.data_dir.join("run");
        let port = socket_port(&socket)?;
        let mut command = self.machine.command(psql_program()?.as_str());
        command
            .args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "cvault"])
            .arg("-h")
            .arg(&socket)
            .args(["-p", &port, "-c", query]);
        Ok(self.machine.finish("psql", command)?.trim().to_owned())
    }

    fn with_process<T>(&self, action: impl FnOnce(&Process) -> Result<T>) -> Result<T> {
        action(&self.process.lock().expect("no holder of this lock panics"))
    }
}

fn start_dev(machine: &Machine, program: &str, data_dir: &Path, options: &ControlOptions) -> Result<Process> {
    let data_dir = data_dir.display().to_string();
    let endpoint = node_endpoint();
    machine.spawn(
        "control-plane",
        program,
        [
            "dev",
            "--data-dir",
            &data_dir,
            "--listen",
            "0.0.0.0:8080",
            "--node-listen",
            "0.0.0.0:8443",
            "--node-endpoint",
            &endpoint,
        ],
        [
            ("CVAULT_LOG", options.log.as_str()),
            ("CVAULT_LOG_FORMAT", "text"),
            ("CVAULT_PUBLIC_URL", url()),
            ("CVAULT_CLIENT_DNS", &format!("{DNS_V4},{DNS_V6}")),
            ("CVAULT_RATE_LIMIT_PER_MINUTE", &options.rate_limit_per_minute.to_string()),
            ("CVAULT_QUARANTINE_SECONDS", &options.quarantine_seconds.to_string()),
            // suspensions and limits are changed by programs here
            ("CVAULT_ADMIN_STEP_UP", "off"),
        ],
    )
}

fn socket_port(folder: &Path) -> Result<String> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some(port) = name.strip_prefix(".s.PGSQL.")
            && port.parse::<u16>().is_ok()
        {
            return Ok(port.to_owned());
        }
    }
    bail!("no PostgreSQL socket in {}", folder.display())
}

fn psql_program() -> Result<String> {
    (15..=18)
        .map(|version| format!("/usr/lib/postgresql/{version}/bin/psql"))
        .find(|path| Path::new(path).exists())
        .context("psql is not installed: apt-get install postgresql-15")
}
