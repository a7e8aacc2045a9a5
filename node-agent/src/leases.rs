//! Leases of the tenants' monthly limits: what this server has been granted, what it asks for, what it gives back.
//!
//! Pure. A lease is a number that the counters of one life may reach, so nothing is granted twice by telling it twice. The
//! number known here is never below what the engine lets pass: when a lease is lowered, the engine is told at once and the
//! control plane only when nothing can be under way any more.

use std::collections::{BTreeMap, HashMap, HashSet};

use cvault_dataplane::counters::Epoch;
use cvault_node_protocol::{MAX_LEASES, v1};

use crate::desired::Life;

/// What an idle peer of a tenant near its limit keeps, so that its first packets pass and show that it is awake.
const RESIDUE_BYTES: u64 = 16 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lease {
    device_id: [u8; 16],
    /// What the control plane counts on.
    until: u64,
    /// What the engine is told; less than `until` while the rest is on its way back.
    enforced: u64,
    /// Of the grant; 0: not known (any more).
    sequence: u64,
    /// What was free at the last grant.
    granted: u64,
    scarce: bool,
    /// The sum at the last slow look.
    seen: u64,
}

/// A peer that needs a lease, with the sum of its counters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metered {
    pub(crate) life: Life,
    pub(crate) device_id: [u8; 16],
    pub(crate) total: u64,
}

/// By what the list of everything is in order: device and generation.
pub(crate) type Place = ([u8; 16], u64);

/// One stretch of the list of everything: each life behind one place, up to and with another.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stretch {
    pub(crate) states: Vec<v1::LeaseState>,
    after: Option<Place>,
    /// None: up to the last one.
    pub(crate) through: Option<Place>,
}

impl Stretch {
    /// At most `most` of the states behind `after`.
    fn cut(states: BTreeMap<Place, v1::LeaseState>, after: Option<Place>, most: usize) -> Self {
        let mut behind = states.into_iter().filter(|(place, _)| after.is_none_or(|after| *place > after)).peekable();
        let mut stretch = Self { states: Vec::new(), after, through: None };
        while let Some((place, state)) = behind.next() {
            stretch.states.push(state);
            if stretch.states.len() >= most && behind.peek().is_some() {
                stretch.through = Some(place);
                break;
            }
        }
        stretch
    }

