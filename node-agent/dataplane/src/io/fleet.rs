//! All workers as one to the control socket: whom a peer belongs to, and one answer out of many.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::desk::Desk;
use super::mailbox::{Controller, DeviceState, Reply, Request, WorkerGone, WorkerState};
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

    /// The worker for a peer that is to be added or changed.
    fn owner(&mut self, change: &PeerChange) -> u16 {
        let placed = self.keys.get(&change.public_key).copied();
        let lives = self.left.get(&change.public_key).map_or(&[][..], Vec::as_slice);
        let generation = change.generation.unwrap_or(0);
        let same_life = lives.iter().find(|left| left.generation == generation);
        let owner = match (same_life, placed) {
            (Some(left), _) => left.owner,
            (None, Some(placed)) => placed.owner,
            (None, None) if change.update_only => return 0,
            (None, None) => {
                let owner = self.least_loaded();
                self.load[usize::from(owner)] += 1;
                owner
            }
        };
        self.keys.insert(change.public_key, Placed { owner, round: self.round });
        owner
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
        if let Some(placed) = self.keys.remove(key) {
            let load = &mut self.load[usize::from(placed.owner)];
            *load = load.saturating_sub(1);
        }
        self.left.remove(key);
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
                self.device(&change)
            }
            Request::Peers(changes) => self.peers(&mut self.placement(), changes),
            Request::BeginReplace => {
                let mut placement = self.placement();
                placement.round += 1;
                self.all(|| Request::BeginReplace)
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

    /// The first worker chooses the port, changes the overlay, which all share, and answers for the journal.
    fn device(&self, change: &DeviceChange) -> Result<Reply, WorkerGone> {
        let errno = self.workers[0].ask(Request::Device(change.clone()))?.errno();
        if errno != 0 {
            return Ok(Reply::Done(errno));
        }
        let Reply::Device(state) = self.workers[0].ask(Request::Describe)? else {
            return Ok(Reply::Done(libc::EPROTO));
        };
        let port = (state.listen_port != 0).then_some(state.listen_port);
        for worker in &self.workers[1..] {
            // One after the other: the order of binding is the order in which the kernel steers.
            let change = DeviceChange {
                private_key: change.private_key.clone(),
                listen_port: port,
                fwmark: change.fwmark,
                policy: change.policy.clone(),
                ..DeviceChange::default()
            };
            let errno = worker.ask(Request::Device(change))?.errno();
            if errno != 0 {
                return Ok(Reply::Done(errno));
            }
        }
        Ok(Reply::Done(0))
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
                    batch.add(owner, change.clone());
                }
            } else {
                let owner = placement.owner(&change);
                batch.add(owner, change);
            }
        }
        self.apply(placement, &mut batch).map(Reply::Done)
    }

    fn apply(&self, placement: &mut Placement, batch: &mut Batch) -> Result<i32, WorkerGone> {
        let Batch { changes, removed, .. } = std::mem::replace(batch, Batch::new(self.workers.len()));
        let posted: Vec<_> = (self.workers.iter().zip(changes))
            .filter(|(_, changes)| !changes.is_empty())
            .map(|(worker, changes)| worker.post(Request::Peers(changes)))
            .collect();
        let mut worst = 0;
        let mut settled = true;
        let mut all = Vec::new();
        for answer in posted {
            let reply = answer?.wait()?;
            worst = if worst == 0 { reply.errno() } else { worst };
            if let Reply::Changed { notices, settled: this, .. } = reply {
                settled &= this;
                all.extend(notices);
            }
        }
        let told = self.notify(all)?;
        if settled && worst == 0 {
            removed.iter().for_each(|key| placement.removed(key));
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
    changes: Vec<Vec<PeerChange>>,
    keys: HashMap<[u8; 32], ()>,
    nets: HashMap<ipnet::IpNet, ()>,
    removed: Vec<[u8; 32]>,
}

impl Batch {
    fn new(workers: usize) -> Self {
        Self { changes: vec![Vec::new(); workers], keys: HashMap::new(), nets: HashMap::new(), removed: Vec::new() }
    }

    /// Whether the order of this change and an earlier one matters.
    fn conflicts(&mut self, change: &PeerChange) -> bool {
        self.keys.contains_key(&change.public_key)
            || change.allowed_ips.iter().chain(&change.removed_ips).any(|net| self.nets.contains_key(&net.trunc()))
    }

    fn add(&mut self, owner: u16, change: PeerChange) {
        self.keys.insert(change.public_key, ());
        self.nets.extend(change.allowed_ips.iter().chain(&change.removed_ips).map(|net| (net.trunc(), ())));
        if change.remove {
            self.removed.push(change.public_key);
        }
        self.changes[usize::from(owner)].push(change);
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
        assert_eq!(placement.owner(&change(1, 0)), 0);
        assert_eq!(placement.owner(&change(2, 0)), 0, "the other one has the peer of the file");
        assert_eq!(placement.owner(&change(3, 0)), 1);
        assert_eq!(placement.owner(&change(9, 5)), 1, "it goes on in its slot");
        assert_eq!(placement.owner(&change(1, 7)), 0);
        placement.removed(&[1; 32]);
        assert_eq!(placement.owners(&[1; 32]), Vec::<u16>::new());
        placement.round += 1;
        placement.owner(&change(3, 0));
        placement.replaced();
        assert_eq!((placement.keys.len(), placement.load.as_slice()), (1, &[0, 1][..]));
    }
}
