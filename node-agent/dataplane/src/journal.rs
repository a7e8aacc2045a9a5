//! `closed.journal`: the final counters of peers that were removed, until the control process has taken them over.
//!
//! Records of 128 bytes, appended before the peer's slot can be used again: magic, CRC-32 of the rest, generation,
//! epoch, public key, the seven counters, a salt. A record that is cut short by a crash ends the journal; one that does
//! not check out is skipped.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::counters::{Counts, Epoch};

mod ended;
pub(crate) use ended::MAX_ENDED;
use ended::Ring;

/// File name inside the state directory.
pub const FILE_NAME: &str = "closed.journal";

const MAGIC: [u8; 4] = *b"CVC1";
const RECORD_BYTES: usize = 128;
/// Below this the acknowledged front of a journal that is still in use is not worth a copy: it waits for a moment in
/// which all of it is acknowledged. Under removals without a pause that moment may never come.
const LONG_BYTES: u64 = 1 << 20;

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
    /// `salt` makes every record its own, so that its CRC tells a refilled journal from the one before.
    fn encode(&self, salt: u64) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        record[..4].copy_from_slice(&MAGIC);
        record[8..16].copy_from_slice(&self.generation.to_le_bytes());
        record[16..32].copy_from_slice(&self.epoch);
        record[32..64].copy_from_slice(&self.public_key);
        for (bytes, word) in record[64..120].chunks_exact_mut(8).zip(self.counts.to_words()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        record[120..].copy_from_slice(&salt.to_le_bytes());
        let crc = crc32fast::hash(&record[8..]);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
        record
    }

    fn decode(record: &[u8; RECORD_BYTES]) -> Option<Self> {
        let word = |at: usize| {
            let bytes = record[at..at + 8].try_into().expect("eight bytes of the record");
            u64::from_le_bytes(bytes)
        };
        let crc = crc32fast::hash(&record[8..]).to_le_bytes();
        if record[..4] != MAGIC || record[4..8] != crc {
            return None;
        }
        Some(Self {
            epoch: record[16..32].try_into().expect("sixteen bytes of the record"),
            public_key: record[32..64].try_into().expect("thirty-two bytes of the record"),
            generation: word(8),
            counts: Counts::from_words(std::array::from_fn(|i| word(64 + i * 8))),
        })
    }
}

/// What a journal holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Closed {
    /// The sound records in order.
    pub peers: Vec<ClosedPeer>,
    /// Records that were skipped because they do not check out.
    pub damaged: usize,
    /// The length of all whole records, damaged ones included.
    pub len: u64,
    /// CRC-32 of the last whole record; none when there is none.
    pub last_crc: Option<u32>,
}

impl Closed {
    /// What to send as `cvault_journal_ack` once all of it is taken over; none when the journal is empty.
    #[must_use]
    pub fn ack(&self) -> Option<JournalAck> {
        let len = self.len;
        self.last_crc.map(|last_crc| JournalAck { len, last_crc })
    }
}

/// Names what was read of a journal: `<len>:<8 hex>`. The length alone could also be that of a journal refilled since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalAck {
    /// [`Closed::len`].
    pub len: u64,
    /// [`Closed::last_crc`].
    pub last_crc: u32,
}

impl JournalAck {
    /// How many records from the front it names; 0 when they are not the ones it was made of.
    fn records_of(self, records: &[[u8; RECORD_BYTES]]) -> usize {
        let count = usize::try_from(self.len / RECORD_BYTES as u64).unwrap_or(usize::MAX);
        let last = count.checked_sub(1).and_then(|last| records.get(last));
        match last {
            Some(record) if crc32fast::hash(record) == self.last_crc => count,
            Some(_) | None => 0,
        }
    }
}

impl fmt::Display for JournalAck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:08x}", self.len, self.last_crc)
    }
}

impl FromStr for JournalAck {
    type Err = BadAck;

