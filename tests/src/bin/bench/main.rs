//! `cargo xtask bench dataplane`: our engine beside every userspace WireGuard that is found, as ratios of one interleaved run.
//! `cargo xtask bench api`: the control plane under load.
//!
//! A target that is missed is shown and is no failure; a measurement that could not be made is one.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "what it prints is the product")]

mod api;
mod config;
mod daemon;
mod engine;
mod host;
mod iperf;
mod measures;
mod plan;
mod report;
mod restart;
mod sheet;
mod stages;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use cvault_tests::bench::Row;

use engine::Engines;
use host::Host;
use measures::STAGES;
use plan::Plan;
use report::Report;
use sheet::{Results, Sheet};

/// Measures the data plane beside its peers, or the control plane under load
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
pub(crate) struct Options {
    suite: Suite,
    /// One JSON object a line instead of a table
    #[arg(long)]
    json: bool,
    /// A short run with fewer peers: to see that everything works
    #[arg(long)]
    quick: bool,
    /// Take this measure only; may be given more than once
    #[arg(long, value_name = "MEASURE")]
    only: Vec<String>,
    /// Write the results to docs/perf/<date>-<suite>.md
    #[arg(long)]
    record: bool,
    /// How often each engine is measured, interleaved
    #[arg(long)]
    repetitions: Option<u32>,
    /// Length of each run of traffic
    #[arg(long)]
    seconds: Option<u32>,
    /// Idle peers of one interface
    #[arg(long)]
    peers: Option<u32>,
    /// Peers that shake hands
    #[arg(long)]
    handshakes: Option<u32>,
    /// Wait up to this long, each time, until the computer does nothing else
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    quiet: u64,
    /// The repository, for peers built from crates and for records
    #[arg(long, env = "CVAULT_BENCH_ROOT", default_value = ".", hide = true)]
    root: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Suite {
    Dataplane,
    Api,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let measured = match options.suite {
        Suite::Dataplane => dataplane(&options),
        Suite::Api => api::run(&options),
    };
    match measured {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// False when a measurement is broken.
fn dataplane(options: &Options) -> Result<bool> {
    let plan = Plan::of(options)?;
    let Engines { all: engines, mut remarks } = Engines::find(&options.root.join("target/peers"))?;
    for remark in &remarks {
        eprintln!("bench: {remark}");
    }
    let mut results = Results::default();
    let (mut runs, mut disturbed) = (0, 0);
    for stage in STAGES.into_iter().filter(|stage| plan.wants_stage(*stage)) {
        for repetition in 1..=plan.repetitions {
            for (place, engine) in engines.iter().enumerate().filter(|(_, engine)| stage.concerns(engine)) {
                eprintln!("bench: {stage:?} {repetition}/{}: {}", plan.repetitions, engine.name);
                runs += 1;
                disturbed += u32::from(!host::quiet(Duration::from_secs(options.quiet))?);
                let mut sheet = Sheet::default();
                let done = stage.run(engine, &plan, &mut sheet);
                results.add(place, &sheet);
                let failed = done.err().map(|error| format!("{error:#}"));
                for remark in sheet.remarks.into_iter().chain(failed) {
                    let remark = format!("{}, {stage:?} {repetition}: {remark}", engine.name);
                    eprintln!("bench: {remark}");
                    remarks.push(remark);
                }
            }
        }
    }
    if disturbed > 0 {
        remarks.push(format!("the computer was busy with something else at the start of {disturbed} of {runs} runs"));
    }
    let rows: Vec<Row> = plan.measures().iter().map(|measure| results.row(measure, &engines, &plan)).collect();
    let report = Report { plan: &plan, engines: &engines, results: &results, rows: &rows, remarks: &remarks };
    if options.json {
        print!("{}", report.lines());
    } else {
        println!("{}", report.text());
    }
    if options.record {
        record(options, &report)?;
    }
    let broken: Vec<String> = plan
        .measures()
        .iter()
        .zip(&rows)
        .filter_map(|(measure, row)| Results::broken(measure, row, &engines))
        .collect();
    for line in &broken {
        eprintln!("bench: broken: {line}");
    }
    Ok(broken.is_empty())
}

fn record(options: &Options, report: &Report) -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let command = format!("cargo xtask bench {}", words.join(" "));
    let name = format!("docs/perf/{}-dataplane.md", time::OffsetDateTime::now_utc().date());
    let path = options.root.join(&name);
    std::fs::write(&path, report.markdown(&Host::read(&options.root), &command))
        .with_context(|| format!("write {}", path.display()))?;
    eprintln!("bench: wrote {name}");
    Ok(())
}
