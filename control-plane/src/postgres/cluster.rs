//! Making, starting, adopting, watching and stopping the cluster.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection};
use tokio_util::sync::CancellationToken;

use super::binaries::{self, Account};
use super::settings;

/// A cluster that recovers from a crash may take this long to answer.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);
/// The kernel's limit for a socket's path, less the name PostgreSQL adds (`/.s.PGSQL.5432`).
const MAX_SOCKET_DIR: usize = 107 - 15;
/// The server's own log is begun afresh at a start once it is larger.
const MAX_LOG_BYTES: u64 = 10 << 20;

/// Whether what is committed must outlive a crash of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    Durable,
    /// Tests: nothing outlives the process anyway.
    Scratch,
}

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error(
        "PostgreSQL 15 or newer is not installed: run `apt-get install postgresql`, or name the folder with `initdb` and \
         `postgres` in CVAULT_PG_BIN"
    )]
    NotInstalled,
    #[error("CVAULT_PG_BIN names {}, which has no `initdb` and `postgres`", dir.display())]
    NotThere { dir: PathBuf },
    #[error(
        "the user id {uid} has no entry in the user database, which PostgreSQL needs; run as a named user, or use `serve` with DATABASE_URL"
    )]
    NoAccount { uid: u32 },
    #[error("PostgreSQL does not run as root, and there is no user `cvault`, `postgres` or `nobody` to run it as")]
    NobodyToRunAs,
    #[error("the user `{user}`, who runs PostgreSQL, may not pass through {}: run `chmod o+x {}`, or choose another --data-dir", dir.display(), dir.display())]
    NotTraversable { user: String, dir: PathBuf },
    #[error("{} is too long for a unix socket: choose a --data-dir with a path of fewer than {} bytes", dir.display(), MAX_SOCKET_DIR)]
    PathTooLong { dir: PathBuf },
    #[error("another process of CVault uses {}: stop it, or choose another --data-dir", dir.display())]
    InUse { dir: PathBuf },
    #[error("{} cannot be prepared", path.display())]
    Files { path: PathBuf, source: io::Error },
    #[error("`initdb` failed: {output}")]
    InitDb { output: String },
    #[error("PostgreSQL cannot be started")]
    Spawn(#[source] io::Error),
    #[error("PostgreSQL does not answer; its log is {}: {tail}", log.display())]
    Silent { log: PathBuf, tail: String, source: Box<sqlx::Error> },
    #[error("the cluster in {} is of version {found}, and the programs in {} are of version {wanted}: set CVAULT_PG_BIN", dir.display(), bin.display())]
    Version { dir: PathBuf, bin: PathBuf, found: String, wanted: String },
}

/// A running cluster under a folder: `pg` (data), `run` (socket), `postgres.log`, `lock`.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    bin: PathBuf,
    us: Account,
    them: Account,
    /// The postmaster now; another one after a restart.
    postmaster: Mutex<Pid>,
    /// Held while this process lives: the kernel gives it back even after SIGKILL.
    _lock: File,
}

impl Cluster {
    /// Starts the cluster under `dir`, makes it first if there is none, or adopts one that is running.
    ///
    /// # Errors
    /// Each says how to mend it; nothing is left half-made.
    pub async fn start(dir: &Path, bin: Option<PathBuf>, durability: Durability) -> Result<Self, ClusterError> {
        let bin = binaries::find(bin)?;
        let us = binaries::current()?;
        let them = binaries::unprivileged(&us)?;
        prepare_folder(dir, 0o711)?;
        let dir = dir.canonicalize().map_err(|source| ClusterError::Files { path: dir.to_owned(), source })?;
        if dir.join("run").as_os_str().len() > MAX_SOCKET_DIR {
            return Err(ClusterError::PathTooLong { dir });
        }
        traversable(&dir, &us, &them)?;
        let lock = lock(&dir)?;
        let nobody_yet = Pid::INIT;
        let cluster = Self { dir, bin, us, them, postmaster: Mutex::new(nobody_yet), _lock: lock };
        cluster.make(durability)?;
        match cluster.running() {
            Some(pid) => {
                tracing::info!(pid = pid.as_raw_pid(), "adopting the running PostgreSQL");
                cluster.set_postmaster(pid);
            }
            None => cluster.spawn()?,
        }
        cluster.answering().await?;
        Ok(cluster)
    }

    /// Connects as `role` to `database`.
    #[must_use]
    pub fn options(&self, role: &str, database: &str) -> PgConnectOptions {
        Self::options_at(&self.sockets(), role, database)
    }

