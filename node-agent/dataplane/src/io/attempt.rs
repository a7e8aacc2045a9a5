//! What to try when datagrams do not leave at once, and when to give them up. No sockets: the calls are arguments.

use std::io;

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

/// Sends a run in one call. What the socket has no room for is lost; for any other error the datagrams are tried
/// singly, and then from another address.
pub(super) fn attempt(
    datagrams: &[Datagram],
    mut transmit: impl FnMut(&[Datagram], Source) -> io::Result<()>,
    mut report: impl FnMut(&[Datagram], Fate),
) {
    match transmit(datagrams, Source::Via) {
        Ok(()) => return report(datagrams, Fate::Left(Source::Via)),
        Err(error) if is_full(&error) => return report(datagrams, Fate::Lost),
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
            Ok(from) => report(one, Fate::Left(from)),
            Err(error) if is_full(&error) => return report(&datagrams[at..], Fate::Lost),
            Err(_) => report(one, Fate::Lost),
        }
    }
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
