//! `run`: the control process. The whole flow is here: serve what was saved, then listen to events, one at a time.
//!
//! ```text
//! start -> state file -> tunnel, host, peers (no network needed) -> watch
//! delta -> checked -> applied -> state file synced -> reported
//! tick  -> counters read -> spool synced -> reported -> acknowledged
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cvault_node_protocol::v1::{self, state_event::Event as StateEvent};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::clock::{Moment, boot_id};
use crate::desired::{Change, Cursor, Refusal, Snapshot};
use crate::engine::Engine;
use crate::enrolment;
use crate::interface::Interface;
use crate::meter::Meter;
use crate::report::{self, Lane, Reported, Reports, Session};
use crate::state_dir::StateDir;
use crate::store::{Saved, Store};
use crate::tunnel::Launch;
use crate::watch::{LinkEvent, QUEUE, Resume, Watcher};
use crate::{host, metrics};

const DEFAULT_REPORT_INTERVAL_MS: u32 = 10_000;
const REPORT_INTERVAL_MS: std::ops::RangeInclusive<u32> = 100..=600_000;
/// A report that failed is tried again after this (doubled by jitter).
const REPORT_RETRY: Duration = Duration::from_millis(500);
const FAREWELL: Duration = Duration::from_secs(5);
/// A tunnel that did not answer this often in a row is killed and started again.
const MAX_SILENCES: u32 = 3;

/// What `run` was asked to do.
#[derive(clap::Args)]
pub(crate) struct RunArgs {
    /// Where this server keeps its keys and its state.
    #[arg(long, default_value = crate::DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Name of the WireGuard interface.
    #[arg(long, default_value = "cv0")]
    interface: String,
    /// Where Prometheus metrics are served; `off` for nowhere.
    #[arg(long, default_value = "127.0.0.1:9090")]
    metrics_listen: String,
    /// Stop the tunnel too when this process is told to stop.
    #[arg(long)]
    stop_tunnel_on_exit: bool,
}

struct Agent {
    dir: StateDir,
    started: Instant,
    boot_id: [u8; 16],
    engine: Engine,
    store: Store,
    saved: Option<Saved>,
    meter: Meter,
    ticks: Interval,
    terminate: Signal,
    events: mpsc::Receiver<LinkEvent>,
    resume: watch::Sender<Resume>,
    /// Connected, and not yet told by a Hello under which session.
    opened: Option<crate::connect::Gateway>,
    session: Option<Session>,
    snapshot: Option<Snapshot>,
    /// The rest of this stream is of no use: another was asked for.
    reopening: bool,
    reports: Reports,
    retry_at: Option<Instant>,
    silences: u32,
}

enum Event {
    Terminate,
    TunnelEnded,
    Link(LinkEvent),
    Tick,
    Retry,
    Reported(Reported),
}

pub(crate) async fn run(args: &RunArgs) -> anyhow::Result<()> {
    host::check()?;
    let mut agent = Agent::start(args).await?;
    loop {
        match agent.next_event().await {
            Event::Terminate => break,
            Event::TunnelEnded => agent.revive_tunnel().await,
            Event::Link(event) => agent.on_link(event).await?,
            Event::Tick => agent.on_tick().await,
            Event::Retry => agent.retry_at = None,
            Event::Reported(reported) => agent.on_reported(reported)?,
        }
        agent.report_state();
    }
    agent.say_farewell().await;
    if args.stop_tunnel_on_exit {
        agent.engine.stop().await;
    }
    tracing::info!("stopped");
    Ok(())
}

