//! Where a worker sleeps, and what wakes it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};

use super::udp::Sockets;

const MAILBOX: u64 = 0;
const TUN: u64 = 1;
/// And the next one.
const SOCKETS: u64 = 2;

/// What has something to read. What has not need not be asked: it will wake the worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) mailbox: bool,
    pub(super) tun: bool,
    /// In the order of [`Sockets::fds`].
    pub(super) sockets: [bool; 2],
}

impl Ready {
    pub(super) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// All that one worker waits for. It outlives the sockets, which are not listened to any more once they are closed.
#[derive(Debug)]
pub(super) struct Wait {
    epoll: OwnedFd,
}

impl Wait {
    pub(super) fn new(mailbox: BorrowedFd<'_>, tun: BorrowedFd<'_>) -> io::Result<Self> {
        let wait = Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? };
        wait.add(mailbox, MAILBOX)?;
        wait.add(tun, TUN)?;
        Ok(wait)
    }

    /// Listens to sockets, too.
    pub(super) fn add_sockets(&self, sockets: &Sockets) -> io::Result<()> {
        (SOCKETS..).zip(sockets.fds()).try_for_each(|(number, socket)| self.add(socket, number))
    }

    fn add(&self, fd: BorrowedFd<'_>, number: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(number), epoll::EventFlags::IN)?)
    }

    /// Until something is ready, at most so long.
    pub(super) fn wait(&self, timeout_ms: u64) -> io::Result<Ready> {
        let nanos = i64::try_from(timeout_ms * 1_000_000).expect("at most a second");
        let timeout = Timespec { tv_sec: nanos / 1_000_000_000, tv_nsec: nanos % 1_000_000_000 };
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 4];
        let ready = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((ready, _)) => ready,
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(error.into()),
        };
        let is = |number| ready.iter().any(|event| event.data.u64() == number);
        Ok(Ready { mailbox: is(MAILBOX), tun: is(TUN), sockets: [is(SOCKETS), is(SOCKETS + 1)] })
    }
}
