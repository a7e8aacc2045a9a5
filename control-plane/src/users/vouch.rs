//! A tenant's backend vouches for a user it knows by a name of its own; the user is made when the name is new.

use cvault_types::UserId;
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{ExternalId, RoomError, lock_for_new_user};
use crate::audit;
use crate::db::DbError;
use crate::tenancy::TenantTx;
use crate::tenants::Actor;

#[derive(Debug, thiserror::Error)]
pub enum VouchError {
    #[error("the user is disabled")]
    Disabled,
    #[error("the tenant has {used} of {max} users")]
    LimitExceeded { max: i64, used: i64 },
    #[error("the tenant is suspended or deleted")]
    TenantClosed,
    #[error(transparent)]
    Db(#[from] DbError),
}

impl From<RoomError> for VouchError {
    fn from(error: RoomError) -> Self {
        match error {
            RoomError::LimitExceeded { max, used } => Self::LimitExceeded { max, used },
            RoomError::TenantClosed => Self::TenantClosed,
            RoomError::Db(error) => Self::Db(error),
        }
    }
}

/// Who was vouched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vouched {
    Known(UserId),
    New(UserId),
}

/// The user of this name. A known user costs no lock that others wait for.
///
/// # Errors
/// By variant; the transaction must then be rolled back.
pub async fn vouch(
    tx: &mut TenantTx,
    external_id: &ExternalId,
    actor: &Actor,
    now: OffsetDateTime,
) -> Result<Vouched, VouchError> {
    if let Some(user) = known(tx, external_id).await? {
        return Ok(Vouched::Known(user));
    }
    lock_for_new_user(tx).await?;
    // a statement of its own: it sees who came while the lock was waited for
    if let Some(user) = known(tx, external_id).await? {
        return Ok(Vouched::Known(user));
    }
    let user = UserId::from_uuid(Uuid::now_v7());
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "insert into cvault.users (tenant_id, user_id, external_user_id, created_at) values ($1, $2, $3, $4)",
        tenant,
        user.uuid(),
        external_id.as_str(),
        now
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    let entry = audit::Entry {
        actor: &actor.name,
        action: "user.create",
        target: &user.to_string(),
        details: json!({}),
        request_id: actor.request_id,
    };
    audit::record(tx, entry).await?;
    Ok(Vouched::New(user))
}

/// Shared: a deletion waits for the tokens that are about to be made, and revokes them.
async fn known(tx: &mut TenantTx, external_id: &ExternalId) -> Result<Option<UserId>, VouchError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        "select user_id, status from cvault.users where tenant_id = $1 and external_user_id = $2 for share",
        tenant,
        external_id.as_str()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?;
    match row {
        Some(row) if row.status == "active" => Ok(Some(UserId::from_uuid(row.user_id))),
        Some(_) => Err(VouchError::Disabled),
        None => Ok(None),
    }
}
