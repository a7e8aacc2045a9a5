//! What is worked out before it is needed: the secrets shared with new peers, in moments without anything else to do.
//!
//! The first handshake of a peer takes four X25519, one of them of nothing but static keys. The kernel does that one when
//! a peer is added, and so makes a change of many peers slow; here the change is answered first. Of very many peers at
//! once the last are left to their first handshake: few of them are about to begin one.

use std::collections::VecDeque;

use super::Engine;

/// Peers to be worked off: a fifth of a second in all, and 0.4 MB of secrets.
const MAX_AHEAD: usize = 8192;
/// Secrets at a time: some 0.4 ms, for which whatever arrives meanwhile has to wait.
const AT_A_TIME: usize = 16;

/// Slots whose secret may be missing.
#[derive(Debug, Default)]
pub(super) struct Ahead(VecDeque<u16>);

impl Ahead {
    pub(super) fn add(&mut self, slot: u16) {
        if self.0.len() < MAX_AHEAD {
            self.0.push_back(slot);
        }
    }
}

impl Engine {
    /// Whether [`Self::work_ahead`] has anything to do.
    #[must_use]
    pub fn has_work_ahead(&self) -> bool {
        self.identity.is_some() && !self.ahead.0.is_empty()
    }

    /// Works out a few secrets. For a moment in which nothing waits.
    pub fn work_ahead(&mut self) {
        let Some(identity) = &self.identity else {
            return;
        };
        let next = self.ahead.0.drain(..self.ahead.0.len().min(AT_A_TIME));
        let wanting = |slot: u16| {
            let peer = self.peers[usize::from(slot)].as_deref()?;
            peer.static_shared.is_none().then_some((slot, peer.public_key))
        };
        let (slots, public_keys): (Vec<_>, Vec<_>) = next.filter_map(wanting).unzip();
        for (slot, shared) in slots.into_iter().zip(&identity.shared_with_all(&public_keys)) {
            if let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() {
                peer.static_shared = shared.clone().map(Box::new);
            }
        }
    }

    /// Our key is another one: all that was shared is forgotten.
    pub(super) fn share_anew(&mut self) {
        self.ahead = Ahead::default();
        for (slot, peer) in (0..=u16::MAX).zip(&mut self.peers) {
            if let Some(peer) = peer {
                peer.static_shared = None;
                self.ahead.add(slot);
            }
        }
    }
}
