//! Metering: from the tunnel's counter file and journal to usage windows in the spool.
//!
//! Everything is cumulative, so nothing can be counted twice; a final value leaves the journal only when it is durable
//! in the spool. The first pass after a start tells every peer again, which repairs whatever the other side lost.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use cvault_dataplane::counters::{self, CounterFileError, CounterReader, Counts};
use cvault_dataplane::journal::{self, JournalReader};
use cvault_node_protocol::v1;

use crate::clock::Moment;
use crate::desired::{Desired, Life, PublicKey};
use crate::spool::{Epoch, MAX_BYTES, Span, Spool, SpoolError};
use crate::state_dir::StateDir;

const SPOOL_FILE: &str = "usage.spool";
const NO_HANDSHAKE: u64 = u64::MAX;

pub(crate) struct Meter {
    pub(crate) spool: Spool,
    counter_file: PathBuf,
    previous_file: PathBuf,
    journal: JournalReader,
    boot_id: [u8; 16],
    reader: Option<CounterReader>,
    /// What was spooled last.
    known: HashMap<(Epoch, Life), Counts>,
    /// Journal bytes that are in the spool, while the tunnel has not emptied the journal.
    taken: u64,
    last_pass: Moment,
}

/// What a pass found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pass {
    /// The length to acknowledge to the tunnel, when the journal holds something.
    pub(crate) journal_bytes: Option<u64>,
    /// The lives that the tunnel counts now.
    pub(crate) counted: HashSet<Life>,
    /// Readings that belong to no known device; they are not billed.
    pub(crate) strangers: usize,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum MeterError {
    #[error("the tunnel's counters cannot be read")]
    Counters(#[from] CounterFileError),
    #[error("the tunnel's journal cannot be read")]
    Journal(#[source] io::Error),
    #[error("usage cannot be kept")]
    Spool(#[from] SpoolError),
}

impl Meter {
    /// Opens the spool; a damaged one is renamed, and every peer's cumulative values are told anew.
    pub(crate) fn open(dir: &StateDir, boot_id: [u8; 16], now: Moment) -> anyhow::Result<Self> {
        let path = dir.file(SPOOL_FILE);
        let spool = match Spool::open(&path, MAX_BYTES, now.wall_ms) {
            Ok(spool) => spool,
            Err(error) => {
                let aside = dir.set_aside(SPOOL_FILE, "refused", now.wall_ms)?;
                tracing::error!(error = crate::chain(&error), kept_as = %aside.display(), "refused the usage spool; its windows are not sent");
                Spool::open(&path, MAX_BYTES, now.wall_ms)?
            }
        };
        let last_pass = spool.last_end(boot_id).unwrap_or(now);
        Ok(Self {
            spool,
            counter_file: dir.file(counters::FILE_NAME),
            previous_file: dir.file(counters::PREVIOUS_FILE_NAME),
            journal: JournalReader::new(dir.file(journal::FILE_NAME)),
            boot_id,
            reader: None,
            known: HashMap::new(),
            taken: 0,
            last_pass,
        })
    }

    /// Reads what changed and makes it durable in the spool.
    pub(crate) fn pass(&mut self, now: Moment, desired: &Desired) -> Result<Pass, MeterError> {
        let mut pass = Pass::default();
        let mut readings = Readings { desired, wall_ms: now.wall_ms, by_epoch: BTreeMap::new(), strangers: 0 };
        self.read_previous(&mut readings)?;
        let closed = self.journal.read().map_err(MeterError::Journal)?;
        if closed.len < self.taken {
            self.taken = 0;
        }
        if closed.len > self.taken {
            let record = closed.len / closed.peers.len() as u64;
            let known = usize::try_from(self.taken / record).unwrap_or(0);
            for peer in &closed.peers[known..] {
                let life = Life { public_key: PublicKey(peer.public_key), generation: peer.generation };
                readings.take(peer.epoch, life, &peer.counts);
                self.known.remove(&(peer.epoch, life));
            }
        }
        if closed.len > 0 {
            pass.journal_bytes = Some(closed.len);
        }
        let read = self.read_counters(&mut readings, &mut pass.counted)?;
        pass.strangers = readings.strangers;
        let span = Span { boot_id: self.boot_id, start: self.last_pass, end: now };
        for (epoch, peers) in readings.by_epoch {
            self.spool.append(epoch, span, &peers)?;
        }
        self.spool.sync().map_err(SpoolError::from)?;
        self.known.extend(read);
        self.taken = closed.len;
        self.last_pass = now;
        remove_file(&self.previous_file).map_err(SpoolError::from)?;
        Ok(pass)
    }

    /// Everything is told again at the next pass.
    pub(crate) fn tell_everything_again(&mut self) {
        self.known.clear();
    }

    fn read_counters(
        &mut self,
        readings: &mut Readings<'_>,
        counted: &mut HashSet<Life>,
    ) -> Result<HashMap<(Epoch, Life), Counts>, MeterError> {
        if !self.reader.as_ref().is_some_and(CounterReader::is_current) {
            self.reader = open_counters(&self.counter_file)?;
            self.known.clear();
        }
        let Some(reader) = &self.reader else { return Ok(HashMap::new()) };
        let mut read = HashMap::new();
        for peer in reader.peers() {
            let life = Life { public_key: PublicKey(peer.public_key), generation: peer.generation };
            counted.insert(life);
            let key = (reader.epoch(), life);
            if self.known.get(&key) != Some(&peer.counts) && readings.take(key.0, life, &peer.counts) {
                read.insert(key, peer.counts);
            }
        }
        Ok(read)
    }

    /// The counters of the boot before, which the tunnel kept when it began a new epoch.
    fn read_previous(&self, readings: &mut Readings<'_>) -> Result<(), MeterError> {
        match open_counters(&self.previous_file) {
            Ok(Some(reader)) => {
                for peer in reader.peers() {
                    let life = Life { public_key: PublicKey(peer.public_key), generation: peer.generation };
                    readings.take(reader.epoch(), life, &peer.counts);
                }
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(CounterFileError::Damaged) => {
                tracing::warn!("the counters from before the reboot are damaged: what was not reported yet is not billed");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// What a pass collects, by epoch.
struct Readings<'a> {
    desired: &'a Desired,
    wall_ms: u64,
    by_epoch: BTreeMap<Epoch, Vec<v1::PeerUsage>>,
    strangers: usize,
}

impl Readings<'_> {
    /// False when the life belongs to no known device.
    fn take(&mut self, epoch: Epoch, life: Life, counts: &Counts) -> bool {
        let Some(device_id) = self.desired.device_of(&life) else {
            self.strangers += 1;
            return false;
        };
        if *counts == Counts::default() {
            return true;
        }
        let handshake_age_ms = match counts.last_handshake_ms {
            0 => NO_HANDSHAKE,
            at => self.wall_ms.saturating_sub(at),
        };
        self.by_epoch.entry(epoch).or_default().push(v1::PeerUsage {
            device_id: device_id.to_vec().into(),
            generation: life.generation,
            rx_bytes: counts.rx_inner,
            tx_bytes: counts.tx_inner,
            rx_packets: counts.rx_packets,
            tx_packets: counts.tx_packets,
            handshake_age_ms,
        });
        true
    }
}

fn open_counters(path: &Path) -> Result<Option<CounterReader>, CounterFileError> {
    match CounterReader::open(path) {
        Ok(reader) => Ok(Some(reader)),
        Err(CounterFileError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Change, Cursor, Peer};
    use cvault_dataplane::journal::{ClosedPeer, Journal};
    use cvault_node_protocol::digest::Digest;

    fn desired(generation: u64) -> Desired {
        let mut desired = Desired::new([0; 32], vec![]);
        desired.commit(&Change {
            target: Cursor { incarnation: [0; 16], revision: generation, digest: Digest::default() },
            removed: vec![],
            upserted: vec![Peer {
                public_key: PublicKey([1; 32]),
                device_id: [2; 16],
                tenant_id: [3; 16],
                preshared_key: None,
                ipv4: [10, 8, 0, 2].into(),
                ipv6: "fd00::2".parse().unwrap(),
                generation,
            }],
            expected_removed: 0,
        });
        desired
    }

    fn closed(generation: u64, rx_inner: u64) -> ClosedPeer {
        let counts = Counts { rx_inner, ..Counts::default() };
        ClosedPeer { epoch: [9; 16], public_key: [1; 32], generation, counts }
    }

    #[test]
    fn final_counters_are_spooled_once_and_belong_to_the_device_of_their_generation() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::open(root.path()).unwrap();
        let now = Moment::now();
        let mut meter = Meter::open(&dir, [1; 16], now).unwrap();
        let mut journal = Journal::open(root.path()).unwrap();
        journal.append(&closed(7, 500)).unwrap();
        journal.append(&closed(6, 1)).unwrap();
        let pass = meter.pass(now, &desired(7)).unwrap();
        assert_eq!((pass.journal_bytes, pass.strangers), (Some(256), 1));
        let again = meter.pass(now, &desired(7)).unwrap();
        assert_eq!(again.strangers, 0, "what was taken over is not read again");
        let windows = meter.spool.next(now, [1; 16]).unwrap();
        assert_eq!(windows.len(), 1);
        assert_eq!((windows[0].peers[0].rx_bytes, windows[0].peers[0].handshake_age_ms), (500, NO_HANDSHAKE));
        journal.acknowledge(256).unwrap();
        assert_eq!(meter.pass(now, &desired(7)).unwrap().journal_bytes, None);
        journal.append(&closed(7, 600)).unwrap();
        meter.pass(now, &desired(7)).unwrap();
        assert_eq!(meter.spool.next(now, [1; 16]).unwrap().len(), 2);
    }
}
