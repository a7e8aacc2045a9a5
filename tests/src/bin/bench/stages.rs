//! The things that are done with an engine. Each builds machines of its own and leaves nothing.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use cvault_dataplane::counters::{CounterReader, FILE_NAME};
use cvault_tests::bench::{SOURCES, median, quantile};
use cvault_tests::lab::{CLIENT_V4, Machine, Pair, SERVER_V4, Signal, binary, eventually};
use serde_json::Value;

use crate::config::{self, CHANGE, INNER_CLIENT, INNER_SERVER, PORT};
use crate::daemon::{Daemon, SOON};
use crate::engine::Engine;
use crate::iperf::Iperf;
use crate::measures::Stage;
use crate::plan::Plan;
use crate::restart;
use crate::sheet::Sheet;

/// Some engines read their interface's MTU once a second.
const SETTLE: Duration = Duration::from_millis(1100);
/// Of all peers in one change.
const MANY: Duration = Duration::from_secs(120);
/// Of all peers once more: engines that look through every route for each take minutes.
const AGAIN: Duration = Duration::from_secs(20);
const READS: u32 = 11;
/// Handshakes under way at the same time.
const WINDOW: &str = "32";
/// Runs of traffic before and after a change: single ones are up to a fifth apart with nothing changed.
const RUNS: u32 = 3;
/// Each run of traffic with two workers: nothing depends on its figures, and they are taken for ours alone.
const SECONDS_OF_TWO: u32 = 2;
/// Above this, the cost of a packet is that of an overload.
const LOSS: f64 = 0.05;

impl Stage {
    /// What it has measured before it fails stays in the sheet.
    pub(crate) fn run(self, engine: &Engine, plan: &Plan, sheet: &mut Sheet) -> Result<()> {
        match self {
            Self::Throughput => throughput(engine, plan, sheet),
            Self::Workers => workers(engine, plan, sheet),
            Self::Scale => scale(engine, plan, sheet),
            Self::Live => live(engine, plan, sheet),
            Self::Handshakes => handshakes(engine, plan, sheet),
            Self::Restart => restart::restart(sheet),
        }
    }
}

/// The same engine at both ends.
fn throughput(engine: &Engine, plan: &Plan, sheet: &mut Sheet) -> Result<()> {
    let pair = Pair::build()?;
    let (server, client) = tunnel(engine, &pair)?;
    let iperf = Iperf::start(&pair.server, &pair.client)?;
    if plan.wants(&["tcp_1_stream", "receive_per_cpu", "send_per_cpu"]) {
        let (received, sent) = (server.cpu_from_now()?, client.cpu_from_now()?);
        let stream = iperf.tcp(plan.seconds, &[])?;
        sheet.put("tcp_1_stream", stream.mbit_per_second());
        sheet.put("receive_per_cpu", stream.bits / 1e9 / received()?);
        sheet.put("send_per_cpu", stream.bits / 1e9 / sent()?);
    }
    if plan.wants(&["tcp_4_streams"]) {
        sheet.put("tcp_4_streams", iperf.tcp(plan.seconds, &["-P", "4"])?.mbit_per_second());
    }
    if plan.wants(&["tcp_1_stream_reverse"]) {
        sheet.put("tcp_1_stream_reverse", iperf.tcp(plan.seconds, &["-R"])?.mbit_per_second());
    }
    if plan.wants(&["udp_cpu_per_packet"]) {
        udp_cpu_per_packet("udp_cpu_per_packet", &server, &iperf, plan.seconds, sheet)?;
    }
    server.check_running()
}

/// The same engine at both ends, each with two workers.
fn workers(engine: &Engine, plan: &Plan, sheet: &mut Sheet) -> Result<()> {
    let pair = Pair::build()?;
    let (server, _client) = tunnel(&engine.with_two_workers(), &pair)?;
    let iperf = Iperf::start(&pair.server, &pair.client)?;
    let seconds = plan.seconds.min(SECONDS_OF_TWO);
    if plan.wants(&["tcp_1_stream_2_workers"]) {
        sheet.put("tcp_1_stream_2_workers", iperf.tcp(seconds, &[])?.mbit_per_second());
    }
    if plan.wants(&["tcp_4_streams_2_workers"]) {
        sheet.put("tcp_4_streams_2_workers", iperf.tcp(seconds, &["-P", "4"])?.mbit_per_second());
    }
    if plan.wants(&["udp_cpu_per_packet_2_workers"]) {
        udp_cpu_per_packet("udp_cpu_per_packet_2_workers", &server, &iperf, seconds, sheet)?;
    }
    server.check_running()
}

/// The server's cost of a packet that arrives.
fn udp_cpu_per_packet(
    figure: &'static str,
    server: &Daemon,
    iperf: &Iperf,
    seconds: u32,
    sheet: &mut Sheet,
) -> Result<()> {
    let cpu = server.cpu_from_now()?;
    let datagrams = iperf.udp(seconds, "500M", "1200")?;
    sheet.put(figure, cpu()? * 1e6 / (datagrams.sent - datagrams.lost));
    if datagrams.lost > datagrams.sent * LOSS {
        let percent = datagrams.lost * 100.0 / datagrams.sent;
        sheet.remark(format!("UDP at 500 Mbit/s: {percent:.0} % of the packets were lost"));
    }
    Ok(())
}

