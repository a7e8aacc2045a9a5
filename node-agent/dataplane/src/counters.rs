//! The counter file: what every peer transferred, in memory shared with the control process.
//!
//! One 4 KiB header, then for each slot one 64-byte identity line and one 64-byte counter line, all native-endian
//! 64-bit words stored with relaxed atomics. There is one writer, and the words live in the page cache: they survive
//! SIGKILL of either process, and reading needs no IPC. The file never shrinks; a new epoch gets a new file, so a reader
//! never faults. Identity line: key (4 words), generation, `state | port << 32 | family << 48`, address (2 words).
//! Counter line: the fields of [`Counts`] in order, one spare.
#![expect(unsafe_code, reason = "a memory-mapped file is shared with another process")]

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions, MmapRaw};

/// File name inside the state directory.
pub const FILE_NAME: &str = "counters.bin";
/// Where the file of the epoch before is kept, so that its last values can still be reported.
pub const PREVIOUS_FILE_NAME: &str = "counters.previous.bin";
/// Peers of one interface: the slot has 16 bits, and one value means "none".
pub const MAX_PEERS: u32 = 65_535;

const MAGIC: u64 = u64::from_le_bytes(*b"CVCOUNT1");
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const HEADER_WORDS: usize = HEADER_BYTES / 8;
const SLOT_WORDS: usize = 16;
const STATE_WORD: usize = 5;
const COUNTS_WORD: usize = 8;
const OCCUPIED: u64 = 1;

/// Names one life of the counters: drawn at random when they start from zero.
pub type Epoch = [u8; 16];

/// Cumulative counters of one peer. Billable are the inner bytes: IP packets after authentication and policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// IP bytes from the peer, handed to the TUN.
    pub rx_inner: u64,
    /// IP bytes to the peer, handed to the UDP socket.
    pub tx_inner: u64,
    /// UDP payload bytes from the peer, handshakes and keepalives included.
    pub rx_wire: u64,
    /// UDP payload bytes to the peer.
    pub tx_wire: u64,
    /// Packets of `rx_inner`.
    pub rx_packets: u64,
    /// Packets of `tx_inner`.
    pub tx_packets: u64,
    /// When the last handshake was completed, Unix milliseconds; 0 is never.
    pub last_handshake_ms: u64,
}

impl Counts {
    pub(crate) const WORDS: usize = 7;

    pub(crate) fn to_words(self) -> [u64; Self::WORDS] {
        [
            self.rx_inner,
            self.tx_inner,
            self.rx_wire,
            self.tx_wire,
            self.rx_packets,
            self.tx_packets,
            self.last_handshake_ms,
        ]
    }

    pub(crate) fn from_words(words: [u64; Self::WORDS]) -> Self {
        let [rx_inner, tx_inner, rx_wire, tx_wire, rx_packets, tx_packets, last_handshake_ms] = words;
        Self { rx_inner, tx_inner, rx_wire, tx_wire, rx_packets, tx_packets, last_handshake_ms }
    }
}

/// Which counter of the line.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub(crate) enum Field {
    RxInner,
    TxInner,
    RxWire,
    TxWire,
    RxPackets,
    TxPackets,
    LastHandshake,
}

/// One occupied slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCounters {
    /// Its slot.
    pub slot: u16,
    /// Whose it is.
    pub public_key: [u8; 32],
    /// Which life of that key.
    pub generation: u64,
    /// The endpoint last authenticated.
    pub endpoint: Option<SocketAddr>,
    /// The counters.
    pub counts: Counts,
}

/// Why a counter file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CounterFileError {
    /// It cannot be opened or mapped.
    #[error("cannot open the counter file")]
    Io(#[from] io::Error),
    /// It is not a counter file of this version, or it is damaged.
    #[error("the counter file is damaged or of another version")]
    Damaged,
}

/// The mapped words, readable and (by the writer only) writable.
struct Words {
    map: MmapRaw,
    writable: bool,
}

impl Words {
    fn len(&self) -> usize {
        self.map.len() / 8
    }

    fn at(&self, word: usize) -> &AtomicU64 {
        assert!(word < self.len(), "slots are checked against the capacity, and that against the length");
        // SAFETY: the word lies inside the mapping (asserted above), which lives as long as `self` and is aligned to a
        // page. Both processes touch these bytes only as atomic words, and the file is never made shorter.
        unsafe { &*self.map.as_mut_ptr().cast::<AtomicU64>().add(word) }
    }

    fn get(&self, word: usize) -> u64 {
        self.at(word).load(Ordering::Relaxed)
    }

    fn set(&self, word: usize, value: u64) {
        debug_assert!(self.writable, "only the table writes");
        self.at(word).store(value, Ordering::Relaxed);
    }

    fn header(&self) -> [u64; 6] {
        std::array::from_fn(|word| self.get(word))
    }

    fn peer(&self, slot: u16) -> Option<PeerCounters> {
        let base = base(slot);
        let state = self.at(base + STATE_WORD).load(Ordering::Acquire);
        if state & 0xff != OCCUPIED {
            return None;
        }
        let key: [u64; 4] = std::array::from_fn(|word| self.get(base + word));
        let mut public_key = [0; 32];
        for (bytes, word) in public_key.chunks_exact_mut(8).zip(key) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Some(PeerCounters {
            slot,
            public_key,
            generation: self.get(base + 4),
            endpoint: endpoint(state, [self.get(base + 6), self.get(base + 7)]),
            counts: Counts::from_words(std::array::from_fn(|word| self.get(base + COUNTS_WORD + word))),
        })
    }
}

fn base(slot: u16) -> usize {
    HEADER_WORDS + usize::from(slot) * SLOT_WORDS
}

