//! The tunnel process seen from outside: adopt the one that runs, or start one; learn at once when it dies.
//!
//! It lives in its own session and writes its log to a file, so that nothing of the control process's end reaches it.
//! Who it is follows from the credentials of its control socket, so an adopted tunnel and a child are watched alike,
//! through a pidfd: a reused process id cannot deceive us.

use std::fs::OpenOptions;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::state_dir::StateDir;
use crate::uapi::Uapi;

/// A tunnel is ready within tens of milliseconds; a slow disk or a loaded host may need longer.
const START_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(5);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
const LOG_FILE: &str = "tunnel.log";
const PID_FILE: &str = "tunnel.pid";
/// The log is begun anew at a start when it has grown beyond this.
const MAX_LOG_BYTES: u64 = 8 << 20;

/// How to start a tunnel.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub(crate) program: PathBuf,
    pub(crate) interface: String,
    pub(crate) state_dir: PathBuf,
}

/// A running tunnel process.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pid: Pid,
    pidfd: Arc<OwnedFd>,
    ended: watch::Receiver<bool>,
}

impl Tunnel {
    /// The tunnel that answers at the socket, if one does.
    pub(crate) async fn adopt(uapi: &Uapi) -> anyhow::Result<Option<Self>> {
        match uapi.pid().await {
            Ok(pid) => Self::watch(pid).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Starts a tunnel and waits until its control socket answers.
    pub(crate) async fn start(launch: &Launch, dir: &StateDir, uapi: &Uapi) -> anyhow::Result<Self> {
        let log = open_log(launch)?;
        let mut child = tokio::process::Command::new(&launch.program)
            .args(["tunnel", "--own-session", "--foreground", "--persist", "--state-dir"])
            .arg(&launch.state_dir)
            .arg(&launch.interface)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot open the tunnel's log")?)
            .stderr(log)
            .spawn()
            .context("cannot start the tunnel process")?;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if let Ok(pid) = uapi.pid().await
                && child.id().and_then(|id| i32::try_from(id).ok()) == Some(pid)
            {
                let tunnel = Self::watch(pid)?;
                dir.write(PID_FILE, format!("{pid}\n").as_bytes()).context("cannot write tunnel.pid")?;
                return Ok(tunnel);
            }
            if let Some(status) = child.try_wait().context("cannot watch the tunnel process")? {
                anyhow::bail!("the tunnel process ended at once ({status}): {}", last_words(launch));
            }
            if Instant::now() > deadline {
                child.kill().await.ok();
                anyhow::bail!("the tunnel process did not become ready within {START_TIMEOUT:?}: {}", last_words(launch));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn watch(pid: i32) -> anyhow::Result<Self> {
        let pid = Pid::from_raw(pid).context("the tunnel process has no process id")?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the tunnel process")?;
        let pidfd = Arc::new(pidfd);
        let (tell, ended) = watch::channel(false);
        let watched = Arc::clone(&pidfd);
        std::thread::Builder::new()
            .name("tunnel-watch".to_owned())
            .spawn(move || {
                wait_for_end(&watched);
                tell.send_replace(true);
            })
            .context("cannot watch the tunnel process")?;
        Ok(Self { pid, pidfd, ended })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Returns when the process has ended. Cancel-safe.
    pub(crate) async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that nobody watches the process any more: treated as its end, which starts it anew.
        let _ended = ended.wait_for(|ended| *ended).await;
    }

    /// Kills a tunnel that no longer answers.
    pub(crate) fn kill(&self) {
        let _gone = rustix::process::pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    /// Asks it to end cleanly and waits for that.
    pub(crate) async fn stop(self) {
        let _gone = rustix::process::pidfd_send_signal(&*self.pidfd, Signal::TERM);
        if tokio::time::timeout(STOP_TIMEOUT, self.ended()).await.is_err() {
            self.kill();
        }
    }
}

/// Blocks until the process has ended: a pidfd is readable from then on.
fn wait_for_end(pidfd: &OwnedFd) {
    loop {
        match rustix::event::poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

fn open_log(launch: &Launch) -> anyhow::Result<std::fs::File> {
    let path = launch.state_dir.join(LOG_FILE);
    let large = std::fs::metadata(&path).is_ok_and(|meta| meta.len() > MAX_LOG_BYTES);
    let mut options = OpenOptions::new();
    options.create(true).mode(0o600);
    if large {
        // Not truncated in place: a tunnel of before may still write to it.
        std::fs::rename(&path, path.with_added_extension("old")).context("cannot rotate the tunnel's log")?;
    }
    options.append(true).open(path).context("cannot open the tunnel's log")
}

/// The last line of the tunnel's log: why it ended.
fn last_words(launch: &Launch) -> String {
    let read = || {
        let mut file = std::fs::File::open(launch.state_dir.join(LOG_FILE)).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(4096))).ok()?;
        let mut tail = Vec::new();
        file.read_to_end(&mut tail).ok()?;
        String::from_utf8_lossy(&tail).lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned)
    };
    read().unwrap_or_else(|| "it left no word".to_owned())
}
