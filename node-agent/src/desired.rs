//! What this server should run, and what may become of it: pure, no I/O, no clock.
//!
//! A change is checked whole before anything happens ([`Desired::plan_snapshot`], [`Desired::plan_delta`]), applied to
//! the engine as a difference, and only then committed here. Any refusal leaves everything as it was.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cvault_dataplane::counters::Epoch;
use cvault_node_protocol::digest::{Digest, PeerRecord};
use cvault_node_protocol::{MASS_REMOVAL_MIN, MASS_REMOVAL_PERCENT, v1};
use ipnet::IpNet;
use sha2::Digest as _;
use zeroize::Zeroizing;

use crate::leases::Leases;
use crate::policies::Policies;

/// A WireGuard public key. `Debug` shows how WireGuard tools print it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PublicKey(pub(crate) [u8; 32]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use base64::Engine as _;
        f.write_str(&base64::engine::general_purpose::STANDARD.encode(self.0))
    }
}

/// A preshared key: wiped when dropped, never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PresharedKey(pub(crate) Zeroizing<[u8; 32]>);

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) public_key: PublicKey,
    pub(crate) device_id: [u8; 16],
    pub(crate) tenant_id: [u8; 16],
    pub(crate) preshared_key: Option<PresharedKey>,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: Ipv6Addr,
    pub(crate) generation: u64,
}

impl Peer {
    pub(crate) fn parse(peer: &v1::Peer) -> Result<Self, Refusal> {
        let sixteen = |bytes: &[u8], what| bytes.try_into().map_err(|_| Refusal::Malformed(what));
        let preshared_key = match peer.preshared_key.as_ref() {
            [] => None,
            bytes => {
                Some(PresharedKey(Zeroizing::new(bytes.try_into().map_err(|_| Refusal::Malformed("preshared_key"))?)))
            }
        };
        // The engine takes a peer without a tenant for one of a stand-alone tunnel, with another policy.
        let tenant_id = sixteen(&peer.tenant_id, "tenant_id")?;
        if tenant_id == [0; 16] {
            return Err(Refusal::Malformed("tenant_id"));
        }
        Ok(Self {
            public_key: parse_key(&peer.public_key)?,
            device_id: sixteen(&peer.device_id, "device_id")?,
            tenant_id,
            preshared_key,
            ipv4: Ipv4Addr::from(peer.ipv4),
            ipv6: Ipv6Addr::from(<[u8; 16]>::try_from(peer.ipv6.as_ref()).map_err(|_| Refusal::Malformed("ipv6"))?),
            generation: peer.generation,
        })
    }

    /// The wire form, which is also how peers are stored.
    pub(crate) fn to_wire(&self) -> v1::Peer {
        v1::Peer {
            device_id: self.device_id.to_vec().into(),
            tenant_id: self.tenant_id.to_vec().into(),
            public_key: self.public_key.0.to_vec().into(),
            preshared_key: self.preshared_key.as_ref().map(|key| key.0.to_vec()).unwrap_or_default().into(),
            ipv4: self.ipv4.into(),
            ipv6: self.ipv6.octets().to_vec().into(),
            generation: self.generation,
        }
    }

    fn record(&self) -> PeerRecord {
        PeerRecord {
            device_id: self.device_id,
            tenant_id: self.tenant_id,
            public_key: self.public_key.0,
            preshared_key_hash: self
                .preshared_key
                .as_ref()
                .map_or([0; 32], |key| sha2::Sha256::digest(key.0.as_slice()).into()),
            ipv4: self.ipv4.octets(),
            ipv6: self.ipv6.octets(),
            generation: self.generation,
        }
    }

    pub(crate) fn addresses(&self) -> [IpAddr; 2] {
        [self.ipv4.into(), self.ipv6.into()]
    }

    pub(crate) fn life(&self) -> Life {
        Life { public_key: self.public_key, generation: self.generation }
    }
}

