//! All workers as one to the control socket: whom a peer belongs to, and one answer out of many.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

use super::desk::Desk;
use super::mailbox::{Answer, Controller, DeviceState, Reply, Request, WorkerGone, WorkerState};
use super::watch::Pulse;
use super::worker::Worker;
use crate::change::{DeviceChange, PeerChange};
use crate::engine::{Notice, Shard};

/// The workers, and where every peer is. One change at a time: the server's clients take turns.
pub(crate) struct Fleet {
    workers: Vec<Controller>,
    /// Of the only one.
    desk: Option<Arc<Desk<Worker>>>,
    pulses: Vec<Arc<Pulse>>,
    placement: Mutex<Placement>,
}

/// A peer that was found in the counter file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) public_key: [u8; 32],
    pub(crate) generation: u64,
    pub(crate) slot: u16,
}

/// Which worker has a key, and how much each of them has.
#[derive(Debug)]
struct Placement {
    shard: Shard,
    keys: HashMap<[u8; 32], Placed>,
    /// Lives that an earlier process left: they go on in their slots.
    left: HashMap<[u8; 32], Vec<Left>>,
    load: Vec<u32>,
    room: Vec<u32>,
    /// Which replacement of all peers a key was last named in.
    round: u32,
}

#[derive(Clone, Copy, Debug)]
struct Placed {
    owner: u16,
    round: u32,
}

#[derive(Clone, Copy, Debug)]
struct Left {
    generation: u64,
    owner: u16,
}

/// What placing a peer has changed.
#[derive(Clone, Copy, Debug)]
struct Move {
    key: [u8; 32],
    owner: u16,
    before: Option<Placed>,
    /// The life of an earlier process that goes on.
    left: Option<Left>,
    is_made: bool,
}

impl Placement {
    fn new(count: u16, capacity: u32, found: &[Found]) -> Self {
        let shard = Shard { index: 0, count };
        let mut room = vec![0; usize::from(count)];
        for slot in (0..capacity).filter_map(|slot| u16::try_from(slot).ok()) {
            room[usize::from(shard.owner(slot))] += 1;
        }
        let mut load = vec![0; usize::from(count)];
        let mut left: HashMap<_, Vec<Left>> = HashMap::new();
        for peer in found {
            let owner = shard.owner(peer.slot);
            load[usize::from(owner)] += 1;
            left.entry(peer.public_key).or_default().push(Left { generation: peer.generation, owner });
        }
        Self { shard, keys: HashMap::new(), left, load, room, round: 0 }
    }

    /// Finds the worker for a peer that is to be added or changed.
    fn place(&mut self, change: &PeerChange) -> Move {
        let key = change.public_key;
        let before = self.keys.get(&key).copied();
        if before.is_none() && change.update_only {
            return Move { key, owner: 0, before, left: None, is_made: false };
        }
        // Whoever names no life of a peer that there is means the one it has.
        let names_life = before.is_none() || (change.generation.is_some() && !change.update_only);
        let left = if names_life { self.take_left(&key, change.generation.unwrap_or(0)) } else { None };
        let owner = match (left, before) {
            // Its slot has been counted since the start.
            (Some(left), None) => left.owner,
            (Some(left), Some(before)) => {
                self.add_load(before.owner, -1);
                left.owner
            }
            (None, Some(before)) => before.owner,
            (None, None) => {
                let owner = self.least_loaded();
                self.add_load(owner, 1);
                owner
            }
        };
        // A replacement does not take an update for its naming the peer.
        let round = before.filter(|_| change.update_only).map_or(self.round, |before| before.round);
        self.keys.insert(key, Placed { owner, round });
        Move { key, owner, before, left, is_made: true }
    }

    /// The worker refused the peer.
    fn take_back(&mut self, refused: &Move) {
        let Move { key, owner, before, left, is_made: true } = *refused else {
            return;
        };
        match (left, before) {
            (Some(_), None) | (None, Some(_)) => {}
            (Some(_), Some(before)) => self.add_load(before.owner, 1),
            (None, None) => self.add_load(owner, -1),
        }
        match before {
            Some(before) => _ = self.keys.insert(key, before),
            None => _ = self.keys.remove(&key),
        }
        if let Some(left) = left {
            self.left.entry(key).or_default().push(left);
        }
    }

