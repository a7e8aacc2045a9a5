//! Session indices: a bijection between (generation, slot) and the 24 bits of a session index that are not a count.
//!
//! `index = s * K + C (mod 2^24)` with `s = generation << 16 | slot`, K odd and K = 1, C = 0 (mod 256). It looks random
//! on the wire, costs one multiplication to undo, and keeps the low 8 bits of the slot readable for kernel steering.

const MASK: u32 = 0x00ff_ffff;

/// Where a peer lives. The generation changes whenever the slot is given to another peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slot: u16,
    pub(crate) generation: u8,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Scramble {
    k: u32,
    inverse: u32,
    c: u32,
}

impl Scramble {
    /// Draws K and C out of one random number.
    pub(crate) fn new(seed: u64) -> Self {
        let bytes = seed.to_le_bytes();
        let k = u32::from_le_bytes([1, bytes[0], bytes[1], 0]);
        let c = u32::from_le_bytes([0, bytes[2], bytes[3], 0]);
        // Newton's iteration doubles the number of correct low bits: 3 -> 6 -> 12 -> 24.
        let mut inverse = k;
        for _ in 0..3 {
            inverse = inverse.wrapping_mul(2_u32.wrapping_sub(k.wrapping_mul(inverse)));
        }
        Self { k, inverse, c }
    }

    pub(crate) fn index(self, place: Place) -> u32 {
        let s = u32::from(place.generation) << 16 | u32::from(place.slot);
        s.wrapping_mul(self.k).wrapping_add(self.c) & MASK
    }

    pub(crate) fn place(self, index: u32) -> Place {
        let s = index.wrapping_sub(self.c).wrapping_mul(self.inverse) & MASK;
        let [low, high, generation, _] = s.to_le_bytes();
        Place { slot: u16::from_le_bytes([low, high]), generation }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_place_has_one_index_and_every_index_one_place(seed: u64, slot: u16, generation: u8, index in 0..=MASK) {
            let scramble = Scramble::new(seed);
            let place = Place { slot, generation };
            let there = scramble.index(place);
            prop_assert!(there <= MASK);
            prop_assert_eq!(scramble.place(there), place);
            prop_assert_eq!(scramble.index(scramble.place(index)), index);
            prop_assert_eq!(there & 0xff, u32::from(slot & 0xff));
        }
    }
}
