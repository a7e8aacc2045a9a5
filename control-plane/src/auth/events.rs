//! One row for each authentication attempt of a tenant's user or portal account (guide §3.6).

use std::net::IpAddr;

use cvault_types::{RequestId, TenantAdminId, UserId};
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

/// The same of somebody who manages the tenant.
#[derive(Debug, Clone, Copy)]
pub struct AdminEvent {
    pub kind: AuthKind,
    pub outcome: Outcome,
    pub admin: Option<TenantAdminId>,
    pub client_ip: Option<IpAddr>,
    pub request_id: RequestId,
}

#[derive(Debug, Clone, Copy)]
pub enum AuthKind {
    Register,
    Login,
    Refresh,
    Logout,
    PortalSignup,
    PortalLogin,
    PortalRefresh,
    PortalLogout,
    PortalEmailVerify,
    PortalEmailChange,
    PortalPasswordReset,
    PortalPasswordChange,
    PortalStepUp,
    /// A session was ended by the risk check.
    PortalRisk,
}

impl AuthKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::Login => "login",
            Self::Refresh => "refresh",
            Self::Logout => "logout",
            Self::PortalSignup => "portal_signup",
            Self::PortalLogin => "portal_login",
            Self::PortalRefresh => "portal_refresh",
            Self::PortalLogout => "portal_logout",
            Self::PortalEmailVerify => "portal_email_verify",
            Self::PortalEmailChange => "portal_email_change",
            Self::PortalPasswordReset => "portal_password_reset",
            Self::PortalPasswordChange => "portal_password_change",
            Self::PortalStepUp => "portal_step_up",
            Self::PortalRisk => "portal_risk",
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub enum Outcome {
    Success,
    Failure,
    Reuse,
    /// Refused by a throttle, unchecked.
    Limited,
}

impl Outcome {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Reuse => "reuse",
            Self::Limited => "limited",
        }
    }
}

/// Adds the event to the transaction's tenant.
///
/// # Errors
/// Those of the database.
pub async fn record(tx: &mut TenantTx, event: AuthEvent) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "insert into cvault.auth_events (tenant_id, event_id, kind, outcome, user_id, client_ip, request_id)
         values ($1, $2, $3, $4, $5, $6, $7)",
        tenant,
        Uuid::now_v7(),
        event.kind.as_str(),
        event.outcome.as_str(),
        event.user.map(UserId::uuid),
        event.client_ip.map(ipnet::IpNet::from),
        event.request_id.uuid()
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Adds the event to the transaction's tenant.
///
/// # Errors
/// Those of the database.
pub async fn record_admin(tx: &mut TenantTx, event: AdminEvent) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "insert into cvault.auth_events (tenant_id, event_id, kind, outcome, admin_id, client_ip, request_id)
         values ($1, $2, $3, $4, $5, $6, $7)",
        tenant,
        Uuid::now_v7(),
        event.kind.as_str(),
        event.outcome.as_str(),
        event.admin.map(TenantAdminId::uuid),
        event.client_ip.map(ipnet::IpNet::from),
        event.request_id.uuid()
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}
