//! Usage by day and device, a page at a time: an export may be long and its reader slow, and neither may hold a
//! transaction.

use cvault_types::{DeviceId, UserId};
use time::{Date, Duration, UtcOffset};
use uuid::Uuid;

use super::Period;
use crate::db::DbError;
use crate::tenancy::TenantTx;

/// Rows of a page.
const PAGE: i64 = 1_000;

/// What one device did on one day, UTC.
#[derive(Clone, Debug)]
pub struct DeviceDay {
    pub date: Date,
    pub user: UserId,
    pub email: Option<String>,
    pub external_id: Option<String>,
    pub device: DeviceId,
    /// Devices keep their name when they are deleted.
    pub device_name: Option<String>,
    pub rx_bytes: i64,
    pub tx_bytes: i64,
    pub connection_seconds: i64,
}

/// Where an export goes on.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The part of the period that is still to come.
    rest: Period,
    after: Uuid,
}

impl Place {
    #[must_use]
    pub fn beginning(period: Period) -> Self {
        let (from, to) = (period.from.to_offset(UtcOffset::UTC), period.to.to_offset(UtcOffset::UTC));
        Self { rest: Period { from, to }, after: Uuid::nil() }
    }

    /// The part of the first day.
    fn day(self) -> Period {
        let next = (self.rest.from.date() + Duration::DAY).midnight().assume_utc();
        Period { from: self.rest.from, to: next.min(self.rest.to) }
    }
}

/// The next rows by day and device, and where to go on; an empty page in the middle is possible.
///
/// # Errors
/// Those of the database.
pub async fn page(
    tx: &mut TenantTx,
    user: Option<UserId>,
    place: Place,
) -> Result<(Vec<DeviceDay>, Option<Place>), DbError> {
    let day = place.day();
    if day.from >= day.to {
        return Ok((Vec::new(), None));
    }
    let rows = device_days(tx, user, day, place.after).await?;
    let full = i64::try_from(rows.len()).is_ok_and(|rows| rows == PAGE);
    let next = match rows.last() {
        Some(last) if full => Some(Place { after: last.device.uuid(), ..place }),
        Some(_) | None => (day.to < place.rest.to)
            .then_some(Place { rest: Period { from: day.to, ..place.rest }, after: Uuid::nil() }),
    };
    Ok((rows, next))
}

async fn device_days(
    tx: &mut TenantTx,
    user: Option<UserId>,
    day: Period,
    after: Uuid,
) -> Result<Vec<DeviceDay>, DbError> {
    let tenant = tx.tenant().uuid();
    let date = day.from.date();
    let rows = sqlx::query!(
        r#"with parts as (
               select user_id, device_id, rx_bytes as rx, tx_bytes as tx, 0 as seconds from cvault.usage_hourly
               where tenant_id = $1 and hour >= date_trunc('hour', $2::timestamptz, 'UTC') and hour < $3
                 and ($4::uuid is null or user_id = $4) and device_id > $5
               union all
               select user_id, device_id, 0, 0,
                      extract(epoch from least(coalesce(disconnected_at, $3), $3) - greatest(connected_at, $2))
               from cvault.sessions
               where tenant_id = $1 and connected_at < $3 and coalesce(disconnected_at, 'infinity') >= $2
                 and ($4::uuid is null or user_id = $4) and device_id > $5
           ), days as (
               select user_id, device_id, sum(rx)::bigint as rx, sum(tx)::bigint as tx, sum(seconds)::bigint as seconds
               from parts group by user_id, device_id order by device_id limit $6
           )
           select p.user_id as "user_id!", p.device_id as "device_id!", p.rx as "rx!", p.tx as "tx!",
                  p.seconds as "seconds!", u.email as "email?", u.external_user_id as "external_id?", d.name as "name?"
           from days p
           left join cvault.users u on (u.tenant_id, u.user_id) = ($1, p.user_id)
           left join cvault.devices d on (d.tenant_id, d.device_id) = ($1, p.device_id)
           order by p.device_id"#,
        tenant,
        day.from,
        day.to,
        user.map(UserId::uuid),
        after,
        PAGE
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| DeviceDay {
            date,
            user: UserId::from_uuid(row.user_id),
            email: row.email,
            external_id: row.external_id,
            device: DeviceId::from_uuid(row.device_id),
            device_name: row.name,
            rx_bytes: row.rx,
            tx_bytes: row.tx,
            connection_seconds: row.seconds,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::OffsetDateTime;
    use time::macros::datetime;

    fn place(from: OffsetDateTime, to: OffsetDateTime) -> Place {
        Place::beginning(Period { from, to })
    }

    #[test]
    fn a_period_is_cut_at_midnight() {
        let whole = place(datetime!(2026-11-20 17:30 UTC), datetime!(2026-11-22 01:00 UTC));
        assert_eq!(whole.day().to, datetime!(2026-11-21 0:00 UTC));
        let elsewhere = place(datetime!(2026-11-21 01:00 +2), datetime!(2026-11-22 01:00 +2));
        assert_eq!(elsewhere.day().to, datetime!(2026-11-21 0:00 UTC), "of UTC");
        let last = place(datetime!(2026-11-22 0:00 UTC), datetime!(2026-11-22 01:00 UTC));
        assert_eq!(last.day().to, datetime!(2026-11-22 01:00 UTC));
    }
}
