//! How the allocator gives memory back.
#![expect(unsafe_code, reason = "the allocator's settings have no safe wrapper")]

/// glibc raises this by itself to the size of whatever was freed last, and then keeps twice as much per thread.
#[cfg(target_env = "gnu")]
const GIVE_BACK_BYTES: libc::c_int = 128 * 1024;

/// A request with 65,000 peers takes 30 MB for the blink of an eye: with this they go back to the kernel.
pub(crate) fn give_back_soon() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` takes two integers and the allocator's own lock. Setting either also ends the self-adjustment.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, GIVE_BACK_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, GIVE_BACK_BYTES);
    }
}