    /// The worker has not said what it did: whoever may have something of the key is still known.
    fn leave_open(&mut self, unanswered: &Move) {
        if let Move { left: Some(_), before: Some(_), .. } = unanswered {
            self.take_back(unanswered);
        }
    }

    fn take_left(&mut self, key: &[u8; 32], generation: u64) -> Option<Left> {
        let lives = self.left.get_mut(key)?;
        let at = lives.iter().position(|left| left.generation == generation)?;
        Some(lives.swap_remove(at))
    }

    fn add_load(&mut self, owner: u16, peers: i32) {
        let load = &mut self.load[usize::from(owner)];
        *load = load.saturating_add_signed(peers);
    }

    /// The workers that may have something of the key.
    fn owners(&self, key: &[u8; 32]) -> Vec<u16> {
        let placed = self.keys.get(key).map(|placed| placed.owner);
        let left = self.left.get(key).into_iter().flatten().map(|left| left.owner);
        let mut owners: Vec<_> = placed.into_iter().chain(left).collect();
        owners.sort_unstable();
        owners.dedup();
        owners
    }

    fn least_loaded(&self) -> u16 {
        let workers = (0..self.shard.count).map(usize::from);
        let free = |worker: &usize| self.room[*worker].saturating_sub(self.load[*worker]);
        let best = workers.max_by_key(|worker| (free(worker), std::cmp::Reverse(*worker))).unwrap_or(0);
        u16::try_from(best).expect("at most 64 workers")
    }

    /// The key is gone, and its last counters are safe.
    fn removed(&mut self, key: &[u8; 32]) {
        let placed = self.keys.remove(key).map(|placed| placed.owner);
        let left = self.left.remove(key).into_iter().flatten().map(|left| left.owner);
        for owner in placed.into_iter().chain(left) {
            self.add_load(owner, -1);
        }
    }

    /// What was not named since the replacement began is gone.
    fn replaced(&mut self) {
        let round = self.round;
        self.keys.retain(|_, placed| placed.round == round);
        self.left.clear();
        self.load.fill(0);
        for placed in self.keys.values() {
            self.load[usize::from(placed.owner)] += 1;
        }
    }
}

impl Fleet {
    pub(crate) fn new(workers: Vec<Controller>, pulses: Vec<Arc<Pulse>>, capacity: u32, found: &[Found]) -> Self {
        let count = u16::try_from(workers.len()).expect("at most 64 workers");
        Self { workers, desk: None, pulses, placement: Mutex::new(Placement::new(count, capacity, found)) }
    }

    /// Where the only worker is that there is.
    pub(crate) fn of_one(self, desk: Arc<Desk<Worker>>) -> Self {
        Self { desk: Some(desk), ..self }
    }

    /// The answer, if it can be had without waiting for anybody.
    pub(crate) fn ask_at_once(&self, request: Request) -> Option<Reply> {
        self.desk.as_ref()?.serve(request).break_value()
    }

    /// One answer of all workers.
    pub(crate) fn ask(&self, request: Request) -> Result<Reply, WorkerGone> {
        match request {
            Request::Describe => self.describe(),
            request if self.workers.len() == 1 => {
                let served = match &self.desk {
                    Some(desk) => desk.serve(request),
                    None => ControlFlow::Continue(request),
                };
                match served {
                    ControlFlow::Break(reply) => Ok(reply),
                    ControlFlow::Continue(request) => self.workers[0].ask(request),
                }
            }
            Request::List { from, limit } => self.list(from, limit),
            // All have the same.
            Request::Tenants { .. } => self.workers[0].ask(request),
            Request::Portions(portions) => {
                for changes in portions {
                    let reply = self.ask(Request::Peers(changes))?;
                    if reply.errno() != 0 {
                        return Ok(reply);
                    }
                }
                Ok(Reply::Done(0))
            }
            Request::Device(change) => {
                let _turn = self.placement();
                self.device(change)
            }
            Request::Policy(_) => Ok(Reply::Done(libc::EPROTO)),
            Request::Peers(changes) => self.peers(&mut self.placement(), changes),
            Request::BeginReplace => {
                let mut placement = self.placement();
                placement.round += 1;
                self.all(|| Request::BeginReplace)
            }
            Request::AbandonReplace => {
                let _turn = self.placement();
                self.all(|| Request::AbandonReplace)
            }
            Request::EndReplace => {
                let mut placement = self.placement();
                placement.replaced();
                self.all(|| Request::EndReplace)
            }
            Request::Settle => {
                let _turn = self.placement();
                self.all(|| Request::Settle)
            }
            Request::Notices(notices) => {
                let _turn = self.placement();
                self.notify(notices).map(Reply::Done)
            }
            Request::Stop => {
                let _turn = self.placement();
                self.all(|| Request::Stop)
            }
        }
    }

