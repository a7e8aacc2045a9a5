//! The listener: accepts connections, bounds them, and ends them gently.
//!
//! A connection has to bring a whole request soon, and is closed when it then has none for a while, whatever it speaks:
//! half a head, half an HTTP/2 preface and silence are the same.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::FromRequestParts;
use http::HeaderMap;
use http::request::Parts;
use hyper::body::Body as _;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use ipnet::IpNet;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::bare::Worded;
use super::tls::Tls;
use crate::network::{Network, Places};

/// Requests that run when the shutdown begins get this long.
pub const DRAIN: Duration = Duration::from_secs(10);
/// A request's head must be complete within this time (slow senders).
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// An HTTP/2 peer has to confirm the end of a connection within this time.
const FAREWELL: Duration = Duration::from_secs(1);

/// What connections may cost.
#[derive(Debug, Clone)]
pub struct Limits {
    /// More wait in the kernel's queue.
    pub connections: usize,
    /// More are closed at once. A trusted proxy has no such bound.
    pub connections_per_network: u32,
    /// The first request must be there within this time.
    pub first_request: Duration,
    /// A connection without a request is closed after this time.
    pub idle: Duration,
    /// A connection whose client takes nothing of an answer for this long is closed.
    pub stalled: Duration,
    /// Proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
}

impl Limits {
    #[must_use]
    pub fn behind(trusted_proxies: Vec<IpNet>) -> Self {
        Self {
            connections: 10_000,
            connections_per_network: 500,
            first_request: HEAD_TIMEOUT,
            idle: Duration::from_secs(60),
            stalled: Duration::from_secs(30),
            trusted_proxies,
        }
    }

    fn trust(&self, ip: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|proxies| proxies.contains(&ip))
    }

    /// The nearest address that is not a trusted proxy's: what is further left in `X-Forwarded-For`, anyone may have
    /// written.
    fn caller(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut caller = peer;
        let lines: Vec<&str> =
            headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok()).collect();
        for text in lines.iter().rev().flat_map(|line| line.rsplit(',')) {
            if !self.trust(caller) {
                break;
            }
            let Ok(ip) = text.trim().parse::<IpAddr>() else { break };
            caller = ip.to_canonical();
        }
        caller
    }
}

/// Marks a request that has come to a trusted proxy without TLS, as far as it says.
#[derive(Debug, Clone, Copy)]
pub struct Unprotected;

/// Whether `X-Forwarded-Proto` names `http`: of several hops the first, which the caller itself has reached.
fn came_unprotected(headers: &HeaderMap) -> bool {
    let value = headers.get("x-forwarded-proto").and_then(|value| value.to_str().ok());
    value.and_then(|list| list.split(',').next()).is_some_and(|scheme| scheme.trim().eq_ignore_ascii_case("http"))
}

/// Who sent the request; unknown behind a test's direct call.
#[derive(Debug, Clone, Copy, Default)]
pub struct Peer(Option<IpAddr>);

impl Peer {
    #[must_use]
    pub fn ip(self) -> Option<IpAddr> {
        self.0
    }

    pub(crate) fn of(request: &Parts) -> Self {
        request.extensions.get().copied().unwrap_or_default()
    }
}

impl From<IpAddr> for Peer {
    fn from(ip: IpAddr) -> Self {
        Self(Some(ip))
    }
}

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self::of(parts))
    }
}

/// Serves plain HTTP until `shutdown`, then lets running requests finish for up to 10 s.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, shutdown: CancellationToken) {
    serve_over(None, listener, router, limits, shutdown).await;
}

