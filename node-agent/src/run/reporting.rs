//! What is told to the control plane: usage at every tick, the applied state at once; and what its answers mean.

use cvault_node_protocol::{MAX_WINDOW_PEERS, v1};

use super::{Agent, MAX_SILENCES, STATE_EVERY_TICKS, retry_instant};
use crate::clock::Moment;
use crate::desired::Cursor;
use crate::metrics;
use crate::report::{self, Lane, Reported};
use crate::tunnel;
use crate::uapi::DeviceStatus;

/// Reading every peer of a full server takes half a second: then its drops are read with each inspection only.
const FEW_PEERS: usize = 5_000;
const DROPS_EVERY_TICKS: u32 = 5;

impl Agent {
    pub(super) async fn on_tick(&mut self) {
        self.reports.state_due |= self.ticks_since_state >= STATE_EVERY_TICKS;
        self.ticks_since_state += 1;
        self.read_counters().await;
        self.ticks_to_drops = self.ticks_to_drops.saturating_sub(1);
        if self.ticks_to_drops == 0 && self.saved.as_ref().is_some_and(|saved| saved.desired.peers().len() <= FEW_PEERS)
        {
            self.read_drops().await;
        }
        let device = self.ask_tunnel().await;
        if let Some(device) = &device {
            metrics::tunnel(device, self.meter.spool.waiting_bytes());
        }
        self.report_usage(Some(device.unwrap_or_default()));
        self.settle_leases().await;
        self.ask_leases().await;
    }

    /// The final counters of removed peers; should that fail, the next reading of all counters brings them.
    pub(super) fn take_closed(&mut self) {
        let Some(saved) = self.saved.as_ref().filter(|saved| saved.desired.cursor().is_some()) else { return };
        if let Err(error) = tokio::task::block_in_place(|| self.meter.take_closed(Moment::now(), &saved.desired)) {
            tracing::error!(error = crate::chain(&error), "the usage of removed devices could not be read yet");
        }
    }

    pub(super) async fn read_counters(&mut self) {
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
        if let Some(taken) = pass.journal
            && let Err(error) = self.engine.uapi().acknowledge_journal(taken).await
        {
            tracing::debug!(%error, "the tunnel keeps its journal for now");
        }
        saved.desired.forget_retired(|life| pass.counted.contains(life));
        self.quota.metered_epoch = pass.epoch;
    }

    /// What the tunnel dropped of each peer, as far as it has changed.
    pub(super) async fn read_drops(&mut self) {
        self.ticks_to_drops = DROPS_EVERY_TICKS;
        let Some(saved) = self.saved.as_ref().filter(|_| self.engine.is_up()) else { return };
        let Ok(running) = self.engine.uapi().peers().await else { return };
        for peer in running.into_iter().filter(|peer| !peer.drops.is_empty()) {
            let life = peer.life();
            let Some(device_id) = saved.desired.device_of(&life) else { continue };
            if self.drops_told.get(&life) == Some(&peer.drops) {
                continue;
            }
            self.drops_told.insert(life, peer.drops.clone());
            let told = v1::PeerDrops {
                device_id: device_id.to_vec().into(),
                generation: life.generation,
                packets: peer.drops.into_iter().collect(),
            };
            self.drops_waiting.insert(device_id, told);
        }
        self.drops_told.retain(|life, _| saved.desired.device_of(life).is_some());
    }

    /// Sends what waits; with the server's health when the tunnel was asked.
    pub(super) fn report_usage(&mut self, device: Option<DeviceStatus>) {
        let Some(session) = self.session.as_ref().filter(|_| !self.reports.is_busy(Lane::Usage)) else { return };
        match self.meter.spool.next(Moment::now(), self.boot_id) {
            Ok(windows) => {
                let spool_bytes = self.meter.spool.waiting_bytes();
                let uptime = self.started.elapsed();
                let health = device.map(|device| report::health(uptime, self.engine.restarts, spool_bytes, device));
                let mut drops = Vec::new();
                while drops.len() < MAX_WINDOW_PEERS
                    && let Some((_, next)) = self.drops_waiting.pop_first()
                {
                    drops.push(next);
                }
                let request = v1::ReportRequest { windows, health, drops, ..v1::ReportRequest::default() };
                self.reports.send(Lane::Usage, session, request);
            }
            Err(error) => tracing::error!(error = crate::chain(&error), "the usage spool cannot be read"),
        }
    }

