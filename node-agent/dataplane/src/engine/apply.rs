//! Changes while traffic runs: each is O(1) in the number of peers.

use foldhash::HashSet;
use ipnet::IpNet;
use smallvec::SmallVec;

use super::police::total;
use super::trim::AT_ONCE;
use super::{Closing, Engine, Life, Now, Peer, Shard};
use crate::allowed::is_host;
use crate::change::{PeerChange, Refused, Secret};
use crate::counters::Counts;
use crate::drops::Drop;
use crate::journal::ClosedPeer;
use crate::out::Out;
use crate::policy::{PeerPolicy, TooMany};
use crate::tunnel::{Identity, Stamp};

/// After a restart, peers whose last handshake is younger than this still believe in their session.
const CALLBACK_AGE_MS: u64 = 180_000;
/// Every packet of a tenant is compared with each of these prefixes.
pub(super) const MAX_OVERLAY: usize = 256;

/// Whether removed peers are left to journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// None.
    All,
    /// Some: go on later.
    More,
}

/// What a change did to a peer of another worker, who must hear of it before the change is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The prefix has moved to another peer.
    Forget { slot: u16, net: IpNet },
    /// The key lives on at another worker.
    Remove { slot: u16 },
}

impl Notice {
    pub(crate) fn slot(self) -> u16 {
        match self {
            Self::Forget { slot, .. } | Self::Remove { slot } => slot,
        }
    }
}

impl Engine {
    /// Sets or removes our key. Sessions made with another key end.
    pub fn set_private_key(&mut self, secret: &Secret) {
        if self.identity.as_ref().map_or(secret.is_zero(), |identity| identity.secret() == secret) {
            return;
        }
        self.identity = (!secret.is_zero()).then(|| Identity::new(secret, self.handshakes.load.seed.clone()));
        self.share_anew();
        for slot in std::mem::take(&mut self.live) {
            if let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() {
                peer.live_at = None;
            }
            self.drop_tunnel(slot);
            if self.peers[usize::from(slot)].as_ref().is_some_and(|peer| peer.persistent_keepalive > 0) {
                self.make_live(slot);
            }
        }
        if let Some(own) = self.identity.as_ref().map(Identity::public_key)
            && let Some(slot) = self.directory.get().by_key.get(&own).copied()
        {
            self.remove(slot);
        }
    }

    /// Changes the prefixes in which peers live.
    ///
    /// # Errors
    /// [`TooMany`]; nothing was changed then.
    pub fn set_overlay(&mut self, replace: bool, add: &[IpNet]) -> Result<(), TooMany> {
        if !replace && add.is_empty() {
            return Ok(());
        }
        if add.len() > MAX_OVERLAY {
            return Err(TooMany);
        }
        let mut overlay = if replace { Vec::new() } else { self.directory.get().overlay.clone() };
        for net in add {
            if !overlay.contains(&net.trunc()) {
                overlay.push(net.trunc());
            }
            if overlay.len() > MAX_OVERLAY {
                return Err(TooMany);
            }
        }
        self.directory.get_mut().overlay = overlay;
        Ok(())
    }

    /// `replace_peers`: peers that are not added again until [`Self::end_replace`] go then. Those that are keep their
    /// counters, endpoint and session; the rest is as for a new peer.
    pub fn begin_replace(&mut self) {
        self.replace.begin();
    }

    /// Nobody knows which peers were to be added again: none goes.
    pub fn abandon_replace(&mut self) {
        self.replace.abandon();
    }

    /// Closes every peer that was not added again, those of an earlier process included: [`Self::settle`] does it.
    pub fn end_replace(&mut self) {
        self.replace.end();
        self.ending = true;
    }