    fn placement(&self) -> MutexGuard<'_, Placement> {
        self.placement.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks all at once; the first error counts, and `EAGAIN` only if there is no other.
    fn all(&self, request: impl Fn() -> Request) -> Result<Reply, WorkerGone> {
        let answers: Vec<_> = self.workers.iter().map(|worker| worker.post(request())).collect();
        let mut worst = 0;
        for answer in answers {
            let errno = answer?.wait()?.errno();
            if worst == 0 || (worst == libc::EAGAIN && errno != 0) {
                worst = errno;
            }
        }
        Ok(Reply::Done(worst))
    }

    /// The first worker changes the overlay, which all share, chooses the port and answers for the journal. Policy is
    /// everybody's before anything else is changed. Then the others get what the first has, also when it could not do everything: all
    /// have one key and one mark.
    fn device(&self, mut change: DeviceChange) -> Result<Reply, WorkerGone> {
        for (number, worker) in self.workers.iter().enumerate() {
            let (replace_overlay, overlay) = match number {
                0 => (change.replace_overlay, std::mem::take(&mut change.overlay)),
                _ => (false, Vec::new()),
            };
            let policy = change.policy.clone();
            let errno = worker
                .ask(Request::Policy(DeviceChange { replace_overlay, overlay, policy, ..DeviceChange::default() }))?
                .errno();
            if errno != 0 {
                return Ok(Reply::Done(errno));
            }
        }
        let DeviceChange { private_key, listen_port, fwmark, journal_ack, .. } = change;
        let change = DeviceChange { private_key, listen_port, fwmark, journal_ack, ..DeviceChange::default() };
        let errno = self.workers[0].ask(Request::Device(change))?.errno();
        let Reply::Device(state) = self.workers[0].ask(Request::Describe)? else {
            return Ok(Reply::Done(libc::EPROTO));
        };
        let port = (state.listen_port != 0).then_some(state.listen_port);
        if errno != 0 && port.is_none() {
            // No packet passes before the first has a port; then the others are told all of this.
            return Ok(Reply::Done(errno));
        }
        for worker in &self.workers[1..] {
            // One after the other: the order of binding is the order in which the kernel steers.
            let change = DeviceChange {
                private_key: Some(state.view.private_key.clone().unwrap_or_default()),
                listen_port: port,
                fwmark: Some(state.fwmark),
                ..DeviceChange::default()
            };
            let of_worker = worker.ask(Request::Device(change))?.errno();
            if of_worker != 0 {
                return Ok(Reply::Done(if errno == 0 { of_worker } else { errno }));
            }
        }
        Ok(Reply::Done(errno))
    }

    fn peers(&self, placement: &mut Placement, changes: Vec<PeerChange>) -> Result<Reply, WorkerGone> {
        let mut batch = Batch::new(self.workers.len());
        for change in changes {
            if batch.conflicts(&change) {
                let errno = self.apply(placement, &mut batch)?;
                if errno != 0 {
                    return Ok(Reply::Done(errno));
                }
            }
            if change.remove {
                for owner in placement.owners(&change.public_key) {
                    batch.add(owner, change.clone(), None);
                }
            } else {
                let placed = placement.place(&change);
                batch.add(placed.owner, change, Some(placed));
            }
        }
        self.apply(placement, &mut batch).map(Reply::Done)
    }

