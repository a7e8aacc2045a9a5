//! Tokens of platform staff: who holds one is its name in the audit log; one that was revoked is worth nothing from the
//! next request on, on every replica.

use cvault_types::Secret;
use serde_json::json;
use sqlx::{PgConnection, PgPool};
use time::Duration;
use uuid::Uuid;

use super::tokens::{self, ADMIN_SECONDS};
use crate::app::App;
use crate::audit;
use crate::db::{DbError, Tx};

/// Who a token is for: 1 to 64 letters, digits and `.@_-`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaffName(String);

impl StaffName {
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || ".@_-".contains(c);
        ((1..=64).contains(&text.len()) && text.chars().all(allowed)).then(|| Self(text.to_owned()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A new token, in clear for the only time.
#[derive(Debug)]
pub struct NewToken {
    pub token: Secret,
    /// What it is revoked by.
    pub id: Uuid,
}

/// Makes a token for `name`; `by` made it.
///
/// # Errors
/// Those of the database.
pub async fn issue(app: &App, name: &StaffName, by: &str) -> Result<NewToken, DbError> {
    let id = Uuid::now_v7();
    let now = app.clock.now();
    let keys = app.token_keys().await?;
    let token = tokens::mint_admin_as(keys.signing(now), &app.config.public_url, name.as_str(), id, now);
    note(&app.db.sys, by, "admin_token.create", id, json!({"name": name.as_str()})).await?;
    Ok(NewToken { token, id })
}

/// Revokes a token; `false` when it was revoked before. One that was never issued can be revoked too: nothing is stored of
/// tokens, only of their revocation.
///
/// # Errors
/// Those of the database.
pub async fn revoke(app: &App, id: Uuid, by: &str) -> Result<bool, DbError> {
    // whenever it was issued, it lives no longer than that
    let expires_at = app.clock.now() + Duration::seconds(ADMIN_SECONDS.cast_signed());
    let mut tx = Tx::begin(&app.db.sys).await?;
    let work = async {
        let done = sqlx::query!(
            "insert into platform.revoked_admin_tokens (token_id, expires_at) values ($1, $2) on conflict do nothing",
            id,
            expires_at
        )
        .execute(tx.conn())
        .await?;
        if done.rows_affected() == 1 {
            let target = id.to_string();
            let (action, details) = ("admin_token.revoke", json!({}));
            let entry = audit::Entry { actor: by, action, target: &target, details, request_id: None };
            audit::record_platform(tx.conn(), entry).await?;
        }
        Ok(done.rows_affected() == 1)
    }
    .await;
    tx.finish(work).await
}

/// Whether a token was revoked.
///
/// # Errors
/// Those of the database.
pub async fn is_revoked(sys: &PgPool, id: Uuid) -> Result<bool, DbError> {
    let found = sqlx::query_scalar!(
        r#"select exists (select from platform.revoked_admin_tokens where token_id = $1) as "revoked!""#,
        id
    )
    .fetch_one(sys)
    .await?;
    Ok(found)
}

/// Forgets revocations of what has expired, and approvals of a month ago; returns how many. With role `cvault_sys`.
pub(crate) async fn trim(conn: &mut PgConnection) -> Result<u64, sqlx::Error> {
    let revoked = sqlx::query!("delete from platform.revoked_admin_tokens where expires_at < now()");
    let approved = sqlx::query!("delete from platform.admin_approvals where expires_at < now() - interval '30 days'");
    let rows = revoked.execute(&mut *conn).await?.rows_affected();
    Ok(rows + approved.execute(conn).await?.rows_affected())
}

async fn note(
    sys: &PgPool,
    actor: &str,
    action: &'static str,
    id: Uuid,
    details: serde_json::Value,
) -> Result<(), DbError> {
    let target = id.to_string();
    let mut tx = Tx::begin(sys).await?;
    let entry = audit::Entry { actor, action, target: &target, details, request_id: None };
    let work = audit::record_platform(tx.conn(), entry).await;
    tx.finish(work).await
}
