//! What to try when datagrams do not leave at once, and when to give them up. No sockets: the calls are arguments.

use std::io;

use std::collections::HashMap;
use std::net::IpAddr;

use crate::out::Datagram;

/// Whether a full socket is waited for once more in this flush. Everybody's packets stand behind the one that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    Left,
    Spent,
}

impl Patience {
    /// Sends; when the socket is full, waits for room and sends again, unless such a wait was in vain before.
    pub(super) fn send(&mut self, send: impl Fn() -> io::Result<()>, wait: impl FnOnce() -> bool) -> io::Result<()> {
        match send() {
            Err(error) if is_full(&error) && *self == Self::Left => {
                if !wait() {
                    *self = Self::Spent;
                    return Err(error);
                }
                send()
            }
            other => other,
        }
    }
}

/// The source address of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The one the peer knows us by.
    Via,
    /// What the kernel chooses.
    Any,
}

/// What became of datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Left(Source),
    Lost,
}

/// Paths that take no runs: their MTU is less than a datagram, or the device computes no checksums. Datagrams go there
/// singly, and now and then a run is tried again.
#[derive(Debug, Default)]
pub(super) struct Singly {
    paths: HashMap<IpAddr, Pause>,
}

/// Counted in runs, doubled with each refusal.
#[derive(Debug)]
struct Pause {
    left: u32,
    next: u32,
}

impl Singly {
    const FIRST: u32 = 16;
    const LONGEST: u32 = 4096;
    const MAX_PATHS: usize = 4096;

    /// Whether the run that is about to leave is to leave singly.
    pub(super) fn takes(&mut self, to: IpAddr) -> bool {
        if self.paths.is_empty() {
            return false;
        }
        let Some(pause) = self.paths.get_mut(&to) else {
            return false;
        };
        let waits = pause.left > 0;
        pause.left = pause.left.saturating_sub(1);
        waits
    }

    /// How many there are.
    pub(super) fn paths(&self) -> u64 {
        self.paths.len() as u64
    }

    /// What became of a run.
    pub(super) fn learn(&mut self, to: IpAddr, run: Run) {
        match run {
            Run::Refused => {
                if self.paths.len() >= Self::MAX_PATHS {
                    self.paths.clear();
                }
                let pause = self.paths.entry(to).or_insert(Pause { left: 0, next: Self::FIRST });
                pause.left = pause.next;
                pause.next = (pause.next * 2).min(Self::LONGEST);
            }
            Run::Left if !self.paths.is_empty() => {
                self.paths.remove(&to);
            }
            Run::Left | Run::Unknown => {}
        }
    }
}

/// What a path thinks of runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Run {
    Left,
    /// The same datagrams left singly.
    Refused,
    Unknown,
}

/// Sends a run in one call. What the socket has no room for is lost; for any other error the datagrams are tried
/// singly, and then from another address.
pub(super) fn attempt(
    datagrams: &[Datagram],
    mut transmit: impl FnMut(&[Datagram], Source) -> io::Result<()>,
    mut report: impl FnMut(&[Datagram], Fate),
) -> Run {
    let mut run = Run::Unknown;
    match transmit(datagrams, Source::Via) {
        Ok(()) => {
            report(datagrams, Fate::Left(Source::Via));
            return if datagrams.len() > 1 { Run::Left } else { Run::Unknown };
        }
        Err(error) if is_full(&error) => {
            report(datagrams, Fate::Lost);
            return Run::Unknown;
        }
        // Segments larger than the path, or a device without checksums: singly it may work.
        Err(_) => {}
    }
    for (at, datagram) in datagrams.iter().enumerate() {
        let one = std::slice::from_ref(datagram);
        let mut sent = transmit(one, Source::Via).map(|()| Source::Via);
        if datagram.via.is_some() && sent.as_ref().is_err_and(|error| !is_full(error)) {
            sent = transmit(one, Source::Any).map(|()| Source::Any);
        }
        match sent {
            Ok(from) => {
                if from == Source::Via && datagrams.len() > 1 {
                    run = Run::Refused;
                }
                report(one, Fate::Left(from));
            }
            Err(error) if is_full(&error) => {
                report(&datagrams[at..], Fate::Lost);
                break;
            }
            Err(_) => report(one, Fate::Lost),
        }
    }
    run
}

