//! Leases of a tenant's monthly limit: how far servers may let its devices go without asking.
//!
//! A lease is a value that the sum of a counter may reach. Under the lock of the tenant's month holds: what was billed and
//! what is leased beyond the counters known are together no more than the limit. A report moves bytes from the second to the
//! first, a grant takes from what is left, and only what an agent no longer enforces comes back; so no race, no loss and no
//! restart of anything can pass the limit. Windows that span the end of a month are split between both by their length.

use std::collections::{BTreeMap, BTreeSet};

use cvault_node_protocol::MAX_LEASES;
use cvault_node_protocol::v1::{LeaseGrant, LeaseLife, LeaseState, Leases};
use cvault_types::ServerId;
use sqlx::PgConnection;
use time::{Date, Duration, OffsetDateTime};
use uuid::Uuid;

use super::arithmetic::MAX_PLAUSIBLE;
use crate::db::{DbError, Tx};

/// The most that one device may be granted at a time, as long as it is no more than a hundredth of the limit.
const MAX_GRANT: i64 = 64 << 20;
const LIMIT_PARTS: i64 = 100;
/// Near the limit a grant is no more than this part of what is left …
const LEFT_PARTS: i64 = 8;
/// … but not less than this while there is so much, or the last bytes would take for ever.
const MIN_GRANT: i64 = 1 << 20;
/// A list that comes later than this after it was made does not come any more: agents give up after ten seconds.
const LATE: Duration = Duration::seconds(30);
/// A device that has not transferred anything yet.
const FIRST_GRANT: i64 = 16 << 20;

/// Refuses what no correct agent sends.
#[must_use]
pub fn is_well_formed(leases: &Leases) -> bool {
    let is_state = |state: &LeaseState| {
        state.device_id.len() == 16 && state.total <= MAX_PLAUSIBLE && i64::try_from(state.generation).is_ok()
    };
    leases.counter_epoch.len() == 16
        && leases.peers.len() <= MAX_LEASES
        && leases.peers.iter().all(is_state)
        && (leases.stretch.is_none() || (!leases.complete && Stretch::told(leases).is_some()))
}

/// A life of a device's counters on one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Life {
    device: Uuid,
    generation: i64,
}

impl Life {
    fn of(device: &[u8], generation: u64) -> Option<Self> {
        Some(Self { device: Uuid::from_slice(device).ok()?, generation: i64::try_from(generation).ok()? })
    }
}

/// The lives of which the list has every one that is not over: behind one, up to and with another.
#[derive(Clone, Copy)]
struct Stretch {
    after: Life,
    through: Life,
}

impl Stretch {
    const ALL: Self = Self {
        after: Life { device: Uuid::nil(), generation: -1 },
        through: Life { device: Uuid::max(), generation: i64::MAX },
    };

    /// None when the list leaves lives out, or the ends are in no order.
    fn told(leases: &Leases) -> Option<Self> {
        let Some(told) = &leases.stretch else {
            return leases.complete.then_some(Self::ALL);
        };
        let end = |life: &Option<LeaseLife>, all| match life {
            Some(life) => Life::of(&life.device_id, life.generation),
            None => Some(all),
        };
        let (after, through) = (end(&told.after, Self::ALL.after)?, end(&told.through, Self::ALL.through)?);
        (after < through).then_some(Self { after, through })
    }
}

/// What a tenant has this month.
struct Month {
    limit: i64,
    billed: i64,
    /// Of all servers, beyond the counters known.
    leased: i64,
    /// Of the server that asks, in the epoch it asks about.
    known: BTreeMap<Life, Known>,
}

#[derive(Clone, Copy)]
struct Known {
    until: i64,
    sequence: i64,
    counted: i64,
    /// There is a row.
    stored: bool,
}

