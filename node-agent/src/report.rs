//! Reports: what is sent, in which lane, and what an answer means.
//!
//! Lanes, so that a large report of usage never holds up the acknowledgement of a change or a lease. Only the state lane tells
//! the applied cursor, one report at a time, so that an older state never arrives behind a newer one.

use std::collections::HashMap;
use std::time::Duration;

use cvault_node_protocol::v1;
use tokio::task::JoinSet;

use crate::connect::Gateway;
use crate::uapi::DeviceStatus;

const TIMEOUT: Duration = Duration::from_secs(10);
/// Refusals kept until they are told; older ones give way.
const MAX_NACKS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// The applied revision and refusals.
    State,
    /// Usage windows and health.
    Usage,
    /// Leases, one question at a time.
    Lease,
}

/// An answered or failed report.
pub(crate) struct Reported {
    pub(crate) lane: Lane,
    pub(crate) session_epoch: u64,
    /// How many of the oldest refusals it told.
    nacks: usize,
    pub(crate) answer: Result<v1::ReportResponse, tonic::Status>,
}

/// An open session with the control plane.
#[derive(Clone)]
pub(crate) struct Session {
    pub(crate) gateway: Gateway,
    pub(crate) epoch: u64,
}

/// Reports under way, and what the next one has to tell.
#[derive(Default)]
pub(crate) struct Reports {
    running: JoinSet<Reported>,
    busy: Vec<Lane>,
    nacks: Vec<v1::Nack>,
    /// The applied state changed, or a refusal waits.
    pub(crate) state_due: bool,
}

impl Reports {
    pub(crate) fn nack(&mut self, target: Option<v1::Cursor>, reason: String) {
        if self.nacks.len() >= MAX_NACKS && !self.is_busy(Lane::State) {
            self.nacks.remove(0);
        }
        if self.nacks.len() < MAX_NACKS {
            self.nacks.push(v1::Nack { target, reason });
        }
        self.state_due = true;
    }

    pub(crate) fn is_busy(&self, lane: Lane) -> bool {
        self.busy.contains(&lane)
    }

    /// Sends a report in a free lane.
    pub(crate) fn send(&mut self, lane: Lane, session: &Session, mut request: v1::ReportRequest) {
        request.session_epoch = session.epoch;
        let nacks = if lane == Lane::State { self.nacks.len() } else { 0 };
        request.nacks = self.nacks[..nacks].to_vec();
        self.busy.push(lane);
        let (mut gateway, session_epoch) = (session.gateway.clone(), session.epoch);
        self.running.spawn(async move {
            let answer = match tokio::time::timeout(TIMEOUT, gateway.report(request)).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(tonic::Status::deadline_exceeded("the control plane did not answer the report")),
            };
            Reported { lane, session_epoch, nacks, answer }
        });
    }

    /// The next answer; waits for ever when nothing is under way. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Reported {
        loop {
            match self.running.join_next().await {
                Some(Ok(reported)) => {
                    self.busy.retain(|lane| *lane != reported.lane);
                    if reported.answer.is_ok() {
                        self.nacks.drain(..reported.nacks.min(self.nacks.len()));
                    }
                    return reported;
                }
                Some(Err(error)) => tracing::error!(%error, "a report was lost"),
                None => {
                    self.busy.clear();
                    std::future::pending::<()>().await;
                }
            }
        }
    }

    pub(crate) fn has_running(&self) -> bool {
        !self.running.is_empty()
    }
}

pub(crate) fn health(uptime: Duration, restarts: u32, spool_bytes: u64, device: DeviceStatus) -> v1::Health {
    v1::Health {
        uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
        load_permille: load_permille(&std::fs::read_to_string("/proc/loadavg").unwrap_or_default()),
        handshakes: device.handshakes,
        drops: device.drops.into_iter().filter(|(_, count)| *count > 0).collect::<HashMap<_, _>>(),
        agent_version: crate::VERSION.to_owned(),
        tunnel_restarts: restarts,
        spool_bytes,
    }
}

/// The first number of `/proc/loadavg`, "0.42 …", in thousandths.
fn load_permille(loadavg: &str) -> u32 {
    let (whole, hundredths) =
        loadavg.split_whitespace().next().and_then(|load| load.split_once('.')).unwrap_or(("0", "0"));
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    number(whole).saturating_mul(1_000).saturating_add(number(hundredths).saturating_mul(10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_is_read_in_thousandths() {
        assert_eq!(load_permille("1.42 0.50 0.10 1/200 12345\n"), 1_420);
        assert_eq!(load_permille("nonsense"), 0);
    }

    #[test]
    fn refusals_are_bounded() {
        let mut reports = Reports::default();
        for n in 0..40 {
            reports.nack(None, n.to_string());
        }
        assert_eq!((reports.nacks.len(), reports.nacks[15].reason.as_str()), (MAX_NACKS, "39"));
    }
}
