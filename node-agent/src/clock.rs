//! The one place where clocks are read. Ages that travel to the control plane come from the boot-time clock, which
//! also runs while the machine sleeps; the wall clock only dates what may outlive a boot.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::ClockId;

/// One instant, seen by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) boot_ms: u64,
    pub(crate) wall_ms: u64,
}

impl Moment {
    pub(crate) fn now() -> Self {
        let boot = rustix::time::clock_gettime(ClockId::Boottime);
        let boot_ms = boot.tv_sec.unsigned_abs() * 1_000 + boot.tv_nsec.unsigned_abs() / 1_000_000;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { boot_ms, wall_ms: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX) }
    }
}

/// The identity of this boot of the machine; zeros when the kernel does not tell.
pub(crate) fn boot_id() -> [u8; 16] {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .ok()
        .and_then(|text| uuid::Uuid::try_parse(text.trim()).ok())
        .map_or([0; 16], uuid::Uuid::into_bytes)
}