    /// Adds, changes or removes one peer.
    ///
    /// # Errors
    /// Nothing was changed then.
    pub fn apply_peer(&mut self, now: Now, mut change: PeerChange, out: &mut Out) -> Result<(), Refused> {
        let is_self = self.identity.as_ref().is_some_and(|identity| identity.public_key() == change.public_key);
        let anywhere = self.directory.get().by_key.get(&change.public_key).copied();
        let existing = anywhere.filter(|slot| self.shard.owns(*slot));
        if change.remove {
            if let Some(slot) = existing {
                self.remove(slot);
            }
            self.remove_parked(&change.public_key);
            return Ok(());
        }
        let known = existing.filter(|slot| !self.replace.is_unnamed(*slot));
        if is_self || (known.is_none() && change.update_only) {
            return Ok(());
        }
        self.check_tenant(known, &change)?;
        let slot = match existing {
            Some(slot) if self.is_life(slot, known.is_some(), change.generation) => {
                if known.is_none() {
                    self.renew(slot, &mut change);
                }
                slot
            }
            Some(slot) => {
                let new = self.insert(now, &change)?;
                self.remove(slot);
                self.directory.get_mut().by_key.insert(change.public_key, new);
                new
            }
            None => self.insert(now, &change)?,
        };
        self.replace.name(slot);
        if let (None, Some(elsewhere)) = (existing, anywhere) {
            // A life that an earlier process left here takes over from the one that another worker has.
            self.notices.push(Notice::Remove { slot: elsewhere });
        }
        self.update(now, slot, change, out);
        Ok(())
    }

    /// A new peer has a generation even if none is given.
    pub(super) fn is_life(&self, slot: u16, known: bool, generation: Option<u64>) -> bool {
        let peer = self.peers[usize::from(slot)].as_deref();
        match generation {
            None if known => true,
            given => peer.is_some_and(|peer| peer.generation == given.unwrap_or(0)),
        }
    }

    /// Named for the first time in a replacement: as good as new but for the session, if the pre-shared key is the same.
    fn renew(&mut self, slot: u16, change: &mut PeerChange) {
        change.replace_allowed_ips = true;
        change.persistent_keepalive.get_or_insert(0);
        change.limits.default_the_rest();
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        let wanted = change.preshared_key.as_ref().filter(|psk| !psk.is_zero());
        let other_key = peer.preshared_key.as_deref() != wanted;
        peer.preshared_key = wanted.cloned().map(Box::new);
        if peer.tenant.is_some() && peer.tenant != change.tenant {
            peer.tenant = None;
            peer.policy.leave_tenant();
            if self.shard != Shard::ALONE {
                self.directory.get_mut().tenants.remove(&slot);
            }
        }
        if other_key {
            self.drop_tunnel(slot);
        }
    }

    /// Whether [`Self::settle`] must come first, because the change needs what a removed peer still holds.
    #[must_use]
    pub fn waits_for_settling(&self, change: &PeerChange) -> bool {
        !self.closing.is_empty() && (self.is_full() || self.closing_lives.contains(&life_of(change)))
    }

    /// What the changes since the last call did to peers of other workers.
    pub(crate) fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Changes of other workers concern some of our peers.
    pub(crate) fn on_notices(&mut self, notices: Vec<Notice>) {
        let mut moved = Vec::new();
        for notice in notices {
            match notice {
                Notice::Remove { slot } => self.remove(slot),
                // It may have come back in the meantime.
                Notice::Forget { slot, net } if self.directory.get().routes.owner(net) == Some(slot) => {}
                Notice::Forget { slot, net } => moved.push((slot, net)),
            }
        }
        self.forget_moved(moved);
    }

    /// Takes prefixes out of the lists of their former owners.
    fn forget_moved(&mut self, mut moved: Vec<(u16, IpNet)>) {
        moved.sort_unstable_by_key(|(slot, _)| *slot);
        for of_one in moved.chunk_by(|(one, _), (other, _)| one == other) {
            self.forget_prefixes(of_one[0].0, of_one.iter().map(|(_, net)| *net));
        }
    }

    /// One walk over the list, however many prefixes go.
    fn forget_prefixes(&mut self, slot: u16, gone: impl ExactSizeIterator<Item = IpNet>) {
        if let Some(peer) = self.peers[usize::from(slot)].as_deref_mut()
            && gone.len() > 0
        {
            let gone: HashSet<IpNet> = gone.collect();
            peer.allowed_ips.retain(|have| !gone.contains(have));
        }
    }

