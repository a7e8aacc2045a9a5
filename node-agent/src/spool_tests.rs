use super::*;
use proptest::prelude::*;

const BOOT: [u8; 16] = [7; 16];
const EPOCH: Epoch = [1; 16];

fn at(ms: u64) -> Moment {
    Moment { boot_ms: ms, wall_ms: 1_000_000_000_000 + ms }
}

fn span(start: u64, end: u64) -> Span {
    Span { boot_id: BOOT, start: at(start), end: at(end) }
}

fn usage(device: u8, rx_bytes: u64) -> v1::PeerUsage {
    v1::PeerUsage { device_id: vec![device; 16].into(), generation: 1, rx_bytes, ..v1::PeerUsage::default() }
}

fn ids(windows: &[v1::UsageWindow]) -> Vec<u64> {
    windows.iter().map(|window| window.sequence).collect()
}

fn acks(windows: &[v1::UsageWindow]) -> Vec<v1::AckedWindow> {
    windows
        .iter()
        .map(|window| v1::AckedWindow { counter_epoch: window.counter_epoch.clone(), sequence: window.sequence })
        .collect()
}

#[test]
fn windows_and_their_sequence_survive_a_restart_until_they_are_acknowledged() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("spool");
    let mut spool = Spool::open(&path, MAX_BYTES, 0).unwrap();
    spool.append(EPOCH, span(0, 10), &[usage(1, 100)]).unwrap();
    spool.append(EPOCH, span(10, 20), &[usage(1, 200)]).unwrap();
    let mut spool = Spool::open(&path, MAX_BYTES, 0).unwrap();
    let windows = spool.next(at(50), BOOT).unwrap();
    assert_eq!(ids(&windows), [1, 2]);
    assert_eq!((windows[1].age_start_ms, windows[1].age_end_ms), (40, 30));
    spool.acknowledge(&acks(&windows[..1]), 0).unwrap();
    let mut spool = Spool::open(&path, MAX_BYTES, 0).unwrap();
    assert_eq!(ids(&spool.next(at(50), BOOT).unwrap()), [2]);
    spool.append(EPOCH, span(20, 30), &[usage(1, 300)]).unwrap();
    spool.append([2; 16], span(20, 30), &[usage(1, 5)]).unwrap();
    assert_eq!(ids(&spool.next(at(50), BOOT).unwrap()), [2, 3, 1]);
}

#[test]
fn after_a_reboot_ages_come_from_the_wall_clock() {
    let root = tempfile::tempdir().unwrap();
    let mut spool = Spool::open(&root.path().join("spool"), MAX_BYTES, 0).unwrap();
    spool.append(EPOCH, span(900_000, 910_000), &[usage(1, 1)]).unwrap();
    let now = Moment { boot_ms: 5_000, wall_ms: at(970_000).wall_ms };
    let windows = spool.next(now, [8; 16]).unwrap();
    assert_eq!((windows[0].age_start_ms, windows[0].age_end_ms), (70_000, 60_000));
}

#[test]
fn a_restored_control_plane_gets_everything_again() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("spool");
    let mut spool = Spool::open(&path, MAX_BYTES, 0).unwrap();
    spool.append(EPOCH, span(0, 10), &[usage(1, 100)]).unwrap();
    let windows = spool.next(at(10), BOOT).unwrap();
    spool.acknowledge(&acks(&windows), 0).unwrap();
    assert!(!spool.has_unacknowledged());
    spool.unacknowledge_all().unwrap();
    let spool = Spool::open(&path, MAX_BYTES, 0).unwrap();
    assert_eq!(ids(&spool.next(at(10), BOOT).unwrap()), [1]);
}

#[test]
fn a_rewrite_that_fails_leaves_every_window_readable() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("spool");
    let mut spool = Spool::open(&path, MAX_BYTES, 0).unwrap();
    spool.append(EPOCH, span(0, 10), &[usage(1, 100)]).unwrap();
    spool.append(EPOCH, span(10, 20), &[usage(1, 200)]).unwrap();
    spool.acknowledge(&acks(&spool.next(at(20), BOOT).unwrap()[..1]), 0).unwrap();
    let obstacle = path.with_added_extension("new");
    std::fs::create_dir(&obstacle).unwrap();
    spool.unacknowledge_all().unwrap_err();
    spool.shrink().unwrap_err();
    assert_eq!(ids(&spool.next(at(20), BOOT).unwrap()), [2]);
    std::fs::remove_dir(&obstacle).unwrap();
    spool.unacknowledge_all().unwrap();
    assert_eq!(ids(&spool.next(at(20), BOOT).unwrap()), [1, 2]);
}

