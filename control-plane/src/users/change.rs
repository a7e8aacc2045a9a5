//! Disabling, enabling and renaming a user.

use cvault_types::user::{UpdateUser, User, UserStatus};
use cvault_types::{TenantId, UserId};
use serde_json::json;
use time::OffsetDateTime;

use super::{ExternalId, read};
use crate::app::App;
use crate::audit;
use crate::db::DbError;
use crate::http::Problem;
use crate::tenancy::TenantTx;
use crate::tenants::{self, Actor};

#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    #[error("there is no such user")]
    NotFound,
    #[error("another user has this external id")]
    ExternalIdTaken,
    #[error("the user has no e-mail address, and so needs its external id")]
    Unidentified,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// What is to change of a user, checked; `None` stays.
#[derive(Debug, Clone)]
pub struct UserChange {
    status: Option<UserStatus>,
    external_id: Option<Option<ExternalId>>,
}

impl UserChange {
    /// # Errors
    /// All faults at once.
    pub fn parse(request: UpdateUser) -> Result<Self, Problem> {
        let external_id = match request.external_id {
            None => None,
            Some(None) => Some(None),
            Some(Some(text)) => Some(Some(
                ExternalId::parse(&text)
                    .map_err(|fault| Problem::validation().field("/external_id", fault.code, fault.detail))?,
            )),
        };
        Ok(Self { status: request.status, external_id })
    }

    /// Takes the devices of a disabled user off their servers, or puts an enabled one's back; should this process end before,
    /// the periodic task does it.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn enforce(&self, app: &App, tenant: TenantId) -> Result<(), DbError> {
        if self.status.is_some() {
            tenants::enforce_users(app, tenant).await?;
        }
        Ok(())
    }
}

/// Changes a user. One that is disabled has no logins any more. After COMMIT, call [`UserChange::enforce`].
///
/// # Errors
/// By variant.
pub async fn update(
    tx: &mut TenantTx,
    id: UserId,
    change: &UserChange,
    actor: &Actor,
    now: OffsetDateTime,
) -> Result<User, UpdateError> {
    let tenant = tx.tenant().uuid();
    let status = change.status.map(|status| match status {
        UserStatus::Active => "active",
        UserStatus::Disabled => "disabled",
    });
    let changed = sqlx::query!(
        "update cvault.users
         set status = coalesce($3, status), external_user_id = case when $4 then $5 else external_user_id end
         where tenant_id = $1 and user_id = $2 and status <> 'deleted' and deleting_since is null",
        tenant,
        id.uuid(),
        status,
        change.external_id.is_some(),
        change.external_id.as_ref().and_then(|id| id.as_ref().map(ExternalId::as_str))
    )
    .execute(tx.conn())
    .await
    .map_err(|error| {
        let error = DbError::from(error);
        match error.constraint() {
            Some("users_external_id_unique") => UpdateError::ExternalIdTaken,
            Some("users_identified") => UpdateError::Unidentified,
            Some(_) | None => UpdateError::Db(error),
        }
    })?;
    if changed.rows_affected() == 0 {
        return Err(UpdateError::NotFound);
    }
    if change.status == Some(UserStatus::Disabled) {
        sqlx::query!(
            "update cvault.refresh_tokens set revoked_at = $3
             where tenant_id = $1 and user_id = $2 and revoked_at is null",
            tenant,
            id.uuid(),
            now
        )
        .execute(tx.conn())
        .await
        .map_err(DbError::from)?;
    }
    let entry = audit::Entry {
        actor: &actor.name,
        action: "user.update",
        target: &id.to_string(),
        details: json!({"status": status, "external_id_changed": change.external_id.is_some()}),
        request_id: actor.request_id,
    };
    audit::record(tx, entry).await?;
    read::find(tx, id).await?.ok_or(UpdateError::NotFound)
}
