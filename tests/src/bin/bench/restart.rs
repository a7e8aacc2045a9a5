//! Killed under live tunnels and started again as the agent does it: how long the peers hear nothing.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use cvault_tests::bench::quantile;
use cvault_tests::lab::{Pair, SERVER_V4, Signal};
use cvault_tests::tunnel::{Keys, Load, Tunnel};

use crate::config::PORT;
use crate::daemon::INTERFACE;
use crate::sheet::Sheet;

const PEERS: usize = 100;
/// Of each peer, before and after: the gap lies between two of them.
const ANSWERS: u64 = 20;
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 8, 0, 1);
/// Well above what the peers' own timers take.
const DEADLINE_SECONDS: u64 = 30;

pub(crate) fn restart(sheet: &mut Sheet) -> Result<()> {
    let pair = Pair::build()?;
    let (own, keys) = (Keys::random()?, Load::keys(PEERS));
    let device = format!("private_key={}\nlisten_port={PORT}\ncvault_end_replace=true\n", own.private_hex);
    let configuration = device + &Load::as_peers(&keys, 1);
    let tunnel = Tunnel::start_persistent(&pair.server, INTERFACE)?;
    tunnel.set(&pair.server, &configuration)?;
    pair.server.sh(&format!("ip addr add {GATEWAY}/16 dev {INTERFACE}; ip link set {INTERFACE} up"))?;
    let server = format!("{SERVER_V4}:{PORT}").parse()?;
    let load = Load::start(&pair.client, PEERS, server, &own, GATEWAY)?;
    load.answered(PEERS, ANSWERS, DEADLINE_SECONDS)?;
    load.forget_gaps();
    tunnel.process().end(&pair.server, Signal::Kill)?;
    let tunnel = Tunnel::start_persistent(&pair.server, INTERFACE)?;
    tunnel.set(&pair.server, &configuration)?;
    load.answered(PEERS, ANSWERS, DEADLINE_SECONDS)?;
    sheet.put("restart_gap_p99", quantile(&load.gaps(PEERS), 99).context("nothing was answered")? * 1e3);
    tunnel.process().check_running()
}