/// As [`serve`], over TLS where there is a certificate.
pub async fn serve_over(
    tls: Option<Tls>,
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let connections = Arc::new(Semaphore::new(limits.connections));
    let places = Places::new(limits.connections_per_network);
    let limits = Arc::new(limits);
    let tracker = TaskTracker::new();
    loop {
        let permit = tokio::select! {
            () = shutdown.cancelled() => break,
            permit = Arc::clone(&connections).acquire_owned() => permit.expect("the semaphore is never closed"),
        };
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => (stream, peer.ip().to_canonical()),
                Err(error) => {
                    // out of file descriptors, or the caller went away: neither ends the server
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let place = places.take(Network::of(peer));
        if place.is_none() && !limits.trust(peer) {
            tracing::debug!("a network has too many connections");
            continue;
        }
        let (router, limits, shutdown) = (router.clone(), Arc::clone(&limits), shutdown.clone());
        let acceptor = tls.as_ref().map(Tls::acceptor);
        tracker.spawn(async move {
            begin(stream, acceptor, peer, router, limits, shutdown).await;
            drop((permit, place));
        });
    }
    drop(listener);
    tracker.close();
    if tokio::time::timeout(DRAIN, tracker.wait()).await.is_err() {
        tracing::warn!("some requests were still running after 10 s; they are left to end on their own");
    }
}

/// Whatever has to be before the first byte of HTTP.
async fn begin(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    peer: IpAddr,
    router: Router,
    limits: Arc<Limits>,
    shutdown: CancellationToken,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was refused");
    }
    let Some(acceptor) = acceptor else {
        return attend(stream, false, peer, router, limits, shutdown).await;
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        accepted = tokio::time::timeout(limits.first_request, acceptor.accept(stream)) => match accepted {
            Ok(Ok(stream)) => attend(stream, true, peer, router, limits, shutdown).await,
            Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake has failed"),
            Err(_) => tracing::debug!("a TLS handshake took too long"),
        },
    }
}

/// One connection, from its first byte of HTTP to its end.
async fn attend(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    only_tls: bool,
    peer: IpAddr,
    router: Router,
    limits: Arc<Limits>,
    shutdown: CancellationToken,
) {
    let activity = Arc::new(Activity::new(&limits));
    let service = {
        let activity = Arc::clone(&activity);
        let received = Arc::clone(&activity);
        let service = router.map_request(move |request: http::Request<hyper::body::Incoming>| {
            let activity = Arc::clone(&received);
            let mut request = request.map(|body| Body::new(Receiving { body, whole: false, activity }));
            let caller = limits.caller(peer, request.headers());
            let unprotected = limits.trust(peer) && came_unprotected(request.headers());
            request.extensions_mut().insert(Peer::from(caller));
            if unprotected {
                request.extensions_mut().insert(Unprotected);
            }
            request
        });
        tower::service_fn(move |request| {
            let running = Running::begin(&activity);
            let answer = service.clone().oneshot(request);
            async move {
                // it runs until its answer's body is sent
                answer.await.map(|response| response.map(|body| Sending::begin(body, running)))
            }
        })
    };
    let mut builder = Builder::new(TokioExecutor::new());
    // who has said all it wants to say may still listen
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_headers(100).half_close(true);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(100).keep_alive_interval(Duration::from_secs(30));
    let (stream, mut left) = Worded::new(stream, only_tls);
    let (ended, between) = {
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)));
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = async { tokio::select! { () = shutdown.cancelled() => {}, () = activity.quiet() => {} } } => {
                connection.as_mut().graceful_shutdown();
                // what runs is waited for; who does not even say goodbye is not
                activity.with(|state| state.quiet_until = Instant::now() + FAREWELL);
                tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = activity.quiet() => Ok(()),
                }
            }
        };
        (ended, activity.with(|state| state.running == 0 && !state.unread))
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
    if let Ok(left) = left.try_recv() {
        // bytes between two requests are the beginning of the next; who is in our way when we end was not too slow
        let refused = between && !shutdown.is_cancelled();
        let farewell = async { if refused { left.refuse().await } else { left.close().await } };
        if let Ok(Err(error)) = tokio::time::timeout(FAREWELL, farewell).await {
            tracing::debug!(%error, "a connection ended before its refusal was written");
        }
    }
}

/// Whether requests run on a connection, until when it may stay without, and whose answers nobody takes.
struct Activity {
    state: Mutex<State>,
    changed: Notify,
    idle: Duration,
    stalled: Duration,
}

/// A request that runs, until this is dropped.
struct Running {
    activity: Arc<Activity>,
    number: u64,
}

/// The body of an answer. hyper asks for its next frame when the client has taken enough of those before.
struct Sending {
    body: Body,
    running: Running,
}

/// The body of a request.
struct Receiving {
    body: hyper::body::Incoming,
    whole: bool,
    activity: Arc<Activity>,
}

struct State {
    running: usize,
    /// A request was answered before it was read whole: what comes may be the rest of it.
    unread: bool,
    begun: u64,
    quiet_until: Instant,
    /// Answers whose next frame hyper has not asked for, and since when. Those that wait for us are not among them.
    waiting: HashMap<u64, Instant>,
}