    /// What the control plane is told. A list that one message holds needs no ends, which an older one would not know.
    pub(crate) fn message(&self, epoch: Epoch) -> v1::Leases {
        let end = |(device_id, generation): Place| v1::LeaseLife { device_id: device_id.to_vec().into(), generation };
        let complete = self.after.is_none() && self.through.is_none();
        let ends = v1::LeaseStretch { after: self.after.map(end), through: self.through.map(end) };
        let stretch = (!complete).then_some(ends);
        v1::Leases { counter_epoch: epoch.to_vec().into(), peers: self.states.clone(), complete, stretch }
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Leases {
    epoch: Option<Epoch>,
    leases: HashMap<Life, Lease>,
    /// Got nothing when they asked: not again before the next slow look.
    waiting: HashSet<Life>,
}

impl Leases {
    /// How far the engine may let a life go in an epoch of the counters.
    pub(crate) fn enforced(&self, epoch: Option<Epoch>, life: &Life) -> u64 {
        let known = self.leases.get(life).filter(|_| epoch.is_some() && epoch == self.epoch);
        known.map_or(0, |lease| lease.enforced)
    }

    pub(crate) fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// The counters of now. Another epoch has begun at 0: what was granted before is of no use. True if so.
    pub(crate) fn enter(&mut self, epoch: Epoch) -> bool {
        if self.epoch == Some(epoch) {
            return false;
        }
        self.epoch = Some(epoch);
        self.leases.clear();
        self.waiting.clear();
        true
    }

    /// What an engine enforces that was running already.
    pub(crate) fn adopt(&mut self, life: Life, device_id: [u8; 16], until: u64) {
        let lease = Lease { device_id, until, enforced: until, sequence: 0, granted: 0, scarce: false, seen: 0 };
        self.leases.entry(life).or_insert(lease);
    }

    /// What to ask for at once: of peers that have used half of what they were granted, or have nothing.
    pub(crate) fn urgent(&self, metered: &[Metered]) -> Vec<v1::LeaseState> {
        let wanting = metered.iter().filter(|peer| !self.waiting.contains(&peer.life) && self.wants(peer));
        wanting.take(MAX_LEASES).map(|peer| self.state(peer, true)).collect()
    }

    /// Everything behind `after`, now and then, as far as `most` go; also of lives that are gone, while they are `unsettled`.
    pub(crate) fn inventory(
        &mut self,
        metered: &[Metered],
        unsettled: &HashMap<Life, [u8; 16]>,
        after: Option<Place>,
        most: usize,
    ) -> Stretch {
        let live: HashMap<Life, &Metered> = metered.iter().map(|peer| (peer.life, peer)).collect();
        self.leases.retain(|life, _| live.contains_key(life) || unsettled.contains_key(life));
        let living = metered.iter().map(|peer| {
            let place = (peer.device_id, peer.life.generation);
            (place, self.state(peer, self.wants(peer)))
        });
        let gone = unsettled.iter().map(|(life, device_id)| {
            let state = v1::LeaseState {
                device_id: device_id.to_vec().into(),
                generation: life.generation,
                until: u64::MAX,
                ..v1::LeaseState::default()
            };
            ((*device_id, life.generation), state)
        });
        Stretch::cut(living.chain(gone).collect(), after, most)
    }

    /// A slow look, so long after the one before that nothing is under way any more. Lowers the leases of peers that are idle
    /// while their tenant has little left; what was lowered before is settled. Answers what the engine must be told.
    pub(crate) fn settle(&mut self, metered: &[Metered]) -> Vec<Life> {
        self.waiting.clear();
        let mut lowered = Vec::new();
        for peer in metered {
            let Some(lease) = self.leases.get_mut(&peer.life) else { continue };
            if lease.enforced < lease.until {
                lease.until = lease.enforced.max(peer.total);
                lease.enforced = lease.until;
            }
            let idle = lease.seen == peer.total;
            lease.seen = peer.total;
            let least = peer.total.saturating_add(RESIDUE_BYTES);
            if idle && lease.scarce && lease.sequence != 0 && least < lease.until {
                lease.enforced = least;
                lease.granted = RESIDUE_BYTES;
                lowered.push(peer.life);
            }
        }
        lowered
    }

    /// Takes the answer to what was asked of `epoch`. Answers what the engine must be told.
    pub(crate) fn take(
        &mut self,
        epoch: Epoch,
        asked: &[v1::LeaseState],
        grants: &[v1::LeaseGrant],
        life_of: impl Fn(&[u8; 16], u64) -> Option<Life>,
    ) -> Vec<Life> {
        if self.epoch != Some(epoch) {
            return Vec::new();
        }
        let life = |device: &[u8], generation| {
            let device: [u8; 16] = device.try_into().ok()?;
            Some((life_of(&device, generation)?, device))
        };
        let totals: HashMap<Life, &v1::LeaseState> =
            asked.iter().filter_map(|state| Some((life(&state.device_id, state.generation)?.0, state))).collect();
        let mut told = Vec::new();
        for grant in grants {
            let Some((life, device_id)) = life(&grant.device_id, grant.generation) else { continue };
            let Some(state) = totals.get(&life) else { continue };
            let known = self.leases.get(&life);
            if known.is_some_and(|lease| lease.sequence == grant.sequence) {
                if let Some(lease) = self.leases.get_mut(&life) {
                    lease.scarce = grant.scarce;
                }
                continue;
            }
            let granted = grant.until.saturating_sub(state.total);
            let lease = Lease {
                device_id,
                until: grant.until,
                enforced: grant.until,
                sequence: grant.sequence,
                granted,
                scarce: grant.scarce,
                seen: known.map_or(state.total, |lease| lease.seen),
            };
            if known.map(|lease| lease.enforced) != Some(lease.enforced) {
                told.push(life);
            }
            self.leases.insert(life, lease);
        }
        let got: HashSet<_> = told.iter().copied().collect();
        let in_vain = totals.into_iter().filter(|(life, state)| state.wanted && !got.contains(life));
        self.waiting.extend(in_vain.map(|(life, _)| life));
        told
    }

    fn wants(&self, peer: &Metered) -> bool {
        self.leases
            .get(&peer.life)
            .is_none_or(|lease| lease.sequence == 0 || lease.enforced.saturating_sub(peer.total) <= lease.granted / 2)
    }

    fn state(&self, peer: &Metered, wanted: bool) -> v1::LeaseState {
        let lease = self.leases.get(&peer.life);
        v1::LeaseState {
            device_id: peer.device_id.to_vec().into(),
            generation: peer.life.generation,
            sequence: lease.map_or(0, |lease| lease.sequence),
            until: lease.map_or(0, |lease| lease.until),
            total: peer.total,
            wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::PublicKey;

    const EPOCH: Epoch = [7; 16];

    fn life(n: u8) -> Life {
        Life { public_key: PublicKey([n; 32]), generation: 1 }
    }

    fn metered(n: u8, total: u64) -> Metered {
        Metered { life: life(n), device_id: [n; 16], total }
    }

    fn grant(n: u8, sequence: u64, until: u64, scarce: bool) -> v1::LeaseGrant {
        v1::LeaseGrant { device_id: vec![n; 16].into(), generation: 1, sequence, until, scarce }
    }

    fn whole(leases: &mut Leases, metered: &[Metered], unsettled: &HashMap<Life, [u8; 16]>) -> Stretch {
        leases.inventory(metered, unsettled, None, MAX_LEASES)
    }

    fn answer(leases: &mut Leases, asked: &[v1::LeaseState], grants: &[v1::LeaseGrant]) -> Vec<Life> {
        leases.take(EPOCH, asked, grants, |device, _| Some(life(device[0])))
    }

    #[test]
    fn a_peer_asks_at_half_and_in_vain_only_once_between_slow_looks() {
        let mut leases = Leases::default();
        assert!(leases.enter(EPOCH) && !leases.enter(EPOCH));
        let asked = leases.urgent(&[metered(1, 0)]);
        assert_eq!(asked.len(), 1);
        assert_eq!(answer(&mut leases, &asked, &[grant(1, 1, 1_000, false)]), [life(1)]);
        assert_eq!(leases.enforced(Some(EPOCH), &life(1)), 1_000);
        assert_eq!(leases.enforced(Some([8; 16]), &life(1)), 0, "another epoch begins with nothing");
        assert!(leases.urgent(&[metered(1, 499)]).is_empty());
        let asked = leases.urgent(&[metered(1, 500)]);
        assert_eq!((asked[0].sequence, asked[0].until, asked[0].total), (1, 1_000, 500));
        assert!(answer(&mut leases, &asked, &[grant(1, 1, 1_000, true)]).is_empty());
        assert!(leases.urgent(&[metered(1, 1_000)]).is_empty(), "there was nothing");
        leases.settle(&[metered(1, 1_000)]);
        assert_eq!(leases.urgent(&[metered(1, 1_000)]).len(), 1);
        assert!(leases.enter([8; 16]));
        assert_eq!(leases.urgent(&[metered(1, 0)])[0].until, 0);
    }

    #[test]
    fn an_idle_peer_gives_back_only_after_the_engine_was_told() {
        let mut leases = Leases::default();
        leases.enter(EPOCH);
        let asked = leases.urgent(&[metered(1, 0), metered(2, 0)]);
        let until = 100 * RESIDUE_BYTES;
        answer(&mut leases, &asked, &[grant(1, 1, until, true), grant(2, 1, until, false)]);
        let idle = [metered(1, 0), metered(2, 0)];
        assert_eq!(leases.settle(&idle), [life(1)], "only where little is left");
        assert_eq!(leases.enforced(Some(EPOCH), &life(1)), RESIDUE_BYTES);
        let told = |leases: &mut Leases, total| whole(leases, &[metered(1, total)], &HashMap::new()).states[0].until;
        assert_eq!(told(&mut leases, 0), until, "something may be under way");
        // more had passed than the lowered lease
        assert!(leases.settle(&[metered(1, 2 * RESIDUE_BYTES)]).is_empty());
        assert_eq!(told(&mut leases, 2 * RESIDUE_BYTES), 2 * RESIDUE_BYTES);
    }

    #[test]
    fn lives_that_are_gone_stay_on_the_list_until_they_are_settled() {
        let mut leases = Leases::default();
        leases.enter(EPOCH);
        leases.adopt(life(1), [1; 16], 10);
        let gone = whole(&mut leases, &[], &HashMap::from([(life(1), [1; 16])])).states;
        assert_eq!((gone.len(), gone[0].until), (1, u64::MAX));
        assert!(whole(&mut leases, &[], &HashMap::new()).states.is_empty());
        assert_eq!(leases.urgent(&[metered(1, 0)]).len(), 1);
    }

    #[test]
    fn a_list_that_one_message_does_not_hold_is_told_in_stretches() {
        let mut leases = Leases::default();
        leases.enter(EPOCH);
        let peers: Vec<_> = (1..=7).rev().map(|n| metered(n, 0)).collect();
        let gone = HashMap::from([(life(8), [8; 16])]);
        let (mut stretches, mut after) = (Vec::new(), None);
        while stretches.is_empty() || after.is_some() {
            let stretch = leases.inventory(&peers, &gone, after, 3);
            stretches.push(stretch.message(EPOCH));
            after = stretch.through;
        }
        let told: Vec<_> = stretches.iter().flat_map(|leases| &leases.peers).map(|state| state.device_id[0]).collect();
        assert_eq!(told, [1, 2, 3, 4, 5, 6, 7, 8], "each once, and the one that is gone");
        let end = |n: u8| Some(v1::LeaseLife { device_id: vec![n; 16].into(), generation: 1 });
        let ends: Vec<_> = stretches.iter().map(|leases| leases.stretch.clone().unwrap()).collect();
        let stretch = |after, through| v1::LeaseStretch { after, through };
        assert_eq!(ends, [stretch(None, end(3)), stretch(end(3), end(6)), stretch(end(6), None)]);
        assert!(stretches.iter().all(|leases| !leases.complete), "what knows no stretches takes nothing back");
        let all = leases.inventory(&peers, &gone, None, 8).message(EPOCH);
        assert!(all.complete && all.stretch.is_none());
    }

    #[test]
    fn more_lives_than_one_message_holds_are_told_to_the_last() {
        let peer = |n: u32| {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&n.to_be_bytes());
            let device_id = key[..16].try_into().unwrap();
            Metered { life: Life { public_key: PublicKey(key), generation: 1 }, device_id, total: 0 }
        };
        let peers: Vec<_> = (0..=u32::try_from(MAX_LEASES).unwrap()).map(peer).collect();
        let mut leases = Leases::default();
        leases.enter(EPOCH);
        let first = leases.inventory(&peers, &HashMap::new(), None, MAX_LEASES);
        assert_eq!(first.states.len(), MAX_LEASES);
        let rest = leases.inventory(&peers, &HashMap::new(), first.through, MAX_LEASES);
        assert_eq!((rest.states.len(), rest.through), (1, None));
    }
}
