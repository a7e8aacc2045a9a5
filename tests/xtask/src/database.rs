//! A private PostgreSQL with the migrations applied, for generating files. It ends with this value, and when this program
//! is interrupted or killed; the folder that is then left is swept by the next one.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Gid, Uid};
use rustix::process::{Pid, Signal, kill_process};

use crate::host;

const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";
const PREFIX: &str = "cvault-xtask-";
const START: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(50);

pub(crate) struct Database {
    folder: PathBuf,
    server: Option<Child>,
}

impl Database {
    /// Makes a cluster in a temporary folder, reachable by its unix socket only, and migrates it.
    pub(crate) fn migrated() -> Result<Self> {
        host::install_database()?;
        sweep();
        let folder = std::env::temp_dir().join(format!("{PREFIX}{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let mut database = Self { folder, server: None };
        if host::is_root() {
            let (uid, gid) = postgres_user()?;
            chown(&database.folder, Some(uid), Some(gid))?;
        }
        host::read(
            as_server("initdb")
                .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-D"])
                .arg(database.folder("data")),
        )?;
        database.start()?;
        database.migrate()?;
        Ok(database)
    }

    /// As a child that the kernel ends with us, however we end.
    fn start(&mut self) -> Result<()> {
        let log_path = self.folder("log");
        let log = std::fs::File::create(&log_path)?;
        let server = as_server("postgres")
            .arg("-D")
            .arg(self.folder("data"))
            .arg("-k")
            .arg(&self.folder)
            .args(["-c", "listen_addresses=", "-c", "fsync=off"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start postgres")?;
        let server = self.server.insert(server);
        let deadline = Instant::now() + START;
        let ready = || {
            let mut asked = Command::new(format!("{PROGRAMS}/pg_isready"));
            asked.args(["-q", "-h"]).arg(&self.folder).status().is_ok_and(|status| status.success())
        };
        while !ready() {
            if Instant::now() > deadline || server.try_wait()?.is_some() {
                bail!("PostgreSQL does not start: {}", std::fs::read_to_string(&log_path)?.trim());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// A path that ends with the database.
    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The address for the role `user`.
    pub(crate) fn url(&self, user: &str) -> String {
        format!("postgres://{user}@localhost/cvault?host={}", self.folder.display())
    }

    /// The schema as SQL, without what differs from run to run.
    pub(crate) fn schema(&self) -> Result<String> {
        let dump = host::read(self.client("pg_dump").args(["-d", "cvault", "--schema-only", "--no-comments"]))?;
        let kept = |line: &&str| {
            !line.starts_with("--") && !line.starts_with("\\") && !line.starts_with("SET ") && !line.is_empty()
        };
        let lines: Vec<&str> = dump.lines().filter(kept).collect();
        Ok(format!(
            "-- Written by `cargo xtask schema` from the migrations; compared in CI. Do not edit.\n{}\n",
            lines.join("\n")
        ))
    }

    fn migrate(&self) -> Result<()> {
        let folder = host::root().join("migrations");
        host::read(self.client("createdb").arg("cvault"))?;
        self.apply("postgres", &folder.join("roles.sql"))?;
        for file in migrations(&folder)? {
            self.apply("cvault_owner", &file)?;
        }
        Ok(())
    }

    fn apply(&self, role: &str, file: &Path) -> Result<()> {
        host::read(
            self.client("psql")
                .env("PGUSER", role)
                .args(["-Xq1", "-v", "ON_ERROR_STOP=1", "-d", "cvault", "-f"])
                .arg(file),
        )
        .map(drop)
    }

    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(format!("{PROGRAMS}/{program}"));
        command.env("PGHOST", &self.folder).env("PGUSER", "postgres");
        command
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let id = i32::try_from(server.id()).ok().and_then(Pid::from_raw);
            let _ = id.map(|id| kill_process(id, Signal::QUIT));
            let _ = server.wait();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Removes what interrupted programs have left.
fn sweep() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// A program of PostgreSQL, which refuses to run as root. It is ended (an immediate shutdown, to the server) with us.
fn as_server(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "QUIT"]).current_dir("/");
    if host::is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
    }
    command.arg("--").arg(format!("{PROGRAMS}/{program}"));
    command
}

fn postgres_user() -> Result<(u32, u32)> {
    let number = |flag| -> Result<u32> { Ok(host::read(Command::new("id").args([flag, "postgres"]))?.trim().parse()?) };
    let (uid, gid) = (number("-u")?, number("-g")?);
    Ok((Uid::from_raw(uid).as_raw(), Gid::from_raw(gid).as_raw()))
}

fn migrations(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(|first: char| first.is_ascii_digit()) && name.ends_with(".sql") {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        bail!("no migrations in {}", folder.display());
    }
    Ok(files)
}
