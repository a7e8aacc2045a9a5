//! Changes while traffic runs: each is O(1) in the number of peers.

use std::collections::VecDeque;

use ipnet::IpNet;

use super::{Closing, Engine, Now, Parked, Peer};
use crate::allowed::is_host;
use crate::change::{PeerChange, Refused, Secret};
use crate::drops::Drop;
use crate::journal::ClosedPeer;
use crate::out::Out;
use crate::tunnel::Identity;

/// After a restart, peers whose last handshake is younger than this still believe in their session.
const CALLBACK_AGE_MS: u64 = 180_000;

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
        if self.identity.as_ref().is_some_and(|identity| identity.secret() == secret) {
            return;
        }
        self.identity = (!secret.is_zero()).then(|| Identity::new(secret));
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
    pub fn set_overlay(&mut self, replace: bool, add: &[IpNet]) {
        if !replace && add.is_empty() {
            return;
        }
        let overlay = &mut self.directory.get_mut().overlay;
        if replace {
            overlay.clear();
        }
        for net in add {
            if !overlay.contains(&net.trunc()) {
                overlay.push(net.trunc());
            }
        }
    }

    /// `replace_peers`: takes all peers away until [`Self::end_replace`]. Those added again in between keep their
    /// counters, endpoint and session.
    pub fn begin_replace(&mut self) {
        let shard = self.shard;
        let slots = self.directory.get().by_key.values().copied().filter(|slot| shard.owns(*slot));
        let slots: Vec<u16> = slots.collect();
        for slot in slots {
            if let Some(mut peer) = self.detach(slot) {
                peer.allowed_ips.clear();
                let id = (peer.public_key, peer.generation);
                self.parked.insert(id, Parked { slot, peer: Some(peer) });
            }
        }
    }

    /// Closes every peer that was taken away and not added again, those of an earlier process included.
    pub fn end_replace(&mut self) {
        for (_, parked) in std::mem::take(&mut self.parked) {
            self.close(parked.slot);
        }
    }

    /// Adds, changes or removes one peer.
    ///
    /// # Errors
    /// Nothing was changed then.
    pub fn apply_peer(&mut self, now: Now, change: PeerChange, out: &mut Out) -> Result<(), Refused> {
        let is_self = self.identity.as_ref().is_some_and(|identity| identity.public_key() == change.public_key);
        let known = self.directory.get().by_key.get(&change.public_key).copied();
        let existing = known.filter(|slot| self.shard.owns(*slot));
        if change.remove {
            if let Some(slot) = existing {
                self.remove(slot);
            }
            self.remove_parked(&change.public_key);
            return Ok(());
        }
        if is_self || (known.is_none() && change.update_only) {
            return Ok(());
        }
        self.check_tenant(existing, &change)?;
        let same_life = |slot: &u16| {
            let generation = self.peers[usize::from(*slot)].as_ref().map(|peer| peer.generation);
            change.generation.is_none() || change.generation == generation
        };
        let slot = match existing {
            Some(slot) if same_life(&slot) => slot,
            Some(slot) => {
                let new = self.insert(now, &change)?;
                self.remove(slot);
                self.directory.get_mut().by_key.insert(change.public_key, new);
                new
            }
            None => self.insert(now, &change)?,
        };
        if let (None, Some(elsewhere)) = (existing, known) {
            // A life that an earlier process left here takes over from the one that another worker has.
            self.notices.push(Notice::Remove { slot: elsewhere });
        }
        self.update(now, slot, change, out);
        Ok(())
    }

    /// What the changes since the last call did to peers of other workers.
    pub(crate) fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Another worker's change concerns one of our peers.
    pub(crate) fn on_notice(&mut self, notice: Notice) {
        match notice {
            Notice::Remove { slot } => self.remove(slot),
            Notice::Forget { slot, net } => {
                // It may have come back in the meantime.
                if self.directory.get().routes.owner(net) != Some(slot) {
                    self.forget_prefix(slot, net);
                }
            }
        }
    }

    fn forget_prefix(&mut self, slot: u16, net: IpNet) {
        if let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() {
            peer.allowed_ips.retain(|have| *have != net);
        }
    }

    /// Hands the final counters of up to `limit` removed peers to `journal`; only then can their slots be used again.
    ///
    /// # Errors
    /// The first error of `journal`. What it did not take stays.
    pub fn settle<E>(
        &mut self,
        limit: usize,
        mut journal: impl FnMut(&ClosedPeer) -> Result<(), E>,
    ) -> Result<Settled, E> {
        for _ in 0..limit {
            let Some(closing) = self.closing.last() else {
                break;
            };
            journal(&closing.peer)?;
            let slot = closing.slot;
            self.counters.vacate(slot);
            self.lives[usize::from(slot)] = self.lives[usize::from(slot)].wrapping_add(1);
            self.free.push(slot);
            self.closing.pop();
        }
        Ok(if self.closing.is_empty() { Settled::All } else { Settled::More })
    }

    fn check_tenant(&self, existing: Option<u16>, change: &PeerChange) -> Result<(), Refused> {
        let peer = existing.and_then(|slot| self.peers[usize::from(slot)].as_deref());
        let had_tenant = peer.is_some_and(|peer| peer.tenant.is_some());
        let tenant = had_tenant || change.tenant.is_some();
        let kept = peer.filter(|_| !change.replace_allowed_ips).map_or(&[][..], |peer| &peer.allowed_ips);
        if tenant && !kept.iter().chain(&change.allowed_ips).all(|net| is_host(*net)) {
            return Err(Refused::TenantPrefix);
        }
        Ok(())
    }

    /// A slot for a new peer: its own from before, or a free one.
    fn insert(&mut self, now: Now, change: &PeerChange) -> Result<u16, Refused> {
        let id = (change.public_key, change.generation.unwrap_or(0));
        if self.closing.iter().any(|closing| closing.life() == id) {
            // Its line is still occupied; a second one of the same life would be taken for it after a restart.
            return Err(Refused::Closing);
        }
        let parked = self.parked.remove(&id);
        let (slot, peer) = match parked {
            Some(Parked { slot, peer }) => (slot, peer),
            None => {
                let slot = self.take_free_slot().ok_or(Refused::Full)?;
                self.counters.occupy(slot, &id.0, id.1);
                (slot, None)
            }
        };
        let peer = match peer {
            Some(mut peer) => {
                // As good as new, but for the session, if the pre-shared key is still the same.
                peer.persistent_keepalive = 0;
                peer.tenant = None;
                if change.preshared_key.is_none() && peer.preshared_key.take().is_some() {
                    peer.tunnel = None;
                }
                peer
            }
            None => {
                let before = self.counters.peer(slot);
                let last_handshake_ms = before.map_or(0, |peer| peer.counts.last_handshake_ms);
                if now.unix_ms.saturating_sub(last_handshake_ms) < CALLBACK_AGE_MS {
                    self.callbacks.push_back(slot);
                }
                Box::new(Peer {
                    public_key: id.0,
                    generation: id.1,
                    preshared_key: None,
                    tenant: None,
                    allowed_ips: Vec::new(),
                    persistent_keepalive: 0,
                    endpoint: before.and_then(|peer| peer.endpoint),
                    via: None,
                    tunnel: None,
                    queue: VecDeque::new(),
                    live_at: None,
                    last_traffic_ms: None,
                    last_attempt_ms: now.mono_ms,
                    last_init_ms: None,
                    last_ephemeral: [0; 32],
                })
            }
        };
        let has_tunnel = peer.tunnel.is_some();
        self.peers[usize::from(slot)] = Some(peer);
        self.directory.get_mut().by_key.insert(id.0, slot);
        if has_tunnel {
            self.make_live(slot);
        }
        Ok(slot)
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
        if let Some(psk) = change.preshared_key {
            self.set_preshared_key(now, slot, psk, out);
        }
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        if let Some(endpoint) = change.endpoint
            && peer.endpoint != Some(endpoint)
        {
            peer.endpoint = Some(endpoint);
            peer.via = None;
            self.counters.set_endpoint(slot, endpoint);
        }
        if change.tenant.is_some() {
            peer.tenant = change.tenant;
        }
        if change.replace_allowed_ips {
            for net in std::mem::take(&mut peer.allowed_ips) {
                self.directory.get_mut().routes.remove(net, slot);
            }
        }
        for net in change.removed_ips {
            let net = net.trunc();
            peer.allowed_ips.retain(|have| *have != net);
            self.directory.get_mut().routes.remove(net, slot);
        }
        for net in change.allowed_ips {
            self.add_allowed_ip(slot, net.trunc());
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
        if peer.preshared_key == psk {
            return;
        }
        peer.preshared_key = psk;
        if peer.tunnel.is_some() {
            // The session was made with the old key: end it, and offer a new one if we know where the peer is.
            self.drop_tunnel(slot);
            self.initiate(now, slot, out);
        }
    }

    fn add_allowed_ip(&mut self, slot: u16, net: IpNet) {
        match self.directory.get_mut().routes.insert(net, slot) {
            Some(former) if self.shard.owns(former) => self.forget_prefix(former, net),
            Some(former) => self.notices.push(Notice::Forget { slot: former, net }),
            None => {}
        }
        if let Some(peer) = self.peers[usize::from(slot)].as_deref_mut()
            && !peer.allowed_ips.contains(&net)
        {
            peer.allowed_ips.push(net);
        }
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
        let of_key = self.parked.extract_if(|id, _| id.0 == *public_key);
        for (_, parked) in of_key.collect::<Vec<_>>() {
            self.close(parked.slot);
        }
    }

    /// Takes the peer out of every table; its slot and counters stay.
    fn detach(&mut self, slot: u16) -> Option<Box<Peer>> {
        self.make_cold(slot);
        let mut peer = self.peers[usize::from(slot)].take()?;
        self.queued -= peer.queue.len();
        for packet in peer.queue.drain(..) {
            self.drops.one(Drop::TxNoSession, packet.len());
        }
        for net in &peer.allowed_ips {
            self.directory.get_mut().routes.remove(*net, slot);
        }
        if self.directory.get().by_key.get(&peer.public_key) == Some(&slot) {
            self.directory.get_mut().by_key.remove(&peer.public_key);
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
            self.closing.push(Closing { slot, peer });
        }
    }
}
