//! The gateway over real TLS and HTTP/2, with a client that speaks as an agent does.

use std::sync::Arc;
use std::time::Duration;

use cvault_node_protocol::tls::{self, Identity};
use cvault_node_protocol::v1::node_gateway_client::NodeGatewayClient;
use cvault_node_protocol::v1::state_event::Event;
use cvault_node_protocol::v1::{
    Cursor, EnrollRequest, Health, Nack, PeerUsage, ReportRequest, StateEvent, UsageWindow, WatchRequest,
};
use cvault_types::ServerId;
use hyper_util::rt::TokioIo;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::codec::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::servers;
use crate::testing::{Person, World};

mod strangers;

type Client = NodeGatewayClient<Channel>;

struct Gateway {
    world: World,
    address: std::net::SocketAddr,
    shutdown: CancellationToken,
}

impl Gateway {
    async fn start() -> Self {
        let world = World::new().await;
        world.pool("default", "10.8.0.0/16", "fd00:cafe::/64", 0).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        tokio::spawn(super::serve(listener, world.app.clone(), shutdown.clone()));
        Self { world, address, shutdown }
    }

    async fn client(&self, identity: &Identity) -> Client {
        let config = tls::client_config(identity, self.world.app.secrets.node_identity.pin()).unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let address = self.address;
        let channel = Endpoint::from_static("http://gateway")
            .connect_with_connector(tower::service_fn(move |_| {
                let connector = connector.clone();
                async move {
                    let stream = TcpStream::connect(address).await?;
                    let name = ServerName::try_from(tls::TLS_NAME).expect("a valid name");
                    Ok::<_, std::io::Error>(TokioIo::new(connector.connect(name, stream).await?))
                }
            }))
            .await
            .unwrap();
        NodeGatewayClient::new(channel)
    }

    async fn token(&self, server: ServerId) -> String {
        let mut rng = StdRng::from_os_rng();
        let pin = self.world.app.secrets.node_identity.pin();
        let token = servers::issue_token(&self.world.app.db.sys, server, pin, &mut rng).await.unwrap().unwrap();
        token.expose().to_string()
    }

    /// A server with an enrolled agent.
    async fn agent(&self) -> (ServerId, Client, Identity) {
        let server = self.world.server("s1", "default", "lab-1").await;
        let identity = Identity::generate().unwrap();
        let mut client = self.client(&identity).await;
        let token = self.token(server).await;
        let answer = client.enroll(enroll(&token)).await.unwrap().into_inner();
        assert_eq!(answer.server_id.as_ref(), server.uuid().as_bytes());
        (server, client, identity)
    }
}

fn enroll(token: &str) -> EnrollRequest {
    EnrollRequest {
        token: token.to_owned(),
        wireguard_public_key: vec![5; 32].into(),
        agent_version: "test".to_owned(),
    }
}

fn watch(have: Option<Cursor>) -> WatchRequest {
    WatchRequest {
        instance_id: vec![1; 16].into(),
        boot_id: vec![2; 16].into(),
        have,
        protocol_min: 1,
        protocol_max: 1,
        agent_version: "test".to_owned(),
    }
}

fn report(session_epoch: u64, applied: Option<Cursor>) -> ReportRequest {
    ReportRequest {
        session_epoch,
        applied,
        nacks: Vec::new(),
        windows: Vec::new(),
        health: Some(Health { uptime_ms: 5, agent_version: "test".to_owned(), ..Health::default() }),
        leases: None,
        drops: Vec::new(),
    }
}

async fn next(stream: &mut Streaming<StateEvent>) -> Event {
    tokio::time::timeout(Duration::from_secs(10), stream.message()).await.unwrap().unwrap().unwrap().event.unwrap()
}

/// The next event that is no policy.
async fn next_state(stream: &mut Streaming<StateEvent>) -> Event {
    loop {
        let event = next(stream).await;
        if !matches!(event, Event::Policies(_)) {
            return event;
        }
    }
}

