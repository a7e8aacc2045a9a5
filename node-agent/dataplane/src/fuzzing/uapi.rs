//! The control socket's text, as a client may write it.

use std::io::Read;

use super::input::Input;
use super::scratch::{give_back, take_out};
use crate::change::DeviceChange;
use crate::counters::CounterTable;
use crate::engine::{Engine, EngineConfig, Now, PeerView};
use crate::io::mailbox::{DeviceState, ShellState};
use crate::out::Out;
use crate::policy::{MAX_TENANTS, TenantId, TenantSettings};
use crate::uapi::server::requests;
use crate::uapi::{SetRequest, format};

/// What `get` says and `set` does not take.
const READ_ONLY: [&str; 19] = [
    "last_handshake_time_",
    "tx_bytes",
    "rx_bytes",
    "cvault_rx_",
    "cvault_tx_",
    "cvault_peer_drop_",
    "cvault_epoch",
    "cvault_peers",
    "cvault_live_peers",
    "cvault_handshakes",
    "cvault_drop",
    "cvault_offload_",
    "cvault_udp_gso_",
    "cvault_tun_",
    "cvault_panics",
    "cvault_socket_",
    "cvault_hairpin_",
    "cvault_worker",
    "protocol_version",
];

/// One byte for the length of the pieces in which it arrives, and the text. Whatever it does to an engine, what `get`
/// says of that engine makes another one the same.
pub fn uapi(input: &[u8]) {
    let mut input = Input(input);
    let Some(piece) = input.byte() else {
        return;
    };
    let pieces = Pieces { text: input.0, len: usize::from(piece).max(1) };
    let said = told(requests(pieces));
    let set = format!("set=1\n{said}\n");
    let mut again = requests(set.as_bytes());
    assert_eq!(again.len(), 1, "set refuses what get says:\n{said}");
    assert_eq!(told(std::mem::take(&mut again)), said);
}

struct Pieces<'a> {
    text: &'a [u8],
    len: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, room: &mut [u8]) -> std::io::Result<usize> {
        let len = self.len.min(room.len());
        self.text.read(&mut room[..len])
    }
}

/// An engine that is told all of it, and what it says afterwards without what only counts.
fn told(requests: Vec<SetRequest>) -> String {
    let counters = CounterTable::anonymous(8, [1; 16]).expect("a page of memory");
    let mut engine = Engine::new(EngineConfig { counters, seed: 1 });
    let mut out = take_out();
    let mut state = DeviceState {
        view: engine.device(),
        listen_port: 0,
        fwmark: 0,
        shell: ShellState::default(),
        workers: Vec::new(),
    };
    for request in requests {
        tell(&mut engine, &mut state, request, &mut out);
        out.clear_net();
    }
    give_back(out);
    state.view = engine.device();
    let (mut peers, more) = engine.peers(0, 1000);
    assert_eq!((peers.len(), more), (state.view.peers, None));
    peers.sort_by_key(|peer| peer.public_key);
    let (mut tenants, more) = engine.tenants(0, MAX_TENANTS);
    assert_eq!(more, None);
    tenants.sort_unstable_by_key(|(id, _)| *id);
    said(&state, &tenants, &peers)
}

/// As the server and the worker do it.
fn tell(engine: &mut Engine, state: &mut DeviceState, request: SetRequest, out: &mut Out) {
    let now = Now::default();
    let SetRequest { device, replace_peers, end_replace, peers } = request;
    let DeviceChange { private_key, listen_port, fwmark, replace_overlay, overlay, journal_ack: _, policy } = device;
    if engine.set_overlay(replace_overlay, &overlay).is_err() || engine.change_policy(now, policy).is_err() {
        return;
    }
    state.fwmark = fwmark.unwrap_or(state.fwmark);
    state.listen_port = listen_port.unwrap_or(state.listen_port);
    private_key.iter().for_each(|key| engine.set_private_key(key));
    if replace_peers {
        engine.begin_replace();
    }
    for change in peers {
        let refused = engine.apply_peer(now, change, out).is_err();
        engine.settle(100, |_| Ok::<(), ()>(())).expect("there is no journal to fail");
        if refused {
            break;
        }
    }
    if replace_peers || end_replace {
        engine.end_replace();
        engine.settle(100, |_| Ok::<(), ()>(())).expect("there is no journal to fail");
    }
}

fn said(state: &DeviceState, tenants: &[(TenantId, TenantSettings)], peers: &[PeerView]) -> String {
    let mut text = format::device(state);
    tenants.iter().for_each(|(id, settings)| format::tenant(&mut text, id, settings));
    peers.iter().for_each(|peer| format::peer(&mut text, peer));
    let kept = text.lines().filter(|line| !READ_ONLY.iter().any(|key| line.starts_with(key)));
    kept.map(|line| format!("{line}\n")).collect()
}
