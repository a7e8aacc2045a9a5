//! Ctrl-C and SIGTERM: every machine of this program is switched off and its folders are removed before it ends.
//!
//! A program that is killed outright leaves only its folders: `init` ends when its standard input closes.

use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once};

use anyhow::Result;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use super::folder;

static INITS: Mutex<Vec<u32>> = Mutex::new(Vec::new());
static WATCH: Once = Once::new();
static AWAITED: AtomicBool = AtomicBool::new(false);

/// From now on the program waits for nothing but Ctrl-C: it will have ended well.
pub fn await_interrupt() -> ! {
    AWAITED.store(true, Ordering::Relaxed);
    loop {
        std::thread::park();
    }
}

pub(super) fn remember(init: &Child) {
    INITS.lock().expect("no holder of this lock panics").push(init.id());
}

pub(super) fn forget(init: &Child) {
    INITS.lock().expect("no holder of this lock panics").retain(|pid| *pid != init.id());
}

/// Starts watching for the two signals, once for the whole program.
pub(super) fn watch() -> Result<()> {
    let mut failed = Ok(());
    WATCH.call_once(|| {
        failed = std::thread::Builder::new().name("lab-signals".to_owned()).spawn(wait_and_end).map(drop);
    });
    Ok(failed?)
}

fn wait_and_end() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be built");
    let status = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).expect("SIGINT can be watched");
        let mut terminate = signal(SignalKind::terminate()).expect("SIGTERM can be watched");
        tokio::select! {
            _ = interrupt.recv() => 130,
            _ = terminate.recv() => 143,
        }
    });
    for pid in INITS.lock().expect("no holder of this lock panics").iter() {
        if let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    folder::remove_own();
    eprintln!("interrupted: the lab has been removed");
    std::process::exit(if AWAITED.load(Ordering::Relaxed) { 0 } else { status });
}