    /// Before the first change: what processes before this one have closed. Lives of this epoch go on from there.
    pub fn remember(&mut self, ended: &[ClosedPeer]) {
        let epoch = self.counters.epoch();
        let finals = &mut self.directory.get_mut().finals;
        for peer in ended.iter().filter(|peer| peer.epoch == epoch) {
            finals.keep((peer.public_key, peer.generation), peer.counts);
        }
        self.directory.leave();
    }

    /// Hands the final counters of up to `limit` removed peers to `journal`; only then can their slots be used again.
    ///
    /// # Errors
    /// The error of `journal`: it took none of them, and they stay.
    pub fn settle<E>(
        &mut self,
        limit: usize,
        journal: impl FnOnce(&[ClosedPeer]) -> Result<(), E>,
    ) -> Result<Settled, E> {
        self.sweep(limit);
        let kept = self.closing.len().saturating_sub(limit);
        let closed: Vec<ClosedPeer> = self.closing[kept..].iter().map(|closing| closing.peer).collect();
        if !closed.is_empty() {
            journal(&closed)?;
        }
        for Closing { slot, peer } in self.closing.drain(kept..) {
            self.closing_lives.remove(&(peer.public_key, peer.generation));
            self.counters.vacate(slot);
            self.lives[usize::from(slot)] = self.lives[usize::from(slot)].wrapping_add(1);
            self.free.push(slot);
        }
        Ok(if self.closing.is_empty() && !self.ending { Settled::All } else { Settled::More })
    }

    /// After [`Self::end_replace`]: closes peers until `limit` wait for the journal. While that cannot be written the
    /// rest goes on.
    fn sweep(&mut self, limit: usize) {
        let mut left = AT_ONCE;
        while self.ending && self.closing.len() < limit {
            if let Some((_, slot)) = self.parked.pop_first() {
                self.close(slot);
            } else if let Some(slot) = self.next_to_sweep() {
                left -= self.take_prefixes(slot, left, &[]);
                if self.prefixes_of(slot) > 0 {
                    self.sweeping = Some(slot);
                    return;
                }
                self.remove(slot);
            } else {
                self.ending = false;
            }
        }
    }

    fn next_to_sweep(&mut self) -> Option<u16> {
        // It may have been named again since.
        let begun = self.sweeping.take().filter(|slot| self.replace.is_unnamed(*slot));
        begun.or_else(|| self.replace.next_unnamed(self.unused))
    }

    pub(super) fn check_tenant(&self, existing: Option<u16>, change: &PeerChange) -> Result<(), Refused> {
        let peer = existing.and_then(|slot| self.peers[usize::from(slot)].as_deref());
        let had_tenant = peer.is_some_and(|peer| peer.tenant.is_some());
        let tenant = had_tenant || change.tenant.is_some();
        let kept = peer.filter(|_| !change.replace_allowed_ips).map_or(&[][..], |peer| &peer.allowed_ips);
        if tenant && !kept.iter().chain(&change.allowed_ips).all(|net| is_host(*net)) {
            return Err(Refused::TenantPrefix);
        }
        Ok(())
    }

    /// Whether [`Self::insert`] finds a slot.
    pub(super) fn has_slot_for(&self, change: &PeerChange) -> bool {
        let life = life_of(change);
        let is_free = self.parked.contains_key(&life) || !self.is_full();
        is_free && !self.closing_lives.contains(&life)
    }

    fn is_full(&self) -> bool {
        self.free.is_empty() && self.unused >= self.counters.capacity()
    }

