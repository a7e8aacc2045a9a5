//! iperf3 through the tunnel, between the two ends of a pair.

use anyhow::{Context, Result, bail};
use cvault_tests::lab::{Machine, Process, eventually};
use serde_json::Value;

use crate::config::INNER_SERVER;

/// A server that waits on the server's end of the tunnel, until its machine is off.
pub(crate) struct Iperf<'m> {
    client: &'m Machine,
    server: Process,
}

/// TCP of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stream {
    pub(crate) bits: f64,
    pub(crate) seconds: f64,
}

impl Stream {
    pub(crate) fn mbit_per_second(&self) -> f64 {
        self.bits / self.seconds / 1e6
    }
}

/// UDP of one run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Datagrams {
    pub(crate) sent: f64,
    pub(crate) lost: f64,
}

impl<'m> Iperf<'m> {
    pub(crate) fn start(server: &Machine, client: &'m Machine) -> Result<Self> {
        let server = server.spawn("iperf3", "iperf3", ["-s", "-B", INNER_SERVER], [])?;
        Ok(Self { client, server })
    }

    /// From the client unless `extra` says `-R`.
    pub(crate) fn tcp(&self, seconds: u32, extra: &[&str]) -> Result<Stream> {
        stream(&self.run(seconds, extra)?).context("iperf3 gave no figures")
    }

    pub(crate) fn udp(&self, seconds: u32, rate: &str, bytes: &str) -> Result<Datagrams> {
        datagrams(&self.run(seconds, &["-u", "-b", rate, "-l", bytes])?).context("iperf3 gave no figures")
    }

    /// The server may not listen yet, or be busy with the end of the last run.
    fn run(&self, seconds: u32, extra: &[&str]) -> Result<Value> {
        let (time, limit) = (seconds.to_string(), (seconds + 30).to_string());
        eventually("iperf3 runs", 5, || {
            self.server.check_running()?;
            let mut command = self.client.command("timeout");
            command.args([&limit, "iperf3", "-J", "-c", INNER_SERVER, "-t", &time]).args(extra);
            let output = command.output()?;
            let report: Value = serde_json::from_slice(&output.stdout)
                .with_context(|| format!("iperf3: {} {}", output.status, String::from_utf8_lossy(&output.stderr)))?;
            match report["error"].as_str() {
                Some(error) => bail!("iperf3: {error}"),
                None => Ok(report),
            }
        })
    }
}

fn stream(report: &Value) -> Option<Stream> {
    let sum = &report["end"]["sum_received"];
    let stream = Stream { bits: sum["bytes"].as_f64()? * 8.0, seconds: sum["seconds"].as_f64()? };
    (stream.bits > 0.0 && stream.seconds > 0.0).then_some(stream)
}

fn datagrams(report: &Value) -> Option<Datagrams> {
    let sum = &report["end"]["sum"];
    let datagrams = Datagrams { sent: sum["packets"].as_f64()?, lost: sum["lost_packets"].as_f64()? };
    (datagrams.sent > datagrams.lost).then_some(datagrams)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_receivers_count_is_what_counts() {
        let report = json!({"end": {"sum_sent": {"bytes": 9, "seconds": 1}, "sum_received": {"bytes": 250_000_000, "seconds": 2.0}}});
        assert_eq!(stream(&report).unwrap().mbit_per_second(), 1000.0);
        let report = json!({"end": {"sum": {"packets": 52_000, "lost_packets": 52}}});
        assert_eq!(datagrams(&report), Some(Datagrams { sent: 52_000.0, lost: 52.0 }));
    }

    #[test]
    fn a_run_that_carried_nothing_has_no_figures() {
        assert_eq!(stream(&json!({"end": {"sum_received": {"bytes": 0, "seconds": 2.0}}})), None);
        assert_eq!(datagrams(&json!({"end": {"sum": {"packets": 10, "lost_packets": 10}}})), None);
        assert_eq!(stream(&json!({})), None);
    }
}
