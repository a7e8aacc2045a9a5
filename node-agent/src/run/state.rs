//! Desired state as it arrives: checked, applied, made durable; or refused with a reason.

use anyhow::Context as _;
use cvault_node_protocol::v1::{self, state_event::Event as StateEvent};
use tokio::time::Instant;

use super::{Agent, ticks};
use crate::desired::{Change, Cursor, Refusal, Snapshot};
use crate::interface::Interface;
use crate::metrics;
use crate::report::Session;
use crate::store::Saved;
use crate::watch::{LinkEvent, QUEUE};

impl Agent {
    /// Takes what has arrived, then makes it durable with one sync; the report follows in the main loop. What arrives
    /// while it works waits for the next call, so that ticks and reports have their turn.
    pub(super) async fn on_link(&mut self, first: LinkEvent) -> anyhow::Result<()> {
        let mut next = Some(first);
        let mut left = QUEUE;
        while let Some(event) = next {
            match event {
                LinkEvent::Opened(gateway) => {
                    self.opened = Some(gateway);
                    self.reopening = false;
                    self.snapshot = None;
                }
                LinkEvent::Closed => {
                    self.session = None;
                    self.opened = None;
                    metrics::connected(false);
                }
                LinkEvent::State(event) if !self.reopening => self.on_state_event(event).await?,
                LinkEvent::State(_) => {}
            }
            left -= 1;
            next = if left > 0 { self.events.try_recv().ok() } else { None };
        }
        // Before the report that follows says that peers are removed.
        self.take_closed();
        self.sync_store();
        Ok(())
    }

    async fn on_state_event(&mut self, event: v1::StateEvent) -> anyhow::Result<()> {
        match event.event {
            Some(StateEvent::Hello(hello)) => return self.on_hello(hello).await,
            Some(StateEvent::SnapshotBegin(begin)) => match Snapshot::begin(&begin) {
                Ok(snapshot) => self.snapshot = Some(snapshot),
                Err(refusal) => self.refuse(begin.target, &refusal),
            },
            Some(StateEvent::SnapshotChunk(chunk)) => {
                let taken =
                    self.snapshot.as_mut().map_or(Err(Refusal::Order("chunk")), |snapshot| snapshot.chunk(&chunk));
                if let Err(refusal) = taken {
                    let target = self.snapshot.take().map(|snapshot| snapshot.target().to_wire());
                    self.refuse(target, &refusal);
                }
            }
            Some(StateEvent::SnapshotEnd(end)) => match self.snapshot.take() {
                Some(snapshot) => {
                    let snapshot = snapshot.end(end);
                    let plan = self.desired().and_then(|saved| saved.desired.plan_snapshot(&snapshot));
                    self.apply(Some(snapshot.target().to_wire()), plan).await;
                }
                None => self.refuse(None, &Refusal::Order("end")),
            },
            Some(StateEvent::Delta(delta)) => {
                let plan = self.desired().and_then(|saved| saved.desired.plan_delta(&delta));
                self.apply(delta.target, plan).await;
            }
            Some(StateEvent::Policies(policies)) => self.on_policies(policies).await,
            // The watcher acts on GoAway itself; a Ping only shows that the stream lives.
            Some(StateEvent::Ping(_) | StateEvent::GoAway(_)) => {}
            None => self.refuse(None, &Refusal::UnknownMessage),
        }
        Ok(())
    }

    /// A message that does not fit what was told before is answered by a new stream, which tells everything.
    async fn on_policies(&mut self, message: v1::Policies) {
        let Some(saved) = self.saved.as_mut() else { return };
        let change = match saved.desired.policies.take(message) {
            Ok(Some(change)) => change,
            Ok(None) => return,
            Err(refusal) => {
                self.refuse(None, &refusal);
                return self.reopen();
            }
        };
        if change.is_empty() {
            return;
        }
        tracing::info!(changed = change.upserted.len(), removed = change.removed.len(), "policies of tenants");
        if let Err(error) = self.store.append_policies(saved) {
            tracing::error!(%error, "the state file cannot be written: policies are forgotten by a restart until it can");
        }
        if let Err(error) = self.engine.police(&saved.desired, &change).await {
            tracing::error!(error = crate::chain(&error), "the engine did not take the policies; trying again");
            self.engine.doubt();
            self.synchronise().await;
        }
        self.ask_leases().await;
    }

    fn desired(&self) -> Result<&Saved, Refusal> {
        self.saved.as_ref().ok_or(Refusal::Order("state before a Hello"))
    }