/// Many idle peers on one interface.
fn scale(engine: &Engine, plan: &Plan, sheet: &mut Sheet) -> Result<()> {
    let pair = Pair::build()?;
    let server = Daemon::start(engine, &pair.server, INNER_SERVER)?;
    let empty = server.resident_bytes()?;
    let took = server.set(&config::idle_peers(&config::server_alone(), 0..plan.peers), MANY)?;
    sheet.put("peers_set", took.as_secs_f64());
    pause(SETTLE);
    sheet.put("idle_peer_memory", (server.resident_bytes()? - empty) / 1000.0 / f64::from(plan.peers));
    if plan.wants(&["idle_cpu"]) {
        let cpu = server.cpu_from_now()?;
        pause(plan.idle);
        sheet.put("idle_cpu", cpu()? * 100.0 / plan.idle.as_secs_f64());
    }
    if plan.wants(&["counters_read"]) {
        let mut reads = Vec::new();
        for _ in 0..READS {
            reads.push(milliseconds(if engine.is_ours() { read_counters(&server, plan)? } else { server.get()? }));
        }
        put_quantile(sheet, "counters_read", &reads, 50)?;
    }
    let singles = plan.peers..plan.peers + plan.single_changes;
    if plan.wants(&["peer_add_p50", "peer_add_p99", "peer_remove_p50"]) {
        let client = server.beside()?;
        let adds = each(singles.clone(), |number| client.set(&config::idle_peers(CHANGE, number..number + 1), SOON))?;
        put_quantile(sheet, "peer_add_p50", &adds, 50)?;
        put_quantile(sheet, "peer_add_p99", &adds, 99)?;
        let removals = each(singles, |number| client.set(&config::removal(number), SOON))?;
        put_quantile(sheet, "peer_remove_p50", &removals, 50)?;
    }
    if plan.wants(&["peers_set_again"]) {
        let took = server.set(&config::idle_peers(CHANGE, 0..plan.peers), AGAIN).context("the same set again")?;
        sheet.put("peers_set_again", took.as_secs_f64());
    }
    server.check_running()
}

/// One live peer beside many idle ones.
fn live(engine: &Engine, plan: &Plan, sheet: &mut Sheet) -> Result<()> {
    let pair = Pair::build()?;
    let (server, _client) = tunnel(engine, &pair)?;
    let traffic = if plan.wants(&["live_peer_throughput"]) {
        let iperf = Iperf::start(&pair.server, &pair.client)?;
        let alone = usual_tcp(&iperf, plan.seconds)?;
        Some((iperf, alone))
    } else {
        None
    };
    if plan.wants(&["peers_add_stall"]) {
        let undisturbed = longest_ping(&pair.client, "ping-undisturbed", sheet, || {
            // About as long as a good engine takes: over a longer time the longest would be longer by chance.
            pause(SETTLE / 8);
            Ok(())
        })?;
        let added = config::idle_peers(CHANGE, 0..plan.added);
        let disturbed = longest_ping(&pair.client, "ping-disturbed", sheet, || server.set(&added, MANY).map(drop))?;
        sheet.put("peers_add_stall", (disturbed - undisturbed).max(0.0));
    }
    if let Some((iperf, alone)) = traffic {
        // Keys that are new to every engine: some refuse to be told of a peer twice.
        let first = if plan.wants(&["peers_add_stall"]) { plan.added } else { 0 };
        if first < plan.peers {
            server.set(&config::idle_peers(CHANGE, first..plan.peers), MANY)?;
        }
        pause(SETTLE);
        let among = usual_tcp(&iperf, plan.seconds)?;
        sheet.put("live_peer_throughput", among * 100.0 / alone);
    }
    server.check_running()
}

/// The median of [`RUNS`] runs of one stream, Mbit/s.
fn usual_tcp(iperf: &Iperf, seconds: u32) -> Result<f64> {
    let runs: Vec<f64> = (0..RUNS).map(|_| Ok(iperf.tcp(seconds, &[])?.mbit_per_second())).collect::<Result<_>>()?;
    median(&runs).context("nothing was run")
}