    /// The same for a cluster that another process runs, by its socket's folder.
    #[must_use]
    pub fn options_at(sockets: &Path, role: &str, database: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(sockets)
            .username(role)
            .database(database)
            .disable_statement_logging()
    }

    /// Connects as the cluster's superuser.
    #[must_use]
    pub fn superuser(&self, database: &str) -> PgConnectOptions {
        self.options(settings::SUPERUSER, database)
    }

    /// The postmaster's process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.postmaster().as_raw_pid()
    }

    /// Starts PostgreSQL again whenever it ends, until `shutdown`. Not to be cancelled otherwise.
    pub async fn keep_running(&self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.ended() => {}
            }
            tracing::warn!("PostgreSQL ended; starting it again");
            if let Err(error) = self.restart(&shutdown).await {
                tracing::error!(error = crate::http::problem::chain(&error), "PostgreSQL cannot be started again yet");
            }
        }
    }

    /// Stops the cluster: running transactions are rolled back, what is committed is on disk.
    pub async fn stop(&self) {
        let pid = self.postmaster();
        // SIGINT is PostgreSQL's "fast shutdown"
        if kill_process(pid, Signal::INT).is_err() {
            return;
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        while is_alive(pid) && Instant::now() < deadline {
            tokio::time::sleep(POLL).await;
        }
        if is_alive(pid) {
            tracing::warn!("PostgreSQL did not stop in time; it will recover at its next start");
            if let Err(error) = kill_process(pid, Signal::QUIT) {
                tracing::debug!(%error, "PostgreSQL is gone");
            }
        }
    }

    /// The folder of the socket, for URLs (`?host=`).
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        self.dir.join("run")
    }

    fn data(&self) -> PathBuf {
        self.dir.join("pg")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("postgres.log")
    }

    fn postmaster(&self) -> Pid {
        *self.postmaster.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn set_postmaster(&self, pid: Pid) {
        *self.postmaster.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = pid;
    }

    async fn ended(&self) {
        let pid = self.postmaster();
        while is_alive(pid) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The backends of a killed postmaster hold its shared memory for a moment; then a start fails and is repeated.
    async fn restart(&self, shutdown: &CancellationToken) -> Result<(), ClusterError> {
        let mut pause = Duration::from_millis(50);
        loop {
            self.spawn()?;
            let result = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                result = self.answering() => result,
            };
            match result {
                Ok(()) => return Ok(()),
                Err(error) if is_alive(self.postmaster()) => return Err(error),
                Err(error) => {
                    tracing::debug!(error = %error, "PostgreSQL ended while starting");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    /// The socket's folder and, the first time, the data folder. `initdb` works beside it and is renamed into place, so
    /// that an interrupted one leaves nothing that looks like a cluster.
    fn make(&self, durability: Durability) -> Result<(), ClusterError> {
        let sockets = self.dir.join("run");
        self.folder_of_theirs(&sockets)?;
        let data = self.data();
        if data.join("PG_VERSION").exists() {
            self.same_version()?;
        } else {
            let making = self.dir.join("pg.new");
            let files = |path: &Path| {
                let path = path.to_owned();
                move |source| ClusterError::Files { path, source }
            };
            if making.exists() {
                fs::remove_dir_all(&making).map_err(files(&making))?;
            }
            self.folder_of_theirs(&making)?;
            let mut command = self.command("initdb");
            command.args([
                "--auth=peer",
                "--encoding=UTF8",
                "--no-locale",
                "--username",
                settings::SUPERUSER,
                "--pgdata",
            ]);
            if durability == Durability::Scratch {
                command.arg(&making).arg("--no-sync");
            } else {
                command.arg(&making);
            }
            let output = command.output().map_err(ClusterError::Spawn)?;
            if !output.status.success() {
                let output = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
                return Err(ClusterError::InitDb { output });
            }
            fs::rename(&making, &data).map_err(files(&data))?;
        }
        if self.running().is_none() {
            settings::write(&data, &sockets, &self.us, &self.them, durability)
                .map_err(|source| ClusterError::Files { path: data, source })?;
        }
        Ok(())
    }

    fn same_version(&self) -> Result<(), ClusterError> {
        let path = self.data().join("PG_VERSION");
        let found = fs::read_to_string(&path).map_err(|source| ClusterError::Files { path, source })?.trim().to_owned();
        let output = self.command("postgres").arg("--version").output().map_err(ClusterError::Spawn)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let wanted = text.split_whitespace().nth(2).and_then(|version| version.split('.').next()).unwrap_or_default();
        if found == wanted {
            return Ok(());
        }
        Err(ClusterError::Version { dir: self.data(), bin: self.bin.clone(), found, wanted: wanted.to_owned() })
    }

    fn folder_of_theirs(&self, path: &Path) -> Result<(), ClusterError> {
        prepare_folder(path, 0o700)?;
        chown(path, Some(self.them.uid), Some(self.them.gid))
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)))
            .map_err(|source| ClusterError::Files { path: path.to_owned(), source })
    }

    /// A program of PostgreSQL with dropped privileges, a clean environment, and its own process group: Ctrl-C at a
    /// terminal is for us, and we stop it.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
        command.process_group(0);
        if self.us != self.them {
            command.uid(self.them.uid).gid(self.them.gid);
        }
        command
    }

    /// The postmaster that `postmaster.pid` names, if it lives and is PostgreSQL.
    fn running(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.data().join("postmaster.pid")).ok()?;
        let pid = Pid::from_raw(text.lines().next()?.trim().parse().ok()?)?;
        // a recycled number may be anything else
        let program = fs::read_link(format!("/proc/{}/exe", pid.as_raw_pid())).ok()?;
        (program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("postgres")) && is_alive(pid))
            .then_some(pid)
    }

    fn spawn(&self) -> Result<(), ClusterError> {
        let path = self.log();
        let files = |source| ClusterError::Files { path: path.clone(), source };
        let large = fs::metadata(&path).is_ok_and(|metadata| metadata.len() > MAX_LOG_BYTES);
        // a file, not a pipe: PostgreSQL goes on logging when we are gone
        let log = OpenOptions::new()
            .create(true)
            .append(!large)
            .write(true)
            .truncate(large)
            .mode(0o600)
            .open(&path)
            .map_err(files)?;
        let also = log.try_clone().map_err(files)?;
        let mut child = self
            .command("postgres")
            .arg("-D")
            .arg(self.data())
            .stdout(log)
            .stderr(also)
            .spawn()
            .map_err(ClusterError::Spawn)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a child has a process id");
        self.set_postmaster(pid);
        // reaps it whenever it ends; the thread sleeps in waitpid
        std::thread::Builder::new()
            .name("postgres-wait".to_owned())
            .spawn(move || child.wait())
            .map_err(ClusterError::Spawn)?;
        Ok(())
    }

    async fn answering(&self) -> Result<(), ClusterError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match self.superuser("postgres").connect().await {
                Ok(connection) => {
                    if let Err(error) = connection.close().await {
                        tracing::debug!(%error, "the first connection ended early");
                    }
                    return Ok(());
                }
                Err(error) if Instant::now() > deadline || !is_alive(self.postmaster()) => {
                    let text = fs::read_to_string(self.log()).unwrap_or_default();
                    let tail: Vec<&str> = text.lines().rev().take(3).collect();
                    let tail = tail.into_iter().rev().collect::<Vec<_>>().join("; ");
                    return Err(ClusterError::Silent { log: self.log(), tail, source: Box::new(error) });
                }
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }
}