    fn apply(&self, placement: &mut Placement, batch: &mut Batch) -> Result<i32, WorkerGone> {
        let Batch { letters, .. } = std::mem::replace(batch, Batch::new(self.workers.len()));
        let posted: Vec<_> = (self.workers.iter().zip(letters))
            .filter(|(_, letter)| !letter.changes.is_empty())
            .map(|(worker, letter)| (worker.post(Request::Peers(letter.changes)), letter.placed))
            .collect();
        let (mut worst, mut is_gone) = (0, false);
        let mut all = Vec::new();
        // A key may have been removed at several workers.
        let (mut removed, mut kept) = (HashSet::new(), HashSet::new());
        for (answer, placed) in posted {
            let Ok(reply) = answer.and_then(Answer::wait) else {
                is_gone = true;
                for placed in placed {
                    match placed {
                        Placing::Moved(unanswered) => placement.leave_open(&unanswered),
                        Placing::Removed(key) => _ = kept.insert(key),
                    }
                }
                continue;
            };
            worst = if worst == 0 { reply.errno() } else { worst };
            let (made, settled) = match reply {
                Reply::Changed { notices, settled, made, .. } => {
                    all.extend(notices);
                    (made, settled)
                }
                Reply::Done(_) | Reply::Device(_) | Reply::Tenants { .. } | Reply::Peers { .. } => (0, false),
            };
            for (number, placed) in placed.into_iter().enumerate() {
                match placed {
                    Placing::Moved(_) if number < made => {}
                    Placing::Moved(refused) => placement.take_back(&refused),
                    Placing::Removed(key) if number < made && settled => _ = removed.insert(key),
                    Placing::Removed(key) => _ = kept.insert(key),
                }
            }
        }
        let told = self.notify(all)?;
        removed.difference(&kept).for_each(|key| placement.removed(key));
        if is_gone {
            return Err(WorkerGone);
        }
        Ok(if worst == 0 { told } else { worst })
    }

    /// Tells the workers what happened to their peers elsewhere.
    fn notify(&self, notices: Vec<Notice>) -> Result<i32, WorkerGone> {
        let shard = Shard { index: 0, count: u16::try_from(self.workers.len()).expect("at most 64 workers") };
        let mut letters: Vec<Vec<Notice>> = vec![Vec::new(); self.workers.len()];
        for notice in notices {
            letters[usize::from(shard.owner(notice.slot()))].push(notice);
        }
        for (worker, notices) in self.workers.iter().zip(letters).filter(|(_, notices)| !notices.is_empty()) {
            let errno = worker.ask(Request::Notices(notices))?.errno();
            if errno != 0 {
                return Ok(errno);
            }
        }
        Ok(0)
    }

    /// The cursor is the worker above the slot.
    fn list(&self, from: u32, limit: usize) -> Result<Reply, WorkerGone> {
        let worker = usize::try_from(from >> 16).expect("sixteen bits");
        let Some(controller) = self.workers.get(worker) else {
            return Ok(Reply::Peers { peers: Vec::new(), next: None });
        };
        let reply = controller.ask(Request::List { from: from & 0xffff, limit })?;
        let Reply::Peers { peers, next } = reply else {
            return Ok(reply);
        };
        let this = from & 0xffff_0000;
        let next = match next {
            Some(slot) => Some(this | slot),
            None if worker + 1 < self.workers.len() => Some(this + 0x1_0000),
            None => None,
        };
        Ok(Reply::Peers { peers, next })
    }

    fn describe(&self) -> Result<Reply, WorkerGone> {
        let mut device: Option<Box<DeviceState>> = None;
        let mut workers = Vec::new();
        for (worker, pulse) in self.workers.iter().zip(&self.pulses) {
            if pulse.is_stalled() {
                workers.push(WorkerState { stalled: true, ..WorkerState::default() });
                continue;
            }
            let Reply::Device(state) = worker.ask(Request::Describe)? else {
                return Err(WorkerGone);
            };
            workers.push(WorkerState {
                forwarded: state.shell.forwarded,
                ring_drops: state.shell.ring_drops,
                stalled: false,
            });
            match &mut device {
                None => device = Some(state),
                Some(device) => device.add(&state),
            }
        }
        let mut device = device.ok_or(WorkerGone)?;
        device.workers = workers;
        Ok(Reply::Device(device))
    }
}

/// Changes that can be made at the same time.
struct Batch {
    /// To each worker.
    letters: Vec<Letter>,
    keys: HashSet<[u8; 32]>,
    nets: HashSet<IpNet>,
}

/// Changes for one worker, and what each of them means to the placement.
#[derive(Clone, Default)]
struct Letter {
    changes: Vec<PeerChange>,
    placed: Vec<Placing>,
}

#[derive(Clone, Copy)]
enum Placing {
    Moved(Move),
    Removed([u8; 32]),
}

impl Batch {
    fn new(workers: usize) -> Self {
        Self { letters: vec![Letter::default(); workers], keys: HashSet::new(), nets: HashSet::new() }
    }

