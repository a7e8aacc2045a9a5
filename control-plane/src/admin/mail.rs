//! `admin mail …`.

use cvault_types::MailId;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use super::{AdminError, MailCommand};
use crate::app::App;
use crate::auth::email::Email;
use crate::mail::{self, Text};

/// Listed at once: an outbox with more has a cause that shows in the first.
const LISTED: i64 = 500;

pub(super) async fn run(app: &App, command: MailCommand) -> Result<Value, AdminError> {
    match command {
        MailCommand::List { dead } => {
            let rows: Vec<Value> = mail::list(&app.db.sys, dead, LISTED).await?.into_iter().map(row).collect();
            Ok(json!({"mails": rows}))
        }
        MailCommand::Retry { id } => {
            mail::retry(app, id, "cli").await?;
            Ok(json!({"mail_id": id, "status": "waiting"}))
        }
        MailCommand::Test { to } => {
            let to =
                Email::parse(&to).ok_or_else(|| AdminError::Refused("--to must be an e-mail address".to_owned()))?;
            let id = MailId::from_uuid(Uuid::now_v7());
            let text = Text {
                subject: "Test mail of CVault",
                plain: "Mails of this installation arrive.\n".to_owned(),
                html:
                    "<!doctype html><html lang=\"en\"><body><p>Mails of this installation arrive.</p></body></html>\n"
                        .to_owned(),
            };
            let config = &app.config.mail;
            mail::send(&config.sink, &config.from, to.as_str(), id, &text).await?;
            Ok(json!({"mail_id": id, "status": "sent"}))
        }
    }
}

fn row(mail: mail::Listed) -> Value {
    let at = |at: OffsetDateTime| at.format(&Rfc3339).ok();
    json!({"id": mail.id, "tenant_id": mail.tenant, "kind": mail.kind, "status": if mail.dead { "dead" } else { "waiting" },
           "created_at": at(mail.created_at), "expires_at": at(mail.expires_at), "attempts": mail.attempts,
           "next_attempt_at": at(mail.next_attempt_at), "last_error": mail.last_error})
}
