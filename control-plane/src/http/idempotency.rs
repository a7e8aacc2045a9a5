//! `Idempotency-Key`: a retried write happens once. The key, a fingerprint of the request and the sealed answer are
//! stored in the business transaction itself, so that either all of it happened or nothing.
//!
//! A second request with the same key waits a little for the first one's transaction (the unique index makes it), then
//! gets its answer. Only successes are kept: a refusal changed nothing, and is decided anew.
//!
//! Honoured by every write whose caller is known before it begins; the few others say what a repetition does. Writes of
//! platform staff that belong to no tenant keep theirs in [`super::staff`].

use axum::response::{IntoResponse, Response};
use cvault_types::{ErrorCode, TenantId};
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{Json, Problem, context};
use crate::app::App;
use crate::db::DbError;
use crate::keys::{Aad, KeyRing, PlatformSecrets};
use crate::tenancy::TenantTx;

/// How long a second request waits for the first; less than a statement may take.
pub(super) const PATIENCE: &str = "set local lock_timeout = '2s'";
/// SQLSTATE of a lock that was not had in time.
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// `()` as JSON.
const NOTHING: &[u8] = b"null";
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// What a request's key turned out to be.
#[derive(Debug)]
pub enum Claim {
    /// There is no key, or it is new: do the work, then [`keep`] the answer.
    Proceed(Option<Place>),
    /// The work was done: this was its answer.
    Replay(Replay),
}

/// What was kept.
#[derive(Debug)]
pub struct Replay {
    status: StatusCode,
    body: Zeroizing<Vec<u8>>,
}

/// Where the answer will be kept.
#[derive(Debug)]
pub struct Place {
    pub(super) principal: String,
    pub(super) key: String,
}

/// Looks at the request's key and claims it for the transaction. `principal` is who calls: a user or an API key.
///
/// # Errors
/// `IDEMPOTENCY_KEY_REUSED` when the key came with another request before; `VALIDATION_FAILED` for a malformed one.
pub async fn claim(tx: &mut TenantTx, app: &App, principal: String) -> Result<Claim, Problem> {
    let Some(Wanted { key, fingerprint }) = wanted(&app.secrets)? else { return Ok(Claim::Proceed(None)) };
    let tenant = tx.tenant().uuid();
    sqlx::raw_sql(PATIENCE).execute(tx.conn()).await.map_err(DbError::from)?;
    // a key older than 24 hours is as good as new
    let claimed = sqlx::query!(
        "insert into cvault.idempotency_keys as k (tenant_id, principal, key, fingerprint) values ($1, $2, $3, $4)
         on conflict on constraint idempotency_keys_pkey do update
             set fingerprint = excluded.fingerprint, status = null, response_sealed = null, created_at = now()
             where k.created_at < now() - interval '24 hours'",
        tenant,
        principal,
        key,
        fingerprint.as_slice()
    )
    .execute(tx.conn())
    .await
    .map_err(not_claimed)?;
    sqlx::raw_sql("set local lock_timeout to default").execute(tx.conn()).await.map_err(DbError::from)?;
    let place = Place { principal, key };
    if claimed.rows_affected() == 1 {
        return Ok(Claim::Proceed(Some(place)));
    }
    let row = sqlx::query!(
        "select k.fingerprint, k.status, k.response_sealed, t.data_key_sealed
         from cvault.idempotency_keys k join cvault.tenants t using (tenant_id)
         where k.tenant_id = $1 and k.principal = $2 and k.key = $3",
        tenant,
        place.principal,
        place.key
    )
    .fetch_one(tx.conn())
    .await
    .map_err(DbError::from)?;
    if row.fingerprint != fingerprint {
        return Err(reused());
    }
    let kept = Kept { status: row.status, sealed: row.response_sealed, data_key: row.data_key_sealed };
    kept.open(&app.keys, place.aad(tenant)).map(Claim::Replay)
}

