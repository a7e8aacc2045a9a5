//! The devices of a tenant that is suspended, or has used up what it may carry in a month, and of a user that is disabled,
//! leave their servers; they come back when that is over.
//!
//! The tenant's status and limit are what counts; this work follows it, a chunk at a time, so that neither a large tenant nor a
//! fault in between holds anything up: what is left is found by the next run, on whatever replica.

use cvault_types::{DeviceId, ServerId, TenantId};
use sqlx::PgPool;
use time::OffsetDateTime;

use crate::app::App;
use crate::db::DbError;
use crate::servers;
use crate::sessions;
use crate::tenancy::TenantTx;

/// Devices in one transaction, which holds the rows of their servers: some tens of milliseconds.
const CHUNK: i64 = 100;
/// Tenants in one run; the others are found by the next.
const TENANTS: i64 = 100;

/// Brings devices in line with the status of their tenants. Returns how many were taken off or put back.
///
/// # Errors
/// Those of the database.
pub async fn enforce(app: &App) -> Result<u64, DbError> {
    let tenants = sqlx::query!(
        r#"select t.tenant_id, t.status = 'suspended' or t.over_limit_since is not null as "closed!"
           from cvault.tenants t
           where (t.status = 'suspended' or t.over_limit_since is not null and t.status in ('active', 'trial'))
                   and exists (select from cvault.devices d
                       where d.tenant_id = t.tenant_id and d.status = 'active' and not d.suspended)
              or t.status in ('active', 'trial') and t.over_limit_since is null
                   and (exists (select from cvault.devices d join cvault.users u using (tenant_id, user_id)
                           where d.tenant_id = t.tenant_id and d.status = 'active' and d.suspended and u.status = 'active')
                       or exists (select from cvault.users u join cvault.devices d using (tenant_id, user_id)
                           where u.tenant_id = t.tenant_id and u.status = 'disabled' and d.status = 'active'
                             and not d.suspended))
           limit $1"#,
        TENANTS
    )
    .fetch_all(&app.db.sys)
    .await?;
    let mut done = 0;
    for row in tenants {
        let tenant = TenantId::from_uuid(row.tenant_id);
        done +=
            if row.closed { move_all(app, tenant, Which::Placed).await? } else { enforce_users(app, tenant).await? };
    }
    Ok(done)
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
    /// All that are on a server: to be taken off.
    Placed,
    /// Those of disabled users that are on a server: to be taken off.
    PlacedOfDisabled,
    /// Those that were taken off, of users that are not disabled: to be put back.
    SuspendedOfActive,
}

async fn move_all(app: &App, tenant: TenantId, which: Which) -> Result<u64, DbError> {
    let mut done = 0;
    loop {
        let now = app.clock.now();
        let mut tx = app.db.tenancy.begin(tenant).await?;
        let work = match which {
            Which::Placed | Which::PlacedOfDisabled => take_off(&mut tx, which, now).await,
            Which::SuspendedOfActive => put_back(&mut tx, now).await,
        };
        let chunk = tx.finish(work).await?;
        chunk.servers.iter().for_each(|server| app.nodes.server_changed(*server));
        done += chunk.moved;
        // those that no server takes now are tried again by the next run
        if chunk.moved == 0 || chunk.moved < CHUNK.unsigned_abs() {
            return Ok(done);
        }
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
         )
         update cvault.tenants t set over_limit_since = case when used.over then $1::timestamptz end
         from used
         where t.tenant_id = used.tenant_id and coalesce(used.over, false) <> (t.over_limit_since is not null)",
        now
    )
    .execute(sys)
    .await?;
    Ok(changed.rows_affected())
}

/// What a transaction did, and the servers that are to be told.
#[derive(Default)]
struct Chunk {
    moved: u64,
    servers: Vec<ServerId>,
}