/// Every peer shakes hands once, from an address of its own.
fn handshakes(engine: &Engine, plan: &Plan, sheet: &mut Sheet) -> Result<()> {
    let pair = Pair::build()?;
    pair.server.sh(&format!("ip route add {SOURCES} via {CLIENT_V4}"))?;
    pair.client.sh(&format!("ip route add local {SOURCES} dev lo"))?;
    let server = Daemon::start(engine, &pair.server, INNER_SERVER)?;
    let empty = server.resident_bytes()?;
    server.set(&config::server_of_initiators(plan.handshakes), MANY)?;
    pause(SETTLE);
    let cpu = server.cpu_from_now()?;
    let (at, count) = (format!("{SERVER_V4}:{PORT}"), plan.handshakes.to_string());
    let load = ["--server", &at, "--count", &count, "--window", WINDOW, "--confirm"];
    let report: Value = serde_json::from_str(&pair.client.run(&binary("cvault-wgload")?, load)?)?;
    let used = cpu()?;
    let figure = |name: &str| report[name].as_f64().with_context(|| format!("cvault-wgload gave no {name}"));
    let (answered, lost) = (figure("answered")?, figure("resent")?);
    if answered < f64::from(plan.handshakes) || figure("confirmed")? < answered {
        bail!("of {} handshakes {answered} were answered, {} confirmed", plan.handshakes, figure("confirmed")?);
    }
    sheet.put("handshakes_per_cpu", answered / used);
    sheet.put("handshakes_end_to_end", answered / figure("elapsed_s")?);
    sheet.put("handshakes_lost", lost);
    sheet.put("handshakes_cookies", figure("cookies")?);
    pause(SETTLE);
    sheet.put("live_peer_memory", (server.resident_bytes()? - empty) / 1000.0 / f64::from(plan.handshakes));
    server.check_running()
}

/// A tunnel with one live peer, carrying pings.
fn tunnel<'p>(engine: &Engine, pair: &'p Pair) -> Result<(Daemon<'p>, Daemon<'p>)> {
    let server = Daemon::start(engine, &pair.server, INNER_SERVER)?;
    server.set(&config::server(), SOON)?;
    let client = Daemon::start(engine, &pair.client, INNER_CLIENT)?;
    client.set(&config::client(), SOON)?;
    pause(SETTLE);
    eventually("an echo comes through the tunnel", 10, || {
        pair.client.run("ping", ["-n", "-q", "-c1", "-W1", INNER_SERVER]).map(drop)
    })?;
    Ok((server, client))
}

/// The longest round trip of a ping each 2 ms while `change` is made, milliseconds.
fn longest_ping(client: &Machine, name: &str, sheet: &mut Sheet, change: impl FnOnce() -> Result<()>) -> Result<f64> {
    let ping = client.spawn(name, "ping", ["-n", "-q", "-i", "0.002", INNER_SERVER], [])?;
    pause(SETTLE / 4);
    change()?;
    pause(SETTLE / 4);
    ping.end(client, Signal::Interrupt)?;
    let text = ping.last_lines(10);
    let summary = Pings::read(&text).with_context(|| format!("ping said: {text}"))?;
    if summary.lost > 0 {
        sheet.remark(format!("{} pings were lost while peers were added or just before", summary.lost));
    }
    Ok(summary.longest_ms)
}

#[derive(Debug, PartialEq)]
struct Pings {
    lost: u64,
    longest_ms: f64,
}

impl Pings {
    /// From the summary of iputils. The last echo may still be under way when it is interrupted.
    fn read(text: &str) -> Option<Self> {
        let counts = text.lines().find(|line| line.contains(" packets transmitted"))?;
        let mut numbers = counts.split(", ").map(|part| part.split(' ').next()?.parse::<u64>().ok());
        let (sent, received) = (numbers.next()??, numbers.next()??);
        let times = text.lines().find_map(|line| line.strip_prefix("rtt ")?.split_once(" = "))?.1;
        let longest_ms = times.split('/').nth(2)?.parse().ok()?;
        Some(Self { lost: sent.saturating_sub(received + 1), longest_ms })
    }
}

/// As the control process reads them: from memory shared with the engine.
fn read_counters(server: &Daemon, plan: &Plan) -> Result<Duration> {
    let reader = CounterReader::open(&server.state_dir().join(FILE_NAME))?;
    let started = std::time::Instant::now();
    let read = reader.peers().map(std::hint::black_box).count();
    let took = started.elapsed();
    if read != usize::try_from(plan.peers)? {
        bail!("the counter file has {read} peers of {}", plan.peers);
    }
    Ok(took)
}

/// The times of a change for each number, milliseconds.
fn each(numbers: std::ops::Range<u32>, mut change: impl FnMut(u32) -> Result<Duration>) -> Result<Vec<f64>> {
    numbers.map(|number| change(number).map(milliseconds)).collect()
}

fn put_quantile(sheet: &mut Sheet, figure: &'static str, values: &[f64], percent: usize) -> Result<()> {
    sheet.put(figure, quantile(values, percent).context("nothing was timed")?);
    Ok(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Time that is measured or that an engine needs; no condition tells when it has passed.
fn pause(time: Duration) {
    std::thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_ping_is_read() {
        let text = "PING 10.99.0.1 (10.99.0.1) 56(84) bytes of data.\n\n--- 10.99.0.1 ping statistics ---\n\
                    812 packets transmitted, 809 received, 0.369458% packet loss, time 1702ms\n\
                    rtt min/avg/max/mdev = 0.061/0.115/22.403/0.018 ms, pipe 2\n";
        assert_eq!(Pings::read(text), Some(Pings { lost: 2, longest_ms: 22.403 }));
        let text = "812 packets transmitted, 0 received, 100% packet loss, time 1702ms\n";
        assert_eq!(Pings::read(text), None);
    }
}
