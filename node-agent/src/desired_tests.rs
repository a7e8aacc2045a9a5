use super::*;
use proptest::prelude::*;

const KEY: [u8; 32] = [9; 32];
const INCARNATION: [u8; 16] = [1; 16];

fn overlay() -> Vec<IpNet> {
    vec!["10.8.0.0/16".parse().unwrap(), "fd00:cafe::/64".parse().unwrap()]
}

fn peer(key: u8, host: u8, generation: u64) -> Peer {
    Peer {
        public_key: PublicKey([key; 32]),
        device_id: [key; 16],
        tenant_id: [1; 16],
        preshared_key: None,
        ipv4: Ipv4Addr::new(10, 8, 0, host),
        ipv6: format!("fd00:cafe::{host:x}").parse().unwrap(),
        generation,
    }
}

fn digest<'a>(peers: impl IntoIterator<Item = &'a Peer>) -> Digest {
    let mut digest = Digest::default();
    for peer in peers {
        digest.add(&KEY, &peer.record());
    }
    digest
}

fn cursor<'a>(revision: u64, peers: impl IntoIterator<Item = &'a Peer>) -> Cursor {
    Cursor { incarnation: INCARNATION, revision, digest: digest(peers) }
}

fn snapshot(revision: u64, peers: &[Peer]) -> Snapshot {
    Snapshot {
        target: cursor(revision, peers),
        peer_count: u32::try_from(peers.len()).unwrap(),
        peers: peers.to_vec(),
        expected_removed: 0,
    }
}

fn delta(from: u64, outcome: &[Peer], removed: &[u8], upserted: &[Peer]) -> v1::Delta {
    v1::Delta {
        from_revision: from,
        target: Some(cursor(from + 1, outcome).to_wire()),
        peer_count: u32::try_from(outcome.len()).unwrap(),
        removed: removed.iter().map(|key| vec![*key; 32].into()).collect(),
        upserted: upserted.iter().map(Peer::to_wire).collect(),
        expected_removed: 0,
    }
}

fn running(peers: &[Peer]) -> Desired {
    let mut desired = Desired::new(KEY, overlay(), vec!["10.8.0.200".parse().unwrap()]);
    let change = desired.plan_snapshot(&snapshot(5, peers)).unwrap().unwrap();
    desired.commit(&change);
    desired
}

#[test]
fn a_snapshot_is_applied_as_a_difference() {
    let desired = running(&[peer(1, 1, 1), peer(2, 2, 1)]);
    let next = [peer(2, 2, 1), peer(3, 3, 6)];
    let change = desired.plan_snapshot(&snapshot(6, &next)).unwrap().unwrap();
    assert_eq!(change.removed, [PublicKey([1; 32])]);
    assert_eq!(change.upserted, [peer(3, 3, 6)]);
    assert_eq!(desired.plan_snapshot(&snapshot(5, &[peer(1, 1, 1), peer(2, 2, 1)])), Ok(None));
}

#[test]
fn older_states_are_known_and_other_content_at_the_same_revision_is_refused() {
    let desired = running(&[peer(1, 1, 1)]);
    assert_eq!(desired.plan_snapshot(&snapshot(4, &[])), Ok(None));
    assert_eq!(desired.plan_delta(&delta(2, &[], &[1], &[])), Ok(None));
    assert_eq!(desired.plan_snapshot(&snapshot(5, &[])), Err(Refusal::SameRevisionOtherContent { revision: 5 }));
    let gap = delta(7, &[], &[1], &[]);
    assert_eq!(desired.plan_delta(&gap), Err(Refusal::Gap { from: 7, have: 5 }));
}

#[test]
fn a_wanted_snapshot_may_come_at_the_same_revision_with_other_content() {
    let mut desired = running(&[peer(1, 1, 1)]);
    desired.want_snapshot();
    assert_eq!((desired.resume_from(), desired.cursor().is_some(), desired.peers().len()), (None, true, 1));
    let change = desired.plan_snapshot(&snapshot(5, &[peer(1, 1, 1), peer(2, 2, 2)])).unwrap().unwrap();
    assert_eq!((change.removed.len(), change.upserted.len()), (0, 1));
}

