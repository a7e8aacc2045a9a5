//! Tenants' data keys as they are stored, sealed, remembered for a moment: a registration needs its tenant's before its one
//! statement. A tenant's data key never changes; one that was wrapped anew opens to the same.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cvault_types::TenantId;

use crate::db::DbError;
use crate::tenancy::Tenancy;

/// So long a copy outlives a data key that was destroyed, at most.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Some 150 bytes each.
const MAX_KEYS: usize = 10_000;

/// Sealed data keys. One for the process.
#[derive(Default)]
pub struct DataKeys {
    known: Mutex<HashMap<TenantId, Remembered>>,
}

/// Until when.
type Remembered = (Arc<[u8]>, Instant);

impl DataKeys {
    /// The tenant's data key, sealed; `None` when it is destroyed.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn sealed(&self, tenancy: &Tenancy, tenant: TenantId) -> Result<Option<Arc<[u8]>>, DbError> {
        if let Some(key) = self.remembered(tenant, Instant::now()) {
            return Ok(Some(key));
        }
        let mut tx = tenancy.single(tenant).await?;
        let (conn, context) = tx.entering();
        let row = sqlx::query!(
            r#"select t.data_key_sealed from cvault.enter($1) as tenant
               cross join lateral (select data_key_sealed from cvault.tenants where tenant_id = tenant offset 0) as t"#,
            context
        )
        .fetch_optional(conn)
        .await?;
        tx.commit().await?;
        let key: Option<Arc<[u8]>> = row.and_then(|row| row.data_key_sealed).map(Arc::from);
        if let Some(key) = &key {
            self.remember(tenant, key, Instant::now());
        }
        Ok(key)
    }

    fn remembered(&self, tenant: TenantId, now: Instant) -> Option<Arc<[u8]>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&tenant).filter(|(_, until)| now < *until).map(|(key, _)| Arc::clone(key))
    }

    fn remember(&self, tenant: TenantId, key: &Arc<[u8]>, now: Instant) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KEYS {
            known.clear();
        }
        known.insert(tenant, (Arc::clone(key), now + REMEMBERED));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_key_is_remembered_for_a_minute_and_the_table_never_grows_past_its_bound() {
        let (keys, now, key) = (DataKeys::default(), Instant::now(), Arc::from([1_u8; 3]));
        let tenant = |number| TenantId::from_uuid(Uuid::from_u128(number));
        keys.remember(tenant(0), &key, now);
        assert_eq!(keys.remembered(tenant(0), now + REMEMBERED - Duration::from_nanos(1)), Some(Arc::clone(&key)));
        assert_eq!(keys.remembered(tenant(0), now + REMEMBERED), None);
        for number in 0..MAX_KEYS as u128 + 5 {
            keys.remember(tenant(number), &key, now);
        }
        assert!(keys.known.lock().unwrap().len() <= MAX_KEYS);
    }
}
