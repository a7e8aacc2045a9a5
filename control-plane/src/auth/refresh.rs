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

/// Uses a token up. From here to the end of the transaction the user's tokens change in no other one, so that a
/// revocation meets every token of the family, also one that is being issued.
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
    if !lock_owner(tx, &hash).await? {
        return Ok(Taken::Unknown);
    }
    // a statement of its own: it sees what was committed while the lock was waited for
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

/// Locks the tenant's row against [`revoke_all`], then the row of the token's user against other uses of the user's
/// tokens. `false`: there is no such token.
async fn lock_owner(tx: &mut TenantTx, hash: &[u8; 32]) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!("select tenant_id from cvault.tenants where tenant_id = $1 for share", tenant)
        .fetch_optional(tx.conn())
        .await?;
    let locked = sqlx::query!(
        "select u.user_id from cvault.refresh_tokens r
         join cvault.users u on u.tenant_id = r.tenant_id and u.user_id = r.user_id
         where r.tenant_id = $1 and r.token_hash = $2 for no key update of u",
        tenant,
        hash.as_slice()
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(locked.is_some())
}

/// Ends a login whose token was taken in this transaction.
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
    // waits for tokens that are being issued
    sqlx::query!("select tenant_id from cvault.tenants where tenant_id = $1 for no key update", tenant)
        .fetch_optional(tx.conn())
        .await?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Person, World, waiting};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    struct Login {
        world: World,
        person: Person,
        family: Family,
        now: OffsetDateTime,
    }

    impl Login {
        async fn new() -> Self {
            let world = World::new().await;
            let person = world.person().await;
            let now = world.app.clock.now();
            Self { world, person, family: Family::begin(person.user), now }
        }

        async fn begin(&self) -> TenantTx {
            self.world.app.db.tenancy.begin(self.person.tenant).await.unwrap()
        }

        async fn issue(&self, tx: &mut TenantTx) -> Secret {
            issue(tx, &self.world.app.secrets, self.family, self.now, &mut StdRng::from_os_rng()).await.unwrap()
        }

        async fn take(&self, tx: &mut TenantTx, token: &Secret) -> Taken {
            take(tx, &self.world.app.secrets, token, self.now).await.unwrap()
        }
    }

    /// While a token is exchanged, `revoke` runs; then the new token must be worthless.
    async fn a_token_that_is_being_issued_is_revoked(revoke: impl AsyncFn(&Login, &mut TenantTx, &Secret)) {
        let login = Login::new().await;
        let mut tx = login.begin().await;
        let first = login.issue(&mut tx).await;
        tx.commit().await.unwrap();
        let mut tx = login.begin().await;
        assert!(matches!(login.take(&mut tx, &first).await, Taken::Valid(_)));
        let second = login.issue(&mut tx).await;
        tx.commit().await.unwrap();

        let mut exchange = login.begin().await;
        assert!(matches!(login.take(&mut exchange, &second).await, Taken::Valid(_)));
        let third = login.issue(&mut exchange).await;
        let revocation = async {
            let mut tx = login.begin().await;
            revoke(&login, &mut tx, &first).await;
            tx.commit().await.unwrap();
        };
        let finish = async {
            waiting(&mut login.world.superuser().await, 1).await;
            exchange.commit().await.unwrap();
        };
        tokio::join!(revocation, finish);
        let mut tx = login.begin().await;
        assert!(matches!(login.take(&mut tx, &third).await, Taken::Revoked(_)));
    }

    #[tokio::test]
    async fn reuse_of_an_old_token_revokes_the_one_that_is_being_issued() {
        a_token_that_is_being_issued_is_revoked(async |login, tx, old| {
            assert!(matches!(login.take(tx, old).await, Taken::Reused(_)));
        })
        .await;
    }

    #[tokio::test]
    async fn revoking_every_login_revokes_the_token_that_is_being_issued() {
        a_token_that_is_being_issued_is_revoked(async |login, tx, _| revoke_all(tx, login.now).await.unwrap()).await;
    }
}
