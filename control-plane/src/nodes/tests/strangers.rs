//! What the gateway bears of those whose key no server has.

use super::super::listener::{self, Patience};
use super::*;
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;

const DEADLINE: Duration = Duration::from_secs(10);

impl Gateway {
    async fn tls(
        &self,
        identity: &Identity,
        address: std::net::SocketAddr,
    ) -> tokio_rustls::client::TlsStream<TcpStream> {
        let config = tls::client_config(identity, self.world.app.secrets.node_identity.pin()).unwrap();
        let name = ServerName::try_from(tls::TLS_NAME).unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }
}

/// Whether the server closes the connection within `within`.
async fn closes(stream: &mut (impl tokio::io::AsyncRead + Unpin), within: Duration) -> bool {
    let mut all = Vec::new();
    tokio::time::timeout(within, stream.read_to_end(&mut all)).await.is_ok()
}

#[tokio::test]
async fn silence_from_one_network_keeps_no_other_waiting() {
    let gateway = Gateway::start().await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(gateway.address).await.unwrap());
    }
    let agent = tokio::time::timeout(Duration::from_secs(3), gateway.agent());
    agent.await.expect("an agent waits for those who say nothing");
}

#[tokio::test]
async fn a_stranger_may_only_enrol_and_may_not_say_much() {
    let gateway = Gateway::start().await;
    let server = gateway.world.server("s1", "default", "lab-1").await;
    let mut client = gateway.client(&Identity::generate().unwrap()).await;
    assert_eq!(client.watch(watch(None)).await.unwrap_err().code(), Code::Unauthenticated);
    let much = client.enroll(enroll(&"x".repeat(20_000))).await.unwrap_err();
    assert_eq!(much.code(), Code::OutOfRange, "{much}");
    let token = gateway.token(server).await;
    client.enroll(enroll(&token)).await.unwrap();
    begin(&mut client.watch(watch(None)).await.unwrap().into_inner()).await;
    let late = client.report(ReportRequest { nacks: vec![big_nack()], ..report(1, None) }).await;
    assert_ne!(late.err().map(|status| status.code()), Some(Code::OutOfRange), "a server may say more");
}

fn big_nack() -> cvault_node_protocol::v1::Nack {
    cvault_node_protocol::v1::Nack { reason: "x".repeat(20_000), ..Default::default() }
}

#[tokio::test]
async fn strangers_fill_their_own_places_only() {
    let gateway = Gateway::start().await;
    let (_, _, identity) = gateway.agent().await;
    let mut strangers = Vec::new();
    for _ in 0..17 {
        strangers.push(gateway.tls(&Identity::generate().unwrap(), gateway.address).await);
    }
    // whichever of them the server came to last
    let closed = futures::future::join_all(strangers.iter_mut().map(|stranger| closes(stranger, DEADLINE / 4))).await;
    assert_eq!(closed.iter().filter(|closed| **closed).count(), 1, "one stranger too many");
    let mut agent = gateway.client(&identity).await;
    begin(&mut agent.watch(watch(None)).await.unwrap().into_inner()).await;
    strangers.clear();
    crate::testing::eventually("places are given back", DEADLINE, async || {
        let mut again = gateway.tls(&Identity::generate().unwrap(), gateway.address).await;
        !closes(&mut again, Duration::from_millis(50)).await
    })
    .await;
}

#[tokio::test]
async fn a_stranger_and_a_silent_server_are_sent_away_and_a_server_that_speaks_stays() {
    let gateway = Gateway::start().await;
    let (_, _, identity) = gateway.agent().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let soon = Duration::from_millis(300);
    let patience = Patience { stranger: soon, first_call: soon };
    let app = gateway.world.app.clone();
    tokio::spawn(listener::serve_with(listener, app, patience, gateway.shutdown.clone()));
    for identity in [&Identity::generate().unwrap(), &identity] {
        let mut silent = gateway.tls(identity, address).await;
        assert!(closes(&mut silent, DEADLINE).await);
    }
    let gateway = Gateway { address, ..gateway };
    let mut client = gateway.client(&identity).await;
    begin(&mut client.watch(watch(None)).await.unwrap().into_inner()).await;
    let mut later = gateway.tls(&identity, address).await;
    assert!(closes(&mut later, DEADLINE).await, "time has passed");
    // the same connection still serves
    begin(&mut client.watch(watch(None)).await.unwrap().into_inner()).await;
}
