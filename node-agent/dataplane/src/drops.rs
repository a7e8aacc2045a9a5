//! Why packets are dropped, counted in packets and bytes.
//!
//! What came from the network counts UDP payload bytes until it is authenticated. What came from the TUN, whose reasons begin
//! with `tx_`, counts IP bytes, so that what the kernel queued to the TUN equals what was sent plus what was dropped.

/// A reason to drop a packet. The name is the suffix of the UAPI key `cvault_drop_<name>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Drop {
    /// Not a WireGuard message, or of an impossible length, or from port 0.
    Garbage,
    /// A handshake message whose MAC1 does not match our key.
    BadMac,
    /// One source sends more initiations than its bucket allows.
    SourceLimited,
    /// A cookie was demanded instead of work.
    UnderLoad,
    /// An initiation by a key that is not configured.
    UnknownPeer,
    /// A handshake message that does not verify, or comes too soon.
    Handshake,
    /// An initiation seen before, or a data counter used before.
    Replay,
    /// An index that belongs to no peer.
    UnknownIndex,
    /// A data message for a session that does not exist (any more).
    NoSession,
    /// A data message that does not decrypt.
    Decrypt,
    /// Authenticated, but not a well-formed IP packet.
    Malformed,
    /// Authenticated, but the source address is not the peer's.
    Spoofed,
    /// Authenticated, but addressed to another peer or to the overlay itself.
    Isolation,
    /// Authenticated, marked for congestion on the way, and its sender does not know ECN (RFC 6040).
    Congestion,
    /// The TUN device refused the packet.
    TunWrite,
    /// No peer has the destination.
    TxNoRoute,
    /// From the TUN, and not a well-formed IP packet.
    TxMalformed,
    /// From the TUN, and its source is another peer's address.
    TxIsolation,
    /// The peer has no known endpoint.
    TxNoEndpoint,
    /// There is no session and the peer's small queue is full, or was given up.
    TxNoSession,
    /// The pass has no room left for another datagram.
    TxNoRoom,
    /// The UDP socket refused the datagram.
    TxSend,
    /// Authenticated, but the destination is the server itself, not on the internet, or denied to the tenant.
    Destination,
    /// Authenticated, but to SMTP or a port denied to the tenant, or hiding its port.
    Port,
    /// Authenticated, but more than the peer or its tenant may send.
    RateLimited,
    /// Authenticated, but beyond the peer's lease.
    LeaseEnded,
    /// More than the peer or its tenant may receive.
    TxRateLimited,
    /// To the peer, and beyond its lease.
    TxLeaseEnded,
    /// The worker it belongs to has too much waiting already, or it belongs to another one meanwhile.
    Forward,
    /// The same of a packet from the TUN, or from another peer.
    TxForward,
    /// From a peer to another, and this was its last hop.
    HopLimit,
}

impl Drop {
    /// Every reason, in the order of the counters.
    pub const ALL: [Self; 31] = [
        Self::Garbage,
        Self::BadMac,
        Self::SourceLimited,
        Self::UnderLoad,
        Self::UnknownPeer,
        Self::Handshake,
        Self::Replay,
        Self::UnknownIndex,
        Self::NoSession,
        Self::Decrypt,
        Self::Malformed,
        Self::Spoofed,
        Self::Isolation,
        Self::Congestion,
        Self::TunWrite,
        Self::TxNoRoute,
        Self::TxMalformed,
        Self::TxIsolation,
        Self::TxNoEndpoint,
        Self::TxNoSession,
        Self::TxNoRoom,
        Self::TxSend,
        Self::Destination,
        Self::Port,
        Self::RateLimited,
        Self::LeaseEnded,
        Self::TxRateLimited,
        Self::TxLeaseEnded,
        Self::Forward,
        Self::TxForward,
        Self::HopLimit,
    ];

    /// The name in UAPI and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Garbage => "garbage",
            Self::BadMac => "bad_mac",
            Self::SourceLimited => "source_limited",
            Self::UnderLoad => "under_load",
            Self::UnknownPeer => "unknown_peer",
            Self::Handshake => "handshake",
            Self::Replay => "replay",
            Self::UnknownIndex => "unknown_index",
            Self::NoSession => "no_session",
            Self::Decrypt => "decrypt",
            Self::Malformed => "malformed",
            Self::Spoofed => "spoofed",
            Self::Isolation => "isolation",
            Self::Congestion => "congestion",
            Self::TunWrite => "tun_write",
            Self::TxNoRoute => "tx_no_route",
            Self::TxMalformed => "tx_malformed",
            Self::TxIsolation => "tx_isolation",
            Self::TxNoEndpoint => "tx_no_endpoint",
            Self::TxNoSession => "tx_no_session",
            Self::TxNoRoom => "tx_no_room",
            Self::TxSend => "tx_send",
            Self::Destination => "destination",
            Self::Port => "port",
            Self::RateLimited => "rate_limited",
            Self::LeaseEnded => "lease_ended",
            Self::TxRateLimited => "tx_rate_limited",
            Self::TxLeaseEnded => "tx_lease_ended",
            Self::Forward => "forward",
            Self::TxForward => "tx_forward",
            Self::HopLimit => "hop_limit",
        }
    }
}

/// Packets and bytes dropped for one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Packets or datagrams.
    pub packets: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// All drop counters since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops([Dropped; Drop::ALL.len()]);

impl Drops {
    /// The counter of one reason.
    #[must_use]
    pub fn get(&self, reason: Drop) -> Dropped {
        self.0[reason as usize]
    }

    /// Adds those of another worker.
    pub(crate) fn add(&mut self, other: &Self) {
        for reason in Drop::ALL {
            let Dropped { packets, bytes } = other.get(reason);
            self.many(reason, packets, bytes);
        }
    }

    pub(crate) fn one(&mut self, reason: Drop, bytes: usize) {
        self.many(reason, 1, bytes as u64);
    }

    pub(crate) fn many(&mut self, reason: Drop, packets: u64, bytes: u64) {
        let counter = &mut self.0[reason as usize];
        counter.packets += packets;
        counter.bytes += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_counter_and_name() {
        for (position, reason) in Drop::ALL.into_iter().enumerate() {
            assert_eq!(position, reason as usize);
        }
        let mut names: Vec<_> = Drop::ALL.iter().map(|r| r.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Drop::ALL.len());
    }
}
