//! Leases against a real database, with agents that lose answers, die and start again: never a byte beyond the limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cvault_node_protocol::v1::{LeaseStretch, PeerUsage, UsageWindow};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::*;
use crate::devices::Registered;
use crate::testing::{Person, World};
use crate::usage;

const GB: i64 = 1_000_000_000;

async fn set_limit(world: &World, person: Person, bytes: Option<i64>) {
    let mut superuser = world.superuser().await;
    sqlx::query("update cvault.tenants set bandwidth_limit_bytes = $2 where tenant_id = $1")
        .bind(person.tenant.uuid())
        .bind(bytes)
        .execute(&mut superuser)
        .await
        .unwrap();
}

/// One device on one server as its agent sees it.
struct Peer {
    server: ServerId,
    device: Uuid,
    generation: u64,
    epoch: Uuid,
    sequence: u64,
    until: u64,
    total: u64,
    window: u64,
}

impl Peer {
    fn new(server: ServerId, device: &Registered) -> Self {
        let generation = device.revision;
        let device = device.id.uuid();
        let window = u64::from(rand::random::<u32>()) << 16;
        Self { server, device, generation, epoch: Uuid::from_u128(1), sequence: 0, until: 0, total: 0, window }
    }

    fn state(&self) -> LeaseState {
        LeaseState {
            device_id: self.device.as_bytes().to_vec().into(),
            generation: self.generation,
            sequence: self.sequence,
            until: self.until,
            total: self.total,
            wanted: true,
        }
    }

    fn question(&self, complete: bool) -> Leases {
        let counter_epoch = self.epoch.as_bytes().to_vec().into();
        Leases { counter_epoch, peers: vec![self.state()], complete, stretch: None }
    }

    async fn ask(&self, world: &World, question: &Leases, now: OffsetDateTime) -> Vec<LeaseGrant> {
        // who finds no connection free in time asks again, as agents do
        let mut tx = loop {
            match Tx::begin(&world.app.db.sys).await {
                Ok(tx) => break tx,
                Err(DbError::Unavailable(_)) => {}
                Err(error) => panic!("{error}"),
            }
        };
        let grants = lease(&mut tx, self.server, question, now).await.unwrap();
        tx.commit().await.unwrap();
        grants
    }

    fn take(&mut self, grants: &[LeaseGrant]) {
        for grant in grants {
            assert_eq!(grant.device_id, self.device.as_bytes().as_slice());
            (self.sequence, self.until) = (grant.sequence, grant.until);
        }
    }

    async fn renew(&mut self, world: &World) {
        let grants = self.ask(world, &self.question(false), world.app.clock.now()).await;
        self.take(&grants);
    }

    async fn report(&mut self, world: &World) {
        self.window += 1;
        let window = UsageWindow {
            counter_epoch: self.epoch.as_bytes().to_vec().into(),
            sequence: self.window,
            age_start_ms: 100,
            age_end_ms: 0,
            peers: vec![PeerUsage {
                device_id: self.device.as_bytes().to_vec().into(),
                generation: self.generation,
                rx_bytes: self.total / 3,
                tx_bytes: self.total - self.total / 3,
                handshake_age_ms: u64::MAX,
                ..PeerUsage::default()
            }],
        };
        let mut tx = Tx::begin(&world.app.db.sys).await.unwrap();
        let done = usage::ingest(&mut tx, self.server, &[window], world.app.clock.now()).await.unwrap();
        assert_eq!(done.implausible, 0);
        tx.commit().await.unwrap();
    }
}

async fn billed(world: &World, person: Person) -> i64 {
    let sum = "select coalesce(sum(rx_bytes + tx_bytes), 0)::bigint from cvault.usage_hourly where tenant_id = $1";
    let month = "select bytes from platform.quota_months where tenant_id = $1";
    let one = async |query: &'static str| {
        sqlx::query_scalar::<_, i64>(query).bind(person.tenant.uuid()).fetch_one(&world.app.db.sys).await.unwrap()
    };
    let billed = one(sum).await;
    assert_eq!(billed, one(month).await, "the month is the sum of its hours");
    billed
}

