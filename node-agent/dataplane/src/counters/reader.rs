//! The reader's side.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memmap2::MmapOptions;

use super::words::{Header, TIMESTAMP_WORD, Words, base, read_header, slots};
use super::{CounterFileError, Epoch, PeerCounters};

/// The reader's side, for the control process. Values are at most one pass of the worker old.
pub struct CounterReader {
    words: Words,
    path: PathBuf,
    inode: u64,
    header: Header,
}

impl CounterReader {
    /// Maps the file read-only.
    ///
    /// # Errors
    /// [`CounterFileError::Io`] when it cannot be opened, [`CounterFileError::Damaged`] when it is no counter file.
    pub fn open(path: &Path) -> Result<Self, CounterFileError> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        let words = Words { map: MmapOptions::new().map_raw_read_only(&file)?, writable: false };
        let header = read_header(&words).ok_or(CounterFileError::Damaged)?;
        Ok(Self { words, path: path.to_owned(), inode, header })
    }

    /// The life of these counters.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.header.epoch
    }

    /// The boot of the host in which they count.
    #[must_use]
    pub fn boot_id(&self) -> [u8; 16] {
        self.header.boot_id
    }

    /// How many peers fit.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.header.capacity
    }

    /// False when the path leads to another file by now: open it again.
    #[must_use]
    pub fn is_current(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode)
    }

    /// All occupied slots.
    pub fn peers(&self) -> impl Iterator<Item = PeerCounters> {
        slots(self.header.capacity).filter_map(|slot| self.peer(slot))
    }

    /// The greatest timestamp of each peer's initiations, once for every life it has.
    pub(super) fn timestamps(&self) -> impl Iterator<Item = ([u8; 32], u64)> {
        self.peers().map(|peer| (peer.public_key, self.words.get(base(peer.slot) + TIMESTAMP_WORD)))
    }

    /// One slot, if it is occupied.
    #[must_use]
    pub fn peer(&self, slot: u16) -> Option<PeerCounters> {
        (u32::from(slot) < self.header.capacity).then(|| self.words.peer(slot)).flatten()
    }
}
