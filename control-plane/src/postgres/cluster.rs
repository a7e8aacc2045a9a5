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
/// Between attempts to start it again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
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
    #[error("the start was interrupted")]
    Interrupted,
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
    /// Each says how to mend it; nothing is left half-made or running, also when `shutdown` came first.
    pub async fn start(
        dir: &Path,
        bin: Option<PathBuf>,
        durability: Durability,
        shutdown: &CancellationToken,
    ) -> Result<Self, ClusterError> {
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
            None => {
                cluster.forget_stranger()?;
                cluster.spawn()?;
            }
        }
        let answering = tokio::select! {
            () = shutdown.cancelled() => Err(ClusterError::Interrupted),
            answering = cluster.answering() => answering,
        };
        if answering.is_err() {
            cluster.stop().await;
        }
        answering.map(|()| cluster)
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
            self.restart(&shutdown).await;
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

    /// Until PostgreSQL runs, or `shutdown`. The backends of a killed postmaster hold its shared memory for a moment; then
    /// a start fails and is repeated.
    async fn restart(&self, shutdown: &CancellationToken) {
        let mut pause = FIRST_PAUSE;
        loop {
            let attempt = async {
                self.spawn()?;
                self.answering().await
            };
            let result = tokio::select! {
                () = shutdown.cancelled() => return,
                result = attempt => result,
            };
            let Err(error) = result else { return };
            tracing::error!(error = crate::http::problem::chain(&error), "PostgreSQL cannot be started again yet");
            if is_alive(self.postmaster()) {
                // it may still come; its end is waited for as before
                return;
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
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

    /// The postmaster that `postmaster.pid` names, if it lives and is PostgreSQL at this data.
    fn running(&self) -> Option<Pid> {
        let pid = self.named()?;
        // a recycled number may be anything else, and another cluster's PostgreSQL too
        let program = fs::read_link(format!("/proc/{}/exe", pid.as_raw_pid())).ok()?;
        let postgres = program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("postgres"));
        (postgres && works_in(pid)? == self.data() && is_alive(pid)).then_some(pid)
    }

    /// PostgreSQL would not start beside a `postmaster.pid` that names a process, although it is a stranger's: then it is
    /// left from a crash.
    fn forget_stranger(&self) -> Result<(), ClusterError> {
        if self.named().and_then(works_in).is_some_and(|folder| folder != self.data()) {
            let path = self.data().join("postmaster.pid");
            fs::remove_file(&path).map_err(|source| ClusterError::Files { path, source })?;
        }
        Ok(())
    }

    fn named(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.data().join("postmaster.pid")).ok()?;
        Pid::from_raw(text.lines().next()?.trim().parse().ok()?)
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

/// PostgreSQL works inside its data.
fn works_in(pid: Pid) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{}/cwd", pid.as_raw_pid())).ok()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A cluster that is made and not started, with programs that a test may replace.
    struct Stopped {
        dir: tempfile::TempDir,
        programs: tempfile::TempDir,
    }

    impl Stopped {
        fn new() -> Self {
            let folder =
                || tempfile::Builder::new().prefix("cvault-pg").permissions(open()).tempdir_in("/tmp").unwrap();
            let (dir, programs) = (folder(), folder());
            let real = binaries::find(std::env::var_os("CVAULT_PG_BIN").map(PathBuf::from)).unwrap();
            for program in ["initdb", "postgres"] {
                symlink(real.join(program), programs.path().join(program)).unwrap();
            }
            Self { dir, programs }
        }

        async fn start(&self, shutdown: &CancellationToken) -> Result<Cluster, ClusterError> {
            let programs = Some(self.programs.path().to_owned());
            Cluster::start(self.dir.path(), programs, Durability::Scratch, shutdown).await
        }

        fn postgres(&self) -> PathBuf {
            self.programs.path().join("postgres")
        }
    }

    fn open() -> fs::Permissions {
        fs::Permissions::from_mode(0o755)
    }

    async fn eventually(what: &str, check: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !check() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            tokio::time::sleep(POLL).await;
        }
    }

    #[tokio::test]
    async fn a_postgresql_that_cannot_be_spawned_is_tried_with_pauses_until_the_shutdown() {
        let stopped = Stopped::new();
        let cluster = stopped.start(&CancellationToken::new()).await.unwrap();
        fs::remove_file(stopped.postgres()).unwrap();
        cluster.stop().await;
        fs::remove_file(cluster.log()).unwrap();
        let shutdown = CancellationToken::new();
        let watch = cluster.keep_running(shutdown.clone());
        let look = async {
            // each attempt opens the log
            let mut attempts = 0;
            let until = Instant::now() + Duration::from_millis(500);
            while Instant::now() < until {
                attempts += usize::from(fs::remove_file(cluster.log()).is_ok());
                tokio::task::yield_now().await;
            }
            shutdown.cancel();
            attempts
        };
        let ((), attempts) = tokio::join!(watch, look);
        assert!((1..10).contains(&attempts), "{attempts} attempts in half a second");
    }

    #[tokio::test]
    async fn the_postgresql_of_another_folder_is_neither_adopted_nor_in_the_way() {
        let (one, other) = (Stopped::new(), Stopped::new());
        let token = CancellationToken::new();
        let running = one.start(&token).await.unwrap();
        other.start(&token).await.unwrap().stop().await;
        // as after a crash, with the number given to another process since
        let pid_file = |stopped: &Stopped| stopped.dir.path().join("pg/postmaster.pid");
        let text = fs::read_to_string(pid_file(&one)).unwrap();
        let stale = text.replace(one.dir.path().to_str().unwrap(), other.dir.path().to_str().unwrap());
        fs::write(pid_file(&other), stale).unwrap();
        let started = other.start(&token).await.unwrap();
        assert_ne!(started.pid(), running.pid());
        started.stop().await;
        assert!(is_alive(running.postmaster()), "and is left alone");
        running.stop().await;
    }

    #[tokio::test]
    async fn a_start_that_is_interrupted_leaves_no_process_behind() {
        let stopped = Stopped::new();
        stopped.start(&CancellationToken::new()).await.unwrap().stop().await;
        let real = fs::read_link(stopped.postgres()).unwrap();
        fs::remove_file(stopped.postgres()).unwrap();
        let seen = stopped.dir.path().join("run/pid");
        let script = format!(
            // a background job of a shell has SIGINT ignored, and hands that on; PostgreSQL would not care
            "#!/bin/sh\n[ \"$1\" = --version ] && exec {} --version\necho $$ > {}\n\
             exec env --default-signal=INT --default-signal=QUIT sleep 600\n",
            real.display(),
            seen.display()
        );
        fs::write(stopped.postgres(), script).unwrap();
        fs::set_permissions(stopped.postgres(), open()).unwrap();
        let shutdown = CancellationToken::new();
        let pid = || fs::read_to_string(&seen).ok()?.trim().parse().ok().and_then(Pid::from_raw);
        let interrupt = async {
            eventually("PostgreSQL is spawned", || pid().is_some()).await;
            shutdown.cancel();
        };
        let (started, ()) = tokio::join!(stopped.start(&shutdown), interrupt);
        assert!(matches!(started, Err(ClusterError::Interrupted)));
        eventually("the process ends", || !is_alive(pid().unwrap())).await;
    }
}
