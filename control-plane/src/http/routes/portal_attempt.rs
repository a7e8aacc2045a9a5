//! What is written down of each attempt to get into the portal.

use std::net::IpAddr;

use cvault_types::{RequestId, TenantAdminId};

use crate::app::App;
use crate::auth::events::{self, AdminEvent, AuthKind, Outcome};
use crate::auth::throttle::Account;
use crate::db::DbError;
use crate::http::{Problem, context};
use crate::metrics;
use crate::portal::attempts::{self, AttemptKind};
use crate::portal::sessions::Seen;
use crate::tenancy::TenantTx;

/// The constant parts of an attempt.
pub(super) struct Attempt<'a> {
    app: &'a App,
    kind: AttemptKind,
    account: Account,
    ip: Option<IpAddr>,
    request_id: RequestId,
}

impl<'a> Attempt<'a> {
    pub(super) fn at(app: &'a App, kind: AttemptKind, email: &str, seen: &Seen) -> Self {
        let account = attempts::account(email);
        Self { app, kind, account, ip: seen.ip, request_id: context::request_id() }
    }

    /// Counts what a throttle has refused. Only counts: a row of each could be had without end.
    pub(super) fn admitted(&self, decision: Result<(), Problem>) -> Result<(), Problem> {
        decision.inspect_err(|_| metrics::portal_throttled(self.kind.as_str()))
    }

    /// Notes a failure, whether the account exists or not, and answers it.
    pub(super) async fn refused<T>(&self, problem: Problem) -> Result<T, Problem> {
        self.note(Outcome::Failure).await?;
        Err(problem)
    }

    pub(super) async fn note(&self, outcome: Outcome) -> Result<(), DbError> {
        let (sys, now) = (&self.app.db.sys, self.app.clock.now());
        let attempt = attempts::Attempt { kind: self.kind, outcome, account: self.account, client_ip: self.ip };
        attempts::record(sys, attempt, self.request_id, now).await
    }

    /// Notes what happened at an account that is known.
    pub(super) async fn record(
        &self,
        tx: &mut TenantTx,
        kind: AuthKind,
        outcome: Outcome,
        admin: Option<TenantAdminId>,
    ) -> Result<(), DbError> {
        let event = AdminEvent { kind, outcome, admin, client_ip: self.ip, request_id: self.request_id };
        events::record_admin(tx, event).await
    }
}
