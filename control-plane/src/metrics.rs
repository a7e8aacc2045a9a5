//! Every metric of the control plane. No label names a tenant, a user or a server.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::Method;
use metrics::{SharedString, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

const REQUESTS: &str = "cvault_http_requests_total";
const REQUEST_SECONDS: &str = "cvault_http_request_duration_seconds";
const PASSWORD_QUEUE: &str = "cvault_password_queue_depth";
const POOL_CONNECTIONS: &str = "cvault_db_pool_connections";
const SERVING: &str = "cvault_http_requests_in_flight";
const RATE_LIMITED: &str = "cvault_rate_limited_total";
const NODE_STREAMS: &str = "cvault_node_streams";
const NODE_ALARMS: &str = "cvault_node_alarms_total";
const BILLED_BYTES: &str = "cvault_billed_bytes_total";
const ORPHAN_BYTES: &str = "cvault_orphan_bytes_total";
const TASK_RUNS: &str = "cvault_task_runs_total";
const PORTAL_VERDICTS: &str = "cvault_portal_verdicts_total";
const PORTAL_THROTTLED: &str = "cvault_portal_throttled_total";
const MAILS: &str = "cvault_mail_attempts_total";
const OUTBOX: &str = "cvault_outbox_mails";
const REQUEST_LOGS_DROPPED: &str = "cvault_request_logs_dropped_total";
const OUTBOX_OLDEST: &str = "cvault_outbox_oldest_seconds";

/// Seconds. From a cached answer to bcrypt at cost 12 under load.
const BUCKETS: [f64; 12] = [0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the recorder of this process; later calls find it installed.
pub fn install() -> &'static PrometheusHandle {
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Full(REQUEST_SECONDS.to_owned()), &BUCKETS)
            .expect("the list of buckets is not empty")
            .build_recorder();
        let handle = recorder.handle();
        // Another recorder can only have been installed by a program that embeds this crate; then it keeps its own.
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::debug!("another metrics recorder is installed");
        }
        describe_counter!(REQUESTS, "Requests answered, by route template, method and status.");
        describe_histogram!(REQUEST_SECONDS, "Time from the request's head to its answer, by route template.");
        describe_counter!(PORTAL_VERDICTS, "Sensitive requests of portal sessions, by what was thought of them.");
        describe_counter!(
            PORTAL_THROTTLED,
            "Attempts to log in to the portal, to sign up or to reset a password that a throttle refused, by kind."
        );
        describe_gauge!(PASSWORD_QUEUE, "Password checks that run or wait.");
        describe_gauge!(SERVING, "Requests that are being served, those whose caller has left included.");
        describe_counter!(
            RATE_LIMITED,
            "Requests refused by a limit: of a tenant, a user, a person of the portal, staff; throttle: after failures."
        );
        describe_gauge!(NODE_STREAMS, "Servers whose agent watches this replica.");
        describe_gauge!(POOL_CONNECTIONS, "Connections to the database, by pool (app: tenants' work, sys) and state.");
        describe_counter!(NODE_ALARMS, "Faults of servers and of their state that somebody must look at, by kind.");
        describe_counter!(BILLED_BYTES, "Bytes entered into the ledger of a tenant.");
        describe_counter!(ORPHAN_BYTES, "Bytes of unknown devices: kept, billed to nobody.");
        describe_counter!(TASK_RUNS, "Runs of periodic tasks, by task and outcome.");
        describe_counter!(
            MAILS,
            "Attempts to deliver a mail, by outcome: sent, failed (will be repeated), dead (given up)."
        );
        describe_gauge!(OUTBOX, "Mails that wait, and mails that were given up and are still kept, by state.");
        describe_counter!(
            REQUEST_LOGS_DROPPED,
            "Requests that are missing in what tenants see of theirs, because there were too many at once."
        );
        describe_gauge!(OUTBOX_OLDEST, "Age of the oldest mail that waits.");
        handle
    })
}

