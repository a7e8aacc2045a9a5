//! A platform of its own for each test: migrated database, tenants with users, servers that have enrolled.

use std::collections::BTreeSet;

use cvault_types::{RequestId, ServerId, TenantId, UserId};
use rand::SeedableRng;
use rand::rngs::StdRng;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::app::App;
use crate::config::{Config, Overrides};
use crate::db::Tx;
use crate::devices::{self, DeviceName, KeyRequest, NewDevice, RegisterError, Registered, Registration};
use crate::ipam::{self, NewPool};
use crate::keys::KeyRing;
use crate::postgres::scratch::ScratchDatabase;
use crate::serve;
use crate::servers::{self, NewServer, Removal, RemoveServerError};
use crate::tenants::Actor;

pub(crate) struct World {
    pub(crate) app: App,
    pub(crate) database: ScratchDatabase,
}

/// A tenant and one of its users.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Person {
    pub(crate) tenant: TenantId,
    pub(crate) user: UserId,
}

impl World {
    pub(crate) async fn new() -> Self {
        let database = ScratchDatabase::create().await.unwrap();
        let config = Config::from_env(&|_| None, &Overrides::default()).unwrap();
        let keys = KeyRing::single(Zeroizing::new([7; 32]));
        let app = serve::open(config, &database.config(), keys).await.unwrap();
        Self { app, database }
    }

    /// Past every policy.
    pub(crate) async fn superuser(&self) -> PgConnection {
        PgConnection::connect_with(&self.database.superuser()).await.unwrap()
    }

    /// The only one of a tenant.
    pub(crate) async fn person(&self) -> Person {
        let tenant = TenantId::from_uuid(Uuid::now_v7());
        let key = self.app.keys.new_data_key(tenant, &mut StdRng::from_os_rng());
        let mut tx = self.app.db.tenancy.begin(tenant).await.unwrap();
        sqlx::query!(
            "insert into cvault.tenants (tenant_id, name, max_devices_per_user, data_key_version, data_key_sealed)
             values ($1, 'T', 1000, $2, $3)",
            tenant.uuid(),
            key.kek_version,
            key.sealed
        )
        .execute(tx.conn())
        .await
        .unwrap();
        tx.commit().await.unwrap();
        self.user(tenant, "somebody@example.com").await
    }

    /// One more of a tenant.
    pub(crate) async fn user(&self, tenant: TenantId, email: &str) -> Person {
        let user = UserId::from_uuid(Uuid::now_v7());
        let mut tx = self.app.db.tenancy.begin(tenant).await.unwrap();
        sqlx::query!(
            "insert into cvault.users (tenant_id, user_id, email) values ($1, $2, $3)",
            tenant.uuid(),
            user.uuid(),
            email
        )
        .execute(tx.conn())
        .await
        .unwrap();
        tx.commit().await.unwrap();
        Person { tenant, user }
    }

    pub(crate) async fn pool(&self, name: &str, ipv4: &str, ipv6: &str, quarantine_seconds: u32) {
        let pool = NewPool {
            name: name.to_owned(),
            ipv4: ipv4.parse().unwrap(),
            ipv6: ipv6.parse().unwrap(),
            quarantine_seconds,
            reclaim: false,
        };
        ipam::create_pool(&self.app.db.sys, &pool).await.unwrap();
    }

    /// A server that looks enrolled and alive.
    pub(crate) async fn server(&self, name: &str, pool: &str, region: &str) -> ServerId {
        let id = Uuid::now_v7();
        let server = NewServer {
            name: name.to_owned(),
            region: region.to_owned(),
            public_ip: std::net::Ipv6Addr::from_bits(id.as_u128()).into(),
            endpoint_port: 51820,
            pool: pool.to_owned(),
            capacity: 65_000,
        };
        let id = servers::create_server(&self.app.db.sys, &server, &mut StdRng::from_os_rng()).await.unwrap();
        let pin: [u8; 32] = rand::random();
        sqlx::query!(
            "update platform.servers set public_key = $2, identity_pin = $2, last_seen_at = now() where server_id = $1",
            id.uuid(),
            pin.as_slice()
        )
        .execute(&self.app.db.sys)
        .await
        .unwrap();
        id
    }

