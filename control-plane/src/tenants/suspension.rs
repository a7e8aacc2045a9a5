//! The devices of a tenant that is suspended, or has used up what it may carry in a month, and of a user that is disabled,
//! leave their servers; they come back when that is over.
//!
//! The tenant's status and limit are what counts; this work follows it, a chunk at a time, so that neither a large tenant nor a
//! fault in between holds anything up: what is left is found by the next run, on whatever replica.

use cvault_types::{DeviceId, PoolId, ServerId, TenantId};
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::app::App;
use crate::db::DbError;
use crate::servers;
use crate::sessions;
use crate::tenancy::TenantTx;

/// Devices in one transaction, which holds the rows of their servers: some tens of milliseconds.
const CHUNK: i64 = 100;
/// Tenants looked up at once.
const TENANTS: i64 = 100;

/// Brings devices in line with the status of their tenants: first all that are to be off, then those that some server takes
/// back. Returns how many were taken off or put back.
///
/// # Errors
/// The first fault; one tenant's does not keep the others.
pub async fn enforce(app: &App) -> Result<u64, DbError> {
    let (mut done, mut fault) = (0, None);
    for which in [Which::Placed, Which::PlacedOfDisabled, Which::SuspendedOfActive] {
        let mut after = Uuid::nil();
        loop {
            let tenants = concerned(&app.db.sys, which, after).await?;
            for tenant in &tenants {
                match move_all(app, TenantId::from_uuid(*tenant), which).await {
                    Ok(moved) => done += moved,
                    Err(error) => fault = fault.or(Some(error)),
                }
            }
            match tenants.last() {
                Some(last) if tenants.len() as u64 == TENANTS.unsigned_abs() => after = *last,
                Some(_) | None => break,
            }
        }
    }
    fault.map_or(Ok(done), Err)
}

/// The next tenants that have such devices, in the order of their ids: none is passed over.
async fn concerned(sys: &PgPool, which: Which, after: Uuid) -> Result<Vec<Uuid>, DbError> {
    let tenants = match which {
        Which::Placed => {
            sqlx::query_scalar!(
                "select t.tenant_id from cvault.tenants t
                 where (t.status = 'suspended' or t.over_limit_since is not null and t.status in ('active', 'trial'))
                   and t.tenant_id > $1
                   and exists (select from cvault.devices d
                               where d.tenant_id = t.tenant_id and d.status = 'active' and not d.suspended)
                 order by t.tenant_id limit $2",
                after,
                TENANTS
            )
            .fetch_all(sys)
            .await?
        }
        Which::PlacedOfDisabled => {
            sqlx::query_scalar!(
                "select distinct u.tenant_id
                 from cvault.users u join cvault.devices d using (tenant_id, user_id)
                     join cvault.tenants t using (tenant_id)
                 where u.status = 'disabled' and d.status = 'active' and not d.suspended
                   and t.status in ('active', 'trial') and t.over_limit_since is null and u.tenant_id > $1
                 order by u.tenant_id limit $2",
                after,
                TENANTS
            )
            .fetch_all(sys)
            .await?
        }
        Which::SuspendedOfActive => {
            sqlx::query_scalar!(
                "select distinct d.tenant_id
                 from cvault.devices d join cvault.users u using (tenant_id, user_id)
                     join cvault.tenants t using (tenant_id)
                 where d.suspended and d.status = 'active' and u.status = 'active'
                   and t.status in ('active', 'trial') and t.over_limit_since is null and d.tenant_id > $1
                   -- as long as no server of its pool takes a device there is nothing to be done
                   and exists (select from platform.servers s join platform.servers home on home.pool_id = s.pool_id
                               where home.server_id = d.server_id and s.status = 'active' and s.peer_count < s.capacity)
                 order by d.tenant_id limit $2",
                after,
                TENANTS
            )
            .fetch_all(sys)
            .await?
        }
    };
    Ok(tenants)
}

/// Brings the devices of an open tenant in line with the status of their users. Returns how many were taken off or put back.
///
/// # Errors
/// Those of the database.
pub async fn enforce_users(app: &App, tenant: TenantId) -> Result<u64, DbError> {
    Ok(move_all(app, tenant, Which::PlacedOfDisabled).await? + move_all(app, tenant, Which::SuspendedOfActive).await?)
}

/// Which devices a run is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// All of a closed tenant that are on a server: to be taken off.
    Placed,
    /// Those of disabled users that are on a server: to be taken off.
    PlacedOfDisabled,
    /// Those that were taken off, of users that are not disabled: to be put back.
    SuspendedOfActive,
}

