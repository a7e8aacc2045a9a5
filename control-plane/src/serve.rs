//! `serve`: everything is checked before the first request is taken, and what is started is stopped again.

use std::net::SocketAddr;
use std::time::Duration;

use futures::FutureExt;
use rand::SeedableRng;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::app::App;
use crate::catalogue::{self, CatalogueError};
use crate::config::{Config, ServeConfig};
use crate::db::{ConnectError, Db, DbConfig};
use crate::http::serve::Limits;
use crate::http::tls::{self, Tls, TlsError};
use crate::http::{router, serve};
use crate::keys::{self, KeyRing, PlatformSecrets, RingError, SecretsError, TokenKeyring};
use crate::mail::Sink;
use crate::{metrics, nodes, tasks};

/// The database is told goodbye within this time.
const CLOSE: Duration = Duration::from_secs(2);

/// Why nothing was started, or why what was started has ended.
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
    #[error(transparent)]
    Keys(#[from] RingError),
    #[error("the gateway for servers has failed")]
    Gateway(#[source] nodes::ServeError),
    #[error("the gateway for servers has failed")]
    GatewayPanicked(#[source] tokio::task::JoinError),
    #[error("CVAULT_TLS_CERT_FILE, CVAULT_TLS_KEY_FILE: {0}")]
    Tls(#[from] TlsError),
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
    let token_keys = TokenKeyring::load(&db.sys, &keys, &mut rng).await?;
    keys::check(&db.sys, &keys).await?;
    Ok(App::new(config, db, keys, secrets, token_keys))
}

/// `serve` from the environment's configuration, until SIGTERM or SIGINT.
///
/// # Errors
/// When it cannot start.
pub async fn run(config: ServeConfig) -> Result<(), StartError> {
    let (listeners, running) = Listeners::bind(config.config).await?;
    let shutdown = on_signal()?;
    let app = open(running, &config.database, config.keys).await?;
    if matches!(app.config.mail.sink, Sink::Unset) {
        tracing::warn!(
            "no mail server is configured (CVAULT_SMTP_URL): mails, such as those that verify addresses and reset passwords, wait in the outbox and are not sent"
        );
    }
    until(app, listeners, shutdown).await
}

/// Serves until `shutdown`: then no connection is taken, idle ones are closed, and running requests get 10 s.
///
/// # Errors
/// [`StartError::Gateway`] when the gateway has failed, which ends everything else too.
pub async fn until(app: App, listeners: Listeners, shutdown: CancellationToken) -> Result<(), StartError> {
    metrics::install();
    // also when another version has been put in the place of this one
    app.passwords.compute_apart("/proc/self/exe".into());
    let tls = match app.config.tls.clone() {
        Some(files) => Some((Tls::new(tls::load(&files)?), files)),
        None => None,
    };
    let supervised = TaskTracker::new();
    let gateway = nodes::serve(listeners.nodes, app.clone(), shutdown.clone());
    let gateway = supervised.spawn(indispensable(gateway, shutdown.clone()));
    supervised.spawn(tasks::run(app.clone(), shutdown.clone()));
    tracing::info!(listen = %app.config.listen, node_listen = %app.config.node_listen, "serving");
    let draining = app.draining.clone();
    let stopping = shutdown.clone();
    supervised.spawn(async move {
        stopping.cancelled().await;
        draining.cancel();
    });
    let limits = Limits::behind(app.config.trusted_proxies.clone());
    let tls = tls.map(|(tls, files)| {
        supervised.spawn(tls.clone().follow(files, shutdown.clone()));
        tls
    });
    serve::serve_over(tls, listeners.http, router::api(app.clone()), limits, shutdown).await;
    supervised.close();
    if tokio::time::timeout(serve::DRAIN, supervised.wait()).await.is_err() {
        tracing::warn!("some tasks did not end in time");
    }
    if let Err(error) = app.uses.flush(&app.db.sys).await {
        tracing::warn!(error = crate::http::problem::chain(&error), "the last uses of keys are not written");
    }
    if let Err(error) = app.request_log.flush(&app.db.sys).await {
        tracing::warn!(error = crate::http::problem::chain(&error), "the last requests are not written");
    }
    // a request that was not waited for may hold a connection
    if tokio::time::timeout(CLOSE, app.db.close()).await.is_err() {
        tracing::warn!("connections to the database were still in use");
    }
    tracing::info!("stopped");
    outcome(gateway)
}

/// What the gateway has to say at the end; nothing when it still runs.
fn outcome(gateway: JoinHandle<Result<(), nodes::ServeError>>) -> Result<(), StartError> {
    match gateway.now_or_never() {
        Some(Ok(Err(error))) => Err(StartError::Gateway(error)),
        Some(Err(panicked)) => Err(StartError::GatewayPanicked(panicked)),
        Some(Ok(Ok(()))) | None => Ok(()),
    }
}

/// Runs what the process is worth nothing without: its end is the shutdown, however it comes. Without the gateway servers
/// would drift from what tenants are told.
async fn indispensable<E>(work: impl Future<Output = Result<(), E>>, shutdown: CancellationToken) -> Result<(), E> {
    let _shutdown = shutdown.drop_guard();
    work.await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_gateway_that_fails_or_panics_ends_the_process_with_its_error() {
        for panics in [false, true] {
            let shutdown = CancellationToken::new();
            let gateway = tokio::spawn(indispensable(
                async move {
                    assert!(!panics, "a fault of ours");
                    Err(nodes::ServeError::Tls(rustls::Error::DecryptError))
                },
                shutdown.clone(),
            ));
            shutdown.cancelled().await;
            while !gateway.is_finished() {
                tokio::task::yield_now().await;
            }
            match outcome(gateway) {
                Err(StartError::Gateway(_)) => assert!(!panics),
                Err(StartError::GatewayPanicked(_)) => assert!(panics),
                other => panic!("{other:?}"),
            }
        }
    }
}
