//! Every measure of the suite, with what it must be. The demands are the data plane's own targets; where one is a multiple,
//! it is of the best peer in the same run.

use cvault_tests::bench::{Better, Must};

use crate::engine::{Engine, Program};
use crate::plan::{Plan, Size};

pub(crate) struct Measure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    /// In words, for the table.
    pub(crate) what: &'static str,
    /// What a stage calls the figure: several measures may look at one.
    pub(crate) figure: &'static str,
    pub(crate) better: Better,
    /// None: it is shown, and nothing is demanded.
    pub(crate) must: Option<Must>,
    /// Only this program is compared with.
    pub(crate) against: Option<Program>,
    pub(crate) stage: Stage,
    /// The size that the demand is made for.
    pub(crate) size: Option<Size>,
}

/// What is done in one go with one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Throughput,
    /// What a second worker costs, or brings where there are more cores: ours beside itself.
    Workers,
    Scale,
    Live,
    Handshakes,
    Restart,
}

pub(crate) const STAGES: [Stage; 6] =
    [Stage::Throughput, Stage::Workers, Stage::Scale, Stage::Live, Stage::Handshakes, Stage::Restart];

impl Stage {
    /// Whether there is anything to do with this engine.
    pub(crate) fn concerns(self, engine: &Engine) -> bool {
        match self {
            Self::Throughput | Self::Scale | Self::Live | Self::Handshakes => true,
            // Nobody else has workers to be counted. Without state of their own others wait for the other side's timers
            // after a restart, a quarter of a minute.
            Self::Workers | Self::Restart => engine.is_ours(),
        }
    }
}

pub(crate) const MEASURES: [Measure; 26] = [
    Measure {
        against: Some(Program::Boringtun),
        must: Some(Must::TimesAtLeast(6.0)),
        ..throughput("tcp_1_stream_boringtun", "TCP, 1 stream, beside boringtun-cli", "tcp_1_stream")
    },
    throughput("tcp_1_stream", "TCP, 1 stream", "tcp_1_stream"),
    throughput("tcp_4_streams", "TCP, 4 streams", "tcp_4_streams"),
    throughput("tcp_1_stream_reverse", "TCP, 1 stream, reverse", "tcp_1_stream_reverse"),
    Measure { unit: "Gbit/CPU-s", ..throughput("receive_per_cpu", "daemon's CPU, receiving", "receive_per_cpu") },
    Measure { unit: "Gbit/CPU-s", ..throughput("send_per_cpu", "daemon's CPU, sending", "send_per_cpu") },
    Measure {
        unit: "us",
        better: Better::Less,
        must: Some(Must::TimesAtMost(1.0)),
        ..throughput("udp_cpu_per_packet", "server's CPU per packet, UDP 1200 B at 500 Mbit/s", "udp_cpu_per_packet")
    },
    two_workers("tcp_1_stream_2_workers", "TCP, 1 stream, ours with 2 workers"),
    two_workers("tcp_4_streams_2_workers", "TCP, 4 streams, ours with 2 workers"),
    Measure {
        unit: "us",
        better: Better::Less,
        ..two_workers(
            "udp_cpu_per_packet_2_workers",
            "server's CPU per packet, UDP 1200 B at 500 Mbit/s, ours with 2 workers",
        )
    },
    scale("peers_set", "s", "all peers in one set", 0.5),
    scale("peers_set_again", "s", "the same set again", 0.115),
    scale("peer_add_p50", "ms", "add one more, p50", 0.1),
    scale("peer_add_p99", "ms", "add one more, p99", 1.0),
    scale("peer_remove_p50", "ms", "remove one, p50", 0.05),
    scale("idle_cpu", "% of a core", "CPU when idle, all peers with endpoints", 0.1),
    scale("idle_peer_memory", "KB", "memory of an idle peer", 1.0),
    scale("counters_read", "ms", "read all counters, ours in process", 10.0),
    Measure {
        stage: Stage::Live,
        size: Some(Size::Added),
        ..scale("peers_add_stall", "ms", "longest ping while peers are added, above none", 5.0)
    },
    Measure {
        stage: Stage::Live,
        better: Better::More,
        must: Some(Must::AtLeast(95.0)),
        ..scale("live_peer_throughput", "% of at 1 peer", "a live peer's TCP among all idle peers", 95.0)
    },
    Measure {
        must: Some(Must::AtLeast(6000.0)),
        ..handshakes("handshakes_per_cpu", "per CPU-s", "handshakes, server's CPU")
    },
    Measure {
        must: Some(Must::TimesAtLeast(1.2)),
        ..handshakes("handshakes_end_to_end", "per s", "handshakes, end to end")
    },
    Measure { better: Better::Less, ..handshakes("handshakes_lost", "lost", "initiations that had to be repeated") },
    Measure { better: Better::Less, ..handshakes("handshakes_cookies", "cookies", "cookies asked for") },
    Measure {
        better: Better::Less,
        must: Some(Must::AtMost(13.0)),
        ..handshakes("live_peer_memory", "KB", "memory of a live peer")
    },
    Measure {
        stage: Stage::Restart,
        size: None,
        ..scale(
            "restart_gap_p99",
            "ms",
            "100 live tunnels, killed and started again: longest silence, p99, ours",
            1000.0,
        )
    },
];

/// More is better, and it must be well above the best.
const fn throughput(name: &'static str, what: &'static str, figure: &'static str) -> Measure {
    Measure {
        name,
        unit: "Mbit/s",
        what,
        figure,
        better: Better::More,
        must: Some(Must::TimesAtLeast(1.3)),
        against: None,
        stage: Stage::Throughput,
        size: None,
    }
}

/// Of [`Stage::Workers`].
const fn two_workers(name: &'static str, what: &'static str) -> Measure {
    Measure { must: None, stage: Stage::Workers, ..throughput(name, what, name) }
}

/// Less is better, and there is a limit.
const fn scale(name: &'static str, unit: &'static str, what: &'static str, limit: f64) -> Measure {
    Measure {
        name,
        unit,
        what,
        figure: name,
        better: Better::Less,
        must: Some(Must::AtMost(limit)),
        against: None,
        stage: Stage::Scale,
        size: Some(Size::Peers),
    }
}

/// None may be lost.
const fn handshakes(name: &'static str, unit: &'static str, what: &'static str) -> Measure {
    Measure {
        name,
        unit,
        what,
        figure: name,
        better: Better::More,
        must: Some(Must::AtMost(0.0)),
        against: None,
        stage: Stage::Handshakes,
        size: Some(Size::Handshakes),
    }
}

impl Measure {
    /// Whether this run has the size that the demand is made for.
    pub(crate) fn is_judged(&self, plan: &Plan) -> bool {
        self.size.is_none_or(|size| plan.is_full(size))
    }

    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        MEASURES.iter().find(|measure| measure.name == name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_measure_has_a_name_of_its_own_and_every_stage_has_measures() {
        let names: BTreeSet<&str> = MEASURES.iter().map(|measure| measure.name).collect();
        assert_eq!(names.len(), MEASURES.len());
        assert!(STAGES.iter().all(|stage| MEASURES.iter().any(|measure| measure.stage == *stage)));
        assert_eq!(Measure::named("peers_set").unwrap().must, Some(Must::AtMost(0.5)));
        assert!(Measure::named("nothing").is_none());
    }
}
