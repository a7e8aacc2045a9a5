//! A worker: everything that touches the packets of its peers, on one thread, or on another while that sleeps ([`Desk`]).

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use super::desk::{Acting, Desk};
use super::mailbox::{DeviceState, Mail, Mailbox, Reply, Request, ShellState, Unfinished};
use super::panics::{Panics, Verdict};
use super::ring::Neighbours;
use super::tun::{self, Read, Tun};
use super::udp::{self, BATCH, BUFFER_BYTES, Sockets};
use super::wait::{Ready, Wait};
use super::watch::Pulse;
use crate::change::{DeviceChange, PeerChange, Refused, canonical};
use crate::drops::{Drop, Dropped};
use crate::engine::{Engine, Now, Origin, Settled};
use crate::journal::Journal;
use crate::out::{NO_SLOT, Out};
use crate::policy::TooMany;

/// Letters, receive calls and TUN reads in one pass, so that none starves the others.
const MAX_LETTERS: usize = 4;
const MAX_RECEIVES: usize = 4;
const MAX_READS: usize = 32;
const MAX_PARCELS: usize = 256;
/// Changes after which the other workers get their turn.
const MAX_CHANGES: usize = 64;
/// Removed peers journaled in one go, a few microseconds each.
const MAX_SETTLED: usize = 256;
const SECOND_MS: u64 = 1000;
/// After so long without anything to do the worker does what is not asked for yet.
const QUIET_MS: u64 = 1;
/// The worker gives up when the TUN has brought nothing but errors for a second, and so many of them.
const MAX_READ_ERRORS: u32 = 100;

/// Why the worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was told to.
    Stopped,
    /// The interface was deleted.
    InterfaceGone,
}

pub(crate) struct Worker {
    pub(crate) engine: Engine,
    pub(crate) tun: Tun,
    pub(crate) journal: Option<Arc<Mutex<Journal>>>,
    wait: Arc<Wait>,
    neighbours: Neighbours,
    pulse: Arc<Pulse>,
    net: Net,
    out: Out,
    buffers: Vec<u8>,
    shell: ShellState,
    panics: Panics,
    started_ms: u64,
    next_tick_ms: u64,
    next_mtu_ms: u64,
    /// Until when it sleeps if nothing wakes it.
    wakes_ms: u64,
    /// Something is left that will not wake it.
    more: bool,
    /// Somebody has acted for it since its last pass.
    was_asked: bool,
    unfinished: Option<Unfinished>,
    reading: Reading,
    receiving: Reading,
    end: Option<End>,
    /// It panicked too often, or the host failed it.
    gave_up: bool,
}

/// The errors that the TUN, or a socket, has answered with since it last did as asked.
#[derive(Debug, Default)]
struct Reading {
    since_ms: u64,
    errors: u32,
}

impl Reading {
    /// Another one; says whether there is no hope.
    fn fails(&mut self, now: Now) -> bool {
        if self.errors == 0 {
            self.since_ms = now.mono_ms;
        }
        self.errors = self.errors.saturating_add(1);
        self.errors >= MAX_READ_ERRORS && now.mono_ms.saturating_sub(self.since_ms) >= SECOND_MS
    }

    fn works(&mut self) {
        self.errors = 0;
    }
}

/// Milliseconds since the host booted, those in which it slept included: what the other side sees pass is over here too.
pub(crate) fn boot_ms() -> u64 {
    let boot = clock_gettime(ClockId::Boottime);
    boot.tv_sec.unsigned_abs() * 1_000 + boot.tv_nsec.unsigned_abs() / 1_000_000
}

/// The sockets and what was asked of them.
#[derive(Default)]
struct Net {
    sockets: Option<Sockets>,
    fwmark: u32,
    /// The port that was asked for last, taken or not; 0 is any.
    port: u16,
    /// Datagrams that the kernel dropped at earlier sockets.
    dropped: u64,
}

impl Worker {
    pub(crate) fn new(
        engine: Engine,
        tun: Tun,
        journal: Option<Arc<Mutex<Journal>>>,
        mailbox: &Mailbox,
        neighbours: Neighbours,
        started_ms: u64,
    ) -> io::Result<Self> {
        let wait = Arc::new(Wait::new(mailbox.fd(), tun.fd())?);
        Ok(Self {
            engine,
            tun,
            journal,
            wait,
            neighbours,
            pulse: Arc::default(),
            net: Net::default(),
            out: Out::default(),
            buffers: vec![0; BATCH * BUFFER_BYTES],
            shell: ShellState::default(),
            panics: Panics::default(),
            started_ms,
            next_tick_ms: 0,
            next_mtu_ms: 0,
            wakes_ms: 0,
            more: false,
            was_asked: false,
            unfinished: None,
            reading: Reading::default(),
            receiving: Reading::default(),
            end: None,
            gave_up: false,
        })
    }

