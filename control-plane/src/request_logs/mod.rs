//! The requests that were made with a tenant's keys, for its developers: noted in memory when they are answered, written by
//! a periodic task, so that no request waits for them.
//!
//! Bounded: of one tenant and of all of them only so many are kept between two runs of the task; what is beyond is counted
//! by a metric and lost, and so is what a killed process had not written. Nothing is billed by it. Whoever does not get in
//! leaves nothing here: no tenant is known. Deliberately absent: paths, queries, headers and bodies.

mod read;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cvault_types::{ApiKeyId, ErrorCode, RequestId, TenantId, UserId};
use http::{Method, StatusCode};
use ipnet::IpNet;
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::{DbError, Tx};
use crate::metrics;

pub use read::{Found, Wanted, list};

/// Requests that are kept between two runs, of all tenants: about a megabyte.
const OF_ALL: usize = 4_096;
/// Of one tenant: one that is very busy leaves the others room, and the database time for what matters.
const OF_A_TENANT: u32 = 500;
/// Of one tenant, of those that were refused with 429: a program that repeats itself without a pause shows that soon.
const RATE_LIMITED_OF_A_TENANT: u32 = 10;

/// One request.
#[derive(Debug)]
pub struct Entry {
    pub tenant: TenantId,
    pub id: RequestId,
    pub method: Method,
    /// The template.
    pub route: Arc<str>,
    pub status: StatusCode,
    pub code: Option<ErrorCode>,
    pub took: Duration,
    pub api_key: ApiKeyId,
    pub user: Option<UserId>,
    pub client: Option<IpAddr>,
}

/// One for the process.
#[derive(Debug, Default)]
pub struct RequestLog {
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    entries: Vec<Entry>,
    shares: HashMap<TenantId, Share>,
}

#[derive(Debug, Default)]
struct Share {
    noted: u32,
    rate_limited: u32,
}

impl RequestLog {
    /// Notes a request that was answered, if there is room.
    pub fn note(&self, entry: Entry) {
        let noted = self.pending.lock().unwrap_or_else(PoisonError::into_inner).add(entry);
        if !noted {
            metrics::request_logs_dropped(1);
        }
    }

    /// Writes what was noted.
    ///
    /// # Errors
    /// Those of the database. While it is away, what was noted is kept for the next run.
    pub async fn flush(&self, sys: &PgPool) -> Result<u64, DbError> {
        let noted = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner)).entries;
        if noted.is_empty() {
            return Ok(0);
        }
        let written = write(sys, &noted).await;
        if let Err(error) = &written {
            let lost = if matches!(error, DbError::Unavailable(_)) { self.keep(noted) } else { noted.len() };
            metrics::request_logs_dropped(lost as u64);
        }
        written
    }

    /// Returns for how many there was no room: the earlier ones stay.
    fn keep(&self, earlier: Vec<Entry>) -> usize {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let later = std::mem::take(&mut *pending).entries;
        earlier.into_iter().chain(later).map(|entry| usize::from(!pending.add(entry))).sum()
    }
}

impl Pending {
    fn add(&mut self, entry: Entry) -> bool {
        if self.entries.len() >= OF_ALL {
            return false;
        }
        let share = self.shares.entry(entry.tenant).or_default();
        let rate_limited = entry.code == Some(ErrorCode::RateLimited);
        if share.noted >= OF_A_TENANT || (rate_limited && share.rate_limited >= RATE_LIMITED_OF_A_TENANT) {
            return false;
        }
        share.noted += 1;
        share.rate_limited += u32::from(rate_limited);
        self.entries.push(entry);
        true
    }
}

async fn write(sys: &PgPool, entries: &[Entry]) -> Result<u64, DbError> {
    let tenants: Vec<Uuid> = entries.iter().map(|entry| entry.tenant.uuid()).collect();
    let ids: Vec<Uuid> = entries.iter().map(|entry| entry.id.uuid()).collect();
    let times: Vec<OffsetDateTime> = entries.iter().map(|entry| arrived(entry.id)).collect();
    let methods: Vec<&str> = entries.iter().map(|entry| entry.method.as_str()).collect();
    let routes: Vec<&str> = entries.iter().map(|entry| &*entry.route).collect();
    let statuses: Vec<i16> =
        entries.iter().map(|entry| i16::try_from(entry.status.as_u16()).unwrap_or(i16::MAX)).collect();
    let codes: Vec<Option<&str>> = entries.iter().map(|entry| entry.code.map(ErrorCode::as_str)).collect();
    let durations: Vec<i32> =
        entries.iter().map(|entry| i32::try_from(entry.took.as_micros()).unwrap_or(i32::MAX)).collect();
    let keys: Vec<Uuid> = entries.iter().map(|entry| entry.api_key.uuid()).collect();
    let users: Vec<Option<Uuid>> = entries.iter().map(|entry| entry.user.map(UserId::uuid)).collect();
    let clients: Vec<Option<IpNet>> = entries.iter().map(|entry| entry.client.map(IpNet::from)).collect();
    let mut tx = Tx::begin(sys).await?;
    let work = sqlx::query!(
        // a tenant that was deleted meanwhile leaves nothing
        r#"insert into cvault.request_logs
               (tenant_id, request_id, at, method, route, status, code, duration_us, api_key_id, user_id, client_ip)
           select r.tenant_id, r.request_id, r.at, r.method, r.route, r.status, r.code, r.duration_us, r.api_key_id,
                  r.user_id, r.client_ip
           from unnest($1::uuid[], $2::uuid[], $3::timestamptz[], $4::text[], $5::text[], $6::smallint[], $7::text[],
                       $8::integer[], $9::uuid[], $10::uuid[], $11::inet[])
               as r (tenant_id, request_id, at, method, route, status, code, duration_us, api_key_id, user_id, client_ip)
           join cvault.tenants t using (tenant_id)
           where t.status <> 'deleted'"#,
        &tenants,
        &ids,
        &times,
        &methods as &[&str],
        &routes as &[&str],
        &statuses,
        &codes as &[Option<&str>],
        &durations,
        &keys,
        &users as &[Option<Uuid>],
        &clients as &[Option<IpNet>]
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from);
    tx.finish(work).await.map(|done| done.rows_affected())
}

/// The time that the id of a request holds: whoever looks for a time looks for ids.
fn arrived(id: RequestId) -> OffsetDateTime {
    let (seconds, nanos) = id.uuid().get_timestamp().map_or((0, 0), |time| time.to_unix());
    let whole = i64::try_from(seconds).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    whole.unwrap_or(OffsetDateTime::UNIX_EPOCH) + Duration::from_nanos(u64::from(nanos))
}

#[cfg(test)]
mod tests;
