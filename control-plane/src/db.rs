//! Connections to PostgreSQL: one pool for each role, migrations, and what a database error means.
//!
//! Tenant rows are reached through [`crate::tenancy`] only; the pool of role `cvault_sys` serves the node gateway,
//! metering and periodic tasks. Deliberately absent: any way to begin a tenant transaction on a bare pool.

mod kept;

use std::fmt;
use std::time::Duration;

use sqlx::migrate::Migrator;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool, Postgres, SqlSafeStr};

use crate::clock::Clock;
use crate::keys::leased::Leased;
use crate::tenancy::{ContextKey, Tenancy};

pub use kept::Kept;

static MIGRATIONS: Migrator = sqlx::migrate!("../migrations");
const ROLES: &str = include_str!("../../migrations/roles.sql");

/// A statement that takes longer is a fault; the slowest one we know of (a snapshot of 65,000 peers) takes 0.5 s.
const STATEMENT_TIMEOUT: &str = "5s";
/// A transaction that idles this long has lost its task.
const IDLE_IN_TRANSACTION_TIMEOUT: &str = "10s";
/// Longer than a crash recovery of PostgreSQL usually takes would only pile up requests.
pub(crate) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// After this time a connection is replaced.
pub(crate) const MAX_LIFETIME: Duration = Duration::from_secs(1800);
/// A connection that has idled so long is asked whether it is still there, before it is used.
pub(crate) const ASKED_AFTER: Duration = Duration::from_secs(1);

/// Sessions, tokens and the hours of the ledger are reckoned by both clocks.
const MAX_CLOCK_DIFFERENCE_SECONDS: i64 = 10;

/// Where the database is, for each of the two roles.
#[derive(Clone)]
pub struct DbConfig {
    pub app: PgConnectOptions,
    pub sys: PgConnectOptions,
    pub app_connections: u32,
    pub sys_connections: u32,
}

impl DbConfig {
    /// 16 and 8 connections: a request holds one for about a millisecond, so more would only queue inside PostgreSQL. Two of the 8
    /// are kept while requests come without a pause (see [`Kept`]).
    #[must_use]
    pub fn new(app: PgConnectOptions, sys: PgConnectOptions) -> Self {
        Self { app, sys, app_connections: 16, sys_connections: 8 }
    }
}

impl fmt::Debug for DbConfig {
    /// Without the options: they hold passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DbConfig")
            .field("app_connections", &self.app_connections)
            .field("sys_connections", &self.sys_connections)
            .finish_non_exhaustive()
    }
}

/// The database as the rest of the program sees it.
#[derive(Clone, Debug)]
pub struct Db {
    /// The door to tenant rows.
    pub tenancy: Tenancy,
    /// Role `cvault_sys`: shared infrastructure, across tenants.
    pub sys: PgPool,
}

/// A connection that a pool has lent.
pub trait Lent: Send {
    fn conn(&mut self) -> &mut PgConnection;

    /// Closes it, instead of giving it back.
    fn discard(self);
}

impl Lent for PoolConnection<Postgres> {
    fn conn(&mut self) -> &mut PgConnection {
        self
    }

    fn discard(mut self) {
        self.close_on_drop();
    }
}

/// A transaction whose connection is closed, never returned to the pool, when it was not cleanly finished: sqlx 0.9.0
/// would hand a connection out again inside an open transaction (transact-rs/sqlx 4385, 4393).
#[derive(Debug)]
pub struct Tx<C: Lent = PoolConnection<Postgres>> {
    /// `None` only after commit or rollback has succeeded.
    conn: Option<C>,
}

