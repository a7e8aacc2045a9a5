//! Helpers that run inside the Lab's machines. Not for people.

#![forbid(unsafe_code)]

use anyhow::{Result, bail};
use rustix::process::{WaitOptions, wait};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("init") => init(),
        Some("internet") => cvault_tests::internet::serve(),
        Some("web") => cvault_tests::internet::serve_web(),
        _ => bail!("usage: cvault-lab init|internet|web (started by the Lab)"),
    }
}

/// Process 1 of a machine: reaps orphans, and exits when the Lab closes its standard input.
fn init() -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut child_ended = signal(SignalKind::child())?;
        announce()?;
        let mut input = tokio::io::stdin();
        let mut byte = [0];
        loop {
            tokio::select! {
                _ = input.read(&mut byte) => std::process::exit(0),
                _ = child_ended.recv() => while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {},
            }
        }
    })
}

fn announce() -> Result<()> {
    use std::io::Write;
    let mut output = std::io::stdout();
    output.write_all(b"ready\n")?;
    output.flush()?;
    Ok(())
}
