//! How the allocator takes and gives back memory.
#![expect(unsafe_code, reason = "the allocator's settings have no safe wrapper")]

/// glibc raises this by itself to the size of whatever was freed last, and then keeps twice as much per thread.
#[cfg(target_env = "gnu")]
const GIVE_BACK_BYTES: libc::c_int = 128 * 1024;

/// A request with 65,000 peers takes 30 MB for the blink of an eye: with this they go back to the kernel. With one worker all threads
/// share one arena, because those of their own grow by a page and a system call at a time; several workers would wait for each other.
pub(crate) fn set_up_allocator(workers: u16) {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` takes two integers and the allocator's own lock. Setting either threshold also ends the
    // self-adjustment.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, GIVE_BACK_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, GIVE_BACK_BYTES);
        if workers == 1 {
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}
