//! Logins. A browser's is an opaque cookie that is looked up at each request; a program's is a family of refresh tokens,
//! each good for one use, and short access tokens. Both end at once on every replica: each request asks the database.

use std::net::IpAddr;

use cvault_types::portal::{PortalSession, PortalTokens};
use cvault_types::{ErrorCode, PortalSessionId, Secret, TenantAdminId, TenantId, TenantRole};
use http::header::USER_AGENT;
use http::request::Parts;
use rand::CryptoRng;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::app::App;
use crate::auth::tokens::{self, PortalToken};
use crate::auth::opaque;
use crate::db::DbError;
use crate::http::Problem;
use crate::http::serve::Peer;
use crate::keys::PlatformSecrets;
use crate::network::Network;
use crate::tenancy::TenantTx;

/// A browser that is not used this long is logged out.
const COOKIE_IDLE: Duration = Duration::hours(12);
/// However much it is used.
const COOKIE_LIFETIME: Duration = Duration::days(7);
/// A program that does not refresh this long is logged out.
const REFRESH_LIFETIME: Duration = Duration::days(30);
/// How exactly it is known when a session was last seen.
const SEEN_EVERY: Duration = Duration::minutes(1);

/// What a request brings.
#[derive(Debug, Clone, Copy)]
pub enum Credential {
    Token(PortalToken),
    Cookie([u8; 32]),
}

impl Credential {
    #[must_use]
    pub fn cookie(secrets: &PlatformSecrets, text: &str) -> Self {
        Self::Cookie(secrets.peppered("portal_cookie", text))
    }
}

/// A session that lives.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub token: PortalToken,
    pub role: TenantRole,
    pub cookie: bool,
    pub suspended: bool,
    pub expires_at: OffsetDateTime,
    created_at: OffsetDateTime,
    last_seen_at: OffsetDateTime,
    last_ip: Option<IpAddr>,
}

/// Where a request comes from.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub ip: Option<IpAddr>,
    pub user_agent: String,
}

impl Seen {
    #[must_use]
    pub fn of(parts: &Parts) -> Self {
        let agent = parts.headers.get(USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        Self { ip: Peer::of(parts).ip(), user_agent: agent.chars().take(255).collect() }
    }

    /// The network as it is stored.
    #[must_use]
    pub fn network(&self) -> Option<ipnet::IpNet> {
        self.ip.map(|ip| Network::of(ip).into())
    }
}

/// A new login, in clear for the only time.
#[derive(Debug)]
pub enum NewSession {
    Cookie { id: Uuid, value: Secret },
    Tokens { id: Uuid, tokens: PortalTokens },
}

/// What became of a presented refresh token. `Reused` has ended the session: commit all the same.
#[derive(Debug, Clone, Copy)]
pub enum Taken {
    Valid(PortalToken),
    Reused(PortalToken),
    Expired(PortalToken),
    Ended(PortalToken),
    Unknown,
}

/// Why a session ended.
#[derive(Debug, Clone, Copy)]
pub enum End {
    Logout,
    Revoked,
    PasswordChanged,
    TokenReused,
    Risk,
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            Self::Logout => "logout",
            Self::Revoked => "revoked",
            Self::PasswordChanged => "password_changed",
            Self::TokenReused => "token_reused",
            Self::Risk => "risk",
        }
    }
}

/// # Errors
/// `INVALID_TOKEN`, `TOKEN_EXPIRED`, `SESSION_TERMINATED`, or the database's.
pub async fn find(app: &App, credential: Credential) -> Result<Found, Problem> {
    let (token, hash) = match credential {
        Credential::Token(token) => (Some(token), None),
        Credential::Cookie(hash) => (None, Some(hash)),
    };
    let row = sqlx::query!(
        r#"select s.tenant_id, s.session_id, s.admin_id, s.cookie_hash is not null as "cookie!", s.created_at,
                  s.expires_at, s.last_seen_at, s.last_ip, s.ended_at, a.role, a.status as admin_status,
                  t.status as tenant_status
           from cvault.portal_sessions s
           join cvault.tenant_admins a on a.tenant_id = s.tenant_id and a.admin_id = s.admin_id
           join cvault.tenants t on t.tenant_id = s.tenant_id
           where s.tenant_id = $1 and s.session_id = $2 or s.cookie_hash = $3"#,
        token.map(|token| token.tenant.uuid()),
        token.map(|token| token.session),
        hash.as_ref().map(<[u8; 32]>::as_slice)
    )
    .fetch_optional(&app.db.sys)
    .await
    .map_err(DbError::from)?
    .ok_or_else(|| Problem::new(ErrorCode::InvalidToken))?;
    if row.ended_at.is_some() || row.admin_status != "active" || row.tenant_status == "deleted" {
        return Err(Problem::new(ErrorCode::SessionTerminated));
    }
    if row.expires_at <= app.clock.now() {
        return Err(Problem::new(ErrorCode::TokenExpired).detail("The session has expired. Log in again."));
    }
    Ok(Found {
        token: PortalToken {
            tenant: TenantId::from_uuid(row.tenant_id),
            admin: TenantAdminId::from_uuid(row.admin_id),
            session: row.session_id,
        },
        role: TenantRole::parse(&row.role).unwrap_or(TenantRole::Viewer),
        cookie: row.cookie,
        suspended: row.tenant_status == "suspended",
        expires_at: row.expires_at,
        created_at: row.created_at,
        last_seen_at: row.last_seen_at,
        last_ip: row.last_ip.map(|net| net.addr()),
    })
}

/// Notes where and when the session was seen, to the minute. A browser's lasts longer for it.
///
/// # Errors
/// Those of the database.
pub async fn seen(app: &App, found: &Found, seen: Seen) -> Result<(), DbError> {
    let now = app.clock.now();
    if now - found.last_seen_at < SEEN_EVERY && found.last_ip == seen.ip {
        return Ok(());
    }
    let expires_at =
        if found.cookie { (now + COOKIE_IDLE).min(found.created_at + COOKIE_LIFETIME) } else { found.expires_at };
    let mut tx = app.db.tenancy.begin(found.token.tenant).await?;
    sqlx::query!(
        "update cvault.portal_sessions set last_seen_at = $3, last_ip = $4, user_agent = $5, expires_at = $6
         where tenant_id = $1 and session_id = $2 and ended_at is null",
        found.token.tenant.uuid(),
        found.token.session,
        now,
        seen.ip.map(ipnet::IpNet::from),
        seen.user_agent,
        expires_at
    )
    .execute(tx.conn())
    .await?;
    tx.commit().await
}
