//! Which counters of a session were seen: a window of RFC 6479.

/// Counters behind the greatest that are still told apart, as many as the kernel's.
const BITS: u64 = 8192;
const WORDS: usize = 128;

/// The last [`BITS`] counters, less one word that is being filled.
pub(super) struct Window {
    greatest: u64,
    is_empty: bool,
    words: [u64; WORDS],
}

impl Window {
    pub(super) const fn new() -> Self {
        Self { greatest: 0, is_empty: true, words: [0; WORDS] }
    }

    /// Whether a message with this counter can be new.
    pub(super) fn may_accept(&self, counter: u64) -> bool {
        if self.is_empty || counter > self.greatest {
            return true;
        }
        self.greatest - counter <= BITS - 64 && self.words[word(counter)] & bit(counter) == 0
    }

    /// Notes an authentic message. `false`: it was seen before, or it is too old to tell.
    pub(super) fn accept(&mut self, counter: u64) -> bool {
        if !self.may_accept(counter) {
            return false;
        }
        if counter > self.greatest {
            let (from, to) = (self.greatest / 64, counter / 64);
            let stale = (to - from).min(WORDS as u64);
            for block in to - stale + 1..=to {
                self.words[word(block * 64)] = 0;
            }
            self.greatest = counter;
        }
        self.is_empty = false;
        self.words[word(counter)] |= bit(counter);
        true
    }
}

fn word(counter: u64) -> usize {
    usize::try_from(counter / 64 % WORDS as u64).expect("less than the number of words")
}

fn bit(counter: u64) -> u64 {
    1 << (counter % 64)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn at_both_ends_of_the_range() {
        let mut window = Window::new();
        assert!(window.accept(0) && !window.accept(0));
        assert!(window.accept(u64::MAX) && !window.accept(u64::MAX) && !window.accept(1));
        assert!(window.accept(u64::MAX - (BITS - 64)) && !window.accept(u64::MAX - BITS));
    }

    proptest! {
        #[test]
        fn as_a_set_that_forgets_what_is_old(
            steps in proptest::collection::vec(prop_oneof![0_u64..200, 0_u64..20_000, Just(64_u64), Just(8192_u64)], 1..400),
            back in proptest::collection::vec(0_u64..9_000, 400),
        ) {
            let (mut window, mut seen, mut at) = (Window::new(), HashSet::new(), 0_u64);
            let mut greatest = 0;
            for (step, back) in steps.iter().zip(back) {
                at += step;
                for counter in [at, at.saturating_sub(back)] {
                    let recent = counter > greatest || seen.is_empty() || greatest - counter <= BITS - 64;
                    let fresh = recent && !seen.contains(&counter);
                    prop_assert_eq!(window.may_accept(counter), fresh);
                    prop_assert_eq!(window.accept(counter), fresh);
                    if fresh {
                        seen.insert(counter);
                        greatest = greatest.max(counter);
                    }
                }
            }
        }
    }
}
