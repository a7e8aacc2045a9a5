//! Usage windows on their way to the control plane: durable, in order, bounded.
//!
//! A window is synced to disk before it is sent, and kept after its acknowledgement as long as age and size allow, so
//! that a control plane restored to an older point can be given everything again. Counters are cumulative, so when the
//! spool is full the unacknowledged windows are folded into the last values of each peer: time resolution is lost,
//! bytes are not. Sequence numbers are never used twice in an epoch, also over restarts.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::path::Path;

use cvault_node_protocol::{MAX_WINDOW_PEERS, v1};
use prost::Message as _;

use crate::clock::Moment;
use crate::frames::{FrameError, FrameFile, Location};

const MAGIC: &[u8; 8] = b"CVSPOOL\x01";
/// The whole spool on disk.
pub(crate) const MAX_BYTES: u64 = 64 << 20;
/// What acknowledged windows may take of it.
const MAX_ACKED_BYTES: u64 = MAX_BYTES / 2;
const KEEP_ACKED_MS: u64 = 7 * 24 * 3600 * 1000;
/// One report carries at most this, far below the protocol's message limit.
const MAX_REPORT_BYTES: usize = 1 << 20;

pub(crate) type Epoch = [u8; 16];

/// Names a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct WindowId {
    pub(crate) epoch: Epoch,
    pub(crate) sequence: u64,
}

/// When a window was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) boot_id: [u8; 16],
    pub(crate) start: Moment,
    pub(crate) end: Moment,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(message, optional, tag = "1")]
    window: Option<Stored>,
    #[prost(message, repeated, tag = "2")]
    acked: Vec<v1::AckedWindow>,
    /// The highest sequence number ever used in each epoch.
    #[prost(message, repeated, tag = "3")]
    floors: Vec<v1::AckedWindow>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Stored {
    #[prost(message, optional, tag = "1")]
    window: Option<v1::UsageWindow>,
    #[prost(bytes = "bytes", tag = "2")]
    boot_id: prost::bytes::Bytes,
    #[prost(uint64, tag = "3")]
    start_boot_ms: u64,
    #[prost(uint64, tag = "4")]
    start_wall_ms: u64,
    #[prost(uint64, tag = "5")]
    end_boot_ms: u64,
    #[prost(uint64, tag = "6")]
    end_wall_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: WindowId,
    location: Location,
    end_wall_ms: u64,
    acked: bool,
}