impl Activity {
    fn new(limits: &Limits) -> Self {
        let quiet_until = Instant::now() + limits.first_request;
        let state = State { running: 0, unread: false, begun: 0, quiet_until, waiting: HashMap::new() };
        Self { state: Mutex::new(state), changed: Notify::new(), idle: limits.idle, stalled: limits.stalled }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns when the connection has been without a request, or an answer without a taker, for too long. Cancel-safe.
    async fn quiet(&self) {
        loop {
            let until = self.with(|state| {
                let stalled = state.waiting.values().min().map(|since| *since + self.stalled);
                stalled.into_iter().chain((state.running == 0).then_some(state.quiet_until)).min()
            });
            match until {
                None => self.changed.notified().await,
                Some(until) if until <= Instant::now() => return,
                Some(until) => tokio::select! {
                    () = tokio::time::sleep_until(until) => {}
                    () = self.changed.notified() => {}
                },
            }
        }
    }
}

impl Running {
    fn begin(activity: &Arc<Activity>) -> Self {
        let number = activity.with(|state| {
            state.running += 1;
            state.begun += 1;
            state.begun
        });
        Self { activity: Arc::clone(activity), number }
    }

    /// The client is to take what there is.
    fn handed_over(&self) {
        let first = self.activity.with(|state| {
            state.waiting.insert(self.number, Instant::now());
            state.waiting.len() == 1
        });
        if first {
            self.activity.changed.notify_one();
        }
    }

    /// The client waits for us.
    fn asked(&self) {
        self.activity.with(|state| state.waiting.remove(&self.number));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.activity.with(|state| {
            state.running -= 1;
            state.waiting.remove(&self.number);
            state.quiet_until = Instant::now() + self.activity.idle;
        });
        self.activity.changed.notify_one();
    }
}

impl Sending {
    fn begin(body: Body, running: Running) -> Self {
        running.handed_over();
        Self { body, running }
    }
}

impl hyper::body::Body for Receiving {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.whole |= matches!(frame, Poll::Ready(None));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if !self.whole && !self.body.is_end_stream() {
            self.activity.with(|state| state.unread = true);
        }
    }
}

