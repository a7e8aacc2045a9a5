//! What the fuzzer found worth keeping, once more.

use std::path::Path;

fn replay(target: &str, body: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut inputs = 0;
    for file in std::fs::read_dir(&folder).unwrap() {
        body(&std::fs::read(file.unwrap().path()).unwrap());
        inputs += 1;
    }
    assert!(inputs > 10, "{} holds {inputs} inputs", folder.display());
}

#[test]
fn the_corpus_of_datagrams() {
    replay("datagram", super::datagram);
}

#[test]
fn the_corpus_of_inner_packets() {
    replay("inner_packet", super::inner_packet);
}

#[test]
fn the_corpus_of_control_requests() {
    replay("uapi", super::uapi);
}

#[test]
fn the_corpus_of_offloads() {
    replay("offload", super::offload);
}
