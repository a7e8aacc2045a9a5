//! The files of earlier epochs, kept until their last values are reported: `counters.previous.<32 hex of the epoch>.bin`.

use std::io;
use std::path::{Path, PathBuf};

use super::Epoch;

/// More would mean that nobody has reported for this many reboots: up to 8 MB each.
const MAX_PREVIOUS_FILES: usize = 16;

const PREFIX: &str = "counters.previous.";
const SUFFIX: &str = ".bin";

/// The name of the file of an earlier epoch.
#[must_use]
pub fn previous_file_name(epoch: Epoch) -> String {
    format!("{PREFIX}{}{SUFFIX}", hex::encode(epoch))
}

/// The files of earlier epochs in `dir`, oldest first. Whoever has reported one removes it.
///
/// # Errors
/// When the directory cannot be read. One that does not exist holds none.
pub fn previous_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if is_previous(&entry.file_name().to_string_lossy()) {
            // Its content no longer changes, so this is when its epoch was last alive.
            files.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    files.sort();
    Ok(files.into_iter().map(|(_, path)| path).collect())
}

fn is_previous(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_suffix(SUFFIX))
        .is_some_and(|epoch| epoch.len() == 32 && epoch.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Removes the oldest files when there are so many that nobody seems to report them.
pub(super) fn make_room(dir: &Path) -> io::Result<()> {
    let files = previous_files(dir)?;
    let excess = (files.len() + 1).saturating_sub(MAX_PREVIOUS_FILES);
    for file in &files[..excess] {
        tracing::error!(file = %file.display(), "counters of an earlier boot were never reported and are given up");
        std::fs::remove_file(file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn files_are_listed_oldest_first_and_only_the_oldest_are_given_up() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(previous_files(&dir.path().join("none")).unwrap(), Vec::<PathBuf>::new());
        let write = |name: &str, age_s: u64| {
            let path = dir.path().join(name);
            let modified = SystemTime::now() - Duration::from_secs(age_s);
            File::create(&path).unwrap().set_modified(modified).unwrap();
            path
        };
        write("counters.bin", 5);
        write("counters.previous.bin", 5);
        write("counters.previous.zz.bin", 5);
        let newest_first: Vec<_> =
            (0..16).map(|age| write(&previous_file_name([200 - age; 16]), u64::from(age))).collect();
        let mut oldest_first = newest_first;
        oldest_first.reverse();
        assert_eq!(previous_files(dir.path()).unwrap(), oldest_first);
        make_room(dir.path()).unwrap();
        assert_eq!(previous_files(dir.path()).unwrap(), oldest_first[1..]);
        make_room(dir.path()).unwrap();
        assert_eq!(previous_files(dir.path()).unwrap().len(), 15);
    }
}
