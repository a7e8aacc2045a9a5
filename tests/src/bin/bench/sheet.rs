//! What was measured, by engine and figure, and what became of it: one row for each measure.

use std::collections::BTreeMap;

use cvault_tests::bench::{Better, Must, Row, median};

use crate::engine::Engine;
use crate::measures::Measure;
use crate::plan::Plan;

/// The figures of one engine in one stage and repetition.
#[derive(Default)]
pub(crate) struct Sheet {
    figures: Vec<(&'static str, f64)>,
    pub(crate) remarks: Vec<String>,
}

impl Sheet {
    pub(crate) fn put(&mut self, figure: &'static str, value: f64) {
        self.figures.push((figure, value));
    }

    pub(crate) fn remark(&mut self, text: String) {
        self.remarks.push(text);
    }
}

/// The figures of all repetitions.
#[derive(Default)]
pub(crate) struct Results {
    /// By the engine's place in the list of engines.
    figures: BTreeMap<(usize, &'static str), Vec<f64>>,
}

impl Results {
    pub(crate) fn add(&mut self, engine: usize, sheet: &Sheet) {
        for (figure, value) in &sheet.figures {
            self.figures.entry((engine, *figure)).or_default().push(*value);
        }
    }

    /// The median of the repetitions.
    pub(crate) fn figure(&self, engine: usize, figure: &'static str) -> Option<f64> {
        median(self.figures.get(&(engine, figure))?)
    }

    pub(crate) fn row(&self, measure: &Measure, engines: &[Engine], plan: &Plan) -> Row {
        let of = |wanted: &dyn Fn(&Engine) -> bool| -> Vec<(String, f64)> {
            let places = engines.iter().enumerate().filter(|(_, engine)| wanted(engine));
            places
                .filter_map(|(place, engine)| Some((engine.name.clone(), self.figure(place, measure.figure)?)))
                .collect()
        };
        let ours = of(&Engine::is_ours).first().map(|(_, figure)| *figure);
        let best = best(of(&|engine| is_compared(measure, engine)), measure.better);
        let (peer, peer_figure) = best.map_or((None, None), |(name, figure)| (Some(name), Some(figure)));
        Row {
            measure: measure.name.to_owned(),
            unit: measure.unit.to_owned(),
            ours,
            peer,
            peer_figure,
            must: measure.must,
            judged: measure.is_judged(plan),
        }
    }

    /// Why a row is not what it should be, if so: a measurement that gave nothing.
    pub(crate) fn broken(measure: &Measure, row: &Row, engines: &[Engine]) -> Option<String> {
        if row.ours.is_none() {
            return Some(format!("{}: ours was not measured", measure.name));
        }
        let needs_peer = matches!(measure.must, Some(Must::TimesAtLeast(_) | Must::TimesAtMost(_)));
        let has_peer = engines.iter().any(|engine| is_compared(measure, engine));
        (needs_peer && has_peer && row.peer_figure.is_none())
            .then(|| format!("{}: no peer could be measured", measure.name))
    }
}

fn is_compared(measure: &Measure, engine: &Engine) -> bool {
    !engine.is_ours() && measure.against.is_none_or(|program| engine.program == program)
}

fn best(figures: Vec<(String, f64)>, better: Better) -> Option<(String, f64)> {
    figures.into_iter().reduce(|best, next| {
        let is_better = match better {
            Better::More => next.1 > best.1,
            Better::Less => next.1 < best.1,
        };
        if is_better { next } else { best }
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::Options;
    use crate::engine::Program;

    fn engines() -> Vec<Engine> {
        [("cvault", Program::CVault), ("wireguard-go 2", Program::WireguardGo), ("boringtun-cli 1", Program::Boringtun)]
            .into_iter()
            .map(|(name, program)| Engine { name: name.to_owned(), program, path: String::new(), extra: &[] })
            .collect()
    }

    fn results(figures: &[(usize, &'static str, f64)]) -> Results {
        let mut results = Results::default();
        for (engine, figure, value) in figures {
            let mut sheet = Sheet::default();
            sheet.put(figure, *value);
            results.add(*engine, &sheet);
        }
        results
    }

    fn plan() -> Plan {
        Plan::of(&Options::parse_from(["cvault-bench", "dataplane"])).unwrap()
    }

    #[test]
    fn ours_is_compared_with_the_best_median_or_with_the_program_that_is_named() {
        let tcp = "tcp_1_stream";
        let results =
            results(&[(0, tcp, 3900.0), (0, tcp, 100.0), (0, tcp, 4200.0), (1, tcp, 3000.0), (2, tcp, 600.0)]);
        let row = results.row(Measure::named(tcp).unwrap(), &engines(), &plan());
        assert_eq!((row.ours, row.peer.as_deref(), row.met()), (Some(3900.0), Some("wireguard-go 2"), Some(true)));
        let row = results.row(Measure::named("tcp_1_stream_boringtun").unwrap(), &engines(), &plan());
        assert_eq!((row.peer.as_deref(), row.ratio(), row.met()), (Some("boringtun-cli 1"), Some(6.5), Some(true)));
    }

    #[test]
    fn the_best_of_a_cost_is_the_least() {
        let results = results(&[(0, "peers_set", 0.7), (1, "peers_set", 7.4), (2, "peers_set", 4.7)]);
        let row = results.row(Measure::named("peers_set").unwrap(), &engines(), &plan());
        assert_eq!((row.peer_figure, row.met()), (Some(4.7), Some(false)));
    }

    #[test]
    fn a_target_that_is_not_met_is_no_broken_measurement_and_a_missing_figure_is() {
        let (measure, engines) = (Measure::named("tcp_4_streams").unwrap(), engines());
        let slow = results(&[(0, "tcp_4_streams", 1.0), (1, "tcp_4_streams", 9.0)]);
        assert_eq!(Results::broken(measure, &slow.row(measure, &engines, &plan()), &engines), None);
        let alone = results(&[(0, "tcp_4_streams", 1.0)]);
        let row = alone.row(measure, &engines, &plan());
        assert!(Results::broken(measure, &row, &engines).unwrap().contains("no peer"));
        assert_eq!(Results::broken(measure, &row, &engines[..1]), None, "no peer was found");
        let row = results(&[]).row(measure, &engines, &plan());
        assert!(Results::broken(measure, &row, &engines).unwrap().contains("ours"));
    }
}
