//! The mapped words and their layout: the only unsafe code of the counter file.
#![expect(unsafe_code, reason = "a memory-mapped file is shared with another process")]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::MmapRaw;

use super::{Counts, Epoch, MAX_PEERS, PeerCounters};

const MAGIC: u64 = u64::from_le_bytes(*b"CVCOUNT1");
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const HEADER_WORDS: usize = HEADER_BYTES / 8;
const SLOT_WORDS: usize = 16;
pub(super) const STATE_WORD: usize = 5;
pub(super) const COUNTS_WORD: usize = 8;
/// After the counters: the greatest timestamp of an initiation.
pub(super) const TIMESTAMP_WORD: usize = 15;
pub(super) const OCCUPIED: u64 = 1;
pub(super) const VACANT: u64 = 0;
const STATE_MASK: u64 = 0xff;
const CHANGES_MASK: u64 = 0xffff_ff00;

/// The mapped words, readable and (by the writer only) writable.
pub(super) struct Words {
    pub(super) map: MmapRaw,
    pub(super) writable: bool,
}

impl Words {
    fn len(&self) -> usize {
        self.map.len() / 8
    }

    pub(super) fn at(&self, word: usize) -> &AtomicU64 {
        assert!(word < self.len(), "slots are checked against the capacity, and that against the length");
        // SAFETY: the word lies inside the mapping (asserted above), which lives as long as `self` and is aligned to a
        // page. Both processes touch these bytes only as atomic words, and the file is never made shorter.
        unsafe { &*self.map.as_mut_ptr().cast::<AtomicU64>().add(word) }
    }

    pub(super) fn get(&self, word: usize) -> u64 {
        self.at(word).load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, word: usize, value: u64) {
        debug_assert!(self.writable, "only the table writes");
        self.at(word).store(value, Ordering::Relaxed);
    }

    fn header(&self) -> [u64; 6] {
        std::array::from_fn(|word| self.get(word))
    }

    /// The slot's owner and counters. A slot may change hands while it is read: what is returned belongs to one owner,
    /// who had the slot before and after the counters were read.
    pub(super) fn peer(&self, slot: u16) -> Option<PeerCounters> {
        self.peer_with(slot, || self.counts(slot))
    }

    pub(super) fn peer_with(&self, slot: u16, mut counts: impl FnMut() -> Counts) -> Option<PeerCounters> {
        const ATTEMPTS: usize = 8;
        let base = base(slot);
        for _ in 0..ATTEMPTS {
            let before = self.owner(base)?;
            let counts = counts();
            // With the fence in `vacate`: whoever reads a later owner's counter also reads that the slot was left.
            fence(Ordering::Acquire);
            if self.owner(base).is_some_and(|after| after == before) {
                return Some(before.with(slot, counts));
            }
        }
        None
    }

    pub(super) fn counts(&self, slot: u16) -> Counts {
        Counts::from_words(std::array::from_fn(|word| self.get(base(slot) + COUNTS_WORD + word)))
    }

    fn owner(&self, base: usize) -> Option<Owner> {
        let state = self.at(base + STATE_WORD).load(Ordering::Acquire);
        (state & STATE_MASK == OCCUPIED).then(|| Owner {
            state,
            key: std::array::from_fn(|word| self.get(base + word)),
            generation: self.get(base + 4),
            address: [self.get(base + 6), self.get(base + 7)],
        })
    }

    /// The next state of a slot, which says how often it changed: two stays of one life differ.
    pub(super) fn set_state(&self, slot: u16, occupied: u64, endpoint: u64) {
        let word = self.at(base(slot) + STATE_WORD);
        let changes = word.load(Ordering::Relaxed).wrapping_add(1 << 8) & CHANGES_MASK;
        word.store(occupied | changes | endpoint, Ordering::Release);
    }
}

/// The identity line.
#[derive(PartialEq, Eq)]
struct Owner {
    state: u64,
    key: [u64; 4],
    generation: u64,
    address: [u64; 2],
}

impl Owner {
    fn with(&self, slot: u16, counts: Counts) -> PeerCounters {
        let mut public_key = [0; 32];
        for (bytes, word) in public_key.chunks_exact_mut(8).zip(self.key) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        PeerCounters {
            slot,
            public_key,
            generation: self.generation,
            endpoint: endpoint(self.state, self.address),
            counts,
        }
    }
}

pub(super) fn base(slot: u16) -> usize {
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
        let half = |at: usize| u64::from_ne_bytes(both[at..at + 8].try_into().expect("eight bytes of sixteen"));
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
pub(super) struct Header {
    pub(super) epoch: Epoch,
    pub(super) boot_id: [u8; 16],
    pub(super) capacity: u32,
}

pub(super) fn read_header(words: &Words) -> Option<Header> {
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

pub(super) fn write_header(words: &Words, epoch: Epoch, boot_id: [u8; 16], capacity: u32) {
    for (word, value) in header_words(epoch, boot_id, capacity).into_iter().enumerate() {
        words.set(word, value);
    }
}

pub(super) fn file_len(capacity: u32) -> usize {
    assert!(capacity <= MAX_PEERS, "the slot has 16 bits");
    HEADER_BYTES + capacity as usize * SLOT_WORDS * 8
}

pub(super) fn slots(capacity: u32) -> impl Iterator<Item = u16> {
    (0..capacity).map_while(|slot| u16::try_from(slot).ok())
}
