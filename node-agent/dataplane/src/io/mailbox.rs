//! How other threads talk to the worker: a short bounded queue and an eventfd to wake it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use std::vec;

use rustix::event::{EventfdFlags, eventfd};

use crate::change::{DeviceChange, PeerChange};
use crate::engine::{DeviceView, Notice, PeerView};
use crate::policy::{TenantId, TenantSettings};

/// Requests that may wait. Callers block when it is full: they are control threads, never the data path.
const BOUND: usize = 16;
/// Longer than any pass of the worker, however busy.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long an asker stays awake: a worker answers a small change within it, and to be put to sleep and woken takes longer.
const ATTENTION: Duration = Duration::from_micros(20);

/// Peers, and prefixes named for them, of a change that is small.
const SMALL: usize = 8;

pub(crate) enum Request {
    Device(DeviceChange),
    /// Of the same only overlay and policy.
    Policy(DeviceChange),
    Peers(Vec<PeerChange>),
    /// The same of many, a portion in each pass. The first change that is refused is the last.
    Portions(vec::IntoIter<Vec<PeerChange>>),
    BeginReplace,
    /// As if it had not been begun; the peers named in it stay as they were made.
    AbandonReplace,
    EndReplace,
    /// Go on journaling removed peers; `EAGAIN` while there are more.
    Settle,
    Describe,
    /// Tenants with settings of their own.
    Tenants {
        /// An entry.
        from: usize,
        limit: usize,
    },
    List {
        /// A slot; of several workers, with the worker above it.
        from: u32,
        limit: usize,
    },
    /// What another worker's changes did to peers of this one.
    Notices(Vec<Notice>),
    Stop,
}

impl Request {
    /// Whether it takes microseconds, as a rule.
    pub(super) fn is_small(&self) -> bool {
        let Self::Peers(changes) = self else {
            return false;
        };
        let prefixes = |change: &PeerChange| change.allowed_ips.len() + change.removed_ips.len();
        changes.len() <= SMALL && changes.iter().map(prefixes).sum::<usize>() <= SMALL
    }
}

pub(crate) enum Reply {
    /// 0, or an errno.
    Done(i32),
    /// Peers were changed.
    Changed {
        errno: i32,
        /// How many of the changes; the next one was refused.
        made: usize,
        /// What other workers must hear before the change is answered.
        notices: Vec<Notice>,
        /// Whether all removed peers are in the journal.
        settled: bool,
    },
    Device(Box<DeviceState>),
    Tenants {
        tenants: Vec<(TenantId, TenantSettings)>,
        next: Option<usize>,
    },
    Peers {
        peers: Vec<PeerView>,
        next: Option<u32>,
    },
}

impl Reply {
    /// This one and that of the portions before, together.
    fn after(self, earlier: Option<Self>) -> Self {
        match (self, earlier) {
            (
                Self::Changed { errno, made, notices, settled },
                Some(Self::Changed { made: before, notices: mut all, settled: were_settled, .. }),
            ) => {
                all.extend(notices);
                Self::Changed { errno, made: before + made, notices: all, settled: settled && were_settled }
            }
            (reply, _) => reply,
        }
    }

    pub(crate) fn errno(&self) -> i32 {
        match self {
            Self::Done(errno) | Self::Changed { errno, .. } => *errno,
            Self::Device(_) | Self::Tenants { .. } | Self::Peers { .. } => libc::EPROTO,
        }
    }
}

/// The engine's view and what the shell adds.
pub(crate) struct DeviceState {
    pub(crate) view: DeviceView,
    pub(crate) listen_port: u16,
    pub(crate) fwmark: u32,
    pub(crate) shell: ShellState,
    /// Each worker, when they are seen together.
    pub(crate) workers: Vec<WorkerState>,
}

impl DeviceState {
    /// Adds what another worker has done.
    pub(crate) fn add(&mut self, other: &Self) {
        self.view.drops.add(&other.view.drops);
        self.view.handshakes += other.view.handshakes;
        self.view.live_peers += other.view.live_peers;
        self.view.hairpin.packets += other.view.hairpin.packets;
        self.view.hairpin.bytes += other.view.hairpin.bytes;
        let (shell, more) = (&mut self.shell, &other.shell);
        shell.tun_tso &= more.tun_tso;
        shell.tun_uso &= more.tun_uso;
        shell.tun_merge &= more.tun_merge;
        shell.udp_gso &= more.udp_gso;
        shell.udp_gso_refused += more.udp_gso_refused;
        shell.udp_gro &= more.udp_gro;
        shell.tun_read_bytes += more.tun_read_bytes;
        shell.tun_split_bytes += more.tun_split_bytes;
        shell.tun_written_bytes += more.tun_written_bytes;
        shell.tun_merged_bytes += more.tun_merged_bytes;
        shell.tun_read_errors += more.tun_read_errors;
        shell.socket_read_errors += more.socket_read_errors;
        shell.panics += more.panics;
        shell.socket_drops += more.socket_drops;
    }
}

