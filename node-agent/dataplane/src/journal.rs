//! `closed.journal`: the final counters of peers that were removed, until the control process has taken them over.
//!
//! Records of 128 bytes, appended before the peer's slot can be used again: magic, CRC-32 of the rest, generation,
//! epoch, public key, the seven counters. A record that is cut short by a crash ends the journal.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::counters::{Counts, Epoch};

/// File name inside the state directory.
pub const FILE_NAME: &str = "closed.journal";

const MAGIC: [u8; 4] = *b"CVC1";
const RECORD_BYTES: usize = 128;

/// A peer that is gone, with its last counters. They are cumulative: a record that appears twice says the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClosedPeer {
    /// The epoch in which it was counted.
    pub epoch: Epoch,
    /// Whose counters.
    pub public_key: [u8; 32],
    /// Which life of that key.
    pub generation: u64,
    /// The final values.
    pub counts: Counts,
}

impl ClosedPeer {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        record[..4].copy_from_slice(&MAGIC);
        record[8..16].copy_from_slice(&self.generation.to_le_bytes());
        record[16..32].copy_from_slice(&self.epoch);
        record[32..64].copy_from_slice(&self.public_key);
        for (bytes, word) in record[64..120]
            .chunks_exact_mut(8)
            .zip(self.counts.to_words())
        {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32fast::hash(&record[8..]);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
        record
    }

    fn decode(record: &[u8; RECORD_BYTES]) -> Option<Self> {
        let word = |at: usize| {
            let bytes = record[at..at + 8]
                .try_into()
                .expect("eight bytes of the record");
            u64::from_le_bytes(bytes)
        };
        let crc = crc32fast::hash(&record[8..]).to_le_bytes();
        if record[..4] != MAGIC || record[4..8] != crc {
            return None;
        }
        Some(Self {
            epoch: record[16..32]
                .try_into()
                .expect("sixteen bytes of the record"),
            public_key: record[32..64]
                .try_into()
                .expect("thirty-two bytes of the record"),
            generation: word(8),
            counts: Counts::from_words(std::array::from_fn(|i| word(64 + i * 8))),
        })
    }
}

/// What a journal holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Closed {
    /// The records in order.
    pub peers: Vec<ClosedPeer>,
    /// The length to acknowledge with `cvault_journal_ack`.
    pub len: u64,
}

/// Reads the journal, for the control process.
#[derive(Clone, Debug)]
pub struct JournalReader {
    path: PathBuf,
}

impl JournalReader {
    /// Reads from the file at `path`, which need not exist yet.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// All whole records.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn read(&self) -> io::Result<Closed> {
        match File::open(&self.path) {
            Ok(file) => scan(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Closed::default()),
            Err(error) => Err(error),
        }
    }
}

fn scan(mut file: File) -> io::Result<Closed> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let (records, _torn) = bytes.as_chunks::<RECORD_BYTES>();
    let peers: Vec<_> = records.iter().map_while(ClosedPeer::decode).collect();
    let len = (peers.len() * RECORD_BYTES) as u64;
    Ok(Closed { peers, len })
}

/// Appends to the journal, owned by the worker.
#[derive(Debug)]
pub struct Journal {
    file: File,
    len: u64,
}

impl Journal {
    /// Opens or creates it in `dir`; a torn tail is cut off.
    ///
    /// # Errors
    /// When the file cannot be used.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join(FILE_NAME);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let len = scan(file.try_clone()?)?.len;
        file.set_len(len)?;
        Ok(Self { file, len })
    }

    /// Appends one record. It is in the page cache, so it survives this process; [`Self::sync`] makes it survive the host.
    ///
    /// # Errors
    /// When it could not be written completely; the journal is then as before.
    pub fn append(&mut self, peer: &ClosedPeer) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.len))?;
        if let Err(error) = self.file.write_all(&peer.encode()) {
            self.file.set_len(self.len)?;
            return Err(error);
        }
        self.len += RECORD_BYTES as u64;
        Ok(())
    }

    /// Empties the journal if `len` bytes, all of it, have been taken over; otherwise nothing happens.
    ///
    /// # Errors
    /// When the file cannot be cut.
    pub fn acknowledge(&mut self, len: u64) -> io::Result<()> {
        if len == self.len && len > 0 {
            self.file.set_len(0)?;
            self.len = 0;
        }
        Ok(())
    }

    /// A handle that another thread can [`File::sync_data`] without holding up the worker.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated.
    pub fn sync_handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(generation: u64) -> ClosedPeer {
        let counts = Counts {
            rx_inner: generation * 10,
            last_handshake_ms: 5,
            ..Counts::default()
        };
        ClosedPeer {
            epoch: [1; 16],
            public_key: [2; 32],
            generation,
            counts,
        }
    }

    #[test]
    fn a_torn_tail_is_ignored_and_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let reader = JournalReader::new(path.clone());
        assert_eq!(reader.read().unwrap(), Closed::default());
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.append(&closed(1)).unwrap();
        journal.append(&closed(2)).unwrap();
        drop(journal);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(&closed(3).encode()[..77]);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(
            reader.read().unwrap(),
            Closed {
                peers: vec![closed(1), closed(2)],
                len: 256
            }
        );

        let mut journal = Journal::open(dir.path()).unwrap();
        journal.append(&closed(4)).unwrap();
        assert_eq!(
            reader.read().unwrap().peers,
            [closed(1), closed(2), closed(4)]
        );
    }

    #[test]
    fn a_damaged_record_ends_the_journal() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        for generation in 1..=3 {
            journal.append(&closed(generation)).unwrap();
        }
        let path = dir.path().join(FILE_NAME);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[128 + 70] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(JournalReader::new(path).read().unwrap().peers, [closed(1)]);
    }

    #[test]
    fn only_an_acknowledgement_of_everything_empties_it() {
        let dir = tempfile::tempdir().unwrap();
        let reader = JournalReader::new(dir.path().join(FILE_NAME));
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.append(&closed(1)).unwrap();
        let seen = reader.read().unwrap().len;
        journal.append(&closed(2)).unwrap();
        journal.acknowledge(seen).unwrap();
        assert_eq!(reader.read().unwrap().peers.len(), 2, "one came in between");
        journal.acknowledge(256).unwrap();
        assert_eq!(reader.read().unwrap(), Closed::default());
        journal.append(&closed(3)).unwrap();
        assert_eq!(reader.read().unwrap().peers, [closed(3)]);
    }
}
