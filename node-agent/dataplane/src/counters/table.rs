//! The writer's side.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use memmap2::{MmapMut, MmapOptions};

use super::words::{
    COUNTS_WORD, OCCUPIED, STATE_WORD, Words, base, file_len, read_header, slots, write_header,
};
use super::{Counts, Epoch, FILE_NAME, Field, PREVIOUS_FILE_NAME, PeerCounters};

/// The writer's side, owned by the worker.
pub struct CounterTable {
    words: Words,
    epoch: Epoch,
    capacity: u32,
    /// Held for its lock: two writers would corrupt each other's counters.
    _file: Option<File>,
}

impl CounterTable {
    /// Counters that end with the process.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn anonymous(capacity: u32, epoch: Epoch) -> io::Result<Self> {
        let map = MmapMut::map_anon(file_len(capacity))?.into();
        let words = Words {
            map,
            writable: true,
        };
        write_header(&words, epoch, [0; 16], capacity);
        Ok(Self {
            words,
            epoch,
            capacity,
            _file: None,
        })
    }

    /// Opens the file in `dir`, or begins a new one with `new_epoch` when it is missing, damaged, of another capacity
    /// or from before the host booted.
    ///
    /// # Errors
    /// When the directory cannot be used or another process holds the file.
    pub fn open(
        dir: &Path,
        capacity: u32,
        boot_id: [u8; 16],
        new_epoch: Epoch,
    ) -> io::Result<Self> {
        let path = dir.join(FILE_NAME);
        match lock(&path) {
            Ok(file) => {
                let words = Words {
                    map: MmapOptions::new().map_raw(&file)?,
                    writable: true,
                };
                if let Some(header) = read_header(&words) {
                    if header.boot_id == boot_id && header.capacity == capacity {
                        return Ok(Self {
                            words,
                            epoch: header.epoch,
                            capacity,
                            _file: Some(file),
                        });
                    }
                    std::fs::rename(&path, dir.join(PREVIOUS_FILE_NAME))?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Self::create(dir, capacity, boot_id, new_epoch)
    }

    fn create(dir: &Path, capacity: u32, boot_id: [u8; 16], epoch: Epoch) -> io::Result<Self> {
        let temporary = dir.join("counters.new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        file.set_len(file_len(capacity) as u64)?;
        let words = Words {
            map: MmapOptions::new().map_raw(&file)?,
            writable: true,
        };
        write_header(&words, epoch, boot_id, capacity);
        std::fs::rename(&temporary, dir.join(FILE_NAME))?;
        Ok(Self {
            words,
            epoch,
            capacity,
            _file: Some(file),
        })
    }

    /// The life of these counters.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How many peers fit.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The occupied slots, as they were found in the file.
    pub(crate) fn occupied(&self) -> HashMap<([u8; 32], u64), u16> {
        slots(self.capacity)
            .filter_map(|slot| self.words.peer(slot))
            .map(|peer| ((peer.public_key, peer.generation), peer.slot))
            .collect()
    }

    pub(crate) fn peer(&self, slot: u16) -> Option<PeerCounters> {
        self.words.peer(slot)
    }

    /// Gives a free slot to a peer, counters at zero.
    pub(crate) fn occupy(&self, slot: u16, public_key: &[u8; 32], generation: u64) {
        let base = base(slot);
        for word in 0..Counts::WORDS {
            self.words.set(base + COUNTS_WORD + word, 0);
        }
        for (word, bytes) in public_key.chunks_exact(8).enumerate() {
            let bytes = bytes.try_into().expect("chunks of eight");
            self.words.set(base + word, u64::from_ne_bytes(bytes));
        }
        self.words.set(base + 4, generation);
        self.words
            .at(base + STATE_WORD)
            .store(OCCUPIED, Ordering::Release);
    }

    /// Gives the slot back. The final counters must be safe elsewhere.
    pub(crate) fn vacate(&self, slot: u16) {
        self.words
            .at(base(slot) + STATE_WORD)
            .store(0, Ordering::Release);
    }

    /// Remembers where the peer is.
    pub(crate) fn set_endpoint(&self, slot: u16, endpoint: SocketAddr) {
        let base = base(slot);
        let mut bytes = [0; 16];
        let family = match endpoint.ip() {
            IpAddr::V4(addr) => {
                bytes[..4].copy_from_slice(&addr.octets());
                4
            }
            IpAddr::V6(addr) => {
                bytes = addr.octets();
                6
            }
        };
        for (word, half) in bytes.chunks_exact(8).enumerate() {
            let half = half.try_into().expect("chunks of eight");
            self.words.set(base + 6 + word, u64::from_ne_bytes(half));
        }
        let state = OCCUPIED | u64::from(endpoint.port()) << 32 | family << 48;
        self.words
            .at(base + STATE_WORD)
            .store(state, Ordering::Release);
    }

    /// Adds to one counter.
    pub(crate) fn add(&self, slot: u16, field: Field, amount: u64) {
        let word = base(slot) + COUNTS_WORD + field as usize;
        self.words
            .set(word, self.words.get(word).wrapping_add(amount));
    }

    pub(crate) fn set_last_handshake(&self, slot: u16, unix_ms: u64) {
        self.words.set(
            base(slot) + COUNTS_WORD + Field::LastHandshake as usize,
            unix_ms,
        );
    }
}

fn lock(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::super::CounterReader;
    use super::*;

    const BOOT: [u8; 16] = [7; 16];
    const KEY: [u8; 32] = [9; 32];

    fn table(dir: &Path, epoch: u8) -> CounterTable {
        CounterTable::open(dir, 64, BOOT, [epoch; 16]).unwrap()
    }

    #[test]
    fn counters_survive_a_process_that_dies_without_cleanup() {
        let dir = tempfile::tempdir().unwrap();
        let first = table(dir.path(), 1);
        let endpoint: SocketAddr = "[2001:db8::5]:4500".parse().unwrap();
        first.occupy(3, &KEY, 42);
        first.set_endpoint(3, endpoint);
        first.add(3, Field::RxInner, 1000);
        first.add(3, Field::TxPackets, 2);
        let reader = CounterReader::open(&dir.path().join(FILE_NAME)).unwrap();
        assert_eq!(reader.peer(3).unwrap().counts.rx_inner, 1000);
        drop(first);

        let second = table(dir.path(), 2);
        assert_eq!(second.epoch(), [1; 16], "the epoch goes on");
        assert_eq!(second.occupied(), HashMap::from([((KEY, 42), 3)]));
        let peer = second.peer(3).unwrap();
        assert_eq!(
            (peer.endpoint, peer.counts.rx_inner, peer.counts.tx_packets),
            (Some(endpoint), 1000, 2)
        );
        second.add(3, Field::RxInner, 1);
        assert!(reader.is_current());
        assert_eq!(
            reader
                .peers()
                .map(|p| p.counts.rx_inner)
                .collect::<Vec<_>>(),
            [1001],
            "no IPC, one memory"
        );
    }

    #[test]
    fn a_damaged_header_begins_a_new_epoch() {
        let dir = tempfile::tempdir().unwrap();
        table(dir.path(), 1).occupy(0, &KEY, 1);
        let path = dir.path().join(FILE_NAME);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let second = table(dir.path(), 2);
        assert_eq!(second.epoch(), [2; 16]);
        assert!(second.occupied().is_empty());
    }

    #[test]
    fn an_empty_or_short_file_begins_a_new_epoch() {
        for len in [0, 100, 5000] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(FILE_NAME), vec![0_u8; len]).unwrap();
            assert_eq!(table(dir.path(), 2).epoch(), [2; 16], "{len} bytes");
        }
    }

    #[test]
    fn another_boot_begins_a_new_epoch_and_keeps_the_last_values() {
        let dir = tempfile::tempdir().unwrap();
        let first = table(dir.path(), 1);
        first.occupy(0, &KEY, 1);
        first.add(0, Field::TxInner, 77);
        let old_reader = CounterReader::open(&dir.path().join(FILE_NAME)).unwrap();
        drop(first);
        let second = CounterTable::open(dir.path(), 64, [8; 16], [2; 16]).unwrap();
        assert_eq!(second.epoch(), [2; 16]);
        assert!(!old_reader.is_current());
        assert_eq!(
            old_reader.peer(0).unwrap().counts.tx_inner,
            77,
            "the old mapping stays readable"
        );
        let previous = CounterReader::open(&dir.path().join(PREVIOUS_FILE_NAME)).unwrap();
        assert_eq!(
            (previous.epoch(), previous.peer(0).unwrap().counts.tx_inner),
            ([1; 16], 77)
        );
    }

    #[test]
    fn a_second_writer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = table(dir.path(), 1);
        assert!(CounterTable::open(dir.path(), 64, BOOT, [2; 16]).is_err());
    }
}
