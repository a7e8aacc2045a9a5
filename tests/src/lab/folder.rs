//! The folder of a lab (logs, configuration, data) and where the programs under test are.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

const PREFIX: &str = "cvault-lab-";

static COUNTER: AtomicU32 = AtomicU32::new(0);

pub(super) struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    /// `<tmp>/cvault-lab-<pid>-<n>`; folders of labs whose program has ended are removed first.
    pub(super) fn create() -> Result<Self> {
        let root = std::env::temp_dir();
        sweep(&root);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{PREFIX}{}-{number}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path, keep: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes the folders of programs that have ended.
fn sweep(root: &Path) {
    remove_where(root, |pid| !Path::new("/proc").join(pid).exists());
}

/// Removes this program's folders, after its machines have been switched off. A process that is just being ended may still
/// write, so it is tried again.
pub(super) fn remove_own() {
    let own = std::process::id().to_string();
    let _ = super::eventually("the lab's folders are removed", 3, || {
        if remove_where(&std::env::temp_dir(), |pid| pid == own) {
            Ok(())
        } else {
            bail!("a folder is still written to")
        }
    });
}

fn remove_where(root: &Path, wanted: impl Fn(&str) -> bool) -> bool {
    let mut all = true;
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(&wanted) {
            all &= std::fs::remove_dir_all(entry.path()).is_ok();
        }
    }
    all
}

pub(super) fn find_logs(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let entry = entry?;
        let path = entry.path();
        let kind = entry.file_type()?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if kind.is_dir() {
            find_logs(&path, found)?;
        } else if kind.is_file() && (name.ends_with(".log") || name.ends_with(".log.old")) {
            found.push(path);
        }
    }
    Ok(())
}

pub(super) fn print_tail(log: &Path, lines: usize) {
    let mut text = String::new();
    let read = std::fs::File::open(log).and_then(|mut file| file.read_to_string(&mut text));
    if read.is_err() || text.is_empty() {
        return;
    }
    let all: Vec<&str> = text.lines().collect();
    eprintln!("──── {} (last {} of {} lines)", log.display(), lines.min(all.len()), all.len());
    for line in &all[all.len().saturating_sub(lines)..] {
        eprintln!("{line}");
    }
}

/// A program built by this workspace: beside the running executable, or where `CVAULT_BIN_DIR` says.
pub fn binary(name: &str) -> Result<String> {
    let mut folders: Vec<PathBuf> = std::env::var_os("CVAULT_BIN_DIR").map(PathBuf::from).into_iter().collect();
    let here = std::env::current_exe().context("find the running executable")?;
    folders.extend(here.ancestors().skip(1).take(2).map(Path::to_path_buf));
    for folder in &folders {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(path.display().to_string());
        }
    }
    bail!("{name} is not built: run `cargo build --bins` first (looked in {folders:?})")
}
