//! The tunnel process: one interface, its worker and its control socket, from start to SIGTERM.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit, setsid};

use crate::counters::{CounterTable, MAX_PEERS};
use crate::engine::{Engine, EngineConfig};
use crate::io::desk::Desk;
use crate::io::fleet::{Fleet, Found};
use crate::io::mailbox::{Controller, Request, mailbox};
use crate::io::memory::set_up_allocator;
use crate::io::offloads::Offloads;
use crate::io::ring::rings;
use crate::io::signals;
use crate::io::tun::{Tun, TunConfig};
use crate::io::watch::{Health, Watch};
use crate::io::worker::{End, Worker, boot_ms};
use crate::journal::Journal;
use crate::policy::SharedRates;
use crate::uapi::server::{self, Occupant, Server, occupant, socket_path};

/// The convention of wg-quick's userspace implementations.
const FOREGROUND: &str = "WG_PROCESS_FOREGROUND";
/// Where the detached process says why it could not start.
const REPORT: &str = "CVAULT_TUNNEL_REPORT";
/// Names of offloads that are not to be used, separated by commas.
const WITHOUT: &str = "CVAULT_TUNNEL_WITHOUT";
const LOG_FILE: &str = "LOG_FILE";
/// Opening a TUN and two sockets takes milliseconds.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// More would each own too few of the 256 classes of slots that the kernel can tell apart.
const MAX_WORKERS: u16 = 64;
/// How often the workers are looked after.
const WATCH_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// How to run the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelOptions {
    /// Name of the interface.
    pub interface: String,
    /// Stay in the foreground instead of detaching.
    pub foreground: bool,
    /// Where counters and journal live; without it the counters end with the process.
    pub state_dir: Option<PathBuf>,
    /// The interface outlives the process.
    pub persist: bool,
    /// Use the offloads the kernel has. Without them the kernel's byte counters of the TUN are plain sums of packets.
    pub offload: bool,
    /// How many workers share the peers, at most 64; 1 without it.
    pub workers: Option<u16>,
}