    /// A slot for a new peer: its own from before, or a free one.
    fn insert(&mut self, now: Now, change: &PeerChange) -> Result<u16, Refused> {
        let id = life_of(change);
        if self.closing_lives.contains(&id) {
            // Its line is still occupied; a second one of the same life would be taken for it after a restart.
            return Err(Refused::Closing);
        }
        let slot = match self.parked.remove(&id) {
            Some(slot) => slot,
            None => {
                let slot = self.take_free_slot().ok_or(Refused::Full)?;
                let former = self.directory.get_mut().former.remove(&id.0).unwrap_or(0);
                let greatest = self.greatest_timestamp_of(&id.0).max(former);
                // Whoever names no life, as `wg` does, means a new one.
                let counted = change.generation.and_then(|_| self.directory.get().finals.get(&id)).unwrap_or_default();
                self.counters.occupy_from(slot, &id.0, id.1, Counts { last_handshake_ms: 0, ..counted });
                self.counters.set_greatest_timestamp(slot, greatest);
                slot
            }
        };
        let before = self.counters.peer(slot);
        let last_handshake_ms = before.map_or(0, |peer| peer.counts.last_handshake_ms);
        if now.unix_ms.saturating_sub(last_handshake_ms) < CALLBACK_AGE_MS {
            self.callbacks.add(slot);
        }
        self.peers[usize::from(slot)] = Some(Box::new(Peer {
            public_key: id.0,
            generation: id.1,
            preshared_key: None,
            tenant: None,
            allowed_ips: SmallVec::new(),
            persistent_keepalive: 0,
            endpoint: before.and_then(|peer| peer.endpoint),
            via: None,
            tunnel: None,
            queue: Vec::new(),
            live_at: None,
            last_traffic_ms: None,
            last_attempt_ms: now.mono_ms,
            last_init_ms: None,
            stamp: Stamp::default(),
            static_shared: None,
            policy: PeerPolicy::default(),
        }));
        self.directory.get_mut().by_key.insert(id.0, slot);
        self.ahead.add(slot);
        Ok(slot)
    }

    /// Of the other lives of a key: a new one of the same device does not open the door to its old initiations.
    fn greatest_timestamp_of(&self, public_key: &[u8; 32]) -> u64 {
        let parked = self.parked.range((*public_key, 0)..=(*public_key, u64::MAX)).map(|(_, slot)| *slot);
        let living = self.directory.get().by_key.get(public_key).copied();
        parked.chain(living).map(|slot| self.counters.greatest_timestamp(slot)).max().unwrap_or(0)
    }