#[tokio::test]
async fn one_device_comes_to_the_limit_and_not_a_byte_further_in_shrinking_steps() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    set_limit(&world, person, Some(GB)).await;
    let device = world.register(person, "d").await.unwrap();
    let mut peer = Peer::new(server, &device);
    let mut steps = Vec::new();
    loop {
        let before = peer.until;
        peer.renew(&world).await;
        if peer.until == before {
            break;
        }
        steps.push(peer.until - before);
        peer.total = peer.until;
        if steps.len() % 3 == 0 {
            peer.report(&world).await;
        }
    }
    assert_eq!(steps[0], 10_000_000, "a hundredth of the limit");
    assert!(steps.iter().rev().nth(1).unwrap() < &2_000_000, "near the limit less: {steps:?}");
    assert_eq!(peer.total, GB as u64);
    peer.report(&world).await;
    assert_eq!(billed(&world, person).await, GB);
    peer.renew(&world).await;
    assert_eq!(peer.until, GB as u64);
    set_limit(&world, person, Some(GB + 5_000)).await;
    peer.renew(&world).await;
    assert_eq!(peer.until, GB as u64 + 5_000, "a raised limit is leased at once");
    // the next month begins with nothing used
    let next = world.app.clock.now() + time::Duration::days(32);
    let grants = peer.ask(&world, &peer.question(false), next).await;
    assert!(grants[0].until > GB as u64 + 5_000 && !grants[0].scarce);
    set_limit(&world, person, None).await;
    assert!(peer.ask(&world, &peer.question(false), next).await.is_empty(), "without a limit there is no lease");
}

#[tokio::test]
async fn a_foreign_device_and_another_life_get_nothing() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    set_limit(&world, person, Some(GB)).await;
    let device = world.register(person, "d").await.unwrap();
    let second = world.server("s2", "default", "lab-2").await;
    for wrong in [
        Peer { server: second, ..Peer::new(server, &device) },
        Peer { generation: device.revision + 1, ..Peer::new(server, &device) },
        Peer { device: Uuid::from_u128(9), ..Peer::new(server, &device) },
    ] {
        assert!(wrong.ask(&world, &wrong.question(false), world.app.clock.now()).await.is_empty());
    }
    sqlx::query("update cvault.tenants set status = 'suspended'").execute(&mut world.superuser().await).await.unwrap();
    let peer = Peer::new(server, &device);
    assert!(peer.ask(&world, &peer.question(false), world.app.clock.now()).await.is_empty());
}

#[tokio::test]
async fn what_is_given_back_or_was_never_used_goes_to_others() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    set_limit(&world, person, Some(20_000_000)).await;
    let (first, second) = (world.register(person, "a").await.unwrap(), world.register(person, "b").await.unwrap());
    let (mut idle, mut busy) = (Peer::new(server, &first), Peer::new(server, &second));
    idle.renew(&world).await;
    assert!(idle.until > 0);
    let drain = async |busy: &mut Peer| loop {
        let before = busy.until;
        busy.renew(&world).await;
        busy.total = busy.until;
        if busy.until == before {
            return;
        }
    };
    drain(&mut busy).await;
    assert_eq!(busy.total + idle.until, 20_000_000);
    // an answer was lost: the agent does not know the newest grant, so it cannot give it back
    let mut late = idle.question(false);
    late.peers[0].sequence -= 1;
    late.peers[0].until = 0;
    late.peers[0].wanted = false;
    idle.ask(&world, &late, world.app.clock.now()).await;
    drain(&mut busy).await;
    assert_eq!(busy.total + idle.until, 20_000_000);
    let mut back = idle.question(false);
    back.peers[0].until = 1_000;
    back.peers[0].wanted = false;
    let grants = idle.ask(&world, &back, world.app.clock.now()).await;
    assert!(grants[0].scarce);
    idle.take(&grants);
    assert_eq!(idle.until, 1_000);
    drain(&mut busy).await;
    assert_eq!(busy.total + 1_000, 20_000_000);
    // the idle one is gone: a complete list without it settles what it never used, but not before it can be late
    let whole = Leases { peers: vec![busy.state()], ..busy.question(true) };
    busy.report(&world).await;
    busy.ask(&world, &whole, world.app.clock.now()).await;
    drain(&mut busy).await;
    assert_eq!(busy.total + 1_000, 20_000_000);
    busy.ask(&world, &whole, world.app.clock.now() + time::Duration::minutes(1)).await;
    drain(&mut busy).await;
    assert_eq!(busy.total, 20_000_000);
}

