//! `Idempotency-Key` of platform staff. What is kept of a write to a tenant lies beside the tenant's own keys (see
//! [`super::idempotency`]); what belongs to no tenant is sealed with the key-encryption key, in the write's own
//! transaction of role `cvault_sys`.

use axum::response::{IntoResponse, Response};
use cvault_types::ErrorCode;
use futures::future::BoxFuture;
use http::StatusCode;
use serde::Serialize;
use zeroize::Zeroizing;

use super::idempotency::{self, Kept, Place, Replay, Wanted};
use super::{Admin, Json, Problem};
use crate::app::App;
use crate::auth::admin_tokens;
use crate::auth::approvals::{self, Action};
use crate::db::{DbError, Tx};
use crate::keys::{KeyRing, kept_answer_aad};
use crate::step_up::Approval;
use crate::step_up::risk::Verdict;
use crate::tenants::Actor;

impl Admin {
    /// Who it is to the audit log and to idempotency.
    #[must_use]
    pub fn actor(&self) -> Actor {
        Actor { name: format!("admin:{}", self.subject), request_id: Some(self.request_id) }
    }
}

/// In front of an operation that needs a second proof: an approval of exactly this. Outside of any transaction; it is used up
/// whatever comes of the operation. A token that looks stolen is revoked.
///
/// # Errors
/// `CHALLENGE_REQUIRED`, `SESSION_TERMINATED`, or the database's.
pub async fn approved(app: &App, admin: &Admin, action: Action, target: &str) -> Result<(), Problem> {
    if !app.config.admin_step_up {
        return Ok(());
    }
    let approval = match &admin.challenge_token {
        None => Approval::Missing,
        Some(token) if approvals::take(app, action, target, token, &admin.actor().name).await? => Approval::Right,
        Some(_) => Approval::Wrong,
    };
    if app.staff_watch.judge(admin.token, approval, app.clock.now()) == Verdict::Block {
        tracing::warn!(staff = admin.subject, token = %admin.token, action = action.as_str(), "a staff token was revoked");
        admin_tokens::revoke(app, admin.token, "platform").await?;
        return Err(Problem::new(ErrorCode::SessionTerminated).detail(
            "This token looked stolen and was revoked. Make another one with `admin token` on the control plane's host.",
        ));
    }
    if approval == Approval::Right {
        return Ok(());
    }
    Err(Problem::new(ErrorCode::ChallengeRequired).detail(format!(
        "This has to be approved: run `admin approve --action {} --target {target}` on the control plane's host, and \
         repeat the request with what it prints as X-Challenge-Token.",
        action.as_str()
    )))
}

/// Does `work` once for each `Idempotency-Key` of this caller, in one transaction with the answer that is kept.
///
/// # Errors
/// What `work` says; `IDEMPOTENCY_KEY_REUSED`, `IDEMPOTENCY_KEY_IN_USE`; or the database's.
pub async fn once<T: Serialize + Send>(
    app: &App,
    admin: &Admin,
    status: StatusCode,
    work: impl for<'a> FnOnce(&'a mut Tx, App, Actor) -> BoxFuture<'a, Result<T, Problem>> + Send,
) -> Result<Response, Problem> {
    let actor = admin.actor();
    let mut tx = Tx::begin(&app.db.sys).await?;
    let done = async {
        let wanted = idempotency::wanted(&app.secrets)?;
        if let Some(wanted) = &wanted
            && let Some(replay) = claim(&mut tx, &app.keys, &actor.name, wanted).await?
        {
            return Ok(replay.into_response());
        }
        let answer = work(&mut tx, app.clone(), actor.clone()).await?;
        if let Some(wanted) = &wanted {
            keep(&mut tx, &app.keys, &actor.name, &wanted.key, status, &answer).await?;
        }
        Ok(if status == StatusCode::NO_CONTENT {
            status.into_response()
        } else {
            (status, Json(answer)).into_response()
        })
    }
    .await;
    tx.finish(done).await
}

