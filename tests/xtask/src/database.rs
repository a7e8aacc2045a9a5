//! A private PostgreSQL with the migrations applied, for generating files. It ends with this value.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::fs::{Gid, Uid};

use crate::host;

const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";

pub(crate) struct Database {
    folder: PathBuf,
}

impl Database {
    /// Makes a cluster in a temporary folder, reachable by its unix socket only, and migrates it.
    pub(crate) fn migrated() -> Result<Self> {
        host::install_database()?;
        let folder = std::env::temp_dir().join(format!("cvault-xtask-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        if host::is_root() {
            let (uid, gid) = postgres_user()?;
            chown(&folder, Some(uid), Some(gid))?;
        }
        let database = Self { folder };
        let data = database.data();
        host::read(
            as_server("initdb")
                .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-D"])
                .arg(&data),
        )?;
        let options = format!("-k {} -c listen_addresses= -c fsync=off", database.folder.display());
        host::read(
            as_server("pg_ctl")
                .args(["-w", "-s", "-D"])
                .arg(&data)
                .arg("-l")
                .arg(database.folder.join("log"))
                .args(["-o", &options, "start"]),
        )?;
        database.migrate()?;
        Ok(database)
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

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let _ = as_server("pg_ctl").args(["-s", "-m", "immediate", "-D"]).arg(self.data()).arg("stop").status();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// PostgreSQL refuses to run as root.
fn as_server(program: &str) -> Command {
    let path = format!("{PROGRAMS}/{program}");
    if !host::is_root() {
        return Command::new(path);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--", &path]).current_dir("/");
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
