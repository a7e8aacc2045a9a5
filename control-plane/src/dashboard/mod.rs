//! What the portal's first pages show of a tenant. Bytes are read from the ledger's hours each time, never from a copy, so
//! that they are what is billed.

mod activity;

use cvault_types::ServerId;
use time::{Date, Duration, OffsetDateTime};
use uuid::Uuid;

use crate::db::DbError;
use crate::tenancy::TenantTx;
use crate::usage::Period;

pub use activity::{Event, activity};

/// The last `days` days, UTC, today included.
#[must_use]
pub fn last_days(days: u16, now: OffsetDateTime) -> Period {
    let first = now.date() - Duration::days(i64::from(days.max(1)) - 1);
    Period { from: first.midnight().assume_utc(), to: now }
}

/// What a tenant has now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Present {
    pub users: i64,
    pub devices: i64,
    /// Devices with an open session.
    pub connected_devices: i64,
}

/// # Errors
/// Those of the database.
pub async fn present(tx: &mut TenantTx) -> Result<Present, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select (select count(*) from cvault.users
                   where tenant_id = $1 and status <> 'deleted' and deleting_since is null) as "users!",
                  (select count(*) from cvault.devices where tenant_id = $1 and status = 'active') as "devices!",
                  (select count(*) from cvault.sessions where tenant_id = $1 and status = 'active') as "connected!""#,
        tenant
    )
    .fetch_one(tx.conn())
    .await?;
    Ok(Present { users: row.users, devices: row.devices, connected_devices: row.connected })
}

/// Calls with the tenant's keys on each day of the period on which there were any.
///
/// # Errors
/// Those of the database.
pub async fn api_calls(tx: &mut TenantTx, period: Period) -> Result<Vec<(Date, i64)>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        "select day, api_calls from cvault.usage_daily
         where tenant_id = $1 and day between $2 and $3 and api_calls > 0 order by day",
        tenant,
        period.from.date(),
        period.to.date()
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|row| (row.day, row.api_calls)).collect())
}

/// Bytes of the period by the server that carried them.
///
/// # Errors
/// Those of the database.
pub async fn by_server(tx: &mut TenantTx, period: Period) -> Result<Vec<(ServerId, i64)>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        r#"select server_id, sum(rx_bytes + tx_bytes)::bigint as "bytes!" from cvault.usage_hourly
           where tenant_id = $1 and hour >= date_trunc('hour', $2::timestamptz, 'UTC') and hour < $3
           group by server_id order by server_id"#,
        tenant,
        period.from,
        period.to
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|row| (ServerId::from_uuid(row.server_id), row.bytes)).collect())
}

/// Bytes of the period by the hour of the day, UTC.
///
/// # Errors
/// Those of the database.
pub async fn by_hour(tx: &mut TenantTx, period: Period) -> Result<[i64; 24], DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        r#"select extract(hour from hour at time zone 'UTC')::integer as "hour!",
                  sum(rx_bytes + tx_bytes)::bigint as "bytes!"
           from cvault.usage_hourly
           where tenant_id = $1 and hour >= date_trunc('hour', $2::timestamptz, 'UTC') and hour < $3
           group by 1 order by 1"#,
        tenant,
        period.from,
        period.to
    )
    .fetch_all(tx.conn())
    .await?;
    let mut hours = [0; 24];
    for row in rows {
        if let Some(bytes) = usize::try_from(row.hour).ok().and_then(|hour| hours.get_mut(hour)) {
            *bytes = row.bytes;
        }
    }
    Ok(hours)
}

/// What a page ends with; all ids are UUIDv7, so that they sort by time.
pub(crate) type Place = Uuid;
