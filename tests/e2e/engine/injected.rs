//! System calls that fail or hang under traffic: `strace` puts the fault into one worker of a live engine.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use cvault_tests::lab::{Process, Signal, eventually};
use cvault_tests::tunnel::{Both, Inner, Outer, Program};

const BYTES: u64 = 1_000_000;

/// Which are called for the socket, and which for the TUN.
const SOCKET: &str = "sendmsg,sendmmsg,sendto";
const TUN: &str = "write,writev";
const TUN_READ: &str = "read,readv";
const RECEIVE: &str = "recvmsg,recvmmsg";

/// Until the returned process ends, `fault` is put into the calls of one of the server's workers.
fn inject(both: &Both, worker: u64, calls: &str, fault: &str) -> Result<Process> {
    let machine = &both.server.machine;
    let pid = both.server.tunnel.process().pid(machine)?;
    let worker = machine.sh(&format!("grep -l '^tunnel-worker-{worker}$' /proc/{pid}/task/*/comm | cut -d/ -f5"))?;
    let worker = worker.trim();
    let (trace, inject) = (format!("trace={calls}"), format!("inject={calls}:{fault}"));
    let calls = log(both).display().to_string();
    let arguments = ["-q", "-o", &calls, "-p", worker, "-e", &trace, "-e", &inject];
    let strace = machine.spawn("strace", "strace", arguments, [])?;
    eventually("strace has its hands on the worker", 20, || {
        strace.check_running()?;
        let status = machine.sh(&format!("grep TracerPid /proc/{pid}/task/{worker}/status"))?;
        ensure!(!status.trim().ends_with("\t0"), "{status}");
        Ok(())
    })?;
    Ok(strace)
}

/// What the worker called.
fn log(both: &Both) -> PathBuf {
    both.server.machine.dir().join("calls")
}

/// Each fault is put into the first worker's calls, and costs no transfer; EIO and EINVAL cost the one offload that is named,
/// until they are over.
fn survives(calls: &str, faults: &[&str], costs: Option<&str>) -> Result<()> {
    let both = Both::start(Program::Engine, Program::WireguardGo)?;
    both.meet(Outer::V4)?;
    let figure = |name: &str| both.server.tunnel.figure(&both.server.machine, name);
    let has_runs = || figure("cvault_offload_udp_gso");
    let had_runs = has_runs()?;
    let costs = costs.filter(|offload| figure(offload).is_ok_and(|in_use| in_use == 1));
    for fault in faults {
        let strace = inject(&both, 0, calls, fault)?;
        for inner in [Inner::V4, Inner::V6] {
            both.transfer(inner, BYTES).with_context(|| format!("{calls}: {fault}"))?;
        }
        if let Some(offload) = costs.filter(|_| fault.contains("EIO") || fault.contains("EINVAL")) {
            eventually("the fallback is shown", 60, || {
                both.transfer(Inner::V4, BYTES)?;
                ensure!(figure(offload)? == 0, "{calls}: {fault}: {offload} stays");
                Ok(())
            })?;
        }
        strace.end(&both.server.machine, Signal::Terminate)?;
        let faults = std::fs::read_to_string(log(&both))?.matches("(INJECTED)").count();
        ensure!(faults > 0, "{calls}: {fault}: no call was met");
    }
    both.server.tunnel.process().check_running()?;
    both.transfer(Inner::V4, 4 * BYTES)?;
    ensure!(has_runs()? == had_runs, "runs of datagrams were given up for good");
    if let Some(offload) = costs {
        eventually("the fallback is over", 60, || {
            both.transfer(Inner::V4, BYTES)?;
            ensure!(figure(offload)? == 1, "{calls}: {offload} is given up for good");
            Ok(())
        })?;
    }
    both.agree()
}

#[test]
fn it_runs_as_the_environment_says() {
    let said = |name: &str| std::env::var(name).unwrap_or_default();
    let workers = said("CVAULT_TUNNEL_WORKERS").parse().unwrap_or(1);
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    let figure = |name: &str| both.server.tunnel.figure(&both.server.machine, name).unwrap();
    assert_eq!(figure("cvault_workers"), workers);
    for name in said("CVAULT_TUNNEL_WITHOUT").split(',').filter(|name| !name.is_empty()) {
        let shown = if name == "tun" { "tun_tso".to_owned() } else { name.replace('-', "_") };
        assert_eq!(figure(&format!("cvault_offload_{shown}")), 0, "{name}");
    }
}