/// The socket's buffer, or the device's queue.
fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::ecn::Ecn;

    fn datagram(to: &str, len: usize) -> Datagram {
        Datagram { start: 0, len, to: to.parse().unwrap(), via: None, slot: 1, inner: len - 32, ecn: Ecn::NotEct }
    }

    /// What was called, and what was reported, when `transmit` answers with `errno` unless it is a single datagram from
    /// an address that `singly` accepts.
    fn attempts(datagrams: &[Datagram], errno: i32, singly: Option<Source>) -> (usize, Vec<(usize, Fate)>) {
        let (mut calls, mut fates) = (0, Vec::new());
        let transmit = |these: &[Datagram], from| {
            calls += 1;
            if these.len() == 1 && Some(from) == singly {
                return Ok(());
            }
            Err(io::Error::from_raw_os_error(errno))
        };
        attempt(datagrams, transmit, |these, fate| {
            fates.push((these.len(), fate));
        });
        (calls, fates)
    }

    #[test]
    fn a_full_socket_costs_the_run_and_neither_singles_nor_the_local_address() {
        let via = Some(Ipv4Addr::new(192, 0, 2, 9).into());
        let sticky = |len| Datagram { via, ..datagram("192.0.2.1:1", len) };
        for errno in [libc::EAGAIN, libc::ENOBUFS] {
            for run in [&[sticky(100); 64][..], &[sticky(100)]] {
                let lost = vec![(run.len(), Fate::Lost)];
                for singly in [None, Some(Source::Any)] {
                    assert_eq!(attempts(run, errno, singly), (1, lost.clone()), "{errno}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_sent_as_a_run_is_sent_singly_and_then_from_any_address() {
        let via = Some(Ipv4Addr::new(192, 0, 2, 9).into());
        let run = [Datagram { via, ..datagram("192.0.2.1:1", 100) }; 2];
        for from in [Source::Via, Source::Any] {
            let (_, fates) = attempts(&run, libc::EINVAL, Some(from));
            assert_eq!(fates, [(1, Fate::Left(from)); 2]);
        }
        let (calls, fates) = attempts(&run, libc::EINVAL, None);
        assert_eq!((calls, fates), (5, vec![(1, Fate::Lost); 2]));
    }

    #[test]
    fn a_path_that_refuses_runs_is_spared_them_for_a_while_and_asked_again() {
        let (small, other): (IpAddr, IpAddr) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let run = [datagram("192.0.2.1:1", 1480); 3];
        let refuse = |these: &[Datagram], _| match these.len() {
            1 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::EMSGSIZE)),
        };
        let mut singly = Singly::default();
        let mut tries = Vec::new();
        for n in 0..10_000 {
            assert!(!singly.takes(other), "another path");
            if !singly.takes(small) {
                tries.push(n);
                let verdict = attempt(&run, refuse, |_, fate| assert_eq!(fate, Fate::Left(Source::Via)));
                assert_eq!(verdict, Run::Refused);
                singly.learn(small, verdict);
            }
        }
        assert_eq!((&tries[..4], singly.paths()), (&[0, 17, 50, 115][..], 1));
        assert!(tries.len() < 12, "{tries:?}");
        singly.learn(small, attempt(&run, |_, _| Ok(()), |_, _| ()));
        assert!(!singly.takes(small), "the path has grown");
        assert_eq!(singly.paths(), 0);
    }

    #[test]
    fn a_lost_local_address_says_nothing_about_runs() {
        let via = Some(Ipv4Addr::new(192, 0, 2, 9).into());
        let run = [Datagram { via, ..datagram("192.0.2.1:1", 100) }; 2];
        let gone = |_: &[Datagram], from| match from {
            Source::Via => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            Source::Any => Ok(()),
        };
        assert_eq!(attempt(&run, gone, |_, _| ()), Run::Unknown);
        let full = |_: &[Datagram], _| Err(io::ErrorKind::WouldBlock.into());
        assert_eq!(attempt(&run, full, |_, _| ()), Run::Unknown);
    }

    #[test]
    fn a_flush_waits_in_vain_for_a_full_socket_only_once() {
        let full = || Err(io::ErrorKind::WouldBlock.into());
        let mut patience = Patience::Left;
        let mut waits = 0;
        for _ in 0..100 {
            let wait = || {
                waits += 1;
                false
            };
            assert!(patience.send(full, wait).is_err());
        }
        assert_eq!(waits, 1);
        let sent = std::cell::Cell::new(0);
        let once_full = || {
            sent.set(sent.get() + 1);
            if sent.get() == 1 { full() } else { Ok(()) }
        };
        assert!(Patience::Left.send(once_full, || true).is_ok());
    }
}