#[tokio::test]
async fn a_stretch_gives_back_what_it_should_name_and_nothing_beyond_its_ends() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    set_limit(&world, person, Some(GB)).await;
    let mut peers = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let mut peer = Peer::new(server, &world.register(person, name).await.unwrap());
        peer.renew(&world).await;
        peers.push(peer);
    }
    peers.sort_by_key(|peer| peer.device);
    let late = world.app.clock.now() + time::Duration::minutes(1);
    let end = |peer: &Peer| {
        Some(LeaseLife { device_id: peer.device.as_bytes().to_vec().into(), generation: peer.generation })
    };
    let list = |named: &[usize], after: Option<usize>, through: Option<usize>| {
        let named = named.iter().map(|at| LeaseState { wanted: false, ..peers[*at].state() });
        let (after, through) = (after.and_then(|at| end(&peers[at])), through.and_then(|at| end(&peers[at])));
        Leases { peers: named.collect(), stretch: Some(LeaseStretch { after, through }), ..peers[0].question(false) }
    };
    let held = async || {
        let held = sqlx::query_scalar::<_, Uuid>("select device_id from platform.quota_leases order by device_id");
        let held = held.fetch_all(&world.app.db.sys).await.unwrap();
        held.iter().map(|device| peers.iter().position(|peer| peer.device == *device).unwrap()).collect::<Vec<_>>()
    };
    // the list ends here: nothing was said of those behind
    peers[0].ask(&world, &list(&[0, 1], None, Some(1)), late).await;
    assert_eq!(held().await, [0, 1, 2, 3]);
    peers[0].ask(&world, &list(&[2], Some(1), Some(2)), world.app.clock.now()).await;
    peers[0].ask(&world, &list(&[], Some(1), Some(2)), world.app.clock.now()).await;
    assert_eq!(held().await, [0, 1, 2, 3], "it may be late");
    peers[0].ask(&world, &list(&[], Some(1), Some(2)), late).await;
    assert_eq!(held().await, [0, 1, 3]);
    peers[0].ask(&world, &list(&[], Some(2), None), late).await;
    assert_eq!(held().await, [0, 1]);
    peers[0].ask(&world, &list(&[1], None, Some(1)), late).await;
    assert_eq!(held().await, [1]);
    for wrong in
        [list(&[], Some(2), Some(1)), list(&[], Some(1), Some(1)), Leases { complete: true, ..list(&[], None, None) }]
    {
        assert!(!is_well_formed(&wrong));
    }
    assert!(is_well_formed(&list(&[0], None, None)));
}

