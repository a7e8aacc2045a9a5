//! The gRPC service: who calls, whether the call is admitted, and what it is handed to.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use cvault_node_protocol::tls::Pin;
use cvault_node_protocol::token::EnrolToken;
use cvault_node_protocol::v1::node_gateway_server::{NodeGateway, NodeGatewayServer};
use cvault_node_protocol::v1::{
    EnrollRequest, EnrollResponse, ReportRequest, ReportResponse, StateEvent, WatchRequest,
};
use cvault_node_protocol::{MAX_MESSAGE_BYTES, PROTOCOL};
use cvault_types::ServerId;
use futures::future::BoxFuture;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use tower::Service;
use uuid::Uuid;

use super::listener::Peer;
use super::{report, stream};
use crate::app::App;
use crate::db::DbError;
use crate::metrics;
use crate::servers::{self, EnrolError};

/// New watches per second; each costs a snapshot at worst. The others come again after their back-off.
const MAX_WATCHES_PER_SECOND: u64 = 200;
/// Snapshots being read at once: about 10 MB each for a full server.
const MAX_SNAPSHOTS: usize = 8;
/// Reports being entered at once; they share the sys pool with everything else.
const MAX_REPORTS: usize = 6;
/// How long a report waits for its turn before the agent is told to come again.
const REPORT_TURN: Duration = Duration::from_secs(5);
/// Messages that wait in a stream; behind that the next delta is simply larger.
const STREAM_QUEUE: usize = 8;

/// An enrolment needs less than one.
const MAX_STRANGERS_MESSAGE_BYTES: usize = 16 << 10;

#[derive(Clone)]
pub(super) struct Gateway {
    app: App,
    shutdown: CancellationToken,
    tracker: TaskTracker,
    watches: Arc<AtomicU64>,
    snapshots: Arc<Semaphore>,
    reports: Arc<Semaphore>,
}

impl Gateway {
    pub(super) fn new(app: App, shutdown: CancellationToken, tracker: TaskTracker) -> Self {
        Self {
            app,
            shutdown,
            tracker,
            watches: Arc::default(),
            snapshots: Arc::new(Semaphore::new(MAX_SNAPSHOTS)),
            reports: Arc::new(Semaphore::new(MAX_REPORTS)),
        }
    }

    pub(super) fn into_service(self) -> Gate {
        let service = |bytes| {
            NodeGatewayServer::new(self.clone())
                .max_decoding_message_size(bytes)
                .max_encoding_message_size(MAX_MESSAGE_BYTES)
        };
        Gate { servers: service(MAX_MESSAGE_BYTES), strangers: service(MAX_STRANGERS_MESSAGE_BYTES) }
    }

    /// The server whose identity is the key at the other end.
    async fn caller<T>(&self, request: &Request<T>) -> Result<ServerId, Status> {
        let peer = peer(request)?;
        let server = server_with(&self.app, peer.pin).await.map_err(|error| unavailable(&error))?;
        server.ok_or_else(|| {
            tracing::debug!(pin = ?peer.pin, address = %peer.address, "an unknown agent was refused");
            // its next call costs no query
            peer.standing.set_server(false);
            not_enrolled()
        })
    }

    /// Counts watches of the current second in one number: the second above, the count below.
    fn admit_watch(&self) -> Result<(), Status> {
        let second = u64::try_from(self.app.clock.now().unix_timestamp()).unwrap_or_default() << 16;
        let admitted = self.watches.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |seen| {
            let next = seen.max(second) + 1;
            (next & 0xffff <= MAX_WATCHES_PER_SECOND).then_some(next)
        });
        admitted.map(drop).map_err(|_| Status::resource_exhausted("many agents connect at once: come again"))
    }
}

/// The server whose identity is the key with `pin`.
pub(super) async fn server_with(app: &App, pin: Pin) -> Result<Option<ServerId>, DbError> {
    let server = sqlx::query_scalar!(
        "select server_id from platform.servers where identity_pin = $1 and status <> 'removed'",
        pin.as_bytes().as_slice()
    )
    .fetch_optional(&app.db.sys)
    .await?;
    Ok(server.map(ServerId::from_uuid))
}

fn not_enrolled() -> Status {
    Status::unauthenticated("this agent is not enrolled, or its server was removed")
}

/// The service as servers get it, and as strangers get it.
#[derive(Clone)]
pub(super) struct Gate {
    servers: NodeGatewayServer<Gateway>,
    strangers: NodeGatewayServer<Gateway>,
}

