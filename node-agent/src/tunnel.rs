//! The tunnel process seen from outside: adopt the one that runs, or start one; learn at once when it dies.
//!
//! It lives in its own session and writes its log to a file, so that nothing of the control process's end reaches it.
//! Who it is follows from the credentials of its control socket, so an adopted tunnel and a child are watched alike,
//! through a pidfd: a reused process id cannot deceive us.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cvault_dataplane::counters::{self, CounterReader};
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
/// The log is begun anew when it has grown beyond this.
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
    /// The tunnel of an earlier run of this agent, if one serves. One that hangs, or that counts into files that are no
    /// longer there, is ended.
    ///
    /// # Errors
    /// When the interface is served by somebody else.
    pub(crate) async fn adopt(launch: &Launch, uapi: &Uapi) -> anyhow::Result<Option<Self>> {
        let noted = || noted_pid(launch).filter(|pid| is_tunnel_of(*pid, launch));
        let Some(pid) = uapi.pid().await.ok().or_else(noted) else { return Ok(None) };
        let Ok(tunnel) = Self::watch(pid) else { return Ok(None) };
        // Asked after the process was opened, so that a process id that is used again cannot deceive us.
        let is_ours = is_tunnel_of(pid, launch);
        let answer = uapi.device().await;
        match answer {
            Ok(device) if is_ours && device.epoch.is_some() && device.epoch == counted_epoch(launch) => {
                Ok(Some(tunnel))
            }
            Ok(_) if is_ours => {
                tracing::warn!(pid, "the tunnel does not count into this state directory: starting another");
                tunnel.stop().await;
                Ok(None)
            }
            Ok(_) => anyhow::bail!(
                "the interface {} is served by another program (process {pid}): stop it, or choose another --interface",
                launch.interface
            ),
            Err(error) if is_ours => {
                tracing::warn!(pid, error = crate::chain(&error), "the tunnel does not answer: starting another");
                tunnel.kill();
                tunnel.ended().await;
                Ok(None)
            }
            Err(_) => Ok(None),
        }
    }

    /// Starts a tunnel and waits until its control socket answers.
    pub(crate) async fn start(launch: &Launch, dir: &StateDir, uapi: &Uapi) -> anyhow::Result<Self> {
        let log = open_log(launch)?;
        let mut child = tokio::process::Command::new(&launch.program)
            .args(arguments(launch))
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
                anyhow::bail!(
                    "the tunnel process did not become ready within {START_TIMEOUT:?}: {}",
                    last_words(launch)
                );
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

fn arguments(launch: &Launch) -> [&OsStr; 7] {
    let [tunnel, session, foreground, persist, state_dir] =
        ["tunnel", "--own-session", "--foreground", "--persist", "--state-dir"].map(OsStr::new);
    [tunnel, session, foreground, persist, state_dir, launch.state_dir.as_os_str(), OsStr::new(&launch.interface)]
}

fn noted_pid(launch: &Launch) -> Option<i32> {
    std::fs::read_to_string(launch.state_dir.join(PID_FILE)).ok()?.trim().parse().ok()
}

/// Whether the process was started as [`Tunnel::start`] does, for this state directory and interface.
fn is_tunnel_of(pid: i32, launch: &Launch) -> bool {
    let Ok(command) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let wanted = arguments(launch).map(OsStr::as_encoded_bytes).join(&0);
    command.splitn(2, |byte| *byte == 0).nth(1).and_then(|rest| rest.strip_suffix(&[0])) == Some(wanted.as_slice())
}

fn counted_epoch(launch: &Launch) -> Option<counters::Epoch> {
    CounterReader::open(&launch.state_dir.join(counters::FILE_NAME)).ok().map(|reader| reader.epoch())
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
    bound_log(&launch.state_dir);
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    options.open(launch.state_dir.join(LOG_FILE)).context("cannot open the tunnel's log")
}

/// Empties a log that has grown too large; its content is kept once. The tunnel appends, so it goes on at the start.
pub(crate) fn bound_log(state_dir: &Path) {
    let path = state_dir.join(LOG_FILE);
    if !std::fs::metadata(&path).is_ok_and(|meta| meta.len() > MAX_LOG_BYTES) {
        return;
    }
    let emptied = std::fs::copy(&path, path.with_added_extension("old"))
        .and_then(|_| OpenOptions::new().write(true).open(&path)?.set_len(0));
    if let Err(error) = emptied {
        tracing::warn!(%error, "the tunnel's log cannot be shortened");
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(state_dir: &Path) -> Launch {
        Launch { program: "/bin/sh".into(), interface: "cvtest".to_owned(), state_dir: state_dir.to_owned() }
    }

    #[test]
    fn a_large_log_is_begun_anew_under_the_feet_of_its_writer() {
        use std::io::Write as _;
        let root = tempfile::tempdir().unwrap();
        let mut log = open_log(&launch(root.path())).unwrap();
        log.write_all(&vec![b'x'; usize::try_from(MAX_LOG_BYTES).unwrap() + 1]).unwrap();
        bound_log(root.path());
        log.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(root.path().join(LOG_FILE)).unwrap(), b"new");
        assert_eq!(std::fs::metadata(root.path().join("tunnel.log.old")).unwrap().len(), MAX_LOG_BYTES + 1);
    }

    #[tokio::test]
    async fn a_noted_process_that_is_no_tunnel_of_ours_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let launch = launch(root.path());
        let own = std::process::id();
        std::fs::write(root.path().join(PID_FILE), own.to_string()).unwrap();
        let uapi = Uapi::at(root.path().join("none.sock"));
        assert!(Tunnel::adopt(&launch, &uapi).await.unwrap().is_none());
        assert!(!is_tunnel_of(i32::try_from(own).unwrap(), &launch));
    }

    /// A process that looks like our tunnel and answers nothing: it is killed, also without its socket.
    #[tokio::test]
    async fn a_hung_tunnel_of_an_earlier_run_is_ended() {
        let root = tempfile::tempdir().unwrap();
        let launch = launch(root.path());
        let script = root.path().join("tunnel");
        std::fs::write(&script, "read wait\n").unwrap();
        let mut child = tokio::process::Command::new("/bin/sh")
            .args(arguments(&launch))
            .current_dir(root.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        std::fs::write(root.path().join(PID_FILE), child.id().unwrap().to_string()).unwrap();
        let uapi = Uapi::at(root.path().join("none.sock"));
        assert!(Tunnel::adopt(&launch, &uapi).await.unwrap().is_none());
        assert!(!child.wait().await.unwrap().success());
    }
}
