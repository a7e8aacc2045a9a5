//! Mails to people: written into the outbox by the transaction that wants them, sent afterwards by a periodic task.
//!
//! A mail exists if and only if its transaction was committed, and is sent at least once: twice only when a replica dies,
//! or its mail server stops answering, between the mail's last byte and the note that it was delivered. Its
//! `Message-ID` is the same then. Address and link lie sealed in the database and are destroyed on delivery.
//!
//! Deliberately absent: mails to the end users of tenants, who are the tenants' to talk to.

mod admin;
mod deliver;
mod outbox;
mod send;
mod template;

pub use admin::{Listed, RetryError, list, retry};
pub use deliver::{deliver, expire, measure};
pub use outbox::{EnqueueError, enqueue};
pub use send::{SendError, Sink, Smtp, SmtpTls, send};
pub use template::{Text, render};

use cvault_types::Secret;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::auth::email::Email;

/// What somebody is to be told.
#[derive(Debug, Clone)]
pub struct Mail {
    pub to: Email,
    pub kind: Kind,
    pub data: Data,
}

/// Which template; also a column of the outbox and a label of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    VerifyEmail,
    ResetPassword,
    /// Tells the owner of an account that its password is another one now.
    PasswordChanged,
    /// To the address that an account is to have.
    ChangeEmail,
    /// To the address that the account has until then.
    EmailChangeAsked,
    /// To the address that the account had.
    EmailChanged,
}

/// What the templates are filled with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Data {
    /// Where to go: a whole URL of ours, with its single-use token.
    pub link: Secret,
    /// What the link is good for ends then; a mail that could not be sent before is given up.
    #[serde(with = "time::serde::rfc3339")]
    pub valid_until: OffsetDateTime,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::VerifyEmail,
        Self::ResetPassword,
        Self::PasswordChanged,
        Self::ChangeEmail,
        Self::EmailChangeAsked,
        Self::EmailChanged,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VerifyEmail => "verify_email",
            Self::ResetPassword => "reset_password",
            Self::PasswordChanged => "password_changed",
            Self::ChangeEmail => "change_email",
            Self::EmailChangeAsked => "email_change_asked",
            Self::EmailChanged => "email_changed",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

#[cfg(test)]
mod tests;
