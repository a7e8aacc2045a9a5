//! Databases for tests: one private cluster for each test process, one migrated template, one copy of it for each test.
//!
//! The cluster and its folder disappear with the process, however it ends: a small shell waits on a pipe that only this
//! process holds.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use super::{Cluster, ClusterError, Durability};
use crate::db::{self, DbConfig, MigrateError};

const TEMPLATE: &str = "cvault_template";
static SERVER: OnceCell<Server> = OnceCell::const_new();
static NEXT: AtomicU32 = AtomicU32::new(0);

struct Server {
    cluster: Cluster,
    _end: ChildStdin,
}

/// A freshly migrated database of its own.
#[derive(Debug, Clone)]
pub struct ScratchDatabase {
    name: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("the template cannot be migrated")]
    Migrate(#[from] MigrateError),
    #[error("a database cannot be made")]
    Database(#[from] sqlx::Error),
    #[error("the cluster's end cannot be arranged")]
    Files(#[from] io::Error),
}

impl ScratchDatabase {
    /// A copy of the migrated template.
    ///
    /// # Errors
    /// As [`Cluster::start`], for the first one of a process.
    pub async fn create() -> Result<Self, ScratchError> {
        let server = SERVER.get_or_try_init(Server::start).await?;
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut connection = server.cluster.superuser("postgres").connect().await?;
        // file_copy skips the WAL, which nobody will read
        let statement = format!("create database {name} template {TEMPLATE} strategy file_copy");
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await?;
        connection.close().await?;
        let database = Self { name };
        let mut connection = database.superuser().connect().await?;
        // rights on a database are not copied with it
        sqlx::raw_sql(include_str!("../../../migrations/roles.sql")).execute(&mut connection).await?;
        connection.close().await?;
        Ok(database)
    }

    /// Connects to it as `role`.
    ///
    /// # Panics
    /// Never: there is no database without its cluster.
    #[must_use]
    pub fn options(&self, role: &str) -> PgConnectOptions {
        SERVER.get().expect("there is no database without its cluster").cluster.options(role, &self.name)
    }

    /// Connects to it as the cluster's superuser, past every policy.
    #[must_use]
    pub fn superuser(&self) -> PgConnectOptions {
        self.options(super::settings::SUPERUSER)
    }

    /// Small pools: many tests run at once.
    #[must_use]
    pub fn config(&self) -> DbConfig {
        DbConfig {
            app_connections: 8,
            sys_connections: 4,
            ..DbConfig::new(self.options("cvault_app"), self.options("cvault_sys"))
        }
    }

    /// The URL for `role`, as a person would write it into DATABASE_URL.
    ///
    /// # Panics
    /// As [`ScratchDatabase::options`].
    #[must_use]
    pub fn url(&self, role: &str) -> String {
        let server = SERVER.get().expect("there is no database without its cluster");
        format!("postgres:///{}?host={}&user={role}", self.name, server.cluster.sockets().display())
    }
}

impl Server {
    async fn start() -> Result<Self, ScratchError> {
        let dir = PathBuf::from(format!("/tmp/cvault-test-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        let programs = std::env::var_os("CVAULT_PG_BIN").map(PathBuf::from);
        let cluster = Cluster::start(&dir, programs, Durability::Scratch, &CancellationToken::new()).await?;
        let end = end_with_us(&cluster, &dir)?;
        let mut connection = cluster.superuser("postgres").connect().await?;
        sqlx::raw_sql(AssertSqlSafe(format!("create database {TEMPLATE}"))).execute(&mut connection).await?;
        connection.close().await?;
        db::migrate(&cluster.superuser(TEMPLATE)).await?;
        Ok(Self { cluster, _end: end })
    }
}

/// `cat` ends when the last holder of the pipe is gone; then the cluster is killed and its folder removed.
fn end_with_us(cluster: &Cluster, dir: &std::path::Path) -> io::Result<ChildStdin> {
    let script = "cat >/dev/null; kill -QUIT \"$1\" 2>/dev/null; while kill -0 \"$1\" 2>/dev/null; do sleep 0.05; done; rm -rf \"$2\"";
    let mut child = Command::new("/bin/sh")
        .args(["-c", script, "cvault-test-end"])
        .arg(cluster.pid().to_string())
        .arg(dir)
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    child.stdin.take().ok_or_else(|| io::Error::other("the pipe is missing"))
}
