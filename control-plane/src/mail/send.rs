//! Where a mail goes: an SMTP server, a directory, the log, or nowhere yet.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cvault_types::{MailId, Secret};
use lettre::address::AddressError;
use lettre::message::{Mailbox, Message, MultiPart};
use lettre::transport::smtp;
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, Tls, TlsParameters};
use lettre::transport::smtp::extension::ClientId;
use lettre::{AsyncSmtpTransport, AsyncTransport, Tokio1Executor};
use tokio::io::AsyncWriteExt;

use super::template::Text;

/// For one answer of the mail server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// For a whole mail.
pub(super) const MAIL_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub enum Sink {
    /// Nothing is configured: mails wait.
    Unset,
    /// `dev`: links are for whoever reads the log.
    Log,
    Directory(PathBuf),
    Smtp(Smtp),
}

/// The mail server.
#[derive(Debug, Clone)]
pub struct Smtp {
    pub host: String,
    pub port: u16,
    pub tls: SmtpTls,
    pub credentials: Option<(String, Secret)>,
    /// PEM, trusted beside the public authorities.
    pub ca: Option<Vec<u8>>,
    /// Our name in EHLO.
    pub hello: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmtpTls {
    /// From the first byte (RFC 8314).
    Wrapped,
    /// By STARTTLS; a server that does not offer it gets nothing.
    StartTls,
    None,
}

#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Asking again is in vain.
    #[error("the mail server refuses this address for good")]
    Refused(#[source] smtp::Error),
    #[error("the address is none that mails can be sent to")]
    Address(#[from] AddressError),
    #[error("the mail cannot be put together")]
    Message(#[from] lettre::error::Error),
    #[error("the mail server did not take the mail")]
    Smtp(#[source] smtp::Error),
    #[error("the mail server took too long")]
    TimedOut,
    #[error("the mail cannot be written to CVAULT_MAIL_DIR")]
    Write(#[source] std::io::Error),
    #[error("no mail server is configured")]
    Unset,
}

impl SendError {
    /// Whether another attempt would end the same.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Refused(_) | Self::Address(_) | Self::Message(_) => true,
            Self::Smtp(_) | Self::TimedOut | Self::Write(_) | Self::Unset => false,
        }
    }

    /// What the mail server answered. Its text may repeat the address, so only this may be logged.
    #[must_use]
    pub fn smtp_code(&self) -> Option<u16> {
        match self {
            Self::Refused(error) | Self::Smtp(error) => error.status().map(u16::from),
            Self::Address(_) | Self::Message(_) | Self::TimedOut | Self::Write(_) | Self::Unset => None,
        }
    }
}

impl Smtp {
    /// # Errors
    /// When the authority's certificate or the host's name cannot be used for TLS.
    pub fn transport(&self) -> Result<AsyncSmtpTransport<Tokio1Executor>, smtp::Error> {
        let tls = match self.tls {
            SmtpTls::Wrapped => Tls::Wrapper(self.tls_parameters()?),
            SmtpTls::StartTls => Tls::Required(self.tls_parameters()?),
            SmtpTls::None => Tls::None,
        };
        let hello = match self.hello.trim_matches(['[', ']']).parse() {
            Ok(IpAddr::V4(ip)) => ClientId::Ipv4(ip),
            Ok(IpAddr::V6(ip)) => ClientId::Ipv6(ip),
            Err(_) => ClientId::Domain(self.hello.clone()),
        };
        let mut builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(&self.host)
            .port(self.port)
            .tls(tls)
            .hello_name(hello)
            .timeout(Some(ANSWER_TIMEOUT));
        if let Some((user, password)) = &self.credentials {
            builder = builder.credentials(Credentials::new(user.clone(), password.expose().to_owned()));
        }
        Ok(builder.build())
    }

    fn tls_parameters(&self) -> Result<TlsParameters, smtp::Error> {
        let mut builder = TlsParameters::builder(self.host.clone());
        if let Some(pem) = &self.ca {
            builder = builder.add_root_certificate(Certificate::from_pem(pem)?);
        }
        builder.build_rustls()
    }
}

/// Hands one mail over. Not cancel-safe: cancelled near its end, the mail may have been taken or not.
///
/// # Errors
/// Whether it may be tried again: [`SendError::is_final`].
pub async fn send(sink: &Sink, from: &Mailbox, to: &str, id: MailId, text: &Text) -> Result<(), SendError> {
    let message = || compose(from, to, id, text);
    match sink {
        Sink::Unset => Err(SendError::Unset),
        Sink::Log => {
            tracing::info!(mail = %id, to, subject = text.subject, text = text.plain, "a mail, which is not sent in dev");
            Ok(())
        }
        Sink::Directory(directory) => write(directory, id, &message()?.formatted()).await.map_err(SendError::Write),
        Sink::Smtp(server) => {
            let transport = server.transport().map_err(SendError::Smtp)?;
            match tokio::time::timeout(MAIL_TIMEOUT, transport.send(message()?)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) if refuses_the_address(&error) => Err(SendError::Refused(error)),
                Ok(Err(error)) => Err(SendError::Smtp(error)),
                Err(_) => Err(SendError::TimedOut),
            }
        }
    }
}

/// RFC 5321 §4.2.3: mailbox unavailable, not local, not allowed as written; RFC 7504: the domain takes no mail. Other
/// permanent refusals (login, policy, size) are for an operator to mend, and then worth another attempt.
fn refuses_the_address(error: &smtp::Error) -> bool {
    error.status().is_some_and(|code| matches!(u16::from(code), 550 | 551 | 553 | 556))
}

fn compose(from: &Mailbox, to: &str, id: MailId, text: &Text) -> Result<Message, SendError> {
    let message = Message::builder()
        .from(from.clone())
        .to(Mailbox::new(None, to.parse()?))
        .subject(text.subject)
        .message_id(Some(format!("<{id}@{}>", from.email.domain())))
        // RFC 3834: no holiday notice in return
        .header(AutoSubmitted)
        .multipart(MultiPart::alternative_plain_html(text.plain.clone(), text.html.clone()))?;
    Ok(message)
}

#[derive(Clone)]
struct AutoSubmitted;

impl lettre::message::header::Header for AutoSubmitted {
    fn name() -> lettre::message::header::HeaderName {
        lettre::message::header::HeaderName::new_from_ascii_str("Auto-Submitted")
    }

    fn parse(_: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Self)
    }

    fn display(&self) -> lettre::message::header::HeaderValue {
        lettre::message::header::HeaderValue::new(Self::name(), "auto-generated".to_owned())
    }
}

/// Beside and renamed: a file that is there is whole.
async fn write(directory: &Path, id: MailId, bytes: &[u8]) -> std::io::Result<()> {
    let beside = directory.join(format!("{id}.part"));
    let mut file =
        tokio::fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&beside).await?;
    file.write_all(bytes).await?;
    file.sync_all().await?;
    tokio::fs::rename(&beside, directory.join(format!("{id}.eml"))).await
}
