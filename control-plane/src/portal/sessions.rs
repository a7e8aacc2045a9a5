//! Logins. A browser's is an opaque cookie that is looked up at each request; a program's is a family of refresh tokens,
//! each good for one use, and short access tokens. Both end at once on every replica: each request asks the database.
//!
//! What a session called itself at its login stays: it is compared with at sensitive requests (`step_up::risk`).

use std::net::IpAddr;

use cvault_types::portal::{PortalSession, PortalTokens};
use cvault_types::{ErrorCode, PortalSessionId, Secret, TenantAdminId, TenantId, TenantRole};
use http::Request;
use http::header::USER_AGENT;
use rand::CryptoRng;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::app::App;
use crate::auth::opaque;
use crate::auth::tokens::{self, PortalToken};
use crate::db::DbError;
use crate::http::Problem;
use crate::http::serve::Peer;
use crate::keys::PlatformSecrets;
use crate::network::Network;
use crate::tenancy::TenantTx;

/// A browser that is not used this long is logged out.
const COOKIE_IDLE: Duration = Duration::hours(12);
/// However much it is used.
pub const COOKIE_LIFETIME: Duration = Duration::days(7);
/// A program that does not refresh this long is logged out.
const REFRESH_LIFETIME: Duration = Duration::days(30);
/// How exactly it is known when a session was last seen.
const SEEN_EVERY: Duration = Duration::minutes(1);

/// Logins of one person that live at once; the oldest makes room.
const MAX_SESSIONS: i64 = 100;

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
    pub fn of<B>(request: &Request<B>) -> Self {
        let agent = request.headers().get(USER_AGENT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let peer = request.extensions().get::<Peer>().copied().unwrap_or_default();
        Self { ip: peer.ip(), user_agent: agent.chars().take(255).collect() }
    }

    /// The network as it is stored.
    #[must_use]
    pub fn network(&self) -> Option<ipnet::IpNet> {
        self.ip.map(|ip| Network::of(ip).into())
    }
}

/// What a login is given: a browser a cookie, a program tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Cookie,
    Tokens,
}

/// A new login, in clear for the only time.
#[derive(Debug)]
pub enum NewSession {
    Cookie { id: Uuid, value: Secret },
    Tokens { id: Uuid, tokens: PortalTokens },
}

impl NewSession {
    #[must_use]
    pub fn id(&self) -> Uuid {
        match self {
            Self::Cookie { id, .. } | Self::Tokens { id, .. } => *id,
        }
    }
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
    EmailChanged,
    TokenReused,
    Risk,
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            Self::Logout => "logout",
            Self::Revoked => "revoked",
            Self::PasswordChanged => "password_changed",
            Self::EmailChanged => "email_changed",
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
pub async fn seen(app: &App, found: &Found, ip: Option<IpAddr>) -> Result<(), DbError> {
    let now = app.clock.now();
    if now - found.last_seen_at < SEEN_EVERY && found.last_ip == ip {
        return Ok(());
    }
    let expires_at =
        if found.cookie { (now + COOKIE_IDLE).min(found.created_at + COOKIE_LIFETIME) } else { found.expires_at };
    let mut tx = app.db.tenancy.begin(found.token.tenant).await?;
    sqlx::query!(
        "update cvault.portal_sessions set last_seen_at = $3, last_ip = $4, expires_at = $5
         where tenant_id = $1 and session_id = $2 and ended_at is null",
        found.token.tenant.uuid(),
        found.token.session,
        now,
        ip.map(ipnet::IpNet::from),
        expires_at
    )
    .execute(tx.conn())
    .await?;
    tx.commit().await
}

/// Begins a login, from a network that counts as the account's own from now on.
///
/// # Errors
/// Those of the database.
pub async fn open(
    tx: &mut TenantTx,
    app: &App,
    admin: TenantAdminId,
    how: How,
    seen: &Seen,
    rng: &mut impl CryptoRng,
) -> Result<NewSession, DbError> {
    let (tenant, id, now) = (tx.tenant(), Uuid::now_v7(), app.clock.now());
    make_room(tx, admin, now).await?;
    let cookie = matches!(how, How::Cookie).then(|| opaque::SESSION_COOKIE.draw(rng));
    let hash = cookie.as_ref().map(|text| app.secrets.peppered("portal_cookie", text.expose()));
    let lifetime = if cookie.is_some() { COOKIE_IDLE } else { REFRESH_LIFETIME };
    sqlx::query!(
        "insert into cvault.portal_sessions (tenant_id, session_id, admin_id, cookie_hash, created_at, expires_at,
             last_seen_at, last_ip, user_agent, counted_from)
         values ($1, $2, $3, $4, $5, $6, $5, $7, $8, $5)",
        tenant.uuid(),
        id,
        admin.uuid(),
        hash.as_ref().map(<[u8; 32]>::as_slice),
        now,
        now + lifetime,
        seen.ip.map(ipnet::IpNet::from),
        seen.user_agent
    )
    .execute(tx.conn())
    .await?;
    know_network(tx, admin, seen, now).await?;
    if let Some(value) = cookie {
        return Ok(NewSession::Cookie { id, value });
    }
    let tokens = issue(tx, app, PortalToken { tenant, admin, session: id }, rng).await?;
    Ok(NewSession::Tokens { id, tokens })
}

