//! `ended.ring`: the final counters of the lives that ended last, those that were taken over too. A life that begins again
//! under the next process goes on from them, as it does under this one.
//!
//! Records as in the journal, with a number that only grows in place of the salt; the newest takes the place of the oldest.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{ClosedPeer, RECORD_BYTES, options};

const FILE_NAME: &str = "ended.ring";
/// Ended lives that are remembered: 2 MiB.
pub(crate) const MAX_ENDED: usize = 16_384;
/// They are written together: a write of one takes as long.
const TOGETHER: usize = 64;

#[derive(Debug)]
pub(super) struct Ring {
    file: File,
    /// Of the next record.
    number: u64,
    /// Not written yet. In the journal, too, unless the ring could not be written when that was cut.
    waiting: Vec<ClosedPeer>,
}

impl Ring {
    /// Opens or creates it in `dir`, beside a journal of which it has the front at least. With it goes all that is remembered,
    /// the oldest first: what it holds, and then the journal. What a crash has cut is of no use and left out.
    pub(super) fn open(dir: &Path, journal: &[ClosedPeer]) -> io::Result<(Self, Vec<ClosedPeer>)> {
        let mut file = options().open(dir.join(FILE_NAME))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let (records, _torn) = bytes.as_chunks::<RECORD_BYTES>();
        let sound = records.iter().filter_map(|record| Some((number_of(record), ClosedPeer::decode(record)?)));
        let mut ended: Vec<(u64, ClosedPeer)> = sound.collect();
        ended.sort_unstable_by_key(|(number, _)| *number);
        let number = ended.last().map_or(0, |(number, _)| number + 1);
        let mut ended: Vec<_> = ended.into_iter().map(|(_, peer)| peer).collect();
        let mut ring = Self { file, number, waiting: Vec::new() };
        ring.put(&journal[known(&ended, journal)..]);
        ended.extend(journal);
        Ok((ring, ended))
    }

    /// Takes in what the journal holds now, and writes what waits once it is much. What cannot be written waits on: a full disk
    /// must not keep the journal from being cut.
    pub(super) fn put(&mut self, peers: &[ClosedPeer]) {
        self.waiting.extend_from_slice(peers);
        let excess = self.waiting.len().saturating_sub(MAX_ENDED);
        self.waiting.drain(..excess);
        if self.waiting.len() >= TOGETHER {
            self.flush();
        }
    }

    /// Writes what waits, which is due before the journal loses it.
    pub(super) fn flush(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        match self.write() {
            Ok(()) => self.waiting = Vec::new(),
            Err(error) => tracing::error!(%error, "the ring of ended lives cannot be written"),
        }
    }

    fn write(&mut self) -> io::Result<()> {
        let mut peers = &self.waiting[..];
        while !peers.is_empty() {
            let place = self.number % MAX_ENDED as u64;
            let room = MAX_ENDED.saturating_sub(usize::try_from(place).map_err(io::Error::other)?);
            let (now, later) = peers.split_at(peers.len().min(room));
            let records: Vec<_> = (self.number..).zip(now).map(|(number, peer)| peer.encode(number)).collect();
            self.file.write_all_at(records.as_flattened(), place * RECORD_BYTES as u64)?;
            self.number += records.len() as u64;
            peers = later;
        }
        Ok(())
    }
}

/// How many records from the front of the journal the ring has: so many that its last ones are the same.
fn known(ended: &[ClosedPeer], journal: &[ClosedPeer]) -> usize {
    let is_known = |count: &usize| {
        let fits = *count <= ended.len() || ended.len() >= MAX_ENDED;
        fits && ended.iter().rev().zip(journal[..*count].iter().rev()).all(|(one, other)| one == other)
    };
    (1..=journal.len()).rev().find(is_known).unwrap_or(0)
}