/// Hello and the first snapshot: the fencing token and what it brought.
async fn begin(stream: &mut Streaming<StateEvent>) -> (u64, Cursor, usize) {
    let Event::Hello(hello) = next(stream).await else { panic!("no hello") };
    let interface = hello.interface.unwrap();
    assert_eq!(interface.addresses, ["10.8.0.1/16", "fd00:cafe::1/64"]);
    assert_eq!(interface.overlay, ["10.8.0.0/16", "fd00:cafe::/64"]);
    let Event::Policies(policies) = next(stream).await else { panic!("no policies") };
    assert!(policies.replace && !policies.digest.is_empty());
    let Event::SnapshotBegin(begin) = next(stream).await else { panic!("no snapshot") };
    let mut peers = 0;
    loop {
        let event = next(stream).await;
        if let Event::SnapshotChunk(chunk) = event {
            peers += chunk.peers.len();
        } else {
            assert!(matches!(event, Event::SnapshotEnd(_)), "{event:?}");
            break;
        }
    }
    assert_eq!(peers, begin.peer_count as usize);
    (hello.session_epoch, begin.target.unwrap(), peers)
}

#[tokio::test]
async fn a_token_enrols_one_key_and_may_be_repeated_with_it_only() {
    let gateway = Gateway::start().await;
    let server = gateway.world.server("s1", "default", "lab-1").await;
    let token = gateway.token(server).await;
    let (one, other) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let mut stranger = gateway.client(&other).await;
    assert_eq!(stranger.watch(watch(None)).await.unwrap_err().code(), Code::Unauthenticated);
    let mut agent = gateway.client(&one).await;
    let first = agent.enroll(enroll(&token)).await.unwrap().into_inner();
    assert_eq!(agent.enroll(enroll(&token)).await.unwrap().into_inner(), first);
    assert_eq!(stranger.enroll(enroll(&token)).await.unwrap_err().code(), Code::PermissionDenied);
    // a mistyped token, and one whose secret is another
    assert_eq!(agent.enroll(enroll("cvj1.x")).await.unwrap_err().code(), Code::InvalidArgument);
    let pin = gateway.world.app.secrets.node_identity.pin();
    let id = cvault_node_protocol::token::EnrolToken::parse(&token).unwrap().id;
    let guessed = cvault_node_protocol::token::EnrolToken::new(id, [9; 32], pin).expose();
    assert_eq!(stranger.enroll(enroll(&guessed)).await.unwrap_err().code(), Code::PermissionDenied);
    // another server's token cannot give one key two servers
    let second = gateway.world.server("s2", "default", "lab-1").await;
    let token = gateway.token(second).await;
    assert_eq!(agent.enroll(enroll(&token)).await.unwrap_err().code(), Code::PermissionDenied);
    agent.watch(watch(None)).await.unwrap();
}

#[tokio::test]
async fn a_change_reaches_the_agent_at_once_and_its_acknowledgement_the_waiting_request() {
    let gateway = Gateway::start().await;
    let (server, mut agent, _) = gateway.agent().await;
    let person = gateway.world.person().await;
    let mut stream = agent.watch(watch(None)).await.unwrap().into_inner();
    let (epoch, empty, peers) = begin(&mut stream).await;
    assert_eq!((peers, empty.revision), (0, 0));

    let device = gateway.world.register(person, "d").await.unwrap();
    gateway.world.app.nodes.server_changed(server);
    let Event::Delta(delta) = next_state(&mut stream).await else { panic!("no delta") };
    assert_eq!((delta.from_revision, delta.peer_count, delta.upserted.len()), (0, 1, 1));
    assert_eq!(delta.upserted[0].device_id.as_ref(), device.id.uuid().as_bytes());

    let app = gateway.world.app.clone();
    let waiting = tokio::spawn(async move {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        crate::devices::wait_until_acked(&app.nodes, &app.db.sys, server, device.revision, deadline).await.unwrap()
    });
    let answer = agent.report(report(epoch, delta.target.clone())).await.unwrap().into_inner();
    assert!(!answer.superseded && !answer.snapshot_wanted);
    assert!(waiting.await.unwrap());

    // a change of another replica is found by polling
    gateway.world.revoke(person, device.id).await;
    let Event::Delta(delta) = next_state(&mut stream).await else { panic!("no delta") };
    assert_eq!((delta.removed.len(), delta.peer_count, delta.expected_removed), (1, 0, 1));

    // a new stream continues where the agent says it is
    let mut stream = agent.watch(watch(delta.target.clone())).await.unwrap().into_inner();
    let Event::Hello(_) = next(&mut stream).await else { panic!("no hello") };
    gateway.world.register(person, "e").await.unwrap();
    let Event::Delta(again) = next_state(&mut stream).await else { panic!("no delta") };
    assert_eq!(again.from_revision, delta.target.unwrap().revision);
    gateway.shutdown.cancel();
    let Event::GoAway(_) = next(&mut stream).await else { panic!("no farewell") };
}