/// Why there is no tunnel. Each sentence says what is wrong and how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The kernel would not take the name.
    #[error("`{0}` cannot be the name of an interface: use 1 to 15 characters without `/` and spaces")]
    BadName(String),
    /// Another process serves this interface.
    #[error("interface `{0}` is already served by another process: stop that one first, or choose another name")]
    AlreadyRunning(String),
    /// There is no TUN driver.
    #[error("there is no /dev/net/tun: run `modprobe tun`, or pass the device into this container")]
    NoTun(#[source] io::Error),
    /// Not root.
    #[error("interface `{name}` may not be created: run as root or with CAP_NET_ADMIN")]
    NotPermitted {
        /// Name of the interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("interface `{name}` is in use: stop the process that holds it, or choose another name")]
    NameTaken {
        /// Name of the interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It exists and is something else.
    #[error("interface `{name}` exists and is not a TUN of this kind: delete it with `ip link del {name}`")]
    NotATun {
        /// Name of the interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// An unknown name in the environment.
    #[error("`{0}` in {WITHOUT} is no offload: use tun, tun-merge, udp-gso or udp-gro")]
    NotAnOffload(String),
    /// The state directory cannot be used.
    #[error("the state directory {} cannot be used: it must be writable, and no other tunnel may use it", path.display())]
    StateDir {
        /// The directory.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The control socket cannot be bound.
    #[error("the control socket {} cannot be bound: check the directory and its permissions", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The detached process ended, with its reason.
    #[error("{0}")]
    Detached(String),
    /// The detached process did not get ready.
    #[error("the tunnel did not get ready in {} seconds: start it with --foreground to see why", START_DEADLINE.as_secs())]
    NotReady,
    /// A worker hangs.
    #[error("worker {0} has not finished a pass for ten seconds: the tunnel ends, to be started anew")]
    Stuck(usize),
    /// Something the host should always be able to do.
    #[error("the tunnel cannot run")]
    Io(#[from] io::Error),
}

/// Runs the tunnel until SIGTERM or SIGINT, or until the interface is deleted. Without `foreground` (and without
/// `WG_PROCESS_FOREGROUND=1` in the environment) it starts itself again detached and returns once that one answers.
///
/// # Errors
/// [`TunnelError`], before anything was changed on the host.
pub fn run(options: &TunnelOptions) -> Result<(), TunnelError> {
    check_name(&options.interface)?;
    let path = socket_path(&options.interface);
    if occupant(&path) == Occupant::Somebody {
        return Err(TunnelError::AlreadyRunning(options.interface.clone()));
    }
    if !options.foreground && std::env::var_os(FOREGROUND).is_none_or(|value| value != "1") {
        return detach(&path);
    }
    let report = std::env::var_os(REPORT).map(PathBuf::from);
    if report.is_some() {
        // Fails only when we lead a session already.
        let _ = setsid();
    }
    let result = serve(options, &path);
    if let (Some(report), Err(error)) = (report, &result) {
        // The parent reports it; if it cannot be written there is nobody to tell.
        let _ = std::fs::write(report, error.to_string());
    }
    result
}

fn check_name(name: &str) -> Result<(), TunnelError> {
    const IFNAMSIZ: usize = 16;
    let fits = !name.is_empty() && name.len() < IFNAMSIZ && name != "." && name != "..";
    if fits && name.bytes().all(|b| b.is_ascii_graphic() && !b"/%:".contains(&b)) {
        return Ok(());
    }
    Err(TunnelError::BadName(name.to_owned()))
}

fn detach(socket: &Path) -> Result<(), TunnelError> {
    let report = socket.with_extension("report");
    // In the directory that only root can write to: a predictable name elsewhere could be somebody's link.
    let directory = server::create_dir().and_then(|()| remove_if_there(&report));
    directory.map_err(|source| TunnelError::Socket { path: socket.to_owned(), source })?;
    let log = match std::env::var_os(LOG_FILE) {
        Some(path) => Stdio::from(OpenOptions::new().create(true).append(true).open(path)?),
        None => Stdio::null(),
    };
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(FOREGROUND, "1")
        .env(REPORT, &report)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    let deadline = Instant::now() + START_DEADLINE;
    while occupant(socket) == Occupant::Nobody {
        if child.try_wait()?.is_some() {
            let reason = std::fs::read_to_string(&report).unwrap_or_else(|_| "the tunnel ended at once".into());
            let _ = std::fs::remove_file(&report);
            return Err(TunnelError::Detached(reason));
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err(TunnelError::NotReady);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn serve(options: &TunnelOptions, path: &Path) -> Result<(), TunnelError> {
    let termination = signals::termination()?;
    let wanted = worker_count(options);
    set_up_allocator(wanted);
    harden()?;
    let (counters, mut journal) = open_state(options)?;
    let ended = journal.as_mut().map(Journal::take_ended).unwrap_or_default();
    let tun = Tun::open(TunConfig { name: &options.interface, offloads: offloads(options)?, queues: wanted > 1 })
        .map_err(|error| tun_error(&options.interface, error))?;
    let listener = server::bind(path).map_err(|source| {
        if source.kind() == io::ErrorKind::AddrInUse {
            TunnelError::AlreadyRunning(options.interface.clone())
        } else {
            TunnelError::Socket { path: path.to_owned(), source }
        }
    })?;

    if options.persist {
        // Not before: an interface made here goes with this process when the socket cannot be bound.
        tun.persist()?;
    }
    let tuns = queues(tun, wanted)?;
    let count = u16::try_from(tuns.len()).expect("at most 64 workers");
    let found: Vec<_> = counters
        .occupied()
        .into_iter()
        .map(|((public_key, generation), slot)| Found { public_key, generation, slot })
        .collect();
    let journal = journal.map(|journal| Arc::new(Mutex::new(journal)));
    let capacity = counters.capacity();
    let mut engines = Engine::sharded(EngineConfig { counters, seed: rand::random() }, count);
    let rates = SharedRates::default();
    engines.iter_mut().for_each(|engine| engine.share_rates(rates.clone()));
    engines[0].remember(&ended);
    drop(ended);
    let (controllers, mailboxes): (Vec<_>, Vec<_>) =
        (0..count).map(|_| mailbox()).collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
    let neighbours = rings(&mailboxes);
    let (started, started_ms) = (Instant::now(), boot_ms());
    let workers: Vec<Worker> = engines
        .into_iter()
        .zip(tuns)
        .zip(&mailboxes)
        .zip(neighbours)
        .map(|(((engine, tun), mailbox), neighbours)| {
            Worker::new(engine, tun, journal.clone(), mailbox, neighbours, started_ms)
        })
        .collect::<io::Result<_>>()?;
    let pulses: Vec<_> = workers.iter().map(Worker::pulse).collect();
    let mut watches: Vec<_> = pulses.iter().map(|pulse| Watch::new(Arc::clone(pulse), 0)).collect();
    let fleet = Fleet::new(controllers.clone(), pulses, capacity, &found);
    drop(found);
    let desks: Vec<_> =
        workers.into_iter().zip(&controllers).map(|(worker, own)| Arc::new(Desk::new(worker, own.clone()))).collect();
    let fleet = match &*desks {
        [desk] => fleet.of_one(Arc::clone(desk)),
        _ => fleet,
    };
    let server = Server::new(fleet);
    let ended = eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from)?;
    let mut threads = Vec::new();
    for (number, (desk, mailbox)) in desks.into_iter().zip(mailboxes).enumerate() {
        let ended_by_worker = ended.try_clone()?;
        threads.push(std::thread::Builder::new().name(format!("tunnel-worker-{number}")).spawn(move || {
            let end = desk.run(&mailbox);
            drop(mailbox);
            let _ = rustix::io::write(&ended_by_worker, &1_u64.to_ne_bytes());
            end
        })?);
    }
    server.start(listener)?;
    tracing::info!(interface = options.interface, "the tunnel is ready");
    tracing::debug!(workers = count, "the peers are shared");

    let stopping = loop {
        let mut fds = [termination.as_fd(), ended.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, Some(&WATCH_INTERVAL)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => break Err(io::Error::from(error)),
        }
        if fds.iter().any(|fd| !fd.revents().is_empty()) {
            break Ok(());
        }
        if let Some(stuck) = look_after(&mut watches, &controllers, started) {
            // Not joined: it does not return.
            let _ = std::fs::remove_file(path);
            return Err(TunnelError::Stuck(stuck));
        }
    };
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(%error, "the control socket is gone already");
    }
    // A worker that has ended by itself does not answer.
    let asked: Vec<_> = controllers.iter().map(|controller| controller.post(Request::Stop)).collect();
    drop(asked);
    let mut end = End::Stopped;
    for thread in threads {
        let this = thread.join().map_err(|_| io::Error::other("the worker panicked"))??;
        end = if this == End::InterfaceGone { this } else { end };
    }
    match end {
        End::Stopped => tracing::info!("the tunnel has stopped"),
        End::InterfaceGone => tracing::info!("the interface was deleted: the tunnel has stopped"),
    }
    stopping.map_err(TunnelError::from)
}

/// What may be used, by option and environment.
fn offloads(options: &TunnelOptions) -> Result<Offloads, TunnelError> {
    let list = std::env::var_os(WITHOUT).unwrap_or_default();
    let offloads = Offloads::without(&list.to_string_lossy()).map_err(TunnelError::NotAnOffload)?;
    Ok(Offloads { tun: offloads.tun && options.offload, ..offloads })
}

fn worker_count(options: &TunnelOptions) -> u16 {
    options.workers.unwrap_or(1).clamp(1, MAX_WORKERS)
}

/// One queue of the interface for each worker. An interface that an earlier process made with one queue keeps it.
fn queues(first: Tun, wanted: u16) -> io::Result<Vec<Tun>> {
    let mut tuns = vec![first];
    while tuns.len() < usize::from(wanted) {
        match tuns[0].queue() {
            Some(tun) => tuns.push(tun?),
            None => {
                tracing::warn!("the interface was made for one worker: delete it once to have {wanted}");
                break;
            }
        }
    }
    Ok(tuns)
}

/// Pokes every worker and says which one will not come back.
fn look_after(watches: &mut [Watch], workers: &[Controller], started: Instant) -> Option<usize> {
    let now_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    workers.iter().for_each(Controller::poke);
    let mut stuck = None;
    for (number, watch) in watches.iter_mut().enumerate() {
        match watch.look(now_ms) {
            Health::Well => {}
            Health::Stalled => tracing::warn!(worker = number, "a worker has not finished a pass for seconds"),
            Health::Stuck => stuck = stuck.or(Some(number)),
        }
    }
    stuck
}

/// Keys are in memory: no core dumps, no ptrace.
fn harden() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(())
}

fn open_state(options: &TunnelOptions) -> Result<(CounterTable, Option<Journal>), TunnelError> {
    let epoch = rand::random();
    let Some(dir) = &options.state_dir else {
        return Ok((CounterTable::anonymous(MAX_PEERS, epoch)?, None));
    };
    let open = || {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let counters = CounterTable::open(dir, MAX_PEERS, boot_id()?, epoch)?;
        Ok((counters, Some(Journal::open(dir)?)))
    };
    open().map_err(|source| TunnelError::StateDir { path: dir.clone(), source })
}

/// Identifies this boot of the host.
fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let mut id = [0; 16];
    hex::decode_to_slice(digits, &mut id).map_err(io::Error::other)?;
    Ok(id)
}

fn tun_error(name: &str, source: io::Error) -> TunnelError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunnelError::NoTun(source),
        Some(libc::EPERM | libc::EACCES) => TunnelError::NotPermitted { name, source },
        Some(libc::EBUSY) => TunnelError::NameTaken { name, source },
        Some(libc::EINVAL) => TunnelError::NotATun { name, source },
        _ => TunnelError::Io(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_kernel_would_refuse_are_refused_first() {
        for name in ["", "a/b", "..", "has space", "sixteen-letters-", "a:b"] {
            assert!(matches!(check_name(name), Err(TunnelError::BadName(_))), "{name:?}");
        }
        for name in ["wg0", "cv0", "fifteen-letters"] {
            assert!(check_name(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn every_error_of_the_tun_says_how_to_mend_it() {
        let text = |errno| tun_error("wg0", io::Error::from_raw_os_error(errno)).to_string();
        assert!(text(libc::EPERM).contains("run as root"));
        assert!(text(libc::ENOENT).contains("modprobe tun"));
        assert!(text(libc::EBUSY).contains("wg0` is in use"));
        assert!(text(libc::EINVAL).contains("ip link del wg0"));
    }
}
