//! The way from a worker to another one for what the kernel steered wrong: bounded in messages and in bytes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use super::mailbox::Mailbox;
use crate::drops::Drops;
use crate::engine::{Astray, Parcel};

/// What may wait for one worker: a few milliseconds of a full link.
const MAX_PARCELS: usize = 4096;
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// What reaches this worker from the others.
pub(crate) struct Inbox {
    queue: Receiver<Parcel>,
    bytes: Arc<AtomicUsize>,
    losses: Arc<Losses>,
}

/// What found no room in an inbox, by the peer it was for, whom only the inbox's owner can count it for.
#[derive(Default)]
struct Losses {
    any: AtomicBool,
    of: Mutex<HashMap<u16, Astray>>,
}

impl Losses {
    #[cold]
    fn add(&self, slot: u16, astray: Astray) {
        self.of.lock().unwrap_or_else(PoisonError::into_inner).entry(slot).or_default().add(astray);
        self.any.store(true, Ordering::Release);
    }
}

impl Inbox {
    pub(crate) fn next(&self) -> Option<Parcel> {
        let parcel = self.queue.try_recv().ok()?;
        self.bytes.fetch_sub(parcel.bytes.len(), Ordering::Relaxed);
        Some(parcel)
    }

    /// What others have lost since the last call, by slot.
    pub(crate) fn losses(&self) -> HashMap<u16, Astray> {
        if !self.losses.any.load(Ordering::Relaxed) || !self.losses.any.swap(false, Ordering::Acquire) {
            return HashMap::new();
        }
        std::mem::take(&mut *self.losses.of.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The way into one worker's inbox.
#[derive(Clone)]
struct Outlet {
    queue: SyncSender<Parcel>,
    bytes: Arc<AtomicUsize>,
    losses: Arc<Losses>,
    wake: Arc<OwnedFd>,
}

impl Outlet {
    /// Says whether there was room.
    fn put(&self, parcel: Parcel) -> bool {
        let (len, slot, astray) = (parcel.bytes.len(), parcel.slot, Astray::of(&parcel));
        if self.bytes.fetch_add(len, Ordering::Relaxed) + len <= MAX_BYTES && self.queue.try_send(parcel).is_ok() {
            return true;
        }
        self.bytes.fetch_sub(len, Ordering::Relaxed);
        astray.into_iter().for_each(|astray| self.losses.add(slot, astray));
        false
    }
}

/// One worker's ends of all rings.
pub(crate) struct Neighbours {
    pub(crate) inbox: Inbox,
    outlets: Vec<Outlet>,
    touched: Vec<bool>,
}

/// Rings between the workers that read these mailboxes, in their order.
pub(crate) fn rings(mailboxes: &[Mailbox]) -> Vec<Neighbours> {
    let (inboxes, outlets): (Vec<_>, Vec<_>) = mailboxes
        .iter()
        .map(|mailbox| {
            let (sender, receiver) = sync_channel(if mailboxes.len() > 1 { MAX_PARCELS } else { 0 });
            let bytes = Arc::new(AtomicUsize::new(0));
            let losses = Arc::default();
            let outlet =
                Outlet { queue: sender, bytes: Arc::clone(&bytes), losses: Arc::clone(&losses), wake: mailbox.waker() };
            (Inbox { queue: receiver, bytes, losses }, outlet)
        })
        .unzip();
    let neighbours = |inbox| Neighbours { inbox, outlets: outlets.clone(), touched: vec![false; outlets.len()] };
    inboxes.into_iter().map(neighbours).collect()
}

impl Neighbours {
    /// Hands the parcels on, in order, and wakes whoever got some. Returns what found no room.
    pub(crate) fn hand_on(&mut self, parcels: impl Iterator<Item = Parcel>) -> Drops {
        let mut lost = Drops::default();
        for parcel in parcels {
            let (to, len, loss) = (usize::from(parcel.to), parcel.bytes.len(), parcel.kind.loss());
            if self.outlets[to].put(parcel) {
                self.touched[to] = true;
            } else {
                lost.one(loss, len);
            }
        }
        for (outlet, touched) in self.outlets.iter().zip(&mut self.touched) {
            if std::mem::take(touched) {
                // A full eventfd counter means that the worker is already being woken.
                let _ = rustix::io::write(&outlet.wake, &1_u64.to_ne_bytes());
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::super::mailbox::mailbox;
    use super::*;
    use crate::drops::{Drop, Dropped};
    use crate::engine::ParcelKind;

    fn parcel(len: usize, number: u8) -> Parcel {
        Parcel { to: 1, slot: u16::from(number) << 8 | 1, kind: ParcelKind::Packet, bytes: vec![number; len] }
    }

    #[test]
    fn parcels_arrive_in_order_until_the_ring_is_full() {
        let mailboxes: Vec<_> = (0..2).map(|_| mailbox().unwrap().1).collect();
        let mut ends = rings(&mailboxes);
        let lost = ends[0].hand_on((0..100).map(|number| parcel(60_000, number)));
        let fit = MAX_BYTES / 60_000;
        let packets = 100 - fit as u64;
        assert_eq!(lost.get(Drop::TxForward), Dropped { packets, bytes: packets * 60_000 });
        let numbers: Vec<_> = std::iter::from_fn(|| ends[1].inbox.next()).map(|parcel| parcel.bytes[0]).collect();
        assert_eq!(numbers, (0..u8::try_from(fit).unwrap()).collect::<Vec<_>>());
        let lost = ends[0].hand_on((0..5000).map(|_| parcel(1, 0)));
        assert_eq!(lost.get(Drop::TxForward).packets, 5000 - MAX_PARCELS as u64, "bounded in number too");
    }

    #[test]
    fn what_finds_no_room_is_told_to_the_owner_by_peer_and_once() {
        let mailboxes: Vec<_> = (0..2).map(|_| mailbox().unwrap().1).collect();
        let mut ends = rings(&mailboxes);
        let fit = MAX_BYTES / 60_000;
        ends[0].hand_on((0..fit).map(|_| parcel(60_000, 7)));
        assert!(ends[1].inbox.losses().is_empty());
        ends[0].hand_on([1, 2, 2].into_iter().map(|number| parcel(60_000, number)));
        let mut two = Astray::of(&parcel(1, 2)).unwrap();
        two.add(two);
        let told = ends[1].inbox.losses();
        assert_eq!(told, HashMap::from([(0x101, Astray::of(&parcel(1, 1)).unwrap()), (0x201, two)]));
        assert!(ends[1].inbox.losses().is_empty() && ends[0].inbox.losses().is_empty());
    }
}
