//! What changes of many peers cost in process: `cargo bench -p cvault-dataplane --bench peers [-- PEERS]`.
//!
//! Parsing and applying apart, without sockets and threads; the whole is measured by `cargo xtask bench dataplane`.
#![expect(clippy::print_stdout, reason = "the figures are the output")]

use std::fmt::Write;
use std::hint::black_box;
use std::time::Duration;

use cvault_dataplane::Out;
use cvault_dataplane::change::{PeerChange, Secret};
use cvault_dataplane::counters::{CounterReader, CounterTable, FILE_NAME, MAX_PEERS};
use cvault_dataplane::engine::{Engine, EngineConfig, Now, Settled};
use cvault_dataplane::journal::ClosedPeer;
use cvault_dataplane::uapi::SetParser;
use rustix::time::{ClockId, clock_gettime};

/// As the control socket hands them over.
const CHUNK: usize = 256;
/// Long after any handshake: nobody is called back.
const NOW: Now = Now { mono_ms: 1000, unix_ms: 1_800_000_000_000 };

struct Bench {
    engine: Engine,
    out: Out,
}

fn main() {
    let peers = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(65_000);
    let dir = tempfile::tempdir().expect("there is room for temporary files");
    let counters = CounterTable::open(dir.path(), MAX_PEERS, [1; 16], [2; 16]).expect("nobody else uses it");
    let mut engine = Engine::new(EngineConfig { counters, seed: 1 });
    engine.set_private_key(&Secret::new([1; 32]));
    let mut bench = Bench { engine, out: Out::default() };
    let text = request(peers);
    println!("{peers} peers, {} bytes", text.len());

    for what in ["add", "same", "same"] {
        let changes = timed("parse", || parse(&text));
        let longest = timed(what, || bench.apply(changes));
        println!("{:>24} {:9.3} ms", "longest chunk", millis(longest));
    }
    let changes = parse(&text);
    timed("same, replacing", || {
        bench.engine.begin_replace();
        bench.apply(changes);
        bench.end_replace();
    });
    let one = parse(&format!("public_key={:064x}\nallowed_ip=10.9.0.1/32\n", u64::MAX));
    timed("add one", || bench.apply(one));
    timed("idle tick", || bench.engine.on_tick(NOW, &mut bench.out));
    let reader = CounterReader::open(&dir.path().join(FILE_NAME)).expect("it was just made");
    for _ in 0..3 {
        timed("read all counters", || black_box(reader.peers().map(|peer| peer.counts.rx_inner).sum::<u64>()));
    }
    timed("replace by none", || {
        bench.engine.begin_replace();
        bench.end_replace();
    });
    assert_eq!(bench.engine.device().peers, 0);
}

impl Bench {
    /// The longest time that packets would wait.
    fn apply(&mut self, changes: Vec<PeerChange>) -> Duration {
        let mut longest = Duration::ZERO;
        let mut changes = changes.into_iter().peekable();
        while changes.peek().is_some() {
            let chunk: Vec<_> = changes.by_ref().take(CHUNK).collect();
            let start = cpu_time();
            for change in chunk {
                self.engine.apply_peer(NOW, change, &mut self.out).expect("they fit");
            }
            longest = longest.max(cpu_time().saturating_sub(start));
        }
        longest
    }

    fn end_replace(&mut self) {
        self.engine.end_replace();
        while self.engine.settle(CHUNK, take) != Ok(Settled::All) {}
    }
}

fn take(closed: &[ClosedPeer]) -> Result<(), ()> {
    black_box(closed);
    Ok(())
}

fn request(peers: u32) -> String {
    let mut text = String::new();
    for peer in 0..peers {
        let [_, high, middle, low] = peer.to_be_bytes();
        let key = u64::from(peer).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        writeln!(
            text,
            "public_key={key:032x}{key:032x}\nendpoint=192.0.2.1:{}\nreplace_allowed_ips=true\n\
             allowed_ip=10.{}.{middle}.{low}/32",
            1024 + peer % 60_000,
            128 + high,
        )
        .expect("a string takes everything");
    }
    text
}

fn parse(text: &str) -> Vec<PeerChange> {
    let mut parser = SetParser::default();
    for line in text.lines() {
        parser.line(line).expect("every line is sound");
    }
    parser.finish().peers
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = cpu_time();
    let result = run();
    println!("{what:>24} {:9.3} ms", millis(cpu_time().saturating_sub(start)));
    result
}

/// Of this thread: others on the machine must not show.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(now).expect("it begins at zero")
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
