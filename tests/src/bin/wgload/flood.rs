//! Sending the initiations, a window of them at a time, and collecting what comes back.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use anyhow::Result;
use cvault_tests::bench::server_secret;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;

use crate::cookie::Opener;
use crate::initiator::{COOKIE_REPLY, Initiator, Kind};

/// What is outstanding is sent again after a silence of this length. WireGuard's own 5 s would make a run with a loss long.
const SILENCE: Duration = Duration::from_millis(500);
const EVENTS: usize = 256;
const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

pub(crate) struct Flood {
    pub(crate) elapsed: Duration,
    /// From the first sending to the response, of each that was answered.
    pub(crate) latencies: Vec<Duration>,
    pub(crate) cookies: u64,
    pub(crate) resent: u64,
}

/// Ends when all are answered or `limit` has passed.
pub(crate) fn run(initiators: &mut [Initiator], window: usize, limit: Duration) -> Result<Flood> {
    let epoll = watch(initiators)?;
    let opener = Opener::of_server(server_secret().public.as_bytes());
    let started = Instant::now();
    let mut state = State {
        sent_at: Vec::with_capacity(initiators.len()),
        heard_at: started,
        flood: Flood {
            elapsed: Duration::ZERO,
            latencies: Vec::with_capacity(initiators.len()),
            cookies: 0,
            resent: 0,
        },
    };
    let mut events = Vec::with_capacity(EVENTS);
    while state.flood.latencies.len() < initiators.len() && started.elapsed() < limit {
        while state.sent_at.len() < initiators.len() && state.sent_at.len() - state.flood.latencies.len() < window {
            let next = state.sent_at.len();
            state.sent_at.push(Instant::now());
            send(&initiators[next])?;
        }
        epoll::wait(&epoll, spare_capacity(&mut events), Some(&WAIT))?;
        for event in events.drain(..) {
            let number = usize::try_from(event.data.u64())?;
            state.receive(number, &mut initiators[number], &opener)?;
        }
        if state.heard_at.elapsed() > SILENCE {
            state.resend(initiators)?;
        }
    }
    state.flood.elapsed = started.elapsed();
    Ok(state.flood)
}

struct State {
    /// By number, of those that were sent.
    sent_at: Vec<Instant>,
    heard_at: Instant,
    flood: Flood,
}

impl State {
    fn receive(&mut self, number: usize, initiator: &mut Initiator, opener: &Opener) -> Result<()> {
        let mut datagram = [0; 2048];
        loop {
            let length = match initiator.socket.recv(&mut datagram) {
                Ok(length) => length,
                // A server that is just starting refuses.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) => {
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            };
            let datagram = &datagram[..length];
            match initiator.kind(datagram) {
                Kind::Response if !initiator.is_answered() => {
                    self.heard_at = Instant::now();
                    self.flood.latencies.push(self.heard_at - self.sent_at[number]);
                    initiator.keep(datagram);
                }
                Kind::CookieReply if !initiator.is_answered() => {
                    self.heard_at = Instant::now();
                    self.flood.cookies += 1;
                    let reply: &[u8; COOKIE_REPLY.1] = datagram.try_into()?;
                    if opener.seal(reply, &mut initiator.initiation) {
                        send(initiator)?;
                    }
                }
                Kind::Response | Kind::CookieReply | Kind::Other => {}
            }
        }
    }

    fn resend(&mut self, initiators: &[Initiator]) -> Result<()> {
        self.heard_at = Instant::now();
        for initiator in initiators.iter().take(self.sent_at.len()).filter(|initiator| !initiator.is_answered()) {
            self.flood.resent += 1;
            send(initiator)?;
        }
        Ok(())
    }
}

fn watch(initiators: &[Initiator]) -> Result<OwnedFd> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for (number, initiator) in initiators.iter().enumerate() {
        let data = epoll::EventData::new_u64(u64::try_from(number)?);
        epoll::add(&epoll, &initiator.socket, data, epoll::EventFlags::IN)?;
    }
    Ok(epoll)
}

/// What the kernel cannot send now counts as lost and is sent again.
fn send(initiator: &Initiator) -> Result<()> {
    match initiator.socket.send(&initiator.initiation) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