fn is_alive(pid: Pid) -> bool {
    test_kill_process(pid).is_ok()
}

fn prepare_folder(path: &Path, mode: u32) -> Result<(), ClusterError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|source| ClusterError::Files { path: path.to_owned(), source })
}

/// Every folder above the data must let `them` pass. The data folder itself is ours: it is opened when it is not.
fn traversable(dir: &Path, us: &Account, them: &Account) -> Result<(), ClusterError> {
    for folder in dir.ancestors() {
        let metadata =
            fs::metadata(folder).map_err(|source| ClusterError::Files { path: folder.to_owned(), source })?;
        let bit = if metadata.uid() == them.uid {
            0o100
        } else if metadata.gid() == them.gid {
            0o010
        } else {
            0o001
        };
        if metadata.mode() & bit != 0 {
            continue;
        }
        if folder == dir && metadata.uid() == us.uid {
            let mode = (metadata.mode() & 0o7777) | bit;
            fs::set_permissions(folder, fs::Permissions::from_mode(mode))
                .map_err(|source| ClusterError::Files { path: folder.to_owned(), source })?;
            continue;
        }
        return Err(ClusterError::NotTraversable { user: them.name.clone(), dir: folder.to_owned() });
    }
    Ok(())
}

fn lock(dir: &Path) -> Result<File, ClusterError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| ClusterError::Files { path, source })?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| ClusterError::InUse { dir: dir.to_owned() })?;
    Ok(file)
}
