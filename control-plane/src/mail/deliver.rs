//! The periodic task that empties the outbox.
//!
//! A replica takes a few mails by moving their next attempt into the future (a lease) and commits that before it speaks to
//! the mail server, so that no transaction waits for a stranger and no other replica takes the same mails. A replica that
//! dies leaves its lease to run out.

use std::time::Duration;

use cvault_types::{MailId, TenantId};
use sqlx::PgPool;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::outbox::{Payload, payload_aad};
use super::send::MAIL_TIMEOUT;
use super::{Kind, SendError, Sink, render, send};
use crate::app::App;
use crate::db::DbError;
use crate::keys::KeyRing;
use crate::metrics;
use crate::text::is_misleading;

/// Sent at the same time.
const BATCH: i64 = 8;
/// Nobody else touches a mail that was taken for this long.
const LEASE: Duration = Duration::from_secs(300);
const _: () = assert!(LEASE.as_secs() > 2 * MAIL_TIMEOUT.as_secs());
/// About 10 hours, as the pauses go.
const MAX_ATTEMPTS: i32 = 16;
const FIRST_PAUSE: Duration = Duration::from_secs(15);
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// A mail this replica has taken.
struct Taken {
    tenant: TenantId,
    id: MailId,
    kind: String,
    sealed: Option<Vec<u8>>,
    data_key: Option<Vec<u8>>,
    attempts: i32,
}

#[derive(Debug, thiserror::Error)]
enum DeliveryError {
    #[error("the mail does not open: its tenant was deleted, or the key-encryption key is missing")]
    Sealed,
    #[error(transparent)]
    Send(#[from] SendError),
}

/// Sends what is due, until nothing is, or the process is about to end. Returns how many attempts were made.
///
/// # Errors
/// Those of the database; what the mail server says is noted with the mail.
pub async fn deliver(app: &App) -> Result<u64, DbError> {
    if matches!(app.config.mail.sink, Sink::Unset) {
        return Ok(0);
    }
    let mut attempts = 0;
    while !app.draining.is_cancelled() {
        let batch = take(&app.db.sys, app.clock.now()).await?;
        if batch.is_empty() {
            break;
        }
        attempts += batch.len() as u64;
        let sent = batch.into_iter().map(async |mail| {
            let outcome = attempt(app, &mail).await;
            settle(&app.db.sys, &mail, outcome, app.clock.now(), rand::random()).await
        });
        for settled in futures::future::join_all(sent).await {
            settled?;
        }
    }
    Ok(attempts)
}

async fn take(sys: &PgPool, now: OffsetDateTime) -> Result<Vec<Taken>, DbError> {
    // by outbox_due; a row that another replica is taking at this moment is passed over
    let rows = sqlx::query!(
        r#"with due as (
               select tenant_id, mail_id from cvault.outbox
               where delivered_at is null and dead_at is null and next_attempt_at <= $1 and expires_at > $1
               order by next_attempt_at limit $3 for update skip locked)
           update cvault.outbox o set attempts = o.attempts + 1, next_attempt_at = $2
           from due join cvault.tenants t on t.tenant_id = due.tenant_id
           where o.tenant_id = due.tenant_id and o.mail_id = due.mail_id
           returning o.tenant_id, o.mail_id, o.kind, o.payload_sealed, o.attempts, t.data_key_sealed"#,
        now,
        now + LEASE,
        BATCH
    )
    .fetch_all(sys)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Taken {
            tenant: TenantId::from_uuid(row.tenant_id),
            id: MailId::from_uuid(row.mail_id),
            kind: row.kind,
            sealed: row.payload_sealed,
            data_key: row.data_key_sealed,
            attempts: row.attempts,
        })
        .collect())
}

async fn attempt(app: &App, mail: &Taken) -> Result<(), DeliveryError> {
    let (kind, payload) = open(&app.keys, mail).ok_or(DeliveryError::Sealed)?;
    let text = render(kind, &payload.data);
    let config = &app.config.mail;
    Ok(send(&config.sink, &config.from, &payload.to, mail.id, &text).await?)
}

fn open(keys: &KeyRing, mail: &Taken) -> Option<(Kind, Payload)> {
    let (sealed, data_key) = (mail.sealed.as_deref()?, mail.data_key.as_deref()?);
    let bytes: Zeroizing<Vec<u8>> = keys.open(data_key, payload_aad(mail.tenant, mail.id), sealed).ok()?;
    Some((Kind::parse(&mail.kind)?, serde_json::from_slice(&bytes).ok()?))
}

