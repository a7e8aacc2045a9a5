//! A worker: everything that touches the packets of its peers, on one thread.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::mailbox::{DeviceState, Mailbox, Reply, Request, ShellState};
use super::panics::{Panics, Verdict};
use super::ring::Neighbours;
use super::tun::{Read, Tun};
use super::udp::{self, BATCH, BUFFER_BYTES, Sockets};
use super::watch::Pulse;
use crate::change::{DeviceChange, PeerChange, Refused, canonical};
use crate::drops::Drop;
use crate::engine::{Engine, Now, Origin, Settled};
use crate::journal::Journal;
use crate::out::Out;
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
    pub(crate) mailbox: Mailbox,
    neighbours: Neighbours,
    pulse: Arc<Pulse>,
    net: Net,
    out: Out,
    buffers: Vec<u8>,
    shell: ShellState,
    panics: Panics,
    started: Instant,
    next_tick_ms: u64,
    end: Option<End>,
}

/// The sockets and what was asked of them.
#[derive(Default)]
struct Net {
    sockets: Option<Sockets>,
    fwmark: u32,
}

impl Worker {
    pub(crate) fn new(
        engine: Engine,
        tun: Tun,
        journal: Option<Arc<Mutex<Journal>>>,
        mailbox: Mailbox,
        neighbours: Neighbours,
        started: Instant,
    ) -> Self {
        Self {
            engine,
            tun,
            journal,
            mailbox,
            neighbours,
            pulse: Arc::default(),
            net: Net::default(),
            out: Out::default(),
            buffers: vec![0; BATCH * BUFFER_BYTES],
            shell: ShellState::default(),
            panics: Panics::default(),
            started,
            next_tick_ms: 0,
            end: None,
        }
    }

