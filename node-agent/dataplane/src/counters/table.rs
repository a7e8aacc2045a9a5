//! The writer's side.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use memmap2::{MmapMut, MmapOptions};

use super::previous::{make_room, previous_files};
use super::words::{
    COUNTS_WORD, OCCUPIED, TIMESTAMP_WORD, VACANT, Words, base, file_len, read_header, slots, write_header,
};
use super::{CounterReader, Counts, Epoch, FILE_NAME, Field, PeerCounters, previous_file_name};

/// The writer's side, owned by the worker.
pub struct CounterTable {
    words: Words,
    epoch: Epoch,
    capacity: u32,
    /// Held for its lock: two writers would corrupt each other's counters.
    _file: Option<File>,
    /// From earlier epochs.
    former: Timestamps,
}

/// The greatest timestamp of each peer's initiations.
pub(crate) type Timestamps = HashMap<[u8; 32], u64>;

impl CounterTable {
    /// Counters that end with the process.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn anonymous(capacity: u32, epoch: Epoch) -> io::Result<Self> {
        let map = MmapMut::map_anon(file_len(capacity))?.into();
        let words = Words { map, writable: true };
        write_header(&words, epoch, [0; 16], capacity);
        Ok(Self { words, epoch, capacity, _file: None, former: Timestamps::new() })
    }

    /// Opens the file in `dir`, or begins a new one with `new_epoch` when it is missing, damaged, of another capacity
    /// or from before the host booted.
    ///
    /// # Errors
    /// When the directory cannot be used or another process holds the file.
    pub fn open(dir: &Path, capacity: u32, boot_id: [u8; 16], new_epoch: Epoch) -> io::Result<Self> {
        let path = dir.join(FILE_NAME);
        match lock(&path) {
            Ok(file) => {
                let words = Words { map: MmapOptions::new().map_raw(&file)?, writable: true };
                if let Some(header) = read_header(&words) {
                    if header.boot_id == boot_id && header.capacity == capacity {
                        let former = timestamps_before(dir)?;
                        return Ok(Self { words, epoch: header.epoch, capacity, _file: Some(file), former });
                    }
                    keep(dir, &path, header.epoch)?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let former = timestamps_before(dir)?;
        Ok(Self { former, ..Self::create(dir, capacity, boot_id, new_epoch)? })
    }

    fn create(dir: &Path, capacity: u32, boot_id: [u8; 16], epoch: Epoch) -> io::Result<Self> {
        let temporary = dir.join("counters.new");
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
        allocate(&file, file_len(capacity) as u64)?;
        let words = Words { map: MmapOptions::new().map_raw(&file)?, writable: true };
        write_header(&words, epoch, boot_id, capacity);
        std::fs::rename(&temporary, dir.join(FILE_NAME))?;
        Ok(Self { words, epoch, capacity, _file: Some(file), former: Timestamps::new() })
    }

    /// Timestamps of the peers in the files of earlier epochs: an initiation of then is no newer now.
    pub(crate) fn take_former(&mut self) -> Timestamps {
        std::mem::take(&mut self.former)
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
    #[cfg(test)]
    pub(crate) fn occupy(&self, slot: u16, public_key: &[u8; 32], generation: u64) {
        self.occupy_from(slot, public_key, generation, Counts::default());
    }

    /// Gives a free slot to a peer that has been counted so far.
    pub(crate) fn occupy_from(&self, slot: u16, public_key: &[u8; 32], generation: u64, counts: Counts) {
        let base = base(slot);
        for (word, value) in counts.to_words().into_iter().enumerate() {
            self.words.set(base + COUNTS_WORD + word, value);
        }
        self.words.set(base + TIMESTAMP_WORD, 0);
        for (word, bytes) in public_key.chunks_exact(8).enumerate() {
            let bytes = bytes.try_into().expect("chunks of eight");
            self.words.set(base + word, u64::from_ne_bytes(bytes));
        }
        self.words.set(base + 4, generation);
        self.words.set_state(slot, OCCUPIED, 0);
    }

    /// Gives the slot back. The final counters must be safe elsewhere.
    pub(crate) fn vacate(&self, slot: u16) {
        self.words.set_state(slot, VACANT, 0);
        // Before any counter of the next owner.
        fence(Ordering::Release);
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
        let endpoint = u64::from(endpoint.port()) << 32 | family << 48;
        self.words.set_state(slot, OCCUPIED, endpoint);
    }

    /// Adds to one counter.
    pub(crate) fn add(&self, slot: u16, field: Field, amount: u64) {
        let word = base(slot) + COUNTS_WORD + field as usize;
        self.words.set(word, self.words.get(word).wrapping_add(amount));
    }

    pub(crate) fn set_last_handshake(&self, slot: u16, unix_ms: u64) {
        self.words.set(base(slot) + COUNTS_WORD + Field::LastHandshake as usize, unix_ms);
    }

    /// The greatest timestamp of the peer's initiations, as the engine packs it; 0 is none.
    pub(crate) fn greatest_timestamp(&self, slot: u16) -> u64 {
        self.words.get(base(slot) + TIMESTAMP_WORD)
    }

    pub(crate) fn set_greatest_timestamp(&self, slot: u16, timestamp: u64) {
        self.words.set(base(slot) + TIMESTAMP_WORD, timestamp);
    }
}

/// Of all earlier epochs of which the files are there: a process that ended before it was told of its peers kept none.
fn timestamps_before(dir: &Path) -> io::Result<Timestamps> {
    let mut greatest = Timestamps::new();
    for path in previous_files(dir)? {
        match CounterReader::open(&path) {
            Ok(reader) => {
                for (public_key, timestamp) in reader.timestamps() {
                    let known = greatest.entry(public_key).or_default();
                    *known = timestamp.max(*known);
                }
            }
            Err(error) => tracing::warn!(%error, file = %path.display(), "timestamps of an earlier boot are lost"),
        }
    }
    Ok(greatest)
}

/// Renames the file of an epoch that has ended, so that its last values can still be reported.
fn keep(dir: &Path, path: &Path, epoch: Epoch) -> io::Result<()> {
    make_room(dir)?;
    std::fs::rename(path, dir.join(previous_file_name(epoch)))
}

/// Gives the file its length and its room on the disk: a page that cannot be written later ends the process (`SIGBUS`).
fn allocate(file: &File, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(len),
        done => Ok(done?),
    }
}

fn lock(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

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
        assert_eq!((peer.endpoint, peer.counts.rx_inner, peer.counts.tx_packets), (Some(endpoint), 1000, 2));
        second.add(3, Field::RxInner, 1);
        assert!(reader.is_current());
        assert_eq!(reader.peers().map(|p| p.counts.rx_inner).collect::<Vec<_>>(), [1001], "no IPC, one memory");
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
        assert_eq!(old_reader.peer(0).unwrap().counts.tx_inner, 77, "the old mapping stays readable");
        let [previous] = &previous_files(dir.path()).unwrap()[..] else { panic!("one file") };
        let previous = CounterReader::open(previous).unwrap();
        assert_eq!((previous.epoch(), previous.peer(0).unwrap().counts.tx_inner), ([1; 16], 77));
    }

    #[test]
    fn a_second_reboot_keeps_the_unread_counters_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        for boot in 1..=3 {
            let table = CounterTable::open(dir.path(), 64, [boot; 16], [boot; 16]).unwrap();
            table.occupy(0, &KEY, 1);
            table.add(0, Field::TxInner, u64::from(boot));
        }
        let kept: Vec<_> = previous_files(dir.path())
            .unwrap()
            .iter()
            .map(|file| CounterReader::open(file).unwrap().peer(0).unwrap())
            .map(|peer| peer.counts.tx_inner)
            .collect();
        assert_eq!(kept, [1, 2], "oldest first");
    }

    #[test]
    fn timestamps_outlive_a_reboot_and_the_processes_that_did_not_learn_of_their_peer() {
        let dir = tempfile::tempdir().unwrap();
        let boot = |boot: u8| CounterTable::open(dir.path(), 64, [boot; 16], [boot; 16]).unwrap();
        for (number, timestamp) in [(1, 9), (2, 7)] {
            let table = boot(number);
            table.occupy(0, &KEY, 1);
            table.set_greatest_timestamp(0, timestamp);
        }
        for _ in 0..3 {
            assert_eq!(boot(3).take_former(), Timestamps::from([(KEY, 9)]));
        }
        std::fs::write(dir.path().join(previous_file_name([1; 16])), "torn").unwrap();
        assert_eq!(boot(3).take_former(), Timestamps::from([(KEY, 7)]), "what cannot be read stops nobody");
    }

    #[test]
    fn a_reading_never_mixes_two_stays_in_a_slot() {
        const OTHER: [u8; 32] = [4; 32];
        let dir = tempfile::tempdir().unwrap();
        let table = table(dir.path(), 1);
        table.occupy(0, &KEY, 7);
        // Another owner, and then the same one again.
        for (next, amount) in [(OTHER, 5), (OTHER, 3)] {
            let mut changes = 0;
            let peer = table.words.peer_with(0, || {
                // Between the identity and the counts, once.
                if changes == 0 {
                    table.vacate(0);
                    table.occupy(0, &next, 7);
                    table.add(0, Field::RxInner, amount);
                }
                changes += 1;
                table.words.counts(0)
            });
            let peer = peer.unwrap();
            assert_eq!((peer.public_key, peer.counts.rx_inner, changes), (next, amount, 2));
        }
    }

    #[test]
    fn a_new_file_has_all_its_room_on_the_disk() {
        const BLOCK: u64 = 512;
        let dir = tempfile::tempdir().unwrap();
        let _table = table(dir.path(), 1);
        let file = std::fs::metadata(dir.path().join(FILE_NAME)).unwrap();
        assert_eq!(file.len(), file_len(64) as u64);
        assert!(file.blocks() * BLOCK >= file.len(), "{} blocks", file.blocks());
    }

    #[test]
    fn a_second_writer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = table(dir.path(), 1);
        assert!(CounterTable::open(dir.path(), 64, BOOT, [2; 16]).is_err());
    }
}