#[tokio::test]
async fn an_older_session_is_fenced_but_its_usage_is_entered() {
    let gateway = Gateway::start().await;
    let (server, mut agent, _) = gateway.agent().await;
    let person = gateway.world.person().await;
    let device = gateway.world.register(person, "d").await.unwrap();
    let mut old = agent.watch(watch(None)).await.unwrap().into_inner();
    let (old_epoch, target, _) = begin(&mut old).await;
    let mut new = agent.watch(watch(None)).await.unwrap().into_inner();
    let (new_epoch, ..) = begin(&mut new).await;
    assert!(new_epoch > old_epoch);
    let Event::GoAway(_) = next(&mut old).await else { panic!("the old stream goes on") };

    let mut late = report(old_epoch, Some(target.clone()));
    late.windows.push(UsageWindow {
        counter_epoch: vec![3; 16].into(),
        sequence: 1,
        age_start_ms: 1_000,
        age_end_ms: 0,
        peers: vec![PeerUsage {
            device_id: device.id.uuid().as_bytes().to_vec().into(),
            generation: 1,
            rx_bytes: 1_000,
            tx_bytes: 2_000,
            rx_packets: 1,
            tx_packets: 2,
            handshake_age_ms: u64::MAX,
        }],
    });
    let answer = agent.report(late).await.unwrap().into_inner();
    assert!(answer.superseded);
    assert_eq!(answer.acked.len(), 1);
    assert_eq!(acked_revision(&gateway.world, server).await, 0);
    agent.report(report(new_epoch, Some(target))).await.unwrap();
    assert_eq!(acked_revision(&gateway.world, server).await, 1);
    assert_eq!(tenant_bytes(&gateway.world, person).await, 3_000);
}

#[tokio::test]
async fn a_server_that_runs_something_else_than_its_revision_says_gets_a_snapshot() {
    let gateway = Gateway::start().await;
    let (server, mut agent, _) = gateway.agent().await;
    let person = gateway.world.person().await;
    gateway.world.register(person, "d").await.unwrap();
    let mut stream = agent.watch(watch(None)).await.unwrap().into_inner();
    let (epoch, target, _) = begin(&mut stream).await;
    let wrong = Cursor { digest: vec![1; 16].into(), ..target.clone() };
    let answer = agent.report(report(epoch, Some(wrong.clone()))).await.unwrap().into_inner();
    assert!(answer.snapshot_wanted);
    let future = Cursor { revision: 99, ..target };
    assert!(agent.report(report(epoch, Some(future))).await.unwrap().into_inner().snapshot_wanted);
    assert_eq!(acked_revision(&gateway.world, server).await, 0);
    let mut stream = agent.watch(watch(Some(wrong))).await.unwrap().into_inner();
    assert_eq!(begin(&mut stream).await.2, 1);
}

#[tokio::test]
async fn a_refused_change_is_followed_by_a_snapshot() {
    let gateway = Gateway::start().await;
    let (_, mut agent, _) = gateway.agent().await;
    let mut stream = agent.watch(watch(None)).await.unwrap().into_inner();
    let (epoch, target, _) = begin(&mut stream).await;
    let nack = Nack { target: Some(target.clone()), reason: "no".to_owned() };
    let refused = ReportRequest { nacks: vec![nack], ..report(epoch, Some(target.clone())) };
    assert!(agent.report(refused.clone()).await.unwrap().into_inner().snapshot_wanted);
    assert!(!agent.report(report(epoch, Some(target))).await.unwrap().into_inner().snapshot_wanted);
    // nothing is asked of a session that is not the newest
    let mut stream = agent.watch(watch(None)).await.unwrap().into_inner();
    begin(&mut stream).await;
    assert!(!agent.report(refused).await.unwrap().into_inner().snapshot_wanted);
}

