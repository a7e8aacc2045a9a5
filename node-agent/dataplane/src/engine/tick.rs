//! Timers: a sweep over live peers in slices, persistent keepalives, and call-backs after a restart.

use std::collections::VecDeque;

use super::{Engine, Now, push};
use crate::out::Out;
use crate::tunnel::{INITIATION_BYTES, MIN_ROOM};

/// How often live peers are looked after.
const TICK_MS: u64 = 100;
/// How often handshakes are begun while there are more to begin.
const BUSY_TICK_MS: u64 = 10;
const SECOND_MS: u64 = 1000;
/// Ticks in which every live peer is visited once, so that its timers are at most a second old.
const SLICES: usize = 10;
/// A tunnel without session and without any handshake message for so long is dropped.
const IDLE_MS: u64 = 200_000;
/// Handshakes begun at a time, call-backs and others each: 1,000 a second, each of which costs some 150 µs.
const BEGUN_PER_TICK: usize = 10;
/// After how long an unanswered one is repeated, and how often: the protocol would wait for five seconds.
const CALLBACK_AGAIN_MS: u64 = 300;
const CALLBACK_REPEATS: u8 = 3;

/// Peers that were active before a restart, to be called back.
#[derive(Default)]
pub(super) struct Callbacks {
    first: VecDeque<u16>,
    /// In the order in which they are due.
    again: VecDeque<Again>,
}

struct Again {
    slot: u16,
    due_ms: u64,
    repeats_left: u8,
}

impl Callbacks {
    pub(super) fn add(&mut self, slot: u16) {
        self.first.push_back(slot);
    }

    fn next_again(&mut self, now: Now) -> Option<Again> {
        self.again.pop_front_if(|again| again.due_ms <= now.mono_ms)
    }
}

impl Engine {
    /// In how many milliseconds [`Self::on_tick`] is due after the last one.
    #[must_use]
    pub fn tick_interval_ms(&self) -> u64 {
        if !self.callbacks.first.is_empty() || self.slice_left > 0 {
            BUSY_TICK_MS
        } else if self.live.is_empty() {
            SECOND_MS
        } else {
            TICK_MS
        }
    }

    /// At least as often as [`Self::tick_interval_ms`] says.
    pub fn on_tick(&mut self, now: Now, out: &mut Out) {
        if now.mono_ms >= self.next_second_ms {
            self.next_second_ms = now.mono_ms + 1000;
            self.handshakes.load.refill(now);
        }
        let is_done = self.callbacks.first.is_empty() && self.slice_left == 0;
        if is_done || now.mono_ms >= self.next_slice_ms {
            self.next_slice_ms = now.mono_ms + TICK_MS;
            self.slice_left = self.live.len().div_ceil(SLICES);
        }
        self.visit_slice(now, out);
        if self.identity.is_some() {
            self.call_back(now, out);
        }
    }

    fn call_back(&mut self, now: Now, out: &mut Out) {
        for _ in 0..BEGUN_PER_TICK {
            if let Some(Again { slot, repeats_left, .. }) = self.callbacks.next_again(now) {
                self.repeat_callback(now, slot, repeats_left, out);
            } else if let Some(slot) = self.callbacks.first.pop_front() {
                if self.peers[usize::from(slot)].as_ref().is_some_and(|peer| peer.tunnel.is_none()) {
                    self.initiate(now, slot, out);
                    self.expect_answer(now, slot, CALLBACK_REPEATS);
                }
            } else {
                break;
            }
        }
    }

    fn repeat_callback(&mut self, now: Now, slot: u16, repeats_left: u8, out: &mut Out) {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        let Some(tunnel) = peer.tunnel.as_mut().filter(|tunnel| tunnel.awaits_session()) else {
            return;
        };
        let Some(room) = out.net_room(MIN_ROOM) else {
            return;
        };
        if let Some(len) = tunnel.initiate_again(now, room) {
            peer.last_attempt_ms = now.mono_ms;
            peer.via = None;
            push(peer, slot, len, 0, out);
        }
        self.expect_answer(now, slot, repeats_left);
    }

    fn expect_answer(&mut self, now: Now, slot: u16, repeats: u8) {
        if let Some(repeats_left) = repeats.checked_sub(1) {
            let due_ms = now.mono_ms + CALLBACK_AGAIN_MS;
            self.callbacks.again.push_back(Again { slot, due_ms, repeats_left });
        }
    }

    fn visit_slice(&mut self, now: Now, out: &mut Out) {
        let mut begun = 0;
        while self.slice_left > 0 && begun < BEGUN_PER_TICK {
            if self.live.is_empty() {
                self.slice_left = 0;
                break;
            }
            self.slice_left -= 1;
            self.sweep_at = if self.sweep_at >= self.live.len() { 0 } else { self.sweep_at };
            let slot = self.live[self.sweep_at];
            self.sweep_at += 1;
            let sent = out.net().len();
            self.visit(now, slot, out);
            begun += out.net()[sent..].iter().filter(|datagram| datagram.len == INITIATION_BYTES).count();
        }
    }

    fn visit(&mut self, now: Now, slot: u16, out: &mut Out) {
        self.update_timers(now, slot, out);
        self.keep_alive(now, slot, out);
        let Some(peer) = self.peers[usize::from(slot)].as_deref() else {
            return;
        };
        let idle = now.mono_ms.saturating_sub(peer.last_attempt_ms) > IDLE_MS;
        match &peer.tunnel {
            Some(tunnel) if !tunnel.has_session() && idle => self.drop_tunnel(slot),
            None if peer.persistent_keepalive == 0 => self.make_cold(slot),
            Some(_) | None => {}
        }
    }

    fn keep_alive(&mut self, now: Now, slot: u16, out: &mut Out) {
        let Some(peer) = self.peers[usize::from(slot)].as_deref_mut() else {
            return;
        };
        let interval_ms = u64::from(peer.persistent_keepalive) * 1000;
        let quiet = peer.last_traffic_ms.is_none_or(|last| now.mono_ms.saturating_sub(last) >= interval_ms);
        if interval_ms == 0 || !quiet || peer.endpoint.is_none() {
            return;
        }
        if let Some(tunnel) = peer.tunnel.as_mut()
            && tunnel.has_session()
        {
            let Some(room) = out.net_room(MIN_ROOM) else {
                return;
            };
            let Some(len) = tunnel.encrypt(&[], 0, room) else {
                return;
            };
            peer.last_traffic_ms = Some(now.mono_ms);
            push(peer, slot, len, 0, out);
        } else {
            self.initiate(now, slot, out);
        }
    }
}