#[derive(Debug)]
pub(crate) struct Spool {
    file: FrameFile,
    max_bytes: u64,
    /// Where an epoch unknown to this spool begins to count.
    first_sequence: u64,
    entries: VecDeque<Entry>,
    sequences: HashMap<Epoch, u64>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SpoolError {
    #[error("the spool of usage windows cannot be used")]
    Frames(#[from] FrameError),
    #[error("the spool of usage windows cannot be written")]
    Io(#[from] io::Error),
    #[error("the spool of usage windows holds a record that cannot be read")]
    Record(#[from] prost::DecodeError),
}

impl Spool {
    /// `first_sequence` must be larger than any sequence number of a spool that was lost: the wall clock's milliseconds.
    ///
    /// # Errors
    /// When the file is damaged or cannot be used; it is left as it is.
    pub(crate) fn open(path: &Path, max_bytes: u64, first_sequence: u64) -> Result<Self, SpoolError> {
        let (file, recovered) = FrameFile::open(path, MAGIC)?;
        let mut spool = Self { file, max_bytes, first_sequence, entries: VecDeque::new(), sequences: HashMap::new() };
        for (location, payload) in recovered.frames {
            let record = Record::decode(payload.as_slice())?;
            if let Some(stored) = record.window {
                let id = stored.window.as_ref().and_then(window_id);
                if let Some(id) = id {
                    spool.entries.push_back(Entry { id, location, end_wall_ms: stored.end_wall_ms, acked: false });
                    spool.raise_floor(id);
                }
            }
            spool.mark(&record.acked.iter().filter_map(acked_id).collect::<Vec<_>>());
            for floor in record.floors.iter().filter_map(acked_id) {
                spool.raise_floor(floor);
            }
        }
        Ok(spool)
    }

    /// Windows were lost, and with them the sequence numbers they had: begins anew above all of them.
    pub(crate) fn skip_used_sequences(&mut self) {
        for sequence in self.sequences.values_mut() {
            *sequence = self.first_sequence.max(*sequence);
        }
    }

    fn raise_floor(&mut self, id: WindowId) {
        let floor = self.sequences.entry(id.epoch).or_default();
        *floor = id.sequence.max(*floor);
    }

    /// Appends the readings of one epoch as windows; durable after [`Spool::sync`].
    pub(crate) fn append(&mut self, epoch: Epoch, span: Span, peers: &[v1::PeerUsage]) -> Result<(), SpoolError> {
        for peers in peers.chunks(MAX_WINDOW_PEERS) {
            if self.file.length() + estimate(peers) > self.max_bytes {
                self.shrink()?;
            }
            let (id, payload) = self.draw_window(epoch, span, peers);
            let location = self.file.append(&payload)?;
            self.entries.push_back(Entry { id, location, end_wall_ms: span.end.wall_ms, acked: false });
        }
        Ok(())
    }

    /// The stored form of a new window under the next sequence number of its epoch.
    fn draw_window(&mut self, epoch: Epoch, span: Span, peers: &[v1::PeerUsage]) -> (WindowId, Vec<u8>) {
        let sequence = self.sequences.get(&epoch).copied().unwrap_or(self.first_sequence) + 1;
        self.sequences.insert(epoch, sequence);
        let window = v1::UsageWindow {
            counter_epoch: epoch.to_vec().into(),
            sequence,
            peers: peers.to_vec(),
            ..v1::UsageWindow::default()
        };
        (WindowId { epoch, sequence }, stored(window, span).encode_to_vec())
    }

    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }

    /// The oldest unacknowledged windows that fit one report, with their ages at `now`.
    pub(crate) fn next(&self, now: Moment, boot_id: [u8; 16]) -> Result<Vec<v1::UsageWindow>, SpoolError> {
        let mut windows = Vec::new();
        let mut bytes = 0;
        for entry in self.entries.iter().filter(|entry| !entry.acked).take(cvault_node_protocol::MAX_REPORT_WINDOWS) {
            let payload = self.file.read(entry.location)?;
            bytes += payload.len();
            if bytes > MAX_REPORT_BYTES && !windows.is_empty() {
                break;
            }
            let Some(stored) = Record::decode(payload.as_slice())?.window else { continue };
            windows.extend(aged(stored, now, boot_id));
        }
        Ok(windows)
    }

    pub(crate) fn has_unacknowledged(&self) -> bool {
        self.entries.iter().any(|entry| !entry.acked)
    }

    /// Remembers acknowledgements. Not synced: a forgotten one only means that a window is sent again.
    pub(crate) fn acknowledge(&mut self, acked: &[v1::AckedWindow], wall_ms: u64) -> Result<(), SpoolError> {
        let ids: Vec<_> = acked.iter().filter_map(acked_id).collect();
        if self.mark(&ids) == 0 {
            return Ok(());
        }
        let record = Record { acked: acked.to_vec(), ..Record::default() };
        self.file.append(&record.encode_to_vec())?;
        let acked_bytes: u64 =
            self.entries.iter().filter(|entry| entry.acked).map(|entry| entry.location.bytes()).sum();
        let oldest = self.entries.front().map_or(u64::MAX, |entry| entry.end_wall_ms);
        let expired = oldest < wall_ms.saturating_sub(KEEP_ACKED_MS + KEEP_ACKED_MS / 7);
        if acked_bytes > MAX_ACKED_BYTES.min(self.max_bytes / 2) || expired {
            self.drop_acknowledged(wall_ms)?;
        }
        Ok(())
    }

    /// The control plane has another history: everything still kept must be sent again.
    pub(crate) fn unacknowledge_all(&mut self) -> Result<(), SpoolError> {
        let entries: VecDeque<_> = self.entries.iter().map(|entry| Entry { acked: false, ..*entry }).collect();
        self.rewrite(entries)
    }

    /// When the newest window of this boot ended.
    pub(crate) fn last_end(&self, boot_id: [u8; 16]) -> Option<Moment> {
        let payload = self.file.read(self.entries.back()?.location).ok()?;
        let span = span_of(&Record::decode(payload.as_slice()).ok()?.window?);
        (span.boot_id == boot_id).then_some(span.end)
    }

    /// Bytes that wait for an acknowledgement.
    pub(crate) fn waiting_bytes(&self) -> u64 {
        self.entries.iter().filter(|entry| !entry.acked).map(|entry| entry.location.bytes()).sum()
    }

    fn mark(&mut self, ids: &[WindowId]) -> usize {
        let mut marked = 0;
        for entry in self.entries.iter_mut().filter(|entry| !entry.acked && ids.contains(&entry.id)) {
            entry.acked = true;
            marked += 1;
        }
        marked
    }

    /// Drops acknowledged windows that are too old, and the older half of what is still too much.
    fn drop_acknowledged(&mut self, wall_ms: u64) -> Result<(), SpoolError> {
        let limit = MAX_ACKED_BYTES.min(self.max_bytes / 2) / 2;
        let mut kept = 0;
        let mut entries = VecDeque::new();
        for entry in self.entries.iter().rev() {
            let fresh = entry.end_wall_ms.saturating_add(KEEP_ACKED_MS) > wall_ms;
            if !entry.acked || (fresh && kept + entry.location.bytes() <= limit) {
                kept += if entry.acked { entry.location.bytes() } else { 0 };
                entries.push_front(*entry);
            }
        }
        self.rewrite(entries)
    }

    /// Makes room: first without the acknowledged windows, then by folding the rest.
    fn shrink(&mut self) -> Result<(), SpoolError> {
        self.rewrite(self.entries.iter().filter(|entry| !entry.acked).copied().collect())?;
        if self.file.length() <= self.max_bytes / 2 {
            return Ok(());
        }
        tracing::warn!(
            bytes = self.file.length(),
            "the usage spool is full: folding its windows into cumulative values"
        );
        self.fold()
    }

    /// Keeps the last value of each peer, under new sequence numbers: an old window may have arrived already. The folded
    /// values of more than about 500,000 lives exceed the bound; they are kept all the same.
    fn fold(&mut self) -> Result<(), SpoolError> {
        let mut last: BTreeMap<Epoch, Folded> = BTreeMap::new();
        for entry in &self.entries {
            let Some(stored) = Record::decode(self.file.read(entry.location)?.as_slice())?.window else { continue };
            let span = span_of(&stored);
            let folded = last.entry(entry.id.epoch).or_insert_with(|| Folded { span, peers: BTreeMap::new() });
            folded.span.end = span.end;
            for peer in stored.window.into_iter().flat_map(|window| window.peers) {
                folded.peers.insert((peer.device_id.to_vec(), peer.generation), peer);
            }
        }
        let (mut entries, mut frames) = (VecDeque::new(), Vec::new());
        for (epoch, Folded { span, peers }) in last {
            let peers: Vec<_> = peers.into_values().collect();
            for peers in peers.chunks(MAX_WINDOW_PEERS) {
                let (id, payload) = self.draw_window(epoch, span, peers);
                let location = Location::default();
                entries.push_back(Entry { id, location, end_wall_ms: span.end.wall_ms, acked: false });
                frames.push(payload);
            }
        }
        Ok(self.replace(entries, frames)?)
    }

    fn rewrite(&mut self, entries: VecDeque<Entry>) -> Result<(), SpoolError> {
        let frames = entries.iter().map(|entry| self.file.read(entry.location)).collect::<Result<Vec<_>, _>>()?;
        Ok(self.replace(entries, frames)?)
    }

    /// Writes floors, then these frames (one for each entry), then which of them are acknowledged. When that fails, file
    /// and entries are as before.
    fn replace(&mut self, mut entries: VecDeque<Entry>, frames: Vec<Vec<u8>>) -> io::Result<()> {
        let ack = |id: &WindowId| v1::AckedWindow { counter_epoch: id.epoch.to_vec().into(), sequence: id.sequence };
        let floors =
            self.sequences.iter().map(|(epoch, sequence)| ack(&WindowId { epoch: *epoch, sequence: *sequence }));
        let head = Record { floors: floors.collect(), ..Record::default() };
        let acked = entries.iter().filter(|entry| entry.acked).map(|entry| ack(&entry.id)).collect();
        let tail = Record { acked, ..Record::default() };
        let mut all = vec![head.encode_to_vec()];
        all.extend(frames);
        all.push(tail.encode_to_vec());
        let locations = self.file.rewrite(MAGIC, &all)?;
        for (entry, location) in entries.iter_mut().zip(&locations[1..]) {
            entry.location = *location;
        }
        self.entries = entries;
        Ok(())
    }
}

/// No stored window is larger than this.
fn estimate(peers: &[v1::PeerUsage]) -> u64 {
    256 + peers.len() as u64 * 96
}

/// The last values of an epoch's peers.
struct Folded {
    span: Span,
    peers: BTreeMap<(Vec<u8>, u64), v1::PeerUsage>,
}

fn window_id(window: &v1::UsageWindow) -> Option<WindowId> {
    Some(WindowId { epoch: window.counter_epoch.as_ref().try_into().ok()?, sequence: window.sequence })
}

fn acked_id(acked: &v1::AckedWindow) -> Option<WindowId> {
    Some(WindowId { epoch: acked.counter_epoch.as_ref().try_into().ok()?, sequence: acked.sequence })
}

fn stored(window: v1::UsageWindow, span: Span) -> Record {
    let stored = Stored {
        window: Some(window),
        boot_id: span.boot_id.to_vec().into(),
        start_boot_ms: span.start.boot_ms,
        start_wall_ms: span.start.wall_ms,
        end_boot_ms: span.end.boot_ms,
        end_wall_ms: span.end.wall_ms,
    };
    Record { window: Some(stored), ..Record::default() }
}

fn span_of(stored: &Stored) -> Span {
    Span {
        boot_id: stored.boot_id.as_ref().try_into().unwrap_or_default(),
        start: Moment { boot_ms: stored.start_boot_ms, wall_ms: stored.start_wall_ms },
        end: Moment { boot_ms: stored.end_boot_ms, wall_ms: stored.end_wall_ms },
    }
}

/// The window with its ages: by the boot clock within one boot, by the wall clock for what is from before.
fn aged(stored: Stored, now: Moment, boot_id: [u8; 16]) -> Option<v1::UsageWindow> {
    let span = span_of(&stored);
    let age = |then: Moment| {
        if span.boot_id == boot_id {
            now.boot_ms.saturating_sub(then.boot_ms)
        } else {
            now.wall_ms.saturating_sub(then.wall_ms)
        }
    };
    let mut window = stored.window?;
    window.age_end_ms = age(span.end);
    window.age_start_ms = age(span.start).max(window.age_end_ms);
    Some(window)
}

#[cfg(test)]
#[path = "spool_tests.rs"]
mod tests;
