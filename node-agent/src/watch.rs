//! The stream of desired state: connects, watches, forwards, and comes back with jitter. Decides nothing about state.

use std::sync::Arc;
use std::time::Duration;

use cvault_node_protocol::{PROTOCOL, v1};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::backoff::{self, Ended};
use crate::connect::{self, Gateway};
use crate::desired::Cursor;
use crate::enrolment::Enrolment;

/// Events that wait for the agent. When it is full the stream is not read: the control plane's flow control holds on.
pub(crate) const QUEUE: usize = 64;
const WATCH_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_SPREAD: Duration = Duration::from_secs(60);

/// Where to continue, told by the agent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resume {
    pub(crate) cursor: Option<Cursor>,
    /// Raised to have the current session replaced.
    pub(crate) reopen: u64,
}

pub(crate) enum LinkEvent {
    /// A new stream begins; everything that comes is of this one.
    Opened(Gateway),
    State(v1::StateEvent),
    Closed,
}

pub(crate) struct Watcher {
    pub(crate) enrolment: Arc<Enrolment>,
    pub(crate) instance_id: [u8; 16],
    pub(crate) boot_id: [u8; 16],
    pub(crate) resume: watch::Receiver<Resume>,
    pub(crate) events: mpsc::Sender<LinkEvent>,
}

/// How a session ended.
enum SessionEnd {
    Unreachable,
    Refused,
    /// The agent wants the state anew.
    Replaced,
    GoAway {
        spread: Duration,
    },
    /// Nobody listens any more.
    Finished,
}

impl Watcher {
    /// Runs until the agent drops its end of the channel.
    pub(crate) async fn run(mut self) {
        let mut failures = 0_u32;
        loop {
            let began = Instant::now();
            let end = self.session(failures).await;
            let (ended, spread) = match end {
                SessionEnd::Unreachable => (Ended::Unreachable, None),
                SessionEnd::Refused => (Ended::Refused, None),
                SessionEnd::Replaced => (Ended::Replaced, None),
                SessionEnd::GoAway { spread } => (Ended::Refused, Some(spread)),
                SessionEnd::Finished => return,
            };
            if backoff::was_good(began.elapsed(), ended) {
                failures = 0;
            }
            let wait = match spread {
                Some(spread) => spread.mul_f64(rand::random()),
                None => backoff::delay(failures, ended, rand::random()),
            };
            failures = failures.saturating_add(1);
            if self.events.send(LinkEvent::Closed).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.events.closed() => return,
            }
        }
    }

    async fn session(&mut self, failures: u32) -> SessionEnd {
        let resume = self.resume.borrow_and_update().clone();
        let enrolment = &self.enrolment;
        let mut gateway = match connect::connect(&enrolment.control_plane, &enrolment.keys.tls, enrolment.pin).await {
            Ok(gateway) => gateway,
            Err(error) => {
                let error_text = crate::chain(&error);
                if failures.is_power_of_two() || failures == 0 {
                    tracing::warn!(
                        error = error_text,
                        failures,
                        "no connection to the control plane; the tunnels go on"
                    );
                } else {
                    tracing::debug!(error = error_text, failures, "no connection to the control plane");
                }
                return if error.is_network() { SessionEnd::Unreachable } else { SessionEnd::Refused };
            }
        };
        let request = v1::WatchRequest {
            instance_id: self.instance_id.to_vec().into(),
            boot_id: self.boot_id.to_vec().into(),
            have: resume.cursor.map(Cursor::to_wire),
            protocol_min: PROTOCOL,
            protocol_max: PROTOCOL,
            agent_version: crate::VERSION.to_owned(),
        };
        let mut stream = match tokio::time::timeout(WATCH_TIMEOUT, gateway.watch(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                tracing::warn!(code = %status.code(), said = status.message(), "the control plane refused the watch");
                return SessionEnd::Refused;
            }
            Err(_) => {
                tracing::warn!("the control plane did not answer the watch in time");
                return SessionEnd::Unreachable;
            }
        };
        if self.events.send(LinkEvent::Opened(gateway)).await.is_err() {
            return SessionEnd::Finished;
        }
        self.forward(&mut stream, resume.reopen).await
    }

    async fn forward(&mut self, stream: &mut tonic::Streaming<v1::StateEvent>, reopen: u64) -> SessionEnd {
        loop {
            // A dead path ends the stream by HTTP/2 keepalive, so this wait is bounded too.
            let message = tokio::select! {
                message = stream.message() => message,
                asked = self.resume.wait_for(|resume| resume.reopen != reopen) => {
                    return if asked.is_ok() { SessionEnd::Replaced } else { SessionEnd::Finished };
                }
            };
            match message {
                Ok(Some(v1::StateEvent { event: Some(v1::state_event::Event::GoAway(go_away)) })) => {
                    tracing::info!(reason = go_away.reason, "the control plane asks to come back later");
                    let spread = Duration::from_millis(go_away.spread_ms.into()).min(MAX_SPREAD);
                    return SessionEnd::GoAway { spread };
                }
                Ok(Some(event)) => {
                    if self.events.send(LinkEvent::State(event)).await.is_err() {
                        return SessionEnd::Finished;
                    }
                }
                Ok(None) => {
                    tracing::info!("the control plane closed the watch");
                    return SessionEnd::Unreachable;
                }
                Err(status) => {
                    tracing::warn!(code = %status.code(), said = status.message(), "the watch broke");
                    let broken = [tonic::Code::Unavailable, tonic::Code::Unknown, tonic::Code::Cancelled];
                    return if broken.contains(&status.code()) { SessionEnd::Unreachable } else { SessionEnd::Refused };
                }
            }
        }
    }
}