#[tokio::test]
async fn within_a_session_the_acknowledged_revision_only_grows() {
    let gateway = Gateway::start().await;
    let (server, mut agent, _) = gateway.agent().await;
    let person = gateway.world.person().await;
    let mut stream = agent.watch(watch(None)).await.unwrap().into_inner();
    let (epoch, empty, _) = begin(&mut stream).await;
    gateway.world.register(person, "d").await.unwrap();
    let Event::Delta(delta) = next_state(&mut stream).await else { panic!("no delta") };
    agent.report(report(epoch, delta.target.clone())).await.unwrap();
    let acked_at = acked_at(&gateway.world, server).await;
    // overtaken on its way, and said again
    agent.report(report(epoch, Some(empty.clone()))).await.unwrap();
    assert_eq!(acked_revision(&gateway.world, server).await, 1);
    agent.report(report(epoch, delta.target)).await.unwrap();
    assert_eq!(self::acked_at(&gateway.world, server).await, acked_at);
    // an agent that was restored from a backup begins with what it has
    let mut stream = agent.watch(watch(Some(empty.clone()))).await.unwrap().into_inner();
    let Event::Hello(hello) = next(&mut stream).await else { panic!("no hello") };
    agent.report(report(hello.session_epoch, Some(empty))).await.unwrap();
    assert_eq!(acked_revision(&gateway.world, server).await, 0);
}

#[tokio::test]
async fn two_live_agents_of_one_identity_are_noticed_and_a_restarted_one_is_not() {
    let (world, server) = World::with_server().await;
    let mut twins = Vec::new();
    for instance in [1, 1, 2, 3, 3, 2] {
        let session = super::stream::open(&world.app, server, uuid::Uuid::from_u128(instance)).await.unwrap();
        twins.push(session.has_twin);
    }
    assert_eq!(twins, [false, false, false, false, false, true]);
}

