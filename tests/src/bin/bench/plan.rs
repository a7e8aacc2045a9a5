//! How much is done, and which measures are wanted.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::Options;
use crate::measures::{MEASURES, Measure, Stage};

/// The sizes that the demands are made for.
const PEERS: u32 = 65_000;
const ADDED: u32 = 5_000;
const HANDSHAKES: u32 = 5_000;

/// A size that a demand may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Peers,
    /// Peers, and those added while one is watched.
    Added,
    Handshakes,
}

pub(crate) struct Plan {
    pub(crate) repetitions: u32,
    /// Of each run of traffic.
    pub(crate) seconds: u32,
    pub(crate) peers: u32,
    pub(crate) added: u32,
    pub(crate) handshakes: u32,
    /// Adding and removing single peers.
    pub(crate) single_changes: u32,
    /// How long an idle engine is watched.
    pub(crate) idle: Duration,
    wanted: Vec<&'static Measure>,
}

impl Plan {
    pub(crate) fn of(options: &Options) -> Result<Self> {
        let usual = if options.quick {
            Self {
                repetitions: 1,
                seconds: 1,
                peers: 5_000,
                added: 1_000,
                handshakes: 1_000,
                single_changes: 50,
                idle: Duration::from_secs(2),
                wanted: Vec::new(),
            }
        } else {
            Self {
                repetitions: 3,
                seconds: 3,
                peers: PEERS,
                added: ADDED,
                handshakes: HANDSHAKES,
                single_changes: 200,
                idle: Duration::from_secs(8),
                wanted: Vec::new(),
            }
        };
        let plan = Self {
            repetitions: options.repetitions.unwrap_or(usual.repetitions),
            seconds: options.seconds.unwrap_or(usual.seconds),
            peers: options.peers.unwrap_or(usual.peers),
            handshakes: options.handshakes.unwrap_or(usual.handshakes),
            wanted: wanted(&options.only)?,
            ..usual
        };
        let added = plan.added.min(plan.peers);
        if plan.repetitions == 0 || plan.seconds == 0 || plan.peers == 0 || plan.handshakes == 0 {
            bail!("nothing would be measured: every size must be at least 1");
        }
        if plan.peers.saturating_add(plan.single_changes) > PEERS + 500 {
            bail!("an interface has room for 65,535 peers: --peers may be {PEERS} at most");
        }
        Ok(Self { added, ..plan })
    }

    pub(crate) fn is_full(&self, size: Size) -> bool {
        match size {
            Size::Peers => self.peers == PEERS,
            Size::Added => self.peers == PEERS && self.added == ADDED,
            Size::Handshakes => self.handshakes == HANDSHAKES,
        }
    }

    /// In the order of the table.
    pub(crate) fn measures(&self) -> &[&'static Measure] {
        &self.wanted
    }

    pub(crate) fn wants_stage(&self, stage: Stage) -> bool {
        self.wanted.iter().any(|measure| measure.stage == stage)
    }

    /// Whether any of these figures is asked for.
    pub(crate) fn wants(&self, figures: &[&str]) -> bool {
        self.wanted.iter().any(|measure| figures.contains(&measure.figure))
    }
}

fn wanted(only: &[String]) -> Result<Vec<&'static Measure>> {
    for name in only {
        Measure::named(name).with_context(|| {
            let names: Vec<&str> = MEASURES.iter().map(|measure| measure.name).collect();
            format!("{name} is no measure; these are: {}", names.join(", "))
        })?;
    }
    Ok(MEASURES.iter().filter(|measure| only.is_empty() || only.iter().any(|name| name == measure.name)).collect())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn plan(arguments: &[&str]) -> Result<Plan> {
        Plan::of(&Options::try_parse_from([&["cvault-bench", "dataplane"], arguments].concat())?)
    }

    #[test]
    fn a_full_run_is_judged_and_a_quick_one_is_not_where_size_matters() {
        let full = plan(&[]).unwrap();
        assert!(MEASURES.iter().all(|measure| measure.is_judged(&full)));
        let quick = plan(&["--quick", "--repetitions", "2"]).unwrap();
        assert_eq!((quick.repetitions, quick.seconds), (2, 1));
        assert!(!Measure::named("peers_set").unwrap().is_judged(&quick));
        assert!(!Measure::named("handshakes_lost").unwrap().is_judged(&quick));
        assert!(Measure::named("tcp_1_stream").unwrap().is_judged(&quick));
    }

    #[test]
    fn a_measure_can_be_taken_alone() {
        let one = plan(&["--only", "peer_add_p50", "--only", "idle_cpu"]).unwrap();
        assert!(one.wants_stage(Stage::Scale) && !one.wants_stage(Stage::Live));
        assert!(one.wants(&["idle_cpu"]) && !one.wants(&["peers_set_again"]));
        let error = plan(&["--only", "speed"]).err().unwrap().to_string();
        assert!(error.contains("speed is no measure") && error.contains("tcp_1_stream"), "{error}");
    }

    #[test]
    fn sizes_that_measure_nothing_or_do_not_fit_are_refused() {
        assert!(plan(&["--repetitions", "0"]).is_err());
        assert!(plan(&["--peers", "65536"]).is_err());
        assert_eq!(plan(&["--peers", "10"]).unwrap().added, 10);
    }
}
