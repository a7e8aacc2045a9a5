//! `dev`: a whole platform from nothing. An embedded PostgreSQL under one folder, a key-encryption key, the address pool
//! `default`, a demo tenant, and then what `serve` does.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::app::App;
use crate::auth::tokens;
use crate::config::{self, Config};
use crate::db::{self, DbConfig, MigrateError};
use crate::ipam::{self, CreatePoolError, NewPool};
use crate::keys::KeyRing;
use crate::mail::Sink;
use crate::postgres::{Cluster, ClusterError, Durability};
use crate::serve::{self, Listeners, StartError};
use crate::tenants::{self, Actor, Settings, TenantError};

const DATABASE: &str = "cvault";
const POOL: &str = "default";
const DEMO_TENANT: &str = "Demo";
/// Where the running `dev` is reached: `admin --data-dir` makes tokens and commands for these addresses.
const ADDRESSES: &str = "addresses.json";

#[derive(Serialize, Deserialize)]
struct Addresses {
    public_url: String,
    node_endpoint: String,
}

#[derive(Debug, thiserror::Error)]
pub enum DevError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    #[error("the database cannot be made")]
    Database(#[from] sqlx::Error),
    #[error("the key-encryption key {} cannot be used", path.display())]
    Kek { path: PathBuf, source: io::Error },
    #[error("{} cannot be written or read", path.display())]
    Addresses { path: PathBuf, source: io::Error },
    #[error("the address pool cannot be made")]
    Pool(#[from] CreatePoolError),
    #[error("the demo tenant cannot be made")]
    Tenant(#[from] TenantError),
    #[error(transparent)]
    Db(#[from] db::DbError),
    #[error("there is no platform under {}: run `cvault-control-plane dev --data-dir {}` first", dir.display(), dir.display())]
    NotThere { dir: PathBuf },
    #[error("the credentials cannot be printed")]
    Print(#[source] io::Error),
}

/// Starts everything under `dir` and serves until SIGTERM or SIGINT; then PostgreSQL is stopped too.
///
/// # Errors
/// When something cannot be started; what had been started is stopped then.
pub async fn run(mut config: Config, dir: &Path, pg_bin: Option<PathBuf>) -> Result<(), DevError> {
    if matches!(config.mail.sink, Sink::Unset) {
        config.mail.sink = Sink::Log;
    }
    let (listeners, config) = Listeners::bind(config).await?;
    let shutdown = serve::on_signal()?;
    let cluster = match Cluster::start(dir, pg_bin, Durability::Durable, &shutdown).await {
        Err(ClusterError::Interrupted) => return Ok(()),
        started => started?,
    };
    let result = with_cluster(&cluster, config, dir, listeners, shutdown).await;
    cluster.stop().await;
    result
}

async fn with_cluster(
    cluster: &Cluster,
    config: Config,
    dir: &Path,
    listeners: Listeners,
    shutdown: CancellationToken,
) -> Result<(), DevError> {
    make_database(cluster).await?;
    db::migrate(&cluster.superuser(DATABASE)).await?;
    let keys = keys(dir)?;
    let database = DbConfig::new(cluster.options("cvault_app", DATABASE), cluster.options("cvault_sys", DATABASE));
    let app = serve::open(config, &database, keys).await?;
    write_addresses(&app.config, dir).map_err(|source| DevError::Addresses { path: dir.join(ADDRESSES), source })?;
    prepare(&app).await?;
    // outlives the shutdown signal: requests that drain need their database
    let done = CancellationToken::new();
    let serving = async {
        let result = serve::until(app, listeners, shutdown).await;
        done.cancel();
        result
    };
    let (result, ()) = tokio::join!(serving, cluster.keep_running(done.clone()));
    Ok(result?)
}

async fn make_database(cluster: &Cluster) -> Result<(), sqlx::Error> {
    use sqlx::{ConnectOptions, Connection};
    let mut connection = cluster.superuser("postgres").connect().await?;
    let exists =
        sqlx::query_scalar!(r#"select exists (select from pg_database where datname = $1) as "exists!""#, DATABASE)
            .fetch_one(&mut connection)
            .await?;
    if !exists {
        sqlx::raw_sql("create database cvault").execute(&mut connection).await?;
    }
    connection.close().await
}

/// The pool and, at the very first start, the demo tenant with its credentials and an admin token, printed once.
async fn prepare(app: &App) -> Result<(), DevError> {
    let pool = NewPool {
        name: POOL.to_owned(),
        ipv4: "10.8.0.0/16".parse().expect("a constant prefix"),
        ipv6: "fd00:cafe::/64".parse().expect("a constant prefix"),
        quarantine_seconds: app.config.quarantine_seconds,
        reclaim: false,
    };
    if !ipam::list_pools(&app.db.sys).await?.iter().any(|made| made.name == POOL) {
        ipam::create_pool(&app.db.sys, &pool).await?;
    }
    // a deleted demo tenant does not come back: any tenant ever made counts
    let made = sqlx::query_scalar!(r#"select exists (select from cvault.tenants) as "exists!""#)
        .fetch_one(&app.db.sys)
        .await?;
    if made {
        return Ok(());
    }
    let actor = Actor { name: "system".to_owned(), request_id: None };
    let mut rng = StdRng::from_os_rng();
    let (tenant, key) = tenants::create(app, Settings::named(DEMO_TENANT), &actor, &mut rng).await?;
    let now = app.clock.now();
    let token = tokens::mint_admin(app.token_keys().await?.signing(now), &app.config.public_url, "dev", now);
    print_credentials(&[
        ("url", &app.config.public_url),
        ("tenant_id", &tenant.id.to_string()),
        ("api_key", &key.key),
        ("api_secret", key.secret.expose()),
        ("admin_token", token.expose()),
    ])
    .map_err(DevError::Print)
}

/// Standard output, not the log. The secret is stored nowhere in clear, so this is the only time.
fn print_credentials(lines: &[(&str, &str)]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "# Demo tenant. Shown once; `cvault-control-plane admin --data-dir DIR token` prints a new admin token."
    )?;
    for (name, value) in lines {
        writeln!(out, "{name}={value}")?;
    }
    out.flush()
}

/// The key under `dir`, drawn the first time.
fn keys(dir: &Path) -> Result<KeyRing, DevError> {
    let path = dir.join("kek");
    match read_keys(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            draw_key(&path).and_then(|()| read_keys(&path)).map_err(|source| DevError::Kek { path, source })
        }
        other => other.map_err(|source| DevError::Kek { path, source }),
    }
}

fn read_keys(path: &Path) -> io::Result<KeyRing> {
    let text = Zeroizing::new(fs::read_to_string(path)?);
    config::parse_keys(&text).ok_or_else(|| io::Error::other("it does not hold 64 hexadecimal digits"))
}

/// Written beside and renamed, so that a crash leaves no half key that a database is then sealed with.
fn draw_key(path: &Path) -> io::Result<()> {
    let mut key = Zeroizing::new([0; 32]);
    StdRng::from_os_rng().fill_bytes(key.as_mut());
    let text = Zeroizing::new(format!("{}\n", hex::encode(*key)));
    let beside = path.with_extension("new");
    let mut file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    fs::File::open(path.parent().unwrap_or_else(|| Path::new("/")))?.sync_all()
}

fn write_addresses(config: &Config, dir: &Path) -> io::Result<()> {
    let addresses = Addresses { public_url: config.public_url.clone(), node_endpoint: config.node_endpoint.clone() };
    fs::write(dir.join(ADDRESSES), serde_json::to_vec(&addresses)?)
}

fn read_addresses(dir: &Path) -> io::Result<Addresses> {
    Ok(serde_json::from_slice(&fs::read(dir.join(ADDRESSES))?)?)
}

/// The platform under `dir` for `admin`, while `dev` runs there.
///
/// # Errors
/// [`DevError::NotThere`] when there is none.
pub async fn open(config: Config, dir: &Path) -> Result<App, DevError> {
    let not_there = || DevError::NotThere { dir: dir.to_owned() };
    let Addresses { public_url, node_endpoint } = read_addresses(dir).map_err(|_| not_there())?;
    let config = Config { public_url, node_endpoint, ..config };
    let keys = read_keys(&dir.join("kek")).map_err(|_| not_there())?;
    let sockets = dir.join("run").canonicalize().map_err(|_| not_there())?;
    let options = |role| Cluster::options_at(&sockets, role, DATABASE);
    let database = DbConfig {
        app_connections: 2,
        sys_connections: 2,
        ..DbConfig::new(options("cvault_app"), options("cvault_sys"))
    };
    Ok(serve::open(config, &database, keys).await?)
}
