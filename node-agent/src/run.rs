//! `run`: the control process. The whole flow is here: serve what was saved, then listen to events, one at a time.
//!
//! ```text
//! start -> state file -> tunnel, host, peers (no network needed) -> watch
//! delta -> checked -> applied -> state file synced -> reported
//! look  -> leases of metered peers asked for -> engine
//! tick  -> counters read -> spool synced -> reported -> acknowledged
//! ```

mod quota;
mod reporting;
mod state;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cvault_node_protocol::v1;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::clock::{Moment, boot_id};
use crate::desired::{Life, Snapshot};
use crate::engine::Engine;
use crate::enrolment;
use crate::meter::Meter;
use crate::report::{Reported, Reports, Session};
use crate::state_dir::StateDir;
use crate::store::{Saved, Store};
use crate::tunnel::Launch;
use crate::watch::{LinkEvent, QUEUE, Resume, Watcher};
use crate::{host, metrics};

const DEFAULT_REPORT_INTERVAL_MS: u32 = 10_000;
const REPORT_INTERVAL_MS: std::ops::RangeInclusive<u32> = 100..=600_000;
/// A report that failed is tried again after this (doubled by jitter).
const REPORT_RETRY: Duration = Duration::from_millis(500);
/// The applied state is told again after so many intervals, so that a silent divergence is found.
const STATE_EVERY_TICKS: u32 = 6;
const FAREWELL: Duration = Duration::from_secs(5);
/// How often host and engine are compared with what they should be; SIGHUP does it at once. With 65,000 peers that takes half a second.
const INSPECTION: Duration = Duration::from_secs(60);
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
    inspections: Interval,
    terminate: Signal,
    hangup: Signal,
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
    ticks_since_state: u32,
    silences: u32,
    quota: quota::Quota,
    looks: Interval,
    ticks_to_drops: u32,
    drops_told: HashMap<Life, BTreeMap<String, u64>>,
    /// By device, until it is sent.
    drops_waiting: BTreeMap<[u8; 16], v1::PeerDrops>,
}

enum Event {
    Terminate,
    TunnelEnded,
    Link(LinkEvent),
    Tick,
    Look,
    Inspection,
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
            Event::Look => agent.ask_leases().await,
            Event::Retry => agent.retry_at = None,
            Event::Inspection => agent.on_inspection().await,
            Event::Reported(reported) => agent.on_reported(reported).await,
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
        let hangup = signal(SignalKind::hangup()).context("signals cannot be received")?;
        let dir = StateDir::open(&args.state_dir)?;
        let not_enrolled = "this server is not enrolled: run `cvault-node-agent enroll` first";
        let enrolment = Arc::new(enrolment::load(&dir)?.context(not_enrolled)?);
        if args.metrics_listen != "off" {
            let address: SocketAddr =
                args.metrics_listen.parse().context("--metrics-listen needs ADDRESS:PORT or `off`")?;
            anyhow::ensure!(address.ip().is_loopback(), "--metrics-listen must be a loopback address");
            metrics::serve(address).await?;
        }
        let (now, boot_id) = (Moment::now(), boot_id());
        let (store, mut saved) = Store::open_or_set_aside(&dir, enrolment.server_id, now.wall_ms)?;
        let mut meter = Meter::open(&dir, boot_id, now)?;
        if let Some(saved) = saved.as_ref().filter(|saved| saved.desired.cursor().is_some()) {
            // What was counted before this start, under the state that was saved then.
            if let Err(error) = meter.pass(now, &saved.desired) {
                tracing::error!(
                    error = crate::chain(&error),
                    "the usage of before could not be read; its counters go on"
                );
            }
        }
        let launch = Launch {
            program: std::env::current_exe().context("the own program cannot be found")?,
            interface: args.interface.clone(),
            state_dir: dir.path().canonicalize().context("the state directory has no path")?,
        };
        let mut engine = Engine::new(launch, enrolment.keys.wireguard_private());
        if let Some(saved) = &mut saved {
            engine.bring_up(&dir, &saved.interface).await?;
            quota::adopt_leases(saved, &mut meter, &engine).await;
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
            inspections: every(INSPECTION),
            terminate,
            hangup,
            events,
            resume,
            opened: None,
            session: None,
            snapshot: None,
            reopening: false,
            reports: Reports::default(),
            retry_at: None,
            ticks_since_state: 0,
            silences: 0,
            quota: quota::Quota::default(),
            looks: every(quota::LOOK_EVERY),
            ticks_to_drops: 0,
            drops_told: HashMap::new(),
            drops_waiting: BTreeMap::new(),
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
        let metered = self.any_metered();
        tokio::select! {
            _ = self.terminate.recv() => Event::Terminate,
            () = self.engine.ended() => Event::TunnelEnded,
            Some(event) = self.events.recv() => Event::Link(event),
            reported = self.reports.next() => Event::Reported(reported),
            _ = self.ticks.tick() => Event::Tick,
            _ = self.inspections.tick() => Event::Inspection,
            _ = self.hangup.recv() => Event::Inspection,
            _ = self.looks.tick(), if metered => Event::Look,
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
            self.report_usage(None);
            if let Ok(Reported { answer: Ok(answer), .. }) =
                tokio::time::timeout_at(deadline, self.reports.next()).await
            {
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
    let period =
        Duration::from_millis(interval_ms.clamp(*REPORT_INTERVAL_MS.start(), *REPORT_INTERVAL_MS.end()).into());
    every(period)
}

fn every(period: Duration) -> Interval {
    let mut ticks = tokio::time::interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn retry_instant() -> Instant {
    Instant::now() + REPORT_RETRY.mul_f64(0.5 + rand::random::<f64>())
}
