//! A mail server on loopback: the protocol by the crate `mailin`, with TLS, logins, and refusals as a test wants them.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cvault_types::Secret;
use mailin::{Action, AuthMechanism, Handler, Response, Session, SessionBuilder, response};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufStream};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::mail::{Smtp, SmtpTls};

pub(super) const USER: &str = "mailer@example.com";
pub(super) const PASSWORD: &str = "correct horse battery";

#[derive(Debug, Clone, Default)]
pub(super) struct Received {
    pub(super) to: Vec<String>,
    pub(super) text: String,
}

/// What the server has got, and how it behaves.
#[derive(Default)]
pub(super) struct State {
    pub(super) mails: Mutex<Vec<Received>>,
    /// Answer to every recipient, if not 0.
    pub(super) refuse_with: AtomicU16,
    pub(super) logins: AtomicUsize,
    /// Bytes of mail seen without TLS.
    pub(super) in_clear: AtomicUsize,
}

pub(super) struct Server {
    pub(super) state: Arc<State>,
    port: u16,
    ca: Vec<u8>,
    tls: SmtpTls,
}

impl Server {
    /// `tls` is what the server offers.
    pub(super) async fn start(tls: SmtpTls) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key.into())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // a client that gives up ends its own session only
                tokio::spawn(attend(stream, tls, acceptor.clone(), Arc::clone(&serving)));
            }
        });
        Self { state, port, ca: cert.pem().into_bytes(), tls }
    }

    pub(super) fn smtp(&self) -> Smtp {
        Smtp {
            host: "localhost".to_owned(),
            port: self.port,
            tls: self.tls,
            credentials: (self.tls != SmtpTls::None).then(|| (USER.to_owned(), Secret::new(PASSWORD))),
            ca: Some(self.ca.clone()),
            hello: "api.example.com".to_owned(),
        }
    }

    pub(super) fn mails(&self) -> Vec<Received> {
        self.state.mails.lock().unwrap().clone()
    }
}

async fn attend(stream: TcpStream, tls: SmtpTls, acceptor: TlsAcceptor, state: Arc<State>) -> std::io::Result<()> {
    let mut builder = SessionBuilder::new("localhost");
    if tls != SmtpTls::None {
        builder.enable_auth(AuthMechanism::Plain);
    }
    if tls == SmtpTls::StartTls {
        builder.enable_start_tls();
    }
    let mailbox = Mailbox { state, mail: Received::default(), protected: tls == SmtpTls::Wrapped };
    let mut session = builder.build(IpAddr::V4(Ipv4Addr::LOCALHOST), mailbox);
    if tls == SmtpTls::Wrapped {
        session.tls_active();
        talk(&mut BufStream::new(acceptor.accept(stream).await?), &mut session, true).await?;
        return Ok(());
    }
    let mut plain = BufStream::new(stream);
    if talk(&mut plain, &mut session, true).await? {
        let protected = acceptor.accept(plain.into_inner()).await?;
        session.tls_active();
        talk(&mut BufStream::new(protected), &mut session, false).await?;
    }
    Ok(())
}

/// `true` when the client wants TLS now.
async fn talk<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut BufStream<S>,
    session: &mut Session<Mailbox>,
    greet: bool,
) -> std::io::Result<bool> {
    if greet {
        stream.write_all(&session.greeting().buffer()?).await?;
        stream.flush().await?;
    }
    let mut line = Vec::new();
    while stream.read_until(b'\n', &mut line).await? > 0 {
        let answer = session.process(&line);
        line.clear();
        if answer.action != Action::NoReply {
            stream.write_all(&answer.buffer()?).await?;
            stream.flush().await?;
        }
        match answer.action {
            Action::UpgradeTls => return Ok(true),
            Action::Close => break,
            Action::Reply | Action::NoReply => {}
        }
    }
    Ok(false)
}

struct Mailbox {
    state: Arc<State>,
    mail: Received,
    protected: bool,
}

impl Handler for Mailbox {
    fn auth_plain(&mut self, _: &str, user: &str, password: &str) -> Response {
        if (user, password) != (USER, PASSWORD) {
            return response::INVALID_CREDENTIALS;
        }
        // mailin takes logins over TLS only
        self.protected = true;
        self.state.logins.fetch_add(1, Ordering::Relaxed);
        response::AUTH_OK
    }

    fn rcpt(&mut self, to: &str) -> Response {
        match self.state.refuse_with.load(Ordering::Relaxed) {
            0 => {
                self.mail.to.push(to.to_owned());
                response::OK
            }
            code => Response::custom(code, format!("<{to}>: not today")),
        }
    }

    fn data(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if !self.protected {
            self.state.in_clear.fetch_add(bytes.len(), Ordering::Relaxed);
        }
        self.mail.text.push_str(&String::from_utf8_lossy(bytes));
        Ok(())
    }

    fn data_end(&mut self) -> Response {
        self.state.mails.lock().unwrap().push(std::mem::take(&mut self.mail));
        response::OK
    }
}
