//! The counter file: what every peer transferred, in memory shared with the control process.
//!
//! One 4 KiB header, then for each slot one 64-byte identity line and one 64-byte counter line, all native-endian
//! 64-bit words stored with relaxed atomics. There is one writer, and the words live in the page cache: they survive
//! SIGKILL of either process, and reading needs no IPC. The file never shrinks; a new epoch gets a new file, so a reader
//! never faults; the old one is kept as one of [`previous_files`]. Identity line: key (4 words), generation,
//! `occupied | changes << 8 | port << 32 | family << 48`, address (2 words).
//! Counter line: the fields of [`Counts`] in order, one spare.

mod previous;
mod reader;
mod table;
mod words;

use std::io;
use std::net::SocketAddr;

pub use previous::{previous_file_name, previous_files};
pub use reader::CounterReader;
pub use table::CounterTable;
pub(crate) use table::Timestamps;

/// File name inside the state directory.
pub const FILE_NAME: &str = "counters.bin";
/// Peers of one interface: the slot has 16 bits, and one value means "none".
pub const MAX_PEERS: u32 = 65_535;

/// Names one life of the counters: drawn at random when they start from zero.
pub type Epoch = [u8; 16];

/// Cumulative counters of one peer. Billable are the inner bytes: IP packets after authentication and policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// IP bytes from the peer, handed to the TUN.
    pub rx_inner: u64,
    /// IP bytes to the peer, handed to the UDP socket.
    pub tx_inner: u64,
    /// UDP payload bytes from the peer, handshakes and keepalives included.
    pub rx_wire: u64,
    /// UDP payload bytes to the peer.
    pub tx_wire: u64,
    /// Packets of `rx_inner`.
    pub rx_packets: u64,
    /// Packets of `tx_inner`.
    pub tx_packets: u64,
    /// When the last handshake was completed, Unix milliseconds; 0 is never.
    pub last_handshake_ms: u64,
}

impl Counts {
    pub(crate) const WORDS: usize = 7;

    pub(crate) fn to_words(self) -> [u64; Self::WORDS] {
        [
            self.rx_inner,
            self.tx_inner,
            self.rx_wire,
            self.tx_wire,
            self.rx_packets,
            self.tx_packets,
            self.last_handshake_ms,
        ]
    }

    pub(crate) fn from_words(words: [u64; Self::WORDS]) -> Self {
        let [rx_inner, tx_inner, rx_wire, tx_wire, rx_packets, tx_packets, last_handshake_ms] = words;
        Self { rx_inner, tx_inner, rx_wire, tx_wire, rx_packets, tx_packets, last_handshake_ms }
    }
}

/// Which counter of the line.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub(crate) enum Field {
    RxInner,
    TxInner,
    RxWire,
    TxWire,
    RxPackets,
    TxPackets,
    LastHandshake,
}

/// One occupied slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCounters {
    /// Its slot.
    pub slot: u16,
    /// Whose it is.
    pub public_key: [u8; 32],
    /// Which life of that key.
    pub generation: u64,
    /// The endpoint last authenticated.
    pub endpoint: Option<SocketAddr>,
    /// The counters.
    pub counts: Counts,
}

/// Why a counter file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CounterFileError {
    /// It cannot be opened or mapped.
    #[error("cannot open the counter file")]
    Io(#[from] io::Error),
    /// It is not a counter file of this version, or it is damaged.
    #[error("the counter file is damaged or of another version")]
    Damaged,
}
