//! What every worker must read: who has a key, who owns an address, where peers live. Written in short turns.
//!
//! A worker holds the directory for one pass at a time ([`Hold::enter`], [`Hold::leave`]), so packets take no lock. A
//! change takes it away from everybody until it is done ([`Hold::get_mut`]). A worker that is alone always has it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::{HashMap, HashMapExt};
use ipnet::IpNet;

use super::Life;
use crate::allowed::AllowedIps;
use crate::counters::{Counts, Timestamps};
use crate::journal::MAX_ENDED;
use crate::policy::TenantId;

/// How often a change looks whether the others have finished their pass: a fraction of a pass.
const LOOK_AGAIN: Duration = Duration::from_micros(20);
/// Ended lives whose counters are remembered: 1.6 MB. As many as outlive the process.
const MAX_FINALS: usize = MAX_ENDED;

#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(super) by_key: HashMap<[u8; 32], u16>,
    pub(super) routes: AllowedIps,
    pub(super) overlay: Vec<IpNet>,
    /// Whose the peers are, kept where one worker has to know it of another's.
    pub(super) tenants: HashMap<u16, TenantId>,
    pub(super) finals: Finals,
    /// Of peers that have not been added again since the host booted.
    pub(super) former: Timestamps,
}

/// Final counters of lives that ended in this epoch: one that begins again goes on from them, as everybody who keeps
/// its greatest values expects. The oldest are forgotten when there are too many.
#[derive(Debug, Default)]
pub(super) struct Finals {
    counts: HashMap<Life, Counts>,
    order: VecDeque<Life>,
}

impl Finals {
    fn with_room() -> Self {
        Self { counts: HashMap::with_capacity(MAX_FINALS + 1), order: VecDeque::with_capacity(MAX_FINALS + 1) }
    }

    pub(super) fn keep(&mut self, life: Life, counts: Counts) {
        if self.counts.insert(life, counts).is_none() {
            self.order.push_back(life);
        }
        if self.order.len() > MAX_FINALS
            && let Some(oldest) = self.order.pop_front()
        {
            self.counts.remove(&oldest);
        }
    }

    pub(super) fn get(&self, life: &Life) -> Option<Counts> {
        self.counts.get(life).copied()
    }
}

impl Directory {
    fn with_room(peers: usize) -> Self {
        Self {
            by_key: HashMap::with_capacity(peers),
            routes: AllowedIps::with_room(peers),
            overlay: Vec::new(),
            tenants: HashMap::default(),
            finals: Finals::with_room(),
            former: Timestamps::new(),
        }
    }
}

/// The directory between turns; empty while somebody changes it.
#[derive(Debug)]
struct Shared {
    place: Mutex<Option<Arc<Directory>>>,
    returned: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Directory>>> {
        // Nothing can panic while it is locked.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn there(&self) -> MutexGuard<'_, Option<Arc<Directory>>> {
        let there = self.returned.wait_while(self.lock(), |place| place.is_none());
        there.unwrap_or_else(PoisonError::into_inner)
    }

    fn put_back(&self, directory: Arc<Directory>) {
        *self.lock() = Some(directory);
        self.returned.notify_all();
    }
}

/// How one engine has the directory.
#[derive(Debug)]
enum Turn {
    None,
    Reading(Arc<Directory>),
    Changing(Arc<Directory>),
}

/// One engine's access.
#[derive(Debug)]
pub(crate) struct Hold {
    shared: Option<Arc<Shared>>,
    turn: Turn,
}

impl Hold {
    /// For `count` engines; one alone shares with nobody.
    pub(crate) fn new(count: usize, peers: usize, former: Timestamps) -> Vec<Self> {
        let directory = Arc::new(Directory { former, ..Directory::with_room(peers) });
        if count <= 1 {
            return vec![Self { shared: None, turn: Turn::Changing(directory) }];
        }
        let shared = Arc::new(Shared { place: Mutex::new(Some(directory)), returned: Condvar::new() });
        (0..count).map(|_| Self { shared: Some(Arc::clone(&shared)), turn: Turn::None }).collect()
    }

    /// Before a pass.
    pub(crate) fn enter(&mut self) {
        if let (Some(shared), Turn::None) = (&self.shared, &self.turn) {
            let directory = shared.there().as_ref().map(Arc::clone);
            self.turn = Turn::Reading(directory.expect("waited for"));
        }
    }

    /// After a pass, and between two portions of changes: others may change it now.
    pub(crate) fn leave(&mut self) {
        let Some(shared) = &self.shared else {
            return;
        };
        if let Turn::Changing(directory) = std::mem::replace(&mut self.turn, Turn::None) {
            shared.put_back(directory);
        }
    }

    pub(super) fn get(&self) -> &Directory {
        match &self.turn {
            Turn::Reading(directory) | Turn::Changing(directory) => directory,
            Turn::None => unreachable!("the shell enters before it calls the engine"),
        }
    }

    /// Takes the directory away from the other workers until [`Self::leave`].
    pub(super) fn get_mut(&mut self) -> &mut Directory {
        if let (Some(shared), Turn::None | Turn::Reading(_)) = (&self.shared, &self.turn) {
            self.turn = Turn::None;
            let mut directory = shared.there().take().expect("waited for");
            while Arc::get_mut(&mut directory).is_none() {
                std::thread::sleep(LOOK_AGAIN);
            }
            self.turn = Turn::Changing(directory);
        }
        match &mut self.turn {
            Turn::Changing(directory) => Arc::get_mut(directory).expect("nobody else has it"),
            Turn::None | Turn::Reading(_) => unreachable!("taken above, or never given away"),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_by_one_are_whole_to_the_others() {
        const ROUNDS: u16 = 500;
        let mut holds = Hold::new(3, 8, Timestamps::new());
        let mut reader = holds.remove(0);
        std::thread::scope(|scope| {
            for (owner, mut writer) in (0_u8..).zip(holds) {
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        writer.enter();
                        writer.get_mut().by_key.insert([owner; 32], round);
                        writer.get_mut().by_key.insert([owner | 0x80; 32], round);
                        writer.leave();
                    }
                });
            }
            let mut seen = [0; 2];
            while seen != [ROUNDS; 2] {
                reader.enter();
                for owner in [0_u8, 1] {
                    let half = |key: u8| reader.get().by_key.get(&[key; 32]).copied().unwrap_or(0);
                    assert_eq!(half(owner), half(owner | 0x80), "both or none");
                    assert!(half(owner) >= seen[usize::from(owner)], "never back");
                    seen[usize::from(owner)] = half(owner);
                }
                reader.leave();
            }
        });
    }

    #[test]
    fn of_ended_lives_the_oldest_are_forgotten() {
        let life = |generation| ([1; 32], generation);
        let counts = |rx_inner| Counts { rx_inner, ..Counts::default() };
        let mut finals = Finals::with_room();
        for generation in 0..=MAX_FINALS as u64 {
            finals.keep(life(generation), counts(generation));
        }
        finals.keep(life(1), counts(7));
        assert_eq!((finals.get(&life(0)), finals.get(&life(1))), (None, Some(counts(7))));
        assert_eq!((finals.counts.len(), finals.order.len()), (MAX_FINALS, MAX_FINALS));
    }

    #[test]
    fn one_alone_needs_no_turns() {
        let mut alone = Hold::new(1, 8, Timestamps::new()).remove(0);
        alone.leave();
        alone.get_mut().by_key.insert([1; 32], 2);
        alone.leave();
        assert_eq!(alone.get().by_key.len(), 1);
    }
}