#[test]
fn another_incarnation_may_begin_lower_but_only_by_snapshot() {
    let desired = running(&[peer(1, 1, 1)]);
    let mut other = snapshot(1, &[peer(1, 1, 1)]);
    other.target.incarnation = [2; 16];
    assert!(desired.plan_snapshot(&other).unwrap().is_some());
    let mut wrong = delta(5, &[peer(1, 1, 1)], &[], &[]);
    wrong.target.as_mut().unwrap().incarnation = vec![2; 16].into();
    assert_eq!(desired.plan_delta(&wrong), Err(Refusal::Incarnation));
}

#[test]
fn wrong_peers_are_refused_by_name() {
    let desired = running(&[peer(1, 1, 1), peer(2, 2, 1)]);
    let taken = [peer(1, 1, 1), peer(2, 2, 1), peer(3, 2, 6)];
    assert_eq!(
        desired.plan_delta(&delta(5, &taken, &[], &taken[2..])),
        Err(Refusal::DuplicateAddress(taken[2].ipv4.into()))
    );
    let mut foreign = peer(3, 3, 6);
    foreign.ipv4 = Ipv4Addr::new(192, 168, 0, 1);
    let outcome = [peer(1, 1, 1), peer(2, 2, 1), foreign.clone()];
    assert_eq!(
        desired.plan_delta(&delta(5, &outcome, &[], &outcome[2..])),
        Err(Refusal::OutsideOverlay(foreign.ipv4.into()))
    );
    assert_eq!(
        desired.plan_snapshot(&snapshot(6, &[peer(3, 3, 1), peer(3, 4, 1)])),
        Err(Refusal::DuplicateKey(PublicKey([3; 32])))
    );
    let mut short = delta(5, &outcome, &[], &[]);
    assert_eq!(desired.plan_delta(&short), Err(Refusal::Count { expected: 3, got: 2 }));
    short.peer_count = 2;
    assert_eq!(desired.plan_delta(&short), Err(Refusal::Digest));
    short.removed = vec![vec![0; 31].into()];
    assert_eq!(desired.plan_delta(&short), Err(Refusal::Malformed("public_key")));
}

#[test]
fn two_peers_may_exchange_their_addresses() {
    let mut desired = running(&[peer(1, 1, 1), peer(2, 2, 1)]);
    let exchanged = [peer(1, 2, 1), peer(2, 1, 1)];
    let change = desired.plan_delta(&delta(5, &exchanged, &[], &exchanged)).unwrap().unwrap();
    desired.commit(&change);
    assert!(desired.is_whole());
    assert_eq!(desired.owners[&IpAddr::from([10, 8, 0, 1])], PublicKey([2; 32]));
}

#[test]
fn a_mass_removal_must_be_announced() {
    let peers: Vec<_> = (1..=20).map(|n| peer(n, n, 1)).collect();
    let desired = running(&peers);
    assert_eq!(
        desired.plan_snapshot(&snapshot(6, &[])),
        Err(Refusal::MassRemoval { removed: 20, before: 20, expected: 0 })
    );
    let announced = Snapshot { expected_removed: 20, ..snapshot(6, &[]) };
    assert!(desired.plan_snapshot(&announced).unwrap().is_some());
    assert!(desired.plan_snapshot(&snapshot(6, &peers[10..])).unwrap().is_some());
    let keys: Vec<u8> = (1..=11).collect();
    let mut large = delta(5, &peers[11..], &keys, &[]);
    assert_eq!(desired.plan_delta(&large), Err(Refusal::MassRemoval { removed: 11, before: 20, expected: 0 }));
    large.expected_removed = 11;
    assert!(desired.plan_delta(&large).unwrap().is_some());
}

#[test]
fn the_device_of_a_removed_life_is_known_until_it_is_forgotten() {
    let mut desired = running(&[peer(1, 1, 1)]);
    let change = desired.plan_delta(&delta(5, &[peer(1, 1, 6)], &[1], &[peer(1, 1, 6)])).unwrap().unwrap();
    desired.commit(&change);
    let old = Life { public_key: PublicKey([1; 32]), generation: 1 };
    let new = Life { generation: 6, ..old };
    assert_eq!((desired.device_of(&old), desired.device_of(&new)), (Some([1; 16]), Some([1; 16])));
    desired.forget_retired(|_| false);
    assert_eq!((desired.device_of(&old), desired.device_of(&new)), (None, Some([1; 16])));
}

#[test]
fn a_snapshot_with_more_peers_than_announced_stops_early() {
    let begin = v1::SnapshotBegin { target: Some(cursor(6, &[]).to_wire()), peer_count: 1 };
    let mut snapshot = Snapshot::begin(&begin).unwrap();
    let chunk = v1::SnapshotChunk { peers: vec![peer(1, 1, 1).to_wire(), peer(2, 2, 1).to_wire()] };
    assert_eq!(snapshot.chunk(&chunk), Err(Refusal::Count { expected: 1, got: 2 }));
}

