//! A worker, and who may act for it: its own thread, which has it while it does anything, and whoever asks for little while
//! that sleeps, and so need not wait for it to wake.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use super::mailbox::{Controller, Reply, Request};

/// Who can be acted for.
pub(crate) trait Acting {
    /// Does what was asked for.
    fn act(&mut self, request: Request) -> Reply;
    /// Whether that, small as it looks, takes no longer than packets can wait.
    fn is_brief(&self, request: &Request) -> bool;
    /// It does nothing any more.
    fn has_ended(&self) -> bool;
    /// Something has to be done before its thread wakes by itself.
    fn is_due(&self) -> bool;
}

/// Where a worker is, for its own thread and for those who act for it.
pub(crate) struct Desk<A> {
    acting: Mutex<A>,
    /// The thread waits for somebody who acts for it.
    waited_for: AtomicBool,
    controller: Controller,
}

impl<A: Acting> Desk<A> {
    pub(crate) fn new(acting: A, controller: Controller) -> Self {
        Self { acting: Mutex::new(acting), waited_for: AtomicBool::new(false), controller }
    }

    /// For the thread of the worker.
    pub(super) fn take(&self) -> MutexGuard<'_, A> {
        match self.acting.try_lock() {
            Ok(acting) => acting,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                self.waited_for.store(true, Ordering::Relaxed);
                let acting = self.acting.lock().unwrap_or_else(PoisonError::into_inner);
                self.waited_for.store(false, Ordering::Relaxed);
                acting
            }
        }
    }

    /// Serves a small request at once if the worker sleeps. Goes on with the request, which is then to be posted, if it is not
    /// small, or the worker is at work, or about to be.
    pub(crate) fn serve(&self, request: Request) -> ControlFlow<Reply, Request> {
        if !request.is_small() || self.waited_for.load(Ordering::Relaxed) {
            return ControlFlow::Continue(request);
        }
        let Ok(mut acting) = self.acting.try_lock() else {
            return ControlFlow::Continue(request);
        };
        if acting.has_ended() || !acting.is_brief(&request) {
            return ControlFlow::Continue(request);
        }
        let reply = acting.act(request);
        let is_due = acting.is_due();
        // Or the thread would wake to find its place taken.
        drop(acting);
        if is_due {
            self.controller.poke();
        }
        ControlFlow::Break(reply)
    }
}

#[cfg(test)]
mod tests {
    use super::super::mailbox::{Mailbox, mailbox};
    use super::*;
    use crate::change::PeerChange;

    #[derive(Default)]
    struct Recorder {
        acted: usize,
        tedious: bool,
        ended: bool,
        due: bool,
    }

    impl Acting for Recorder {
        fn act(&mut self, _: Request) -> Reply {
            self.acted += 1;
            Reply::Done(0)
        }

        fn is_brief(&self, _: &Request) -> bool {
            !self.tedious
        }

        fn has_ended(&self) -> bool {
            self.ended
        }

        fn is_due(&self) -> bool {
            self.due
        }
    }

    fn desk(recorder: Recorder) -> (Desk<Recorder>, Mailbox) {
        let (controller, mailbox) = mailbox().unwrap();
        (Desk::new(recorder, controller), mailbox)
    }

    fn is_served(desk: &Desk<Recorder>, request: Request) -> bool {
        let before = desk.take().acted;
        let served = desk.serve(request).is_break();
        assert_eq!(desk.take().acted - before, usize::from(served));
        served
    }

    fn one() -> Request {
        Request::Peers(vec![PeerChange::default()])
    }

    fn was_woken(mailbox: &Mailbox) -> bool {
        rustix::io::read(mailbox.fd(), &mut [0; 8]).is_ok()
    }

    #[test]
    fn a_worker_that_sleeps_is_acted_for_and_woken_only_if_something_is_due() {
        let (desk, mailbox) = desk(Recorder::default());
        assert!(is_served(&desk, one()));
        assert!(!was_woken(&mailbox));
        desk.take().due = true;
        assert!(is_served(&desk, one()));
        assert!(was_woken(&mailbox));
    }

    #[test]
    fn one_that_is_at_work_or_waits_for_its_turn_is_left_alone() {
        let (desk, _mailbox) = desk(Recorder::default());
        let at_work = desk.take();
        assert!(desk.serve(one()).is_continue());
        std::thread::scope(|scope| {
            scope.spawn(|| drop(desk.take()));
            while !desk.waited_for.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            drop(at_work);
        });
        assert!(is_served(&desk, one()), "it has had its turn");
        desk.waited_for.store(true, Ordering::Relaxed);
        assert!(desk.serve(one()).is_continue());
    }

    #[test]
    fn one_that_has_ended_answers_nothing_nor_does_one_to_whom_it_would_take_long() {
        for recorder in
            [Recorder { ended: true, ..Recorder::default() }, Recorder { tedious: true, ..Recorder::default() }]
        {
            let (desk, _mailbox) = desk(recorder);
            assert!(!is_served(&desk, one()));
        }
    }

    #[test]
    fn what_takes_long_or_is_not_about_peers_is_posted() {
        let (desk, _mailbox) = desk(Recorder::default());
        let net = "192.0.2.0/32".parse().unwrap();
        let wide = |prefixes| PeerChange { allowed_ips: vec![net; prefixes], ..PeerChange::default() };
        assert!(is_served(&desk, Request::Peers(vec![wide(1); 8])));
        assert!(!is_served(&desk, Request::Peers(vec![wide(1); 9])));
        assert!(!is_served(&desk, Request::Peers(vec![wide(9)])));
        for request in [Request::BeginReplace, Request::Settle, Request::List { from: 0, limit: 1 }, Request::Stop] {
            assert!(!is_served(&desk, request));
        }
    }
}