/// What went wrong, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// Nothing was changed; the same call may succeed later.
    #[error("the database did not answer")]
    Unavailable(#[source] sqlx::Error),
    /// COMMIT was sent and its answer was lost.
    #[error("it is not known whether the transaction was committed")]
    CommitUnknown(#[source] sqlx::Error),
    /// A named constraint refused the change.
    #[error("constraint {name} refused the change")]
    Constraint { name: String },
    /// Nothing that is reckoned by both clocks can be trusted.
    #[error("the clocks of this machine and of the database differ by {seconds} s")]
    Clock { seconds: i64 },
    #[error("the database refused a statement")]
    Other(#[source] sqlx::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error("cannot connect to the database as its owner")]
    Connect(#[source] sqlx::Error),
    #[error(
        "the roles of CVault are missing in this cluster and `{user}` may not create them: run `migrate` once as a \
         superuser, or have one run migrations/roles.sql"
    )]
    RolesMissing { user: String },
    #[error("the roles of CVault cannot be created")]
    Roles(#[source] sqlx::Error),
    #[error("the migrations cannot be applied")]
    Apply(#[source] sqlx::migrate::MigrateError),
    #[error("the schema cannot be inspected")]
    Inspect(#[source] sqlx::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("the database cannot be reached with {variable}")]
    Unreachable { variable: &'static str, source: sqlx::Error },
    #[error("the schema of the database is not the one of this program ({detail}): run `cvault-control-plane migrate`")]
    Schema { detail: String },
    #[error(
        "the clock of this machine and that of the database differ by {seconds} s, more than the {MAX_CLOCK_DIFFERENCE_SECONDS} s \
         that are bearable: synchronise both (NTP)"
    )]
    Clock { seconds: i64 },
    #[error("the database refused a statement at start")]
    Refused(#[source] sqlx::Error),
}

impl Db {
    /// Opens both pools and checks that the schema is this program's own.
    ///
    /// # Errors
    /// [`ConnectError::Unreachable`] names the variable whose database did not answer.
    pub async fn connect(config: &DbConfig) -> Result<Self, ConnectError> {
        let unreachable = |variable| move |source| ConnectError::Unreachable { variable, source };
        let sys = pool(&config.sys, "cvault-sys", config.sys_connections)
            .await
            .map_err(unreachable("CVAULT_DATABASE_SYS_URL"))?;
        check_schema(&sys).await?;
        check_clock(&sys).await?;
        let key = Leased::first(async || ContextKey::load(&sys).await).await.map_err(ConnectError::Refused)?;
        let app = options(&config.app, "cvault-app").options(PLANNED_ONCE);
        let tenancy = Tenancy::connect(app, config.app_connections, key, sys.clone());
        let tenancy = tenancy.await.map_err(unreachable("DATABASE_URL"))?;
        Ok(Self { tenancy, sys })
    }

    /// Whether both roles get an answer now, and the clocks still agree.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] when a role gets none; [`DbError::Clock`] when the clocks have drifted apart.
    pub async fn ping(&self) -> Result<(), DbError> {
        match clock_difference_seconds(&self.sys).await? {
            seconds if seconds.abs() > MAX_CLOCK_DIFFERENCE_SECONDS => {
                tracing::error!(seconds, "the clocks of this machine and of the database have drifted apart (NTP)");
                Err(DbError::Clock { seconds })
            }
            _ => self.tenancy.ping().await,
        }
    }

    /// Closes both pools.
    pub async fn close(&self) {
        self.tenancy.close();
        self.sys.close().await;
    }
}

impl Tx {
    /// Begins a transaction of role `cvault_sys`. Cancelling this call, at any point, closes the connection.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] when no connection could be had in time.
    pub async fn begin(sys: &PgPool) -> Result<Self, DbError> {
        Self::begin_with(sys.acquire().await?, "begin").await
    }

    /// As [`Tx::begin`], reading one state of the database throughout.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] when no connection could be had in time.
    pub async fn snapshot(sys: &PgPool) -> Result<Self, DbError> {
        Self::begin_with(sys.acquire().await?, "begin isolation level repeatable read read only").await
    }
}

impl<C: Lent> Tx<C> {
    /// Begins with `statements`, one message.
    pub(crate) async fn begin_with(conn: C, statements: impl SqlSafeStr) -> Result<Self, DbError> {
        // the guard exists before the first byte of BEGIN is sent
        let mut tx = Self::of(conn);
        sqlx::raw_sql(statements).execute(tx.conn()).await?;
        Ok(tx)
    }

    /// The guard alone: nothing has begun.
    pub(crate) fn of(conn: C) -> Self {
        Self { conn: Some(conn) }
    }

    /// The connection, inside the transaction.
    ///
    /// # Panics
    /// Never: commit and rollback consume the transaction.
    pub fn conn(&mut self) -> &mut PgConnection {
        self.conn.as_mut().expect("commit and rollback consume the transaction").conn()
    }

    /// Commits. A transaction in which a statement has failed is an error here: PostgreSQL would answer a bare COMMIT
    /// of it with a silent ROLLBACK, so a statement that must succeed travels in front.
    ///
    /// # Errors
    /// [`DbError::CommitUnknown`] when the answer was lost; then nothing may be acknowledged.
    pub async fn commit(mut self) -> Result<(), DbError> {
        self.commit_after("select 1; commit").await
    }

    /// Commits with `statements`, of which the last is COMMIT: when one before fails, nothing is.
    pub(crate) async fn commit_after(&mut self, statements: &'static str) -> Result<(), DbError> {
        self.end(statements).await.map_err(DbError::of_commit)
    }

    /// Ends the transaction without effect and keeps the connection. Dropping has the same effect on the rows.
    ///
    /// # Errors
    /// When the database does not answer; the transaction is without effect all the same.
    pub async fn rollback(mut self) -> Result<(), DbError> {
        Ok(self.end("rollback").await?)
    }

    /// Commits when the work succeeded, rolls back when it did not.
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

    async fn end(&mut self, statements: &'static str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(statements).execute(self.conn()).await?;
        self.release();
        Ok(())
    }

    /// Clean: returns the connection to the pool.
    pub(crate) fn release(&mut self) {
        self.conn = None;
    }
}

impl<C: Lent> Drop for Tx<C> {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            conn.discard();
        }
    }
}

/// What a tenant asks for is found by an index, however little PostgreSQL knew of the tables when it planned; it is planned once
/// for each connection, and not worth compiling. So no such statement may have a parameter without which it is another one.
const PLANNED_ONCE: [(&str, &str); 3] =
    [("plan_cache_mode", "force_generic_plan"), ("enable_seqscan", "off"), ("jit", "off")];

fn options(given: &PgConnectOptions, name: &str) -> PgConnectOptions {
    given
        .clone()
        .application_name(name)
        .options([
            ("statement_timeout", STATEMENT_TIMEOUT),
            ("idle_in_transaction_session_timeout", IDLE_IN_TRANSACTION_TIMEOUT),
        ])
        // statements of a tenant transaction begin with its signed context: never in a log
        .disable_statement_logging()
}

async fn pool(given: &PgConnectOptions, name: &str, connections: u32) -> Result<PgPool, sqlx::Error> {
    PgPoolOptions::new()
        .max_connections(connections)
        .min_connections(2)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .max_lifetime(MAX_LIFETIME)
        // asking each time would be a round trip more for every transaction
        .test_before_acquire(false)
        .before_acquire(|conn, meta| {
            Box::pin(async move {
                if meta.idle_for >= ASKED_AFTER {
                    conn.ping().await?;
                }
                Ok(true)
            })
        })
        .connect_with(options(given, name))
        .await
}

/// Creates the roles when they are missing, then applies the migrations as `cvault_owner`. Several processes may do
/// this at once: an advisory lock makes them wait for each other.
///
/// # Errors
/// [`MigrateError::RolesMissing`] when a person with more rights has to act.
pub async fn migrate(owner: &PgConnectOptions) -> Result<(), MigrateError> {
    let options = owner.clone().application_name("cvault-migrate").disable_statement_logging();
    let mut conn = PgConnection::connect_with(&options).await.map_err(MigrateError::Connect)?;
    create_roles(&mut conn).await?;
    sqlx::raw_sql("set role cvault_owner").execute(&mut conn).await.map_err(MigrateError::Roles)?;
    MIGRATIONS.run(&mut conn).await.map_err(MigrateError::Apply)?;
    // `serve` compares this table with its own migrations
    sqlx::raw_sql("grant select on _sqlx_migrations to cvault_sys")
        .execute(&mut conn)
        .await
        .map_err(MigrateError::Inspect)?;
    conn.close().await.map_err(MigrateError::Connect)
}

async fn create_roles(conn: &mut PgConnection) -> Result<(), MigrateError> {
    let state = sqlx::query!(
        r#"select current_user::text as "user!",
                  (select count(*) from pg_roles
                   where rolname in ('cvault_owner', 'cvault_app', 'cvault_sys', 'cvault_fn')) as "roles!",
                  coalesce((select has_database_privilege(oid, current_database(), 'create')
                                   and has_schema_privilege(oid, 'public', 'create')
                            from pg_roles where rolname = 'cvault_owner'), false) as "prepared!",
                  (select rolsuper or rolcreaterole from pg_roles where rolname = current_user) as "may_create!""#
    )
    .fetch_one(&mut *conn)
    .await
    .map_err(MigrateError::Inspect)?;
    if state.roles == 4 && state.prepared {
        return Ok(());
    }
    if !state.may_create {
        return Err(MigrateError::RolesMissing { user: state.user });
    }
    // roles belong to the cluster: two databases being prepared at once must not create them twice
    let script = format!("begin; select pg_advisory_xact_lock(731992414); {ROLES}; commit");
    sqlx::raw_sql(AssertSqlSafe(script)).execute(conn).await.map_err(MigrateError::Roles)?;
    Ok(())
}

async fn check_schema(sys: &PgPool) -> Result<(), ConnectError> {
    // not a checked query: the table belongs to sqlx and does not exist in a development database made by psql
    let applied: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("select version, checksum from _sqlx_migrations where success order by version")
            .fetch_all(sys)
            .await
            .map_err(|error| match error.as_database_error().and_then(|refused| refused.code()).as_deref() {
                Some("42P01") => ConnectError::Schema { detail: "it has none".to_owned() },
                Some(_) | None => ConnectError::Refused(error),
            })?;
    let wanted: Vec<_> = MIGRATIONS.iter().map(|m| (m.version, m.checksum.as_ref())).collect();
    if applied.iter().map(|(version, sum)| (*version, sum.as_slice())).eq(wanted.iter().copied()) {
        return Ok(());
    }
    let last = |versions: Option<i64>| versions.map_or_else(|| "nothing".to_owned(), |v| v.to_string());
    Err(ConnectError::Schema {
        detail: format!(
            "applied up to {}, wanted up to {}",
            last(applied.last().map(|(version, _)| *version)),
            last(wanted.last().map(|(version, _)| *version))
        ),
    })
}

async fn check_clock(sys: &PgPool) -> Result<(), ConnectError> {
    let seconds = clock_difference_seconds(sys).await.map_err(ConnectError::Refused)?;
    if seconds.abs() > MAX_CLOCK_DIFFERENCE_SECONDS { Err(ConnectError::Clock { seconds }) } else { Ok(()) }
}

async fn clock_difference_seconds(sys: &PgPool) -> Result<i64, sqlx::Error> {
    let theirs = sqlx::query_scalar!(r#"select clock_timestamp() as "now!""#).fetch_one(sys).await?;
    Ok((theirs - Clock.now()).whole_seconds())
}

impl From<sqlx::Error> for DbError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error::{Io, PoolClosed, PoolTimedOut, Tls, WorkerCrashed};
        let refused = error.as_database_error();
        if let Some(name) = refused.and_then(|refused| refused.constraint()) {
            return Self::Constraint { name: name.to_owned() };
        }
        let passing = refused.and_then(|refused| refused.code()).is_some_and(|code| is_passing(&code));
        if passing || matches!(error, Io(_) | Tls(_) | PoolTimedOut | PoolClosed | WorkerCrashed) {
            Self::Unavailable(error)
        } else {
            Self::Other(error)
        }
    }
}

/// SQLSTATEs of a server that is stopping, starting, full or slow, of a transaction that may simply be repeated, and of one whose
/// tenant context was too old when it arrived (`cvault.enter`).
fn is_passing(code: &str) -> bool {
    matches!(code, "CV001" | "40001" | "40P01" | "53300" | "55P03" | "57014" | "57P01" | "57P02" | "57P03" | "25P03")
}

impl DbError {
    /// What a failed COMMIT means: refused by the database, or of unknown outcome.
    pub(crate) fn of_commit(error: sqlx::Error) -> Self {
        // the server answers a COMMIT that has happened with success; one that is being stopped may have done it before
        let code = error.as_database_error().map(|refused| refused.code().unwrap_or_default().into_owned());
        if code.is_some_and(|code| !code.starts_with("57P")) { Self::from(error) } else { Self::CommitUnknown(error) }
    }

    /// The name of the constraint that refused the change, if one did.
    #[must_use]
    pub fn constraint(&self) -> Option<&str> {
        match self {
            Self::Constraint { name } => Some(name),
            Self::Unavailable(_) | Self::CommitUnknown(_) | Self::Clock { .. } | Self::Other(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{World, eventually};

    #[test]
    fn the_debug_form_of_a_configuration_shows_no_password() {
        let options = PgConnectOptions::new_without_pgpass().password("hunter2");
        let text = format!("{:?}", DbConfig::new(options.clone(), options));
        assert!(!text.contains("hunter2"), "{text}");
    }

    #[tokio::test]
    async fn a_clock_that_drifts_after_the_start_ends_readiness() {
        let world = World::new().await;
        world.app.db.ping().await.unwrap();
        // a database whose clock is an hour ahead, for sessions that begin now
        sqlx::raw_sql(
            "create schema drift;
             grant usage on schema drift to public;
             create function drift.clock_timestamp() returns timestamptz language sql
                 as $f$ select pg_catalog.clock_timestamp() + interval '1 hour' $f$;
             do $$ begin
                 execute format('alter role cvault_sys in database %I set search_path = drift, pg_catalog', current_database());
             end $$;
             select pg_terminate_backend(pid) from pg_stat_activity
                 where datname = current_database() and usename = 'cvault_sys'",
        )
        .execute(&mut world.superuser().await)
        .await
        .unwrap();
        eventually("the drift is noticed", Duration::from_secs(10), async || {
            matches!(world.app.db.ping().await, Err(DbError::Clock { seconds: 3_590..3_610 }))
        })
        .await;
    }
}
