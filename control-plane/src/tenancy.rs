//! [`TenantTx`]: the only door to tenant rows.
//!
//! A signed tenant context is set first thing in each transaction; row-level security in the database does the rest
//! (`cvault.tenant_id()` in `migrations/0001_tenancy.sql` checks the signature). The context names the session and the
//! transaction it was made for, so it is worth nothing to whoever overhears it. That costs a round trip: sqlx does not
//! tell the process id of a connection's backend, so BEGIN asks for it. A connection whose transaction was not
//! cleanly finished is closed, never returned to the pool (see [`Tx`]), so the next tenant cannot inherit it.

use std::fmt;

use cvault_types::TenantId;
use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Row as _};
use zeroize::Zeroizing;

use crate::db::{DbError, Tx};

const BEGIN: &str = "begin; select pg_backend_pid() as pid,
     (extract(epoch from transaction_timestamp()) * 1000000)::bigint as started_us";

/// The key that signs tenant contexts; role `cvault_app` cannot read it.
#[derive(Clone)]
pub struct ContextKey(Zeroizing<Vec<u8>>);

/// Opens tenant transactions.
#[derive(Clone, Debug)]
pub struct Tenancy {
    pool: PgPool,
    key: ContextKey,
}

/// A transaction that sees and changes one tenant's rows.
#[derive(Debug)]
pub struct TenantTx {
    tx: Tx,
    tenant: TenantId,
}

/// The one transaction of one session in which a context holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Binding {
    backend_pid: i32,
    /// `transaction_timestamp()`, microseconds since 1970.
    started_us: i64,
}

impl ContextKey {
    /// Loads the newest active key.
    ///
    /// # Errors
    /// When the database does not answer.
    pub async fn load(sys: &PgPool) -> Result<Self, sqlx::Error> {
        let key =
            sqlx::query_scalar!("select key from platform.context_keys where active order by key_id desc limit 1")
                .fetch_one(sys)
                .await?;
        Ok(Self(Zeroizing::new(key)))
    }

    /// `<tenant>.<backend pid>.<transaction start>.<mac>`: letters a–f, digits, `-` and `.`, so it may stand in a SQL
    /// literal.
    fn sign(&self, tenant: TenantId, binding: Binding) -> Zeroizing<String> {
        let body = format!("{}.{}.{}", tenant.uuid(), binding.backend_pid, binding.started_us);
        let inner = Sha256::new().chain_update(&*self.0).chain_update(&body).finalize();
        let mac = Sha256::new().chain_update(&*self.0).chain_update(inner).finalize();
        Zeroizing::new(format!("{body}.{}", hex::encode(mac)))
    }
}

impl fmt::Debug for ContextKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ContextKey")
    }
}

impl Tenancy {
    #[must_use]
    pub fn new(app_pool: PgPool, key: ContextKey) -> Self {
        Self { pool: app_pool, key }
    }

    /// Begins a transaction in which only `tenant`'s rows exist. Cancelling this call, at any point, closes the
    /// connection.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] when no connection could be had in time.
    pub async fn begin(&self, tenant: TenantId) -> Result<TenantTx, DbError> {
        let (mut tx, row) = Tx::begin_with(&self.pool, BEGIN).await?;
        let row = row.ok_or(DbError::Other(sqlx::Error::RowNotFound))?;
        let binding = Binding { backend_pid: row.try_get("pid")?, started_us: row.try_get("started_us")? };
        let context = self.key.sign(tenant, binding);
        // no statement with parameters: a prepared one would be kept, and shown in pg_prepared_statements
        let set = Zeroizing::new(format!("set local app.ctx = '{}'", *context));
        sqlx::raw_sql(AssertSqlSafe(set.as_str().to_owned())).execute(tx.conn()).await?;
        Ok(TenantTx { tx, tenant })
    }

    /// How many connections there are, and how many of them idle.
    pub(crate) fn connections(&self) -> (u32, usize) {
        (self.pool.size(), self.pool.num_idle())
    }

    pub(crate) async fn ping(&self) -> Result<(), DbError> {
        sqlx::query_scalar!("select 1").fetch_one(&self.pool).await?;
        Ok(())
    }

    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

impl TenantTx {
    /// The connection, inside the transaction.
    pub fn conn(&mut self) -> &mut PgConnection {
        self.tx.conn()
    }

    #[must_use]
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// Commits; see [`Tx::commit`].
    ///
    /// # Errors
    /// [`DbError::CommitUnknown`] when the answer was lost; then nothing may be acknowledged.
    pub async fn commit(self) -> Result<(), DbError> {
        self.tx.commit().await
    }

    /// Ends the transaction without effect and keeps the connection. Dropping has the same effect on the rows.
    ///
    /// # Errors
    /// When the database does not answer; the transaction is without effect all the same.
    pub async fn rollback(self) -> Result<(), DbError> {
        self.tx.rollback().await
    }

    /// Commits when the work succeeded, rolls back when it did not; see [`Tx::finish`].
    ///
    /// # Errors
    /// The work's own error, or that of the commit.
    pub async fn finish<T, E: From<DbError>>(self, work: Result<T, E>) -> Result<T, E> {
        self.tx.finish(work).await
    }
}

#[cfg(test)]
mod crossing;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