/// One worker among several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkerState {
    /// Messages handed on to their owners, and those for which there was no room.
    pub(crate) forwarded: u64,
    pub(crate) ring_drops: u64,
    /// It has not finished a pass for seconds.
    pub(crate) stalled: bool,
}

/// Offloads in use, and bytes as the kernel's counters of the TUN show them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ShellState {
    pub(crate) tun_tso: bool,
    pub(crate) tun_uso: bool,
    pub(crate) tun_merge: bool,
    pub(crate) udp_gso: bool,
    /// Paths that refuse runs: datagrams go there singly.
    pub(crate) udp_gso_refused: u64,
    pub(crate) udp_gro: bool,
    /// Read from the TUN (the kernel's `tx_bytes`), and header bytes added by splitting it.
    pub(crate) tun_read_bytes: u64,
    pub(crate) tun_split_bytes: u64,
    /// Written to the TUN (the kernel's `rx_bytes`), and header bytes saved by merging.
    pub(crate) tun_written_bytes: u64,
    pub(crate) tun_merged_bytes: u64,
    /// Calls to read the TUN that failed.
    pub(crate) tun_read_errors: u64,
    /// Calls to receive from a socket that failed.
    pub(crate) socket_read_errors: u64,
    pub(crate) panics: u64,
    /// Datagrams that the kernel dropped before they were received.
    pub(crate) socket_drops: u64,
    /// See [`WorkerState`].
    pub(crate) forwarded: u64,
    pub(crate) ring_drops: u64,
}

pub(crate) struct Mail {
    pub(crate) request: Request,
    pub(crate) reply: SyncSender<Reply>,
    /// Gone when the asker has given up. Counts the portions that were made.
    pub(crate) asker: Weak<AtomicU32>,
}

/// A letter of portions, some of which were made.
pub(crate) struct Unfinished {
    portions: vec::IntoIter<Vec<PeerChange>>,
    reply: SyncSender<Reply>,
    asker: Weak<AtomicU32>,
    /// What the portions have brought that were made.
    so_far: Option<Reply>,
}

impl Unfinished {
    pub(crate) fn new(
        portions: vec::IntoIter<Vec<PeerChange>>,
        reply: SyncSender<Reply>,
        asker: Weak<AtomicU32>,
    ) -> Self {
        Self { portions, reply, asker, so_far: None }
    }

    /// What is to be made next.
    pub(crate) fn next(&self) -> &[PeerChange] {
        self.portions.as_slice().first().map_or(&[], Vec::as_slice)
    }

    /// Makes the first changes of the next portion a portion of their own.
    pub(crate) fn split_next(&mut self, count: usize) {
        let mut first = self.portions.next().unwrap_or_default();
        let rest = first.split_off(count.min(first.len()));
        let parts = [first, rest].into_iter().filter(|part| !part.is_empty());
        self.portions = parts.chain(self.portions.by_ref()).collect::<Vec<_>>().into_iter();
    }

    /// Shows the asker that something is done for it. Nothing is left to do if it has given up.
    pub(crate) fn wait(self) -> Option<Self> {
        self.asker.upgrade()?.fetch_add(1, Ordering::Relaxed);
        Some(self)
    }

    /// Makes the next portion. What is left is nothing once all are made, or one was refused, or the asker has given up.
    pub(crate) fn go_on(mut self, make: impl FnOnce(Vec<PeerChange>) -> Reply) -> Option<Self> {
        let made = self.asker.upgrade()?;
        let reply = make(self.portions.next()?).after(self.so_far.take());
        made.fetch_add(1, Ordering::Relaxed);
        if reply.errno() == 0 && self.portions.len() > 0 {
            self.so_far = Some(reply);
            return Some(self);
        }
        // The asker may have given up waiting.
        let _ = self.reply.try_send(reply);
        None
    }
}

/// The worker's end.
pub(crate) struct Mailbox {
    queue: Receiver<Mail>,
    wake: Arc<OwnedFd>,
}

/// Everybody else's end.
#[derive(Clone)]
pub(crate) struct Controller {
    queue: SyncSender<Mail>,
    wake: Arc<OwnedFd>,
}

/// The worker does not answer any more.
#[derive(Debug, thiserror::Error)]
#[error("the worker is gone")]
pub(crate) struct WorkerGone;

pub(crate) fn mailbox() -> io::Result<(Controller, Mailbox)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = sync_channel(BOUND);
    let controller = Controller { queue: sender, wake: Arc::clone(&wake) };
    Ok((controller, Mailbox { queue: receiver, wake }))
}

impl Controller {
    pub(crate) fn ask(&self, request: Request) -> Result<Reply, WorkerGone> {
        self.post(request)?.wait()
    }

    /// Makes the worker begin a pass.
    pub(crate) fn poke(&self) {
        // A full eventfd counter means that the worker is already being woken.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    pub(crate) fn post(&self, request: Request) -> Result<Answer, WorkerGone> {
        let (reply, answer) = sync_channel(1);
        let made = Arc::default();
        self.queue.send(Mail { request, reply, asker: Arc::downgrade(&made) }).map_err(|_| WorkerGone)?;
        self.poke();
        Ok(Answer { answer, made })
    }
}

