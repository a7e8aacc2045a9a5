//! One socket per worker on one port: the kernel gives each datagram to the worker that owns the peer.
#![expect(unsafe_code, reason = "setsockopt has no safe wrapper for these options")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Lets other sockets of this process share the port.
pub(crate) fn share_port(socket: &impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    set(socket, libc::SO_REUSEPORT, &on)
}

/// Chooses the socket of the group by the low byte of the slot in the receiver index (see `index.rs`). Initiations have
/// none: the kernel's hash chooses. The order of the sockets is that of binding.
pub(crate) fn steer(socket: &impl AsFd, workers: u16) -> io::Result<()> {
    let mut code = program(workers);
    let filter =
        libc::sock_fprog { len: u16::try_from(code.len()).expect("ten instructions"), filter: code.as_mut_ptr() };
    set(socket, libc::SO_ATTACH_REUSEPORT_CBPF, &filter)
}

fn program(workers: u16) -> [libc::sock_filter; 10] {
    const LOAD_BYTE: u16 = 0x30;
    const JUMP: u16 = 0x05;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const MODULO: u16 = 0x94;
    const RETURN: u16 = 0x06;
    const RETURN_A: u16 = 0x16;
    let op = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let jump = |k, jt| libc::sock_filter { code: JUMP_IF_EQUAL, jt, jf: 0, k };
    [
        op(LOAD_BYTE, 0),
        jump(4, 3),
        jump(3, 2),
        jump(2, 3),
        op(RETURN, u32::MAX),
        // Data and cookies: the second byte of the index at 4.
        op(LOAD_BYTE, 5),
        op(JUMP, 1),
        // Responses: the second byte of the index at 8.
        op(LOAD_BYTE, 9),
        op(MODULO, u32::from(workers)),
        op(RETURN_A, 0),
    ]
}

fn set<T>(socket: &impl AsFd, name: i32, value: &T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).expect("a few bytes");
    // SAFETY: the descriptor is open for as long as `socket` is borrowed; the kernel copies `len` bytes from a live
    // value of that size, and the program it points to (which outlives the call), before the call returns.
    let done = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, name, (&raw const *value).cast(), len)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::time::Duration;

    use socket2::{Domain, Protocol, Socket, Type};

    use super::*;

    #[test]
    fn every_message_reaches_the_socket_of_its_owner() {
        const WORKERS: u16 = 3;
        let mut port = 0;
        let sockets: Vec<std::net::UdpSocket> = (0..WORKERS)
            .map(|index| {
                let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).unwrap();
                let addr = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port).into();
                if index > 0 {
                    share_port(&socket).unwrap();
                }
                socket.bind(&addr(port)).unwrap();
                if index == 0 {
                    share_port(&socket).unwrap();
                    port = socket.local_addr().unwrap().as_socket().unwrap().port();
                } else {
                    steer(&socket, WORKERS).unwrap();
                }
                socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                socket.into()
            })
            .collect();
        let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for slot in 0..=u8::MAX {
            for (kind, at) in [(4, 5), (3, 5), (2, 9)] {
                let mut message = [0x55; 92];
                message[0] = kind;
                message[at] = slot;
                client.send_to(&message, ("127.0.0.1", port)).unwrap();
                let mut got = [0; 92];
                sockets[usize::from(u16::from(slot) % WORKERS)].recv(&mut got).unwrap();
                assert_eq!(got, message);
            }
        }
    }
}
