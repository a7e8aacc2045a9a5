//! One or two engines as one server: whatever reaches the wrong one is handed on.

use std::net::SocketAddr;

use super::scratch::{give_back, take_out};
use crate::change::{PeerChange, Secret};
use crate::counters::CounterTable;
use crate::drops::Drop;
use crate::engine::{Engine, EngineConfig, Now, Origin, PeerView};
use crate::out::Out;

/// Slots for each engine.
const CAPACITY: u32 = 4;
/// What came from a peer is handed to its owner, and from there to a neighbour's.
const HAND_OVERS: usize = 2;

pub(super) struct Server {
    engines: Vec<Engine>,
    outs: Vec<Out>,
    pub(super) now: Now,
}

impl Server {
    pub(super) fn new(count: u16, key: &Secret) -> Self {
        let counters = CounterTable::anonymous(CAPACITY * u32::from(count), [1; 16]).expect("a page of memory");
        let mut engines = Engine::sharded(EngineConfig { counters, seed: 0x1234_5678 }, count);
        for engine in &mut engines {
            engine.enter();
            engine.set_private_key(key);
            let overlay = ["10.8.0.0/16", "fd00:cafe::/64"].map(|net| net.parse().expect("a prefix"));
            engine.set_overlay(true, &overlay).expect("two are not too many");
            engine.leave();
        }
        let outs = engines.iter().map(|_| take_out()).collect();
        Self { engines, outs, now: Now { mono_ms: 1_000, unix_ms: 1_800_000_000_000 } }
    }

    pub(super) fn end(self) {
        self.outs.into_iter().for_each(give_back);
    }

    /// Lets one engine do something, and the others what follows from it.
    fn at(&mut self, at: usize, act: impl FnOnce(&mut Engine, &mut Out)) {
        let now = self.now;
        let at = at % self.engines.len();
        self.enter(at, act);
        for round in 0.. {
            let parcels: Vec<_> = self.engines.iter_mut().flat_map(|engine| engine.take_parcels()).collect();
            if parcels.is_empty() {
                return;
            }
            assert!(round < HAND_OVERS, "handed around");
            for parcel in parcels {
                self.enter(parcel.to.into(), |engine, out| engine.on_parcel(now, &parcel, out));
            }
        }
    }

    fn enter(&mut self, at: usize, act: impl FnOnce(&mut Engine, &mut Out)) {
        let (engine, out) = (&mut self.engines[at], &mut self.outs[at]);
        engine.enter();
        act(engine, out);
        while engine.on_handshakes(self.now, out) {}
        engine.leave();
    }

    pub(super) fn peer(&mut self, at: usize, change: PeerChange) {
        let now = self.now;
        self.at(at, |engine, out| engine.apply_peer(now, change, out).expect("there is room"));
    }

    pub(super) fn udp(&mut self, at: usize, datagram: &[u8], origin: Origin) {
        let now = self.now;
        self.at(at, |engine, out| engine.on_udp(now, datagram, origin, out));
    }

    pub(super) fn tun(&mut self, at: usize, packet: &[u8]) {
        let now = self.now;
        self.at(at, |engine, out| engine.on_tun(now, packet, out));
    }

    pub(super) fn tick(&mut self, ms: u64) {
        self.now.mono_ms += ms;
        self.now.unix_ms += ms;
        let now = self.now;
        for at in 0..self.engines.len() {
            self.at(at, |engine, out| engine.on_tick(now, out));
        }
    }

    /// Takes all datagrams as if the sockets had sent them.
    pub(super) fn sent(&mut self) -> Vec<(SocketAddr, Vec<u8>)> {
        let mut sent = Vec::new();
        for (engine, out) in self.engines.iter_mut().zip(&mut self.outs) {
            for d in out.net() {
                sent.push((d.to, out.net_bytes()[d.start..d.start + d.len].to_vec()));
                engine.sent(d.slot, 1, d.inner as u64, d.len as u64);
            }
            out.clear_net();
        }
        sent
    }

    /// Takes all packets as if the TUN had taken them.
    pub(super) fn delivered(&mut self) -> Vec<Vec<u8>> {
        let mut delivered = Vec::new();
        for (engine, out) in self.engines.iter_mut().zip(&mut self.outs) {
            for packet in out.tun() {
                let bytes = packet.of(out.tun_bytes()).to_vec();
                engine.delivered(packet.slot, 1, bytes.len() as u64);
                delivered.push(bytes);
            }
            out.clear_tun();
        }
        delivered
    }

    pub(super) fn view(&mut self, key: &[u8; 32]) -> PeerView {
        let mut views = Vec::new();
        for at in 0..self.engines.len() {
            self.enter(at, |engine, _| views.extend(engine.peers(0, 1000).0));
        }
        views.into_iter().find(|view| view.public_key == *key).expect("it was configured")
    }

    pub(super) fn drops(&mut self) -> u64 {
        let mut drops = 0;
        for at in 0..self.engines.len() {
            self.enter(at, |engine, _| {
                let device = engine.device();
                drops += Drop::ALL.iter().map(|reason| device.drops.get(*reason).packets).sum::<u64>();
            });
        }
        drops
    }
}