    /// Whether the order of this change and an earlier one matters.
    fn conflicts(&mut self, change: &PeerChange) -> bool {
        self.keys.contains(&change.public_key)
            || change.allowed_ips.iter().chain(&change.removed_ips).any(|net| self.nets.contains(&net.trunc()))
    }

    /// `moved` unless the peer is removed.
    fn add(&mut self, owner: u16, change: PeerChange, moved: Option<Move>) {
        self.keys.insert(change.public_key);
        self.nets.extend(change.allowed_ips.iter().chain(&change.removed_ips).map(IpNet::trunc));
        let letter = &mut self.letters[usize::from(owner)];
        letter.placed.push(moved.map_or(Placing::Removed(change.public_key), Placing::Moved));
        letter.changes.push(change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(key: u8, generation: u64) -> PeerChange {
        PeerChange { public_key: [key; 32], generation: Some(generation), ..PeerChange::default() }
    }

    #[test]
    fn new_keys_go_where_there_is_most_room_and_known_ones_stay() {
        let found = Found { public_key: [9; 32], generation: 5, slot: 1 };
        let mut placement = Placement::new(2, 512, &[found]);
        assert_eq!(placement.place(&change(1, 0)).owner, 0);
        assert_eq!(placement.place(&change(2, 0)).owner, 0, "the other one has the peer of the file");
        assert_eq!(placement.place(&change(3, 0)).owner, 1);
        assert_eq!(placement.place(&change(9, 5)).owner, 1, "it goes on in its slot");
        assert_eq!(placement.place(&change(1, 7)).owner, 0);
        placement.removed(&[1; 32]);
        assert_eq!(placement.owners(&[1; 32]), Vec::<u16>::new());
        placement.round += 1;
        placement.place(&change(3, 0));
        placement.replaced();
        assert_eq!((placement.keys.len(), placement.load.as_slice()), (1, &[0, 1][..]));
    }

    #[test]
    fn a_change_that_names_no_life_is_for_the_one_there_is() {
        let mut placement = Placement::new(2, 512, &[Found { public_key: [9; 32], generation: 0, slot: 1 }]);
        assert_eq!(placement.place(&change(9, 7)).owner, 0);
        let wg = PeerChange { generation: None, ..change(9, 0) };
        for later in
            [PeerChange { update_only: true, ..wg.clone() }, PeerChange { update_only: true, ..change(9, 0) }, wg]
        {
            assert_eq!(placement.place(&later).owner, 0);
        }
        let revived = placement.place(&change(9, 0));
        assert_eq!(revived.owner, 1, "it is named");
        placement.leave_open(&revived);
        assert_eq!(placement.owners(&[9; 32]), [0, 1], "either may have it");
    }

    #[test]
    fn an_update_alone_is_not_named_in_a_replacement() {
        let mut placement = Placement::new(2, 512, &[]);
        placement.place(&change(1, 0));
        placement.round += 1;
        placement.place(&PeerChange { update_only: true, ..change(1, 0) });
        placement.replaced();
        assert_eq!((placement.keys.len(), placement.load.as_slice()), (0, &[0, 0][..]));
    }

    #[test]
    fn what_a_worker_refuses_leaves_no_trace() {
        let found = |generation, slot| Found { public_key: [9; 32], generation, slot };
        let mut placement = Placement::new(2, 512, &[found(5, 1), found(6, 0)]);
        let update_only = PeerChange { update_only: true, ..change(7, 0) };
        for change in [change(1, 0), change(9, 5), change(9, 7), update_only] {
            let refused = placement.place(&change);
            placement.take_back(&refused);
            assert_eq!((placement.keys.len(), placement.load.as_slice()), (0, &[1, 1][..]));
        }
        placement.place(&change(9, 5));
        let refused = placement.place(&change(9, 6));
        assert_eq!(
            (refused.owner, placement.load.as_slice()),
            (0, &[1, 0][..]),
            "the one life ends, the other goes on"
        );
        placement.take_back(&refused);
        assert_eq!((placement.owners(&[9; 32]), placement.load.as_slice()), (vec![0, 1], &[1, 1][..]));
        placement.removed(&[9; 32]);
        assert_eq!((placement.owners(&[9; 32]).len(), placement.load.as_slice()), (0, &[0, 0][..]));
    }
}