    /// # Errors
    /// Only when this server has never served and cannot: then the process ends with the reason.
    async fn on_hello(&mut self, hello: v1::Hello) -> anyhow::Result<()> {
        let Some(gateway) = self.opened.take() else { return Ok(()) };
        tracing::info!(session = hello.session_epoch, "connected to the control plane");
        metrics::connected(true);
        self.session = Some(Session { gateway, epoch: hello.session_epoch });
        self.reports.state_due = true;
        self.retry_at = None;
        if self.cursor().is_some_and(|cursor| hello.incarnation != cursor.incarnation.as_slice()) {
            tracing::warn!("the control plane has another history: all usage still kept is told again");
            self.meter.tell_everything_again();
            if let Err(error) = self.meter.spool.unacknowledge_all() {
                tracing::error!(%error, "the usage spool cannot be rewritten");
            }
        }
        let configured = self.configure(&hello).await;
        match configured {
            Ok(()) => Ok(()),
            Err(error) if !self.engine.is_up() && self.cursor().is_none() => Err(error),
            Err(error) => {
                self.refuse(None, &Refusal::Engine(format!("{error:#}")));
                Ok(())
            }
        }
    }

    async fn configure(&mut self, hello: &v1::Hello) -> anyhow::Result<()> {
        let wanted = hello.interface.as_ref().context("the control plane sent no interface")?;
        let interface = Interface::parse(wanted).context("the control plane sent an impossible interface")?;
        let unchanged = self.saved.as_ref().is_some_and(|saved| saved.interface == interface);
        if !self.engine.is_up() {
            self.engine.bring_up(&self.dir, &interface).await?;
        } else if !unchanged {
            self.engine.configure(&interface).await?;
        }
        let changed = match &mut self.saved {
            Some(saved) => saved.update(interface, hello)?,
            None => {
                self.saved = Some(Saved::first(interface, hello)?);
                true
            }
        };
        if changed && let Some(saved) = &self.saved {
            self.store.rewrite(saved).context("the state file cannot be written")?;
            self.ticks = ticks(saved.report_interval_ms());
        }
        Ok(())
    }

    async fn apply(&mut self, target: Option<v1::Cursor>, plan: Result<Option<Change>, Refusal>) {
        let began = Instant::now();
        let change = match plan {
            Ok(Some(change)) => change,
            Ok(None) => {
                self.reports.state_due = true;
                return;
            }
            Err(refusal) => return self.refuse(target, &refusal),
        };
        let Some(saved) = self.saved.as_mut() else { return };
        let freed = saved.desired.freed(&change);
        // Written ahead: whoever is killed from here on finds in the file every life that the engine may count.
        let undo = saved.desired.commit(&change);
        if let Err(error) = self.store.append(&change, saved) {
            tracing::error!(%error, "the state file cannot be written: nothing is acknowledged until it can");
        }
        if let Err(refusal) = self.engine.apply(&self.dir, saved, &change, &freed).await {
            saved.desired.roll_back(undo);
            if let Err(error) = self.store.take_back(saved) {
                tracing::error!(%error, "the state file holds a change that was refused, until it can be written");
            }
            return self.refuse(target, &refusal);
        }
        let (revision, peers) = (change.target.revision, saved.desired.peers().len());
        metrics::applied(revision, peers, began.elapsed());
        tracing::info!(
            revision, peers, removed = change.removed.len(), upserted = change.upserted.len(), took = ?began.elapsed(), "applied"
        );
        self.reports.state_due = true;
        self.resume.send_modify(|resume| resume.cursor = Some(change.target));
        self.ask_leases().await;
    }

    /// Keeps the old state and tells why. A wrong change is not asked for again: the one that repairs it arrives as a gap.
    /// For a gap, and when the engine was at fault, the state is asked for anew.
    fn refuse(&mut self, target: Option<v1::Cursor>, refusal: &Refusal) {
        let gap = matches!(refusal, Refusal::Gap { .. });
        if gap {
            tracing::info!(%refusal, "asking for the state anew");
        } else {
            metrics::nacked();
            tracing::error!(%refusal, "refused a change of the desired state; the old state goes on");
            self.reports.nack(target, refusal.to_string());
        }
        if gap || matches!(refusal, Refusal::Engine(_)) {
            self.reopen();
        }
    }

    pub(super) fn reopen(&mut self) {
        self.reopening = true;
        self.snapshot = None;
        let cursor = self.resume_from();
        self.resume.send_modify(|resume| {
            resume.cursor = cursor;
            resume.reopen += 1;
        });
    }

    pub(super) fn cursor(&self) -> Option<Cursor> {
        self.saved.as_ref().and_then(|saved| saved.desired.cursor())
    }

    /// None while a snapshot is wanted, whatever runs.
    pub(super) fn resume_from(&self) -> Option<Cursor> {
        self.saved.as_ref().and_then(|saved| saved.desired.resume_from())
    }

    /// False while the state on disk is behind: then it must not be acknowledged.
    pub(super) fn sync_store(&mut self) -> bool {
        let Some(saved) = &self.saved else { return true };
        let synced = tokio::task::block_in_place(|| self.store.sync_or_rewrite(saved));
        if let Err(error) = &synced {
            tracing::error!(%error, "the state file cannot be made durable: nothing is acknowledged until it can");
        }
        synced.is_ok()
    }
}
