//! `serve`: everything is checked before the first request is taken, and what is started is stopped again.

use std::net::SocketAddr;

use rand::SeedableRng;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::app::App;
use crate::catalogue::{self, CatalogueError};
use crate::config::{Config, ServeConfig};
use crate::db::{ConnectError, Db, DbConfig};
use crate::http::{problem, router, serve};
use crate::keys::{KeyRing, PlatformSecrets, SecretsError};
use crate::{metrics, nodes, tasks};

/// Why nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{variable}: the address {address} cannot be listened on; stop what uses it, or choose another")]
    Listen { variable: &'static str, address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    #[error("the signal handler cannot be installed")]
    Signals(#[source] std::io::Error),
}

/// Both listeners, bound before anything else is touched.
pub struct Listeners {
    pub http: TcpListener,
    pub nodes: TcpListener,
}

impl Listeners {
    /// Binds both, and puts the ports that the kernel chose into `config`.
    ///
    /// # Errors
    /// [`StartError::Listen`] names the variable of the address that is taken.
    pub async fn bind(config: Config) -> Result<(Self, Config), StartError> {
        let (http, listen) = bind("CVAULT_LISTEN", config.listen).await?;
        let (nodes, node_listen) = bind("CVAULT_NODE_LISTEN", config.node_listen).await?;
        Ok((Self { http, nodes }, config.bound_to(listen, node_listen)))
    }
}

async fn bind(variable: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let refused = |source| StartError::Listen { variable, address, source };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    Ok((listener, address))
}

/// Connects, audits the database, and loads the installation's secrets.
///
/// # Errors
/// Each says what to mend; nothing has been served then.
pub async fn open(config: Config, database: &DbConfig, keys: KeyRing) -> Result<App, StartError> {
    let db = Db::connect(database).await?;
    catalogue::check(&db).await?;
    let mut rng = rand::rngs::StdRng::from_os_rng();
    let secrets = PlatformSecrets::load(&db.sys, &keys, &mut rng).await?;
    Ok(App::new(config, db, keys, secrets))
}

/// `serve` from the environment's configuration, until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot start.
pub async fn run(config: ServeConfig) -> Result<(), StartError> {
    let (listeners, running) = Listeners::bind(config.config).await?;
    let shutdown = on_signal()?;
    let app = open(running, &config.database, config.keys).await?;
    until(app, listeners, shutdown).await
}

/// Serves until `shutdown`: readiness fails first, then running requests get 10 s.
///
/// # Errors
/// When the gateway cannot be started.
pub async fn until(app: App, listeners: Listeners, shutdown: CancellationToken) -> Result<(), StartError> {
    metrics::install();
    let supervised = TaskTracker::new();
    supervised.spawn(gateway(app.clone(), listeners.nodes, shutdown.clone()));
    supervised.spawn(tasks::run(app.clone(), shutdown.clone()));
    tracing::info!(listen = %app.config.listen, node_listen = %app.config.node_listen, "serving");
    let draining = app.draining.clone();
    let stopping = shutdown.clone();
    supervised.spawn(async move {
        stopping.cancelled().await;
        draining.cancel();
    });
    serve::serve(listeners.http, router::api(app.clone()), shutdown).await;
    supervised.close();
    if tokio::time::timeout(serve::DRAIN, supervised.wait()).await.is_err() {
        tracing::warn!("some tasks did not end in time");
    }
    app.db.close().await;
    tracing::info!("stopped");
    Ok(())
}

/// Without it servers would drift from what tenants are told: its end is the end of the process.
async fn gateway(app: App, listener: TcpListener, shutdown: CancellationToken) {
    if let Err(error) = nodes::serve(listener, app, shutdown.clone()).await {
        tracing::error!(error = problem::chain(&error), "the gateway for servers has failed; stopping");
        shutdown.cancel();
    }
}

/// Cancelled by the first SIGTERM or SIGINT; a second one ends the process at once.
///
/// # Errors
/// When the kernel refuses the handlers.
pub fn on_signal() -> Result<CancellationToken, StartError> {
    let mut term = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut int = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    let token = CancellationToken::new();
    let first = token.clone();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        tracing::info!("shutting down");
        first.cancel();
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        std::process::exit(130);
    });
    Ok(token)
}
