//! [`TenantTx`]: the only door to tenant rows.
//!
//! A signed tenant context is set first thing in each transaction; row-level security in the database does the rest
//! (`cvault.tenant_id()` checks the signature). The context names the session it was made for and when, so it is worth
//! nothing to whoever overhears it (docs/adr/0012). A connection whose transaction was not cleanly finished is closed,
//! never returned to the pool (see [`Tx`]), so the next tenant cannot inherit it.

mod pool;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use cvault_types::TenantId;
use deadpool::managed::Pool;
use sha2::{Digest as _, Sha256};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use zeroize::Zeroizing;

use crate::clock::Clock;
use crate::db::{ACQUIRE_TIMEOUT, DbError, Tx};
use crate::keys::leased::Leased;
use pool::{Opener, Session};

/// The key that signs tenant contexts; role `cvault_app` cannot read it.
#[derive(Clone)]
pub struct ContextKey(Zeroizing<Vec<u8>>);

/// Opens tenant transactions.
#[derive(Clone)]
pub struct Tenancy {
    pool: Pool<Opener>,
    key: Arc<Leased<ContextKey>>,
    /// Of the role that may read the key.
    sys: PgPool,
}

/// A transaction that sees and changes one tenant's rows.
pub struct TenantTx {
    tx: Tx<Session>,
    tenant: TenantId,
    context: Zeroizing<String>,
    /// Whether BEGIN was sent; otherwise each statement is a transaction of its own.
    begun: bool,
}

/// The one session in which a context holds, and from when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Binding {
    backend_pid: i32,
    /// Microseconds since 1970. A transaction that begins more than 15 s before or after does not accept the context.
    signed_us: i64,
}

impl Binding {
    fn now(backend_pid: i32) -> Self {
        let signed_us = i64::try_from(Clock.now().unix_timestamp_nanos() / 1_000).unwrap_or_default();
        Self { backend_pid, signed_us }
    }
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

    /// `<tenant>.<backend pid>.<signed at>.<mac>`: letters a–f, digits, `-` and `.`, so it may stand in a SQL
    /// literal.
    fn sign(&self, tenant: TenantId, binding: Binding) -> Zeroizing<String> {
        let body = format!("{}.{}.{}", tenant.uuid(), binding.backend_pid, binding.signed_us);
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

impl fmt::Debug for Tenancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenancy").field("pool", &self.pool.status()).finish_non_exhaustive()
    }
}

impl Tenancy {
    pub(crate) async fn connect(
        options: PgConnectOptions,
        connections: u32,
        key: Leased<ContextKey>,
        sys: PgPool,
    ) -> Result<Self, sqlx::Error> {
        Ok(Self { pool: pool::open(options, connections).await?, key: Arc::new(key), sys })
    }

    /// Reads the key again that signs contexts.
    ///
    /// # Errors
    /// When the database does not answer; then the one that is known counts until its lease is over.
    pub(crate) async fn reload_key(&self) -> Result<(), DbError> {
        self.key.read(async || Ok(ContextKey::load(&self.sys).await?)).await?;
        Ok(())
    }

    /// Begins a transaction in which only `tenant`'s rows exist. Cancelling this call, at any point, closes the
    /// connection.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] when no connection could be had in time.
    pub async fn begin(&self, tenant: TenantId) -> Result<TenantTx, DbError> {
        let mut tx = self.single(tenant).await?;
        tx.open().await?;
        Ok(tx)
    }

    /// For one statement that is a transaction of its own, and so costs one round trip. It sets the context itself:
    /// `select … from cvault.enter($1) as tenant cross join lateral (… where tenant_id = tenant … offset 0)`, with
    /// what [`TenantTx::entering`] gives. A statement that does not sees no row of any tenant.
    ///
    /// # Errors
    /// As [`Tenancy::begin`].
    pub async fn single(&self, tenant: TenantId) -> Result<TenantTx, DbError> {
        let key = self.key.at(Instant::now(), async || Ok(ContextKey::load(&self.sys).await?)).await?;
        let session = pool::session(&self.pool).await?;
        let context = key.sign(tenant, Binding::now(session.backend_pid));
        Ok(TenantTx { tx: Tx::of(session), tenant, context, begun: false })
    }

    /// How many connections there are, and how many of them idle.
    pub(crate) fn connections(&self) -> (u32, usize) {
        let status = self.pool.status();
        (u32::try_from(status.size).unwrap_or(u32::MAX), status.available)
    }

    pub(crate) async fn ping(&self) -> Result<(), DbError> {
        let mut session = pool::session(&self.pool).await?;
        let late = |_| DbError::Unavailable(sqlx::Error::PoolTimedOut);
        Ok(tokio::time::timeout(ACQUIRE_TIMEOUT, session.conn.ping()).await.map_err(late)??)
    }

    pub(crate) fn close(&self) {
        self.pool.close();
    }
}

impl fmt::Debug for TenantTx {
    /// Without the context.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TenantTx").field("tenant", &self.tenant).field("begun", &self.begun).finish_non_exhaustive()
    }
}

impl TenantTx {
    /// The connection, inside the transaction.
    pub fn conn(&mut self) -> &mut PgConnection {
        self.tx.conn()
    }

    /// Connection and signed context, for a statement that begins with `cvault.enter`. It may be made of a transaction
    /// that has begun, too.
    pub fn entering(&mut self) -> (&mut PgConnection, &str) {
        (self.tx.conn(), &self.context)
    }

    /// Begins, when that has not been done: for more than one statement.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] when the database does not answer.
    pub async fn open(&mut self) -> Result<(), DbError> {
        if !self.begun {
            // before it is sent: what fails half-way may have begun
            self.begun = true;
            // no statement with parameters: it cannot be in one message with BEGIN
            let begin = Zeroizing::new(format!("begin; select cvault.enter('{}')", *self.context));
            sqlx::raw_sql(AssertSqlSafe(begin.as_str().to_owned())).execute(self.tx.conn()).await?;
        }
        Ok(())
    }

    #[must_use]
    pub fn tenant(&self) -> TenantId {
        self.tenant
    }

    /// Commits; see [`Tx::commit`].
    ///
    /// # Errors
    /// [`DbError::CommitUnknown`] when the answer was lost; then nothing may be acknowledged.
    pub async fn commit(mut self) -> Result<(), DbError> {
        if self.begun {
            // A context whose key has ended meanwhile made statements find nothing: half of the work would be kept. Keys
            // only end, so one that is valid now has been so all the time.
            let checked = "select cvault.enter(current_setting('app.ctx', true)); commit";
            return self.tx.commit_after(checked).await;
        }
        self.tx.release();
        Ok(())
    }

    /// Ends the transaction without effect and keeps the connection. Dropping has the same effect on the rows.
    ///
    /// # Errors
    /// When the database does not answer; the transaction is without effect all the same.
    pub async fn rollback(mut self) -> Result<(), DbError> {
        if self.begun {
            return self.tx.rollback().await;
        }
        // what failed may have been the connection
        self.tx.conn().ping().await?;
        self.tx.release();
        Ok(())
    }

    /// Commits when the work succeeded, rolls back when it did not; see [`Tx::finish`].
    ///
    /// # Errors
    /// The work's own error, or that of the commit.
    pub async fn finish<T, E: From<DbError>>(self, work: Result<T, E>) -> Result<T, E> {
        match work {
            Ok(value) => {
                self.commit().await?;
                Ok(value)
            }
            Err(error) => {
                if let Err(lost) = self.rollback().await {
                    tracing::debug!(error = %lost, "the connection of a failed transaction was lost");
                }
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod crossing;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
