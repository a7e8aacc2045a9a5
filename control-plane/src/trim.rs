//! Forgets what is past use, a few thousand rows at a time: nobody waits long for a lock, and one replica trims at once.
//!
//! Nothing that was billed is lost: hours, days and the audit log stay; counters are trimmed when no server can report them
//! again, and their sums are kept for `admin verify-ledger`.

use futures::future::BoxFuture;
use sqlx::PgConnection;

use crate::app::App;
use crate::config::Retention;
use crate::db::{DbError, Tx};

/// Rows of one transaction.
const BATCH: i64 = 2_000;
/// Of rows that nobody changes and that are many.
const LARGE_BATCH: i64 = 20_000;
/// Batches of one kind in one run; what is left waits for the next.
const ROUNDS: u32 = 50;
/// Held by the replica that trims.
const LOCK: i64 = 731_992_416;

/// One kind of rows; `run` deletes a batch and returns how many rows that were.
struct Step {
    name: &'static str,
    run: for<'a> fn(&'a mut PgConnection, Retention) -> BoxFuture<'a, Result<u64, sqlx::Error>>,
}

const STEPS: &[Step] = &[
    Step { name: "node_changes", run: |conn, _| Box::pin(node_changes(conn)) },
    Step { name: "idempotency_keys", run: |conn, _| Box::pin(idempotency_keys(conn)) },
    Step { name: "refresh_tokens", run: |conn, _| Box::pin(refresh_tokens(conn)) },
    Step { name: "portal", run: |conn, _| Box::pin(crate::portal::trim(conn, BATCH)) },
    Step { name: "staff", run: |conn, _| Box::pin(crate::auth::admin_tokens::trim(conn)) },
    Step { name: "usage_windows", run: |conn, _| Box::pin(usage_windows(conn)) },
    Step { name: "outbox", run: |conn, retention| Box::pin(outbox(conn, retention.mail_days)) },
    Step { name: "auth_events", run: |conn, retention| Box::pin(auth_events(conn, retention.auth_events_days)) },
    Step { name: "request_logs", run: |conn, retention| Box::pin(request_logs(conn, retention.request_logs_days)) },
    Step { name: "usage_counters", run: |conn, retention| Box::pin(usage_counters(conn, retention.counters_days)) },
    Step { name: "sessions", run: |conn, retention| Box::pin(sessions(conn, retention.history_days)) },
    Step { name: "devices", run: |conn, retention| Box::pin(devices(conn, retention.history_days)) },
    Step { name: "device_drops", run: |conn, retention| Box::pin(device_drops(conn, retention.counters_days)) },
    Step { name: "usage_orphans", run: |conn, retention| Box::pin(usage_orphans(conn, retention.history_days)) },
    Step { name: "enrol_tokens", run: |conn, _| Box::pin(enrol_tokens(conn)) },
    Step { name: "api_keys", run: |conn, retention| Box::pin(api_keys(conn, retention.history_days)) },
];

/// All kinds; a fault of one does not keep the others.
///
/// # Errors
/// The first fault.
pub async fn trim(app: &App) -> Result<u64, DbError> {
    let (mut rows, mut fault) = (0, None);
    for step in STEPS {
        match exhaust(app, step).await {
            Ok(0) => {}
            Ok(deleted) => {
                tracing::debug!(what = step.name, rows = deleted, "trimmed");
                rows += deleted;
            }
            Err(error) => {
                tracing::warn!(what = step.name, error = crate::http::problem::chain(&error), "trimming has failed");
                fault = fault.or(Some(error));
            }
        }
    }
    fault.map_or(Ok(rows), Err)
}

