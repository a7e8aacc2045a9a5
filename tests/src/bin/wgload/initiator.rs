//! One peer: its socket, its initiation, the response it got.

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result, bail};
use boringtun::noise::{Tunn, TunnResult};
use cvault_tests::bench::{GeneratedPeer, endpoint_address, server_secret};

/// Lengths and types of the messages (WireGuard paper, section 5.4).
const RESPONSE: (u8, usize) = (2, 92);
pub(crate) const COOKIE_REPLY: (u8, usize) = (3, 64);
const INITIATION_BYTES: usize = 148;
const INDEX: std::ops::Range<usize> = 4..8;
const RECEIVER_OF_RESPONSE: std::ops::Range<usize> = 8..12;
const RECEIVER_OF_COOKIE_REPLY: std::ops::Range<usize> = 4..8;

pub(crate) struct Initiator {
    tunnel: Tunn,
    pub(crate) socket: UdpSocket,
    pub(crate) initiation: Vec<u8>,
    response: Option<Vec<u8>>,
}

/// What a datagram from the server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Response,
    CookieReply,
    Other,
}

pub(crate) fn all(first: u32, count: u32, server: SocketAddr) -> Result<Vec<Initiator>> {
    (first..first + count).map(|number| Initiator::new(number, server)).collect()
}

impl Initiator {
    fn new(number: u32, server: SocketAddr) -> Result<Self> {
        let peer = GeneratedPeer::numbered(number);
        let mut tunnel = Tunn::new(peer.secret, server_secret().public, None, None, number, None);
        let mut room = [0; INITIATION_BYTES];
        let TunnResult::WriteToNetwork(initiation) = tunnel.format_handshake_initiation(&mut room, false) else {
            bail!("no initiation for peer {number}");
        };
        let initiation = initiation.to_vec();
        let from = endpoint_address(number);
        let socket = UdpSocket::bind((from, 0)).with_context(|| format!("open a socket at {from}"))?;
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
        Ok(Self { tunnel, socket, initiation, response: None })
    }

    /// A datagram of the server's that is meant for the handshake under way.
    pub(crate) fn kind(&self, datagram: &[u8]) -> Kind {
        let (kind, receiver) = match (datagram.first().copied().unwrap_or_default(), datagram.len()) {
            RESPONSE => (Kind::Response, RECEIVER_OF_RESPONSE),
            COOKIE_REPLY => (Kind::CookieReply, RECEIVER_OF_COOKIE_REPLY),
            _ => return Kind::Other,
        };
        if datagram.get(receiver) == self.initiation.get(INDEX) { kind } else { Kind::Other }
    }

    pub(crate) fn is_answered(&self) -> bool {
        self.response.is_some()
    }

    pub(crate) fn keep(&mut self, response: &[u8]) {
        self.response = Some(response.to_vec());
    }

    /// Derives the session and sends the packet that confirms it. False when there is no response or it is not valid.
    fn confirm(&mut self) -> Result<bool> {
        let Some(response) = self.response.take() else { return Ok(false) };
        let mut room = [0; INITIATION_BYTES];
        match self.tunnel.decapsulate(None, &response, &mut room) {
            TunnResult::WriteToNetwork(keepalive) => {
                self.socket.send(keepalive)?;
                Ok(true)
            }
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {
                bail!("a response with which no session can be made")
            }
        }
    }
}

/// How many sessions are confirmed.
pub(crate) fn confirm(initiators: &mut [Initiator]) -> Result<usize> {
    let mut confirmed = 0;
    for initiator in initiators {
        confirmed += usize::from(initiator.confirm()?);
    }
    Ok(confirmed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_counts_for_the_handshake_it_answers_alone() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let peer = GeneratedPeer::numbered(7);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(server.local_addr().unwrap()).unwrap();
        let mut tunnel = Tunn::new(peer.secret, server_secret().public, None, None, 7, None);
        let mut room = [0; INITIATION_BYTES];
        let TunnResult::WriteToNetwork(initiation) = tunnel.format_handshake_initiation(&mut room, false) else {
            panic!("no initiation")
        };
        let initiation = initiation.to_vec();
        let initiator = Initiator { tunnel, socket, initiation: initiation.clone(), response: None };

        let mut responder = Tunn::new(server_secret().secret, peer.public, None, None, 1, None);
        let mut room = [0; INITIATION_BYTES];
        let TunnResult::WriteToNetwork(response) = responder.decapsulate(None, &initiation, &mut room) else {
            panic!("no response")
        };
        let mut response = response.to_vec();
        assert_eq!(initiator.kind(&response), Kind::Response);
        assert_eq!(initiator.kind(&response[..91]), Kind::Other);
        response[8] ^= 1;
        assert_eq!(initiator.kind(&response), Kind::Other);
    }
}