/// Takes back what the agent no longer enforces, grants what it wants and the limits allow. The statements of this lock the
/// months of the tenants concerned.
///
/// # Errors
/// Those of the database.
pub async fn lease(
    tx: &mut Tx,
    server: ServerId,
    asked: &Leases,
    now: OffsetDateTime,
) -> Result<Vec<LeaseGrant>, DbError> {
    let (conn, server) = (tx.conn(), server.uuid());
    let epoch = Uuid::from_slice(&asked.counter_epoch).unwrap_or_default();
    let states: BTreeMap<Life, &LeaseState> =
        asked.peers.iter().filter_map(|state| Some((life_of(state)?, state))).collect();
    let owners = owners(conn, server, &states).await?;
    let mut tenants: BTreeSet<Uuid> = owners.values().copied().collect();
    let whole = Stretch::told(asked);
    if let Some(stretch) = whole {
        tenants.extend(holders(conn, server, stretch).await?);
    }
    let tenants: Vec<_> = tenants.into_iter().collect();
    let month = now.date().replace_day(1).expect("every month has a first day");
    let billed = lock_months(conn, &tenants, month).await?;
    give_back(conn, server, epoch, &states).await?;
    if let Some(stretch) = whole {
        settle(conn, server, epoch, &states, stretch, now - LATE).await?;
    }
    let limits = limits(conn, &tenants).await?;
    let mut grants = Vec::new();
    for (tenant, limit) in limits {
        let lives: Vec<_> = owners.iter().filter(|(_, owner)| **owner == tenant).map(|(life, _)| *life).collect();
        let billed = billed.get(&tenant).copied().unwrap_or_default();
        let mut month = read_month(conn, tenant, server, epoch, limit, billed).await?;
        missing_counters(conn, server, epoch, &lives, &mut month).await?;
        let raised = month.grant(&lives, &states);
        write(conn, tenant, server, epoch, &raised, now).await?;
        let scarce = month.is_scarce();
        grants.extend(lives.iter().filter_map(|life| {
            let known = month.known.get(life).filter(|known| known.stored)?;
            Some(LeaseGrant {
                device_id: life.device.as_bytes().to_vec().into(),
                generation: u64::try_from(life.generation).ok()?,
                sequence: u64::try_from(known.sequence).ok()?,
                until: u64::try_from(known.until).ok()?,
                scarce,
            })
        }));
    }
    Ok(grants)
}

fn life_of(state: &LeaseState) -> Option<Life> {
    Life::of(&state.device_id, state.generation)
}

fn columns<'a>(lives: impl Iterator<Item = &'a Life>) -> (Vec<Uuid>, Vec<i64>) {
    lives.map(|life| (life.device, life.generation)).unzip()
}

impl Month {
    fn left(&self) -> i64 {
        self.limit.saturating_sub(self.billed).saturating_sub(self.leased).max(0)
    }

    fn most(&self) -> i64 {
        MAX_GRANT.min(self.limit / LIMIT_PARTS)
    }

    fn is_scarce(&self) -> bool {
        self.left() < 2 * self.most().max(MIN_GRANT)
    }

    /// Raises the leases of those that want it, as far as there is something left. Answers those that are new.
    fn grant(&mut self, lives: &[Life], states: &BTreeMap<Life, &LeaseState>) -> Vec<(Life, Known)> {
        let mut raised = Vec::new();
        for life in lives {
            let Some(state) = states.get(life).filter(|state| state.wanted) else { continue };
            let total = i64::try_from(state.total).unwrap_or(i64::MAX);
            let unknown = Known { until: 0, sequence: 0, counted: 0, stored: false };
            let mut known = self.known.get(life).copied().unwrap_or(unknown);
            let left = self.left();
            let size = if total == 0 { FIRST_GRANT } else { MAX_GRANT };
            let size = size.min(self.most().max(MIN_GRANT)).min((left / LEFT_PARTS).max(MIN_GRANT));
            // everything beyond the counter is reserved already, or is now
            let held = known.until.max(known.counted);
            let wanted = total.max(known.counted).saturating_add(size).saturating_sub(held);
            let more = wanted.min(left);
            if more <= 0 {
                continue;
            }
            known = Known { until: held + more, sequence: known.sequence + 1, stored: true, ..known };
            self.leased = self.leased.saturating_add(more);
            self.known.insert(*life, known);
            raised.push((*life, known));
        }
        raised
    }
}