async fn exhaust(app: &App, step: &Step) -> Result<u64, DbError> {
    let mut all = 0;
    for _ in 0..ROUNDS {
        let mut tx = Tx::begin(&app.db.sys).await?;
        let free = sqlx::query_scalar!(r#"select pg_try_advisory_xact_lock($1) as "free!""#, LOCK)
            .fetch_one(tx.conn())
            .await?;
        if !free {
            tx.rollback().await?;
            return Ok(all);
        }
        let deleted = (step.run)(tx.conn(), app.config.retention).await?;
        tx.commit().await?;
        all += deleted;
        if deleted == 0 || app.draining.is_cancelled() {
            break;
        }
    }
    Ok(all)
}

/// A server that needs an older change gets a snapshot.
async fn node_changes(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from platform.node_changes c
         using (select o.server_id, o.revision from platform.node_changes o join platform.servers s using (server_id)
                where o.at < now() - interval '7 days' or o.revision < s.revision - 100000 limit $1) old
         where c.server_id = old.server_id and c.revision = old.revision",
        BATCH
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

async fn idempotency_keys(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from cvault.idempotency_keys k
         using (select tenant_id, principal, key from cvault.idempotency_keys
                where created_at < now() - interval '24 hours' order by created_at limit $1) old
         where k.tenant_id = old.tenant_id and k.principal = old.principal and k.key = old.key
           and k.created_at < now() - interval '24 hours'",
        BATCH
    )
    .execute(&mut *conn)
    .await?;
    let staff = sqlx::query!(
        "delete from platform.idempotency_keys k
         using (select principal, key from platform.idempotency_keys
                where created_at < now() - interval '24 hours' order by created_at limit $1) old
         where k.principal = old.principal and k.key = old.key and k.created_at < now() - interval '24 hours'",
        BATCH
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected() + staff.rows_affected())
}

async fn refresh_tokens(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from cvault.refresh_tokens t
         using (select tenant_id, token_hash from cvault.refresh_tokens
                where expires_at < now() - interval '1 day' order by expires_at limit $1) old
         where t.tenant_id = old.tenant_id and t.token_hash = old.token_hash",
        BATCH
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

/// Windows that no agent still keeps (agents keep acknowledged windows for 7 days). One that came again later would
/// change nothing: its counters have been entered.
async fn usage_windows(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from platform.usage_windows w
         using (select server_id, counter_epoch, sequence from platform.usage_windows
                where received_at < now() - interval '8 days' limit $1) old
         where w.server_id = old.server_id and w.counter_epoch = old.counter_epoch and w.sequence = old.sequence",
        BATCH
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

/// Delivered mails and those that were given up.
async fn outbox(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from cvault.outbox o
         using (select tenant_id, mail_id from cvault.outbox
                where (delivered_at is not null or dead_at is not null) and created_at < now() - make_interval(days => $2)
                order by created_at limit $1) old
         where o.tenant_id = old.tenant_id and o.mail_id = old.mail_id
           and (o.delivered_at is not null or o.dead_at is not null)",
        BATCH,
        days
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

async fn auth_events(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from cvault.auth_events e
         using (select tenant_id, event_id from cvault.auth_events
                where at < now() - make_interval(days => $2) order by at limit $1) old
         where e.tenant_id = old.tenant_id and e.event_id = old.event_id",
        BATCH,
        days
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

/// What was asked with tenants' keys, and whatever a tenant that was deleted has left of it.
async fn request_logs(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        // along the primary key of each tenant: ids hold the time (RFC 9562, version 7), and there is no other index
        "with kept as (
             select rpad(lpad(to_hex((extract(epoch from now() - make_interval(days => $2)) * 1000)::bigint), 12, '0'), 32, '0')::uuid as from_id
         )
         delete from cvault.request_logs l
         using (select t.tenant_id, o.request_id
                from cvault.tenants t
                cross join kept
                cross join lateral (
                    select r.request_id from cvault.request_logs r
                    where r.tenant_id = t.tenant_id
                      and r.request_id < case t.status when 'deleted' then 'ffffffff-ffff-ffff-ffff-ffffffffffff' else kept.from_id end
                    order by r.request_id limit $1) o
                limit $1) old
         where l.tenant_id = old.tenant_id and l.request_id = old.request_id",
        LARGE_BATCH,
        days
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

/// Counters that will not be reported again; see `trim/usage_counters.sql`.
async fn usage_counters(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let done = sqlx::query_file_scalar!("src/trim/usage_counters.sql", BATCH, days).fetch_one(conn).await?;
    Ok(u64::try_from(done).unwrap_or_default())
}

/// Closed sessions. Their time is in `usage_daily`, which is not computed anew after 8 days.
async fn sessions(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from cvault.sessions s
         using (select tenant_id, session_id from cvault.sessions
                where status = 'disconnected' and disconnected_at < now() - make_interval(days => $2)
                order by disconnected_at limit $1) old
         where s.tenant_id = old.tenant_id and s.session_id = old.session_id",
        BATCH,
        days
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

/// Devices that were revoked, when nothing refers to them any more, and where they once were.
async fn devices(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    // late counters are billed to the device they name: as long as there may be some, it stays
    let gone = sqlx::query_scalar!(
        "delete from cvault.devices d
         using (select o.tenant_id, o.device_id from cvault.devices o
                where o.status = 'revoked' and o.revoked_at < now() - make_interval(days => $2)
                  and not exists (select from cvault.sessions s where s.tenant_id = o.tenant_id and s.device_id = o.device_id)
                  and not exists (select from platform.usage_counters c where c.device_id = o.device_id)
                  and not exists (select from platform.addresses a where a.released_device_id = o.device_id)
                  and not exists (select from platform.peers p join platform.servers v using (server_id)
                                  where p.device_id = o.device_id and v.status <> 'removed'
                                    and coalesce(p.removed_revision > v.acked_revision, true))
                order by o.revoked_at limit $1 for update of o skip locked) old
         where d.tenant_id = old.tenant_id and d.device_id = old.device_id
         returning d.device_id",
        BATCH,
        days
    )
    .fetch_all(&mut *conn)
    .await?;
    sqlx::query_scalar!("select platform.forget_peers($1)", &gone).fetch_one(conn).await?;
    Ok(gone.len() as u64)
}

/// Dropped packets that were counted where the device is no longer.
async fn device_drops(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from platform.device_drops p
         using (select o.server_id, o.device_id from platform.device_drops o
                where o.reported_at < now() - make_interval(days => $2)
                  and not exists (select from cvault.devices d
                                  where d.device_id = o.device_id and d.server_id = o.server_id and d.status = 'active')
                order by o.reported_at limit $1) old
         where p.server_id = old.server_id and p.device_id = old.device_id
           and p.reported_at < now() - make_interval(days => $2)",
        BATCH,
        days
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

/// Bytes that were billed to nobody, when their counters are settled: they leave both sides of `admin verify-ledger`.
async fn usage_orphans(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let gone = sqlx::query_scalar!(
        r#"with gone as (
               delete from platform.usage_orphans o
               using (select server_id, device_id, hour from platform.usage_orphans u
                      where u.hour < now() - make_interval(days => $2)
                        and not exists (select from platform.usage_counters c where c.device_id = u.device_id)
                      order by u.hour limit $1) old
               where o.server_id = old.server_id and o.device_id = old.device_id and o.hour = old.hour
               returning o.device_id, o.rx_bytes, o.tx_bytes
           ), settled as (
               update platform.usage_settled t
               set rx_bytes = t.rx_bytes - sums.rx, tx_bytes = t.tx_bytes - sums.tx
               from (select device_id, sum(rx_bytes) as rx, sum(tx_bytes) as tx from gone group by device_id) sums
               where t.device_id = sums.device_id
           )
           select count(*) as "gone!" from gone"#,
        BATCH,
        days
    )
    .fetch_one(&mut *conn)
    .await?;
    sqlx::query!("delete from platform.usage_settled where rx_bytes = 0 and tx_bytes = 0").execute(conn).await?;
    Ok(u64::try_from(gone).unwrap_or_default())
}

/// Tokens that enrol nobody any more, a month later.
async fn enrol_tokens(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from platform.enrol_tokens t
         using (select token_id from platform.enrol_tokens
                where expires_at < now() - interval '30 days' order by expires_at limit $1) old
         where t.token_id = old.token_id",
        BATCH
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

/// Keys that were revoked. What was done with them is in the audit log.
async fn api_keys(conn: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from cvault.api_keys k
         using (select tenant_id, api_key_id from cvault.api_keys
                where revoked_at < now() - make_interval(days => $2) order by revoked_at limit $1) old
         where k.tenant_id = old.tenant_id and k.api_key_id = old.api_key_id",
        BATCH,
        days
    )
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

#[cfg(test)]
mod tests;