async fn take_off(tx: &mut TenantTx, which: Which, now: OffsetDateTime) -> Result<Chunk, DbError> {
    let mut chunk = Chunk::default();
    for (device, server) in devices(tx, which).await? {
        let tenant = tx.tenant().uuid();
        sessions::close(tx, device, now).await?;
        if which == Which::PlacedOfDisabled {
            // no row: the user was enabled meanwhile
            sqlx::query_scalar!("select platform.suspend_user_peer($1)", device.uuid())
                .fetch_optional(tx.conn())
                .await?;
        } else {
            sqlx::query_scalar!("select platform.suspend_peer($1)", device.uuid()).fetch_one(tx.conn()).await?;
        }
        sqlx::query!(
            "update cvault.devices set suspended = true where tenant_id = $1 and device_id = $2",
            tenant,
            device.uuid()
        )
        .execute(tx.conn())
        .await?;
        chunk.moved += 1;
        chunk.servers.push(server);
    }
    Ok(chunk)
}

/// Each to the server it was on, or, when that takes no devices, to the least loaded one of its pool.
async fn put_back(tx: &mut TenantTx, now: OffsetDateTime) -> Result<Chunk, DbError> {
    let mut chunk = Chunk::default();
    let mut servers = servers::list(tx).await?;
    for (device, server) in devices(tx, Which::SuspendedOfActive).await? {
        let Some(home) = servers.iter().position(|candidate| candidate.id == server) else { continue };
        let (stays, pool) = (servers[home].active && servers[home].peers < servers[home].capacity, servers[home].pool);
        let others = || {
            let takes = |server: &servers::Server| server.pool == pool && server.takes_devices(now);
            (0..servers.len()).filter(|at| takes(&servers[*at])).min_by_key(|at| servers[*at].load())
        };
        let Some(target) = stays.then_some(home).or_else(others) else { continue };
        servers[target].peers += 1;
        let target = &servers[target];
        let tenant = tx.tenant().uuid();
        sqlx::query!(
            "update cvault.devices set suspended = false where tenant_id = $1 and device_id = $2",
            tenant,
            device.uuid()
        )
        .execute(tx.conn())
        .await?;
        sqlx::query_scalar!("select platform.move_peer($1, $2)", device.uuid(), target.id.uuid())
            .fetch_one(tx.conn())
            .await?;
        chunk.moved += 1;
        chunk.servers.push(target.id);
    }
    Ok(chunk)
}

/// Locked; those that somebody else is at are left to the next run. Ordered by server, as everything that locks several.
async fn devices(tx: &mut TenantTx, which: Which) -> Result<Vec<(DeviceId, ServerId)>, DbError> {
    let tenant = tx.tenant().uuid();
    let of_disabled = match which {
        Which::Placed => None,
        Which::PlacedOfDisabled => Some(true),
        Which::SuspendedOfActive => Some(false),
    };
    let rows = sqlx::query!(
        "select d.device_id, d.server_id
         from cvault.devices d join cvault.users u on u.tenant_id = d.tenant_id and u.user_id = d.user_id
         where d.tenant_id = $1 and d.status = 'active' and d.suspended = $2
           and ($4::boolean is null or (u.status = 'disabled') = $4)
         order by d.server_id, d.device_id limit $3 for no key update of d skip locked",
        tenant,
        which == Which::SuspendedOfActive,
        CHUNK,
        of_disabled
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|row| (DeviceId::from_uuid(row.device_id), ServerId::from_uuid(row.server_id))).collect())
}

#[cfg(test)]
mod tests {
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
        let refused = world.register(person, "another").await.map(drop).unwrap_err();
        let exceeded = RegisterError::BandwidthLimit { max: 2_000_000_000, used: 2_000_000_000 };
        assert_eq!(refused.to_string(), exceeded.to_string());
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
        assert_eq!(peers(&world, server).await, 1);

        set_status(&world, person, TenantStatus::Active).await;
        assert_eq!(enforce(&world.app).await.unwrap(), count as u64);
        assert_eq!(peers(&world, server).await, count + 1);
        let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
        let devices = crate::devices::list(&mut tx, person.user, None, 1000).await.unwrap();
        assert_eq!(devices.iter().map(|device| device.addresses).collect::<Vec<_>>(), addresses);
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
}
