//! The state directory: 0700, locked by one process at a time, files 0600 and replaced atomically.
//!
//! `write` is temp, fsync, rename, fsync of the directory: after a power loss a file has its old or its new content.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// An open, locked state directory. The lock is released when this is dropped or the process dies.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    _lock: File,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StateDirError {
    #[error("the state directory {path} cannot be used ({source}): run as root or give another with --state-dir")]
    Unusable { path: PathBuf, source: io::Error },
    #[error("another cvault-node-agent is using the state directory {path}: stop it first")]
    Busy { path: PathBuf },
    #[error("the state directory {path} is open to others: it must belong to this user with mode 0700")]
    NotPrivate { path: PathBuf },
}

impl StateDir {
    /// Makes the directory when it is absent, proves that it is private and can be written, and locks it.
    ///
    /// # Errors
    /// Any [`StateDirError`]; nothing that existed was changed.
    pub(crate) fn open(path: &Path) -> Result<Self, StateDirError> {
        let unusable = |source: io::Error| StateDirError::Unusable { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(unusable)?;
        let meta = fs::metadata(path).map_err(unusable)?;
        if meta.uid() != rustix::process::geteuid().as_raw() || meta.permissions().mode() & 0o077 != 0 {
            return Err(StateDirError::NotPrivate { path: path.to_owned() });
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(unusable)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StateDirError::Busy { path: path.to_owned() }),
            Err(errno) => Err(unusable(errno.into())),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The content of a file, `None` when it does not exist.
    pub(crate) fn read(&self, name: &str) -> io::Result<Option<zeroize::Zeroizing<Vec<u8>>>> {
        match File::open(self.file(name)) {
            Ok(mut file) => {
                let mut content = zeroize::Zeroizing::new(Vec::new());
                file.read_to_end(&mut content)?;
                Ok(Some(content))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        replace_file(&self.file(name), content).map(drop)
    }

    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.file(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync_directory(&self.path),
        }
    }

    /// Copies a file, so that somebody can look at it later. Answers the copy's name.
    pub(crate) fn copy_aside(&self, name: &str, why: &str, wall_ms: u64) -> io::Result<PathBuf> {
        let aside = self.file(&format!("{name}.{why}-{wall_ms}"));
        fs::copy(self.file(name), &aside)?;
        Ok(aside)
    }

    /// Renames a file out of the way, so that somebody can look at it later. Answers its new name.
    pub(crate) fn set_aside(&self, name: &str, why: &str, wall_ms: u64) -> io::Result<PathBuf> {
        let aside = self.file(&format!("{name}.{why}-{wall_ms}"));
        fs::rename(self.file(name), &aside)?;
        sync_directory(&self.path)?;
        Ok(aside)
    }
}

/// Replaces a file atomically and durably; mode 0600.
/// Answers the new file, open for reading and writing.
pub(crate) fn replace_file(path: &Path, content: &[u8]) -> io::Result<File> {
    let temporary = path.with_added_extension("new");
    let mut file =
        OpenOptions::new().create(true).truncate(true).read(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), sync_directory)?;
    Ok(file)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A directory that can be a state directory, whatever the umask.
    pub(crate) fn private_directory() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_is_private_and_has_one_user() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/state");
        let state = StateDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(matches!(StateDir::open(&path), Err(StateDirError::Busy { .. })));
        drop(state);
        StateDir::open(&path).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused_and_left_alone() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(StateDir::open(root.path()), Err(StateDirError::NotPrivate { .. })));
        assert_eq!(fs::metadata(root.path()).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_are_private_and_replaced_whole() {
        let root = testing::private_directory();
        let state = StateDir::open(root.path()).unwrap();
        state.write("a", b"one").unwrap();
        state.write("a", b"two").unwrap();
        assert_eq!(state.read("a").unwrap().unwrap().as_slice(), b"two");
        assert_eq!(fs::metadata(state.file("a")).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(state.read("b").unwrap().is_none());
    }

    #[test]
    fn a_state_directory_below_a_file_is_named_as_unusable() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, b"").unwrap();
        let error = StateDir::open(&file.join("state")).unwrap_err();
        assert!(error.to_string().contains("--state-dir"), "{error}");
    }
}