/// Whose the lives are that run on the server.
async fn owners(
    conn: &mut PgConnection,
    server: Uuid,
    states: &BTreeMap<Life, &LeaseState>,
) -> Result<BTreeMap<Life, Uuid>, DbError> {
    let (devices, generations) = columns(states.keys());
    let rows = sqlx::query!(
        r#"select p.device_id, p.generation, p.tenant_id
           from platform.peers p
           join unnest($2::uuid[], $3::bigint[]) as a (device_id, generation)
                on a.device_id = p.device_id and a.generation = p.generation
           where p.server_id = $1 and p.removed_revision is null"#,
        server,
        &devices,
        &generations
    )
    .fetch_all(conn)
    .await?;
    let life = |device, generation| Life { device, generation };
    Ok(rows.into_iter().map(|row| (life(row.device_id, row.generation), row.tenant_id)).collect())
}

/// The tenants that have leases in a stretch of the server's.
async fn holders(conn: &mut PgConnection, server: Uuid, stretch: Stretch) -> Result<Vec<Uuid>, DbError> {
    let Stretch { after, through } = stretch;
    let rows = sqlx::query_scalar!(
        "select distinct tenant_id from platform.quota_leases
         where server_id = $1 and (device_id, generation) > ($2, $3::bigint)
           and (device_id, generation) <= ($4, $5::bigint)",
        server,
        after.device,
        after.generation,
        through.device,
        through.generation
    );
    Ok(rows.fetch_all(conn).await?)
}

/// In the order of their ids, as the ledger does. Answers what was billed to each.
async fn lock_months(conn: &mut PgConnection, tenants: &[Uuid], month: Date) -> Result<BTreeMap<Uuid, i64>, DbError> {
    sqlx::query!(
        "insert into platform.quota_months (tenant_id, month, bytes)
         select t, $2, 0 from unnest($1::uuid[]) as t order by t
         on conflict on constraint quota_months_pkey do nothing",
        tenants,
        month
    )
    .execute(&mut *conn)
    .await?;
    let rows = sqlx::query!(
        "select tenant_id, bytes from platform.quota_months
         where month = $2 and tenant_id = any($1) order by tenant_id for no key update",
        tenants,
        month
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.tenant_id, row.bytes)).collect())
}

