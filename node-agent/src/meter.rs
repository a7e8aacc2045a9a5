//! Metering: from the tunnel's counter file and journal to usage windows in the spool.
//!
//! Everything is cumulative, so nothing can be counted twice; a final value leaves the journal only when it is durable
//! in the spool. The first pass after a start tells every peer again, which repairs whatever the other side lost.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use cvault_dataplane::counters::{self, CounterFileError, CounterReader, Counts};
use cvault_dataplane::journal::{self, Closed, ClosedPeer, JournalAck, JournalReader};
use cvault_node_protocol::v1;

use crate::clock::Moment;
use crate::desired::{Desired, Life, PublicKey};
use crate::frames::{self, FrameError};
use crate::leases::Metered;
use crate::spool::{Epoch, MAX_BYTES, Span, Spool, SpoolError};
use crate::state_dir::StateDir;

pub(crate) const SPOOL_FILE: &str = "usage.spool";
/// Where final counters of unknown devices end up when they would fill the journal.
const GIVEN_UP_FILE: &str = "closed.journal.unknown";
/// 8,192 removed peers.
const MAX_JOURNAL_BYTES: u64 = 1 << 20;
const NO_HANDSHAKE: u64 = u64::MAX;

type DeviceId = [u8; 16];
type Generation = u64;

pub(crate) struct Meter {
    pub(crate) spool: Spool,
    dir: PathBuf,
    journal: JournalReader,
    boot_id: [u8; 16],
    reader: Option<CounterReader>,
    /// What was spooled last.
    known: HashMap<(Epoch, Life), Counts>,
    /// The front of the journal that was read already, while the tunnel has not cut it off.
    taken: Option<JournalAck>,
    /// Final counters of devices that the state does not know (yet): the journal keeps them.
    unplaced: Vec<ClosedPeer>,
    last_pass: Moment,
}

