//! The engine's counters, and the kernel's of its interface as their witness.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::End;
use crate::lab::quiescent;
use crate::platform::Counters;

/// Everything the engine says about bytes at one moment.
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
    /// What the kernel handed over and no peer got.
    not_sent: u64,
    kernel: Counters,
}

impl Account {
    fn of(end: &End) -> Result<Self> {
        let figure = |name: &str| end.tunnel.figure(&end.machine, name);
        let text = end.tunnel.get(&end.machine)?;
        let dropped = text.lines().filter_map(|line| {
            let (reason, bytes) = line.strip_prefix("cvault_dropped_bytes_")?.split_once('=')?;
            if reason.starts_with("tx_") { bytes.parse::<u64>().ok() } else { None }
        });
        Ok(Self {
            rx_inner: figure("cvault_rx_inner")?,
            tx_inner: figure("cvault_tx_inner")?,
            rx_packets: figure("cvault_rx_packets")?,
            tx_packets: figure("cvault_tx_packets")?,
            read: figure("cvault_tun_read_bytes")?,
            split: figure("cvault_tun_split_bytes")?,
            written: figure("cvault_tun_written_bytes")?,
            merged: figure("cvault_tun_merged_bytes")?,
            not_sent: dropped.sum(),
            kernel: Counters::read(&end.machine, "wg0")?,
        })
    }

    /// When nothing is under way any more.
    pub fn settled(end: &End) -> Result<Self> {
        quiescent("the counters", Duration::from_millis(500), 20, || Self::of(end))
    }

    /// The kernel's counters of the interface are the witness; the engine tells only what merging and splitting saved.
    pub fn agrees(&self) -> Result<()> {
        ensure!(self.written == self.kernel.rx_bytes, "written to the interface: {self:?}");
        ensure!(self.read == self.kernel.tx_bytes, "read from the interface: {self:?}");
        ensure!(self.rx_inner == self.kernel.rx_bytes + self.merged, "from peers: {self:?}");
        ensure!(self.tx_inner + self.not_sent == self.kernel.tx_bytes + self.split, "to peers: {self:?}");
        Ok(())
    }
}
