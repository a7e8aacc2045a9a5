//! The refusal of a tenant that has carried all it may in a month.

use time::{Date, Month, OffsetDateTime, Time, UtcOffset};

use crate::db::DbError;
use crate::tenancy::TenantTx;

/// What a tenant may carry in a month, and has carried in this one, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the tenant has carried {used} of {max} bytes this month")]
pub struct UsedUp {
    pub max: i64,
    pub used: i64,
    /// When the next month begins, in UTC.
    pub resets_at: OffsetDateTime,
}

/// The current tenant's month, known to the minute.
///
/// # Errors
/// Those of the database.
pub async fn used_up(tx: &mut TenantTx, now: OffsetDateTime) -> Result<UsedUp, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select coalesce(t.bandwidth_limit_bytes, 0) as "max!", (
               select coalesce(sum(u.rx_bytes + u.tx_bytes), 0)::bigint from cvault.usage_daily u
               where u.tenant_id = t.tenant_id
                 and u.day >= date_trunc('month', $2::timestamptz, 'UTC')::date) as "used!"
           from cvault.tenants t where t.tenant_id = $1"#,
        tenant,
        now
    )
    .fetch_one(tx.conn())
    .await?;
    Ok(UsedUp { max: row.max, used: row.used, resets_at: next_month(now) })
}

/// The first instant after the month of `now`, in UTC.
fn next_month(now: OffsetDateTime) -> OffsetDateTime {
    let today = now.to_offset(UtcOffset::UTC).date();
    let month = today.month().next();
    let year = if month == Month::January { today.year() + 1 } else { today.year() };
    let first = Date::from_calendar_date(year, month, 1).expect("every month has a first day");
    first.with_time(Time::MIDNIGHT).assume_utc()
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_month_ends_when_the_next_one_begins_in_utc() {
        for (now, next) in [
            (datetime!(2026-11-21 09:30 UTC), datetime!(2026-12-01 00:00 UTC)),
            (datetime!(2026-12-31 23:59:59.999_999 UTC), datetime!(2027-01-01 00:00 UTC)),
            (datetime!(2028-02-01 00:00 UTC), datetime!(2028-03-01 00:00 UTC)),
            (datetime!(2026-12-01 01:00 +2), datetime!(2026-12-01 00:00 UTC)),
        ] {
            assert_eq!(next_month(now), next, "{now}");
        }
    }
}