/// An agent that names the newest grant enforces what it says, and nothing above it is under way.
async fn give_back(
    conn: &mut PgConnection,
    server: Uuid,
    epoch: Uuid,
    states: &BTreeMap<Life, &LeaseState>,
) -> Result<(), DbError> {
    let (devices, generations) = columns(states.keys());
    let column = |of: fn(&LeaseState) -> u64| {
        states.values().map(|state| i64::try_from(of(state)).unwrap_or(i64::MAX)).collect::<Vec<_>>()
    };
    sqlx::query!(
        "update platform.quota_leases l set until_bytes = a.until
         from unnest($3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[]) as a (device_id, generation, sequence, until)
         where l.server_id = $1 and l.counter_epoch = $2 and l.device_id = a.device_id and l.generation = a.generation
           and l.sequence = a.sequence and a.until < l.until_bytes",
        server,
        epoch,
        &devices,
        &generations,
        &column(|state| state.sequence),
        &column(|state| state.until),
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Lives of the stretch that are not on the list are over, and their counters known to the end. What was granted after `before` may be
/// younger than the list.
async fn settle(
    conn: &mut PgConnection,
    server: Uuid,
    epoch: Uuid,
    states: &BTreeMap<Life, &LeaseState>,
    stretch: Stretch,
    before: OffsetDateTime,
) -> Result<(), DbError> {
    let Stretch { after, through } = stretch;
    let (devices, generations) = columns(states.keys());
    sqlx::query!(
        "delete from platform.quota_leases l
         where l.server_id = $1 and l.granted_at < $5
           and (l.device_id, l.generation) > ($6, $7::bigint) and (l.device_id, l.generation) <= ($8, $9::bigint)
           and not (l.counter_epoch = $2 and exists (
             select from unnest($3::uuid[], $4::bigint[]) as a (device_id, generation)
             where a.device_id = l.device_id and a.generation = l.generation))",
        server,
        epoch,
        &devices,
        &generations,
        before,
        after.device,
        after.generation,
        through.device,
        through.generation
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Of those that have one and are open.
async fn limits(conn: &mut PgConnection, tenants: &[Uuid]) -> Result<Vec<(Uuid, i64)>, DbError> {
    let rows = sqlx::query!(
        r#"select tenant_id, bandwidth_limit_bytes as "limit!" from cvault.tenants
           where tenant_id = any($1) and bandwidth_limit_bytes is not null and status in ('active', 'trial')
           order by tenant_id"#,
        tenants
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| (row.tenant_id, row.limit)).collect())
}

async fn read_month(
    conn: &mut PgConnection,
    tenant: Uuid,
    server: Uuid,
    epoch: Uuid,
    limit: i64,
    billed: i64,
) -> Result<Month, DbError> {
    let rows = sqlx::query!(
        r#"select l.server_id, l.counter_epoch, l.device_id, l.generation, l.until_bytes, l.sequence,
                  coalesce(c.rx_bytes + c.tx_bytes, 0) as "counted!"
           from platform.quota_leases l
           left join platform.usage_counters c using (server_id, counter_epoch, device_id, generation)
           where l.tenant_id = $1"#,
        tenant
    )
    .fetch_all(conn)
    .await?;
    let mut month = Month { limit, billed, leased: 0, known: BTreeMap::new() };
    for row in rows {
        month.leased = month.leased.saturating_add((row.until_bytes - row.counted).max(0));
        if row.server_id == server && row.counter_epoch == epoch {
            let life = Life { device: row.device_id, generation: row.generation };
            let known = Known { until: row.until_bytes, sequence: row.sequence, counted: row.counted, stored: true };
            month.known.insert(life, known);
        }
    }
    Ok(month)
}

/// What is counted of lives that have no lease yet: they may have run without a limit.
async fn missing_counters(
    conn: &mut PgConnection,
    server: Uuid,
    epoch: Uuid,
    lives: &[Life],
    month: &mut Month,
) -> Result<(), DbError> {
    let (devices, generations) = columns(lives.iter().filter(|life| !month.known.contains_key(*life)));
    if devices.is_empty() {
        return Ok(());
    }
    let rows = sqlx::query!(
        r#"select c.device_id, c.generation, c.rx_bytes + c.tx_bytes as "counted!"
           from platform.usage_counters c
           join unnest($3::uuid[], $4::bigint[]) as a (device_id, generation)
                on a.device_id = c.device_id and a.generation = c.generation
           where c.server_id = $1 and c.counter_epoch = $2"#,
        server,
        epoch,
        &devices,
        &generations
    )
    .fetch_all(conn)
    .await?;
    for row in rows {
        let life = Life { device: row.device_id, generation: row.generation };
        month.known.insert(life, Known { until: 0, sequence: 0, counted: row.counted, stored: false });
    }
    Ok(())
}

async fn write(
    conn: &mut PgConnection,
    tenant: Uuid,
    server: Uuid,
    epoch: Uuid,
    raised: &[(Life, Known)],
    now: OffsetDateTime,
) -> Result<(), DbError> {
    if raised.is_empty() {
        return Ok(());
    }
    let (devices, generations) = columns(raised.iter().map(|(life, _)| life));
    let untils: Vec<_> = raised.iter().map(|(_, known)| known.until).collect();
    let sequences: Vec<_> = raised.iter().map(|(_, known)| known.sequence).collect();
    sqlx::query!(
        "insert into platform.quota_leases (tenant_id, server_id, counter_epoch, device_id, generation, until_bytes,
                                            sequence, granted_at)
         select $1, $2, $3, r.*, $8 from unnest($4::uuid[], $5::bigint[], $6::bigint[], $7::bigint[]) as r
         on conflict on constraint quota_leases_pkey do update
         set until_bytes = excluded.until_bytes, sequence = excluded.sequence, granted_at = excluded.granted_at",
        tenant,
        server,
        epoch,
        &devices,
        &generations,
        &untils,
        &sequences,
        now
    )
    .execute(conn)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests;