impl hyper::body::Body for Sending {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if frame.is_ready() {
            self.running.handed_over()
        } else {
            self.running.asked()
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::tls;
    use axum::routing::get;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const SOON: Duration = Duration::from_millis(200);
    const DEADLINE: Duration = Duration::from_secs(10);

    async fn start(change: impl FnOnce(&mut Limits)) -> (SocketAddr, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut limits = Limits { first_request: SOON, idle: SOON, ..Limits::behind(Vec::new()) };
        change(&mut limits);
        let shutdown = CancellationToken::new();
        let endless =
            async || Body::from_stream(futures::stream::repeat(Ok::<_, Infallible>(Bytes::from_static(&[0; 1 << 16]))));
        let slow = async || {
            tokio::time::sleep(SOON * 2).await;
            "at last"
        };
        let router = Router::new()
            .route("/endless", get(endless))
            .route("/slow", get(slow))
            .route("/early", axum::routing::post(async || "early"))
            .route("/", get(|peer: Peer| async move { peer.ip().unwrap().to_string() }));
        tokio::spawn(serve(listener, router, limits, shutdown.clone()));
        (address, shutdown)
    }

    /// What the server sends until it closes the connection.
    async fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
        let mut all = Vec::new();
        let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut all)).await;
        // a reset is an end too
        let _ = read.expect("the connection is still open");
        all
    }

    /// The last answer of what a connection has brought.
    fn assert_refused(all: &[u8], status: &str, code: &str) {
        let text = String::from_utf8(all.to_vec()).unwrap();
        let answer = &text[text.rfind("HTTP/1.1 ").unwrap_or_else(|| panic!("nothing but {text:?}"))..];
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{head}");
        for header in ["content-type: application/problem+json", "connection: close", "cache-control: no-store"] {
            assert!(head.split("\r\n").any(|line| line == header), "{header} is not in {head}");
        }
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["code"], code, "{body}");
        assert!(head.contains(&format!("x-request-id: {}", body["request_id"].as_str().unwrap())), "{head}");
    }

    const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";

    #[tokio::test]
    async fn a_connection_that_brings_no_request_is_closed_whatever_it_began_with() {
        let (address, _shutdown) = start(|_| {}).await;
        let whole_preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        for beginning in [b"".as_slice(), b"\r\n", b"PRI * HT", &whole_preface[..24], whole_preface] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(beginning).await.unwrap();
            let all = until_closed(&mut stream).await;
            // HTTP/2 has its own farewell
            let silent =
                if beginning.starts_with(&whole_preface[..24]) { !all.starts_with(b"HTTP") } else { all.is_empty() };
            assert!(silent, "{beginning:?}: {}", String::from_utf8_lossy(&all));
        }
    }

    #[tokio::test]
    async fn who_does_not_finish_a_head_is_told_so() {
        let (in_time, _shutdown) = start(|_| {}).await;
        // who closes its half is answered at once, however slow this machine is
        let (patient, _other) = start(|limits| (limits.first_request, limits.idle) = (DEADLINE, DEADLINE)).await;
        for beginning in [b"G".as_slice(), b"P", b"GET / HTTP/1.1\r\nHos", &[GET, b"GET / HTT"].concat()] {
            for (half_closed, address) in [(false, in_time), (true, patient)] {
                let mut stream = TcpStream::connect(address).await.unwrap();
                if let Some(rest) = beginning.strip_prefix(GET).filter(|rest| !rest.is_empty()) {
                    stream.write_all(GET).await.unwrap();
                    // the answer: what is sent behind it is another request
                    stream.read_exact(&mut [0]).await.unwrap();
                    stream.write_all(rest).await.unwrap();
                } else {
                    stream.write_all(beginning).await.unwrap();
                }
                if half_closed {
                    stream.shutdown().await.unwrap();
                    assert_refused(&until_closed(&mut stream).await, "400 Bad Request", "MALFORMED_REQUEST");
                } else {
                    assert_refused(&until_closed(&mut stream).await, "408 Request Timeout", "REQUEST_TIMEOUT");
                }
            }
        }
    }

    #[tokio::test]
    async fn who_has_its_answer_or_asks_nothing_is_told_nothing_at_the_end() {
        let (address, _shutdown) = start(|_| {}).await;
        let post = b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{";
        // a whole request, one with the end of a line behind it, one that was answered before it was whole
        for (request, answered, rest) in [
            (GET, "HTTP/1.1 200 OK\r\n", b"".as_slice()),
            (GET, "HTTP/1.1 200 OK\r\n", b"\r\n"),
            (post, "HTTP/1.1 200 OK\r\n", b"\"a\""),
            (b"", "", b""),
        ] {
            for half_closed in [false, true] {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(request).await.unwrap();
                let mut all = vec![0; usize::from(!request.is_empty())];
                stream.read_exact(&mut all).await.unwrap();
                // it may be closed by now
                let _ = stream.write_all(rest).await;
                if half_closed {
                    let _ = stream.shutdown().await;
                }
                all.extend(until_closed(&mut stream).await);
                let text = String::from_utf8(all).unwrap();
                assert!(text.starts_with(answered), "{text}");
                assert_eq!(text.matches("HTTP/1.1 ").count(), usize::from(!answered.is_empty()), "{text}");
            }
        }
    }

    #[tokio::test]
    async fn who_sends_a_whole_request_and_no_more_gets_its_answer() {
        let (address, _shutdown) = start(|_| {}).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        let text = String::from_utf8(until_closed(&mut stream).await).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("at last"), "{text}");
    }

    #[tokio::test]
    async fn who_goes_on_and_on_holds_its_place_no_longer_for_being_refused() {
        let (address, _shutdown) = start(|limits| limits.connections = 1).await;
        let mut endless = TcpStream::connect(address).await.unwrap();
        let sending = tokio::spawn(async move {
            // no end of a head, nothing read
            while endless.write_all(b"x-more: and more\r\n").await.is_ok() {
                tokio::time::sleep(SOON / 10).await;
            }
        });
        let mut next = TcpStream::connect(address).await.unwrap();
        next.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        let text = String::from_utf8(until_closed(&mut next).await).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        tokio::time::timeout(DEADLINE, sending).await.expect("it is told that nobody listens").unwrap();
    }

    #[tokio::test]
    async fn a_request_is_served_and_the_connection_is_closed_when_no_other_follows() {
        let (address, _shutdown) = start(|_| {}).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let text = String::from_utf8(until_closed(&mut stream).await).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("127.0.0.1"), "{text}");
    }

    #[tokio::test]
    async fn who_takes_nothing_of_an_answer_is_closed_over_http_1_and_2() {
        let over_http_1 = b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n".as_slice();
        // SETTINGS with a window of 0, and HEADERS: GET, http, /, authority a
        let over_http_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0\
            \0\0\x06\x01\x05\0\0\0\x01\x82\x86\x84\x41\x01a";
        for request in [over_http_1, over_http_2] {
            let (address, shutdown) = start(|limits| {
                limits.connections = 1;
                limits.idle = DEADLINE * 2;
                limits.stalled = SOON;
            })
            .await;
            let mut silent = TcpStream::connect(address).await.unwrap();
            silent.write_all(request).await.unwrap();
            // the only connection there may be
            let mut next = TcpStream::connect(address).await.unwrap();
            next.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
            let text = String::from_utf8(until_closed(&mut next).await).unwrap();
            assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
            shutdown.cancel();
        }
    }

    #[tokio::test]
    async fn who_begins_tls_and_does_not_go_on_is_closed_and_a_shutdown_waits_for_nobody_in_a_handshake() {
        let directory = tempfile::tempdir().unwrap();
        let tls = Tls::new(tls::load(&tls::tests::written(directory.path())).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Limits { first_request: SOON, ..Limits::behind(Vec::new()) };
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(serve_over(Some(tls), listener, Router::new(), limits, shutdown.clone()));
        // the beginning of a ClientHello
        for beginning in [b"".as_slice(), b"\x16\x03\x01\x02\x00\x01\x00"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(beginning).await.unwrap();
            until_closed(&mut stream).await;
        }
        let _held = TcpStream::connect(address).await.unwrap();
        shutdown.cancel();
        tokio::time::timeout(DRAIN / 2, serving).await.expect("nobody is waited for").unwrap();
    }

    #[tokio::test]
    async fn what_is_no_http_is_answered_with_a_whole_problem() {
        let (address, _shutdown) = start(|limits| limits.first_request = DEADLINE).await;
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(101));
        for wrong in ["GET / HTTP/1.1\r\nno header\r\n\r\n", "\0\0\0\0\r\n\r\n", "GET / HTTP/7\r\n\r\n", &many] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(wrong.as_bytes()).await.unwrap();
            let text = String::from_utf8(until_closed(&mut stream).await).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{:?}: {text}", &wrong[..20]));
            assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{head}");
            for header in [
                "content-type: application/problem+json",
                "x-content-type-options: nosniff",
                "cache-control: no-store",
                "connection: close",
            ] {
                assert!(head.split("\r\n").any(|line| line == header), "{header} is not in {head}");
            }
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!((&body["code"], &body["status"]), (&"MALFORMED_REQUEST".into(), &400.into()));
            assert!(head.contains(&format!("x-request-id: {}", body["request_id"].as_str().unwrap())));
        }
    }

    #[tokio::test]
    async fn a_network_has_its_share_of_the_connections_and_another_network_the_rest() {
        let (address, _shutdown) = start(|limits| {
            limits.connections_per_network = 2;
            limits.first_request = DEADLINE * 2;
        })
        .await;
        let _held = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        assert!(until_closed(&mut TcpStream::connect(address).await.unwrap()).await.is_empty());
        let other = tokio::net::TcpSocket::new_v4().unwrap();
        other.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut other = other.connect(address).await.unwrap();
        other.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        let text = String::from_utf8(until_closed(&mut other).await).unwrap();
        assert!(text.ends_with("127.0.0.2"), "{text}");
    }

    #[test]
    fn only_a_trusted_proxy_says_who_the_caller_is() {
        let limits = Limits::behind(vec!["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()]);
        let caller = |peer: &str, forwarded: &[&str]| {
            let lines =
                forwarded.iter().map(|line| (http::HeaderName::from_static("x-forwarded-for"), line.parse().unwrap()));
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(name, value);
            }
            limits.caller(peer.parse().unwrap(), &headers).to_string()
        };
        assert_eq!(caller("127.0.0.1", &[]), "127.0.0.1");
        assert_eq!(caller("127.0.0.1", &["192.0.2.7"]), "192.0.2.7");
        assert_eq!(caller("127.0.0.1", &["198.51.100.1, 192.0.2.7", "10.1.1.1"]), "192.0.2.7", "the left is invented");
        assert_eq!(caller("203.0.113.9", &["192.0.2.7"]), "203.0.113.9");
        assert_eq!(caller("127.0.0.1", &["nonsense"]), "127.0.0.1");
    }

    #[test]
    fn the_first_hop_says_whether_there_was_tls() {
        let unprotected = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-forwarded-proto", value.parse().unwrap());
            came_unprotected(&headers)
        };
        assert!(unprotected("http") && unprotected("HTTP, https") && !came_unprotected(&HeaderMap::new()));
        assert!(!unprotected("https") && !unprotected("https,http") && !unprotected("") && !unprotected("wss"));
    }
}