#[test]
fn acknowledged_windows_leave_after_a_week() {
    let root = tempfile::tempdir().unwrap();
    let mut spool = Spool::open(&root.path().join("spool"), MAX_BYTES, 0).unwrap();
    spool.append(EPOCH, span(0, 10), &[usage(1, 100)]).unwrap();
    spool.acknowledge(&acks(&spool.next(at(10), BOOT).unwrap()), at(10).wall_ms).unwrap();
    let later = 9 * 24 * 3600 * 1000;
    spool.append(EPOCH, span(later, later), &[usage(1, 200)]).unwrap();
    spool.acknowledge(&acks(&spool.next(at(later), BOOT).unwrap()), at(later).wall_ms).unwrap();
    spool.unacknowledge_all().unwrap();
    assert_eq!(ids(&spool.next(at(later), BOOT).unwrap()), [2]);
}

#[test]
fn a_full_spool_keeps_the_last_value_of_every_peer_and_its_bound() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("spool");
    let bound = 20_000;
    let mut spool = Spool::open(&path, bound, 0).unwrap();
    for n in 1..=2_000u64 {
        spool.append(EPOCH, span(n, n + 1), &[usage(u8::try_from(n % 50).unwrap(), n)]).unwrap();
        assert!(spool.file.length() <= bound);
    }
    let mut spool = Spool::open(&path, bound, 0).unwrap();
    let mut last = HashMap::new();
    let mut previous = 0;
    while spool.has_unacknowledged() {
        let windows = spool.next(at(3_000), BOOT).unwrap();
        for window in &windows {
            assert!(window.sequence > previous, "sequence numbers only grow");
            previous = window.sequence;
            last.extend(window.peers.iter().map(|peer| (peer.device_id[0], peer.rx_bytes)));
        }
        spool.acknowledge(&acks(&windows), at(3_000).wall_ms).unwrap();
    }
    assert_eq!(last.len(), 50);
    assert!(last.iter().all(|(device, bytes)| *bytes > 1_950 && bytes % 50 == u64::from(*device)));
}

proptest! {
    /// Whatever is lost, repeated or restarted on the way, a ledger that takes the greatest value ends at the truth.
    #[test]
    fn the_ledger_ends_at_the_last_value(steps in prop::collection::vec((0u8..5, 1u8..4), 1..80)) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("spool");
        let mut spool = Spool::open(&path, 3_000, 0).unwrap();
        let (mut truth, mut ledger) = (HashMap::new(), HashMap::new());
        let mut seen = std::collections::HashSet::new();
        let mut deliver = |windows: &[v1::UsageWindow], ledger: &mut HashMap<u8, u64>| {
            for window in windows {
                if seen.insert((window.counter_epoch.clone(), window.sequence)) {
                    for peer in &window.peers {
                        let value = ledger.entry(peer.device_id[0]).or_insert(0);
                        *value = peer.rx_bytes.max(*value);
                    }
                }
            }
        };
        for (n, (step, device)) in steps.into_iter().enumerate() {
            let n = n as u64 + 1;
            match step {
                0 | 1 => {
                    truth.insert(device, n);
                    spool.append(EPOCH, span(n, n), &[usage(device, n)]).unwrap();
                    spool.sync().unwrap();
                }
                2 => spool = Spool::open(&path, 3_000, 0).unwrap(),
                3 => deliver(&spool.next(at(n), BOOT).unwrap(), &mut ledger),
                _ => {
                    let windows = spool.next(at(n), BOOT).unwrap();
                    deliver(&windows, &mut ledger);
                    spool.acknowledge(&acks(&windows), at(n).wall_ms).unwrap();
                }
            }
        }
        while spool.has_unacknowledged() {
            let windows = spool.next(at(1_000), BOOT).unwrap();
            deliver(&windows, &mut ledger);
            spool.acknowledge(&acks(&windows), at(1_000).wall_ms).unwrap();
        }
        prop_assert_eq!(truth, ledger);
    }
}
