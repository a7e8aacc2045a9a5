//! Very many prefixes are taken from a peer a few at a time, with packets in between, before the change is made that wants
//! them gone.

use std::collections::HashSet;

use ipnet::IpNet;

use super::Engine;
use crate::change::PeerChange;

/// Prefixes that may be taken away between two packets: about a millisecond.
pub(super) const AT_ONCE: usize = 4096;

impl Engine {
    /// How many of the changes, from the first on, take away no more prefixes than packets can wait for.
    pub(crate) fn light(&self, changes: &[PeerChange]) -> usize {
        if self.most_prefixes.saturating_mul(changes.len()) <= AT_ONCE {
            return changes.len();
        }
        let mut prefixes = 0;
        let is_light = |change: &&PeerChange| {
            prefixes += self.emptied_by(change).map_or(0, |slot| self.prefixes_of(slot));
            prefixes <= AT_ONCE
        };
        changes.iter().take_while(is_light).count()
    }

    /// Takes away some of the prefixes that the change would, and none that it names.
    pub(crate) fn trim(&mut self, change: &PeerChange) {
        if let Some(slot) = self.emptied_by(change) {
            // Fewer than are taken at a time, so that there is an end to it.
            let named =
                if change.remove || change.allowed_ips.len() >= AT_ONCE { &[] } else { &change.allowed_ips[..] };
            self.take_prefixes(slot, AT_ONCE, named);
        }
    }

    /// Our peer that the change takes all prefixes from, unless it will be refused.
    fn emptied_by(&self, change: &PeerChange) -> Option<u16> {
        let slot = self.directory.get().by_key.get(&change.public_key).copied();
        let slot = slot.filter(|slot| self.shard.owns(*slot))?;
        if change.remove {
            return Some(slot);
        }
        let known = (!self.replace.is_unnamed(slot)).then_some(slot);
        if (known.is_none() && change.update_only) || self.check_tenant(known, change).is_err() {
            return None;
        }
        if !self.is_life(slot, known.is_some(), change.generation) {
            return self.has_slot_for(change).then_some(slot);
        }
        let is_other =
            || self.peers[usize::from(slot)].as_ref().is_some_and(|peer| peer.allowed_ips[..] != change.allowed_ips);
        ((change.replace_allowed_ips || known.is_none()) && is_other()).then_some(slot)
    }

    pub(super) fn prefixes_of(&self, slot: u16) -> usize {
        self.peers[usize::from(slot)].as_ref().map_or(0, |peer| peer.allowed_ips.len())
    }

    /// Looks at the last `most` of them and leaves those that are `kept`. Says how many went.
    pub(super) fn take_prefixes(&mut self, slot: u16, most: usize, kept: &[IpNet]) -> usize {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return 0;
        };
        let kept: HashSet<IpNet> = kept.iter().map(IpNet::trunc).collect();
        let from = peer.allowed_ips.len().saturating_sub(most);
        let (stay, gone): (Vec<IpNet>, Vec<IpNet>) = peer.allowed_ips.drain(from..).partition(|net| kept.contains(net));
        peer.allowed_ips.extend(stay);
        for net in &gone {
            self.directory.get_mut().routes.remove(*net, slot);
        }
        gone.len()
    }
}