/// The text of `/metrics`.
#[must_use]
pub fn render() -> String {
    install().render()
}

/// Enters what has been measured since the last time into the histograms. Until then each request takes a few bytes of memory, whether
/// somebody looks at `/metrics` or not.
pub fn sum_up() {
    install().run_upkeep();
}

pub fn request(route: Arc<str>, method: Option<&Method>, status: u16, took: Duration) {
    // a client may invent methods; a label may not
    let method = match method {
        Some(&Method::GET) => "GET",
        Some(&Method::HEAD) => "HEAD",
        Some(&Method::POST) => "POST",
        Some(&Method::PATCH) => "PATCH",
        Some(&Method::PUT) => "PUT",
        Some(&Method::DELETE) => "DELETE",
        _ => "other",
    };
    let route = SharedString::from_shared(route);
    counter!(REQUESTS, "route" => route.clone(), "method" => method, "status" => status.to_string()).increment(1);
    histogram!(REQUEST_SECONDS, "route" => route).record(took.as_secs_f64());
}

/// `verdict`: `allow`, `challenge`, `block`.
pub fn portal_verdict(verdict: &'static str) {
    counter!(PORTAL_VERDICTS, "verdict" => verdict).increment(1);
}

/// `kind`: `signup`, `login`, `password_reset`.
pub fn portal_throttled(kind: &'static str) {
    counter!(PORTAL_THROTTLED, "kind" => kind).increment(1);
}

pub fn password_queue(depth: usize) {
    gauge!(PASSWORD_QUEUE).set(u32::try_from(depth).unwrap_or(u32::MAX));
}

/// `pool`: `app`, `sys`.
pub fn pool(pool: &'static str, size: u32, idle: usize) {
    gauge!(POOL_CONNECTIONS, "pool" => pool, "state" => "open").set(size);
    gauge!(POOL_CONNECTIONS, "pool" => pool, "state" => "idle").set(u32::try_from(idle).unwrap_or(u32::MAX));
}

/// `limit`: `tenant`, `user`, `person`, `staff`, `throttle`.
pub fn rate_limited(limit: &'static str) {
    counter!(RATE_LIMITED, "limit" => limit).increment(1);
}

/// One more of something, until it is dropped.
#[derive(Debug)]
pub struct Counted(&'static str);

impl Counted {
    fn one_more(name: &'static str) -> Self {
        gauge!(name).increment(1);
        Self(name)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        gauge!(self.0).decrement(1);
    }
}

/// A request that is being served.
#[must_use]
pub fn serving() -> Counted {
    Counted::one_more(SERVING)
}

/// A server's agent that watches.
#[must_use]
pub fn node_stream() -> Counted {
    Counted::one_more(NODE_STREAMS)
}

pub fn node_alarm(kind: &'static str) {
    counter!(NODE_ALARMS, "kind" => kind).increment(1);
}

pub fn billed(bytes: u64, orphan_bytes: u64) {
    counter!(BILLED_BYTES).increment(bytes);
    counter!(ORPHAN_BYTES).increment(orphan_bytes);
}

pub fn task_run(task: &'static str, outcome: &'static str) {
    counter!(TASK_RUNS, "task" => task, "outcome" => outcome).increment(1);
}

pub fn request_logs_dropped(requests: u64) {
    counter!(REQUEST_LOGS_DROPPED).increment(requests);
}

pub fn mail(outcome: &'static str) {
    counter!(MAILS, "outcome" => outcome).increment(1);
}

pub fn outbox(waiting: i64, dead: i64, oldest_seconds: f64) {
    gauge!(OUTBOX, "state" => "waiting").set(u32::try_from(waiting).unwrap_or(u32::MAX));
    gauge!(OUTBOX, "state" => "dead").set(u32::try_from(dead).unwrap_or(u32::MAX));
    gauge!(OUTBOX_OLDEST).set(oldest_seconds);
}
