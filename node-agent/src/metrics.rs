//! Every metric of the control process; the texts here are the help texts. No peer and no tenant appears in a label.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use crate::uapi::DeviceStatus;

const APPLY_SECONDS: &str = "cvault_agent_apply_seconds";
/// One peer takes about 200 µs, 65,000 about half a second.
const APPLY_BUCKETS: [f64; 9] = [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0, 5.0];

/// Serves `/metrics` at `address`, in the background, until the process ends.
pub(crate) async fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("metrics cannot be served at {address}: choose another --metrics-listen, or `off`"))?;
    let handle = install()?;
    let upkeep = handle.clone();
    let router = axum::Router::new().route("/metrics", axum::routing::get(move || std::future::ready(handle.render())));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "metrics are no longer served");
        }
    });
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    });
    Ok(())
}

fn install() -> anyhow::Result<PrometheusHandle> {
    let matcher = metrics_exporter_prometheus::Matcher::Full(APPLY_SECONDS.to_owned());
    let recorder = PrometheusBuilder::new().set_buckets_for_metric(matcher, &APPLY_BUCKETS)?.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).context("metrics are set up already")?;
    describe_gauge!("cvault_agent_connected", "1 while the control plane's stream is open");
    describe_gauge!("cvault_agent_revision", "Revision of the desired state that runs");
    describe_gauge!("cvault_agent_peers", "Peers that run");
    describe_gauge!("cvault_agent_spool_bytes", "Usage windows on disk that wait for an acknowledgement");
    describe_counter!("cvault_agent_changes_total", "Changes of desired state that were applied");
    describe_counter!("cvault_agent_nacks_total", "Changes of desired state that were refused");
    describe_counter!("cvault_agent_reports_total", "Reports by outcome");
    describe_counter!("cvault_agent_tunnel_restarts_total", "Times the tunnel process was started again");
    describe_counter!("cvault_agent_strangers_total", "Counter readings that belong to no known device");
    describe_gauge!("cvault_tunnel_handshakes", "Handshakes of this tunnel process");
    describe_gauge!("cvault_tunnel_dropped_packets", "Packets this tunnel process dropped, by reason");
    describe_gauge!("cvault_tunnel_offload", "1 while the kernel offload is used, by name");
    describe_gauge!(
        "cvault_tunnel_udp_gso_refused_paths",
        "Paths to which datagrams leave singly, as they take no runs"
    );
    describe_gauge!(
        "cvault_tunnel_socket_drops",
        "Datagrams the kernel dropped before this tunnel process received them"
    );
    describe_histogram!(APPLY_SECONDS, "Time to apply one change to the engine");
    Ok(handle)
}

pub(crate) fn connected(yes: bool) {
    gauge!("cvault_agent_connected").set(if yes { 1.0 } else { 0.0 });
}

#[expect(clippy::cast_precision_loss, reason = "a metric is a float by definition")]
pub(crate) fn applied(revision: u64, peers: usize, took: Duration) {
    gauge!("cvault_agent_revision").set(revision as f64);
    gauge!("cvault_agent_peers").set(peers as f64);
    counter!("cvault_agent_changes_total").increment(1);
    histogram!(APPLY_SECONDS).record(took.as_secs_f64());
}

pub(crate) fn nacked() {
    counter!("cvault_agent_nacks_total").increment(1);
}

pub(crate) fn reported(outcome: &'static str) {
    counter!("cvault_agent_reports_total", "outcome" => outcome).increment(1);
}

pub(crate) fn tunnel_restarted() {
    counter!("cvault_agent_tunnel_restarts_total").increment(1);
}

pub(crate) fn strangers(count: usize) {
    counter!("cvault_agent_strangers_total").increment(count as u64);
}

#[expect(clippy::cast_precision_loss, reason = "a metric is a float by definition")]
pub(crate) fn tunnel(status: &DeviceStatus, spool_bytes: u64) {
    gauge!("cvault_agent_spool_bytes").set(spool_bytes as f64);
    gauge!("cvault_tunnel_handshakes").set(status.handshakes as f64);
    for (reason, count) in &status.drops {
        gauge!("cvault_tunnel_dropped_packets", "reason" => reason.clone()).set(*count as f64);
    }
    for (name, on) in &status.offloads {
        gauge!("cvault_tunnel_offload", "name" => name.clone()).set(*on as f64);
    }
    gauge!("cvault_tunnel_socket_drops").set(status.socket_drops as f64);
    gauge!("cvault_tunnel_udp_gso_refused_paths").set(status.udp_gso_refused_paths as f64);
}
