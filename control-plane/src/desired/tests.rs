//! Everything at once: whatever order registrations, moves, deletions, reports and tasks come in, no two of them wait for
//! each other, and what the servers should run, the addresses and the ledger agree in the end.

use std::sync::Arc;

use cvault_node_protocol::v1::{PeerUsage, UsageWindow};
use cvault_types::{DeviceId, ServerId};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinSet;

use super::*;
use crate::sessions::{self, ConnectError};
use crate::testing::{Person, World, request_id};
use crate::{devices, ipam, usage};

const WORKERS: usize = 8;
const STEPS: usize = 60;
/// Any seed must do; a failure names the one that did not.
const SEEDS: [u64; 2] = [1, 2];

struct Worker {
    world: Arc<World>,
    person: Person,
    servers: [ServerId; 2],
    rng: StdRng,
    devices: Vec<DeviceId>,
    number: u8,
    sequence: u64,
}

impl Worker {
    async fn step(&mut self) -> Result<(), DbError> {
        match self.rng.random_range(0..10) {
            0..=3 => {
                let device = self.world.register(self.person, "d").await.unwrap();
                self.devices.push(device.id);
            }
            4 => {
                if let Some(device) = self.devices.pop() {
                    self.world.revoke(self.person, device).await;
                }
            }
            5 | 6 => self.connect().await?,
            7 | 8 => self.report().await?,
            _ => {
                ipam::free_quarantined(&self.world.app.db.sys).await?;
                sessions::close_silent(&self.world.app.db.sys).await?;
                usage::refresh_daily(&self.world.app.db.sys).await?;
                let sql = "update platform.servers set acked_revision = revision where server_id = $1";
                let server = self.servers.choose(&mut self.rng).unwrap().uuid();
                sqlx::query(sql).bind(server).execute(&self.world.app.db.sys).await?;
            }
        }
        Ok(())
    }

    async fn connect(&mut self) -> Result<(), DbError> {
        let Some(device) = self.devices.choose(&mut self.rng).copied() else { return Ok(()) };
        let region = *["lab-1", "lab-2"].choose(&mut self.rng).unwrap();
        let app = &self.world.app;
        let mut tx = app.db.tenancy.begin(self.person.tenant).await?;
        let now = app.clock.now();
        let work = sessions::connect(&mut tx, self.person.user, device, Some(region), now, request_id()).await;
        match tx.finish(work).await {
            Ok(_) => Ok(()),
            Err(ConnectError::Db(error)) => Err(error),
            Err(other) => panic!("{other}"),
        }
    }

    /// Each worker plays an agent of both servers, with counters of its own, for devices of everybody.
    async fn report(&mut self) -> Result<(), DbError> {
        let everybody: Vec<Uuid> =
            sqlx::query_scalar("select device_id from cvault.devices order by random() limit 20")
                .fetch_all(&self.world.app.db.sys)
                .await?;
        self.sequence += 1;
        let window = UsageWindow {
            counter_epoch: vec![self.number; 16].into(),
            sequence: self.sequence,
            age_start_ms: 10_000,
            age_end_ms: 0,
            peers: everybody
                .iter()
                .map(|device| PeerUsage {
                    device_id: device.as_bytes().to_vec().into(),
                    generation: 1,
                    rx_bytes: self.rng.random_range(0..1_000_000),
                    tx_bytes: self.rng.random_range(0..1_000_000),
                    rx_packets: 1,
                    tx_packets: 1,
                    handshake_age_ms: 1_000,
                })
                .collect(),
        };
        let server = *self.servers.choose(&mut self.rng).unwrap();
        let app = &self.world.app;
        let mut tx = Tx::begin(&app.db.sys).await?;
        let work = usage::ingest(&mut tx, server, &[window], app.clock.now()).await;
        tx.finish(work).await.map(drop)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_everything_ends_in_agreement_and_without_a_deadlock() {
    for seed in SEEDS {
        let (world, first) = World::with_server().await;
        let second = world.server("s2", "default", "lab-2").await;
        let world = Arc::new(world);
        let mut tasks = JoinSet::new();
        for number in 0..WORKERS {
            let mut worker = Worker {
                world: Arc::clone(&world),
                person: world.person().await,
                servers: [first, second],
                rng: StdRng::seed_from_u64(seed * 1_000 + number as u64),
                devices: Vec::new(),
                number: u8::try_from(number).unwrap(),
                sequence: 0,
            };
            tasks.spawn(async move {
                for _ in 0..STEPS {
                    worker.step().await.unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
                }
                (worker.person, worker.devices)
            });
        }
        let mut active = 0;
        while let Some(done) = tasks.join_next().await {
            let (person, kept) = done.unwrap();
            let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
            let found =
                devices::list(&mut tx, devices::Page { user: person.user, after: None, limit: 1_000 }).await.unwrap();
            tx.commit().await.unwrap();
            assert_eq!(found.len(), kept.len());
            active += kept.len();
        }
        let mut placed = 0;
        for server in [first, second] {
            let update = read(&world.app.db.sys, &world.app.keys, server, None).await.unwrap();
            let Update::Snapshot { peers, .. } = update else { panic!("{update:?}") };
            placed += peers.len();
        }
        let mut superuser = world.superuser().await;
        let allocated: i64 = sqlx::query_scalar("select count(*) from platform.addresses where state = 'allocated'")
            .fetch_one(&mut superuser)
            .await
            .unwrap();
        assert_eq!((placed, usize::try_from(allocated).unwrap()), (active, active));
        assert!(active > 50);
        assert_eq!(usage::verify_ledger(&world.app.db.sys).await.unwrap().mismatches, 0);
    }
}
