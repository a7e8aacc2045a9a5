//! The table `cvault.outbox`, as a tenant's transaction sees it.

use cvault_types::{ErrorCode, MailId, TenantId};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{Data, Mail};
use crate::db::DbError;
use crate::http::Problem;
use crate::keys::{Aad, KeyError, KeyRing};
use crate::tenancy::TenantTx;

/// Mails of one tenant that may wait. Far above what its people cause while the mail server is away for a day.
const MAX_WAITING: i64 = 1_000;

#[derive(Debug, thiserror::Error)]
pub enum EnqueueError {
    #[error("the tenant has {MAX_WAITING} mails waiting")]
    Full,
    #[error("the mail cannot be sealed")]
    Key(#[from] KeyError),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What is sealed.
#[derive(Serialize, Deserialize)]
pub(super) struct Payload {
    pub(super) to: String,
    pub(super) data: Data,
}

/// Adds the mail to the tenant's transaction: it is sent when that is committed, and never was when it is not.
///
/// # Errors
/// [`EnqueueError::Full`] when too many of the tenant's mails wait for the mail server.
pub async fn enqueue(
    tx: &mut TenantTx,
    keys: &KeyRing,
    mail: &Mail,
    now: OffsetDateTime,
) -> Result<MailId, EnqueueError> {
    let tenant = tx.tenant();
    let row = sqlx::query!(
        r#"select t.data_key_sealed,
                  (select count(*) from (select from cvault.outbox o
                                         where o.tenant_id = t.tenant_id and o.delivered_at is null and o.dead_at is null
                                         limit $2) as waiting) as "waiting!"
           from cvault.tenants t where t.tenant_id = $1"#,
        tenant.uuid(),
        MAX_WAITING
    )
    .fetch_one(tx.conn())
    .await
    .map_err(DbError::from)?;
    if row.waiting >= MAX_WAITING {
        return Err(EnqueueError::Full);
    }
    let id = MailId::from_uuid(Uuid::now_v7());
    let data_key = row.data_key_sealed.ok_or(KeyError::DoesNotOpen)?;
    let payload = Payload { to: mail.to.as_str().to_owned(), data: mail.data.clone() };
    let text = Zeroizing::new(serde_json::to_vec(&payload).map_err(|_| KeyError::Layout)?);
    let sealed = keys.seal(&data_key, payload_aad(tenant, id), &text)?;
    sqlx::query!(
        "insert into cvault.outbox (tenant_id, mail_id, kind, payload_sealed, created_at, expires_at, next_attempt_at)
         values ($1, $2, $3, $4, $5, $6, $5)",
        tenant.uuid(),
        id.uuid(),
        mail.kind.as_str(),
        sealed,
        now,
        mail.data.valid_until
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    Ok(id)
}

pub(super) fn payload_aad(tenant: TenantId, mail: MailId) -> Aad {
    Aad { table: "outbox", column: "payload_sealed", tenant, row: mail.uuid() }
}

impl From<EnqueueError> for Problem {
    fn from(error: EnqueueError) -> Self {
        match error {
            EnqueueError::Full => Self::new(ErrorCode::Overloaded)
                .detail("Too many mails of this tenant are waiting to be sent.")
                .retry_after(60),
            EnqueueError::Key(error) => Self::internal(&error),
            EnqueueError::Db(error) => error.into(),
        }
    }
}
