//! The engine: every peer, key and counter of one interface, as plain data that one thread at a time has.
//!
//! Sans-IO: [`Engine::on_udp`], [`Engine::on_handshakes`], [`Engine::on_tun`], [`Engine::on_tick`] and
//! [`Engine::apply_peer`] take the time as an argument and leave their output in [`Out`]; the shell reports what it really delivered.
//! Invariants: nothing reaches `Out::tun` that was not authenticated by a peer and sent from that peer's addresses;
//! endpoints change only after authentication; nothing is encrypted without a known session.

mod ahead;
mod apply;
mod directory;
#[cfg(test)]
mod handshake_tests;
mod handshakes;
#[cfg(test)]
mod hostile_tests;
mod load;
mod police;
#[cfg(test)]
mod police_tests;
mod receive;
mod replace;
mod send;
mod shard;
#[cfg(test)]
mod shard_tests;
#[cfg(test)]
mod tests;
mod tick;
mod trim;
mod view;

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use smallvec::SmallVec;

use crate::change::Secret;
use crate::counters::{CounterTable, Field};
use crate::drops::{Drop, Drops};
use crate::ecn::Ecn;
use crate::index::{Place, Scramble};
use crate::journal::ClosedPeer;
use crate::noise::Shared;
use crate::out::{Datagram, NO_SLOT, Out};
use crate::policy::{PeerPolicy, Policy};
use crate::tunnel::{Identity, MIN_ROOM, Stamp, Timers, Tunnel};

use ahead::Ahead;
pub(crate) use apply::Notice;
pub use apply::Settled;
use directory::Hold;
use handshakes::Handshakes;
use load::Load;
use replace::Replace;
pub(crate) use shard::{Astray, Parcel, ParcelKind, Shard};
use tick::Callbacks;
pub use view::{DeviceView, PeerView};

/// Packets held for one peer while its handshake runs.
const QUEUE_PER_PEER: usize = 16;

/// The time, read once a pass by the shell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds on a clock that only goes forward.
    pub mono_ms: u64,
    /// Milliseconds since 1970.
    pub unix_ms: u64,
}

/// Where a datagram came from, and the local address it came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The sender.
    pub from: SocketAddr,
    /// Our address it was sent to, to answer from the same one.
    pub to: Option<IpAddr>,
    /// The mark it arrived with.
    pub ecn: Ecn,
}

/// What the engine needs to begin.
pub struct EngineConfig {
    /// The counters, new or found in a file.
    pub counters: CounterTable,
    /// Makes session indices unpredictable.
    pub seed: u64,
}

/// One peer. Less than 300 bytes while it is cold.
struct Peer {
    public_key: [u8; 32],
    generation: u64,
    /// Apart, because few have one.
    preshared_key: Option<Box<Secret>>,
    tenant: Option<[u8; 16]>,
    /// A peer of a tenant has one address of each family.
    allowed_ips: SmallVec<[IpNet; 2]>,
    persistent_keepalive: u16,
    endpoint: Option<SocketAddr>,
    /// The local address the peer talks to.
    via: Option<IpAddr>,
    tunnel: Option<Box<Tunnel>>,
    queue: Vec<Vec<u8>>,
    /// Position in `Engine::live`.
    live_at: Option<u32>,
    /// Last authenticated message in either direction.
    last_traffic_ms: Option<u64>,
    /// Last handshake message in either direction, or creation of the tunnel.
    last_attempt_ms: u64,
    /// Last accepted initiation.
    last_init_ms: Option<u64>,
    /// Of its last tunnel.
    stamp: Stamp,
    /// Between our key and the peer's, once that cost an X25519.
    static_shared: Option<Box<Shared>>,
    policy: PeerPolicy,
}

/// A removed peer whose final counters are not in the journal yet.
struct Closing {
    slot: u16,
    peer: ClosedPeer,
}

/// A public key and which life of it.
type Life = ([u8; 32], u64);

/// See the module.
pub struct Engine {
    identity: Option<Identity>,
    peers: Vec<Option<Box<Peer>>>,
    /// Life of each slot, part of the session index.
    lives: Vec<u8>,
    /// Own slots given back, and the first own one that was never used.
    free: Vec<u16>,
    unused: u32,
    /// Found in the counter file: added again, they go on in their slots.
    parked: BTreeMap<Life, u16>,
    /// Apart from the order also by life, to be found among many when the journal cannot be written.
    closing: Vec<Closing>,
    closing_lives: HashSet<Life, foldhash::fast::RandomState>,
    replace: Replace,
    /// Peers that were not added again are being closed.
    ending: bool,
    /// One of them that has too many prefixes to be closed at once.
    sweeping: Option<u16>,
    /// No peer has had more.
    most_prefixes: usize,
    shard: Shard,
    directory: Hold,
    /// What belongs to other workers: messages, and changes of their peers.
    parcels: Vec<Parcel>,
    notices: Vec<Notice>,
    scramble: Scramble,
    counters: Arc<CounterTable>,
    drops: Drops,
    handshakes: Handshakes,
    /// Slots with a tunnel or a persistent keepalive: the only ones with timers.
    live: Vec<u16>,
    sweep_at: usize,
    /// How many of them are to be visited before the next slice.
    slice_left: usize,
    next_second_ms: u64,
    next_slice_ms: u64,
    callbacks: Callbacks,
    ahead: Ahead,
    policy: Policy,
    hairpin: police::Hairpin,
    /// Of the TUN; 0 is unknown, and nothing is padded.
    mtu: usize,
}