    pub(super) fn take_free_slot(&mut self) -> Option<u16> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = u16::try_from(self.unused).ok().filter(|_| self.unused < self.counters.capacity())?;
        self.unused = self.shard.first_from(self.unused + 1);
        Some(slot)
    }

    fn update(&mut self, now: Now, slot: u16, change: PeerChange, out: &mut Out) {
        if let Some(endpoint) = change.endpoint
            && let Some(peer) = self.peers[usize::from(slot)].as_deref_mut()
            && peer.endpoint != Some(endpoint)
        {
            peer.endpoint = Some(endpoint);
            peer.via = None;
            self.counters.set_endpoint(slot, endpoint);
        }
        // It may begin a handshake, at the endpoint that it has now.
        if let Some(psk) = change.preshared_key {
            self.set_preshared_key(now, slot, psk, out);
        }
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        if let Some(tenant) = change.tenant
            && (peer.tenant != Some(tenant) || peer.policy.tenant().is_none())
        {
            peer.tenant = Some(tenant);
            peer.policy.belong_to(self.policy.tenants.hold(tenant));
            if self.shard != Shard::ALONE {
                self.directory.get_mut().tenants.insert(slot, tenant);
            }
        }
        peer.policy.limit(now.clock(), change.limits, || total(&self.counters, slot));
        let same = change.removed_ips.is_empty() && peer.allowed_ips[..] == change.allowed_ips[..];
        if change.replace_allowed_ips && !same {
            for net in std::mem::take(&mut peer.allowed_ips) {
                self.directory.get_mut().routes.remove(net, slot);
            }
        }
        for net in &change.removed_ips {
            self.directory.get_mut().routes.remove(net.trunc(), slot);
        }
        self.forget_prefixes(slot, change.removed_ips.iter().map(IpNet::trunc));
        if !same {
            let mut moved = Vec::new();
            for net in change.allowed_ips {
                moved.extend(self.add_allowed_ip(slot, net.trunc()).map(|former| (former, net.trunc())));
            }
            self.forget_moved(moved);
        }
        if let Some(seconds) = change.persistent_keepalive {
            self.set_keepalive(slot, seconds);
        }
    }

    fn set_preshared_key(&mut self, now: Now, slot: u16, psk: Secret, out: &mut Out) {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        let psk = (!psk.is_zero()).then_some(psk);
        if peer.preshared_key.as_deref() == psk.as_ref() {
            return;
        }
        peer.preshared_key = psk.map(Box::new);
        match peer.tunnel.as_deref_mut() {
            // As in the kernel the session goes on, until the next handshake.
            Some(tunnel) if tunnel.has_session() => tunnel.set_preshared_key(peer.preshared_key.as_deref()),
            Some(_) => {
                // It may be for the old key that there is none yet.
                self.drop_tunnel(slot);
                self.initiate(now, slot, out);
            }
            None => {}
        }
    }

    /// Says which other peer of ours still lists the prefix.
    fn add_allowed_ip(&mut self, slot: u16, net: IpNet) -> Option<u16> {
        let former = self.directory.get_mut().routes.insert(net, slot);
        if former == Some(slot) {
            return None;
        }
        if let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() {
            peer.allowed_ips.push(net);
            self.most_prefixes = self.most_prefixes.max(peer.allowed_ips.len());
        }
        let (ours, elsewhere) = former.map_or((None, None), |former| {
            if self.shard.owns(former) { (Some(former), None) } else { (None, Some(former)) }
        });
        self.notices.extend(elsewhere.map(|slot| Notice::Forget { slot, net }));
        ours
    }

    fn set_keepalive(&mut self, slot: u16, seconds: u16) {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        if peer.persistent_keepalive == 0 && seconds > 0 {
            // As in the kernel: the first one is due at once.
            peer.last_traffic_ms = None;
        }
        peer.persistent_keepalive = seconds;
        if seconds > 0 {
            self.make_live(slot);
        }
    }

    fn remove(&mut self, slot: u16) {
        if self.detach(slot).is_some() {
            self.close(slot);
        }
    }

    /// Closes what an earlier process left behind of this key.
    fn remove_parked(&mut self, public_key: &[u8; 32]) {
        while let Some((life, _)) = self.parked.range((*public_key, 0)..=(*public_key, u64::MAX)).next() {
            let life = *life;
            if let Some(slot) = self.parked.remove(&life) {
                self.close(slot);
            }
        }
    }

    /// Takes the peer out of every table; its slot and counters stay.
    fn detach(&mut self, slot: u16) -> Option<Box<Peer>> {
        self.make_cold(slot);
        let mut peer = self.peers[usize::from(slot)].take()?;
        self.handshakes.load.release(peer.queue.len());
        for packet in peer.queue.drain(..) {
            self.drops.one(Drop::TxNoSession, packet.len());
        }
        for net in &peer.allowed_ips {
            self.directory.get_mut().routes.remove(*net, slot);
        }
        if self.directory.get().by_key.get(&peer.public_key) == Some(&slot) {
            self.directory.get_mut().by_key.remove(&peer.public_key);
        }
        if self.shard != Shard::ALONE {
            self.directory.get_mut().tenants.remove(&slot);
        }
        Some(peer)
    }

    fn close(&mut self, slot: u16) {
        if let Some(last) = self.counters.peer(slot) {
            let peer = ClosedPeer {
                epoch: self.counters.epoch(),
                public_key: last.public_key,
                generation: last.generation,
                counts: last.counts,
            };
            let life = (peer.public_key, peer.generation);
            self.directory.get_mut().finals.keep(life, peer.counts);
            self.closing_lives.insert(life);
            self.closing.push(Closing { slot, peer });
        }
    }
}

fn life_of(change: &PeerChange) -> Life {
    (change.public_key, change.generation.unwrap_or(0))
}