#[tokio::test]
async fn what_no_correct_agent_sends_is_refused() {
    let gateway = Gateway::start().await;
    let (_, mut agent, _) = gateway.agent().await;
    let old = WatchRequest { protocol_min: 7, protocol_max: 9, ..watch(None) };
    assert_eq!(agent.watch(old).await.unwrap_err().code(), Code::FailedPrecondition);
    let nameless = WatchRequest { instance_id: vec![1].into(), ..watch(None) };
    assert_eq!(agent.watch(nameless).await.unwrap_err().code(), Code::InvalidArgument);
    let mut many = report(1, None);
    many.windows = vec![UsageWindow { counter_epoch: vec![3; 16].into(), ..UsageWindow::default() }; 65];
    assert_eq!(agent.report(many).await.unwrap_err().code(), Code::InvalidArgument);
    let mut short = report(1, None);
    short.windows = vec![UsageWindow { counter_epoch: vec![3; 15].into(), ..UsageWindow::default() }];
    assert_eq!(agent.report(short).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_removed_server_is_nobody() {
    let gateway = Gateway::start().await;
    let (server, mut agent, _) = gateway.agent().await;
    let mut stream = agent.watch(watch(None)).await.unwrap().into_inner();
    begin(&mut stream).await;
    gateway.world.remove_server(server, servers::Removal::Settled).await.unwrap();
    let Event::GoAway(_) = next(&mut stream).await else { panic!("the stream goes on") };
    assert_eq!(agent.watch(watch(None)).await.unwrap_err().code(), Code::Unauthenticated);
}

async fn acked_revision(world: &World, server: ServerId) -> i64 {
    sqlx::query_scalar!("select acked_revision from platform.servers where server_id = $1", server.uuid())
        .fetch_one(&world.app.db.sys)
        .await
        .unwrap()
}

async fn acked_at(world: &World, server: ServerId) -> Option<time::OffsetDateTime> {
    sqlx::query_scalar!("select acked_at from platform.servers where server_id = $1", server.uuid())
        .fetch_one(&world.app.db.sys)
        .await
        .unwrap()
}

async fn tenant_bytes(world: &World, person: Person) -> i64 {
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let now = world.app.clock.now();
    let period = crate::usage::Period { from: now - time::Duration::hours(1), to: now + time::Duration::hours(1) };
    let totals = crate::usage::report(&mut tx, period).await.unwrap().totals;
    tx.commit().await.unwrap();
    totals.rx_bytes + totals.tx_bytes
}

#[tokio::test]
async fn a_tenants_policy_comes_before_its_first_peer_and_again_when_it_changes_and_whole_with_each_stream() {
    use cvault_node_protocol::digest::of_policies;
    use cvault_types::tenant::{UpdateTenantPolicy, UpdateTenantRequest};

    let gateway = Gateway::start().await;
    let (server, mut client, _identity) = gateway.agent().await;
    let mut stream = client.watch(watch(None)).await.unwrap().into_inner();
    begin(&mut stream).await;
    let person = gateway.world.person().await;
    gateway.world.register(person, "d").await.unwrap();
    gateway.world.app.nodes.server_changed(server);
    let Event::Policies(first) = next(&mut stream).await else { panic!("no policy") };
    assert!(!first.replace && first.upserted.len() == 1 && !first.upserted[0].metered);
    assert_eq!(first.digest.as_ref(), of_policies(first.upserted.iter()));
    assert!(matches!(next(&mut stream).await, Event::Delta(_)));

    let policy = UpdateTenantPolicy {
        rate_up_mbps: Some(Some(7)),
        allow_private_destinations: Some(vec!["10.9.0.0/16".to_owned()]),
        over_quota: Some(cvault_types::tenant::OverQuota::Throttle),
        ..UpdateTenantPolicy::default()
    };
    let request = UpdateTenantRequest {
        bandwidth_limit_gb: Some(Some(1)),
        policy: Some(policy),
        ..UpdateTenantRequest::default()
    };
    let actor = crate::tenants::Actor { name: "test".to_owned(), request_id: None };
    let app = &gateway.world.app;
    crate::tenants::update(app, person.tenant, request.clone(), &actor).await.map_err(|_| "refused").unwrap();
    let Event::Policies(changed) = next(&mut stream).await else { panic!("no policy") };
    let told = &changed.upserted[0];
    assert!(told.metered && told.revision == first.upserted[0].revision + 1);
    assert_eq!((told.rate_up, told.rate_down, told.throttle), (7_000_000, 0, 1_000_000));
    assert_eq!(told.allow_to, ["10.9.0.0/16"]);

    // the same again changes nothing; a stream of its own begins with everything
    crate::tenants::update(app, person.tenant, request, &actor).await.map_err(|_| "refused").unwrap();
    let mut again = client.watch(watch(None)).await.unwrap().into_inner();
    assert!(matches!(next(&mut again).await, Event::Hello(_)));
    let Event::Policies(whole) = next(&mut again).await else { panic!("no policies") };
    assert!(whole.replace);
    assert_eq!((&whole.upserted, &whole.digest), (&changed.upserted, &changed.digest));
}

#[tokio::test]
async fn drops_are_kept_by_device_and_leases_come_with_no_windows() {
    use cvault_node_protocol::v1::{LeaseState, Leases, PeerDrops};

    let gateway = Gateway::start().await;
    let (server, mut client, _identity) = gateway.agent().await;
    let mut stream = client.watch(watch(None)).await.unwrap().into_inner();
    let (epoch, ..) = begin(&mut stream).await;
    let person = gateway.world.person().await;
    let device = gateway.world.register(person, "d").await.unwrap();
    let device_id = device.id.uuid().as_bytes().to_vec();
    let drops = |packets| {
        let stranger = PeerDrops { device_id: vec![9; 16].into(), ..PeerDrops::default() };
        let packets = [("port".to_owned(), packets)].into();
        vec![stranger, PeerDrops { device_id: device_id.clone().into(), generation: device.revision, packets }]
    };
    for packets in [3, 5] {
        client.report(ReportRequest { drops: drops(packets), ..report(epoch, None) }).await.unwrap();
    }
    let kept: Vec<(serde_json::Value,)> =
        sqlx::query_as("select drops from platform.device_drops where server_id = $1")
            .bind(server.uuid())
            .fetch_all(&gateway.world.app.db.sys)
            .await
            .unwrap();
    assert_eq!(kept, [(serde_json::json!({ "port": 5 }),)]);

    sqlx::query("update cvault.tenants set bandwidth_limit_bytes = 1000000000")
        .execute(&mut gateway.world.superuser().await)
        .await
        .unwrap();
    let state =
        LeaseState { device_id: device_id.into(), generation: device.revision, wanted: true, ..LeaseState::default() };
    let leases = Leases { counter_epoch: vec![1; 16].into(), peers: vec![state], ..Leases::default() };
    let ask = |session| ReportRequest { leases: Some(leases.clone()), ..report(session, None) };
    let answer = client.report(ask(epoch)).await.unwrap().into_inner();
    assert_eq!((answer.leases.len(), answer.leases[0].until, answer.leases[0].sequence), (1, 10_000_000, 1));
    let older = client.report(ask(epoch - 1)).await.unwrap().into_inner();
    assert!(older.superseded && older.leases.is_empty());
    let windows = vec![UsageWindow { counter_epoch: vec![1; 16].into(), ..UsageWindow::default() }];
    let refused = client.report(ReportRequest { windows, ..ask(epoch) }).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}