    /// The tunnel's own counts; a tunnel that stays silent is killed, and its end starts it anew.
    async fn ask_tunnel(&mut self) -> Option<DeviceStatus> {
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

    /// Tells the applied state at once when there is something to tell and nothing in the way.
    pub(super) fn report_state(&mut self) {
        let free = self.reports.state_due && self.retry_at.is_none() && !self.reports.is_busy(Lane::State);
        if !free || self.session.is_none() {
            return;
        }
        if !self.sync_store() {
            self.retry_at = Some(retry_instant());
            return;
        }
        let applied = self.resume_from().map(Cursor::to_wire);
        if let Some(session) = &self.session {
            self.reports.state_due = false;
            self.ticks_since_state = 0;
            self.reports.send(Lane::State, session, v1::ReportRequest { applied, ..v1::ReportRequest::default() });
        }
    }

    pub(super) async fn on_reported(&mut self, reported: Reported) {
        let current = self.session.as_ref().is_some_and(|session| session.epoch == reported.session_epoch);
        let answer = match reported.answer {
            Ok(answer) => answer,
            Err(status) => {
                metrics::reported("failed");
                tracing::warn!(code = %status.code(), said = status.message(), "a report failed");
                if reported.lane == Lane::Lease {
                    self.on_lease_answer(None).await;
                }
                if reported.lane == Lane::Usage {
                    // whatever it held is told anew
                    self.drops_told.clear();
                    self.drops_waiting.clear();
                }
                if reported.lane == Lane::State {
                    self.reports.state_due = true;
                    self.retry_at = Some(retry_instant());
                }
                return;
            }
        };
        metrics::reported("answered");
        if reported.lane == Lane::Lease {
            self.on_lease_answer(Some(&answer)).await;
        }
        if let Err(error) = self.meter.spool.acknowledge(&answer.acked, Moment::now().wall_ms) {
            tracing::error!(
                error = crate::chain(&error),
                "acknowledgements cannot be kept; their windows are told again"
            );
        }
        if current && answer.superseded {
            tracing::warn!("another session of this server's identity is newer: watching again");
            self.reopen();
        } else if current && answer.snapshot_wanted {
            tracing::error!("the control plane finds other content at our revision: asking for a snapshot");
            if let Some(saved) = &mut self.saved {
                saved.desired.want_snapshot();
            }
            self.reopen();
        } else if current && reported.lane == Lane::State && self.resume_from().is_some() {
            self.engine.confirm();
            self.synchronise().await;
        } else if reported.lane == Lane::Usage && !answer.acked.is_empty() && self.meter.spool.has_unacknowledged() {
            // More is waiting: do not wait for the next tick.
            self.report_usage(None);
        } else if reported.lane == Lane::Usage {
            self.ask_leases().await;
        }
    }

    /// Gives the engine what it misses; after the control plane's confirmation also takes what it should not have.
    pub(super) async fn synchronise(&mut self) {
        let Some(saved) = self.saved.as_ref().filter(|_| self.engine.is_up()) else { return };
        if let Err(refusal) = self.engine.synchronise(&saved.desired).await {
            tracing::error!(%refusal, "the engine could not be given the committed peers; trying again");
        }
    }

    /// Repairs what somebody changed by hand on the host or in the engine.
    pub(super) async fn on_inspection(&mut self) {
        tunnel::bound_log(self.dir.path());
        let Some(saved) = &self.saved else { return };
        if let Err(error) = self.engine.repair_host(&saved.interface).await {
            tracing::error!(error = format!("{error:#}"), "the host cannot be repaired; trying again");
        }
        self.engine.doubt();
        self.synchronise().await;
        self.read_drops().await;
    }
}
