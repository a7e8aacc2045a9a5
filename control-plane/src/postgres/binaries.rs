//! Where PostgreSQL's programs are, and which user they run as.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::ClusterError;

const PACKAGED: &str = "/usr/lib/postgresql";

/// The folder with `initdb` and `postgres`: `CVAULT_PG_BIN`, else Debian's highest version.
pub(super) fn find(chosen: Option<PathBuf>) -> Result<PathBuf, ClusterError> {
    if let Some(dir) = chosen {
        return if is_complete(&dir) { Ok(dir) } else { Err(ClusterError::NotThere { dir }) };
    }
    let versions = std::fs::read_dir(PACKAGED).into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(version, dir)| *version >= 15 && is_complete(dir))
        .collect();
    found.sort();
    found.pop().map(|(_, dir)| dir).ok_or(ClusterError::NotInstalled)
}

fn is_complete(dir: &Path) -> bool {
    ["initdb", "postgres"].iter().all(|program| dir.join(program).is_file())
}

/// A user of the system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Us.
pub(super) fn current() -> Result<Account, ClusterError> {
    let uid = rustix::process::geteuid().as_raw();
    lookup(&uid.to_string()).ok_or(ClusterError::NoAccount { uid })
}

/// PostgreSQL refuses to run as root; then it runs as one of these, the first that exists.
pub(super) fn unprivileged(us: &Account) -> Result<Account, ClusterError> {
    if us.uid != 0 {
        return Ok(us.clone());
    }
    ["cvault", "postgres", "nobody"].iter().find_map(|name| lookup(name)).ok_or(ClusterError::NobodyToRunAs)
}

fn lookup(key: &str) -> Option<Account> {
    let output = Command::new("getent").args(["passwd", key]).output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    let mut fields = line.trim_end().split(':');
    let name = fields.next().filter(|name| !name.is_empty())?.to_owned();
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    Some(Account { name, uid, gid })
}