async fn make_room(tx: &mut TenantTx, admin: TenantAdminId, now: OffsetDateTime) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.portal_sessions set ended_at = $3, end_reason = 'revoked'
         where tenant_id = $1 and ended_at is null and session_id in (
             select session_id from cvault.portal_sessions
             where tenant_id = $1 and admin_id = $2 and ended_at is null and expires_at > $3
             order by session_id desc offset $4)",
        tenant,
        admin.uuid(),
        now,
        MAX_SESSIONS - 1
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The network is one of the account's own from now on.
///
/// # Errors
/// Those of the database.
pub async fn know_network(
    tx: &mut TenantTx,
    admin: TenantAdminId,
    seen: &Seen,
    now: OffsetDateTime,
) -> Result<(), DbError> {
    let Some(network) = seen.network() else { return Ok(()) };
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "insert into cvault.portal_networks (tenant_id, admin_id, network, last_seen_at) values ($1, $2, $3, $4)
         on conflict on constraint portal_networks_pkey do update set last_seen_at = excluded.last_seen_at",
        tenant,
        admin.uuid(),
        network,
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The next pair of tokens. The session lasts from here.
///
/// # Errors
/// Those of the database.
pub async fn issue(
    tx: &mut TenantTx,
    app: &App,
    who: PortalToken,
    rng: &mut impl CryptoRng,
) -> Result<PortalTokens, DbError> {
    let now = app.clock.now();
    let refresh_token = opaque::REFRESH_TOKEN.draw(rng);
    let hash = refresh_hash(&app.secrets, refresh_token.expose());
    let tenant = who.tenant.uuid();
    sqlx::query!(
        "insert into cvault.portal_refresh_tokens (tenant_id, token_hash, session_id, expires_at) values ($1, $2, $3, $4)",
        tenant,
        hash.as_slice(),
        who.session,
        now + REFRESH_LIFETIME
    )
    .execute(tx.conn())
    .await?;
    sqlx::query!(
        "update cvault.portal_sessions set expires_at = $3 where tenant_id = $1 and session_id = $2",
        tenant,
        who.session,
        now + REFRESH_LIFETIME
    )
    .execute(tx.conn())
    .await?;
    let keys = app.token_keys().await?;
    Ok(PortalTokens {
        access_token: tokens::mint_portal(keys.signing(now), &app.config.public_url, who, now),
        refresh_token,
        token_type: "Bearer".to_owned(),
        expires_in: tokens::ACCESS_SECONDS,
    })
}

/// The tenant whose refresh token this is.
///
/// # Errors
/// Those of the database.
pub async fn tenant_of(app: &App, token: &Secret) -> Result<Option<TenantId>, DbError> {
    if !opaque::REFRESH_TOKEN.is_well_formed(token.expose()) {
        return Ok(None);
    }
    let hash = refresh_hash(&app.secrets, token.expose());
    let tenant = sqlx::query_scalar!(
        "select tenant_id from cvault.portal_refresh_tokens where token_hash = $1 limit 1",
        hash.as_slice()
    )
    .fetch_optional(&app.db.sys)
    .await?;
    Ok(tenant.map(TenantId::from_uuid))
}

/// Uses a refresh token up. The session's row is locked first, so that of two uses at once the second sees the first, and an
/// end of the session meets every token of it.
///
/// # Errors
/// Those of the database.
pub async fn take(
    tx: &mut TenantTx,
    secrets: &PlatformSecrets,
    token: &Secret,
    now: OffsetDateTime,
) -> Result<Taken, DbError> {
    let tenant = tx.tenant();
    let hash = refresh_hash(secrets, token.expose());
    let Some(session) = sqlx::query!(
        r#"select s.session_id, s.admin_id, s.ended_at is not null or a.status <> 'active' as "ended!"
           from cvault.portal_refresh_tokens r
           join cvault.portal_sessions s on s.tenant_id = r.tenant_id and s.session_id = r.session_id
           join cvault.tenant_admins a on a.tenant_id = s.tenant_id and a.admin_id = s.admin_id
           where r.tenant_id = $1 and r.token_hash = $2 for no key update of s"#,
        tenant.uuid(),
        hash.as_slice()
    )
    .fetch_optional(tx.conn())
    .await?
    else {
        return Ok(Taken::Unknown);
    };
    let who = PortalToken { tenant, admin: TenantAdminId::from_uuid(session.admin_id), session: session.session_id };
    if session.ended {
        return Ok(Taken::Ended(who));
    }
    // a statement of its own: it sees what was committed while the lock was waited for
    let row = sqlx::query!(
        "select expires_at, used_at from cvault.portal_refresh_tokens where tenant_id = $1 and token_hash = $2",
        tenant.uuid(),
        hash.as_slice()
    )
    .fetch_one(tx.conn())
    .await?;
    if row.used_at.is_some() {
        end(tx, who.session, End::TokenReused, now).await?;
        return Ok(Taken::Reused(who));
    }
    if row.expires_at <= now {
        return Ok(Taken::Expired(who));
    }
    sqlx::query!(
        "update cvault.portal_refresh_tokens set used_at = $3 where tenant_id = $1 and token_hash = $2",
        tenant.uuid(),
        hash.as_slice(),
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(Taken::Valid(who))
}

/// Ends one session. `false`: it had ended, or there is none.
///
/// # Errors
/// Those of the database.
pub async fn end(tx: &mut TenantTx, session: Uuid, why: End, now: OffsetDateTime) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    let done = sqlx::query!(
        "update cvault.portal_sessions set ended_at = $3, end_reason = $4
         where tenant_id = $1 and session_id = $2 and ended_at is null",
        tenant,
        session,
        now,
        why.as_str()
    )
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Whether a session, ended or not, is this person's.
///
/// # Errors
/// Those of the database.
pub async fn belongs_to(tx: &mut TenantTx, session: Uuid, admin: TenantAdminId) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    Ok(sqlx::query_scalar!(
        r#"select exists (select from cvault.portal_sessions
               where tenant_id = $1 and session_id = $2 and admin_id = $3) as "exists!""#,
        tenant,
        session,
        admin.uuid()
    )
    .fetch_one(tx.conn())
    .await?)
}

