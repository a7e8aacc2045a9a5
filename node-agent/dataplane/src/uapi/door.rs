//! Where clients come in. One thread waits for new ones and for those that say nothing, and makes a change of a few peers
//! itself if the worker sleeps: that takes less time than to wake another thread, and who was woken by the end of one connection
//! is awake for the next. It waits for nobody. Whoever wants more, or has not said all of it, gets a thread of its own.

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

/// When there is no descriptor for another client.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How soon the end of a thread is noticed when there is no place for another client.
const PLACE_PAUSE: Duration = Duration::from_millis(10);
/// How long the door stays awake after a change, for the next: a client on another processor would have to wake it for each,
/// which takes longer than to make one.
const WAKEFUL: Duration = Duration::from_micros(150);

pub(super) struct Door {
    server: Arc<Server>,
    listener: UnixListener,
    silent: Vec<Silent>,
    /// Every thread of a client has one, too.
    threads: Arc<()>,
    /// Of one request, while it is looked at.
    seen: Zeroizing<[u8; SMALL_BYTES]>,
    awake_until: Option<Instant>,
}

struct Silent {
    client: UnixStream,
    until: Instant,
}

/// What becomes of a client.
enum Next {
    /// It was served.
    Silence,
    /// Nothing can be read of it.
    Nothing,
    /// It is to be served by a thread, which has this to tell it first.
    Thread(Option<String>),
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
            awake_until: None,
        })
    }

    /// Until the process ends.
    pub(super) fn keep(mut self) {
        loop {
            if let Err(error) = self.turn() {
                tracing::warn!(%error, "a client of the control socket could not be accepted");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    /// Waits for something to happen, and sees to it.
    fn turn(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let threads = Arc::strong_count(&self.threads) - 1;
        let is_full = self.silent.len() + threads >= MAX_CLIENTS;
        let next_end = self.silent.iter().map(|silent| silent.until.saturating_duration_since(now)).min();
        let place = (is_full && threads > 0).then_some(PLACE_PAUSE);
        let (silent, newcomer) = self.wait([next_end, place].into_iter().flatten().min(), is_full)?;
        // In front of those that have hung up.
        let accepted = if newcomer { self.accept() } else { Ok(()) };
        for index in silent.into_iter().rev() {
            let Silent { client, .. } = self.silent.swap_remove(index);
            self.see_to(client, false);
        }
        // Those that are left said nothing.
        self.silent.retain(|silent| silent.until > now);
        accepted
    }

    fn accept(&mut self) -> io::Result<()> {
        match self.listener.accept() {
            Ok((client, _)) => self.see_to(client, true),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
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
        match self.poll(&mut ends, patience.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok((Vec::new(), false)),
            Err(error) => return Err(error.into()),
        }
        let is_ready = |index: &usize| ends.get(*index).is_some_and(|end| !end.revents().is_empty());
        Ok(((0..self.silent.len()).filter(is_ready).collect(), is_ready(&self.silent.len())))
    }

    /// Looks again and again for a moment after a change, and sleeps then.
    fn poll(&self, ends: &mut [PollFd<'_>], patience: Option<&Timespec>) -> Result<usize, Errno> {
        while self.awake_until.is_some_and(|until| Instant::now() < until) {
            match poll(ends, Some(&Timespec::default()))? {
                // Whoever wants this processor has it first, packets and the client itself.
                0 => std::thread::yield_now(),
                ready => return Ok(ready),
            }
        }
        poll(ends, patience)
    }

    fn see_to(&mut self, client: UnixStream, is_new: bool) {
        match catch_unwind(AssertUnwindSafe(|| self.serve_at_once(&client))) {
            Ok(Ok(Next::Nothing)) if !is_new => self.give_thread(client, None),
            Ok(Ok(Next::Silence | Next::Nothing)) => {
                self.silent.push(Silent { client, until: Instant::now() + CLIENT_SILENCE });
            }
            Ok(Ok(Next::Thread(owed))) => self.give_thread(client, owed),
            Ok(Ok(Next::End)) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a client of the control socket failed"),
            Err(_) => tracing::error!("a request on the control socket panicked"),
        }
    }

    /// Serves a request that is there, small, and can be served without waiting for anybody.
    fn serve_at_once(&mut self, client: &UnixStream) -> io::Result<Next> {
        // To take it out of the socket would wake a client that waits for the answer, at the cost of whoever makes it.
        let seen = match recv(client, &mut self.seen[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Ok(Next::End),
            Ok((seen, _)) => seen,
            Err(Errno::AGAIN) => return Ok(Next::Nothing),
            Err(error) => return Err(error.into()),
        };
        let errno = self.server.change_at_once(&self.seen[..seen]);
        self.seen[..seen].zeroize();
        let Some(errno) = errno else {
            return Ok(Next::Thread(None));
        };
        self.awake_until = Some(Instant::now() + WAKEFUL);
        let answer = answer(errno);
        let answered = send(client, answer.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        let (taken, _) = recv(client, &mut self.seen[..seen], RecvFlags::DONTWAIT)?;
        self.seen[..seen].zeroize();
        match answered {
            Ok(sent) if sent == answer.len() && taken == seen => Ok(Next::Silence),
            Err(Errno::AGAIN) if taken == seen => Ok(Next::Thread(Some(answer))),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => Err(error.into()),
        }
    }

    fn give_thread(&self, client: UnixStream, owed: Option<String>) {
        let client = Arc::new(client);
        let (server, place, theirs) = (Arc::clone(&self.server), Arc::clone(&self.threads), Arc::clone(&client));
        let thread = std::thread::Builder::new().name("uapi-client".into()).spawn(move || {
            server.attend(&theirs, owed);
            // Or its place would be given away while it still has a descriptor.
            drop(theirs);
            drop(place);
        });
        if let Err(error) = thread {
            tracing::warn!(%error, "no thread for a client of the control socket");
            let _ = send(&*client, answer(libc::EAGAIN).as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}