pub(crate) fn parse_key(bytes: &[u8]) -> Result<PublicKey, Refusal> {
    bytes.try_into().map(PublicKey).map_err(|_| Refusal::Malformed("public_key"))
}

/// A position in the desired state of this server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) incarnation: [u8; 16],
    pub(crate) revision: u64,
    pub(crate) digest: Digest,
}

impl Cursor {
    pub(crate) fn parse(cursor: &v1::Cursor) -> Result<Self, Refusal> {
        Ok(Self {
            incarnation: cursor.incarnation.as_ref().try_into().map_err(|_| Refusal::Malformed("incarnation"))?,
            revision: cursor.revision,
            digest: Digest::from_bytes(&cursor.digest).ok_or(Refusal::Malformed("digest"))?,
        })
    }

    pub(crate) fn to_wire(self) -> v1::Cursor {
        v1::Cursor {
            incarnation: self.incarnation.to_vec().into(),
            revision: self.revision,
            digest: self.digest.to_bytes().to_vec().into(),
        }
    }
}

/// Why a change was refused. The text travels to the control plane.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the field {0} is missing or has the wrong length")]
    Malformed(&'static str),
    #[error("the public key {0:?} appears twice")]
    DuplicateKey(PublicKey),
    #[error("the address {0} belongs to two peers")]
    DuplicateAddress(IpAddr),
    #[error("the address {0} is outside the overlay")]
    OutsideOverlay(IpAddr),
    #[error("the address {0} is the server's own")]
    OwnAddress(IpAddr),
    #[error("{got} peers where {expected} were announced")]
    Count { expected: u64, got: u64 },
    #[error("the peers do not have the announced digest")]
    Digest,
    #[error("would remove {removed} of {before} peers, and only {expected} were announced")]
    MassRemoval { removed: usize, before: usize, expected: u32 },
    #[error("the change begins at revision {from}, this server is at {have}")]
    Gap { from: u64, have: u64 },
    #[error("revision {revision} came again with other content")]
    SameRevisionOtherContent { revision: u64 },
    #[error("a delta cannot lead to another incarnation")]
    Incarnation,
    #[error("a chunk holds {0} peers, more than the protocol allows")]
    Chunk(usize),
    #[error("a {0} came outside its order")]
    Order(&'static str),
    #[error("this agent does not know the message")]
    UnknownMessage,
    #[error("the policies do not have the announced digest")]
    Policies,
    #[error("the engine refused the change: {0}")]
    Engine(String),
}

/// A checked change: remove first, then upsert, then the state is `target`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) target: Cursor,
    pub(crate) removed: Vec<PublicKey>,
    pub(crate) upserted: Vec<Peer>,
    /// How many removals the control plane announced.
    pub(crate) expected_removed: u32,
}

/// What takes a committed change back.
#[derive(Clone, Debug)]
pub(crate) struct Undo {
    cursor: Option<Cursor>,
    snapshot_wanted: bool,
    added: Vec<PublicKey>,
    before: Vec<Peer>,
}

/// Which device a key's counters belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Life {
    pub(crate) public_key: PublicKey,
    pub(crate) generation: u64,
}

/// The state this server runs.
#[derive(Clone, Debug)]
pub(crate) struct Desired {
    digest_key: Zeroizing<[u8; 32]>,
    overlay: Vec<IpNet>,
    /// The server's own addresses, which no peer may have.
    own: Vec<IpAddr>,
    cursor: Option<Cursor>,
    /// The control plane finds other content at our revision: whatever snapshot comes next is taken.
    snapshot_wanted: bool,
    digest: Digest,
    peers: HashMap<PublicKey, Peer>,
    owners: HashMap<IpAddr, PublicKey>,
    /// Removed or replaced lives whose final counters may still be outstanding, with their device.
    retired: HashMap<Life, [u8; 16]>,
    pub(crate) policies: Policies,
    pub(crate) leases: Leases,
}