async fn move_all(app: &App, tenant: TenantId, which: Which) -> Result<u64, DbError> {
    let (mut done, mut after) = (0, None);
    loop {
        let now = app.clock.now();
        let mut tx = app.db.tenancy.begin(tenant).await?;
        let work = move_chunk(&mut tx, which, after, now).await;
        let chunk = match tx.finish(work).await {
            // a server that was chosen has filled up or closed meanwhile: the next run chooses again
            Err(error) if error.constraint() == Some("servers_open_for_peers") => return Ok(done),
            chunk => chunk?,
        };
        chunk.servers.iter().for_each(|server| app.nodes.server_changed(*server));
        done += chunk.servers.len() as u64;
        // those that no server takes now are passed over, and tried again by the next run
        let Some(last) = chunk.more_after else { return Ok(done) };
        after = Some(last);
    }
}

/// Marks the tenants that have reached their limit of this month, UTC, and those that are below it again. Returns how many
/// changed. What they have used is known to the minute (`usage_daily`); their traffic has ended before, at the byte, with its
/// leases. A tenant whose traffic is throttled stays open.
///
/// # Errors
/// Those of the database.
pub async fn mark_over_limit(sys: &PgPool, now: OffsetDateTime) -> Result<u64, DbError> {
    let changed = sqlx::query!(
        "with used as (
             -- 20 bytes are the smallest packet: with less left nothing passes any more
             select t.tenant_id, t.over_quota = 'block' and t.bandwidth_limit_bytes - 20 < (
                 select coalesce(sum(u.rx_bytes + u.tx_bytes), 0) from cvault.usage_daily u
                 where u.tenant_id = t.tenant_id
                   and u.day >= date_trunc('month', $1::timestamptz, 'UTC')::date) as over
             from cvault.tenants t
             where t.bandwidth_limit_bytes is not null or t.over_limit_since is not null
         ), changed as (
             select t.tenant_id, used.over
             from cvault.tenants t join used using (tenant_id)
             where coalesce(used.over, false) <> (t.over_limit_since is not null)
             -- one order for all replicas
             order by t.tenant_id for no key update of t
         )
         update cvault.tenants t set over_limit_since = case when changed.over then $1::timestamptz end
         from changed
         where t.tenant_id = changed.tenant_id",
        now
    )
    .execute(sys)
    .await?;
    Ok(changed.rows_affected())
}

/// What a transaction did: a server to be told for each device it moved.
#[derive(Default)]
struct Chunk {
    servers: Vec<ServerId>,
    /// There may be more devices after this one.
    more_after: Option<Placing>,
}

/// A device and the server it is on, or was on.
#[derive(Debug, Clone, Copy)]
struct Placing {
    server: ServerId,
    device: DeviceId,
    /// Of its address.
    pool: PoolId,
}

async fn move_chunk(
    tx: &mut TenantTx,
    which: Which,
    after: Option<Placing>,
    now: OffsetDateTime,
) -> Result<Chunk, DbError> {
    let concerned = match which {
        Which::Placed => is_closed(tx).await?,
        Which::PlacedOfDisabled => true,
        Which::SuspendedOfActive => !is_closed(tx).await?,
    };
    if !concerned {
        return Ok(Chunk::default());
    }
    let found = devices(tx, which, after).await?;
    let more_after = found.last().copied().filter(|_| found.len() as u64 == CHUNK.unsigned_abs());
    let servers = match which {
        Which::Placed | Which::PlacedOfDisabled => take_off(tx, which, found, now).await?,
        Which::SuspendedOfActive => put_back(tx, found, now).await?,
    };
    Ok(Chunk { servers, more_after })
}

/// Whether the tenant is suspended, gone or over its limit; it stays so until the transaction ends.
async fn is_closed(tx: &mut TenantTx) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    let closed = sqlx::query_scalar!(
        r#"select status not in ('active', 'trial') or over_limit_since is not null as "closed!"
           from cvault.tenants where tenant_id = $1 for share"#,
        tenant
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(closed.unwrap_or_default())
}

