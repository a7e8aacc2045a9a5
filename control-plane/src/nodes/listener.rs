//! The TLS listener of the gateway. Who a peer is follows from its pinned key and nothing else.
//!
//! The key is looked up right after the handshake. One that no server has gets next to nothing: few connections, a short
//! life, small messages, and `Enroll` only.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin as Pinned;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use cvault_node_protocol::tls::{self, Pin};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::service::{self, Gateway};
use crate::app::App;
use crate::network::{Network, Place, Places};

/// Connections at once: each server has one, two for a moment when its agent is restarted.
const MAX_CONNECTIONS: usize = 20_000;
/// Of one network: agents behind one address.
const MAX_CONNECTIONS_PER_NETWORK: u32 = 512;
/// Handshakes in progress at once; more wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 1_024;
/// Of one network, so that silence from one address keeps nobody else waiting; more are closed at once.
const MAX_HANDSHAKES_PER_NETWORK: u32 = 64;
/// A handshake that takes longer is an attack or a dead peer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections with keys that no server has: machines that enrol, and strangers.
const MAX_STRANGERS: usize = 64;
const MAX_STRANGERS_PER_NETWORK: u32 = 16;

/// How long the gateway bears what is of no use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// What a stranger's connection may last.
    pub stranger: Duration,
    /// A server's connection must bring its first call within this time, the HTTP/2 preface included.
    pub first_call: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { stranger: Duration::from_secs(30), first_call: Duration::from_secs(10) }
    }
}

/// One stream and a few calls are all an agent needs.
const MAX_STREAMS_PER_CONNECTION: u32 = 16;
/// A dead connection is noticed after this and [`KEEPALIVE_TIMEOUT`].
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the TLS identity of the gateway cannot be used")]
    Tls(#[from] rustls::Error),
    #[error("the gateway has stopped")]
    Transport(#[from] tonic::transport::Error),
}

/// The key at the other end of a connection.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub pin: Pin,
    pub address: SocketAddr,
    pub standing: Arc<Standing>,
}

/// What is known of a peer while its connection lasts.
#[derive(Debug)]
pub(super) struct Standing {
    is_server: AtomicBool,
    has_called: AtomicBool,
}

impl Standing {
    fn new(is_server: bool) -> Self {
        Self { is_server: AtomicBool::new(is_server), has_called: AtomicBool::new(false) }
    }

    pub(super) fn is_server(&self) -> bool {
        self.is_server.load(Ordering::Relaxed)
    }

    /// It has enrolled, or its server was removed.
    pub(super) fn set_server(&self, is_server: bool) {
        self.is_server.store(is_server, Ordering::Relaxed);
    }

    pub(super) fn called(&self) {
        self.has_called.store(true, Ordering::Relaxed);
    }

    fn may_stay(&self) -> bool {
        self.is_server() && self.has_called.load(Ordering::Relaxed)
    }
}

/// Serves agents until `shutdown`; then streams end with `GoAway` and running calls finish.
///
/// # Errors
/// When the TLS identity is unusable or HTTP/2 cannot be served.
pub async fn serve(listener: TcpListener, app: App, shutdown: CancellationToken) -> Result<(), ServeError> {
    serve_with(listener, app, Patience::default(), shutdown).await
}

pub(super) async fn serve_with(
    listener: TcpListener,
    app: App,
    patience: Patience,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let acceptor = TlsAcceptor::from(Arc::new(tls::server_config(&app.secrets.node_identity)?));
    let tracker = TaskTracker::new();
    // bounded: while the server is busy taking connections over, the next handshakes wait
    let (connections, incoming) = mpsc::channel(16);
    let door = Door::new(app.clone(), acceptor, patience, connections);
    tracker.spawn(accept(listener, door, shutdown.clone()));
    let gateway = Gateway::new(app, shutdown.clone(), tracker.clone());
    let served = Server::builder()
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(gateway.into_service())
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), shutdown.clone().cancelled_owned())
        .await;
    shutdown.cancel();
    tracker.close();
    tracker.wait().await;
    Ok(served?)
}

