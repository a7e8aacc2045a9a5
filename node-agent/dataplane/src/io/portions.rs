//! Changes of many peers, made a portion in each pass of the worker: packets wait for one of them, and nobody has to ask for each.

use std::iter::Peekable;
use std::vec;

use crate::change::PeerChange;

/// Peers of a portion: less than a millisecond of the worker's attention.
const PEERS: usize = 256;
/// Prefixes after which no other peer belongs to the portion; of one peer there are no more at a time.
const PREFIXES: usize = 2 * PEERS;

type Parts = smallvec::SmallVec<[PeerChange; 1]>;
type InParts = std::iter::FlatMap<vec::IntoIter<PeerChange>, Parts, fn(PeerChange) -> Parts>;

/// What is left of them.
pub(super) struct Portions(Peekable<InParts>);

impl Portions {
    pub(super) fn of(changes: Vec<PeerChange>) -> Self {
        let parts: fn(PeerChange) -> Parts = |change| change.parts(PREFIXES);
        Self(changes.into_iter().flat_map(parts).peekable())
    }

    pub(super) fn is_empty(&mut self) -> bool {
        self.0.peek().is_none()
    }

    /// What is not taken of it begins the next one.
    pub(super) fn next(&mut self) -> impl Iterator<Item = PeerChange> {
        let (mut peers, mut prefixes) = (0, 0);
        std::iter::from_fn(move || {
            if peers == PEERS || prefixes >= PREFIXES {
                return None;
            }
            let change = self.0.next()?;
            peers += 1;
            prefixes += change.allowed_ips.len() + change.removed_ips.len();
            Some(change)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portions_are_bounded_in_peers_and_in_prefixes() {
        let sizes = |prefixes: &[usize]| {
            let peer = |len: &usize| PeerChange { removed_ips: vec![Default::default(); *len], ..Default::default() };
            let mut portions = Portions::of(prefixes.iter().map(peer).collect());
            let mut sizes = Vec::new();
            while !portions.is_empty() {
                sizes.push(portions.next().count());
            }
            sizes
        };
        assert_eq!(sizes(&[]), []);
        assert_eq!(sizes(&[1; PEERS + 1]), [PEERS, 1]);
        assert_eq!(sizes(&[PREFIXES - 1, 1, 5]), [2, 1]);
        assert_eq!(sizes(&[2 * PREFIXES, 1]), [1, 1, 1], "a peer in parts");
    }
}