    /// By which others see that it still works.
    pub(crate) fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.pulse)
    }

    /// Does one pass. A panic costs the packets of it, not the sessions of everybody (trap 16).
    fn turn(&mut self, ready: Ready, mailbox: &Mailbox) -> io::Result<()> {
        let was_asked = std::mem::take(&mut self.was_asked);
        let is_quiet = !self.more && !was_asked && ready.is_nothing();
        // What a panic leaves waits for nothing.
        self.more = self.survive(|worker| worker.pass(ready, is_quiet, mailbox)).unwrap_or(Ok(true))?;
        self.pulse.beat();
        if self.gave_up { Err(io::Error::other("the worker panicked again and again")) } else { Ok(()) }
    }

    /// None if it panicked.
    fn survive<T>(&mut self, act: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.engine.enter();
        let done = catch_unwind(AssertUnwindSafe(|| act(self)));
        self.engine.leave();
        if done.is_err() {
            self.shell.panics += 1;
            tracing::error!(panics = self.shell.panics, "the worker panicked; the packets it had are lost");
            udp::give_up(&mut self.out, &mut self.engine);
            tun::give_up(&mut self.out, &mut self.engine);
            if self.panics.one(self.now().mono_ms) == Verdict::GiveUp {
                self.gave_up = true;
            }
        }
        done.ok()
    }

    fn now(&self) -> Now {
        let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Now {
            mono_ms: boot_ms().saturating_sub(self.started_ms),
            unix_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis),
        }
    }

    /// When there is something to do though nothing wakes it.
    fn next_ms(&self, now: Now) -> u64 {
        let patience_ms = if self.engine.has_work_ahead() { QUIET_MS } else { SECOND_MS };
        if self.more { now.mono_ms } else { self.next_tick_ms.min(now.mono_ms + patience_ms) }
    }

    /// One round over everything that may be ready; says whether it has left anything that will not wake the worker.
    /// Sockets and the TUN do as long as there is something to read.
    fn pass(&mut self, ready: Ready, is_quiet: bool, mailbox: &Mailbox) -> io::Result<bool> {
        let now = self.now();
        if is_quiet {
            self.engine.work_ahead();
        }
        if ready.mailbox {
            // First, so that what comes in later wakes again.
            mailbox.clear_wake();
        }
        let mut more = self.receive_parcels(now);
        self.receive(now, ready.sockets)?;
        if ready.tun {
            self.read_tun(now)?;
        }
        more |= self.engine.on_handshakes(now, &mut self.out);
        if now.mono_ms >= self.next_mtu_ms {
            self.next_mtu_ms = now.mono_ms + SECOND_MS;
            match self.tun.mtu() {
                Ok(mtu) => self.engine.set_mtu(mtu),
                Err(error) => tracing::debug!(%error, "the MTU cannot be read"),
            }
        }
        if now.mono_ms >= self.next_tick_ms {
            self.engine.on_tick(now, &mut self.out);
            self.next_tick_ms = now.mono_ms + self.engine.tick_interval_ms();
        }
        self.flush();
        more |= self.settle() == libc::EAGAIN;
        more |= self.read_mail(now, mailbox);
        self.plan_tick(now);
        Ok(more)
    }

    /// Work may have appeared for a tick that was a second away.
    fn plan_tick(&mut self, now: Now) {
        self.next_tick_ms = self.next_tick_ms.min(now.mono_ms + self.engine.tick_interval_ms());
    }

    /// What the kernel gave to other workers; says whether there may be more.
    fn receive_parcels(&mut self, now: Now) -> bool {
        for (slot, astray) in self.neighbours.inbox.losses() {
            self.engine.went_astray(slot, astray);
        }
        for _ in 0..MAX_PARCELS {
            let Some(parcel) = self.neighbours.inbox.next() else {
                return false;
            };
            self.engine.on_parcel(now, &parcel, &mut self.out);
            if self.out.wants_flush() {
                self.flush();
            }
        }
        true
    }

    fn receive(&mut self, now: Now, mut ready: [bool; 2]) -> io::Result<()> {
        for _ in 0..MAX_RECEIVES {
            let Some(sockets) = self.net.sockets.as_ref().filter(|_| ready.contains(&true)) else {
                return Ok(());
            };
            let (engine, out) = (&mut self.engine, &mut self.out);
            let more = sockets.receive(&mut ready, &mut self.buffers, |segment, meta| {
                let origin = Origin { from: canonical(meta.addr), to: meta.dst_ip, ecn: udp::ecn(meta) };
                engine.on_udp(now, segment, origin, out);
            });
            match more {
                Ok(_) => self.receiving.works(),
                Err(error) => {
                    self.shell.socket_read_errors += 1;
                    tracing::debug!(%error, "a socket could not be read");
                    return if self.receiving.fails(now) { Err(error) } else { Ok(()) };
                }
            }
            if self.out.wants_flush() {
                self.flush();
            }
        }
        Ok(())
    }

    fn read_tun(&mut self, now: Now) -> io::Result<()> {
        for _ in 0..MAX_READS {
            let (engine, out) = (&mut self.engine, &mut self.out);
            match self.tun.read(&mut self.shell, |packet| engine.on_tun(now, packet, out)) {
                Ok(Read::Packet) => self.reading.works(),
                Ok(Read::Nothing) => {
                    self.reading.works();
                    return Ok(());
                }
                Ok(Read::Gone) => {
                    self.end = Some(End::InterfaceGone);
                    return Ok(());
                }
                Ok(Read::Unsplittable(len)) => {
                    self.reading.works();
                    self.engine.lost(Drop::TxMalformed, NO_SLOT, 1, len as u64);
                }
                Err(error) => {
                    self.shell.tun_read_errors += 1;
                    tracing::debug!(%error, "the TUN could not be read");
                    if self.reading.fails(now) {
                        return Err(error);
                    }
                    return Ok(());
                }
            }
            if self.out.wants_flush() {
                self.flush();
            }
        }
        Ok(())
    }

    fn flush(&mut self) {
        if self.engine.has_parcels() {
            let parcels = self.engine.take_parcels();
            self.shell.forwarded += parcels.len() as u64;
            let lost = self.neighbours.hand_on(parcels);
            for reason in [Drop::Forward, Drop::TxForward] {
                let Dropped { packets, bytes } = lost.get(reason);
                self.shell.forwarded -= packets;
                self.shell.ring_drops += packets;
                self.engine.lost(reason, NO_SLOT, packets, bytes);
            }
        }
        if !self.out.net().is_empty() {
            match &mut self.net.sockets {
                Some(sockets) => sockets.send(&mut self.out, &mut self.engine),
                None => udp::give_up(&mut self.out, &mut self.engine),
            }
        }
        if !self.out.tun().is_empty() {
            self.tun.write(&mut self.out, &mut self.engine, &mut self.shell);
        }
    }

    /// Journals removed peers; a full disk keeps their slots from being used again until there is room.
    fn settle(&mut self) -> i32 {
        // A slot that is free has nothing left to send or to deliver.
        self.flush();
        let journal = self.journal.as_deref();
        let settled = self.engine.settle(MAX_SETTLED, |closed| match journal {
            Some(journal) => journal.lock().unwrap_or_else(PoisonError::into_inner).append_all(closed),
            None => Ok(()),
        });
        match settled {
            Ok(Settled::All) => 0,
            Ok(Settled::More) => libc::EAGAIN,
            Err(error) => {
                tracing::debug!(%error, "the journal of closed peers cannot be written");
                errno_of(&error)
            }
        }
    }

    /// Says whether there was a letter, or a portion of one: the next comes as soon as it is answered, or is there, or something
    /// waits for the journal.
    fn read_mail(&mut self, now: Now, mailbox: &Mailbox) -> bool {
        let was_unfinished = self.unfinished.is_some();
        if let Some(letter) = self.unfinished.take() {
            self.unfinished = self.go_on(now, letter);
        }
        for letters in 0..MAX_LETTERS {
            let Some(Mail { request, reply, asker }) = mailbox.next() else {
                return letters > 0 || was_unfinished;
            };
            // If another was not finished, nobody waits for it: one set of peers is made at a time.
            if let Request::Portions(portions) = request {
                self.unfinished = Some(Unfinished::new(portions, reply, asker));
                continue;
            }
            let is_brief = self.is_brief(&request);
            if let (Request::Peers(changes), false) = (&request, is_brief) {
                self.unfinished = Some(Unfinished::new(vec![changes.clone()].into_iter(), reply, asker));
                continue;
            }
            let answer = self.handle(now, request);
            // The asker may have given up waiting.
            let _ = reply.try_send(answer);
        }
        true
    }

    /// Makes the next portion of a letter, or prepares what would hold packets up.
    fn go_on(&mut self, now: Now, mut letter: Unfinished) -> Option<Unfinished> {
        let light = self.engine.light(letter.next());
        match letter.next() {
            changes if light == changes.len() => return letter.go_on(|changes| self.change_peers(now, changes)),
            [change] => self.engine.trim(change),
            _ => letter.split_next(light.max(1)),
        }
        letter.wait()
    }

    fn handle(&mut self, now: Now, request: Request) -> Reply {
        let errno = match request {
            Request::Describe => return Reply::Device(Box::new(self.describe())),
            Request::Tenants { from, limit } => {
                let (tenants, next) = self.engine.tenants(from, limit);
                return Reply::Tenants { tenants, next };
            }
            Request::List { from, limit } => {
                let from = u16::try_from(from).unwrap_or(u16::MAX);
                let (peers, next) = self.engine.peers(from, limit);
                return Reply::Peers { peers, next: next.map(u32::from) };
            }
            Request::Device(change) => self.change_device(now, change).map_or_else(|error| errno_of(&error), |()| 0),
            Request::Policy(mut change) => {
                self.change_policy(now, &mut change).map_or_else(|error| errno_of(&error), |()| 0)
            }
            Request::Peers(changes) => return self.change_peers(now, changes),
            // It is the mail's.
            Request::Portions(_) => libc::EPROTO,
            Request::Notices(notices) => {
                self.engine.on_notices(notices);
                self.settle();
                0
            }
            Request::BeginReplace => {
                self.engine.begin_replace();
                0
            }
            Request::AbandonReplace => {
                self.engine.abandon_replace();
                0
            }
            Request::EndReplace => {
                self.engine.end_replace();
                self.settle()
            }
            Request::Settle => self.settle(),
            Request::Stop => {
                self.end = Some(End::Stopped);
                0
            }
        };
        self.flush();
        Reply::Done(errno)
    }

    /// Policy first: what is too much for it changes nothing else.
    fn change_device(&mut self, now: Now, mut change: DeviceChange) -> io::Result<()> {
        self.change_policy(now, &mut change)?;
        if let Some(fwmark) = change.fwmark.filter(|fwmark| *fwmark != self.net.fwmark) {
            if let Some(sockets) = &self.net.sockets {
                sockets.set_fwmark(fwmark)?;
            }
            self.net.fwmark = fwmark;
        }
        if let Some(secret) = &change.private_key {
            self.engine.set_private_key(secret);
        }
        let bound = self.net.sockets.as_ref().map(Sockets::port);
        self.net.port = change.listen_port.unwrap_or(self.net.port);
        let wanted = match (change.listen_port, bound) {
            (Some(port), Some(bound)) if port == bound => None,
            (Some(port), _) => Some(port),
            // Without a port of its own an interface with a key gets any.
            (None, None) => self.engine.device().private_key.map(|_| self.net.port),
            (None, Some(_)) => None,
        };
        if let Some(port) = wanted {
            let (offloads, shard) = (self.tun.offloads(), self.engine.shard());
            let sockets = Sockets::bind(port, self.net.fwmark, offloads, shard)?;
            self.wait.add_sockets(&sockets)?;
            let former = self.net.sockets.replace(sockets);
            self.net.dropped += former.map_or(0, |former| former.dropped());
        }
        if let (Some(ack), Some(journal)) = (change.journal_ack, &self.journal) {
            journal.lock().unwrap_or_else(PoisonError::into_inner).acknowledge(ack)?;
        }
        Ok(())
    }

    fn change_policy(&mut self, now: Now, change: &mut DeviceChange) -> io::Result<()> {
        let too_many = |TooMany| io::Error::from_raw_os_error(libc::ENOSPC);
        self.engine.set_overlay(change.replace_overlay, &change.overlay).map_err(too_many)?;
        self.engine.change_policy(now, std::mem::take(&mut change.policy)).map_err(too_many)
    }

    fn change_peers(&mut self, now: Now, changes: Vec<PeerChange>) -> Reply {
        let (made, errno) = self.make_changes(now, changes);
        self.flush();
        let settled = self.settle() == 0;
        Reply::Changed { errno, made, notices: self.engine.take_notices(), settled }
    }

    /// Says how many were made, and the errno of the one that was refused.
    fn make_changes(&mut self, now: Now, changes: Vec<PeerChange>) -> (usize, i32) {
        let count = changes.len();
        let slices = changes.len().div_ceil(MAX_SETTLED);
        for (number, change) in changes.into_iter().enumerate() {
            if number % MAX_CHANGES == MAX_CHANGES - 1 {
                self.engine.leave();
                self.engine.enter();
            }
            if change.remove || change.generation.is_some() {
                // What an earlier change sent belongs to the counters of a peer that may be gone after this one.
                self.flush();
            }
            while self.engine.waits_for_settling(&change) && self.settle() == libc::EAGAIN {}
            match self.engine.apply_peer(now, change, &mut self.out) {
                Ok(()) => {}
                Err(Refused::Full) => return (number, libc::ENOSPC),
                Err(Refused::Closing) => return (number, libc::EBUSY),
                Err(Refused::TenantPrefix) => return (number, libc::EINVAL),
            }
            if self.out.wants_flush() {
                self.flush();
            }
        }
        // Removed means journaled, if the disk lets us; those that waited since before are left to later passes.
        for _ in 0..slices {
            if self.settle() != libc::EAGAIN {
                break;
            }
        }
        (count, 0)
    }

    fn describe(&self) -> DeviceState {
        let mut shell = self.shell;
        self.tun.describe(&mut shell);
        if let Some(sockets) = &self.net.sockets {
            sockets.describe(&mut shell);
            shell.socket_drops = self.net.dropped + sockets.dropped();
        }
        DeviceState {
            view: self.engine.device(),
            listen_port: self.net.sockets.as_ref().map_or(0, Sockets::port),
            fwmark: self.net.fwmark,
            shell,
            workers: Vec::new(),
        }
    }
}