#[test]
fn a_refused_change_is_taken_back_whole() {
    let mut desired = running(&[peer(1, 1, 1), peer(2, 2, 1)]);
    let before = (desired.cursor(), desired.digest());
    // 1 goes, 2 takes its address, 3 takes that of 2.
    let outcome = [peer(2, 1, 6), peer(3, 2, 6)];
    let change = desired.plan_delta(&delta(5, &outcome, &[1], &outcome)).unwrap().unwrap();
    let undo = desired.commit(&change);
    assert!(desired.is_whole() && desired.peers().len() == 2);
    desired.roll_back(undo);
    assert_eq!((desired.cursor(), desired.digest()), before);
    assert_eq!(desired.peer(&PublicKey([1; 32])), Some(&peer(1, 1, 1)));
    assert_eq!(desired.owners.len(), 4);
    assert_eq!(desired.device_of(&peer(3, 2, 6).life()), Some([3; 16]), "the engine may have counted for it");
}

#[test]
fn the_addresses_that_become_free_are_those_of_ended_lives() {
    let desired = running(&[peer(1, 1, 1), peer(2, 2, 1), peer(3, 3, 1)]);
    // 1 goes, 2 gets another preshared key in the same life, 3 begins a new life elsewhere, 4 is new.
    let rekeyed = Peer { preshared_key: Some(PresharedKey(Zeroizing::new([5; 32]))), ..peer(2, 2, 1) };
    let outcome = [rekeyed, peer(3, 30, 6), peer(4, 4, 6)];
    let change = desired.plan_delta(&delta(5, &outcome, &[1], &outcome)).unwrap().unwrap();
    let expected: HashSet<_> = [1, 3].iter().flat_map(|host| peer(9, *host, 1).addresses()).collect();
    assert_eq!(desired.freed(&change), expected);
}

#[test]
fn a_peer_needs_a_tenant_and_an_address_of_its_own() {
    let nobody = v1::Peer { tenant_id: vec![0; 16].into(), ..peer(1, 1, 1).to_wire() };
    assert_eq!(Peer::parse(&nobody), Err(Refusal::Malformed("tenant_id")));
    let server = peer(2, 200, 1);
    let refused = running(&[]).plan_delta(&delta(5, std::slice::from_ref(&server), &[], std::slice::from_ref(&server)));
    assert_eq!(refused, Err(Refusal::OwnAddress("10.8.0.200".parse().unwrap())));
}

proptest! {
    /// Random edits told by deltas, with some deltas skipped and repaired by a snapshot, always end in the model's state.
    #[test]
    fn any_history_converges_to_the_model(edits in prop::collection::vec((1u8..12, 1u8..12, any::<bool>(), 0u8..4), 1..60)) {
        let mut model: HashMap<u8, Peer> = HashMap::new();
        let mut desired = running(&[]);
        let mut revision = 5;
        for (key, host, remove, lost) in edits {
            let (mut removed, mut upserted) = (vec![], vec![]);
            if remove {
                if model.remove(&key).is_some() { removed.push(key); }
            } else if !model.values().any(|p| p.public_key.0[0] != key && p.ipv4.octets()[3] == host) {
                let next = peer(key, host, revision + 1);
                model.insert(key, next.clone());
                upserted.push(next);
            }
            let outcome: Vec<_> = model.values().cloned().collect();
            let delta = delta(revision, &outcome, &removed, &upserted);
            revision += 1;
            if lost == 0 { continue; }
            match desired.plan_delta(&delta) {
                Ok(change) => {
                    desired.commit(&change.expect("a new revision is a change"));
                }
                Err(Refusal::Gap { .. }) => {
                    let change = desired.plan_snapshot(&snapshot(revision, &outcome)).unwrap().unwrap();
                    desired.commit(&change);
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
            prop_assert!(desired.is_whole());
            prop_assert_eq!(desired.cursor(), Some(cursor(revision, &outcome)));
            prop_assert_eq!(desired.peers.len(), outcome.len());
            for p in &outcome { prop_assert_eq!(desired.peer(&p.public_key), Some(p)); }
            prop_assert_eq!(desired.owners.len(), 2 * outcome.len());
        }
    }
}