    fn from_str(text: &str) -> Result<Self, BadAck> {
        let (len, crc) = text.split_once(':').ok_or(BadAck)?;
        let mut last_crc = [0; 4];
        hex::decode_to_slice(crc, &mut last_crc).map_err(|_| BadAck)?;
        Ok(Self { len: len.parse().map_err(|_| BadAck)?, last_crc: u32::from_be_bytes(last_crc) })
    }
}

/// Not of the form `<len>:<8 hex>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an acknowledgement of the journal")]
pub struct BadAck;

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

    /// All sound records.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn read(&self) -> io::Result<Closed> {
        self.read_after(None)
    }

    /// The sound records behind those that `taken` names, if they are still there; else all. The rest of [`Closed`] is
    /// about the whole journal.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn read_after(&self, taken: Option<JournalAck>) -> io::Result<Closed> {
        match File::open(&self.path) {
            Ok(file) => scan(file, taken),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Closed::default()),
            Err(error) => Err(error),
        }
    }
}

fn scan(mut file: File, taken: Option<JournalAck>) -> io::Result<Closed> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let (records, _torn) = bytes.as_chunks::<RECORD_BYTES>();
    let behind = &records[taken.map_or(0, |taken| taken.records_of(records))..];
    let peers: Vec<_> = behind.iter().filter_map(ClosedPeer::decode).collect();
    Ok(Closed {
        damaged: behind.len() - peers.len(),
        peers,
        len: (records.len() * RECORD_BYTES) as u64,
        last_crc: records.last().map(|record| crc32fast::hash(record)),
    })
}

/// Appends to the journal, owned by the worker.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    file: File,
    len: u64,
    last_crc: Option<u32>,
    ring: Ring,
    /// Found at the start.
    ended: Vec<ClosedPeer>,
}