impl Engine {
    /// An engine without key and peers. Slots found occupied in the counters wait for their peers to be added again.
    #[must_use]
    pub fn new(config: EngineConfig) -> Self {
        let EngineConfig { mut counters, seed } = config;
        let former = counters.take_former();
        let hold = Hold::new(1, counters.capacity() as usize, former).pop().expect("one was asked for");
        Self::of_shard(Shard::ALONE, hold, Arc::new(counters), Arc::default(), seed)
    }

    /// `count` engines that share counters and directory; the low byte of a slot says which of them owns it.
    #[must_use]
    pub fn sharded(config: EngineConfig, count: u16) -> Vec<Self> {
        let EngineConfig { mut counters, seed } = config;
        let former = counters.take_former();
        let counters = Arc::new(counters);
        let holds = Hold::new(usize::from(count), counters.capacity() as usize, former).into_iter();
        let shards = (0..count).map(|index| Shard { index, count });
        let load = Arc::default();
        let shards = shards.zip(holds);
        shards
            .map(|(shard, hold)| Self::of_shard(shard, hold, Arc::clone(&counters), Arc::clone(&load), seed))
            .collect()
    }

    fn of_shard(shard: Shard, directory: Hold, counters: Arc<CounterTable>, load: Arc<Load>, seed: u64) -> Self {
        let occupied = counters.occupied().into_iter().filter(|(_, slot)| shard.owns(*slot));
        let parked: BTreeMap<_, _> = occupied.collect();
        let unused = parked.values().map(|slot| u32::from(*slot) + 1).max().unwrap_or(0);
        let unused = shard.first_from(unused);
        let mut taken = vec![false; unused as usize];
        for slot in parked.values() {
            taken[usize::from(*slot)] = true;
        }
        let free = (0..unused)
            .filter_map(|s| u16::try_from(s).ok())
            .filter(|s| shard.owns(*s) && !taken[usize::from(*s)])
            .collect();
        let capacity = counters.capacity() as usize;
        Self {
            identity: None,
            peers: std::iter::repeat_with(|| None).take(capacity).collect(),
            lives: vec![0; capacity],
            free,
            unused,
            parked,
            closing: Vec::new(),
            closing_lives: HashSet::default(),
            replace: Replace::new(capacity),
            ending: false,
            sweeping: None,
            most_prefixes: 0,
            shard,
            directory,
            parcels: Vec::new(),
            notices: Vec::new(),
            scramble: Scramble::new(seed),
            counters,
            drops: Drops::default(),
            handshakes: Handshakes::with(load),
            live: Vec::new(),
            sweep_at: 0,
            slice_left: 0,
            next_second_ms: 0,
            next_slice_ms: 0,
            callbacks: Callbacks::default(),
            ahead: Ahead::default(),
            policy: Policy::default(),
            hairpin: police::Hairpin::default(),
            mtu: 0,
        }
    }

    /// The largest packet that the TUN takes now: none is padded beyond it.
    pub fn set_mtu(&mut self, mtu: u16) {
        self.mtu = usize::from(mtu);
    }

    /// Before a pass: takes part in the directory that all workers share.
    pub fn enter(&mut self) {
        self.directory.enter();
    }

    /// After a pass, and between portions of changes, so that others can change the directory.
    pub fn leave(&mut self) {
        self.directory.leave();
    }

    /// The shell handed packets of this peer to the TUN.
    pub fn delivered(&mut self, slot: u16, packets: u64, inner_bytes: u64) {
        self.counters.add(slot, Field::RxPackets, packets);
        self.counters.add(slot, Field::RxInner, inner_bytes);
    }

    /// The shell handed datagrams to the socket. `inner` of all of them must be either zero or not.
    pub fn sent(&mut self, slot: u16, packets: u64, inner_bytes: u64, wire_bytes: u64) {
        if slot == NO_SLOT {
            return;
        }
        self.counters.add(slot, Field::TxWire, wire_bytes);
        if inner_bytes > 0 {
            self.counters.add(slot, Field::TxPackets, packets);
            self.counters.add(slot, Field::TxInner, inner_bytes);
        }
    }

    /// The shell could not deliver packets or datagrams of this peer, or of nobody.
    #[cold]
    pub fn lost(&mut self, reason: Drop, slot: u16, packets: u64, bytes: u64) {
        self.drops.many(reason, packets, bytes);
        if slot != NO_SLOT {
            self.blame_for(slot, reason, packets);
        }
    }

    /// The local address a peer used is gone: let the kernel choose.
    pub fn forget_local_address(&mut self, slot: u16) {
        if let Some(peer) = self.peers.get_mut(usize::from(slot)).and_then(Option::as_mut) {
            peer.via = None;
        }
    }

