//! What a handshake costs the side that answers, by step: `cargo bench -p cvault-dataplane --bench handshakes`.
//! Microseconds a message, without sockets; the whole is measured by `cargo xtask bench dataplane`.
#![expect(clippy::print_stdout, reason = "the figures are the output")]

use std::hint::black_box;
use std::net::SocketAddr;

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use cvault_dataplane::Out;
use cvault_dataplane::change::{PeerChange, Secret};
use cvault_dataplane::counters::CounterTable;
use cvault_dataplane::ecn::Ecn;
use cvault_dataplane::engine::{Engine, EngineConfig, Now, Origin};
use rustix::time::{ClockId, clock_gettime};

const PEERS: u32 = 1024;
/// As many as wait in a busy moment; no cookie is asked for.
const BATCH: usize = 64;
/// The best of so many: the others were disturbed.
const ATTEMPTS: usize = 7;
const SERVER: [u8; 32] = [1; 32];

struct Bench {
    engine: Engine,
    out: Out,
    now: Now,
}

#[derive(Clone, Copy)]
struct Times {
    gate: f64,
    answer: f64,
}

fn main() {
    let first = best((0..ATTEMPTS).map(|_| Bench::new().round()));
    let mut bench = Bench::new();
    bench.round();
    let again = best((0..ATTEMPTS).map(|_| bench.round()));
    let (private, public) = (StaticSecret::from([3; 32]), PublicKey::from(&StaticSecret::from([4; 32])));
    let fast = graviola::key_agreement::x25519::StaticPrivateKey::from_array(&private.to_bytes());
    let other = graviola::key_agreement::x25519::PublicKey::from_array(public.as_bytes());
    let rounds = 2000;
    let least =
        |f: &dyn Fn()| (0..ATTEMPTS).map(|_| micros(rounds, || (0..rounds).for_each(|_| f()))).fold(f64::MAX, f64::min);
    let agreement = least(&|| {
        let _ = black_box(black_box(&fast).diffie_hellman(black_box(&other)));
    });
    let key = least(&|| {
        let _ = black_box(black_box(&fast).public_key());
    });
    println!("the gate (length, MAC1)                   {:7.2} us", first.gate);
    println!("the first answer to a peer                {:7.2} us", first.answer);
    println!("  four agreements and a key, one by one   {:7.2} us", 4.0 * agreement + key);
    println!("an answer when the peers' keys are agreed {:7.2} us", again.answer);
    println!("  three agreements and a key, one by one  {:7.2} us", 3.0 * agreement + key);
}

fn best(times: impl Iterator<Item = Times>) -> Times {
    let least =
        |one: Times, other: Times| Times { gate: one.gate.min(other.gate), answer: one.answer.min(other.answer) };
    times.reduce(least).expect("several attempts")
}

impl Bench {
    fn new() -> Self {
        let counters = CounterTable::anonymous(PEERS, [1; 16]).expect("there is memory");
        let mut engine = Engine::new(EngineConfig { counters, seed: 1 });
        engine.set_private_key(&Secret::new(SERVER));
        let mut bench = Self { engine, out: Out::default(), now: Now { mono_ms: 1000, unix_ms: 1_800_000_000_000 } };
        for number in 0..PEERS {
            let public_key = PublicKey::from(&secret(number)).to_bytes();
            let peer = PeerChange { public_key, ..PeerChange::default() };
            bench.engine.apply_peer(bench.now, peer, &mut bench.out).expect("there is room");
        }
        bench
    }

    /// One handshake of every peer.
    fn round(&mut self) -> Times {
        // Not too soon after the last.
        self.now.mono_ms += 1000;
        let server = PublicKey::from(&StaticSecret::from(SERVER));
        let messages: Vec<_> = (0..PEERS).map(|number| initiation(secret(number), server, number)).collect();
        let from: SocketAddr = "192.0.2.1:1000".parse().expect("an address");
        let origin = Origin { from, to: None, ecn: Ecn::NotEct };
        let (mut gate, mut answer) = (0.0, 0.0);
        let before = self.engine.device().handshakes;
        for messages in messages.chunks(BATCH) {
            let (engine, out, now) = (&mut self.engine, &mut self.out, self.now);
            gate += micros(1, || messages.iter().for_each(|message| engine.on_udp(now, message, origin, out)));
            answer += micros(1, || while engine.on_handshakes(now, out) {});
            out.clear_net();
        }
        assert_eq!(self.engine.device().handshakes - before, u64::from(PEERS));
        Times { gate: gate / f64::from(PEERS), answer: answer / f64::from(PEERS) }
    }
}

fn secret(number: u32) -> StaticSecret {
    let mut bytes = [9; 32];
    bytes[8..12].copy_from_slice(&number.to_le_bytes());
    StaticSecret::from(bytes)
}

fn initiation(secret: StaticSecret, server: PublicKey, index: u32) -> Vec<u8> {
    let mut room = vec![0; 256];
    let mut tunn = Tunn::new(secret, server, None, None, index, None);
    let TunnResult::WriteToNetwork(message) = tunn.format_handshake_initiation(&mut room, true) else {
        panic!("there is nothing in the way of an initiation");
    };
    message.to_vec()
}

/// CPU time of one of `count`: what else runs on the computer does not matter.
fn micros(count: u32, work: impl FnOnce()) -> f64 {
    let cpu = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
    };
    let before = cpu();
    work();
    (cpu() - before) / f64::from(count)
}
