//! One TLS connection to the control plane, with both keys pinned. It is never silently replaced: a session lives
//! exactly as long as its connection.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cvault_node_protocol::tls::{self, Identity, Pin};
use cvault_node_protocol::v1::node_gateway_client::NodeGatewayClient;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

pub(crate) type Gateway = NodeGatewayClient<Channel>;

const RESOLVE_TIMEOUT: Duration = Duration::from_secs(3);
const TCP_TIMEOUT: Duration = Duration::from_secs(3);
const TLS_TIMEOUT: Duration = Duration::from_secs(5);
const HTTP2_TIMEOUT: Duration = Duration::from_secs(5);
/// A dead path is noticed within the sum of both, so that a revocation waits no longer than that for a new session.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(4);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("the name in {address} cannot be resolved")]
    Resolve { address: String, source: io::Error },
    #[error("nobody answers at {address}")]
    Tcp { address: String, source: io::Error },
    #[error("the control plane at {address} does not have the key that was pinned at enrolment")]
    Pin { address: String },
    #[error("no secure connection to {address} can be made")]
    Tls { address: String, source: io::Error },
    #[error("the TLS key cannot be used")]
    Key(#[from] rustls::Error),
    #[error("the control plane does not speak the protocol")]
    Http2(#[from] tonic::transport::Error),
    #[error("the control plane took too long to answer")]
    Timeout,
}

impl ConnectError {
    /// Whether the control plane was not reached at all, so that trying again soon costs it nothing.
    pub(crate) fn is_network(&self) -> bool {
        matches!(self, Self::Resolve { .. } | Self::Tcp { .. } | Self::Timeout)
    }
}

/// Connects to `address` (`host:port`). Cancel-safe.
pub(crate) async fn connect(address: &str, identity: &Identity, pin: Pin) -> Result<Gateway, ConnectError> {
    let stream = connect_tls(address, identity, pin).await?;
    let stream = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let connector = tower::service_fn(move |_: http::Uri| {
        let stream = stream.lock().expect("nothing panics while holding it").take();
        async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted)) }
    });
    let endpoint = Endpoint::from_static("http://cvault-node-gateway")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    let channel = tokio::time::timeout(HTTP2_TIMEOUT, endpoint.connect_with_connector(connector))
        .await
        .map_err(|_| ConnectError::Timeout)??;
    Ok(NodeGatewayClient::new(channel)
        .max_decoding_message_size(cvault_node_protocol::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(cvault_node_protocol::MAX_MESSAGE_BYTES))
}

async fn connect_tls(address: &str, identity: &Identity, pin: Pin) -> Result<TlsStream<TcpStream>, ConnectError> {
    let tcp = connect_tcp(address).await?;
    let config = Arc::new(tls::client_config(identity, pin)?);
    let name = ServerName::try_from(tls::TLS_NAME).expect("the constant is a DNS name");
    let handshake = TlsConnector::from(config).connect(name, tcp);
    match tokio::time::timeout(TLS_TIMEOUT, handshake).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) if is_wrong_pin(&error) => Err(ConnectError::Pin { address: address.to_owned() }),
        Ok(Err(source)) => Err(ConnectError::Tls { address: address.to_owned(), source }),
        Err(_) => Err(ConnectError::Timeout),
    }
}

async fn connect_tcp(address: &str) -> Result<TcpStream, ConnectError> {
    let resolve = |source| ConnectError::Resolve { address: address.to_owned(), source };
    let addresses = tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(address))
        .await
        .map_err(|_| resolve(io::ErrorKind::TimedOut.into()))?
        .map_err(resolve)?;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for candidate in addresses {
        match tokio::time::timeout(TCP_TIMEOUT, TcpStream::connect(candidate)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true).ok();
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(ConnectError::Tcp { address: address.to_owned(), source: last })
}

fn is_wrong_pin(error: &io::Error) -> bool {
    let refused = rustls::CertificateError::ApplicationVerificationFailure;
    error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        .is_some_and(|inner| *inner == rustls::Error::InvalidCertificate(refused))
}