fn number_of(record: &[u8; RECORD_BYTES]) -> u64 {
    u64::from_le_bytes(record[120..].try_into().expect("the last eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::Counts;

    fn ended(generation: u64) -> ClosedPeer {
        ClosedPeer { epoch: [1; 16], public_key: [2; 32], generation, counts: Counts::default() }
    }

    #[test]
    fn the_newest_are_kept_over_restarts_and_a_cut_record_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let most = MAX_ENDED as u64;
        let all: Vec<_> = (0..most + 10).map(ended).collect();
        let put = |ring: &mut Ring, peers: &[ClosedPeer]| {
            ring.put(peers);
            ring.flush();
        };
        let (mut ring, before) = Ring::open(dir.path(), &[]).unwrap();
        assert_eq!(before, []);
        put(&mut ring, &all[..MAX_ENDED - 1]);
        put(&mut ring, &all[MAX_ENDED - 1..MAX_ENDED + 2]);
        let (mut ring, before) = Ring::open(dir.path(), &[]).unwrap();
        assert_eq!(before, all[2..MAX_ENDED + 2]);
        put(&mut ring, &all[MAX_ENDED + 2..]);
        assert_eq!(Ring::open(dir.path(), &[]).unwrap().1, all[10..]);

        ring.file.write_all_at(&[0xff; 70], 3 * RECORD_BYTES as u64 + 30).unwrap();
        let left: Vec<_> = all[10..].iter().filter(|peer| peer.generation != most + 3).copied().collect();
        assert_eq!(Ring::open(dir.path(), &[]).unwrap().1, left);
        assert_eq!(ring.file.metadata().unwrap().len(), most * RECORD_BYTES as u64);
    }
    #[test]
    fn what_waits_is_written_with_others_and_taken_from_the_journal_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let all: Vec<_> = (0..TOGETHER as u64 + 2).map(ended).collect();
        let written = || std::fs::metadata(dir.path().join(FILE_NAME)).unwrap().len() / RECORD_BYTES as u64;
        let (mut ring, _) = Ring::open(dir.path(), &[]).unwrap();
        for peer in &all[..TOGETHER - 1] {
            ring.put(std::slice::from_ref(peer));
        }
        assert_eq!(written(), 0);
        for peer in &all[TOGETHER - 1..] {
            ring.put(std::slice::from_ref(peer));
        }
        assert_eq!(written(), TOGETHER as u64);
        drop(ring);

        let (mut ring, remembered) = Ring::open(dir.path(), &all).unwrap();
        assert_eq!(remembered[..TOGETHER], all[..TOGETHER]);
        assert_eq!(remembered[TOGETHER..], all, "of one life the newest comes last");
        ring.flush();
        assert_eq!(Ring::open(dir.path(), &[]).unwrap().1, all, "nothing is written twice");
    }

    #[test]
    fn lives_that_ended_alike_hide_none_between_them() {
        let dir = tempfile::tempdir().unwrap();
        let (idle, used) = (ended(1), ended(2));
        let (mut ring, _) = Ring::open(dir.path(), &[]).unwrap();
        ring.put(&[idle]);
        ring.flush();
        let (mut ring, _) = Ring::open(dir.path(), &[used, idle]).unwrap();
        ring.flush();
        assert_eq!(Ring::open(dir.path(), &[]).unwrap().1, [idle, used, idle]);
        assert_eq!(known(&[idle, used], &[idle, used, idle]), 2);
        assert_eq!(known(&[idle, used, idle], &[idle, used, idle, used]), 3, "none is written twice");
        assert_eq!(known(&[], &[idle]), 0);
    }

    #[test]
    fn a_ring_that_cannot_be_written_keeps_what_waits_in_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let (mut ring, _) = Ring::open(dir.path(), &[]).unwrap();
        ring.file = File::open(dir.path().join(FILE_NAME)).unwrap();
        let all: Vec<_> = (0..MAX_ENDED as u64 + 10).map(ended).collect();
        ring.put(&all[..100]);
        ring.put(&all[100..]);
        assert_eq!(ring.waiting, all[10..]);
        ring.flush();
        assert_eq!(ring.waiting, all[10..], "nothing is lost");
        ring.file = options().open(dir.path().join(FILE_NAME)).unwrap();
        ring.flush();
        assert_eq!(Ring::open(dir.path(), &[]).unwrap().1, all[10..]);
    }
}
