//! How other threads talk to the worker: a short bounded queue and an eventfd to wake it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use crate::change::{DeviceChange, PeerChange};
use crate::engine::{DeviceView, PeerView};

/// Requests that may wait. Callers block when it is full: they are control threads, never the data path.
const BOUND: usize = 16;
/// Longer than any pass of the worker, however busy.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) enum Request {
    Device(DeviceChange),
    Peers(Vec<PeerChange>),
    BeginReplace,
    EndReplace,
    /// Go on journaling removed peers; `EAGAIN` while there are more.
    Settle,
    Describe,
    List {
        from: u16,
        limit: usize,
    },
    Stop,
}

pub(crate) enum Reply {
    /// 0, or an errno.
    Done(i32),
    Device(Box<DeviceState>),
    Peers {
        peers: Vec<PeerView>,
        next: Option<u16>,
    },
}

/// The engine's view and what the shell adds.
pub(crate) struct DeviceState {
    pub(crate) view: DeviceView,
    pub(crate) listen_port: u16,
    pub(crate) fwmark: u32,
    pub(crate) shell: ShellState,
}

/// Offloads in use, and bytes as the kernel's counters of the TUN show them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ShellState {
    pub(crate) tun_tso: bool,
    pub(crate) tun_uso: bool,
    pub(crate) tun_merge: bool,
    pub(crate) udp_gso: bool,
    pub(crate) udp_gro: bool,
    /// Read from the TUN (the kernel's `tx_bytes`), and header bytes added by splitting it.
    pub(crate) tun_read_bytes: u64,
    pub(crate) tun_split_bytes: u64,
    /// Written to the TUN (the kernel's `rx_bytes`), and header bytes saved by merging.
    pub(crate) tun_written_bytes: u64,
    pub(crate) tun_merged_bytes: u64,
    pub(crate) panics: u64,
}

pub(crate) struct Mail {
    pub(crate) request: Request,
    pub(crate) reply: SyncSender<Reply>,
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
        let (reply, answer) = sync_channel(1);
        self.queue.send(Mail { request, reply }).map_err(|_| WorkerGone)?;
        // A full eventfd counter means that the worker is already being woken.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        answer.recv_timeout(PATIENCE).map_err(|_| WorkerGone)
    }
}

impl Mailbox {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(crate) fn next(&self) -> Option<Mail> {
        self.queue.try_recv().ok()
    }

    /// Before looking into the queue, so that a later letter wakes again.
    pub(crate) fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}