async fn accept(listener: TcpListener, door: Door, shutdown: CancellationToken) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let each = Places::new(MAX_HANDSHAKES_PER_NETWORK);
    loop {
        let permit = tokio::select! {
            permit = Arc::clone(&handshakes).acquire_owned() => permit.expect("the semaphore is never closed"),
            () = shutdown.cancelled() => return,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection of an agent cannot be accepted");
                // out of file descriptors, usually: give others the time to close some
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = each.take(Network::of(address.ip())) else {
            tracing::debug!("a network has too many handshakes in progress");
            continue;
        };
        let door = door.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, door.admit(stream, address)).await {
                Ok(Ok(connection)) => {
                    // fails only when the server has stopped
                    let _ = door.admitted.send(Ok(connection)).await;
                }
                Ok(Err(error)) => tracing::debug!(%error, "a connection of an agent was not admitted"),
                Err(_) => tracing::debug!("a TLS handshake has timed out"),
            }
            drop((permit, place));
        });
    }
}

/// Turns TCP connections into those of peers with a key, as long as there are places for them.
#[derive(Clone)]
struct Door {
    app: App,
    acceptor: TlsAcceptor,
    patience: Patience,
    admitted: mpsc::Sender<io::Result<Connection>>,
    all: Allotment,
    strangers: Allotment,
}

/// Places in all and of each network.
#[derive(Clone)]
struct Allotment {
    total: Arc<Semaphore>,
    each: Places,
}

/// One of them, until this is dropped.
struct Held {
    _total: OwnedSemaphorePermit,
    _each: Place,
}

impl Allotment {
    fn new(total: usize, each: u32) -> Self {
        Self { total: Arc::new(Semaphore::new(total)), each: Places::new(each) }
    }

    fn take(&self, address: SocketAddr) -> io::Result<Held> {
        let full = || io::Error::other("there are too many connections");
        Ok(Held {
            _each: self.each.take(Network::of(address.ip())).ok_or_else(full)?,
            _total: Arc::clone(&self.total).try_acquire_owned().map_err(|_| full())?,
        })
    }
}

impl Door {
    fn new(
        app: App,
        acceptor: TlsAcceptor,
        patience: Patience,
        admitted: mpsc::Sender<io::Result<Connection>>,
    ) -> Self {
        Self {
            app,
            acceptor,
            patience,
            admitted,
            all: Allotment::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_NETWORK),
            strangers: Allotment::new(MAX_STRANGERS, MAX_STRANGERS_PER_NETWORK),
        }
    }

    async fn admit(&self, stream: TcpStream, address: SocketAddr) -> io::Result<Connection> {
        let place = self.all.take(address)?;
        stream.set_nodelay(true)?;
        let stream = self.acceptor.accept(stream).await?;
        let certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first())
            .ok_or_else(|| io::Error::other("the agent presented no certificate"))?;
        let pin = Pin::of_certificate(certificate).map_err(io::Error::other)?;
        let is_server = service::server_with(&self.app, pin).await.map_err(io::Error::other)?.is_some();
        let strangers_place = if is_server { None } else { Some(self.strangers.take(address)?) };
        let patience = if is_server { self.patience.first_call } else { self.patience.stranger };
        let peer = Peer { pin, address, standing: Arc::new(Standing::new(is_server)) };
        Ok(Connection {
            stream,
            peer,
            ends: Some(Box::pin(tokio::time::sleep(patience))),
            _places: (place, strangers_place),
        })
    }
}

/// A connection whose peer has proven to hold a key.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// When it ends, unless the peer may stay by then.
    ends: Option<Pinned<Box<Sleep>>>,
    _places: (Held, Option<Held>),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pinned<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(ends) = &mut self.ends
            && ends.as_mut().poll(cx).is_ready()
        {
            self.ends = None;
            if !self.peer.standing.may_stay() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        Pinned::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pinned<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pinned::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pinned<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pinned::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pinned<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pinned::new(&mut self.stream).poll_shutdown(cx)
    }
}