/// What the engine is told of a peer beside its addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) rate_up: u64,
    pub(crate) rate_down: u64,
    pub(crate) lease: Option<u64>,
    /// Beyond the lease; 0: nothing passes.
    pub(crate) throttle: u64,
}

impl Desired {
    /// Nothing applied yet.
    pub(crate) fn new(digest_key: [u8; 32], overlay: Vec<IpNet>, own: Vec<IpAddr>) -> Self {
        Self {
            digest_key: Zeroizing::new(digest_key),
            overlay,
            own,
            cursor: None,
            snapshot_wanted: false,
            digest: Digest::default(),
            peers: HashMap::new(),
            owners: HashMap::new(),
            retired: HashMap::new(),
            policies: Policies::default(),
            leases: Leases::default(),
        }
    }

    /// What holds for a peer while the counters are of `epoch`.
    pub(crate) fn limits(&self, epoch: Option<Epoch>, peer: &Peer) -> Limits {
        let metered = self.policies.is_metered(&peer.tenant_id);
        let lease = metered.then(|| self.leases.enforced(epoch, &peer.life()));
        let Some(policy) = self.policies.get(&peer.tenant_id) else { return Limits { lease, ..Limits::default() } };
        let policy = policy.wire();
        let throttle = if metered { policy.throttle } else { 0 };
        Limits { rate_up: policy.device_rate_up, rate_down: policy.device_rate_down, lease, throttle }
    }

    /// The peers that need leases.
    pub(crate) fn metered(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values().filter(|peer| self.policies.is_metered(&peer.tenant_id))
    }

    pub(crate) fn cursor(&self) -> Option<Cursor> {
        self.cursor
    }

    pub(crate) fn peers(&self) -> impl ExactSizeIterator<Item = &Peer> {
        self.peers.values()
    }

    pub(crate) fn overlay(&self) -> &[IpNet] {
        &self.overlay
    }

    pub(crate) fn peer(&self, key: &PublicKey) -> Option<&Peer> {
        self.peers.get(key)
    }

    /// The control plane says that our content is wrong: take any snapshot next. What runs goes on until it comes.
    pub(crate) fn want_snapshot(&mut self) {
        self.snapshot_wanted = true;
    }

    /// Where the control plane may continue.
    pub(crate) fn resume_from(&self) -> Option<Cursor> {
        self.cursor.filter(|_| !self.snapshot_wanted)
    }

    /// Another key, overlay or own addresses for what comes; the peers stay.
    pub(crate) fn reconfigure(&mut self, digest_key: [u8; 32], overlay: Vec<IpNet>, own: Vec<IpAddr>) {
        self.digest_key = Zeroizing::new(digest_key);
        self.overlay = overlay;
        self.own = own;
        self.digest = self.digest_of(self.peers.values());
    }

    /// Checks a whole snapshot. `None` when it is what already runs.
    pub(crate) fn plan_snapshot(&self, snapshot: &Snapshot) -> Result<Option<Change>, Refusal> {
        let Snapshot { target, peer_count, peers, expected_removed } = snapshot;
        if self.is_known(target)? {
            return Ok(None);
        }
        check_count(u64::from(*peer_count), peers.len())?;
        let mut keys = HashSet::with_capacity(peers.len());
        let mut addresses = HashSet::with_capacity(peers.len() * 2);
        let mut digest = Digest::default();
        for peer in peers {
            self.check_addresses(peer)?;
            if !keys.insert(peer.public_key) {
                return Err(Refusal::DuplicateKey(peer.public_key));
            }
            if let Some(address) = peer.addresses().into_iter().find(|address| !addresses.insert(*address)) {
                return Err(Refusal::DuplicateAddress(address));
            }
            digest.add(&self.digest_key, &peer.record());
        }
        check_digest(digest, target)?;
        let removed: Vec<_> = self.peers.keys().filter(|key| !keys.contains(*key)).copied().collect();
        check_mass_removal(self.peers.len(), removed.len(), *expected_removed)?;
        let upserted = peers.iter().filter(|peer| self.peers.get(&peer.public_key) != Some(peer)).cloned().collect();
        Ok(Some(Change { target: *target, removed, upserted, expected_removed: *expected_removed }))
    }

