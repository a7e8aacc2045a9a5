//! Refresh tokens: opaque, stored as a peppered hash, each good for one use. All tokens that came from one login are a
//! family; when a used one comes back, somebody copied it, and the family is revoked.

use cvault_types::{Secret, UserId};
use rand::CryptoRng;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::opaque;
use crate::db::DbError;
use crate::keys::PlatformSecrets;
use crate::tenancy::TenantTx;

/// A login that is not used this long ends.
const LIFETIME: Duration = Duration::days(30);

/// A login of a user.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    pub id: Uuid,
    pub user: UserId,
}

impl Family {
    #[must_use]
    pub fn begin(user: UserId) -> Self {
        Self { id: Uuid::now_v7(), user }
    }
}

/// What became of a presented token. `Reused` has revoked the family: commit all the same.
#[derive(Debug, Clone, Copy)]
pub enum Taken {
    Valid(Family),
    Reused(Family),
    Expired(Family),
    Revoked(Family),
    Unknown,
}

/// Adds a token to the family.
///
/// # Errors
/// Those of the database.
pub async fn issue(
    tx: &mut TenantTx,
    secrets: &PlatformSecrets,
    family: Family,
    now: OffsetDateTime,
    rng: &mut impl CryptoRng,
) -> Result<Secret, DbError> {
    let token = opaque::REFRESH_TOKEN.draw(rng);
    let tenant = tx.tenant().uuid();
    let hash = hash(secrets, token.expose());
    sqlx::query!(
        "insert into cvault.refresh_tokens (tenant_id, token_hash, family_id, user_id, issued_at, expires_at)
         values ($1, $2, $3, $4, $5, $6)",
        tenant,
        hash.as_slice(),
        family.id,
        family.user.uuid(),
        now,
        now + LIFETIME
    )
    .execute(tx.conn())
    .await?;
    Ok(token)
}

/// Uses a token up. The row lock makes one of two simultaneous uses the second.
///
/// # Errors
/// Those of the database.
pub async fn take(
    tx: &mut TenantTx,
    secrets: &PlatformSecrets,
    token: &Secret,
    now: OffsetDateTime,
) -> Result<Taken, DbError> {
    if !opaque::REFRESH_TOKEN.is_well_formed(token.expose()) {
        return Ok(Taken::Unknown);
    }
    let tenant = tx.tenant().uuid();
    let hash = hash(secrets, token.expose());
    let Some(row) = sqlx::query!(
        "select family_id, user_id, expires_at, used_at, revoked_at from cvault.refresh_tokens
         where tenant_id = $1 and token_hash = $2 for update",
        tenant,
        hash.as_slice()
    )
    .fetch_optional(tx.conn())
    .await?
    else {
        return Ok(Taken::Unknown);
    };
    let family = Family { id: row.family_id, user: UserId::from_uuid(row.user_id) };
    if row.used_at.is_some() {
        revoke(tx, family, now).await?;
        return Ok(Taken::Reused(family));
    }
    if row.revoked_at.is_some() {
        return Ok(Taken::Revoked(family));
    }
    if row.expires_at <= now {
        return Ok(Taken::Expired(family));
    }
    sqlx::query!(
        "update cvault.refresh_tokens set used_at = $3 where tenant_id = $1 and token_hash = $2",
        tenant,
        hash.as_slice(),
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(Taken::Valid(family))
}

/// Ends a login.
///
/// # Errors
/// Those of the database.
pub async fn revoke(tx: &mut TenantTx, family: Family, now: OffsetDateTime) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.refresh_tokens set revoked_at = $3
         where tenant_id = $1 and family_id = $2 and revoked_at is null",
        tenant,
        family.id,
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Ends every login of the transaction's tenant.
///
/// # Errors
/// Those of the database.
pub async fn revoke_all(tx: &mut TenantTx, now: OffsetDateTime) -> Result<(), DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "update cvault.refresh_tokens set revoked_at = $2 where tenant_id = $1 and revoked_at is null",
        tenant,
        now
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

fn hash(secrets: &PlatformSecrets, token: &str) -> [u8; 32] {
    secrets.peppered("refresh_token", token)
}