    /// By which others see that it still works.
    pub(crate) fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.pulse)
    }

    /// Runs until it is told to stop or the interface is gone.
    ///
    /// # Errors
    /// When the host fails it, or when it panics too often: it is to be started anew.
    pub(crate) fn run(mut self) -> io::Result<End> {
        let mut worked = false;
        loop {
            self.wait(worked)?;
            // A panic costs the packets of one pass, not the sessions of everybody (trap 16).
            self.engine.enter();
            let done = catch_unwind(AssertUnwindSafe(|| self.pass()));
            self.engine.leave();
            self.pulse.beat();
            match done {
                Ok(did) => worked = did?,
                Err(_) => {
                    self.shell.panics += 1;
                    tracing::error!(panics = self.shell.panics, "a pass of the worker panicked; its packets are lost");
                    self.out.clear_net();
                    self.out.clear_tun();
                    if self.panics.one(self.now().mono_ms) == Verdict::GiveUp {
                        return Err(io::Error::other("the worker panicked again and again"));
                    }
                }
            }
            if let Some(end) = self.end {
                return Ok(end);
            }
        }
    }

    fn now(&self) -> Now {
        let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Now {
            mono_ms: millis(self.started.elapsed()),
            unix_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis),
        }
    }

    fn wait(&self, worked: bool) -> io::Result<()> {
        let until_tick = if worked { 0 } else { self.next_tick_ms.saturating_sub(self.now().mono_ms).min(SECOND_MS) };
        let nanos = i64::try_from(until_tick * 1_000_000).expect("at most a second");
        let timeout = Timespec { tv_sec: nanos / 1_000_000_000, tv_nsec: nanos % 1_000_000_000 };
        let (mailbox, tun) = (self.mailbox.fd(), self.tun.fd());
        let mut sockets = self.net.sockets.iter().flat_map(Sockets::fds);
        let mut fds = [mailbox, tun, sockets.next().unwrap_or(mailbox), sockets.next().unwrap_or(mailbox)]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// One round over everything that may be ready; says whether there was anything.
    fn pass(&mut self) -> io::Result<bool> {
        let now = self.now();
        // First, so that what comes in later wakes again.
        self.mailbox.clear_wake();
        let mut worked = self.receive_parcels(now);
        worked |= self.receive(now);
        worked |= self.read_tun(now)?;
        worked |= self.engine.on_handshakes(now, &mut self.out);
        if now.mono_ms >= self.next_tick_ms {
            self.engine.on_tick(now, &mut self.out);
            self.next_tick_ms = now.mono_ms + self.engine.tick_interval_ms();
        }
        self.flush();
        self.settle();
        worked |= self.read_mail(now);
        // Work may have appeared for a tick that was a second away.
        self.next_tick_ms = self.next_tick_ms.min(now.mono_ms + self.engine.tick_interval_ms());
        Ok(worked)
    }

    /// What the kernel gave to other workers.
    fn receive_parcels(&mut self, now: Now) -> bool {
        for parcels in 0..MAX_PARCELS {
            let Some(parcel) = self.neighbours.inbox.next() else {
                return parcels > 0;
            };
            self.engine.on_parcel(now, &parcel, &mut self.out);
            if self.out.wants_flush() {
                self.flush();
            }
        }
        true
    }

    fn receive(&mut self, now: Now) -> bool {
        let mut worked = false;
        for _ in 0..MAX_RECEIVES {
            let Some(sockets) = &self.net.sockets else {
                break;
            };
            let (engine, out) = (&mut self.engine, &mut self.out);
            let count = sockets.receive(&mut self.buffers, |segment, meta| {
                let origin = Origin { from: canonical(meta.addr), to: meta.dst_ip, ecn: udp::ecn(meta) };
                engine.on_udp(now, segment, origin, out);
            });
            worked |= count > 0;
            if self.out.wants_flush() {
                self.flush();
            }
            if count == 0 {
                break;
            }
        }
        worked
    }

    fn read_tun(&mut self, now: Now) -> io::Result<bool> {
        for reads in 0..MAX_READS {
            let (engine, out) = (&mut self.engine, &mut self.out);
            match self.tun.read(&mut self.shell, |packet| engine.on_tun(now, packet, out)) {
                Ok(Read::Packet) => {}
                Ok(Read::Nothing) => return Ok(reads > 0),
                Ok(Read::Gone) => {
                    self.end = Some(End::InterfaceGone);
                    return Ok(true);
                }
                // What the kernel made and we cannot split; it is gone.
                Err(error) if error.raw_os_error().is_none() => {
                    tracing::debug!(%error, "a super-packet could not be split");
                }
                Err(error) => return Err(error),
            }
            if self.out.wants_flush() {
                self.flush();
            }
        }
        Ok(true)
    }

    fn flush(&mut self) {
        if self.engine.has_parcels() {
            let parcels = self.engine.take_parcels();
            self.shell.forwarded += parcels.len() as u64;
            let lost = self.neighbours.hand_on(parcels);
            self.shell.forwarded -= lost.packets;
            self.shell.ring_drops += lost.packets;
            self.engine.lost(Drop::Forward, lost.packets, lost.bytes);
        }
        if !self.out.net().is_empty() {
            match &mut self.net.sockets {
                Some(sockets) => sockets.send(&mut self.out, &mut self.engine),
                None => self.out.clear_net(),
            }
        }
        if !self.out.tun().is_empty() {
            self.tun.write(&mut self.out, &mut self.engine, &mut self.shell);
        }
    }

    /// Journals removed peers; a full disk keeps their slots from being used again until there is room.
    fn settle(&mut self) -> i32 {
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

    fn read_mail(&mut self, now: Now) -> bool {
        for letters in 0..MAX_LETTERS {
            let Some(mail) = self.mailbox.next() else {
                return letters > 0;
            };
            let reply = self.handle(now, mail.request);
            // The asker may have given up waiting.
            let _ = mail.reply.try_send(reply);
        }
        true
    }

    fn handle(&mut self, now: Now, request: Request) -> Reply {
        let errno = match request {
            Request::Describe => return Reply::Device(Box::new(self.describe())),
            Request::List { from, limit } => {
                let from = u16::try_from(from).unwrap_or(u16::MAX);
                let (peers, next) = self.engine.peers(from, limit);
                return Reply::Peers { peers, next: next.map(u32::from) };
            }
            Request::Device(change) => self.change_device(now, change).map_or_else(|error| errno_of(&error), |()| 0),
            Request::Peers(changes) => {
                let errno = self.change_peers(now, changes);
                self.flush();
                let settled = self.settle() == 0;
                return Reply::Changed { errno, notices: self.engine.take_notices(), settled };
            }
            Request::Notices(notices) => {
                notices.into_iter().for_each(|notice| self.engine.on_notice(notice));
                self.settle();
                0
            }
            Request::BeginReplace => {
                self.engine.begin_replace();
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

    fn change_device(&mut self, now: Now, change: DeviceChange) -> io::Result<()> {
        let policy = self.engine.change_policy(now, change.policy);
        policy.map_err(|TooMany| io::Error::from_raw_os_error(libc::ENOSPC))?;
        if let Some(fwmark) = change.fwmark {
            if let Some(sockets) = &self.net.sockets {
                sockets.set_fwmark(fwmark)?;
            }
            self.net.fwmark = fwmark;
        }
        if let Some(secret) = &change.private_key {
            self.engine.set_private_key(secret);
        }
        self.engine.set_overlay(change.replace_overlay, &change.overlay);
        let bound = self.net.sockets.as_ref().map(Sockets::port);
        let wanted = match (change.listen_port, bound) {
            (Some(port), Some(bound)) if port == bound => None,
            (Some(port), _) => Some(port),
            // Without a port of its own an interface with a key gets any.
            (None, None) => self.engine.device().private_key.map(|_| 0),
            (None, Some(_)) => None,
        };
        if let Some(port) = wanted {
            let (offloads, shard) = (self.tun.offloads(), self.engine.shard());
            self.net.sockets = Some(Sockets::bind(port, self.net.fwmark, offloads, shard)?);
        }
        if let (Some(ack), Some(journal)) = (change.journal_ack, &self.journal) {
            journal.lock().unwrap_or_else(PoisonError::into_inner).acknowledge(ack)?;
        }
        Ok(())
    }

    fn change_peers(&mut self, now: Now, changes: Vec<PeerChange>) -> i32 {
        let slices = changes.len().div_ceil(MAX_SETTLED);
        for (number, change) in changes.into_iter().enumerate() {
            if number % MAX_CHANGES == MAX_CHANGES - 1 {
                self.engine.leave();
                self.engine.enter();
            }
            while self.engine.waits_for_settling(&change) && self.settle() == libc::EAGAIN {}
            match self.engine.apply_peer(now, change, &mut self.out) {
                Ok(()) => {}
                Err(Refused::Full) => return libc::ENOSPC,
                Err(Refused::Closing) => return libc::EBUSY,
                Err(Refused::TenantPrefix) => return libc::EINVAL,
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
        0
    }

    fn describe(&self) -> DeviceState {
        let mut shell = self.shell;
        self.tun.describe(&mut shell);
        if let Some(sockets) = &self.net.sockets {
            sockets.describe(&mut shell);
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

fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