async fn take_off(
    tx: &mut TenantTx,
    which: Which,
    found: Vec<Placing>,
    now: OffsetDateTime,
) -> Result<Vec<ServerId>, DbError> {
    for Placing { device, .. } in &found {
        sessions::close(tx, *device, now).await?;
    }
    mark(tx, &found, true).await?;
    // last: from here to COMMIT the servers' rows are locked, in the order of their ids
    for Placing { device, .. } in &found {
        let device = device.uuid();
        if which == Which::PlacedOfDisabled {
            sqlx::query_scalar!("select platform.suspend_user_peer($1)", device).fetch_one(tx.conn()).await?;
        } else {
            sqlx::query_scalar!("select platform.suspend_peer($1)", device).fetch_one(tx.conn()).await?;
        }
    }
    Ok(found.into_iter().map(|placing| placing.server).collect())
}

/// Each to the server it was on, or, when that takes no devices, is gone or lost, to the least loaded one of its pool. Where
/// none answers now, its own has it back when it answers again.
async fn put_back(tx: &mut TenantTx, found: Vec<Placing>, now: OffsetDateTime) -> Result<Vec<ServerId>, DbError> {
    let mut servers = servers::list(tx).await?;
    let mut targets = Vec::new();
    for placing in found {
        let home = servers.iter().position(|candidate| candidate.id == placing.server);
        let others = || {
            let takes = |server: &servers::Server| server.pool == placing.pool && server.takes_devices(now);
            (0..servers.len()).filter(|at| takes(&servers[*at])).min_by_key(|at| servers[*at].load())
        };
        let target = home.filter(|home| servers[*home].has_room() && !servers[*home].is_lost(now)).or_else(others);
        let target = target.or_else(|| home.filter(|home| servers[*home].has_room()));
        let Some(target) = target else { continue };
        servers[target].peers += 1;
        targets.push(Placing { server: servers[target].id, ..placing });
    }
    mark(tx, &targets, false).await?;
    // last: from here to COMMIT the servers' rows are locked, in the order of their ids
    targets.sort_by_key(|placing| placing.server);
    for Placing { device, server, .. } in &targets {
        sqlx::query_scalar!("select platform.move_peer($1, $2)", device.uuid(), server.uuid())
            .fetch_one(tx.conn())
            .await?;
    }
    Ok(targets.into_iter().map(|placing| placing.server).collect())
}

