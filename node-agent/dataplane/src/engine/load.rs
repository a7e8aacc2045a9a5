//! What the workers of one interface have together at the gate of handshakes, so that their number changes no limit: how
//! many messages wait, whether that is much, what each source may send, the seed of the cookies, and how many packets are
//! held until a handshake is done.
//!
//! The kernel gives initiations to workers by address and port, so one source reaches all of them. Only handshakes touch
//! this, and the lock only those under load that have proved their address.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Now;
use crate::limit::SourceLimit;
use crate::noise::Seed;

/// Messages that may wait: less than a second of one worker's work, 1.3 MB.
pub(super) const MAX_WAITING: usize = 4096;
/// Packets held for all peers together: 4 MB at full size.
pub(super) const MAX_HELD: usize = 2048;
/// From so many on a cookie is demanded: what is left of 6,000 in a second when a busy processor works off 4,000.
pub(super) const LOADED: usize = 2048;
/// For how long after that, as in the kernel.
const LOADED_MS: u64 = 1000;
const REFILL_EVERY_MS: u64 = 1000;

pub(super) struct Load {
    pub(super) seed: Seed,
    waiting: AtomicUsize,
    held: AtomicUsize,
    loaded_until_ms: AtomicU64,
    sources: Mutex<Sources>,
}

#[derive(Default)]
struct Sources {
    limit: SourceLimit,
    next_refill_ms: u64,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            seed: Seed::random(),
            waiting: AtomicUsize::default(),
            held: AtomicUsize::default(),
            loaded_until_ms: AtomicU64::default(),
            sources: Mutex::default(),
        }
    }
}

impl Load {
    /// For one more message that waits; false when too many do.
    pub(super) fn take_place(&self) -> bool {
        let has_room = self.waiting.fetch_add(1, Ordering::Relaxed) < MAX_WAITING;
        if !has_room {
            self.free_place();
        }
        has_room
    }

    pub(super) fn free_place(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// For one more packet that is held until a handshake is done; false when too many are.
    pub(super) fn hold(&self) -> bool {
        let has_room = self.held.fetch_add(1, Ordering::Relaxed) < MAX_HELD;
        if !has_room {
            self.release(1);
        }
        has_room
    }

    /// So many packets are not held any more.
    pub(super) fn release(&self, packets: usize) {
        self.held.fetch_sub(packets, Ordering::Relaxed);
    }

    pub(super) fn is_high(&self, now: Now) -> bool {
        if self.waiting.load(Ordering::Relaxed) >= LOADED {
            self.loaded_until_ms.fetch_max(now.mono_ms + LOADED_MS, Ordering::Relaxed);
        }
        now.mono_ms < self.loaded_until_ms.load(Ordering::Relaxed)
    }

    /// Takes one token of the source; false when it has none left.
    pub(super) fn admit(&self, source: IpAddr) -> bool {
        self.sources().limit.admit(source)
    }

    /// Once a second, whoever of the workers comes first.
    pub(super) fn refill(&self, now: Now) {
        let mut sources = self.sources();
        if now.mono_ms >= sources.next_refill_ms {
            let is_punctual = now.mono_ms < sources.next_refill_ms + REFILL_EVERY_MS;
            let due_ms = if is_punctual { sources.next_refill_ms } else { now.mono_ms };
            sources.next_refill_ms = due_ms + REFILL_EVERY_MS;
            sources.limit.refill();
        }
    }

    fn sources(&self) -> MutexGuard<'_, Sources> {
        // Whatever panicked, a count of tokens is a count of tokens.
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn sources_known(&self) -> usize {
        self.sources().limit.len()
    }
}
