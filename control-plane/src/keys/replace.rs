//! Putting new keys in the place of those that sign tokens, and of those that sign tenant contexts, while everything runs.
//!
//! Each step is one transaction with its entry in the platform's audit log, and what is to be done next is told by the rows
//! alone: whoever was interrupted calls again. A new key is written first. All replicas know it within [`LEASE`], and use it from then
//! (contexts) or from the time written beside it (tokens: tenants verify them too, with a copy of the public keys). The old one
//! is removed by [`retire`], a periodic task, when nothing that it has signed counts any more.

use std::time::Duration;

use rand::CryptoRng;
use sqlx::PgConnection;
use sqlx::postgres::types::PgInterval;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::leased::LEASE;
use super::platform::secret_aad;
use super::token_keys::{TokenKey, secret_name};
use crate::app::App;
use crate::audit;
use crate::auth::tokens::ADMIN_SECONDS;
use crate::db::{DbError, Tx};

/// From a key's making to its first token: twice as long as a copy of the public keys is good for (`http::routes::health`).
const TOKEN_KEY_KNOWN: Duration = Duration::from_secs(600);
/// From the next key's first token to the end of a key: the life of a token, and five minutes for clocks that differ and replicas
/// that read late.
const TOKEN_KEY_VERIFIES: Duration = Duration::from_secs(ADMIN_SECONDS + 300);
/// From the next key's making to the end of a key. No context is signed after [`LEASE`]; the rest is for the longest transaction.
const CONTEXT_KEY_VERIFIES: Duration = Duration::from_secs(900);
const _: () =
    assert!(LEASE.as_secs() * 4 < CONTEXT_KEY_VERIFIES.as_secs() && LEASE.as_secs() * 4 < TOKEN_KEY_KNOWN.as_secs());
/// Held by whoever changes these keys: two at once would make two.
const LOCK: i64 = 731_992_418;

/// What becomes of the keys there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replacement {
    /// They count as long as something they have signed may.
    Overlapping,
    /// They end now: for keys that somebody may have seen.
    AtOnce,
}

/// What a call has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    /// A new key was made.
    Begun,
    /// One that was made before has not taken over yet.
    UnderWay,
}

/// What a key is for at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Next,
    Signs,
    Verifies,
}

impl Stage {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Next => "next",
            Self::Signs => "signs",
            Self::Verifies => "verifies",
        }
    }
}

/// A key, by the name it has in the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyState {
    pub name: String,
    pub stage: Stage,
    pub signs_from: OffsetDateTime,
    /// When it will be removed, if it will.
    pub until: Option<OffsetDateTime>,
}

/// Begins to put a new key for tokens in the place of the present one, or ends all others at once: then every token they have
/// signed is worthless.
///
/// # Errors
/// Those of the database.
pub async fn replace_token_key(
    app: &App,
    how: Replacement,
    actor: &str,
    rng: &mut impl CryptoRng,
) -> Result<Replaced, DbError> {
    let mut seed = Zeroizing::new([0; 32]);
    rng.fill_bytes(seed.as_mut());
    let name = secret_name(&TokenKey::from_seed(&seed));
    let sealed = app.keys.wrap(&secret_aad(&name), seed.as_ref());
    let mut tx = locked(app).await?;
    let work: Result<_, DbError> = async {
        let conn = tx.conn();
        let known = match how {
            Replacement::Overlapping if token_key_is_next(conn).await? => return Ok(Replaced::UnderWay),
            Replacement::Overlapping => TOKEN_KEY_KNOWN,
            Replacement::AtOnce => Duration::ZERO,
        };
        sqlx::query!(
            "insert into platform.secrets (name, kek_version, sealed, signs_from) values ($1, $2, $3, now() + $4::interval)",
            name,
            app.keys.version(),
            sealed,
            interval(known)
        )
        .execute(&mut *conn)
        .await?;
        let removed = match how {
            Replacement::Overlapping => Vec::new(),
            Replacement::AtOnce => {
                sqlx::query_scalar!(
                    "delete from platform.secrets where signs_from is not null and name <> $1 returning name",
                    name
                )
                .fetch_all(&mut *conn)
                .await?
            }
        };
        note(conn, actor, Kind::Token, how, &name, removed).await?;
        Ok(Replaced::Begun)
    }
    .await;
    let replaced = tx.finish(work).await?;
    app.token_keys.reload(&app.db.sys, &app.keys).await?;
    Ok(replaced)
}

