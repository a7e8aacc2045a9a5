//! Another address for an account: asked for by whoever is logged in, and true when the link that was mailed there is opened.
//!
//! Nobody learns whether an address has an account: one that has gets no link, and everything else is the same. The address
//! until then is told when it is asked for, while it can still stop the change, and when it is done.

use cvault_types::{ErrorCode, Secret, TenantId};
use rand::CryptoRng;
use time::Duration;

use super::accounts::{self, CreateError, Owner};
use super::links::{self, Purpose};
use super::recovery::{Caller, event, note};
use super::sessions::{self, End};
use crate::app::App;
use crate::auth::email::Email;
use crate::auth::events::{AuthKind, Outcome};
use crate::db::DbError;
use crate::http::{Portal, Problem};
use crate::mail::{self, Data, EnqueueError, Kind, Mail};
use crate::tenancy::TenantTx;

/// How long the news of a change is news.
const NEWS_FOR: Duration = Duration::days(3);

#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("the account has this address already")]
    Unchanged,
    #[error(transparent)]
    Mail(#[from] EnqueueError),
}

#[derive(Debug, thiserror::Error)]
pub enum ConfirmError {
    #[error("the link is used, replaced or expired, or its account is disabled")]
    Link,
    /// Said to somebody who reads the mails of that address.
    #[error("the address has got an account meanwhile")]
    EmailTaken,
    #[error(transparent)]
    Mail(#[from] EnqueueError),
}

impl From<DbError> for AskError {
    fn from(error: DbError) -> Self {
        Self::Mail(error.into())
    }
}

impl From<DbError> for ConfirmError {
    fn from(error: DbError) -> Self {
        Self::Mail(error.into())
    }
}

/// Mails a link to the address, unless it is `somebodys`, and tells the present one.
///
/// # Errors
/// [`AskError::Unchanged`], [`EnqueueError::Full`] when the mail server has been away for long, or the database's.
pub async fn ask(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    email: &Email,
    somebodys: Option<Owner>,
    rng: &mut impl CryptoRng,
) -> Result<(), AskError> {
    let account = accounts::load(tx, portal.admin).await?;
    let Some(present) = account.and_then(|account| Email::parse(&account.email)) else { return Ok(()) };
    if present == *email {
        return Err(AskError::Unchanged);
    }
    if somebodys.is_none() {
        links::send_change(tx, app, portal, email, rng).await?;
    } else {
        // an earlier link is replaced all the same
        links::use_up(tx, portal.admin, Purpose::ChangeEmail, app.clock.now()).await?;
    }
    tell(tx, app, present, Kind::EmailChangeAsked).await?;
    note(tx, &portal.actor(), "email.change_request", portal.admin, portal.request_id).await?;
    Ok(())
}

/// Ends every session but the one that asked, and every other link.
///
/// # Errors
/// [`ConfirmError::Link`], [`ConfirmError::EmailTaken`], or as [`ask`].
pub async fn confirm(app: &App, tenant: TenantId, token: &Secret, caller: Caller) -> Result<(), ConfirmError> {
    let mut tx = app.db.tenancy.begin(tenant).await?;
    let work = confirm_in(&mut tx, app, token, caller).await;
    tx.finish(work).await
}

async fn confirm_in(tx: &mut TenantTx, app: &App, token: &Secret, caller: Caller) -> Result<(), ConfirmError> {
    let now = app.clock.now();
    let link = links::take(tx, app, token, Purpose::ChangeEmail).await?.ok_or(ConfirmError::Link)?;
    let account = accounts::load(tx, link.admin).await?.filter(|account| account.active).ok_or(ConfirmError::Link)?;
    accounts::set_email(tx, link.admin, &link.email, now).await?;
    for purpose in [Purpose::VerifyEmail, Purpose::ResetPassword] {
        links::use_up(tx, link.admin, purpose, now).await?;
    }
    sessions::end_all(tx, link.admin, link.session, End::EmailChanged, now).await?;
    event(tx, AuthKind::PortalEmailChange, Outcome::Success, link.admin, caller).await?;
    note(tx, &link.admin.to_string(), "email.change", link.admin, caller.request_id).await?;
    if let Some(former) = Email::parse(&account.email) {
        tell(tx, app, former, Kind::EmailChanged).await?;
    }
    Ok(())
}

async fn tell(tx: &mut TenantTx, app: &App, to: Email, kind: Kind) -> Result<(), EnqueueError> {
    let now = app.clock.now();
    // another password stops a change that is not done yet
    let page = if kind == Kind::EmailChangeAsked { "/portal/reset-password" } else { "" };
    let link = Secret::new(format!("{}{page}", app.config.public_url));
    let mail = Mail { to, kind, data: Data { link, valid_until: now + NEWS_FOR } };
    mail::enqueue(tx, &app.keys, &mail, now).await.map(drop)
}

impl From<CreateError> for ConfirmError {
    fn from(error: CreateError) -> Self {
        match error {
            CreateError::EmailTaken => Self::EmailTaken,
            CreateError::Db(error) => error.into(),
        }
    }
}

impl From<AskError> for Problem {
    fn from(error: AskError) -> Self {
        match error {
            AskError::Unchanged => {
                Self::validation().field("/email", "invalid_value", "is the account's address already")
            }
            AskError::Mail(error) => error.into(),
        }
    }
}

impl From<ConfirmError> for Problem {
    fn from(error: ConfirmError) -> Self {
        match error {
            ConfirmError::Link => links::invalid(),
            ConfirmError::EmailTaken => {
                Self::new(ErrorCode::EmailTaken).detail("Somebody has an account with this e-mail address.")
            }
            ConfirmError::Mail(error) => error.into(),
        }
    }
}
