//! What is large and need not be made anew for every input.

use std::cell::Cell;

use crate::out::Out;

thread_local! {
    static OUT: Cell<Option<Out>> = const { Cell::new(None) };
}

/// An empty output. One that is not given back, because an invariant was broken, is lost.
pub(super) fn take_out() -> Out {
    OUT.take().unwrap_or_default()
}

pub(super) fn give_back(mut out: Out) {
    out.clear_net();
    out.clear_tun();
    OUT.set(Some(out));
}