impl Acting for Worker {
    fn act(&mut self, request: Request) -> Reply {
        self.was_asked = true;
        let now = self.now();
        let reply = self.survive(|worker| worker.handle(now, request));
        // What waits for the journal, or was left by a panic, does not wake it.
        self.more |= !matches!(reply, Some(Reply::Changed { settled: true, .. }));
        self.plan_tick(now);
        reply.unwrap_or(Reply::Done(libc::EIO))
    }

    fn is_brief(&self, request: &Request) -> bool {
        let Request::Peers(changes) = request else {
            return true;
        };
        self.engine.light(changes) == changes.len()
    }

    fn has_ended(&self) -> bool {
        self.gave_up || self.end.is_some()
    }

    fn is_due(&self) -> bool {
        self.gave_up || self.next_ms(self.now()) < self.wakes_ms
    }
}

impl Desk<Worker> {
    /// Runs the worker until it is told to stop or the interface is gone.
    ///
    /// # Errors
    /// When the host fails it, or when it panics too often: it is to be started anew.
    pub(crate) fn run(&self, mailbox: &Mailbox) -> io::Result<End> {
        let ended = self.turns(mailbox);
        let mut worker = self.take();
        // Nobody is to act for one that nobody runs, or wait for it.
        worker.gave_up |= ended.is_err();
        worker.unfinished = None;
        ended
    }

