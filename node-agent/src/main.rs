//! `cvault-node-agent`: one binary on every server, in three parts.
//!
//! `enroll` gives the server its identity. `run` is the control process: it follows the control plane and reports.
//! `tunnel` is the data plane, a process of its own, so that nothing that happens to `run` costs a packet.
#![forbid(unsafe_code)]

mod backoff;
mod clock;
mod connect;
mod desired;
mod engine;
mod enrol;
mod enrolment;
mod frames;
mod host;
mod interface;
mod leases;
mod meter;
mod metrics;
mod policies;
mod report;
mod run;
mod spool;
mod state_dir;
mod store;
mod telemetry;
mod tunnel;
mod uapi;
mod watch;

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};

pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
pub(crate) const DEFAULT_STATE_DIR: &str = "/var/lib/cvault-node-agent";

#[derive(Parser)]
#[command(name = "cvault-node-agent", version, about = "CVault's agent on a VPN server")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Give this server its identity with a single-use token.
    Enroll(enrol::EnrolArgs),
    /// Follow the control plane, keep the tunnel running, report.
    Run(run::RunArgs),
    /// The data plane process; also a userspace implementation for wg-quick.
    Tunnel(TunnelArgs),
}

#[derive(clap::Args)]
struct TunnelArgs {
    /// Stay in the foreground.
    #[arg(short, long)]
    foreground: bool,
    /// Where counters live on after this process.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    /// Keep the interface when the process ends.
    #[arg(long)]
    persist: bool,
    /// Do not use the kernel's offloads.
    #[arg(long)]
    no_offload: bool,
    /// How many workers share the peers, at most 64 (default: 1).
    #[arg(long, env = "CVAULT_TUNNEL_WORKERS", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    /// Begin a new session first, out of reach of the starter's terminal.
    #[arg(long, hide = true)]
    own_session: bool,
    /// Name of the interface.
    interface: String,
}

/// Under this name the program is `tunnel` alone: a link of this name is what WG_QUICK_USERSPACE_IMPLEMENTATION takes.
const TUNNEL_NAME: &str = "cvault-tunnel";

fn main() -> ExitCode {
    if called_as_tunnel(std::env::args_os().next().as_deref()) {
        // Under the own name, because a tunnel that detaches starts itself again.
        let error = match std::env::current_exe() {
            Ok(program) => Command::new(program).arg("tunnel").args(std::env::args_os().skip(1)).exec(),
            Err(error) => error,
        };
        eprintln!("error: cannot start the tunnel: {error}");
        return ExitCode::FAILURE;
    }
    let cli = Cli::parse();
    let done = telemetry::init().and_then(|()| match cli.verb {
        Verb::Enroll(args) => block_on(async { enrol::enrol(&args).await.map(announce) }),
        Verb::Run(args) => block_on(run::run(&args)),
        Verb::Tunnel(args) => tunnel_process(args),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn called_as_tunnel(name: Option<&OsStr>) -> bool {
    name.and_then(|name| Path::new(name).file_name()) == Some(OsStr::new(TUNNEL_NAME))
}

fn announce(enrolment: enrolment::Enrolment) {
    let id = uuid::Uuid::from_bytes(enrolment.server_id);
    eprintln!("enrolled as {} ({id}); start it with `cvault-node-agent run`", enrolment.server_name);
}

fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let done = runtime.block_on(work);
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    done
}

fn tunnel_process(args: TunnelArgs) -> anyhow::Result<()> {
    if args.own_session {
        rustix::process::setsid().map_err(std::io::Error::from)?;
    }
    Ok(cvault_dataplane::process::run(&cvault_dataplane::process::TunnelOptions {
        interface: args.interface,
        foreground: args.foreground,
        state_dir: args.state_dir,
        persist: args.persist,
        offload: !args.no_offload,
        workers: args.workers,
    })?)
}

/// An error with its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