/// Does `work` once for each key of `principal`, in one transaction with the answer that is kept. `()` is an answer without a
/// body.
///
/// # Errors
/// As [`claim`], what `work` says, or the database's.
pub async fn once<T: Serialize>(
    app: &App,
    tenant: TenantId,
    principal: String,
    status: StatusCode,
    work: impl AsyncFnOnce(&mut TenantTx) -> Result<T, Problem>,
) -> Result<Response, Problem> {
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let done = async {
        let place = match claim(&mut tx, app, principal).await? {
            Claim::Proceed(place) => place,
            Claim::Replay(replay) => return Ok(replay.into_response()),
        };
        let answer = work(&mut tx).await?;
        keep(&mut tx, &app.keys, place, status, &answer).await?;
        let body = serde_json::to_vec(&answer).map_err(|error| Problem::internal(&error))?;
        Ok(if body == NOTHING { status.into_response() } else { (status, Json(answer)).into_response() })
    }
    .await;
    tx.finish(done).await
}

/// The answer to an earlier request, asked before work that is costly or takes several transactions.
///
/// # Errors
/// As [`claim`].
pub async fn earlier(app: &App, tenant: TenantId, principal: String) -> Result<Option<Response>, Problem> {
    if !context::is_idempotent() {
        return Ok(None);
    }
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let claimed = claim(&mut tx, app, principal).await;
    tx.rollback().await?;
    Ok(match claimed? {
        Claim::Proceed(_) => None,
        Claim::Replay(replay) => Some(replay.into_response()),
    })
}

/// A row, as far as it has been filled in.
pub(super) struct Kept {
    pub(super) status: Option<i16>,
    pub(super) sealed: Option<Vec<u8>>,
    /// `None`: the tenant is deleted, and its answers with it.
    pub(super) data_key: Option<Vec<u8>>,
}

impl Kept {
    pub(super) fn open(self, keys: &KeyRing, aad: Aad) -> Result<Replay, Problem> {
        match (self.status, self.sealed, self.data_key) {
            (Some(status), Some(sealed), _) if sealed.is_empty() => Ok(Replay::of(status, Zeroizing::default())),
            (Some(status), Some(sealed), Some(data_key)) => {
                let body = keys.open(&data_key, aad, &sealed).map_err(|error| Problem::internal(&error))?;
                Ok(Replay::of(status, body))
            }
            (Some(_), Some(_), None) => Err(Problem::new(ErrorCode::NotFound)),
            (None, _, _) | (_, None, _) => Err(in_use()),
        }
    }
}

/// A well-formed key, and what its request was.
pub(super) struct Wanted {
    pub(super) key: String,
    /// Keyed, because a body may hold a password; by the pepper, which stays when the key-encryption key is another.
    pub(super) fingerprint: [u8; 32],
}

pub(super) fn wanted(secrets: &PlatformSecrets) -> Result<Option<Wanted>, Problem> {
    let Some(request) = context::idempotency() else { return Ok(None) };
    let key = request.key.ok_or_else(|| {
        Problem::validation().field(
            "Idempotency-Key",
            "invalid_format",
            "must be one header of 1 to 255 visible characters",
        )
    })?;
    Ok(Some(Wanted { key, fingerprint: secrets.peppered("idempotency", &request.fingerprint) }))
}

pub(super) fn not_claimed(error: sqlx::Error) -> Problem {
    let code = error.as_database_error().and_then(|refused| refused.code().map(std::borrow::Cow::into_owned));
    if code.as_deref() == Some(LOCK_NOT_AVAILABLE) {
        return in_use();
    }
    let error = DbError::from(error);
    match error.constraint() {
        // platform staff, with the key of a request about another tenant
        Some("idempotency_keys_staff") => reused(),
        Some("idempotency_keys_tenant_fkey") => Problem::new(ErrorCode::NotFound),
        Some(_) | None => error.into(),
    }
}