#[tokio::test]
async fn agents_that_lose_answers_and_die_at_any_moment_never_pass_the_limit() {
    let (world, first) = World::with_server().await;
    let second = world.server("s2", "default", "lab-2").await;
    let person = world.person().await;
    let limit = 50_000_000;
    set_limit(&world, person, Some(limit)).await;
    let mut peers = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let device = world.register(person, name).await.unwrap();
        let server = if device.server.id == first { first } else { second };
        peers.push(Peer::new(server, &device));
    }
    let seed = rand::random();
    let mut rng = StdRng::seed_from_u64(seed);
    for step in 0..600 {
        let at = rng.random_range(0..peers.len());
        let peer = &mut peers[at];
        match rng.random_range(0..10) {
            // traffic, as far as the engine lets it
            0..4 => peer.total += rng.random_range(0..=peer.until.saturating_sub(peer.total)),
            4..7 => peer.renew(&world).await,
            // the answer is lost
            7 => drop(peer.ask(&world, &peer.question(false), world.app.clock.now()).await),
            8 => peer.report(&world).await,
            // the agent dies; the engine goes on, and says what it enforces
            _ => peer.sequence = 0,
        }
        let used: u64 = peers.iter().map(|peer| peer.total).sum();
        assert!(used <= limit.unsigned_abs(), "step {step} of seed {seed}");
    }
    for peer in &mut peers {
        for _ in 0..100 {
            peer.renew(&world).await;
            peer.total = peer.until;
        }
        peer.report(&world).await;
    }
    assert_eq!(billed(&world, person).await, limit, "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_devices_that_ask_at_the_same_moment_come_to_the_limit_and_not_a_byte_further() {
    let (world, _) = World::with_server().await;
    let person = world.person().await;
    let limit = 200_000_000;
    set_limit(&world, person, Some(limit)).await;
    let mut peers = Vec::new();
    for number in 0..1_000 {
        let device = world.register(person, &format!("d{number}")).await.unwrap();
        peers.push(Peer::new(device.server.id, &device));
    }
    let (world, start) = (Arc::new(world), Arc::new(Barrier::new(peers.len())));
    let mut agents = JoinSet::new();
    for mut peer in peers {
        let (world, start) = (Arc::clone(&world), Arc::clone(&start));
        agents.spawn(async move {
            start.wait().await;
            peer.renew(&world).await;
            peer.total = peer.until;
            peer
        });
    }
    let mut peers = agents.join_all().await;
    let granted = |peers: &[Peer]| peers.iter().map(|peer| peer.total).sum::<u64>();
    assert!(granted(&peers) <= limit.unsigned_abs(), "{}", granted(&peers));
    for peer in &mut peers {
        while {
            let before = peer.until;
            peer.renew(&world).await;
            peer.until > before
        } {
            peer.total = peer.until;
        }
        peer.report(&world).await;
    }
    assert_eq!(granted(&peers), limit.unsigned_abs());
    assert_eq!(billed(&world, person).await, limit);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_questions_in_forty_lines_about_one_tenant_never_pass_its_limit_and_use_it_up() {
    let (world, first) = World::with_server().await;
    let mut servers = vec![first];
    for name in ["s2", "s3", "s4"] {
        servers.push(world.server(name, "default", "lab-1").await);
    }
    let (person, stranger) = (world.person().await, world.person().await);
    let limit = 200_000_000;
    set_limit(&world, person, Some(limit)).await;
    set_limit(&world, stranger, Some(GB)).await;
    let mut peers = Vec::new();
    for number in 0..40 {
        let device = world.register(person, &format!("d{number}")).await.unwrap();
        peers.push(Peer::new(device.server.id, &device));
    }
    let used: BTreeSet<_> = peers.iter().map(|peer| peer.server).collect();
    assert_eq!(used.len(), servers.len(), "every server asks");
    let other = world.register(stranger, "d").await.unwrap();
    let mut other = Peer::new(other.server.id, &other);

    let (world, carried) = (Arc::new(world), Arc::new(AtomicU64::new(0)));
    let mut agents = JoinSet::new();
    for (number, mut peer) in peers.into_iter().enumerate() {
        let (world, carried) = (Arc::clone(&world), Arc::clone(&carried));
        agents.spawn(async move {
            for step in 0..25 {
                if (number + step) % 9 == 0 {
                    // the answer is lost
                    peer.ask(&world, &peer.question(false), world.app.clock.now()).await;
                    continue;
                }
                peer.renew(&world).await;
                let sum = carried.fetch_add(peer.until - peer.total, Ordering::SeqCst) + (peer.until - peer.total);
                assert!(sum <= limit.unsigned_abs(), "{sum}");
                peer.total = peer.until;
                if (number + step) % 5 == 0 {
                    peer.report(&world).await;
                }
            }
            peer
        });
    }
    other.renew(&world).await;
    assert_eq!(other.until, 10_000_000, "another tenant has its own");
    let mut peers = agents.join_all().await;
    // what lost answers had granted is known to be there with the next one
    for peer in &mut peers {
        loop {
            let before = peer.until;
            peer.renew(&world).await;
            peer.total = peer.until;
            if peer.until == before {
                break;
            }
        }
        peer.report(&world).await;
    }
    assert_eq!(peers.iter().map(|peer| peer.total).sum::<u64>(), limit.unsigned_abs());
    assert_eq!(billed(&world, person).await, limit);
    assert_eq!(billed(&world, stranger).await, 0);
}
