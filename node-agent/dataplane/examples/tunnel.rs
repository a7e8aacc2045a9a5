//! A minimal stand-alone tunnel: `tunnel [-f] [--persist] [--no-offload] [--state-dir DIR] [--workers N] IFNAME`.
//! It passes as a userspace implementation of wg-quick.

use std::path::PathBuf;
use std::process::ExitCode;

use cvault_dataplane::process::{TunnelOptions, run};

fn main() -> ExitCode {
    let Some(options) = options(std::env::args().skip(1)) else {
        eprintln!("usage: tunnel [-f|--foreground] [--persist] [--no-offload] [--state-dir DIR] [--workers N] IFNAME");
        return ExitCode::from(2);
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tunnel: {error}");
            ExitCode::FAILURE
        }
    }
}

fn options(mut args: impl Iterator<Item = String>) -> Option<TunnelOptions> {
    let mut options = TunnelOptions {
        interface: String::new(),
        foreground: false,
        state_dir: None,
        persist: false,
        offload: true,
        workers: None,
    };
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-f" | "--foreground" => options.foreground = true,
            "--persist" => options.persist = true,
            "--no-offload" => options.offload = false,
            "--workers" => options.workers = Some(args.next()?.parse().ok()?),
            "--state-dir" => options.state_dir = Some(PathBuf::from(args.next()?)),
            name if !name.starts_with('-') && options.interface.is_empty() => options.interface = arg,
            _ => return None,
        }
    }
    (!options.interface.is_empty()).then_some(options)
}
