//! `replace_peers` without a pause: peers are marked when the request names them, and the rest is swept up in slices.
//!
//! Until it is swept a peer that is not named goes on as before. Nothing is copied and nobody is taken out of the
//! tables in between, so a replacement that changes nothing costs as much as looking every peer up.

/// Which replacement named the peer in a slot last.
pub(super) struct Replace {
    named_in: Vec<u32>,
    number: u32,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    None,
    /// The peers of the request arrive.
    Naming,
    /// What lies before this slot has been swept.
    Sweeping(u16),
}

impl Replace {
    pub(super) fn new(capacity: usize) -> Self {
        Self { named_in: vec![0; capacity], number: 0, stage: Stage::None }
    }

    pub(super) fn begin(&mut self) {
        self.number = self.number.wrapping_add(1);
        self.stage = Stage::Naming;
    }

    pub(super) fn abandon(&mut self) {
        if self.stage == Stage::Naming {
            self.stage = Stage::None;
        }
    }

    /// From now on [`Self::next_unnamed`] finds those that were not named. Without [`Self::begin`] there are none.
    pub(super) fn end(&mut self) {
        if self.stage == Stage::Naming {
            self.stage = Stage::Sweeping(0);
        }
    }

    pub(super) fn name(&mut self, slot: u16) {
        self.named_in[usize::from(slot)] = self.number;
    }

    /// Whether a replacement is under way that has not named the peer in this slot.
    pub(super) fn is_unnamed(&self, slot: u16) -> bool {
        self.stage != Stage::None && self.named_in[usize::from(slot)] != self.number
    }

    /// The next slot below `unused` that was not named, while sweeping.
    pub(super) fn next_unnamed(&mut self, unused: u32) -> Option<u16> {
        let Stage::Sweeping(from) = self.stage else {
            return None;
        };
        let found = (from..=u16::MAX).take_while(|slot| u32::from(*slot) < unused).find(|slot| self.is_unnamed(*slot));
        self.stage = match found.and_then(|slot| slot.checked_add(1)) {
            Some(next) => Stage::Sweeping(next),
            None => Stage::None,
        };
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn swept(replace: &mut Replace, unused: u32) -> Vec<u16> {
        std::iter::from_fn(|| replace.next_unnamed(unused)).collect()
    }

    #[test]
    fn only_what_was_not_named_is_swept_and_only_once() {
        let mut replace = Replace::new(65_535);
        replace.name(1);
        assert!(!replace.is_unnamed(1), "without a replacement nobody has to be named");
        replace.end();
        assert_eq!(swept(&mut replace, 65_535), [0; 0]);
        replace.begin();
        replace.abandon();
        assert!(!replace.is_unnamed(1));
        replace.begin();
        assert!(replace.is_unnamed(1));
        (0..65_535).filter(|slot| ![3, 65_534].contains(slot)).for_each(|slot| replace.name(slot));
        assert_eq!(replace.next_unnamed(65_535), None, "not before the end");
        replace.end();
        assert_eq!(replace.next_unnamed(65_535), Some(3));
        assert!(replace.is_unnamed(65_534) && !replace.is_unnamed(1));
        assert_eq!(swept(&mut replace, 65_535), [65_534]);
        assert!(!replace.is_unnamed(65_534), "it is over");
    }

    #[test]
    fn slots_that_were_never_used_are_not_looked_at() {
        let mut replace = Replace::new(8);
        replace.begin();
        replace.end();
        assert_eq!(swept(&mut replace, 2), [0, 1]);
    }
}