fn endpoint(state: u64, address: [u64; 2]) -> Option<SocketAddr> {
    let [_, _, _, _, port_low, port_high, family, _] = state.to_le_bytes();
    let port = u16::from_le_bytes([port_low, port_high]);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address[0].to_ne_bytes());
    bytes[8..].copy_from_slice(&address[1].to_ne_bytes());
    match family {
        4 => Some(SocketAddr::new(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(), port)),
        6 => Some(SocketAddr::new(Ipv6Addr::from(bytes).into(), port)),
        _ => None,
    }
}

fn header_words(epoch: Epoch, boot_id: [u8; 16], capacity: u32) -> [u64; 7] {
    let pair = |bytes: [u8; 16]| {
        let both = u128::from_ne_bytes(bytes).to_ne_bytes();
        let half = |at: usize| {
            u64::from_ne_bytes(both[at..at + 8].try_into().expect("eight bytes of sixteen"))
        };
        [half(0), half(8)]
    };
    let [e0, e1] = pair(epoch);
    let [b0, b1] = pair(boot_id);
    let words = [MAGIC, u64::from(VERSION) | u64::from(capacity) << 32, e0, e1, b0, b1];
    let [w0, w1, w2, w3, w4, w5] = words;
    [w0, w1, w2, w3, w4, w5, header_crc(words)]
}

fn header_crc(words: [u64; 6]) -> u64 {
    let mut crc = crc32fast::Hasher::new();
    for word in words {
        crc.update(&word.to_ne_bytes());
    }
    u64::from(crc.finalize())
}

/// The parts of a header that checks out.
struct Header {
    epoch: Epoch,
    boot_id: [u8; 16],
    capacity: u32,
}

fn read_header(words: &Words) -> Option<Header> {
    if words.len() < HEADER_WORDS {
        return None;
    }
    let header = words.header();
    let capacity = u32::try_from(header[1] >> 32).ok()?;
    let whole = words.len() >= HEADER_WORDS + usize::try_from(capacity).ok()? * SLOT_WORDS;
    let version = header[1] & u64::from(u32::MAX);
    if header[0] != MAGIC
        || version != u64::from(VERSION)
        || capacity > MAX_PEERS
        || !whole
        || words.get(6) != header_crc(header)
    {
        return None;
    }
    let joined = |low: u64, high: u64| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&low.to_ne_bytes());
        bytes[8..].copy_from_slice(&high.to_ne_bytes());
        bytes
    };
    Some(Header { epoch: joined(header[2], header[3]), boot_id: joined(header[4], header[5]), capacity })
}

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
        let words = Words { map, writable: true };
        write_header(&words, epoch, [0; 16], capacity);
        Ok(Self { words, epoch, capacity, _file: None })
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
                        return Ok(Self { words, epoch: header.epoch, capacity, _file: Some(file) });
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
        let words = Words { map: MmapOptions::new().map_raw(&file)?, writable: true };
        write_header(&words, epoch, boot_id, capacity);
        std::fs::rename(&temporary, dir.join(FILE_NAME))?;
        Ok(Self { words, epoch, capacity, _file: Some(file) })
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
        self.words.at(base + STATE_WORD).store(OCCUPIED, Ordering::Release);
    }

    /// Gives the slot back. The final counters must be safe elsewhere.
    pub(crate) fn vacate(&self, slot: u16) {
        self.words.at(base(slot) + STATE_WORD).store(0, Ordering::Release);
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
        self.words.at(base + STATE_WORD).store(state, Ordering::Release);
    }

    /// Adds to one counter.
    pub(crate) fn add(&self, slot: u16, field: Field, amount: u64) {
        let word = base(slot) + COUNTS_WORD + field as usize;
        self.words.set(word, self.words.get(word).wrapping_add(amount));
    }

    pub(crate) fn set_last_handshake(&self, slot: u16, unix_ms: u64) {
        self.words.set(base(slot) + COUNTS_WORD + Field::LastHandshake as usize, unix_ms);
    }
}

fn write_header(words: &Words, epoch: Epoch, boot_id: [u8; 16], capacity: u32) {
    for (word, value) in header_words(epoch, boot_id, capacity).into_iter().enumerate() {
        words.set(word, value);
    }
}

fn lock(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

fn file_len(capacity: u32) -> usize {
    assert!(capacity <= MAX_PEERS, "the slot has 16 bits");
    HEADER_BYTES + capacity as usize * SLOT_WORDS * 8
}

fn slots(capacity: u32) -> impl Iterator<Item = u16> {
    (0..capacity).map_while(|slot| u16::try_from(slot).ok())
}

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

    /// One slot, if it is occupied.
    #[must_use]
    pub fn peer(&self, slot: u16) -> Option<PeerCounters> {
        if u32::from(slot) >= self.header.capacity {
            return None;
        }
        // A slot may change hands while we read it: take a reading whose owner was the same before and after.
        (0..8).find_map(|_| {
            let before = self.words.peer(slot)?;
            let after = self.words.peer(slot)?;
            let same = before.public_key == after.public_key && before.generation == after.generation;
            same.then_some(after)
        })
    }
}

#[cfg(test)]
mod tests {
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
        let previous = CounterReader::open(&dir.path().join(PREVIOUS_FILE_NAME)).unwrap();
        assert_eq!((previous.epoch(), previous.peer(0).unwrap().counts.tx_inner), ([1; 16], 77));
    }

    #[test]
    fn a_second_writer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = table(dir.path(), 1);
        assert!(CounterTable::open(dir.path(), 64, BOOT, [2; 16]).is_err());
    }
}