/// The same for the key of tenant contexts. When all others end at once, what is under way with one of them fails.
///
/// # Errors
/// Those of the database.
pub async fn replace_context_key(
    app: &App,
    how: Replacement,
    actor: &str,
    rng: &mut impl CryptoRng,
) -> Result<Replaced, DbError> {
    let mut key = Zeroizing::new([0; 32]);
    rng.fill_bytes(key.as_mut());
    let mut tx = locked(app).await?;
    let work: Result<_, DbError> = async {
        let conn = tx.conn();
        if how == Replacement::Overlapping && context_keys_overlap(conn).await? {
            return Ok(Replaced::UnderWay);
        }
        let id = sqlx::query_scalar!(
            r#"insert into platform.context_keys (key_id, key)
               select max(key_id) + 1, $1 from platform.context_keys returning key_id"#,
            key.as_slice()
        )
        .fetch_one(&mut *conn)
        .await?;
        let removed = match how {
            Replacement::Overlapping => Vec::new(),
            Replacement::AtOnce => {
                sqlx::query_scalar!("delete from platform.context_keys where key_id <> $1 returning key_id", id)
                    .fetch_all(&mut *conn)
                    .await?
            }
        };
        let removed = removed.iter().map(ToString::to_string).collect();
        note(conn, actor, Kind::Context, how, &id.to_string(), removed).await?;
        Ok(Replaced::Begun)
    }
    .await;
    let replaced = tx.finish(work).await?;
    app.db.tenancy.reload_key().await?;
    Ok(replaced)
}

/// Reads the keys that count now, as every replica does all the time, so that no request has to wait for it.
///
/// # Errors
/// Those of the database; what is known counts until its lease is over.
pub async fn reload(app: &App) -> Result<(), DbError> {
    app.token_keys.reload(&app.db.sys, &app.keys).await?;
    app.db.tenancy.reload_key().await
}

/// Removes keys of which nothing counts any more; returns how many.
///
/// # Errors
/// Those of the database.
pub async fn retire(app: &App) -> Result<u64, DbError> {
    let mut tx = locked(app).await?;
    let work: Result<_, DbError> = async {
        let conn = tx.conn();
        let tokens = sqlx::query_scalar!(
            "delete from platform.secrets as old where signs_from is not null and exists (
                 select from platform.secrets as next
                 where next.signs_from > old.signs_from and next.signs_from <= now() - $1::interval)
             returning name",
            interval(TOKEN_KEY_VERIFIES)
        )
        .fetch_all(&mut *conn)
        .await?;
        let contexts = sqlx::query_scalar!(
            r#"delete from platform.context_keys as old where exists (
                   select from platform.context_keys as next
                   where next.active and next.key_id > old.key_id and next.created_at <= now() - $1::interval)
               returning key_id::text as "name!""#,
            interval(CONTEXT_KEY_VERIFIES)
        )
        .fetch_all(&mut *conn)
        .await?;
        let removed = tokens.len() + contexts.len();
        note_removed(conn, "system", Kind::Token, tokens).await?;
        note_removed(conn, "system", Kind::Context, contexts).await?;
        Ok(removed as u64)
    }
    .await;
    tx.finish(work).await
}