pub(super) fn reused() -> Problem {
    Problem::new(ErrorCode::IdempotencyKeyReused)
        .detail("This Idempotency-Key came with another request before. Use a new key for each new request.")
}

pub(super) fn in_use() -> Problem {
    Problem::new(ErrorCode::IdempotencyKeyInUse)
        .detail("A request with this Idempotency-Key is being served. Ask again for its answer.")
        .retry_after(1)
}

impl Replay {
    pub(super) fn of(status: i16, body: Zeroizing<Vec<u8>>) -> Self {
        let code = u16::try_from(status).ok().and_then(|code| StatusCode::from_u16(code).ok());
        Self { status: code.unwrap_or(StatusCode::OK), body }
    }

    /// For answers that are made anew from what was kept.
    ///
    /// # Errors
    /// `INTERNAL_ERROR` when something else was kept.
    pub fn kept<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        serde_json::from_slice(&self.body).map_err(|error| Problem::internal(&error))
    }

    /// `answer`, marked as a repetition.
    pub fn with(&self, answer: &impl Serialize) -> Result<Response, Problem> {
        let body = serde_json::to_vec(answer).map_err(|error| Problem::internal(&error))?;
        Ok(replayed(self.status, body))
    }
}

impl IntoResponse for Replay {
    fn into_response(self) -> Response {
        replayed(self.status, self.body.to_vec())
    }
}

fn replayed(status: StatusCode, body: Vec<u8>) -> Response {
    let marked = [(REPLAYED, HeaderValue::from_static("true"))];
    if body.is_empty() {
        return (status, marked).into_response();
    }
    (status, marked, [(CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response()
}

/// Gives a claim back in a transaction that is committed although the request was refused.
///
/// # Errors
/// Those of the database.
pub async fn give_back(tx: &mut TenantTx, place: Option<Place>) -> Result<(), DbError> {
    let Some(place) = place else { return Ok(()) };
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "delete from cvault.idempotency_keys where tenant_id = $1 and principal = $2 and key = $3",
        tenant,
        place.principal,
        place.key
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Keeps the answer beside the work, sealed with the tenant's data key: it may hold tokens and private keys.
///
/// # Errors
/// Those of the database and the keys.
pub async fn keep(
    tx: &mut TenantTx,
    keys: &KeyRing,
    place: Option<Place>,
    status: StatusCode,
    answer: &impl Serialize,
) -> Result<(), Problem> {
    let Some(place) = place else { return Ok(()) };
    let tenant = tx.tenant().uuid();
    let body = Zeroizing::new(serde_json::to_vec(answer).map_err(|error| Problem::internal(&error))?);
    let sealed = if *body == NOTHING {
        Vec::new()
    } else {
        let data_key = sqlx::query_scalar!("select data_key_sealed from cvault.tenants where tenant_id = $1", tenant)
            .fetch_one(tx.conn())
            .await
            .map_err(DbError::from)?
            .ok_or_else(|| Problem::new(ErrorCode::InvalidApiKey))?;
        keys.seal(&data_key, place.aad(tenant), &body).map_err(|error| Problem::internal(&error))?
    };
    sqlx::query!(
        "update cvault.idempotency_keys set status = $4, response_sealed = $5
         where tenant_id = $1 and principal = $2 and key = $3",
        tenant,
        place.principal,
        place.key,
        i16::try_from(status.as_u16()).unwrap_or(200),
        sealed
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    Ok(())
}

impl Place {
    pub(super) fn aad(&self, tenant: Uuid) -> Aad {
        let digest = Sha256::new().chain_update(&self.principal).chain_update([0]).chain_update(&self.key).finalize();
        let row = Uuid::from_slice(&digest[..16]).expect("16 bytes make a UUID");
        Aad { table: "idempotency_keys", column: "response_sealed", tenant: TenantId::from_uuid(tenant), row }
    }
}
