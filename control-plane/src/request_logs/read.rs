//! Looking for requests, newest first, along the primary key.

use cvault_types::request_log::RequestLogEntry;
use cvault_types::{ApiKeyId, ErrorCode, RequestId, UserId};
use ipnet::IpNet;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::DbError;
use crate::tenancy::TenantTx;

/// Requests that one page looks through for those that are wanted.
const LOOKED_THROUGH: i64 = 20_000;

/// What to look for; `None`: everything.
#[derive(Debug, Default)]
pub struct Wanted {
    /// From the first status to the last one.
    pub statuses: Option<(i16, i16)>,
    pub code: Option<ErrorCode>,
    pub method: Option<&'static str>,
    pub route: Option<String>,
    pub api_key: Option<ApiKeyId>,
    pub user: Option<UserId>,
    pub request: Option<RequestId>,
    pub from: Option<OffsetDateTime>,
    /// Exclusive.
    pub to: Option<OffsetDateTime>,
}

/// A page, and where the next one begins, if there may be one.
#[derive(Debug)]
pub struct Found {
    pub entries: Vec<RequestLogEntry>,
    pub next: Option<Uuid>,
}

/// Up to `limit` requests before the one named.
///
/// # Errors
/// Those of the database.
pub async fn list(tx: &mut TenantTx, wanted: &Wanted, before: Option<Uuid>, limit: u32) -> Result<Found, DbError> {
    let tenant = tx.tenant().uuid();
    let (from, until) = bounds(wanted, before);
    let (lowest, highest) = wanted.statuses.unwrap_or((0, i16::MAX));
    let rows = sqlx::query!(
        r#"select request_id, at, method, route, status, code, duration_us, api_key_id, user_id,
                  client_ip as "client_ip: IpNet"
           from (select * from cvault.request_logs where tenant_id = $1 and request_id >= $2 and request_id < $3
                 order by request_id desc limit $4) latest
           where status between $5 and $6 and ($7::text is null or code = $7) and ($8::text is null or method = $8)
             and ($9::text is null or route = $9) and ($10::uuid is null or api_key_id = $10)
             and ($11::uuid is null or user_id = $11) and ($12::uuid is null or request_id = $12)
           order by request_id desc limit $13"#,
        tenant,
        from,
        until,
        LOOKED_THROUGH,
        lowest,
        highest,
        wanted.code.map(ErrorCode::as_str),
        wanted.method,
        wanted.route,
        wanted.api_key.map(ApiKeyId::uuid),
        wanted.user.map(UserId::uuid),
        wanted.request.map(RequestId::uuid),
        i64::from(limit) + 1
    )
    .fetch_all(tx.conn())
    .await?;
    let more = rows.len() > limit as usize;
    let entries: Vec<_> = rows
        .into_iter()
        .take(limit as usize)
        .map(|row| RequestLogEntry {
            request_id: RequestId::from_uuid(row.request_id),
            at: row.at,
            method: row.method,
            route: row.route,
            status: u16::try_from(row.status).unwrap_or_default(),
            code: row.code,
            duration_ms: f64::from(row.duration_us) / 1e3,
            api_key_id: ApiKeyId::from_uuid(row.api_key_id),
            user_id: row.user_id.map(UserId::from_uuid),
            client_ip: row.client_ip.map(|net| net.addr().to_string()),
        })
        .collect();
    let next = match more {
        true => entries.last().map(|last| last.request_id.uuid()),
        false => last_looked_at(tx, from, until).await?,
    };
    Ok(Found { entries, next })
}

/// The oldest of the requests that were looked through, when there may be others before it.
async fn last_looked_at(tx: &mut TenantTx, from: Uuid, until: Uuid) -> Result<Option<Uuid>, DbError> {
    let tenant = tx.tenant().uuid();
    Ok(sqlx::query_scalar!(
        "select request_id from cvault.request_logs where tenant_id = $1 and request_id >= $2 and request_id < $3
         order by request_id desc offset $4 limit 1",
        tenant,
        from,
        until,
        LOOKED_THROUGH - 1
    )
    .fetch_optional(tx.conn())
    .await?)
}

/// The ids to look at: from the first (inclusive) to the second.
fn bounds(wanted: &Wanted, before: Option<Uuid>) -> (Uuid, Uuid) {
    let from = wanted.from.map_or(Uuid::nil(), first_of);
    let until = wanted.to.map_or(Uuid::max(), first_of).min(before.unwrap_or(Uuid::max()));
    match wanted.request {
        // one id alone needs no search
        Some(id) => (from.max(id.uuid()), until.min(Uuid::from_u128(id.uuid().as_u128().saturating_add(1)))),
        None => (from, until),
    }
}

/// The least id of that time or a later one.
fn first_of(time: OffsetDateTime) -> Uuid {
    // an id's time has whole milliseconds
    let nanos = time.unix_timestamp_nanos();
    let millis = nanos.div_euclid(1_000_000) + i128::from(nanos.rem_euclid(1_000_000) != 0);
    u64::try_from(millis).map_or(Uuid::nil(), |millis| {
        if millis >> 48 == 0 { Uuid::from_u128(u128::from(millis) << 80) } else { Uuid::max() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn a_time_is_the_least_id_of_its_millisecond_or_of_the_next() {
        let id = "0193510b-d3e8-7000-8000-000000000000".parse::<Uuid>().unwrap();
        let time = OffsetDateTime::from_unix_timestamp_nanos(0x0193_510b_d3e8 * 1_000_000).unwrap();
        assert!(first_of(time) <= id && first_of(time + time::Duration::NANOSECOND) > id);
        assert_eq!(first_of(datetime!(1900-01-01 0:00 UTC)), Uuid::nil());
        assert!(first_of(datetime!(9999-12-31 23:59 UTC)) > id);
    }
}