/// The keys of tokens, oldest first.
///
/// # Errors
/// Those of the database.
pub async fn token_key_states(app: &App) -> Result<Vec<KeyState>, DbError> {
    let rows = sqlx::query!(
        r#"select name, signs_from as "signs_from!", now() as "now!",
               lead(signs_from) over (order by signs_from, name) + $1::interval as until
           from platform.secrets where signs_from is not null order by signs_from, name"#,
        interval(TOKEN_KEY_VERIFIES)
    )
    .fetch_all(&app.db.sys)
    .await?;
    let begun = rows.iter().rposition(|row| row.signs_from <= row.now).unwrap_or(0);
    let states = rows.into_iter().enumerate().map(|(at, row)| {
        let stage = stage(at, begun);
        KeyState { name: row.name, stage, signs_from: row.signs_from, until: row.until }
    });
    Ok(states.collect())
}

/// The keys of tenant contexts, oldest first.
///
/// # Errors
/// Those of the database.
pub async fn context_key_states(app: &App) -> Result<Vec<KeyState>, DbError> {
    let rows = sqlx::query!(
        r#"select key_id, created_at, lead(created_at) over (order by key_id) + $1::interval as until
           from platform.context_keys where active order by key_id"#,
        interval(CONTEXT_KEY_VERIFIES)
    )
    .fetch_all(&app.db.sys)
    .await?;
    let newest = rows.len().saturating_sub(1);
    let states = rows.into_iter().enumerate().map(|(at, row)| KeyState {
        name: row.key_id.to_string(),
        stage: stage(at, newest),
        signs_from: row.created_at,
        until: row.until,
    });
    Ok(states.collect())
}

fn stage(at: usize, signs: usize) -> Stage {
    match at.cmp(&signs) {
        std::cmp::Ordering::Less => Stage::Verifies,
        std::cmp::Ordering::Equal => Stage::Signs,
        std::cmp::Ordering::Greater => Stage::Next,
    }
}

async fn locked(app: &App) -> Result<Tx, DbError> {
    let mut tx = Tx::begin(&app.db.sys).await?;
    sqlx::query!("select pg_advisory_xact_lock($1)", LOCK).execute(tx.conn()).await?;
    Ok(tx)
}

async fn token_key_is_next(conn: &mut PgConnection) -> Result<bool, DbError> {
    let next =
        sqlx::query_scalar!(r#"select exists (select from platform.secrets where signs_from > now()) as "next!""#);
    Ok(next.fetch_one(conn).await?)
}

/// The database tries two keys: a third one may only come when the first has gone.
async fn context_keys_overlap(conn: &mut PgConnection) -> Result<bool, DbError> {
    let two = sqlx::query_scalar!(r#"select count(*) > 1 as "two!" from platform.context_keys where active"#);
    Ok(two.fetch_one(conn).await?)
}

#[derive(Clone, Copy)]
enum Kind {
    Token,
    Context,
}

async fn note(
    conn: &mut PgConnection,
    actor: &str,
    kind: Kind,
    how: Replacement,
    new: &str,
    removed: Vec<String>,
) -> Result<(), DbError> {
    let action = match kind {
        Kind::Token => "token_key.create",
        Kind::Context => "context_key.create",
    };
    let details = serde_json::json!({"at_once": how == Replacement::AtOnce});
    let entry = audit::Entry { actor, action, target: new, details, request_id: None };
    audit::record_platform(&mut *conn, entry).await?;
    note_removed(conn, actor, kind, removed).await
}

async fn note_removed(conn: &mut PgConnection, actor: &str, kind: Kind, removed: Vec<String>) -> Result<(), DbError> {
    let action = match kind {
        Kind::Token => "token_key.remove",
        Kind::Context => "context_key.remove",
    };
    for name in removed {
        let entry = audit::Entry { actor, action, target: &name, details: serde_json::json!({}), request_id: None };
        audit::record_platform(&mut *conn, entry).await?;
    }
    Ok(())
}

fn interval(duration: Duration) -> PgInterval {
    let microseconds = i64::try_from(duration.as_micros()).expect("constants of hours");
    PgInterval { months: 0, days: 0, microseconds }
}