    /// Checks a whole delta. `None` when it is what already runs.
    pub(crate) fn plan_delta(&self, delta: &v1::Delta) -> Result<Option<Change>, Refusal> {
        let target = Cursor::parse(delta.target.as_ref().ok_or(Refusal::Malformed("target"))?)?;
        let have = self.resume_from().ok_or(Refusal::Gap { from: delta.from_revision, have: 0 })?;
        if target.incarnation != have.incarnation {
            return Err(Refusal::Incarnation);
        }
        if self.is_known(&target)? {
            return Ok(None);
        }
        if delta.from_revision != have.revision {
            return Err(Refusal::Gap { from: delta.from_revision, have: have.revision });
        }
        let mut removed = HashSet::new();
        for key in &delta.removed {
            removed.insert(parse_key(key)?);
        }
        removed.retain(|key| self.peers.contains_key(key));
        let upserted: Vec<Peer> = delta.upserted.iter().map(Peer::parse).collect::<Result<_, _>>()?;
        let digest = self.check_upserts(&removed, &upserted)?;
        let added = upserted.iter().filter(|peer| !self.remains(&peer.public_key, &removed)).count();
        check_count(u64::from(delta.peer_count), self.peers.len() - removed.len() + added)?;
        check_digest(digest, &target)?;
        let again: HashSet<_> = upserted.iter().map(|peer| peer.public_key).collect();
        let gone = removed.difference(&again).count();
        check_mass_removal(self.peers.len(), gone, delta.expected_removed)?;
        let removed = removed.into_iter().collect();
        Ok(Some(Change { target, removed, upserted, expected_removed: delta.expected_removed }))
    }

    /// Uniqueness and overlay of a delta's peers among themselves and against the peers that stay untouched; answers
    /// the digest of the outcome.
    fn check_upserts(&self, removed: &HashSet<PublicKey>, upserted: &[Peer]) -> Result<Digest, Refusal> {
        let mut keys = HashSet::with_capacity(upserted.len());
        for peer in upserted {
            if !keys.insert(peer.public_key) {
                return Err(Refusal::DuplicateKey(peer.public_key));
            }
        }
        let mut digest = self.digest;
        let mut addresses = HashSet::with_capacity(upserted.len() * 2);
        for peer in removed.iter().chain(keys.difference(removed)).filter_map(|key| self.peers.get(key)) {
            digest.remove(&self.digest_key, &peer.record());
        }
        for peer in upserted {
            self.check_addresses(peer)?;
            for address in peer.addresses() {
                let held =
                    self.owners.get(&address).is_some_and(|key| self.remains(key, removed) && !keys.contains(key));
                if held || !addresses.insert(address) {
                    return Err(Refusal::DuplicateAddress(address));
                }
            }
            digest.add(&self.digest_key, &peer.record());
        }
        Ok(digest)
    }

    fn remains(&self, key: &PublicKey, removed: &HashSet<PublicKey>) -> bool {
        self.peers.contains_key(key) && !removed.contains(key)
    }

    /// The addresses that lives of now lose by this change, also when another gets them at once.
    pub(crate) fn freed(&self, change: &Change) -> HashSet<IpAddr> {
        let same = |peer: &&Peer| {
            self.peers
                .get(&peer.public_key)
                .is_some_and(|old| old.life() == peer.life() && old.addresses() == peer.addresses())
        };
        let stays: HashSet<_> = change.upserted.iter().filter(same).map(|peer| peer.public_key).collect();
        let touched = change.removed.iter().chain(change.upserted.iter().map(|peer| &peer.public_key));
        touched
            .filter(|key| !stays.contains(*key))
            .filter_map(|key| self.peers.get(key))
            .flat_map(Peer::addresses)
            .collect()
    }