impl NamedService for Gate {
    const NAME: &'static str = <NodeGatewayServer<Gateway> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for Gate {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let standing = request.extensions().get::<Peer>().map(|peer| Arc::clone(&peer.standing));
        if let Some(standing) = &standing {
            standing.called();
        }
        if standing.is_some_and(|standing| standing.is_server()) {
            self.servers.call(request)
        } else if request.uri().path().ends_with("/Enroll") {
            self.strangers.call(request)
        } else {
            Box::pin(std::future::ready(Ok(not_enrolled().into_http())))
        }
    }
}

fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    request.extensions().get::<Peer>().cloned().ok_or_else(|| Status::internal("the connection has no peer"))
}

/// The operator gets the cause, the agent a constant sentence.
pub(super) fn unavailable(error: &DbError) -> Status {
    tracing::warn!(error = crate::http::problem::chain(error), "an agent's call has failed");
    Status::unavailable("the database did not answer: come again")
}

#[tonic::async_trait]
impl NodeGateway for Gateway {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let Peer { pin, standing, .. } = peer(&request)?;
        let request = request.into_inner();
        let token = EnrolToken::parse(&request.token).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let key: [u8; 32] = request
            .wireguard_public_key
            .as_ref()
            .try_into()
            .map_err(|_| Status::invalid_argument("the WireGuard public key must have 32 bytes"))?;
        match servers::consume_token(&self.app.db.sys, &token, pin, &key).await {
            Ok(server) => {
                standing.set_server(true);
                tracing::info!(server = %server.id, agent = agent_version(&request.agent_version), "a server has enrolled");
                Ok(Response::new(EnrollResponse {
                    server_id: server.id.uuid().as_bytes().to_vec().into(),
                    server_name: server.name,
                }))
            }
            Err(error @ (EnrolError::Refused | EnrolError::IdentityInUse)) => {
                Err(Status::permission_denied(error.to_string()))
            }
            Err(EnrolError::Db(error)) => Err(unavailable(&error)),
        }
    }

    type WatchStream = ReceiverStream<Result<StateEvent, Status>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let server = self.caller(&request).await?;
        self.admit_watch()?;
        let request = request.into_inner();
        if !(request.protocol_min..=request.protocol_max).contains(&PROTOCOL) {
            return Err(Status::failed_precondition(format!("this control plane speaks protocol {PROTOCOL}")));
        }
        let instance = Uuid::from_slice(&request.instance_id)
            .map_err(|_| Status::invalid_argument("the instance id must have 16 bytes"))?;
        let session = stream::open(&self.app, server, instance).await.map_err(|error| unavailable(&error))?;
        tracing::info!(
            server = %server, session = session.epoch, agent = agent_version(&request.agent_version),
            "an agent watches"
        );
        if session.has_twin {
            metrics::node_alarm("two_instances");
            tracing::error!(%server, %instance, "two live agents share a server's identity: stop one, or enrol it anew");
        }
        let (events, receiver) = mpsc::channel(STREAM_QUEUE);
        let have = request.have.as_ref().and_then(crate::desired::Position::from_wire);
        self.tracker.spawn(stream::run(
            self.app.clone(),
            session,
            have,
            events,
            Arc::clone(&self.snapshots),
            self.shutdown.clone(),
        ));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        let server = self.caller(&request).await?;
        let request = request.into_inner();
        report::check(&request)?;
        let turn = tokio::time::timeout(REPORT_TURN, Arc::clone(&self.reports).acquire_owned()).await;
        let Ok(Ok(permit)) = turn else {
            return Err(Status::resource_exhausted("many reports arrive at once: come again"));
        };
        let app = self.app.clone();
        // a task of its own: an agent that hangs up cancels nothing half-way
        let entered = self.tracker.spawn(async move {
            let _permit = permit;
            report::enter(&app, server, request).await
        });
        match entered.await {
            Ok(Ok(response)) => Ok(Response::new(response)),
            Ok(Err(error)) => Err(unavailable(&error)),
            Err(panicked) => {
                tracing::error!(error = %panicked, "a report could not be entered");
                Err(Status::internal("the report could not be entered"))
            }
        }
    }
}

/// What an agent says of itself, cut to what a log line can bear.
fn agent_version(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_graphic()).take(64).collect()
}