async fn settle(
    sys: &PgPool,
    mail: &Taken,
    outcome: Result<(), DeliveryError>,
    now: OffsetDateTime,
    jitter: f64,
) -> Result<(), DbError> {
    let Err(error) = outcome else {
        metrics::mail("sent");
        tracing::debug!(mail = %mail.id, kind = mail.kind, attempts = mail.attempts, "a mail was delivered");
        return delivered(sys, mail, now).await;
    };
    let code = match &error {
        DeliveryError::Send(error) => error.smtp_code(),
        DeliveryError::Sealed => None,
    };
    let is_final = match &error {
        DeliveryError::Send(error) => error.is_final(),
        DeliveryError::Sealed => mail.data_key.is_none() || mail.sealed.is_none(),
    };
    let dead = is_final || mail.attempts >= MAX_ATTEMPTS;
    metrics::mail(if dead { "dead" } else { "failed" });
    // not the text: it may repeat the address
    tracing::warn!(mail = %mail.id, kind = mail.kind, attempts = mail.attempts, smtp_code = code, dead, error = %error, "a mail was not delivered");
    let reason = reason(&error);
    let pause = pause(mail.attempts, jitter);
    sqlx::query!(
        "update cvault.outbox set last_error = $3, next_attempt_at = $4, dead_at = $5
         where tenant_id = $1 and mail_id = $2 and delivered_at is null",
        mail.tenant.uuid(),
        mail.id.uuid(),
        reason,
        now + pause,
        dead.then_some(now)
    )
    .execute(sys)
    .await?;
    Ok(())
}

/// With the delivery, what was secret in the mail is destroyed.
async fn delivered(sys: &PgPool, mail: &Taken, now: OffsetDateTime) -> Result<(), DbError> {
    sqlx::query!(
        "update cvault.outbox set delivered_at = $3, dead_at = null, payload_sealed = null, last_error = null
         where tenant_id = $1 and mail_id = $2",
        mail.tenant.uuid(),
        mail.id.uuid(),
        now
    )
    .execute(sys)
    .await?;
    Ok(())
}

/// Doubles from 15 s to an hour; a half to the whole of it, so that mails that failed together do not come back together.
fn pause(attempts: i32, jitter: f64) -> Duration {
    let doublings = u32::try_from(attempts - 1).unwrap_or_default().min(16);
    (FIRST_PAUSE * 2u32.pow(doublings)).min(LONGEST_PAUSE).mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
}

/// The whole chain, for the operator: printable and at most 500 characters.
fn reason(error: &DeliveryError) -> String {
    let text = crate::http::problem::chain(error);
    text.chars().map(|c| if is_misleading(c) { ' ' } else { c }).take(500).collect()
}

/// Gives up what came too late: what such a mail asks for is over.
///
/// # Errors
/// Those of the database.
pub async fn expire(sys: &PgPool, now: OffsetDateTime) -> Result<u64, DbError> {
    let done = sqlx::query!(
        "update cvault.outbox o
         set dead_at = $1, payload_sealed = null,
             last_error = left('It expired before it could be sent.' || coalesce(' Before: ' || o.last_error, ''), 500)
         from (select tenant_id, mail_id from cvault.outbox
               where delivered_at is null and dead_at is null and next_attempt_at <= $1 and expires_at <= $1
               limit 1000 for update skip locked) late
         where o.tenant_id = late.tenant_id and o.mail_id = late.mail_id",
        now
    )
    .execute(sys)
    .await?;
    for _ in 0..done.rows_affected() {
        metrics::mail("dead");
    }
    Ok(done.rows_affected())
}

/// Tells the metrics how many mails wait, how long the oldest has, and how many were given up.
///
/// # Errors
/// Those of the database.
pub async fn measure(sys: &PgPool, now: OffsetDateTime) -> Result<(), DbError> {
    let row = sqlx::query!(
        r#"select (select count(*) from cvault.outbox where delivered_at is null and dead_at is null) as "waiting!",
                  (select min(created_at) from cvault.outbox where delivered_at is null and dead_at is null) as oldest,
                  (select count(*) from cvault.outbox where dead_at is not null) as "dead!""#
    )
    .fetch_one(sys)
    .await?;
    let oldest = row.oldest.map_or(0.0, |at| (now - at).as_seconds_f64().max(0.0));
    metrics::outbox(row.waiting, row.dead, oldest);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pauses_grow_and_stay_within_their_bounds(attempts in 1..i32::MAX, jitter in 0.0..1.0) {
            let this = pause(attempts, jitter);
            prop_assert!(this >= FIRST_PAUSE / 2 && this <= LONGEST_PAUSE);
            prop_assert!(pause(attempts.saturating_add(1), 0.0) >= pause(attempts, 0.0));
        }
    }

    #[test]
    fn all_attempts_together_take_most_of_a_day_at_most() {
        let all: Duration = (1..MAX_ATTEMPTS).map(|attempts| pause(attempts, 1.0)).sum();
        assert!(all > Duration::from_secs(5 * 3600) && all < Duration::from_secs(24 * 3600), "{all:?}");
    }
}
