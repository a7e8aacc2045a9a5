//! One row for each authentication attempt of a tenant's user (guide §3.6).

use std::net::IpAddr;

use cvault_types::{RequestId, UserId};
use uuid::Uuid;

use crate::db::DbError;
use crate::tenancy::TenantTx;

/// What was tried, and how it ended. Never what was sent.
#[derive(Debug, Clone, Copy)]
pub struct AuthEvent {
    pub kind: AuthKind,
    pub outcome: Outcome,
    pub user: Option<UserId>,
    pub client_ip: Option<IpAddr>,
    pub request_id: RequestId,
}

#[derive(Debug, Clone, Copy)]
pub enum AuthKind {
    Register,
    Login,
    Refresh,
    Logout,
}

#[derive(Debug, Clone, Copy)]
pub enum Outcome {
    Success,
    Failure,
    Reuse,
    /// Refused by a throttle, unchecked.
    Limited,
}

/// Adds the event to the transaction's tenant.
///
/// # Errors
/// Those of the database.
pub async fn record(tx: &mut TenantTx, event: AuthEvent) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    let kind = match event.kind {
        AuthKind::Register => "register",
        AuthKind::Login => "login",
        AuthKind::Refresh => "refresh",
        AuthKind::Logout => "logout",
    };
    let outcome = match event.outcome {
        Outcome::Success => "success",
        Outcome::Failure => "failure",
        Outcome::Reuse => "reuse",
        Outcome::Limited => "limited",
    };
    sqlx::query!(
        "insert into cvault.auth_events (tenant_id, event_id, kind, outcome, user_id, client_ip, request_id)
         values ($1, $2, $3, $4, $5, $6, $7)",
        tenant,
        Uuid::now_v7(),
        kind,
        outcome,
        event.user.map(UserId::uuid),
        event.client_ip.map(ipnet::IpNet::from),
        event.request_id.uuid()
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}
