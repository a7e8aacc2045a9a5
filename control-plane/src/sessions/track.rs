//! Sessions as servers see them: opened by handshakes, closed by silence. Runs as role `cvault_sys`.

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use uuid::Uuid;

use super::SILENT_AFTER_SECONDS;
use crate::db::DbError;

/// The last handshake of a device, by the receiver's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshake {
    pub tenant: Uuid,
    pub device: Uuid,
    pub at: OffsetDateTime,
}

/// Stores handshakes and opens a session for each device that has none. The caller holds the devices' rows, in id order.
///
/// A handshake older than the end of the last session opens none: it belongs to the tunnel the user has hung up.
///
/// # Errors
/// Those of the database.
pub async fn note_handshakes(
    conn: &mut PgConnection,
    server: Uuid,
    handshakes: &[Handshake],
    now: OffsetDateTime,
) -> Result<(), DbError> {
    let fresh = |handshake: &&Handshake| (now - handshake.at).whole_seconds() < SILENT_AFTER_SECONDS;
    let fresh: Vec<_> = handshakes.iter().filter(fresh).collect();
    if fresh.is_empty() {
        return Ok(());
    }
    let tenants: Vec<_> = fresh.iter().map(|handshake| handshake.tenant).collect();
    let devices: Vec<_> = fresh.iter().map(|handshake| handshake.device).collect();
    let times: Vec<_> = fresh.iter().map(|handshake| handshake.at).collect();
    // ages are measured in two places, so the same handshake comes out a few milliseconds apart in each report
    sqlx::query!(
        "update cvault.devices d
         set last_handshake_at = h.at, last_connected_at = greatest(d.last_connected_at, h.at)
         from unnest($1::uuid[], $2::uuid[], $3::timestamptz[]) as h (tenant_id, device_id, at)
         where d.tenant_id = h.tenant_id and d.device_id = h.device_id and d.status = 'active'
           and h.at > coalesce(d.last_handshake_at, '-infinity') + interval '1 second'",
        &tenants,
        &devices,
        &times,
    )
    .execute(&mut *conn)
    .await?;
    let sessions: Vec<_> = devices.iter().map(|_| Uuid::now_v7()).collect();
    sqlx::query!(
        "insert into cvault.sessions (tenant_id, session_id, device_id, user_id, server_id, opened_by, connected_at,
                                      last_handshake_at)
         select d.tenant_id, h.session_id, d.device_id, d.user_id, $5, 'handshake', h.at, h.at
         from unnest($1::uuid[], $2::uuid[], $3::timestamptz[], $4::uuid[]) as h (tenant_id, device_id, at, session_id)
         join cvault.devices d on d.tenant_id = h.tenant_id and d.device_id = h.device_id and d.status = 'active'
         where not exists (
             select from cvault.sessions s
             where s.tenant_id = d.tenant_id and s.device_id = d.device_id
               and (s.status = 'active' or s.disconnected_at >= h.at))
         on conflict (tenant_id, device_id) where status = 'active' do nothing",
        &tenants,
        &devices,
        &times,
        &sessions,
        server,
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "update cvault.sessions s
         set last_handshake_at = h.at
         from unnest($1::uuid[], $2::uuid[], $3::timestamptz[]) as h (tenant_id, device_id, at)
         where s.tenant_id = h.tenant_id and s.device_id = h.device_id and s.status = 'active'
           and h.at > coalesce(s.last_handshake_at, '-infinity') + interval '1 second'",
        &tenants,
        &devices,
        &times,
    )
    .execute(&mut *conn)
    .await?;
    Ok(())
}

/// Closes sessions without a handshake for three minutes; they end when WireGuard has given them up. Returns how many.
///
/// A server that says nothing proves nothing: its sessions stay open until it reports again or is silent itself for
/// as long.
///
/// # Errors
/// Those of the database.
pub async fn close_silent(sys: &PgPool) -> Result<u64, DbError> {
    let closed = sqlx::query!(
        // a session that a report is being entered for is left to the next run
        "with silent as (
             select s.tenant_id, s.session_id
             from cvault.sessions s join platform.servers v on v.server_id = s.server_id
             where s.status = 'active'
               and coalesce(s.last_handshake_at, s.connected_at) < now() - make_interval(secs => $1)
               -- the report that would tell of a newer handshake has had the time to arrive
               and (v.last_seen_at > coalesce(s.last_handshake_at, s.connected_at) + make_interval(secs => $1)
                    or coalesce(v.last_seen_at, '-infinity') < now() - make_interval(secs => $1))
             for no key update of s skip locked
         )
         update cvault.sessions s
         set status = 'disconnected',
             disconnected_at = greatest(s.connected_at,
                 coalesce(s.last_handshake_at, s.connected_at) + make_interval(secs => $1))
         from silent
         where s.tenant_id = silent.tenant_id and s.session_id = silent.session_id",
        SILENT_AFTER_SECONDS as f64,
    )
    .execute(sys)
    .await?;
    Ok(closed.rows_affected())
}