    fn index_of(&self, slot: u16) -> u32 {
        self.scramble.index(Place { slot, generation: self.lives[usize::from(slot)] })
    }

    /// The slot an index on the wire belongs to.
    fn slot_of(&self, index: u32) -> Option<u16> {
        let place = self.scramble.place(index >> 8);
        let at = usize::from(place.slot);
        let alive = self.lives.get(at) == Some(&place.generation) && self.peers[at].is_some();
        alive.then_some(place.slot)
    }

    fn make_live(&mut self, slot: u16) {
        let peer = self.peers[usize::from(slot)].as_mut().expect("the callers hold an occupied slot");
        if peer.live_at.is_none() {
            peer.live_at = u32::try_from(self.live.len()).ok();
            self.live.push(slot);
        }
    }

    fn make_cold(&mut self, slot: u16) {
        let Some(at) = self.peers[usize::from(slot)].as_mut().and_then(|peer| peer.live_at.take()) else {
            return;
        };
        self.live.swap_remove(at as usize);
        if let Some(moved) = self.live.get(at as usize)
            && let Some(peer) = self.peers[usize::from(*moved)].as_mut()
        {
            peer.live_at = Some(at);
        }
    }

    /// Makes sure that a tunnel's timers are current before it is used.
    fn freshen(&mut self, now: Now, slot: u16, out: &mut Out) {
        let stale = |peer: &Peer| peer.tunnel.as_ref().is_some_and(|tunnel| !tunnel.is_fresh(now));
        if self.peers[usize::from(slot)].as_deref().is_some_and(stale) {
            self.update_timers(now, slot, out);
        }
    }

    fn update_timers(&mut self, now: Now, slot: u16, out: &mut Out) {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        let (Some(tunnel), Some(room)) = (peer.tunnel.as_mut(), out.net_room(MIN_ROOM)) else {
            return;
        };
        match tunnel.update(now, room) {
            Timers::Nothing => {}
            Timers::Send(len) => {
                peer.last_attempt_ms = now.mono_ms;
                push(peer, slot, len, 0, out);
            }
            Timers::SendAnew(len) => {
                peer.last_attempt_ms = now.mono_ms;
                // As the kernel does: it may know another way by now.
                peer.via = None;
                push(peer, slot, len, 0, out);
            }
            Timers::Expired => self.drop_tunnel(slot),
        }
    }

    /// Ends the peer's tunnel and whatever waited for it.
    fn drop_tunnel(&mut self, slot: u16) {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        if let Some(tunnel) = peer.tunnel.take() {
            peer.stamp = tunnel.stamp();
        }
        self.handshakes.load.release(peer.queue.len());
        for packet in peer.queue.drain(..) {
            self.drops.one(Drop::TxNoSession, packet.len());
            peer.policy.dropped(Drop::TxNoSession, 1);
        }
        if peer.persistent_keepalive == 0 {
            self.make_cold(slot);
        }
    }

    /// Begins a handshake with a peer whose endpoint is known, unless one is under way.
    fn initiate(&mut self, now: Now, slot: u16, out: &mut Out) {
        let index = self.index_of(slot);
        let Some(identity) = self.identity.as_ref() else {
            return;
        };
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        let Some(room) = out.net_room(MIN_ROOM) else {
            return;
        };
        if peer.endpoint.is_none() {
            return;
        }
        if peer.tunnel.is_none() {
            peer.last_attempt_ms = now.mono_ms;
            peer.tunnel = Tunnel::to(peer, identity, index, now).map(Box::new);
        }
        let Some(tunnel) = peer.tunnel.as_mut() else {
            return self.drop_tunnel(slot);
        };
        if let Some(len) = tunnel.initiate(now, room) {
            peer.last_attempt_ms = now.mono_ms;
            push(peer, slot, len, 0, out);
        }
        self.make_live(slot);
    }
}

impl Tunnel {
    /// `None`: the peer's key is one with which nothing can be shared.
    fn to(peer: &mut Peer, identity: &Identity, index: u32, now: Now) -> Option<Self> {
        let shared = match &peer.static_shared {
            Some(shared) => shared,
            None => peer.static_shared.insert(Box::new(identity.shared_with(&peer.public_key)?)),
        };
        let psk = peer.preshared_key.as_deref();
        Some(Self::new(identity, &peer.public_key, psk, Shared::clone(shared), index, peer.stamp, now))
    }
}

/// Takes the datagram of `len` bytes that was just written into `out`, if the peer can be reached.
fn push(peer: &Peer, slot: u16, len: usize, inner: usize, out: &mut Out) {
    push_marked(peer, slot, len, inner, Ecn::NotEct, out);
}

fn push_marked(peer: &Peer, slot: u16, len: usize, inner: usize, ecn: Ecn, out: &mut Out) {
    if let Some(to) = peer.endpoint {
        let start = out.net_start();
        out.push_net(Datagram { start, len, to, via: peer.via, slot, inner, ecn });
    }
}