impl Agent {
    /// Everything that needs no network: serves the saved state, then lets the watcher connect.
    async fn start(args: &RunArgs) -> anyhow::Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("signals cannot be received")?;
        let dir = StateDir::open(&args.state_dir)?;
        let not_enrolled = "this server is not enrolled: run `cvault-node-agent enroll` first";
        let enrolment = Arc::new(enrolment::load(&dir)?.context(not_enrolled)?);
        if args.metrics_listen != "off" {
            let address: SocketAddr = args.metrics_listen.parse().context("--metrics-listen needs ADDRESS:PORT or `off`")?;
            anyhow::ensure!(address.ip().is_loopback(), "--metrics-listen must be a loopback address");
            metrics::serve(address).await?;
        }
        let (now, boot_id) = (Moment::now(), boot_id());
        let (store, saved) = Store::open_or_set_aside(&dir, enrolment.server_id, now.wall_ms)?;
        let meter = Meter::open(&dir, boot_id, now)?;
        let launch = Launch {
            program: std::env::current_exe().context("the own program cannot be found")?,
            interface: args.interface.clone(),
            state_dir: dir.path().to_owned(),
        };
        let mut engine = Engine::new(launch, enrolment.keys.wireguard_private());
        if let Some(saved) = &saved {
            engine.bring_up(&dir, &saved.interface).await?;
            engine.synchronise(&saved.desired).await?;
            let revision = saved.desired.cursor().map_or(0, |cursor| cursor.revision);
            tracing::info!(revision, peers = saved.desired.peers().len(), "serving the saved state");
        }
        let cursor = saved.as_ref().and_then(|saved| saved.desired.cursor());
        let (resume, resume_rx) = watch::channel(Resume { cursor, reopen: 0 });
        let (events_tx, events) = mpsc::channel(QUEUE);
        tracing::info!(server = enrolment.server_name, control_plane = enrolment.control_plane, "connecting");
        let instance_id = uuid::Uuid::new_v4().into_bytes();
        let watcher = Watcher { enrolment, instance_id, boot_id, resume: resume_rx, events: events_tx };
        tokio::spawn(watcher.run());
        let interval = saved.as_ref().map_or(DEFAULT_REPORT_INTERVAL_MS, Saved::report_interval_ms);
        Ok(Self {
            dir,
            started: Instant::now(),
            boot_id,
            engine,
            store,
            saved,
            meter,
            ticks: ticks(interval),
            terminate,
            events,
            resume,
            opened: None,
            session: None,
            snapshot: None,
            reopening: false,
            reports: Reports::default(),
            retry_at: None,
            silences: 0,
        })
    }

    /// Each branch is cancel-safe: an event that loses the race is still there the next time.
    async fn next_event(&mut self) -> Event {
        let retry = async {
            match self.retry_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => Event::Terminate,
            () = self.engine.ended() => Event::TunnelEnded,
            Some(event) = self.events.recv() => Event::Link(event),
            reported = self.reports.next() => Event::Reported(reported),
            _ = self.ticks.tick() => Event::Tick,
            () = retry => Event::Retry,
        }
    }

    // ---- the tunnel ----------------------------------------------------------------------------------------------

    async fn revive_tunnel(&mut self) {
        let Some(saved) = &self.saved else { return };
        let began = Instant::now();
        metrics::tunnel_restarted();
        match self.engine.revive(&self.dir, &saved.interface, Some(&saved.desired)).await {
            Ok(()) => tracing::warn!(took = ?began.elapsed(), "the tunnel process had ended and was started again"),
            Err(error) => tracing::error!(error = format!("{error:#}"), "will try again"),
        }
    }

    // ---- desired state -------------------------------------------------------------------------------------------

    /// Takes everything that has arrived, then makes it durable with one sync; the report follows in the main loop.
    async fn on_link(&mut self, first: LinkEvent) -> anyhow::Result<()> {
        let mut next = Some(first);
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
            next = self.events.try_recv().ok();
        }
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
                let taken = self.snapshot.as_mut().map_or(Err(Refusal::Order("chunk")), |snapshot| snapshot.chunk(&chunk));
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
            // The watcher acts on GoAway itself; a Ping only shows that the stream lives.
            Some(StateEvent::Ping(_) | StateEvent::GoAway(_)) => {}
            None => self.refuse(None, &Refusal::UnknownMessage),
        }
        Ok(())
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
        if let Err(refusal) = self.engine.apply(&self.dir, saved, &change).await {
            return self.refuse(target, &refusal);
        }
        saved.desired.commit(&change);
        if let Err(error) = self.store.append(&change, saved) {
            tracing::error!(%error, "the state file cannot be written: nothing is acknowledged until it can");
            self.store.invalidate();
        }
        let (revision, peers) = (change.target.revision, saved.desired.peers().len());
        metrics::applied(revision, peers, began.elapsed());
        tracing::info!(
            revision, peers, removed = change.removed.len(), upserted = change.upserted.len(), took = ?began.elapsed(), "applied"
        );
        self.reports.state_due = true;
        self.resume.send_modify(|resume| resume.cursor = Some(change.target));
    }

    /// Keeps the old state, tells why, and asks for another stream. A gap is no fault: only the stream is asked for.
    fn refuse(&mut self, target: Option<v1::Cursor>, refusal: &Refusal) {
        if let Refusal::Gap { .. } = refusal {
            tracing::info!(%refusal, "asking for the state anew");
        } else {
            metrics::nacked();
            tracing::error!(%refusal, "refused a change of the desired state; the old state goes on");
            self.reports.nack(target, refusal.to_string());
        }
        self.reopen();
    }

    fn reopen(&mut self) {
        self.reopening = true;
        self.snapshot = None;
        let cursor = self.cursor();
        self.resume.send_modify(|resume| {
            resume.cursor = cursor;
            resume.reopen += 1;
        });
    }

    fn cursor(&self) -> Option<Cursor> {
        self.saved.as_ref().and_then(|saved| saved.desired.cursor())
    }

    /// False while the state on disk is behind: then it must not be acknowledged.
    fn sync_store(&mut self) -> bool {
        let Some(saved) = &self.saved else { return true };
        let synced = tokio::task::block_in_place(|| self.store.sync_or_rewrite(saved));
        if let Err(error) = &synced {
            tracing::error!(%error, "the state file cannot be made durable: nothing is acknowledged until it can");
        }
        synced.is_ok()
    }

    // ---- usage ---------------------------------------------------------------------------------------------------

    async fn on_tick(&mut self) {
        self.read_counters().await;
        self.report_usage().await;
    }

    async fn read_counters(&mut self) {
        let Some(saved) = self.saved.as_mut().filter(|saved| saved.desired.cursor().is_some()) else { return };
        let pass = match tokio::task::block_in_place(|| self.meter.pass(Moment::now(), &saved.desired)) {
            Ok(pass) => pass,
            Err(error) => {
                tracing::error!(error = crate::chain(&error), "usage could not be read; its counters go on");
                return;
            }
        };
        if pass.strangers > 0 {
            metrics::strangers(pass.strangers);
            tracing::warn!(count = pass.strangers, "counters of unknown devices are not billed");
        }
        if let Some(bytes) = pass.journal_bytes
            && let Err(error) = self.engine.uapi().acknowledge_journal(bytes).await
        {
            tracing::debug!(%error, "the tunnel keeps its journal for now");
        }
        saved.desired.forget_retired(|life| pass.counted.contains(life));
    }

    async fn report_usage(&mut self) {
        let device = self.ask_tunnel().await;
        if let Some(device) = &device {
            metrics::tunnel(device, self.meter.spool.waiting_bytes());
        }
        let Some(session) = self.session.as_ref().filter(|_| !self.reports.is_busy(Lane::Usage)) else { return };
        match self.meter.spool.next(Moment::now(), self.boot_id) {
            Ok(windows) => {
                let spool_bytes = self.meter.spool.waiting_bytes();
                let health = report::health(self.started.elapsed(), self.engine.restarts, spool_bytes, device);
                let applied = self.cursor().map(Cursor::to_wire);
                let request = v1::ReportRequest { applied, windows, health: Some(health), ..v1::ReportRequest::default() };
                self.reports.send(Lane::Usage, session, request);
            }
            Err(error) => tracing::error!(error = crate::chain(&error), "the usage spool cannot be read"),
        }
    }

    /// The tunnel's own counts; a tunnel that stays silent is killed, and its end starts it anew.
    async fn ask_tunnel(&mut self) -> Option<crate::uapi::DeviceStatus> {
        if !self.engine.is_up() {
            return None;
        }
        match self.engine.uapi().device().await {
            Ok(device) => {
                self.silences = 0;
                self.engine.is_healthy();
                Some(device)
            }
            Err(error) => {
                self.silences += 1;
                tracing::warn!(error = crate::chain(&error), silences = self.silences, "the tunnel does not answer");
                if self.silences >= MAX_SILENCES {
                    self.silences = 0;
                    self.engine.kill();
                }
                None
            }
        }
    }

    // ---- reports -------------------------------------------------------------------------------------------------

    /// Tells the applied state at once when there is something to tell and nothing in the way.
    fn report_state(&mut self) {
        let free = self.reports.state_due && self.retry_at.is_none() && !self.reports.is_busy(Lane::State);
        if !free || self.session.is_none() {
            return;
        }
        if !self.sync_store() {
            self.retry_at = Some(retry_instant());
            return;
        }
        let applied = self.cursor().map(Cursor::to_wire);
        if let Some(session) = &self.session {
            self.reports.state_due = false;
            self.reports.send(Lane::State, session, v1::ReportRequest { applied, ..v1::ReportRequest::default() });
        }
    }

    fn on_reported(&mut self, reported: Reported) -> anyhow::Result<()> {
        let current = self.session.as_ref().is_some_and(|session| session.epoch == reported.session_epoch);
        let answer = match reported.answer {
            Ok(answer) => answer,
            Err(status) => {
                metrics::reported("failed");
                tracing::warn!(code = %status.code(), said = status.message(), "a report failed");
                if reported.lane == Lane::State {
                    self.reports.state_due = true;
                    self.retry_at = Some(retry_instant());
                }
                return Ok(());
            }
        };
        metrics::reported("answered");
        self.meter.spool.acknowledge(&answer.acked, Moment::now().wall_ms)?;
        if current && answer.superseded {
            tracing::warn!("another session of this server's identity is newer: watching again");
            self.reopen();
        } else if current && answer.snapshot_wanted {
            tracing::error!("the control plane finds other content at our revision: asking for a snapshot");
            if let Some(saved) = &mut self.saved {
                saved.desired.forget_cursor();
            }
            self.reopen();
        } else if reported.lane == Lane::Usage && !answer.acked.is_empty() && self.meter.spool.has_unacknowledged() {
            // More is waiting: do not wait for the next tick.
            self.ticks.reset_immediately();
        }
        Ok(())
    }

    /// The last reading, and one attempt to tell it. What is not acknowledged now is told after the next start.
    async fn say_farewell(&mut self) {
        self.read_counters().await;
        self.sync_store();
        let farewell = async {
            while self.reports.has_running() {
                let reported = self.reports.next().await;
                if let Ok(answer) = reported.answer {
                    self.meter.spool.acknowledge(&answer.acked, Moment::now().wall_ms).ok();
                }
            }
        };
        let deadline = Instant::now() + FAREWELL;
        if tokio::time::timeout_at(deadline, farewell).await.is_ok() && self.session.is_some() {
            self.report_usage().await;
            if let Ok(Reported { answer: Ok(answer), .. }) = tokio::time::timeout_at(deadline, self.reports.next()).await {
                self.meter.spool.acknowledge(&answer.acked, Moment::now().wall_ms).ok();
            }
        }
        if let Err(error) = self.meter.spool.sync() {
            tracing::warn!(%error, "acknowledgements may be forgotten; their windows are told again");
        }
    }
}

fn ticks(interval_ms: u32) -> Interval {
    let interval_ms = if interval_ms == 0 { DEFAULT_REPORT_INTERVAL_MS } else { interval_ms };
    let period = Duration::from_millis(
        interval_ms.clamp(*REPORT_INTERVAL_MS.start(), *REPORT_INTERVAL_MS.end()).into(),
    );
    let mut ticks = tokio::time::interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn retry_instant() -> Instant {
    Instant::now() + REPORT_RETRY.mul_f64(0.5 + rand::random::<f64>())
}
