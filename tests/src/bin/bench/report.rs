//! The rows as a table for people, as lines for scripts, and as a file for `docs/perf/`.

use cvault_tests::bench::Row;

use crate::engine::Engine;
use crate::host::Host;
use crate::plan::Plan;
use crate::sheet::Results;

const HEAD: [&str; 7] = ["measure", "unit", "ours", "best peer", "ratio", "must", "met"];

/// Everything that is to be told of a run.
pub(crate) struct Report<'r> {
    pub(crate) plan: &'r Plan,
    pub(crate) engines: &'r [Engine],
    pub(crate) results: &'r Results,
    pub(crate) rows: &'r [Row],
    pub(crate) remarks: &'r [String],
}

impl Report<'_> {
    pub(crate) fn lines(&self) -> String {
        self.rows.iter().map(|row| format!("{}\n", row.to_json())).collect()
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!("{}\n{}", aligned(&self.table()), aligned(&self.every_engine()));
        for remark in self.remarks {
            text.push_str(&format!("\n  {remark}"));
        }
        text
    }

    /// The file's text. `command` is what was typed.
    pub(crate) fn markdown(&self, host: &Host, command: &str) -> String {
        let plan = self.plan;
        let build = if cfg!(debug_assertions) { "debug" } else { "release" };
        let mut text = format!(
            "# The data plane beside its peers\n\n`{command}`, commit `{}`, {build} build. Machine: {}.\n\n\
             Repetitions: {}, interleaved; medians; {} s for each run of traffic, the same engine at both ends of a tunnel between two\n\
             namespaces joined by a veth; {} idle peers, {} added while one is watched, {} handshakes. Compare within this file only.\n\n",
            host.commit, host.machine, plan.repetitions, plan.seconds, plan.peers, plan.added, plan.handshakes,
        );
        text.push_str(&markdown(&self.table()));
        text.push_str("\n## Every engine\n\n");
        text.push_str(&markdown(&self.every_engine()));
        if !self.remarks.is_empty() {
            text.push_str("\n## Remarks\n\n");
            for remark in self.remarks {
                text.push_str(&format!("- {remark}\n"));
            }
        }
        text
    }

    fn table(&self) -> Vec<Vec<String>> {
        let mut lines = vec![HEAD.map(str::to_owned).to_vec()];
        for (row, measure) in self.rows.iter().zip(self.plan.measures()) {
            let peer = row.peer_figure.map_or_else(
                || "-".to_owned(),
                |figure| format!("{} {}", shown(Some(figure)), row.peer.as_deref().unwrap_or_default()),
            );
            let met = match (row.met(), row.judged) {
                (Some(true), _) => "yes",
                (Some(false), _) => "NO",
                (None, _) if row.must.is_none() => "-",
                (None, true) => "?",
                (None, false) => "other size",
            };
            lines.push(vec![
                format!("{} ({})", measure.what, measure.name),
                row.unit.clone(),
                shown(row.ours),
                peer,
                row.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
                row.must.map_or_else(|| "-".to_owned(), |must| must.to_string()),
                met.to_owned(),
            ]);
        }
        lines
    }

    fn every_engine(&self) -> Vec<Vec<String>> {
        let mut head = vec!["measure".to_owned(), "unit".to_owned()];
        head.extend(self.engines.iter().map(|engine| engine.name.clone()));
        let mut lines = vec![head];
        for measure in self.plan.measures().iter().filter(|measure| measure.against.is_none()) {
            let mut line = vec![measure.what.to_owned(), measure.unit.to_owned()];
            line.extend((0..self.engines.len()).map(|engine| shown(self.results.figure(engine, measure.figure))));
            lines.push(line);
        }
        lines
    }
}

/// Three significant digits, or all that stand before the point.
fn shown(figure: Option<f64>) -> String {
    let Some(figure) = figure else { return "-".to_owned() };
    match figure.abs() {
        size if size == 0.0 || size >= 100.0 => format!("{figure:.0}"),
        size if size >= 10.0 => format!("{figure:.1}"),
        size if size >= 1.0 => format!("{figure:.2}"),
        size if size >= 0.1 => format!("{figure:.3}"),
        _ => format!("{figure:.4}"),
    }
}

fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn markdown(lines: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        text.push_str(&format!("| {} |\n", line.join(" | ")));
        if number == 0 {
            text.push_str(&format!("|{}\n", "---|".repeat(line.len())));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_shown_with_as_many_digits_as_mean_something() {
        let cases =
            [(3912.4, "3912"), (12.53, "12.5"), (4.98, "4.98"), (0.115, "0.115"), (0.042, "0.0420"), (0.0, "0")];
        for (figure, wanted) in cases {
            assert_eq!(shown(Some(figure)), wanted);
        }
        assert_eq!(shown(None), "-");
    }

    #[test]
    fn a_table_is_aligned_for_people_and_barred_for_markdown() {
        let lines = [vec!["measure".to_owned(), "met".to_owned()], vec!["tcp".to_owned(), "NO".to_owned()]];
        assert_eq!(aligned(&lines), "measure  met\ntcp      NO\n");
        assert_eq!(markdown(&lines), "| measure | met |\n|---|---|\n| tcp | NO |\n");
    }
}
