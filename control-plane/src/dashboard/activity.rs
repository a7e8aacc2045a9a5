//! What happened lately: connections, however they began, and what the audit log has.

use cvault_types::{ServerId, SessionId, UserId};
use time::OffsetDateTime;
use uuid::Uuid;

use super::Place;
use crate::db::DbError;
use crate::tenancy::TenantTx;

/// One line of the page.
#[derive(Debug, Clone)]
pub struct Event {
    pub place: Place,
    pub at: OffsetDateTime,
    pub action: String,
    pub actor: String,
    pub target: String,
    pub server: Option<ServerId>,
}

/// Up to `limit` events before the place named, newest first.
///
/// # Errors
/// Those of the database.
pub async fn activity(tx: &mut TenantTx, before: Option<Place>, limit: u32) -> Result<Vec<Event>, DbError> {
    let before = before.unwrap_or(Uuid::max());
    let mut events = changes(tx, before, limit).await?;
    events.extend(connections(tx, before, limit).await?);
    events.sort_by_key(|event| std::cmp::Reverse(event.place));
    events.truncate(limit as usize);
    Ok(events)
}

/// Without connections made by a call: they are sessions too.
async fn changes(tx: &mut TenantTx, before: Place, limit: u32) -> Result<Vec<Event>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        "select audit_id, at, actor, action, target, details ->> 'server' as server from cvault.audit_log
         where tenant_id = $1 and audit_id < $2 and action <> 'vpn.connect' order by audit_id desc limit $3",
        tenant,
        before,
        i64::from(limit)
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Event {
            place: row.audit_id,
            at: row.at,
            action: row.action,
            actor: row.actor,
            target: row.target,
            server: row.server.and_then(|text| text.parse().ok()),
        })
        .collect())
}

async fn connections(tx: &mut TenantTx, before: Place, limit: u32) -> Result<Vec<Event>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        "select session_id, connected_at, user_id, server_id from cvault.sessions
         where tenant_id = $1 and session_id < $2 order by session_id desc limit $3",
        tenant,
        before,
        i64::from(limit)
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Event {
            place: row.session_id,
            at: row.connected_at,
            action: "session.open".to_owned(),
            actor: UserId::from_uuid(row.user_id).to_string(),
            target: SessionId::from_uuid(row.session_id).to_string(),
            server: Some(ServerId::from_uuid(row.server_id)),
        })
        .collect())
}