    fn turns(&self, mailbox: &Mailbox) -> io::Result<End> {
        let wait = Arc::clone(&self.take().wait);
        let mut timeout_ms = 0;
        loop {
            let ready = wait.wait(timeout_ms)?;
            let mut worker = self.take();
            worker.turn(ready, mailbox)?;
            if let Some(end) = worker.end {
                return Ok(end);
            }
            let now = worker.now();
            worker.wakes_ms = worker.next_ms(now);
            timeout_ms = worker.wakes_ms.saturating_sub(now.mono_ms);
            let is_amid = worker.unfinished.is_some();
            drop(worker);
            if is_amid {
                // Portion after portion would use up the thread's turn on its processor, which packets need before and after it.
                std::thread::yield_now();
            }
        }
    }
}

fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tun_that_cannot_be_read_for_a_moment_ends_nothing() {
        let at = |mono_ms| Now { mono_ms, unix_ms: 0 };
        let mut reading = Reading::default();
        assert!((0..10_000).all(|_| !reading.fails(at(7))), "many, but at once");
        reading.works();
        assert!((0..u64::from(MAX_READ_ERRORS) - 1).all(|number| !reading.fails(at(number * 5000))), "long, but few");
        assert!(reading.fails(at(600_000)));
        reading.works();
        assert!(!reading.fails(at(600_001)));
    }
}