impl Journal {
    /// Opens or creates it in `dir`, and beside it what outlives the acknowledgements; a torn tail is cut off.
    ///
    /// # Errors
    /// When the file cannot be used.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let file = options().open(dir.join(FILE_NAME))?;
        let Closed { peers, damaged, len, last_crc } = scan(file.try_clone()?, None)?;
        if damaged > 0 {
            tracing::error!(damaged, "records in the journal of closed peers are damaged");
        }
        file.set_len(len)?;
        let (ring, ended) = Ring::open(dir, &peers)?;
        Ok(Self { dir: dir.to_owned(), file, len, last_crc, ring, ended })
    }

    /// What processes before this one have closed, as far as it is remembered; of one life the last record is the newest.
    pub fn take_ended(&mut self) -> Vec<ClosedPeer> {
        std::mem::take(&mut self.ended)
    }

    /// Appends one record, as [`Self::append_all`] does.
    ///
    /// # Errors
    /// When it could not be written completely; the journal is then as before.
    pub fn append(&mut self, peer: &ClosedPeer) -> io::Result<()> {
        self.append_all(std::slice::from_ref(peer))
    }

    /// Appends one record for each, in one write. They are in the page cache, so they survive this process. What survives
    /// the host is the control process's spool, for final counters as for those of living peers.
    ///
    /// # Errors
    /// When they could not be written completely; the journal is then as before.
    pub fn append_all(&mut self, peers: &[ClosedPeer]) -> io::Result<()> {
        let records: Vec<_> = peers.iter().map(|peer| peer.encode(rand::random())).collect();
        let Some(last) = records.last() else {
            return Ok(());
        };
        let bytes = records.as_flattened();
        if let Err(error) = self.file.write_all_at(bytes, self.len) {
            self.file.set_len(self.len)?;
            return Err(error);
        }
        self.len += bytes.len() as u64;
        self.last_crc = Some(crc32fast::hash(last));
        self.ring.put(peers);
        Ok(())
    }

    /// Empties the journal if all of it has been taken over. If peers were closed since, they stay, and what is in
    /// front of them goes once it is long. An acknowledgement of anything else does nothing. What it holds is remembered first;
    /// that this fails, on a full disk, must not keep it from making room.
    ///
    /// # Errors
    /// When the file cannot be cut; no record is lost then.
    pub fn acknowledge(&mut self, ack: JournalAck) -> io::Result<()> {
        if ack.len == self.len && Some(ack.last_crc) == self.last_crc {
            self.ring.flush();
            self.file.set_len(0)?;
            self.len = 0;
            self.last_crc = None;
            // On a full disk there is room only now.
            self.ring.flush();
        } else if ack.len >= LONG_BYTES && self.begins_with(ack)? {
            self.ring.flush();
            self.keep_behind(ack.len)?;
            self.ring.flush();
        }
        Ok(())
    }

    fn path(&self) -> PathBuf {
        self.dir.join(FILE_NAME)
    }

    fn begins_with(&self, ack: JournalAck) -> io::Result<bool> {
        if ack.len >= self.len || !ack.len.is_multiple_of(RECORD_BYTES as u64) {
            return Ok(false);
        }
        let mut record = [0; RECORD_BYTES];
        self.file.read_exact_at(&mut record, ack.len - RECORD_BYTES as u64)?;
        Ok(crc32fast::hash(&record) == ack.last_crc)
    }

    /// Goes on in a new file with the records from `start` on. At every moment one whole file has the name; as with
    /// [`Self::append_all`] nothing waits for the disk, because the packets would wait too.
    fn keep_behind(&mut self, start: u64) -> io::Result<()> {
        let mut rest = vec![0; usize::try_from(self.len - start).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut rest, start)?;
        let temporary = self.dir.join("closed.new");
        let mut file = options().truncate(true).open(&temporary)?;
        file.write_all(&rest)?;
        std::fs::rename(&temporary, self.path())?;
        self.file = file;
        self.len -= start;
        Ok(())
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(generation: u64) -> ClosedPeer {
        let counts = Counts { rx_inner: generation * 10, last_handshake_ms: 5, ..Counts::default() };
        ClosedPeer { epoch: [1; 16], public_key: [2; 32], generation, counts }
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
        let whole = reader.read().unwrap();
        assert_eq!((&whole.peers[..], whole.damaged, whole.len), (&[closed(1), closed(2)][..], 0, 256));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend_from_slice(&closed(3).encode(0)[..77]);
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(reader.read().unwrap(), whole);

        let mut journal = Journal::open(dir.path()).unwrap();
        journal.append(&closed(4)).unwrap();
        journal.append_all(&[closed(5), closed(6)]).unwrap();
        assert_eq!(reader.read().unwrap().peers, [1, 2, 4, 5, 6].map(closed));
        assert_eq!(reader.read().unwrap().last_crc, journal.last_crc);
    }

    #[test]
    fn a_damaged_record_hides_no_other_record() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        for generation in 1..=3 {
            journal.append(&closed(generation)).unwrap();
        }
        drop(journal);
        let path = dir.path().join(FILE_NAME);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[128 + 70] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let reader = JournalReader::new(path);
        let seen = reader.read().unwrap();
        assert_eq!((&seen.peers[..], seen.damaged), (&[closed(1), closed(3)][..], 1));
        let mut journal = Journal::open(dir.path()).unwrap();
        assert_eq!(reader.read().unwrap(), seen, "opening cuts nothing off");
        journal.acknowledge(seen.ack().unwrap()).unwrap();
        assert_eq!(reader.read().unwrap(), Closed::default());
    }

    #[test]
    fn only_an_acknowledgement_of_everything_empties_it() {
        let dir = tempfile::tempdir().unwrap();
        let reader = JournalReader::new(dir.path().join(FILE_NAME));
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.append(&closed(1)).unwrap();
        let seen = reader.read().unwrap().ack().unwrap();
        journal.append(&closed(2)).unwrap();
        journal.acknowledge(seen).unwrap();
        assert_eq!(reader.read().unwrap().peers.len(), 2, "one came in between");
        journal.acknowledge(reader.read().unwrap().ack().unwrap()).unwrap();
        assert_eq!(reader.read().unwrap(), Closed::default());
        journal.append(&closed(3)).unwrap();
        assert_eq!(reader.read().unwrap().peers, [closed(3)]);
    }

    #[test]
    fn an_old_acknowledgement_does_not_empty_a_journal_refilled_to_the_same_length() {
        let dir = tempfile::tempdir().unwrap();
        let reader = JournalReader::new(dir.path().join(FILE_NAME));
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.append(&closed(1)).unwrap();
        let old = reader.read().unwrap().ack().unwrap();
        journal.acknowledge(old).unwrap();
        journal.append(&closed(1)).unwrap();
        let refilled = reader.read().unwrap();
        assert_eq!(refilled.len, old.len, "and even the peer is the same");
        assert_eq!(reader.read_after(Some(old)).unwrap(), refilled);
        journal.acknowledge(old).unwrap();
        assert_eq!(reader.read().unwrap(), refilled);

        drop(journal);
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.acknowledge(old).unwrap();
        assert_eq!(reader.read().unwrap(), refilled, "nor after a restart");
    }

    #[test]
    fn removals_without_a_pause_do_not_keep_the_journal_growing() {
        let dir = tempfile::tempdir().unwrap();
        let reader = JournalReader::new(dir.path().join(FILE_NAME));
        let mut journal = Journal::open(dir.path()).unwrap();
        let records = LONG_BYTES / RECORD_BYTES as u64;
        for generation in 1..=records {
            journal.append(&closed(generation)).unwrap();
        }
        let ack = reader.read().unwrap().ack().unwrap();
        journal.append(&closed(records + 1)).unwrap();
        let other = JournalAck { last_crc: !ack.last_crc, ..ack };
        let whole = reader.read().unwrap();
        for wrong in [other, JournalAck { len: ack.len + 1, ..ack }] {
            journal.acknowledge(wrong).unwrap();
            assert_eq!(reader.read().unwrap(), whole);
        }
        journal.acknowledge(ack).unwrap();
        journal.append(&closed(records + 2)).unwrap();
        let rest = reader.read_after(Some(ack)).unwrap();
        assert_eq!(rest.peers, [closed(records + 1), closed(records + 2)]);
        assert_eq!(rest.len, 256);
        journal.acknowledge(rest.ack().unwrap()).unwrap();
        assert_eq!(reader.read().unwrap(), Closed::default());
    }

    #[test]
    fn what_was_taken_before_is_not_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let reader = JournalReader::new(dir.path().join(FILE_NAME));
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.append(&closed(1)).unwrap();
        let first = reader.read().unwrap().ack();
        journal.append(&closed(2)).unwrap();
        let second = reader.read_after(first).unwrap();
        assert_eq!((&second.peers[..], second.len), (&[closed(2)][..], 256));
        assert_eq!(second.ack(), reader.read().unwrap().ack());
        let nothing = reader.read_after(second.ack()).unwrap();
        assert_eq!((&nothing.peers[..], nothing.ack()), (&[][..], second.ack()));
    }

    #[test]
    fn what_was_closed_is_remembered_over_restarts_though_it_was_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let reader = JournalReader::new(dir.path().join(FILE_NAME));
        let mut journal = Journal::open(dir.path()).unwrap();
        assert_eq!(journal.take_ended(), []);
        journal.append_all(&[closed(1), closed(2)]).unwrap();
        journal.acknowledge(reader.read().unwrap().ack().unwrap()).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().take_ended(), [closed(1), closed(2)]);
        journal.append(&closed(3)).unwrap();
        let ended = Journal::open(dir.path()).unwrap().take_ended();
        assert_eq!(ended, [1, 2, 3].map(closed), "of one life the newest comes last");
    }

    #[test]
    fn an_acknowledgement_reads_as_it_is_written() {
        let ack = JournalAck { len: 256, last_crc: 0xbeef };
        assert_eq!(ack.to_string(), "256:0000beef");
        assert_eq!("256:0000beef".parse(), Ok(ack));
        for text in ["", "256", "256:", ":0000beef", "256:beef", "-1:0000beef", "256:0000beefff"] {
            assert_eq!(text.parse::<JournalAck>(), Err(BadAck), "{text:?}");
        }
    }
}