/// What a pass found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pass {
    /// What to acknowledge to the tunnel, when all that the journal holds is in the spool.
    pub(crate) journal: Option<JournalAck>,
    /// The lives that the tunnel counts now.
    pub(crate) counted: HashSet<Life>,
    /// Of the counters read.
    pub(crate) epoch: Option<Epoch>,
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
    /// Opens the spool. Of a damaged one the part before the damage is kept, and a copy of the whole; one that cannot be
    /// used at all is renamed. Either way every peer's cumulative values are told anew.
    pub(crate) fn open(dir: &StateDir, boot_id: [u8; 16], now: Moment) -> anyhow::Result<Self> {
        let path = dir.file(SPOOL_FILE);
        let spool = match Spool::open(&path, MAX_BYTES, now.wall_ms) {
            Ok(spool) => spool,
            Err(SpoolError::Frames(FrameError::Damaged { offset })) => {
                let copy = dir.copy_aside(SPOOL_FILE, "damaged", now.wall_ms)?;
                tracing::error!(offset, kept_as = %copy.display(), "the usage spool is damaged; the windows behind it are not sent");
                frames::cut(&path, offset)?;
                let mut spool = Spool::open(&path, MAX_BYTES, now.wall_ms)?;
                spool.skip_used_sequences();
                spool
            }
            Err(error) => {
                let aside = dir.set_aside(SPOOL_FILE, "refused", now.wall_ms)?;
                tracing::error!(error = crate::chain(&error), kept_as = %aside.display(), "refused the usage spool; its windows are not sent");
                Spool::open(&path, MAX_BYTES, now.wall_ms)?
            }
        };
        let last_pass = spool.last_end(boot_id).unwrap_or(now);
        Ok(Self {
            spool,
            dir: dir.path().to_owned(),
            journal: JournalReader::new(dir.file(journal::FILE_NAME)),
            boot_id,
            reader: None,
            known: HashMap::new(),
            taken: None,
            unplaced: Vec::new(),
            last_pass,
        })
    }

    /// Reads what changed and makes it durable in the spool.
    pub(crate) fn pass(&mut self, now: Moment, desired: &Desired) -> Result<Pass, MeterError> {
        let mut pass = Pass::default();
        let mut readings = Readings { desired, wall_ms: now.wall_ms, by_epoch: BTreeMap::new(), strangers: 0 };
        let previous = self.read_previous(&mut readings)?;
        // Counters before the journal: a peer that is closed in between is then read twice, not missed.
        let read = self.read_counters(&mut readings, &mut pass.counted)?;
        let (closed, fresh, unplaced) = self.read_closed(&mut readings)?;
        pass.strangers = readings.strangers;
        self.keep(now, readings)?;
        self.known.extend(read);
        self.known.retain(|(_, life), _| pass.counted.contains(life));
        self.last_pass = now;
        pass.epoch = self.reader.as_ref().map(CounterReader::epoch);
        if closed.damaged > 0 && fresh > 0 {
            tracing::error!(
                count = closed.damaged,
                "final counters in the tunnel's journal are damaged and not billed"
            );
        }
        self.taken = closed.ack();
        self.unplaced = unplaced;
        if self.unplaced.is_empty() {
            pass.journal = self.taken;
        } else if closed.len > MAX_JOURNAL_BYTES {
            self.give_up_unplaced().map_err(MeterError::Journal)?;
            pass.journal = self.taken;
        } else if fresh > 0 {
            let count = self.unplaced.len();
            tracing::error!(count, "final counters of unknown devices: the tunnel's journal keeps them");
        }
        for file in previous {
            remove_file(&file).map_err(SpoolError::from)?;
        }
        Ok(pass)
    }

    /// Makes the final counters of removed peers durable, and nothing else: their removal can be reported then. The tunnel
    /// keeps its journal until the next pass.
    pub(crate) fn take_closed(&mut self, now: Moment, desired: &Desired) -> Result<(), MeterError> {
        let mut readings = Readings { desired, wall_ms: now.wall_ms, by_epoch: BTreeMap::new(), strangers: 0 };
        let (closed, _, unplaced) = self.read_closed(&mut readings)?;
        if readings.by_epoch.is_empty() || closed.damaged > 0 {
            return Ok(());
        }
        self.keep(now, readings)?;
        self.taken = closed.ack();
        self.unplaced = unplaced;
        Ok(())
    }

    /// What the journal has behind what was taken, how much of it is new, and what belongs to no known device.
    fn read_closed(&self, readings: &mut Readings<'_>) -> Result<(Closed, usize, Vec<ClosedPeer>), MeterError> {
        let closed = self.journal.read_after(self.taken).map_err(MeterError::Journal)?;
        let fresh = closed.peers.iter().filter(|peer| !self.unplaced.contains(peer)).count();
        let mut unplaced = self.unplaced.clone();
        unplaced.retain(|peer| !closed.peers.contains(peer));
        unplaced.extend(&closed.peers);
        unplaced.retain(|peer| !readings.take(peer.epoch, life_of(peer), &peer.counts));
        Ok((closed, fresh, unplaced))
    }

    fn keep(&mut self, now: Moment, readings: Readings<'_>) -> Result<(), MeterError> {
        let span = Span { boot_id: self.boot_id, start: self.last_pass, end: now };
        for (epoch, peers) in readings.by_epoch {
            let peers: Vec<_> = peers.into_values().collect();
            self.spool.append(epoch, span, &peers)?;
        }
        Ok(self.spool.sync().map_err(SpoolError::from)?)
    }

    /// The journal must not grow for ever: what it holds is copied, for somebody to look at.
    fn give_up_unplaced(&mut self) -> io::Result<()> {
        let copy = self.dir.join(GIVEN_UP_FILE);
        std::fs::copy(self.dir.join(journal::FILE_NAME), &copy)?;
        tracing::error!(
            count = self.unplaced.len(), kept_as = %copy.display(), "gave up on final counters of unknown devices"
        );
        self.unplaced.clear();
        Ok(())
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
        self.refresh_reader()?;
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

    fn refresh_reader(&mut self) -> Result<(), CounterFileError> {
        if !self.reader.as_ref().is_some_and(CounterReader::is_current) {
            self.reader = open_counters(&self.dir.join(counters::FILE_NAME))?;
            self.known.clear();
        }
        Ok(())
    }

    /// The sums of the counters of peers that need leases, and their epoch; `None` while there are no counters.
    pub(crate) fn totals(&mut self, desired: &Desired) -> Option<(Epoch, Vec<Metered>)> {
        if let Err(error) = self.refresh_reader() {
            tracing::error!(error = crate::chain(&error), "the counters cannot be read: leases are not renewed");
            return None;
        }
        let reader = self.reader.as_ref()?;
        let mut wanted: HashMap<Life, Metered> = desired
            .metered()
            .map(|peer| (peer.life(), Metered { life: peer.life(), device_id: peer.device_id, total: 0 }))
            .collect();
        for counters in reader.peers() {
            let life = Life { public_key: PublicKey(counters.public_key), generation: counters.generation };
            if let Some(metered) = wanted.get_mut(&life) {
                metered.total = counters.counts.rx_inner.saturating_add(counters.counts.tx_inner);
            }
        }
        Some((reader.epoch(), wanted.into_values().collect()))
    }

    /// The counters of epochs before, which the tunnel kept when it began a new one. Answers the files that may go now.
    fn read_previous(&self, readings: &mut Readings<'_>) -> Result<Vec<PathBuf>, MeterError> {
        let files = counters::previous_files(&self.dir).map_err(CounterFileError::Io)?;
        for file in &files {
            match open_counters(file) {
                Ok(Some(reader)) => {
                    for peer in reader.peers() {
                        let life = Life { public_key: PublicKey(peer.public_key), generation: peer.generation };
                        readings.take(reader.epoch(), life, &peer.counts);
                    }
                }
                Ok(None) => {}
                Err(CounterFileError::Damaged) => {
                    tracing::warn!(
                        "the counters from before the reboot are damaged: what was not reported yet is not billed"
                    );
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(files)
    }
}

fn life_of(peer: &ClosedPeer) -> Life {
    Life { public_key: PublicKey(peer.public_key), generation: peer.generation }
}

/// What a pass collects, by epoch; of each life the greatest values.
struct Readings<'a> {
    desired: &'a Desired,
    wall_ms: u64,
    by_epoch: BTreeMap<Epoch, BTreeMap<(DeviceId, Generation), v1::PeerUsage>>,
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
        let usage = v1::PeerUsage {
            device_id: device_id.to_vec().into(),
            generation: life.generation,
            rx_bytes: counts.rx_inner,
            tx_bytes: counts.tx_inner,
            rx_packets: counts.rx_packets,
            tx_packets: counts.tx_packets,
            handshake_age_ms,
        };
        let all = self.by_epoch.entry(epoch).or_default();
        all.entry((device_id, life.generation)).and_modify(|known| greatest(known, &usage)).or_insert(usage);
        true
    }
}

/// A life that was ended and goes on is read in both places; its counters only grow.
fn greatest(known: &mut v1::PeerUsage, other: &v1::PeerUsage) {
    known.rx_bytes = known.rx_bytes.max(other.rx_bytes);
    known.tx_bytes = known.tx_bytes.max(other.tx_bytes);
    known.rx_packets = known.rx_packets.max(other.rx_packets);
    known.tx_packets = known.tx_packets.max(other.tx_packets);
    known.handshake_age_ms = known.handshake_age_ms.min(other.handshake_age_ms);
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
    use crate::state_dir::testing::private_directory;
    use cvault_dataplane::journal::{ClosedPeer, Journal};
    use cvault_node_protocol::digest::Digest;

    fn desired(generation: u64) -> Desired {
        let mut desired = Desired::new([0; 32], vec![], vec![]);
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
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let now = Moment::now();
        let mut meter = Meter::open(&dir, [1; 16], now).unwrap();
        let mut journal = Journal::open(root.path()).unwrap();
        journal.append(&closed(7, 500)).unwrap();
        let pass = meter.pass(now, &desired(7)).unwrap();
        assert_eq!((pass.journal.unwrap().len, pass.strangers), (128, 0));
        let windows = meter.spool.next(now, [1; 16]).unwrap();
        assert_eq!(windows.len(), 1);
        assert_eq!((windows[0].peers[0].rx_bytes, windows[0].peers[0].handshake_age_ms), (500, NO_HANDSHAKE));
        meter.pass(now, &desired(7)).unwrap();
        assert_eq!(meter.spool.next(now, [1; 16]).unwrap().len(), 1, "what was taken over is not read again");
        journal.acknowledge(pass.journal.unwrap()).unwrap();
        assert_eq!(meter.pass(now, &desired(7)).unwrap().journal, None);
        journal.append(&closed(7, 600)).unwrap();
        meter.pass(now, &desired(7)).unwrap();
        assert_eq!(meter.spool.next(now, [1; 16]).unwrap().len(), 2);
    }

    #[test]
    fn what_removed_peers_were_counted_is_kept_before_the_next_pass() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let now = Moment::now();
        let mut meter = Meter::open(&dir, [1; 16], now).unwrap();
        let mut journal = Journal::open(root.path()).unwrap();
        meter.take_closed(now, &desired(7)).unwrap();
        journal.append(&closed(7, 500)).unwrap();
        for _ in 0..2 {
            meter.take_closed(now, &desired(7)).unwrap();
            let windows = meter.spool.next(now, [1; 16]).unwrap();
            assert_eq!((windows.len(), windows[0].peers[0].rx_bytes), (1, 500), "once");
        }
        let reopened = Spool::open(&dir.file(SPOOL_FILE), MAX_BYTES, now.wall_ms).unwrap();
        assert_eq!(reopened.next(now, [1; 16]).unwrap().len(), 1, "and durable");
        let pass = meter.pass(now, &desired(7)).unwrap();
        assert_eq!(pass.journal.unwrap().len, 128, "the tunnel hears of it at the next pass");
        assert_eq!(meter.spool.next(now, [1; 16]).unwrap().len(), 1);
    }

    #[test]
    fn of_a_life_that_goes_on_the_greatest_values_are_told() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let now = Moment::now();
        let mut meter = Meter::open(&dir, [1; 16], now).unwrap();
        let mut journal = Journal::open(root.path()).unwrap();
        journal.append_all(&[closed(7, 900), closed(7, 500)]).unwrap();
        meter.pass(now, &desired(7)).unwrap();
        assert_eq!(meter.spool.next(now, [1; 16]).unwrap()[0].peers[0].rx_bytes, 900);
    }

    #[test]
    fn a_journal_that_was_emptied_and_refilled_to_the_same_length_is_read() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let now = Moment::now();
        let mut meter = Meter::open(&dir, [1; 16], now).unwrap();
        let mut journal = Journal::open(root.path()).unwrap();
        journal.append(&closed(7, 500)).unwrap();
        let pass = meter.pass(now, &desired(7)).unwrap();
        journal.acknowledge(pass.journal.unwrap()).unwrap();
        journal.append(&closed(7, 900)).unwrap();
        meter.pass(now, &desired(7)).unwrap();
        let windows = meter.spool.next(now, [1; 16]).unwrap();
        assert_eq!(windows.last().unwrap().peers[0].rx_bytes, 900);
    }

    #[test]
    fn final_counters_of_an_unknown_device_stay_in_the_journal_until_it_is_known() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let now = Moment::now();
        let mut meter = Meter::open(&dir, [1; 16], now).unwrap();
        let mut journal = Journal::open(root.path()).unwrap();
        journal.append(&closed(8, 500)).unwrap();
        journal.append(&closed(7, 1)).unwrap();
        for _ in 0..2 {
            let pass = meter.pass(now, &desired(7)).unwrap();
            assert_eq!((pass.journal, pass.strangers), (None, 1), "it must not be acknowledged");
        }
        assert_eq!(meter.spool.next(now, [1; 16]).unwrap().len(), 1);
        let pass = meter.pass(now, &desired(8)).unwrap();
        assert_eq!((pass.journal.unwrap().len, pass.strangers), (256, 0));
        let windows = meter.spool.next(now, [1; 16]).unwrap();
        assert_eq!((windows[1].peers[0].generation, windows[1].peers[0].rx_bytes), (8, 500));
    }

    #[test]
    fn the_windows_before_a_damage_are_sent_and_no_sequence_is_used_twice() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let now = Moment::now();
        let mut meter = Meter::open(&dir, [1; 16], now).unwrap();
        let mut journal = Journal::open(root.path()).unwrap();
        for bytes in [1, 2, 3] {
            journal.append(&closed(7, bytes)).unwrap();
            meter.pass(now, &desired(7)).unwrap();
        }
        let used = meter.spool.next(now, [1; 16]).unwrap().last().unwrap().sequence;
        let mut content = std::fs::read(dir.file(SPOOL_FILE)).unwrap();
        let middle = content.len() / 2;
        content[middle] ^= 1;
        std::fs::write(dir.file(SPOOL_FILE), &content).unwrap();
        let later = Moment { wall_ms: now.wall_ms + 1_000, ..now };
        let mut meter = Meter::open(&dir, [1; 16], later).unwrap();
        assert_eq!(meter.spool.next(later, [1; 16]).unwrap().len(), 1);
        meter.pass(later, &desired(7)).unwrap();
        let windows = meter.spool.next(later, [1; 16]).unwrap();
        assert!(windows.last().unwrap().sequence > used);
        let copy = dir.file(&format!("{SPOOL_FILE}.damaged-{}", later.wall_ms));
        assert_eq!(std::fs::read(copy).unwrap(), content);
    }
}