    /// Takes over a checked change.
    pub(crate) fn commit(&mut self, change: &Change) -> Undo {
        let undo = self.undo_of(change);
        for key in &change.removed {
            self.take_out(key);
        }
        // All old addresses first: two peers may have exchanged theirs.
        for peer in &change.upserted {
            self.take_out(&peer.public_key);
        }
        for peer in &change.upserted {
            self.digest.add(&self.digest_key, &peer.record());
            for address in peer.addresses() {
                self.owners.insert(address, peer.public_key);
            }
            self.retired.remove(&peer.life());
            self.peers.insert(peer.public_key, peer.clone());
        }
        self.cursor = Some(change.target);
        self.snapshot_wanted = false;
        undo
    }

    fn undo_of(&self, change: &Change) -> Undo {
        let touched: HashSet<_> =
            change.removed.iter().copied().chain(change.upserted.iter().map(|peer| peer.public_key)).collect();
        Undo {
            cursor: self.cursor,
            snapshot_wanted: self.snapshot_wanted,
            added: touched.iter().filter(|key| !self.peers.contains_key(*key)).copied().collect(),
            before: touched.iter().filter_map(|key| self.peers.get(key)).cloned().collect(),
        }
    }

    /// Takes the last committed change back: the engine refused it. Lives that the engine may have begun stay known.
    pub(crate) fn roll_back(&mut self, undo: Undo) {
        let Undo { cursor, snapshot_wanted, added: removed, before: upserted } = undo;
        let target = cursor.or(self.cursor).expect("a change was committed, which sets the cursor");
        self.commit(&Change { target, removed, upserted, expected_removed: 0 });
        self.cursor = cursor;
        self.snapshot_wanted = snapshot_wanted;
    }

    fn take_out(&mut self, key: &PublicKey) {
        let Some(peer) = self.peers.remove(key) else { return };
        self.digest.remove(&self.digest_key, &peer.record());
        for address in peer.addresses() {
            self.owners.remove(&address);
        }
        self.retired.insert(peer.life(), peer.device_id);
    }

    /// Whose counters these are, living or retired.
    pub(crate) fn device_of(&self, life: &Life) -> Option<[u8; 16]> {
        match self.peers.get(&life.public_key) {
            Some(peer) if peer.generation == life.generation => Some(peer.device_id),
            _ => self.retired.get(life).copied(),
        }
    }

    pub(crate) fn retired(&self) -> &HashMap<Life, [u8; 16]> {
        &self.retired
    }

    pub(crate) fn restore_retired(&mut self, life: Life, device_id: [u8; 16]) {
        self.retired.insert(life, device_id);
    }

    /// Forgets retired lives whose final counters are safe: all that the engine no longer counts.
    pub(crate) fn forget_retired(&mut self, still_counted: impl Fn(&Life) -> bool) {
        self.retired.retain(|life, _| still_counted(life));
    }

    /// Whether the announced state already runs or is older than what does. Other content at the same revision is refused.
    fn is_known(&self, target: &Cursor) -> Result<bool, Refusal> {
        let Some(have) = self.resume_from().filter(|have| have.incarnation == target.incarnation) else {
            return Ok(false);
        };
        if target.revision == have.revision && target.digest != have.digest {
            return Err(Refusal::SameRevisionOtherContent { revision: have.revision });
        }
        Ok(target.revision <= have.revision)
    }

    fn check_addresses(&self, peer: &Peer) -> Result<(), Refusal> {
        if let Some(address) = peer.addresses().into_iter().find(|address| self.own.contains(address)) {
            return Err(Refusal::OwnAddress(address));
        }
        let outside = |address: &IpAddr| !self.overlay.iter().any(|prefix| prefix.contains(address));
        peer.addresses().into_iter().find(outside).map_or(Ok(()), |address| Err(Refusal::OutsideOverlay(address)))
    }

