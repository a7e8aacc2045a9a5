//! The engine's counters, and the kernel's of its interface as their witness.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cvault_dataplane::journal::{self, ClosedPeer};

use super::Tunnel;
use crate::lab::{Machine, quiescent};
use crate::platform::{Counters, uapi};

/// Everything the engine says about bytes at one moment: of the peers it has, and of those whose removal it has journaled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub rx_inner: u64,
    pub tx_inner: u64,
    pub rx_packets: u64,
    pub tx_packets: u64,
    read: u64,
    split: u64,
    written: u64,
    merged: u64,
    /// From peer to peer, past the kernel.
    hairpin: u64,
    /// What the kernel or a peer handed over and no peer got.
    not_sent: u64,
    kernel: Counters,
}

impl Account {
    fn of(machine: &Machine, interface: &str) -> Result<Self> {
        let text = uapi(machine, interface, "get=1\n\n")?;
        let figure = |name: &str| -> u64 {
            let value = |line: &str| line.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok();
            text.lines().filter_map(value).sum()
        };
        let closed = closed(machine, interface)?;
        let both = |name, of: fn(&ClosedPeer) -> u64| figure(name) + closed.iter().map(of).sum::<u64>();
        let dropped = text.lines().filter_map(|line| {
            let (reason, bytes) = line.strip_prefix("cvault_dropped_bytes_")?.split_once('=')?;
            if reason.starts_with("tx_") { bytes.parse::<u64>().ok() } else { None }
        });
        Ok(Self {
            rx_inner: both("cvault_rx_inner", |peer| peer.counts.rx_inner),
            tx_inner: both("cvault_tx_inner", |peer| peer.counts.tx_inner),
            rx_packets: both("cvault_rx_packets", |peer| peer.counts.rx_packets),
            tx_packets: both("cvault_tx_packets", |peer| peer.counts.tx_packets),
            read: figure("cvault_tun_read_bytes"),
            split: figure("cvault_tun_split_bytes"),
            written: figure("cvault_tun_written_bytes"),
            merged: figure("cvault_tun_merged_bytes"),
            hairpin: figure("cvault_hairpin_bytes"),
            not_sent: dropped.sum(),
            kernel: Counters::read(machine, interface)?,
        })
    }

    /// When nothing is under way any more. The process must have been the interface's only one.
    pub fn settled(machine: &Machine, interface: &str) -> Result<Self> {
        quiescent("the counters", Duration::from_millis(500), 20, || Self::of(machine, interface))
    }

    /// The kernel's counters of the interface are the witness; the engine tells only what merging and splitting saved.
    pub fn agrees(&self) -> Result<()> {
        ensure!(self.written == self.kernel.rx_bytes, "written to the interface: {self:?}");
        ensure!(self.read == self.kernel.tx_bytes, "read from the interface: {self:?}");
        let from_peers = self.kernel.rx_bytes + self.merged + self.hairpin;
        ensure!(self.rx_inner == from_peers, "from peers: {self:?}");
        let to_peers = self.kernel.tx_bytes + self.split + self.hairpin;
        ensure!(self.tx_inner + self.not_sent == to_peers, "to peers: {self:?}");
        Ok(())
    }
}

impl Account {
    /// [`Self::agrees`], of what came after the account of a process that was killed when nothing was under way.
    pub fn agrees_since(&self, killed: &Self) -> Result<()> {
        let kernel = Counters {
            rx_bytes: self.kernel.rx_bytes - killed.kernel.rx_bytes,
            tx_bytes: self.kernel.tx_bytes - killed.kernel.tx_bytes,
            ..self.kernel
        };
        let (rx_inner, tx_inner) = (self.rx_inner - killed.rx_inner, self.tx_inner - killed.tx_inner);
        Self { rx_inner, tx_inner, kernel, ..self.clone() }.agrees()
    }

    /// After processes were killed: the bytes from peers that the kernel took and no process has counted. Nothing may have been
    /// merged or passed from peer to peer.
    pub fn uncounted(&self) -> Result<u64> {
        ensure!(self.tx_inner <= self.kernel.tx_bytes, "more was counted than there was to send: {self:?}");
        let uncounted = self.kernel.rx_bytes.checked_sub(self.rx_inner);
        uncounted.with_context(|| format!("more was counted than was written: {self:?}"))
    }
}

/// The peers removed from a tunnel of [`Tunnel::start_counting`] or [`Tunnel::start_persistent`].
pub fn closed(machine: &Machine, interface: &str) -> Result<Vec<ClosedPeer>> {
    let path = Tunnel::state(machine, interface).join(journal::FILE_NAME);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let closed = journal::JournalReader::new(path).read()?;
    ensure!(closed.damaged == 0, "{} records are damaged", closed.damaged);
    Ok(closed.peers)
}
