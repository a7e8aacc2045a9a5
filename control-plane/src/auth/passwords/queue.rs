//! Whose turn it is: parties in turn, each one's jobs in their order, in a bounded number of places.
//!
//! Places are nobody's while there are enough. When they are not, whoever holds the most gives up its newest for one who holds
//! fewer, as long as that makes them more equal (McKenney, "Stochastic Fairness Queueing", 1990). So a party that waits for nothing
//! is turned away only when every place is the only one of another party.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// Jobs that wait. Each place is used by one job of one party.
#[derive(Debug)]
pub(super) struct Queue<P, J> {
    /// Of those that wait for something, so never more than `len`.
    parties: HashMap<P, VecDeque<(Ticket, J)>>,
    /// The same parties, the next one first.
    turns: VecDeque<P>,
    len: usize,
    issued: u64,
}

/// Names a job that waits. Later jobs have larger ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// What became of a job, and of another in its place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pushed<J> {
    Waits(Ticket),
    /// It waits in the place of the one that is given back.
    InPlaceOf(Ticket, J),
    Refused(J),
}

impl<P, J> Default for Queue<P, J> {
    fn default() -> Self {
        Self { parties: HashMap::new(), turns: VecDeque::new(), len: 0, issued: 0 }
    }
}

impl<P: Copy + Eq + Hash, J> Queue<P, J> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Lets `job` wait where at most `places` jobs may.
    pub(super) fn push(&mut self, party: P, job: J, places: usize) -> Pushed<J> {
        if self.len < places {
            return Pushed::Waits(self.append(party, job));
        }
        let own = self.parties.get(&party).map_or(0, VecDeque::len);
        match self.longest() {
            Some((longest, held)) if held > own + 1 => {
                let newest = self.take_newest(longest).expect("the party that holds the most holds something");
                Pushed::InPlaceOf(self.append(party, job), newest)
            }
            _ => Pushed::Refused(job),
        }
    }

    /// The oldest job of the party whose turn it is.
    pub(super) fn pop(&mut self) -> Option<J> {
        let party = self.turns.pop_front()?;
        let (_, job) = self.parties.get_mut(&party)?.pop_front()?;
        self.len -= 1;
        if self.forgotten_when_empty(party) {
            return Some(job);
        }
        self.turns.push_back(party);
        Some(job)
    }

    /// Gives a job back that nobody wants any more, and its place; `None` when it does not wait.
    pub(super) fn remove(&mut self, party: P, ticket: Ticket) -> Option<J> {
        let jobs = self.parties.get_mut(&party)?;
        let at = jobs.binary_search_by_key(&ticket, |(ticket, _)| *ticket).ok()?;
        let (_, job) = jobs.remove(at)?;
        self.len -= 1;
        self.leaves_when_empty(party);
        Some(job)
    }

    fn append(&mut self, party: P, job: J) -> Ticket {
        let ticket = Ticket(self.issued);
        self.issued += 1;
        self.len += 1;
        let jobs = self.parties.entry(party).or_default();
        if jobs.is_empty() {
            self.turns.push_back(party);
        }
        jobs.push_back((ticket, job));
        ticket
    }

    /// Who holds the most, and how many: of several, the one whose newest job is the newest.
    fn longest(&self) -> Option<(P, usize)> {
        let held =
            |(party, jobs): (&P, &VecDeque<(Ticket, J)>)| (jobs.len(), jobs.back().map(|(ticket, _)| *ticket), *party);
        self.parties
            .iter()
            .map(held)
            .max_by_key(|(held, newest, _)| (*held, *newest))
            .map(|(held, _, party)| (party, held))
    }

    fn take_newest(&mut self, party: P) -> Option<J> {
        let (_, job) = self.parties.get_mut(&party)?.pop_back()?;
        self.len -= 1;
        self.leaves_when_empty(party);
        Some(job)
    }

    fn leaves_when_empty(&mut self, party: P) {
        if self.forgotten_when_empty(party) {
            self.turns.retain(|waiting| *waiting != party);
        }
    }

    fn forgotten_when_empty(&mut self, party: P) -> bool {
        let empty = self.parties.get(&party).is_none_or(VecDeque::is_empty);
        if empty {
            self.parties.remove(&party);
        }
        empty
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drained(queue: &mut Queue<char, u32>) -> Vec<u32> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn parties_take_turns_and_keep_the_order_of_their_own_jobs() {
        let mut queue = Queue::default();
        for (party, job) in [('a', 1), ('a', 2), ('a', 3), ('b', 10), ('b', 11), ('c', 20)] {
            assert!(matches!(queue.push(party, job, 10), Pushed::Waits(_)));
        }
        assert_eq!(queue.pop(), Some(1));
        // who comes back waits behind the others
        queue.push('d', 30, 10);
        assert_eq!(drained(&mut queue), [10, 20, 2, 30, 11, 3]);
        assert_eq!(queue.len(), 0);
        assert!(queue.parties.is_empty() && queue.turns.is_empty());
    }

    #[test]
    fn a_full_queue_takes_the_newest_of_the_party_that_holds_the_most() {
        let mut queue = Queue::default();
        for job in 0..4 {
            queue.push('a', job, 4);
        }
        assert_eq!(queue.push('a', 4, 4), Pushed::Refused(4), "it holds the most itself");
        assert!(matches!(queue.push('b', 10, 4), Pushed::InPlaceOf(_, 3)));
        assert!(matches!(queue.push('b', 11, 4), Pushed::InPlaceOf(_, 2)));
        assert_eq!(queue.push('b', 12, 4), Pushed::Refused(12), "both hold as many");
        assert!(matches!(queue.push('c', 20, 4), Pushed::InPlaceOf(_, 11)), "of equals the newest");
        assert!(matches!(queue.push('d', 30, 4), Pushed::InPlaceOf(_, 1)));
        assert_eq!(queue.push('e', 40, 4), Pushed::Refused(40), "nobody holds more than one");
        assert_eq!(drained(&mut queue), [0, 10, 20, 30]);
    }

    #[test]
    fn a_place_that_is_given_back_is_free_at_once() {
        let mut queue = Queue::default();
        let Pushed::Waits(first) = queue.push('a', 1, 2) else { panic!("there is room") };
        queue.push('b', 2, 2);
        assert_eq!(queue.remove('b', first), None, "it is not theirs");
        assert_eq!(queue.remove('a', first), Some(1));
        assert_eq!(queue.remove('a', first), None);
        assert!(matches!(queue.push('b', 3, 2), Pushed::Waits(_)));
        assert_eq!(drained(&mut queue), [2, 3]);
        assert_eq!(queue.push('a', 4, 0), Pushed::Refused(4), "there may be no place at all");
    }

    /// The same, of lists that are searched from end to end.
    #[derive(Default)]
    struct Naive {
        waiting: Vec<(u8, u32)>,
        turns: Vec<u8>,
    }

    impl Naive {
        fn held(&self, party: u8) -> usize {
            self.waiting.iter().filter(|(of, _)| *of == party).count()
        }

        /// What is refused or thrown out.
        fn push(&mut self, party: u8, job: u32, places: usize) -> Option<u32> {
            let mut out = None;
            if self.waiting.len() >= places {
                let most = self.turns.iter().map(|party| self.held(*party)).max().unwrap_or(0);
                if most <= self.held(party) + 1 {
                    return Some(job);
                }
                let at = self.waiting.iter().rposition(|(of, _)| self.held(*of) == most).unwrap();
                out = Some(self.waiting.remove(at).1);
            }
            self.waiting.push((party, job));
            self.tidy(Some(party));
            out
        }

        fn pop(&mut self) -> Option<u32> {
            let party = *self.turns.first()?;
            let at = self.waiting.iter().position(|(of, _)| *of == party).unwrap();
            self.turns.remove(0);
            let (_, job) = self.waiting.remove(at);
            self.tidy((self.held(party) > 0).then_some(party));
            Some(job)
        }

        fn remove(&mut self, job: u32) -> bool {
            let before = self.waiting.len();
            self.waiting.retain(|(_, waiting)| *waiting != job);
            self.tidy(None);
            self.waiting.len() < before
        }

        fn tidy(&mut self, comes: Option<u8>) {
            let waiting = &self.waiting;
            self.turns.retain(|party| waiting.iter().any(|(of, _)| of == party));
            self.turns.extend(comes.filter(|party| !self.turns.contains(party)));
        }
    }

    proptest! {
        #[test]
        fn it_does_what_lists_would_and_stays_within_its_places(
            places in 0_usize..7,
            steps in prop::collection::vec((0_u8..8, 0_u8..4, any::<prop::sample::Index>()), 0..120),
        ) {
            let (mut queue, mut naive) = (Queue::default(), Naive::default());
            let mut tickets: Vec<(u8, u32, Ticket)> = Vec::new();
            for (job, (what, party, which)) in (0_u32..).zip(steps) {
                match what {
                    0..=4 => {
                        let out = match queue.push(party, job, places) {
                            Pushed::Waits(ticket) => { tickets.push((party, job, ticket)); None }
                            Pushed::InPlaceOf(ticket, out) => { tickets.push((party, job, ticket)); Some(out) }
                            Pushed::Refused(job) => Some(job),
                        };
                        prop_assert_eq!(out, naive.push(party, job, places));
                    }
                    5 | 6 => prop_assert_eq!(queue.pop(), naive.pop()),
                    _ if tickets.is_empty() => {}
                    _ => {
                        let (party, job, ticket) = tickets[which.index(tickets.len())];
                        prop_assert_eq!(queue.remove(party, ticket), naive.remove(job).then_some(job));
                    }
                }
                prop_assert_eq!(queue.len(), naive.waiting.len());
                prop_assert!(queue.len() <= places);
                prop_assert_eq!(queue.turns.iter().copied().collect::<Vec<_>>(), naive.turns.clone());
                prop_assert_eq!(queue.parties.len(), queue.turns.len());
            }
        }
    }
}