/// Ends the sessions of one person, `except` the one that asks. Returns how many.
///
/// # Errors
/// Those of the database.
pub async fn end_all(
    tx: &mut TenantTx,
    admin: TenantAdminId,
    except: Option<Uuid>,
    why: End,
    now: OffsetDateTime,
) -> Result<u64, DbError> {
    let tenant = tx.tenant().uuid();
    let done = sqlx::query!(
        "update cvault.portal_sessions set ended_at = $4, end_reason = $5
         where tenant_id = $1 and admin_id = $2 and session_id is distinct from $3 and ended_at is null",
        tenant,
        admin.uuid(),
        except,
        now,
        why.as_str()
    )
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected())
}

/// The sessions of one person that live, newest first: [`MAX_SESSIONS`] at most.
///
/// # Errors
/// Those of the database.
pub async fn list(
    tx: &mut TenantTx,
    admin: TenantAdminId,
    current: Uuid,
    now: OffsetDateTime,
) -> Result<Vec<PortalSession>, DbError> {
    let tenant = tx.tenant().uuid();
    let rows = sqlx::query!(
        "select session_id, created_at, last_seen_at, expires_at, last_ip, user_agent from cvault.portal_sessions
         where tenant_id = $1 and admin_id = $2 and ended_at is null and expires_at > $3
         order by session_id desc",
        tenant,
        admin.uuid(),
        now
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| PortalSession {
            id: PortalSessionId::from_uuid(row.session_id),
            current: row.session_id == current,
            created_at: row.created_at,
            last_seen_at: row.last_seen_at,
            expires_at: row.expires_at,
            ip: row.last_ip.map(|net| net.addr().to_string()),
            user_agent: row.user_agent,
        })
        .collect())
}

fn refresh_hash(secrets: &PlatformSecrets, token: &str) -> [u8; 32] {
    secrets.peppered("portal_refresh", token)
}