async fn mark(tx: &mut TenantTx, devices: &[Placing], suspended: bool) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    let devices: Vec<Uuid> = devices.iter().map(|placing| placing.device.uuid()).collect();
    sqlx::query!(
        "update cvault.devices set suspended = $3 where tenant_id = $1 and device_id = any ($2)",
        tenant,
        &devices,
        suspended
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Locked; those that somebody else is at are left to the next run. Their users stay what they are meanwhile. Ordered by
/// server, as everything that locks several.
///
/// Three statements, as different indexes serve them: `devices_suspended` those that were taken off.
async fn devices(tx: &mut TenantTx, which: Which, after: Option<Placing>) -> Result<Vec<Placing>, DbError> {
    let tenant = tx.tenant().uuid();
    let (server, device) =
        after.map_or((Uuid::nil(), Uuid::nil()), |placing| (placing.server.uuid(), placing.device.uuid()));
    let rows = match which {
        Which::Placed => {
            sqlx::query_as!(
                PlacingRow,
                "select d.server_id, d.device_id, d.pool_id
                 from cvault.devices d join cvault.users u on u.tenant_id = d.tenant_id and u.user_id = d.user_id
                 where d.tenant_id = $1 and d.status = 'active' and not d.suspended
                   and (d.server_id, d.device_id) > ($3, $4)
                 order by d.server_id, d.device_id limit $2 for share of u for no key update of d skip locked",
                tenant,
                CHUNK,
                server,
                device
            )
            .fetch_all(tx.conn())
            .await?
        }
        Which::PlacedOfDisabled => {
            sqlx::query_as!(
                PlacingRow,
                "select d.server_id, d.device_id, d.pool_id
                 from cvault.devices d join cvault.users u on u.tenant_id = d.tenant_id and u.user_id = d.user_id
                 where d.tenant_id = $1 and d.status = 'active' and not d.suspended and u.status = 'disabled'
                   and (d.server_id, d.device_id) > ($3, $4)
                 order by d.server_id, d.device_id limit $2 for share of u for no key update of d skip locked",
                tenant,
                CHUNK,
                server,
                device
            )
            .fetch_all(tx.conn())
            .await?
        }
        Which::SuspendedOfActive => {
            sqlx::query_as!(
                PlacingRow,
                "select d.server_id, d.device_id, d.pool_id
                 from cvault.devices d join cvault.users u on u.tenant_id = d.tenant_id and u.user_id = d.user_id
                 where d.tenant_id = $1 and d.status = 'active' and d.suspended and u.status <> 'disabled'
                   and (d.server_id, d.device_id) > ($3, $4)
                 order by d.server_id, d.device_id limit $2 for share of u for no key update of d skip locked",
                tenant,
                CHUNK,
                server,
                device
            )
            .fetch_all(tx.conn())
            .await?
        }
    };
    Ok(rows.into_iter().map(Placing::from).collect())
}

struct PlacingRow {
    server_id: Uuid,
    device_id: Uuid,
    pool_id: Uuid,
}

impl From<PlacingRow> for Placing {
    fn from(row: PlacingRow) -> Self {
        Self {
            server: ServerId::from_uuid(row.server_id),
            device: DeviceId::from_uuid(row.device_id),
            pool: PoolId::from_uuid(row.pool_id),
        }
    }
}

#[cfg(test)]
mod tests {
    use cvault_types::RequestId;
    use cvault_types::tenant::{TenantStatus, UpdateTenantRequest};

    use super::*;
    use crate::desired::{self, Update};
    use crate::devices::RegisterError;
    use crate::tenants::{self, Actor};
    use crate::testing::{Person, World};

    async fn set_status(world: &World, person: Person, status: TenantStatus) {
        let request = UpdateTenantRequest { status: Some(status), ..UpdateTenantRequest::default() };
        let actor = Actor { name: "test".to_owned(), request_id: None };
        tenants::update(&world.app, person.tenant, request, &actor).await.map_err(|_| "refused").unwrap();
    }

    #[tokio::test]
    async fn a_tenant_that_has_used_up_its_month_is_off_until_its_limit_is_raised() {
        let (world, server) = World::with_server().await;
        let person = world.person().await;
        let device = world.register(person, "d").await.unwrap();
        let limit = async |gb: Option<i64>| {
            let request = UpdateTenantRequest { bandwidth_limit_gb: Some(gb), ..UpdateTenantRequest::default() };
            let actor = Actor { name: "test".to_owned(), request_id: None };
            tenants::update(&world.app, person.tenant, request, &actor).await.map_err(|_| "refused").unwrap();
        };
        let mark = async || tenants::mark_over_limit(&world.app.db.sys, world.app.clock.now()).await.unwrap();
        limit(Some(2)).await;
        let used = |bytes: i64| {
            sqlx::query(
                "insert into cvault.usage_daily (tenant_id, day, rx_bytes, tx_bytes) values ($1, $2, $3, 1)
                 on conflict (tenant_id, day) do update set rx_bytes = excluded.rx_bytes",
            )
            .bind(person.tenant.uuid())
            .bind(world.app.clock.now().date())
            .bind(bytes)
            .execute(&world.app.db.sys)
        };
        used(2_000_000_000 - 21).await.unwrap();
        assert_eq!((mark().await, enforce(&world.app).await.unwrap()), (0, 0), "one packet is left");
        used(2_000_000_000 - 1).await.unwrap();
        assert_eq!((mark().await, enforce(&world.app).await.unwrap()), (1, 1));
        assert_eq!((mark().await, peers(&world, server).await), (0, 0));
        assert_eq!(enforce_users(&world.app, person.tenant).await.unwrap(), 0, "whose users change meanwhile");
        let refused = world.register(person, "another").await.map(drop).unwrap_err();
        let RegisterError::BandwidthLimit(used_up) = refused else { panic!("{refused}") };
        assert_eq!((used_up.max, used_up.used), (2_000_000_000, 2_000_000_000));
        assert!(world.rotate(person, device.id, None).await.is_err());

        limit(Some(3)).await;
        assert_eq!((mark().await, enforce(&world.app).await.unwrap()), (1, 1));
        assert_eq!(peers(&world, server).await, 1);
        used(3_000_000_000).await.unwrap();
        assert_eq!((mark().await, enforce(&world.app).await.unwrap()), (1, 1));
        limit(None).await;
        assert_eq!((mark().await, enforce(&world.app).await.unwrap()), (1, 1));
        assert_eq!(peers(&world, server).await, 1);
    }

    async fn peers(world: &World, server: ServerId) -> usize {
        let update = desired::read(&world.app.db.sys, &world.app.keys, server, None).await.unwrap();
        let Update::Snapshot { peers, .. } = update else { panic!("{update:?}") };
        peers.len()
    }

    #[tokio::test]
    async fn a_suspension_takes_every_device_off_its_server_and_its_end_brings_them_back() {
        let (world, server) = World::with_server().await;
        let (person, other) = (world.person().await, world.person().await);
        world.register(other, "other").await.unwrap();
        let count = usize::try_from(CHUNK).unwrap() + 5;
        let mut addresses = Vec::new();
        for number in 0..count {
            addresses.push(world.register(person, &format!("d{number}")).await.unwrap().addresses);
        }
        assert_eq!(enforce(&world.app).await.unwrap(), 0);
        set_status(&world, person, TenantStatus::Suspended).await;
        assert_eq!(enforce(&world.app).await.unwrap(), count as u64);
        assert_eq!(enforce(&world.app).await.unwrap(), 0);
        assert_eq!(enforce_users(&world.app, person.tenant).await.unwrap(), 0, "whose users change meanwhile");
        assert_eq!(peers(&world, server).await, 1);

        set_status(&world, person, TenantStatus::Active).await;
        assert_eq!(enforce(&world.app).await.unwrap(), count as u64);
        assert_eq!(peers(&world, server).await, count + 1);
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let devices =
            crate::devices::list(&mut tx, crate::devices::Page { user: person.user, after: None, limit: 1000 })
                .await
                .unwrap();
        assert_eq!(devices.iter().map(|served| served.device.addresses).collect::<Vec<_>>(), addresses);
    }

    #[tokio::test]
    async fn what_was_under_way_when_a_tenant_was_suspended_gets_no_device_onto_a_server() {
        let (world, server) = World::with_server().await;
        let person = world.person().await;
        let device = world.register(person, "d").await.unwrap();
        set_status(&world, person, TenantStatus::Suspended).await;
        enforce(&world.app).await.unwrap();
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let refused = sqlx::query("select platform.move_peer($1, $2)")
            .bind(device.id.uuid())
            .bind(server.uuid())
            .execute(tx.conn())
            .await;
        assert_eq!(DbError::from(refused.unwrap_err()).constraint(), Some("peers_tenant_open"));
        drop(tx);
        world.revoke(person, device.id).await;
        set_status(&world, person, TenantStatus::Active).await;
        assert_eq!(enforce(&world.app).await.unwrap(), 0, "a deleted device does not come back");
        assert_eq!(peers(&world, server).await, 0);
    }

    #[tokio::test]
    async fn a_device_comes_back_to_another_server_when_its_own_is_drained() {
        let (world, first) = World::with_server().await;
        let person = world.person().await;
        world.register(person, "d").await.unwrap();
        set_status(&world, person, TenantStatus::Suspended).await;
        enforce(&world.app).await.unwrap();
        sqlx::query("update platform.servers set status = 'draining'").execute(&world.app.db.sys).await.unwrap();
        set_status(&world, person, TenantStatus::Active).await;
        assert_eq!(enforce(&world.app).await.unwrap(), 0, "there is no server");
        let second = world.server("s2", "default", "lab-2").await;
        assert_eq!(enforce(&world.app).await.unwrap(), 1);
        assert_eq!((peers(&world, first).await, peers(&world, second).await), (0, 1));
    }

    #[tokio::test]
    async fn a_device_comes_back_to_another_server_when_its_own_was_removed_meanwhile() {
        let (world, first) = World::with_server().await;
        let person = world.person().await;
        let (one, two, three) = (
            world.register(person, "one").await.unwrap(),
            world.register(person, "two").await.unwrap(),
            world.register(person, "three").await.unwrap(),
        );
        set_status(&world, person, TenantStatus::Suspended).await;
        assert_eq!(enforce(&world.app).await.unwrap(), 3);
        sqlx::query("update platform.servers set status = 'removed', identity_pin = null")
            .execute(&world.app.db.sys)
            .await
            .unwrap();
        set_status(&world, person, TenantStatus::Active).await;
        assert_eq!(enforce(&world.app).await.unwrap(), 0, "there is no server");
        let second = world.server("s2", "default", "lab-2").await;
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let (now, request) = (world.app.clock.now(), RequestId::from_uuid(Uuid::nil()));
        let connected = sessions::connect(&mut tx, person.user, one.id, None, now, request).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!((connected.server.id, connected.device.addresses), (second, one.addresses));
        let rotated = world.rotate(person, two.id, None).await.unwrap().device;
        assert_eq!((rotated.server.id, rotated.addresses), (second, two.addresses));
        assert_eq!(enforce(&world.app).await.unwrap(), 1, "whoever waits is put back by itself");
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let device = crate::devices::find(&mut tx, person.user, three.id).await.unwrap().unwrap();
        assert_eq!((device.server, device.addresses), (second, three.addresses));
        assert_eq!((peers(&world, first).await, peers(&world, second).await), (0, 3));
    }

    #[tokio::test]
    async fn a_device_comes_back_to_a_server_that_answers_and_to_its_own_when_none_does() {
        let (world, first) = World::with_server().await;
        let person = world.person().await;
        world.register(person, "d").await.unwrap();
        let second = world.server("s2", "default", "lab-2").await;
        let silent = |server: ServerId, minutes: i32| {
            sqlx::query(
                "update platform.servers set last_seen_at = now() - make_interval(mins => $2) where server_id = $1",
            )
            .bind(server.uuid())
            .bind(minutes)
            .execute(&world.app.db.sys)
        };
        let round = async || {
            set_status(&world, person, TenantStatus::Suspended).await;
            assert_eq!(enforce(&world.app).await.unwrap(), 1);
            set_status(&world, person, TenantStatus::Active).await;
            assert_eq!(enforce(&world.app).await.unwrap(), 1);
            (peers(&world, first).await, peers(&world, second).await)
        };
        silent(first, 10).await.unwrap();
        assert_eq!(round().await, (1, 0), "perhaps it is only not heard of");
        silent(first, 20).await.unwrap();
        assert_eq!(round().await, (0, 1));
        silent(second, 20).await.unwrap();
        assert_eq!(round().await, (0, 1));
    }

    #[tokio::test]
    async fn a_full_server_does_not_keep_the_devices_of_another_off() {
        let (world, full) = World::with_server().await;
        world.pool("second", "10.9.0.0/16", "fd00:cafe:1::/64", 0).await;
        let person = world.person().await;
        let count = usize::try_from(CHUNK).unwrap() + 1;
        for number in 0..count {
            world.register(person, &format!("d{number}")).await.unwrap();
        }
        let other = world.server("s2", "second", "lab-2").await;
        let enter = |server: ServerId, status: &'static str| {
            sqlx::query("update platform.servers set status = $2 where server_id = $1")
                .bind(server.uuid())
                .bind(status)
                .execute(&world.app.db.sys)
        };
        enter(full, "draining").await.unwrap();
        world.register(person, "elsewhere").await.unwrap();
        set_status(&world, person, TenantStatus::Suspended).await;
        assert_eq!(enforce(&world.app).await.unwrap(), count as u64 + 1);
        set_status(&world, person, TenantStatus::Active).await;
        assert_eq!(enforce(&world.app).await.unwrap(), 1, "those of the first server wait, in front of it");
        assert_eq!((peers(&world, full).await, peers(&world, other).await), (0, 1));
        enter(full, "active").await.unwrap();
        assert_eq!(enforce(&world.app).await.unwrap(), count as u64);
    }

    #[tokio::test]
    async fn tenants_that_wait_for_a_server_keep_nobody_waiting() {
        let (world, first) = World::with_server().await;
        let mut people = Vec::new();
        for _ in 0..=TENANTS {
            let person = world.person().await;
            world.register(person, "d").await.unwrap();
            set_status(&world, person, TenantStatus::Suspended).await;
            people.push(person);
        }
        let last = people.pop().unwrap();
        assert_eq!(enforce(&world.app).await.unwrap(), TENANTS.unsigned_abs() + 1);
        set_status(&world, last, TenantStatus::Active).await;
        assert_eq!(enforce(&world.app).await.unwrap(), 1);
        sqlx::query("update platform.servers set capacity = 1").execute(&world.app.db.sys).await.unwrap();
        for person in people {
            set_status(&world, person, TenantStatus::Active).await;
        }
        set_status(&world, last, TenantStatus::Suspended).await;
        assert_eq!(enforce(&world.app).await.unwrap(), 2, "one leaves, and one takes its place");
        assert_eq!(peers(&world, first).await, 1);
    }

    #[tokio::test]
    async fn a_device_whose_tenant_or_user_was_let_in_again_meanwhile_is_not_marked() {
        let (world, server) = World::with_server().await;
        let person = world.person().await;
        world.register(person, "d").await.unwrap();
        for which in [Which::Placed, Which::PlacedOfDisabled] {
            assert_eq!(move_all(&world.app, person.tenant, which).await.unwrap(), 0, "{which:?}");
        }
        assert_eq!(peers(&world, server).await, 1);
        assert_eq!(enforce(&world.app).await.unwrap(), 0);
    }
}
