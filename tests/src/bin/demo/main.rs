//! `cargo xtask demo`: from nothing to a metered WireGuard tunnel, each step shown with its time.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "what it prints is the product")]

mod figures;
mod journey;
mod show;

use std::process::ExitCode;

use clap::Parser;
use cvault_tests::platform::Platform;

/// Builds a lab on this computer and takes one device through CVault in it.
#[derive(Parser)]
struct Options {
    /// Leave everything running at the end, until Ctrl-C, and print addresses and credentials
    #[arg(long)]
    keep: bool,
    /// Measure instead: activation over this many devices, registrations per second
    #[arg(long, value_name = "DEVICES")]
    figures: Option<usize>,
    /// With --figures: one JSON object a line
    #[arg(long, requires = "figures")]
    json: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let (Some(devices), true) = (options.figures, options.json) {
        return match figures::lines(devices) {
            Ok(lines) => {
                print!("{lines}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let mut show = show::Show::new();
    let done = match options.figures {
        Some(devices) => figures::run(&mut show, devices),
        None => journey::run(&mut show, options.keep),
    };
    show.end(done.as_ref().err());
    if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints what the platform's processes last said, when a step has failed.
fn with_logs<T>(platform: &Platform, done: anyhow::Result<T>) -> anyhow::Result<T> {
    if done.is_err() {
        platform.lab.print_logs();
    }
    done
}