    pub(crate) async fn remove_server(&self, id: ServerId, removal: Removal) -> Result<(), RemoveServerError> {
        let mut tx = Tx::begin(&self.app.db.sys).await?;
        let actor = Actor { name: "cli".to_owned(), request_id: None };
        let work = servers::remove_server(&mut tx, id, removal, &actor).await;
        tx.finish(work).await
    }

    /// One pool, one server.
    pub(crate) async fn with_server() -> (Self, ServerId) {
        let world = Self::new().await;
        world.pool("default", "10.8.0.0/16", "fd00:cafe::/64", 0).await;
        let server = world.server("s1", "default", "lab-1").await;
        (world, server)
    }

    pub(crate) async fn register(&self, person: Person, name: &str) -> Result<Registered, RegisterError> {
        let new = NewDevice {
            name: DeviceName::parse(name).unwrap(),
            platform: None,
            keys: KeyRequest { public_key: None, preshared: false },
            region: None,
        };
        let mut rng = StdRng::from_os_rng();
        let now = self.app.clock.now();
        let data_key = self.app.data_keys.sealed(&self.app.db.tenancy, person.tenant).await?.unwrap();
        let mut tx = self.app.db.tenancy.single(person.tenant).await?;
        let (keys, request) = (&self.app.keys, request_id());
        let device = Registration::new(person.tenant, person.user, new, keys, &data_key, &mut rng, request)?;
        let work = devices::register(&mut tx, device, now).await;
        tx.finish(work).await
    }

    pub(crate) async fn rotate(
        &self,
        person: Person,
        device: cvault_types::DeviceId,
        preshared: Option<bool>,
    ) -> Result<devices::Rotated, devices::RotateError> {
        let new = devices::NewDeviceKeys { device, public_key: None, preshared };
        let mut rng = StdRng::from_os_rng();
        let now = self.app.clock.now();
        let mut tx = self.app.db.tenancy.begin(person.tenant).await.map_err(RegisterError::from)?;
        let (keys, id) = (&self.app.keys, request_id());
        let work = devices::rotate(&mut tx, keys, person.user, new, now, &mut rng, id).await;
        match work {
            Ok(rotated) => {
                tx.commit().await.map_err(RegisterError::from)?;
                Ok(rotated)
            }
            Err(error) => {
                tx.rollback().await.map_err(RegisterError::from)?;
                Err(error)
            }
        }
    }

    pub(crate) async fn revoke(&self, person: Person, device: cvault_types::DeviceId) -> devices::Revoked {
        let mut tx = self.app.db.tenancy.begin(person.tenant).await.unwrap();
        let work = devices::revoke(&mut tx, person.user, device, self.app.clock.now(), request_id()).await;
        tx.finish(work).await.unwrap()
    }
}

pub(crate) fn request_id() -> RequestId {
    RequestId::from_uuid(Uuid::now_v7())
}

/// Until `count` sessions of the world's database wait for a lock.
pub(crate) async fn waiting(superuser: &mut PgConnection, count: i64) {
    eventually("others wait for a lock", std::time::Duration::from_secs(5), async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(distinct pid) from pg_locks l join pg_stat_activity a using (pid)
             where a.datname = current_database() and not l.granted",
        )
        .fetch_one(&mut *superuser)
        .await
        .unwrap();
        waiting >= count
    })
    .await;
}

/// Kills the backends of `role` that wait for a lock, again and again until `done`; tells which ones.
pub(crate) async fn kill_waiting(superuser: &mut PgConnection, role: &str, done: impl Fn() -> bool) -> BTreeSet<i32> {
    let mut killed = BTreeSet::new();
    eventually("everybody is told", std::time::Duration::from_secs(30), async || {
        let waiting: Vec<i32> = sqlx::query_scalar(
            "with waiting as materialized (
                 select distinct pid from pg_stat_activity a join pg_locks l using (pid)
                 where a.datname = current_database() and a.usename = $1 and not l.granted)
             select pid from waiting where pg_terminate_backend(pid)",
        )
        .bind(role)
        .fetch_all(&mut *superuser)
        .await
        .unwrap();
        killed.extend(waiting);
        done()
    })
    .await;
    killed
}

/// Asks until the answer is yes; fails at the deadline.
pub(crate) async fn eventually(what: &str, within: std::time::Duration, mut check: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + within;
    let mut pause = tokio::time::interval(std::time::Duration::from_millis(20));
    loop {
        pause.tick().await;
        if check().await {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "not in time: {what}");
    }
}
