//! The process is killed under many live tunnels, and another one takes its place.

use std::net::Ipv4Addr;

use anyhow::Result;
use cvault_dataplane::journal;
use cvault_tests::bench::quantile;
use cvault_tests::lab::{Addresses, Lab, Machine, Network, Signal};
use cvault_tests::tunnel::{Account, Keys, Load, Tunnel, closed};

const PEERS: usize = 100;
/// The last ones are not added again.
const STAYING: usize = 97;
const GENERATION: u64 = 7;
const ECHO_BYTES: u64 = 36;

/// What the control process says, at first and after every restart of the tunnel.
fn configure(tunnel: &Tunnel, machine: &Machine, own: &Keys, peers: &[Keys]) -> Result<()> {
    let device = format!("private_key={}\nlisten_port=51820\ncvault_end_replace=true\n", own.private_hex);
    tunnel.set(machine, &(device + &Load::as_peers(peers, GENERATION)))
}

fn server(lab: &Lab) -> Result<(Machine, Addresses)> {
    let (machine, at) = lab.machine("server", Network::Servers, 10)?;
    Ok((machine, at))
}

/// Inner bytes of both directions by public key.
fn billed(tunnel: &Tunnel, machine: &Machine, keys: &Keys) -> Result<[u64; 2]> {
    let figure = |name: &str| -> Result<u64> { Ok(tunnel.peer(machine, keys, name)?.unwrap_or_default().parse()?) };
    Ok([figure("cvault_rx_inner")?, figure("cvault_tx_inner")?])
}

#[test]
fn killed_under_a_hundred_tunnels_it_calls_them_back_and_forgets_no_byte() {
    let lab = Lab::build().unwrap();
    let (machine, at) = server(&lab).unwrap();
    let (clients, _) = lab.machine("clients", Network::Clients, 10).unwrap();
    let (own, keys) = (Keys::random().unwrap(), Load::keys(PEERS));
    let tunnel = Tunnel::start_persistent(&machine, "wg0").unwrap();
    configure(&tunnel, &machine, &own, &keys).unwrap();
    machine.sh("ip addr add 10.8.0.1/16 dev wg0; ip link set wg0 up").unwrap();
    let endpoint = format!("{}:51820", at.v4).parse().unwrap();
    let load = Load::start(&clients, PEERS, endpoint, &own, Ipv4Addr::new(10, 8, 0, 1)).unwrap();
    load.answered(PEERS, 20, 30).unwrap();
    let figure = |name: &str| tunnel.figure(&machine, name).unwrap();
    let workers = figure("cvault_workers");
    if workers > 1 {
        let forwarded = (0..workers).map(|worker| figure(&format!("cvault_worker_{worker}_forwarded")));
        assert!(forwarded.sum::<u64>() > 0, "with many peers some messages come to another's worker");
    }
    load.forget_gaps();
    load.answered(PEERS, 20, 10).unwrap();
    let undisturbed = quantile(&load.gaps(PEERS), 99).unwrap();

    let before: Vec<[u64; 2]> = keys.iter().map(|keys| billed(&tunnel, &machine, keys).unwrap()).collect();
    load.forget_gaps();
    tunnel.process().end(&machine, Signal::Kill).unwrap();
    let tunnel = Tunnel::start_persistent(&machine, "wg0").unwrap();
    configure(&tunnel, &machine, &own, &keys[..STAYING]).unwrap();
    // A generous deadline; the figure is printed.
    load.answered(STAYING, 20, 20).unwrap();
    let gaps = load.gaps(STAYING);
    let (p50, p99) = (quantile(&gaps, 50).unwrap(), quantile(&gaps, 99).unwrap());
    println!("restart under {PEERS} tunnels: gap p50 {p50:.3} s, p99 {p99:.3} s (undisturbed p99 {undisturbed:.3} s)");
    assert!(p99 < 5.0, "the tunnels waited for their own timers: p99 {p99:.3} s");

    for (keys, before) in keys.iter().zip(&before).take(STAYING) {
        let now = billed(&tunnel, &machine, keys).unwrap();
        assert!(now[0] > before[0] && now[1] > before[1], "{now:?} after {before:?}");
    }
    let closed = closed(&machine, "wg0").unwrap();
    assert_eq!(closed.len(), PEERS - STAYING, "those that were not added again, each once");
    for (keys, before) in keys.iter().zip(&before).skip(STAYING) {
        let record = closed.iter().find(|record| record.public_key == keys.public_bytes()).unwrap();
        assert_eq!(record.generation, GENERATION);
        // They went on until the kill, and no packet was counted after it.
        assert!(record.counts.rx_inner >= before[0] && record.counts.tx_inner >= before[1], "{record:?}, {before:?}");
        let later = [record.counts.rx_inner - before[0], record.counts.tx_inner - before[1]];
        assert!(later.iter().all(|bytes| bytes % ECHO_BYTES == 0), "whole echoes: {later:?}");
    }

    // Their lives begin again under a third process, when the control process has taken the journal over.
    let path = Tunnel::state(&machine, "wg0").join(journal::FILE_NAME);
    let ack = journal::JournalReader::new(path).read().unwrap().ack().unwrap();
    tunnel.set(&machine, &format!("cvault_journal_ack={ack}\n")).unwrap();
    tunnel.process().end(&machine, Signal::Kill).unwrap();
    let tunnel = Tunnel::start_persistent(&machine, "wg0").unwrap();
    configure(&tunnel, &machine, &own, &keys).unwrap();
    for record in closed {
        let keys = keys.iter().find(|keys| keys.public_bytes() == record.public_key).unwrap();
        let now = billed(&tunnel, &machine, keys).unwrap();
        assert!(now[0] >= record.counts.rx_inner && now[1] >= record.counts.tx_inner, "{now:?} after {record:?}");
    }

    // The kernel's counters are those of all three: of what each killed worker wrote, only the last packet may be uncounted.
    drop(load);
    let uncounted = Account::settled(&machine, "wg0").unwrap().uncounted().unwrap();
    assert!(uncounted <= 2 * workers * ECHO_BYTES, "{uncounted} bytes were lost to the bill");
}
