//! What an operator does about mails that wait or were given up.

use cvault_types::{MailId, TenantId};
use serde_json::json;
use sqlx::PgPool;
use time::OffsetDateTime;

use crate::app::App;
use crate::audit;
use crate::db::{DbError, Tx};

/// A mail that is not delivered; to whom it goes is sealed.
#[derive(Debug)]
pub struct Listed {
    pub tenant: TenantId,
    pub id: MailId,
    pub kind: String,
    pub created_at: OffsetDateTime,
    pub expires_at: OffsetDateTime,
    pub attempts: i32,
    pub next_attempt_at: OffsetDateTime,
    pub dead: bool,
    pub last_error: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum RetryError {
    #[error("there is no such mail that was given up, or its time is over")]
    NotThere,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// The oldest of those that wait, or of those that were given up.
///
/// # Errors
/// Those of the database.
pub async fn list(sys: &PgPool, dead: bool, limit: i64) -> Result<Vec<Listed>, DbError> {
    let rows = sqlx::query!(
        r#"select tenant_id, mail_id, kind, created_at, expires_at, attempts, next_attempt_at, dead_at is not null as "dead!",
                  last_error
           from cvault.outbox where delivered_at is null and (dead_at is not null) = $1
           order by created_at, mail_id limit $2"#,
        dead,
        limit
    )
    .fetch_all(sys)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Listed {
            tenant: TenantId::from_uuid(row.tenant_id),
            id: MailId::from_uuid(row.mail_id),
            kind: row.kind,
            created_at: row.created_at,
            expires_at: row.expires_at,
            attempts: row.attempts,
            next_attempt_at: row.next_attempt_at,
            dead: row.dead,
            last_error: row.last_error,
        })
        .collect())
}

/// Puts a mail that was given up back at the beginning of its attempts.
///
/// # Errors
/// [`RetryError::NotThere`] also when what it asks for is over.
pub async fn retry(app: &App, id: MailId, actor: &str) -> Result<(), RetryError> {
    let now = app.clock.now();
    let tenant = sqlx::query_scalar!("select tenant_id from cvault.outbox where mail_id = $1", id.uuid())
        .fetch_optional(&app.db.sys)
        .await
        .map_err(DbError::from)?
        .map(TenantId::from_uuid)
        .ok_or(RetryError::NotThere)?;
    let mut tx = Tx::begin(&app.db.sys).await?;
    let work = again(&mut tx, tenant, id, actor, now).await;
    tx.finish(work).await
}

async fn again(tx: &mut Tx, tenant: TenantId, id: MailId, actor: &str, now: OffsetDateTime) -> Result<(), RetryError> {
    let done = sqlx::query!(
        "update cvault.outbox set dead_at = null, attempts = 0, next_attempt_at = $3
         where tenant_id = $1 and mail_id = $2 and dead_at is not null and payload_sealed is not null and expires_at > $3",
        tenant.uuid(),
        id.uuid(),
        now
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    if done.rows_affected() == 0 {
        return Err(RetryError::NotThere);
    }
    let target = id.to_string();
    let entry = audit::Entry { actor, action: "mail.retry", target: &target, details: json!({}), request_id: None };
    Ok(audit::record_for(tx.conn(), tenant, entry).await?)
}
