//! A control plane of one server, in this process: the real protocol over the real TLS, its state in memory.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin as StdPin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};

use cvault_node_protocol::digest::{Digest, PeerRecord};
use cvault_node_protocol::tls::{self, Identity, Pin};
use cvault_node_protocol::token::EnrolToken;
use cvault_node_protocol::v1::{self, node_gateway_server, state_event::Event};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

pub(crate) const SERVER_ID: [u8; 16] = [0x5e; 16];
pub(crate) const DIGEST_KEY: [u8; 32] = [0xd1; 32];

#[derive(Clone)]
pub(crate) struct Gateway {
    state: Arc<Mutex<State>>,
}

pub(crate) struct State {
    pub(crate) server_id: [u8; 16],
    pub(crate) listen_port: u32,
    pub(crate) incarnation: [u8; 16],
    pub(crate) revision: u64,
    pub(crate) peers: BTreeMap<Vec<u8>, v1::Peer>,
    /// The token that may be used, and by whom it was.
    pub(crate) token: EnrolToken,
    pub(crate) enrolled: Option<(Pin, v1::EnrollRequest)>,
    /// Do the enrolment, then lose the answer.
    pub(crate) lose_answer: bool,
    /// What the next report is answered besides its acknowledgements.
    pub(crate) superseded: bool,
    pub(crate) snapshot_wanted: bool,
    pub(crate) reports: Vec<v1::ReportRequest>,
    /// Largest cumulative value by device and generation, as a ledger would keep it.
    pub(crate) ledger: BTreeMap<(Vec<u8>, u64), v1::PeerUsage>,
    pub(crate) watches: Vec<v1::WatchRequest>,
    stream: Option<mpsc::Sender<Result<v1::StateEvent, Status>>>,
}

/// A gateway that serves; dropping the handle cuts every connection.
pub(crate) struct Serving {
    pub(crate) gateway: Gateway,
    pub(crate) address: SocketAddr,
    connections: tokio::task::JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.connections.abort();
    }
}

impl Gateway {
    pub(crate) fn new(pin: Pin) -> Self {
        let token = EnrolToken::new(uuid::Uuid::from_u128(7), [1; 32], pin);
        let state = State {
            server_id: SERVER_ID,
            listen_port: 51820,
            incarnation: [1; 16],
            revision: 1,
            peers: BTreeMap::new(),
            token,
            enrolled: None,
            lose_answer: false,
            superseded: false,
            snapshot_wanted: false,
            reports: Vec::new(),
            ledger: BTreeMap::new(),
            watches: Vec::new(),
            stream: None,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) async fn serve(&self, identity: &Identity, address: &str) -> Serving {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls::server_config(identity).unwrap()));
        let (tx, rx) = mpsc::channel::<Result<Connection, std::io::Error>>(16);
        let gateway = self.clone();
        let connections = tokio::spawn(async move {
            let accept = async {
                loop {
                    let Ok((tcp, _)) = listener.accept().await else { continue };
                    tcp.set_nodelay(true).unwrap();
                    if let Ok(stream) = acceptor.accept(tcp).await {
                        let certificate = &stream.get_ref().1.peer_certificates().unwrap()[0];
                        let pin = Pin::of_certificate(certificate).unwrap();
                        tx.send(Ok(Connection { stream, pin })).await.unwrap();
                    }
                }
            };
            let service = node_gateway_server::NodeGatewayServer::new(gateway);
            let serve =
                tonic::transport::Server::builder().add_service(service).serve_with_incoming(ReceiverStream::new(rx));
            tokio::select! {
                () = accept => {}
                served = serve => served.unwrap(),
            }
        });
        Serving { gateway: self.clone(), address, connections }
    }

    /// One more revision, told as a delta to the open stream.
    pub(crate) async fn change(&self, removed: &[&[u8; 32]], mut upserted: Vec<v1::Peer>) {
        let (event, stream) = {
            let mut state = self.state();
            let from_revision = state.revision;
            state.revision += 1;
            for key in removed {
                state.peers.remove(key.as_slice());
            }
            for peer in &mut upserted {
                peer.generation = state.revision;
                state.peers.insert(peer.public_key.to_vec(), peer.clone());
            }
            let delta = v1::Delta {
                from_revision,
                target: Some(state.cursor()),
                peer_count: u32::try_from(state.peers.len()).unwrap(),
                removed: removed.iter().map(|key| key.to_vec().into()).collect(),
                upserted,
                expected_removed: 0,
            };
            (Event::Delta(delta), state.stream.clone())
        };
        if let Some(stream) = stream {
            stream.send(Ok(v1::StateEvent { event: Some(event) })).await.ok();
        }
    }
}