#[test]
fn without_any_one_offload_the_others_stay_and_every_byte_arrives() {
    let offloads = |both: &Both| -> Vec<(String, String)> {
        let text = both.server.tunnel.get(&both.server.machine).unwrap();
        let offload = |line: &str| line.strip_prefix("cvault_offload_")?.split_once('=').map(owned);
        text.lines().filter_map(offload).collect()
    };
    let all = offloads(&Both::start(Program::EngineWithout(""), Program::WireguardGo).unwrap());
    assert_eq!(all.len(), 5, "{all:?}");
    for (without, figures) in [
        ("tun", &["tun_tso", "tun_uso", "tun_merge"][..]),
        ("tun-merge", &["tun_merge"]),
        ("udp-gso", &["udp_gso"]),
        ("udp-gro", &["udp_gro"]),
    ] {
        let both = Both::start(Program::EngineWithout(without), Program::WireguardGo).unwrap();
        let mut expected = all.clone();
        expected.iter_mut().filter(|(name, _)| figures.contains(&name.as_str())).for_each(|(_, is)| *is = "0".into());
        assert_eq!(offloads(&both), expected, "without {without}");
        both.meet(Outer::V4).unwrap();
        for inner in [Inner::V4, Inner::V6] {
            both.transfer(inner, 4 * BYTES).unwrap();
        }
        assert_eq!(offloads(&both), expected, "without {without}");
        both.agree().unwrap();
    }
}

fn owned((name, value): (&str, &str)) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

#[test]
fn a_socket_that_refuses_now_and_then_costs_no_connection() {
    // EIO and EINVAL are what a network card says that cannot do what it offered; the others are of the moment.
    survives(
        SOCKET,
        &["error=EIO:when=3+11", "error=EINVAL:when=3+11", "error=ENOBUFS:when=2+7", "error=EPERM:when=2+7"],
        None,
    )
    .unwrap();
}

#[test]
fn a_socket_that_refuses_once_costs_no_offload() {
    for fault in ["error=EIO:when=3", "error=EINVAL:when=3"] {
        survives(SOCKET, &[fault], None).unwrap();
    }
}

#[test]
fn a_tun_that_refuses_now_and_then_costs_no_connection() {
    let faults = ["error=EIO:when=3+11", "error=EINVAL:when=3+11", "error=ENOBUFS:when=2+7"];
    survives(TUN, &faults, Some("cvault_offload_tun_merge")).unwrap();
}

#[test]
fn a_tun_that_cannot_be_read_now_and_then_costs_no_connection() {
    survives(TUN_READ, &["error=EIO:when=3+11", "error=EINVAL:when=3+11", "error=ENOMEM:when=2+3"], None).unwrap();
}

#[test]
fn a_socket_that_cannot_be_read_now_and_then_costs_no_connection() {
    survives(RECEIVE, &["error=EIO:when=3+11", "error=EINVAL:when=3+11", "error=ENOMEM:when=2+3"], None).unwrap();
}

#[test]
fn a_worker_that_hangs_ends_the_process_with_a_reason() {
    let both = Both::start(Program::Engine, Program::WireguardGo).unwrap();
    both.meet(Outer::V4).unwrap();
    // The last one: where there are several, the peer is another's.
    let worker = both.server.tunnel.figure(&both.server.machine, "cvault_workers").unwrap() - 1;
    let strace = inject(&both, worker, "all", "delay_enter=60000000").unwrap();
    let process = both.server.tunnel.process();
    eventually("the process says why it ends", 40, || {
        let log = process.last_lines(20);
        ensure!(log.contains(&format!("worker {worker} has not finished a pass for ten seconds")), "{log}");
        Ok(())
    })
    .unwrap();
    // A thread that is being traced is not gone until the tracer has seen it go.
    strace.end(&both.server.machine, Signal::Kill).unwrap();
    let status = eventually("the process ends", 20, || process.exit_status()?.context("it goes on")).unwrap();
    assert!(!status.success());
}
