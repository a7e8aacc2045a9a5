//! Where clients come in. One thread waits for new ones and for those that say nothing, and makes a change of a few peers
//! itself: that takes less time than to wake another thread, and who was woken by the end of one connection is awake for the
//! next. Whoever wants more, or has not said all of it, gets a thread of its own.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use zeroize::{Zeroize, Zeroizing};

use super::server::{CLIENT_SILENCE, MAX_CLIENTS, SMALL_BYTES, Server, answer};

/// When there is no descriptor for another client, or no place.
const PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Door {
    server: Arc<Server>,
    listener: UnixListener,
    silent: Vec<Silent>,
    /// Every thread of a client has one, too.
    threads: Arc<()>,
    /// Of one request, while it is looked at.
    seen: Zeroizing<[u8; SMALL_BYTES]>,
}

struct Silent {
    client: UnixStream,
    until: Instant,
}

/// What becomes of a client that had something to say.
enum Next {
    Silence,
    Thread,
    End,
}

impl Door {
    /// # Errors
    /// When the socket cannot be used.
    pub(super) fn new(server: Arc<Server>, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            server,
            listener,
            silent: Vec::new(),
            threads: Arc::default(),
            seen: Zeroizing::new([0; SMALL_BYTES]),
        })
    }

    /// Until the process ends.
    pub(super) fn keep(mut self) {
        loop {
            if let Err(error) = self.turn() {
                tracing::warn!(%error, "a client of the control socket could not be accepted");
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Waits for something to happen, and sees to it.
    fn turn(&mut self) -> io::Result<()> {
        let now = Instant::now();
        self.silent.retain(|silent| silent.until > now);
        let threads = Arc::strong_count(&self.threads) - 1;
        let is_full = self.silent.len() + threads >= MAX_CLIENTS;
        let next_end = self.silent.iter().map(|silent| silent.until.duration_since(now)).min();
        // The end of a thread wakes nobody.
        let pause = (is_full && threads > 0).then_some(PAUSE);
        let (silent, newcomer) = self.wait([next_end, pause].into_iter().flatten().min(), is_full)?;
        // In front of those that have hung up.
        if newcomer {
            match self.listener.accept() {
                Ok((client, _)) => self.see_to(client),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        for index in silent.into_iter().rev() {
            let Silent { client, .. } = self.silent.swap_remove(index);
            self.see_to(client);
        }
        Ok(())
    }

    /// Which of the silent have something to say or have hung up, and whether there is a new client.
    fn wait(&self, patience: Option<Duration>, is_full: bool) -> io::Result<(Vec<usize>, bool)> {
        let mut ends: Vec<_> = self.silent.iter().map(|silent| PollFd::new(&silent.client, PollFlags::IN)).collect();
        if !is_full {
            ends.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        let patience = patience.map(|patience| Timespec::try_from(patience).expect("a few seconds"));
        match poll(&mut ends, patience.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok((Vec::new(), false)),
            Err(error) => return Err(error.into()),
        }
        let is_ready = |index: &usize| ends.get(*index).is_some_and(|end| !end.revents().is_empty());
        Ok(((0..self.silent.len()).filter(is_ready).collect(), is_ready(&self.silent.len())))
    }

    fn see_to(&mut self, client: UnixStream) {
        match catch_unwind(AssertUnwindSafe(|| self.serve_at_once(&client))) {
            Ok(Ok(Next::Silence)) => self.silent.push(Silent { client, until: Instant::now() + CLIENT_SILENCE }),
            Ok(Ok(Next::Thread)) => self.give_thread(client),
            Ok(Ok(Next::End)) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a client of the control socket failed"),
            Err(_) => tracing::error!("a request on the control socket panicked"),
        }
    }

    /// Serves a request that is there and small.
    fn serve_at_once(&mut self, client: &UnixStream) -> io::Result<Next> {
        // To take it out of the socket would wake a client that waits for the answer, at the cost of whoever makes it.
        let seen = match recv(client, &mut self.seen[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Ok(Next::End),
            Ok((seen, _)) => seen,
            Err(Errno::AGAIN) => return Ok(Next::Silence),
            Err(error) => return Err(error.into()),
        };
        let errno = self.server.change_at_once(&self.seen[..seen]);
        self.seen[..seen].zeroize();
        let Some(errno) = errno else {
            return Ok(Next::Thread);
        };
        send(client, answer(errno).as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        recv(client, &mut self.seen[..seen], RecvFlags::DONTWAIT)?;
        self.seen[..seen].zeroize();
        Ok(Next::Silence)
    }

    fn give_thread(&self, client: UnixStream) {
        let (server, place) = (Arc::clone(&self.server), Arc::clone(&self.threads));
        let thread = std::thread::Builder::new().name("uapi-client".into()).spawn(move || {
            server.attend(&client);
            // Or its place would be given away while it still has a descriptor.
            drop(client);
            drop(place);
        });
        if let Err(error) = thread {
            tracing::warn!(%error, "no thread for a client of the control socket");
        }
    }
}
