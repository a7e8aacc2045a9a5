//! Very many prefixes are taken from a peer a few at a time, with packets in between, before the change is made that wants
//! them gone.

use ipnet::IpNet;

use super::Engine;
use crate::change::PeerChange;

/// Prefixes that may be taken away between two packets: about a millisecond.
pub(super) const AT_ONCE: usize = 4096;

impl Engine {
    /// Whether the changes take away more prefixes than packets can wait for.
    pub(crate) fn are_heavy(&self, changes: &[PeerChange]) -> bool {
        let most = self.most_prefixes.saturating_mul(changes.len());
        let prefixes = |change| self.emptied_by(change).map_or(0, |slot| self.prefixes_of(slot));
        most > AT_ONCE && changes.iter().map(prefixes).sum::<usize>() > AT_ONCE
    }

    /// Takes away some of the prefixes that the change would.
    pub(crate) fn trim(&mut self, change: &PeerChange) {
        if let Some(slot) = self.emptied_by(change) {
            self.take_prefixes(slot, AT_ONCE);
        }
    }

    /// Our peer that the change takes all prefixes from, unless it will be refused.
    fn emptied_by(&self, change: &PeerChange) -> Option<u16> {
        let slot = self.directory.get().by_key.get(&change.public_key).copied();
        let slot = slot.filter(|slot| self.shard.owns(*slot))?;
        if change.remove {
            return Some(slot);
        }
        let is_unnamed = self.replace.is_unnamed(slot);
        let replaces = (change.replace_allowed_ips || is_unnamed) && !(change.update_only && is_unnamed);
        let is_other =
            || self.peers[usize::from(slot)].as_ref().is_some_and(|peer| peer.allowed_ips[..] != change.allowed_ips);
        let known = (!is_unnamed).then_some(slot);
        (replaces && is_other() && self.check_tenant(known, change).is_ok()).then_some(slot)
    }

    pub(super) fn prefixes_of(&self, slot: u16) -> usize {
        self.peers[usize::from(slot)].as_ref().map_or(0, |peer| peer.allowed_ips.len())
    }

    /// Says how many they were.
    pub(super) fn take_prefixes(&mut self, slot: u16, most: usize) -> usize {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return 0;
        };
        let kept = peer.allowed_ips.len().saturating_sub(most);
        let gone: Vec<IpNet> = peer.allowed_ips.drain(kept..).collect();
        for net in &gone {
            self.directory.get_mut().routes.remove(*net, slot);
        }
        gone.len()
    }
}
