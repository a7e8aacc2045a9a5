//! The TLS listener of the gateway. Who a peer is follows from its pinned key and nothing else.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin as Pinned;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use cvault_node_protocol::tls::{self, Pin};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::service::Gateway;
use crate::app::App;

/// Handshakes in progress at once; more wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 64;
/// A handshake that takes longer is an attack or a dead peer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
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
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub pin: Pin,
    pub address: SocketAddr,
}

/// Serves agents until `shutdown`; then streams end with `GoAway` and running calls finish.
///
/// # Errors
/// When the TLS identity is unusable or HTTP/2 cannot be served.
pub async fn serve(listener: TcpListener, app: App, shutdown: CancellationToken) -> Result<(), ServeError> {
    let acceptor = TlsAcceptor::from(Arc::new(tls::server_config(&app.secrets.node_identity)?));
    let tracker = TaskTracker::new();
    // bounded: while the server is busy taking connections over, the next handshakes wait
    let (connections, incoming) = mpsc::channel(16);
    tracker.spawn(accept(listener, acceptor, connections, shutdown.clone()));
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

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: mpsc::Sender<io::Result<Connection>>,
    shutdown: CancellationToken,
) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let permit = Arc::clone(&handshakes).acquire_owned().await.expect("the semaphore is never closed");
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
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(acceptor, stream, address)).await {
                Ok(Ok(connection)) => {
                    // fails only when the server has stopped
                    let _ = connections.send(Ok(connection)).await;
                }
                Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake has failed"),
                Err(_) => tracing::debug!("a TLS handshake has timed out"),
            }
            drop(permit);
        });
    }
}

async fn handshake(acceptor: TlsAcceptor, stream: TcpStream, address: SocketAddr) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or_else(|| io::Error::other("the agent presented no certificate"))?;
    let pin = Pin::of_certificate(certificate).map_err(io::Error::other)?;
    Ok(Connection { stream, peer: Peer { pin, address } })
}

/// A connection whose peer has proven to hold a key.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pinned<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
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