/// The answer to an earlier request of this caller to any tenant with the same key. Asked before a write to a tenant: the
/// tenant may not exist yet, or any more.
///
/// # Errors
/// `IDEMPOTENCY_KEY_REUSED`, `NOT_FOUND` for an answer that was destroyed with its tenant, or the database's.
pub async fn earlier(app: &App, actor: &Actor) -> Result<Option<Response>, Problem> {
    let Some(Wanted { key, fingerprint }) = idempotency::wanted(&app.secrets)? else { return Ok(None) };
    sqlx::query!(
        "delete from cvault.idempotency_keys
         where principal = $1 and principal like 'admin:%' and key = $2 and created_at < now() - interval '24 hours'",
        actor.name,
        key
    )
    .execute(&app.db.sys)
    .await
    .map_err(DbError::from)?;
    let row = sqlx::query!(
        "select k.tenant_id, k.fingerprint, k.status, k.response_sealed, t.data_key_sealed
         from cvault.idempotency_keys k join cvault.tenants t using (tenant_id)
         where k.principal = $1 and k.principal like 'admin:%' and k.key = $2",
        actor.name,
        key
    )
    .fetch_optional(&app.db.sys)
    .await
    .map_err(DbError::from)?;
    let Some(row) = row else { return Ok(None) };
    if row.fingerprint != fingerprint {
        return Err(idempotency::reused());
    }
    let place = Place { principal: actor.name.clone(), key };
    let kept = Kept { status: row.status, sealed: row.response_sealed, data_key: row.data_key_sealed };
    Ok(Some(kept.open(&app.keys, place.aad(row.tenant_id))?.into_response()))
}

async fn claim(tx: &mut Tx, keys: &KeyRing, principal: &str, wanted: &Wanted) -> Result<Option<Replay>, Problem> {
    sqlx::raw_sql(idempotency::PATIENCE).execute(tx.conn()).await.map_err(DbError::from)?;
    let claimed = sqlx::query!(
        "insert into platform.idempotency_keys as k (principal, key, fingerprint) values ($1, $2, $3)
         on conflict on constraint idempotency_keys_pkey do update
             set fingerprint = excluded.fingerprint, status = null, response_sealed = null, kek_version = null, created_at = now()
             where k.created_at < now() - interval '24 hours'",
        principal,
        wanted.key,
        wanted.fingerprint.as_slice()
    )
    .execute(tx.conn())
    .await
    .map_err(idempotency::not_claimed)?;
    sqlx::raw_sql("set local lock_timeout to default").execute(tx.conn()).await.map_err(DbError::from)?;
    if claimed.rows_affected() == 1 {
        return Ok(None);
    }
    let row = sqlx::query!(
        "select fingerprint, status, response_sealed from platform.idempotency_keys where principal = $1 and key = $2",
        principal,
        wanted.key
    )
    .fetch_one(tx.conn())
    .await
    .map_err(DbError::from)?;
    if row.fingerprint != wanted.fingerprint {
        return Err(idempotency::reused());
    }
    let (Some(status), Some(sealed)) = (row.status, row.response_sealed) else { return Err(idempotency::in_use()) };
    let body =
        keys.unwrap(&kept_answer_aad(principal, &wanted.key), &sealed).map_err(|error| Problem::internal(&error))?;
    Ok(Some(Replay::of(status, body)))
}

async fn keep(
    tx: &mut Tx,
    keys: &KeyRing,
    principal: &str,
    key: &str,
    status: StatusCode,
    answer: &impl Serialize,
) -> Result<(), Problem> {
    let body = Zeroizing::new(serde_json::to_vec(answer).map_err(|error| Problem::internal(&error))?);
    let sealed = keys.wrap(&kept_answer_aad(principal, key), &body);
    sqlx::query!(
        "update platform.idempotency_keys set status = $3, response_sealed = $4, kek_version = $5
         where principal = $1 and key = $2",
        principal,
        key,
        i16::try_from(status.as_u16()).unwrap_or(200),
        sealed,
        keys.version()
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    Ok(())
}
