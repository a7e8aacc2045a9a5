//! Socket options that no safe crate offers.
#![expect(unsafe_code, reason = "there is no safe wrapper for these options")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// WireGuard's outer packets may be fragmented (DF=0); quinn-udp forbids it, so it is allowed again.
pub(crate) fn allow_fragmentation(socket: &impl AsFd, v6: bool) -> io::Result<()> {
    if v6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)?;
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)
    }
}

/// quinn-udp asks for a timestamp of every packet, which costs the whole host.
pub(crate) fn disable_timestamps(socket: &impl AsFd) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 0)
}

/// Each datagram by itself.
pub(crate) fn disable_gro(socket: &impl AsFd) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_GRO, 0)
}

/// Buffers beyond `net.core.{r,w}mem_max`; needs `CAP_NET_ADMIN`, which we have for the TUN.
pub(crate) fn force_buffers(socket: &impl AsFd, receive: i32, send: i32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, receive)?;
    set(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, send)
}

/// Datagrams that the kernel has dropped at this socket: there was no room, or they were damaged. `SO_MEMINFO` of socket(7).
pub(crate) fn dropped(socket: &impl AsFd) -> io::Result<u32> {
    /// `SK_MEMINFO_DROPS`, the last of the figures.
    const DROPS: usize = 8;
    let mut figures = [0_u32; DROPS + 1];
    let mut len = libc::socklen_t::try_from(size_of_val(&figures)).expect("36 fits");
    // SAFETY: the descriptor is open for as long as `socket` is borrowed, and the kernel writes at most `len` bytes to a pointer
    // to a live array of that size, and the length to one to a live `socklen_t`, before the call returns.
    let done = unsafe {
        let (level, name) = (libc::SOL_SOCKET, libc::SO_MEMINFO);
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw mut figures).cast(), &raw mut len)
    };
    if done == 0 { Ok(figures[DROPS]) } else { Err(io::Error::last_os_error()) }
}

fn set(socket: &impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<i32>()).expect("four fits");
    // SAFETY: the descriptor is open for as long as `socket` is borrowed, and the kernel copies `len` bytes from a
    // pointer to a live `i32` of that size before the call returns.
    let done = unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw const value).cast(), len) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