/// What the worker will say.
pub(crate) struct Answer {
    answer: Receiver<Reply>,
    made: Arc<AtomicU32>,
}

impl Answer {
    pub(crate) fn wait(self) -> Result<Reply, WorkerGone> {
        let asked = Instant::now();
        while asked.elapsed() < ATTENTION {
            match self.answer.try_recv() {
                Ok(reply) => return Ok(reply),
                Err(TryRecvError::Disconnected) => return Err(WorkerGone),
                // The worker may need this very core.
                Err(TryRecvError::Empty) => std::thread::yield_now(),
            }
        }
        let mut seen = self.made.load(Ordering::Relaxed);
        loop {
            match self.answer.recv_timeout(PATIENCE) {
                Ok(reply) => return Ok(reply),
                Err(RecvTimeoutError::Disconnected) => return Err(WorkerGone),
                Err(RecvTimeoutError::Timeout) => {
                    let made = self.made.load(Ordering::Relaxed);
                    if made == seen {
                        return Err(WorkerGone);
                    }
                    seen = made;
                }
            }
        }
    }
}

impl Mailbox {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// To wake this worker.
    pub(crate) fn waker(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.wake)
    }

    pub(crate) fn next(&self) -> Option<Mail> {
        self.queue.try_recv().ok()
    }

    /// Before looking into the queue, so that a later letter wakes again.
    pub(crate) fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A letter of `count` portions of a peer each, as the worker finds it.
    fn letter(count: u8) -> (Answer, Unfinished) {
        let (controller, mailbox) = mailbox().unwrap();
        let portion = |number| vec![PeerChange { public_key: [number; 32], ..PeerChange::default() }];
        let portions: Vec<_> = (0..count).map(portion).collect();
        let answer = controller.post(Request::Portions(portions.into_iter())).unwrap();
        let Some(Mail { request: Request::Portions(portions), reply, asker }) = mailbox.next() else {
            panic!("no letter of portions");
        };
        (answer, Unfinished::new(portions, reply, asker))
    }

    /// The portions made, and whether any are left; `refused` is refused.
    fn go_on(letter: Unfinished, refused: u8, made: &mut Vec<u8>) -> Option<Unfinished> {
        letter.go_on(|portion| {
            let number = portion[0].public_key[0];
            made.push(number);
            Reply::Done(if number == refused { libc::ENOSPC } else { 0 })
        })
    }

    #[test]
    fn the_answer_comes_after_the_last_portion() {
        let (answer, letter) = letter(3);
        let mut made = Vec::new();
        let letter = go_on(letter, 9, &mut made).unwrap();
        let letter = go_on(letter, 9, &mut made).unwrap();
        assert!(answer.answer.try_recv().is_err());
        assert!(go_on(letter, 9, &mut made).is_none());
        assert_eq!((answer.made.load(Ordering::Relaxed), answer.wait().unwrap().errno()), (3, 0));
        assert_eq!(made, [0, 1, 2]);
    }

    #[test]
    fn a_portion_that_is_split_is_answered_as_one() {
        let (answer, mut letter) = letter(1);
        let three = [1, 2, 3].map(|number| PeerChange { public_key: [number; 32], ..PeerChange::default() });
        letter.portions = vec![three.to_vec()].into_iter();
        let changed =
            |errno, settled| Reply::Changed { errno, made: 1, notices: vec![Notice::Remove { slot: 7 }], settled };
        let mut letter = letter.wait().unwrap();
        letter.split_next(1);
        assert_eq!((letter.next().len(), letter.portions.len()), (1, 2));
        let letter = letter.go_on(|_| changed(0, false)).unwrap();
        assert!(letter.next().iter().map(|change| change.public_key).eq([[2; 32], [3; 32]]));
        assert!(letter.go_on(|_| changed(7, true)).is_none());
        let Ok(Reply::Changed { errno, made, notices, settled }) = answer.wait() else { panic!("another answer") };
        assert_eq!((errno, made, notices.len(), settled), (7, 2, 2, false));
    }

    #[test]
    fn a_refused_portion_is_the_last() {
        let (answer, letter) = letter(3);
        let mut made = Vec::new();
        let letter = go_on(letter, 1, &mut made).unwrap();
        assert!(go_on(letter, 1, &mut made).is_none());
        assert_eq!((answer.wait().unwrap().errno(), &made[..]), (libc::ENOSPC, &[0, 1][..]));
    }

    #[test]
    fn nothing_more_is_made_for_an_asker_that_has_given_up() {
        let (answer, letter) = letter(3);
        let mut made = Vec::new();
        let letter = go_on(letter, 9, &mut made).unwrap();
        drop(answer);
        assert!(go_on(letter, 9, &mut made).is_none());
        assert_eq!(made, [0]);
    }

    #[test]
    fn an_asker_learns_that_its_letter_was_given_up() {
        let (answer, letter) = letter(2);
        let letter = go_on(letter, 9, &mut Vec::new()).unwrap();
        drop(letter);
        assert!(answer.wait().is_err());
    }
}
