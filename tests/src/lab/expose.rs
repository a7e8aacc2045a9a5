//! A port of a machine, reachable from outside the lab: one thread accepts outside, each connection is opened inside.

use std::fs::File;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use anyhow::{Context, Result};
use rustix::fd::AsFd;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Listens on a free port of 127.0.0.1 until the program ends.
pub(super) fn start(network: File, inside: SocketAddr) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen on 127.0.0.1")?;
    let outside = listener.local_addr()?;
    let network = Arc::new(network);
    std::thread::Builder::new().name("lab-expose".to_owned()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let network = Arc::clone(&network);
            std::thread::spawn(move || {
                if let Err(error) = relay(stream, &network, inside) {
                    eprintln!("{outside} -> {inside}: {error:#}");
                }
            });
        }
    })?;
    Ok(outside)
}

fn relay(outer: TcpStream, network: &File, inside: SocketAddr) -> Result<()> {
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
    let inner = TcpStream::connect(inside)?;
    let (mut from_inner, mut to_outer) = (inner.try_clone()?, outer.try_clone()?);
    let back = std::thread::spawn(move || copy(&mut from_inner, &mut to_outer));
    copy(&mut &outer, &mut &inner);
    let _ = back.join();
    Ok(())
}

fn copy(from: &mut impl std::io::Read, to: &mut (impl std::io::Write + Close)) {
    let _ = std::io::copy(from, to);
    to.close();
}

trait Close {
    fn close(&self);
}

impl Close for TcpStream {
    fn close(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Close for &TcpStream {
    fn close(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}