    fn digest_of<'a>(&self, peers: impl Iterator<Item = &'a Peer>) -> Digest {
        let mut digest = Digest::default();
        for peer in peers {
            digest.add(&self.digest_key, &peer.record());
        }
        digest
    }

    /// The digest of the peers as they are, under the key of now.
    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }

    /// Takes over stored peers, which were checked before they were stored. The cursor may have been told under
    /// another digest key, so the digest under the stored key is compared.
    pub(crate) fn restore(&mut self, cursor: Option<Cursor>, digest: Digest, peers: Vec<Peer>) -> Result<(), Refusal> {
        let mut restored = Self::new(*self.digest_key, self.overlay.clone(), self.own.clone());
        for peer in peers {
            restored.digest.add(&restored.digest_key, &peer.record());
            for address in peer.addresses() {
                if restored.owners.insert(address, peer.public_key).is_some() {
                    return Err(Refusal::DuplicateAddress(address));
                }
            }
            if let Some(twice) = restored.peers.insert(peer.public_key, peer) {
                return Err(Refusal::DuplicateKey(twice.public_key));
            }
        }
        if restored.digest != digest {
            return Err(Refusal::Digest);
        }
        restored.cursor = cursor;
        *self = restored;
        Ok(())
    }

    /// Whether the peers have the digest of the cursor.
    pub(crate) fn is_whole(&self) -> bool {
        self.cursor.is_none_or(|cursor| cursor.digest == self.digest)
    }
}

/// A snapshot as it arrives, chunk by chunk.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    target: Cursor,
    peer_count: u32,
    peers: Vec<Peer>,
    expected_removed: u32,
}

impl Snapshot {
    pub(crate) fn begin(begin: &v1::SnapshotBegin) -> Result<Self, Refusal> {
        let target = Cursor::parse(begin.target.as_ref().ok_or(Refusal::Malformed("target"))?)?;
        Ok(Self { target, peer_count: begin.peer_count, peers: Vec::new(), expected_removed: 0 })
    }

    pub(crate) fn chunk(&mut self, chunk: &v1::SnapshotChunk) -> Result<(), Refusal> {
        if chunk.peers.len() > cvault_node_protocol::MAX_CHUNK_PEERS {
            return Err(Refusal::Chunk(chunk.peers.len()));
        }
        for peer in &chunk.peers {
            self.peers.push(Peer::parse(peer)?);
        }
        match self.peers.len() as u64 {
            got if got > u64::from(self.peer_count) => Err(Refusal::Count { expected: self.peer_count.into(), got }),
            _ => Ok(()),
        }
    }

    #[must_use]
    pub(crate) fn end(mut self, end: v1::SnapshotEnd) -> Self {
        self.expected_removed = end.expected_removed;
        self
    }

    pub(crate) fn target(&self) -> Cursor {
        self.target
    }
}

fn check_count(expected: u64, got: usize) -> Result<(), Refusal> {
    match got as u64 {
        got if got == expected => Ok(()),
        got => Err(Refusal::Count { expected, got }),
    }
}

fn check_digest(digest: Digest, target: &Cursor) -> Result<(), Refusal> {
    if digest == target.digest { Ok(()) } else { Err(Refusal::Digest) }
}

/// The guard against "an empty answer means no peers": a large removal must have been announced.
pub(crate) fn check_mass_removal(before: usize, removed: usize, expected: u32) -> Result<(), Refusal> {
    let mass = removed > MASS_REMOVAL_MIN && removed * 100 > before * MASS_REMOVAL_PERCENT;
    if mass && removed > expected as usize {
        return Err(Refusal::MassRemoval { removed, before, expected });
    }
    Ok(())
}

#[cfg(test)]
#[path = "desired_tests.rs"]
mod tests;