impl State {
    pub(crate) fn cursor(&self) -> v1::Cursor {
        let mut digest = Digest::default();
        for peer in self.peers.values() {
            let record = PeerRecord {
                device_id: peer.device_id.as_ref().try_into().unwrap(),
                tenant_id: peer.tenant_id.as_ref().try_into().unwrap(),
                public_key: peer.public_key.as_ref().try_into().unwrap(),
                preshared_key_hash: [0; 32],
                ipv4: peer.ipv4.to_be_bytes(),
                ipv6: peer.ipv6.as_ref().try_into().unwrap(),
                generation: peer.generation,
            };
            digest.add(&DIGEST_KEY, &record);
        }
        v1::Cursor {
            incarnation: self.incarnation.to_vec().into(),
            revision: self.revision,
            digest: digest.to_bytes().to_vec().into(),
        }
    }

    /// Whether the last report that told a state told this one.
    pub(crate) fn is_acknowledged(&self) -> bool {
        let last = self.reports.iter().rev().find_map(|report| report.applied.as_ref());
        last == Some(&self.cursor())
    }

    fn first_events(&self, have: Option<&v1::Cursor>) -> Vec<Event> {
        let hello = v1::Hello {
            incarnation: self.incarnation.to_vec().into(),
            session_epoch: self.watches.len() as u64,
            protocol: 1,
            digest_key: DIGEST_KEY.to_vec().into(),
            interface: Some(v1::InterfaceConfig {
                listen_port: self.listen_port,
                addresses: vec!["10.8.0.1/16".to_owned(), "fd00:cafe::1/64".to_owned()],
                overlay: vec!["10.8.0.0/16".to_owned(), "fd00:cafe::/64".to_owned()],
                mtu: 1420,
            }),
            report_interval_ms: 200,
        };
        let target = self.cursor();
        let mut events = vec![Event::Hello(hello)];
        if have != Some(&target) {
            let peer_count = u32::try_from(self.peers.len()).unwrap();
            events.push(Event::SnapshotBegin(v1::SnapshotBegin { target: Some(target), peer_count }));
            let peers: Vec<_> = self.peers.values().cloned().collect();
            for peers in peers.chunks(cvault_node_protocol::MAX_CHUNK_PEERS) {
                events.push(Event::SnapshotChunk(v1::SnapshotChunk { peers: peers.to_vec() }));
            }
            events.push(Event::SnapshotEnd(v1::SnapshotEnd { expected_removed: 0 }));
        }
        events
    }
}

#[tonic::async_trait]
impl node_gateway_server::NodeGateway for Gateway {
    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollResponse>, Status> {
        let pin = *request.extensions().get::<Pin>().unwrap();
        let request = request.into_inner();
        let mut state = self.state();
        let token = EnrolToken::parse(&request.token).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if token.secret_hash() != state.token.secret_hash() {
            return Err(Status::unauthenticated("no such token"));
        }
        match &state.enrolled {
            Some((other, _)) if *other != pin => return Err(Status::unauthenticated("the token was used")),
            _ => state.enrolled = Some((pin, request)),
        }
        if std::mem::take(&mut state.lose_answer) {
            return Err(Status::unavailable("the answer is lost"));
        }
        Ok(Response::new(v1::EnrollResponse {
            server_id: state.server_id.to_vec().into(),
            server_name: "test-1".to_owned(),
        }))
    }

    type WatchStream = ReceiverStream<Result<v1::StateEvent, Status>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (tx, rx) = mpsc::channel(64);
        let mut state = self.state();
        let request = request.into_inner();
        state.watches.push(request.clone());
        for event in state.first_events(request.have.as_ref()) {
            tx.try_send(Ok(v1::StateEvent { event: Some(event) })).unwrap();
        }
        state.stream = Some(tx);
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    async fn report(&self, request: Request<v1::ReportRequest>) -> Result<Response<v1::ReportResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        let mut acked = Vec::new();
        for window in &request.windows {
            acked.push(v1::AckedWindow { counter_epoch: window.counter_epoch.clone(), sequence: window.sequence });
            for peer in &window.peers {
                let entry = state.ledger.entry((peer.device_id.to_vec(), peer.generation)).or_default();
                if peer.rx_bytes + peer.tx_bytes >= entry.rx_bytes + entry.tx_bytes {
                    *entry = peer.clone();
                }
            }
        }
        let cursor = state.cursor();
        let diverged = request
            .applied
            .as_ref()
            .is_some_and(|applied| applied.revision == cursor.revision && applied.digest != cursor.digest);
        state.reports.push(request);
        let superseded = std::mem::take(&mut state.superseded);
        let snapshot_wanted = std::mem::take(&mut state.snapshot_wanted) || diverged;
        Ok(Response::new(v1::ReportResponse { acked, superseded, snapshot_wanted, leases: Vec::new() }))
    }
}

/// A TLS connection that tells handlers whose key it is.
struct Connection {
    stream: TlsStream<TcpStream>,
    pin: Pin,
}

impl tonic::transport::server::Connected for Connection {
    type ConnectInfo = Pin;

    fn connect_info(&self) -> Pin {
        self.pin
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: StdPin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        StdPin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: StdPin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        StdPin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: StdPin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        StdPin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: StdPin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        StdPin::new(&mut self.stream).poll_shutdown(cx)
    }
}
