//! The bench measures and says so in the agreed form. What it measures is not looked at.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use cvault_tests::lab::binary;
use serde_json::Value;

const FIELDS: [&str; 8] = ["measure", "met", "must", "ours", "peer", "peer_figure", "ratio", "unit"];
/// One or more of each stage that compares, but none that takes iperf3.
const MEASURES: [&str; 4] = ["peers_set", "counters_read", "peers_add_stall", "handshakes_end_to_end"];

#[test]
fn every_measure_has_a_line_with_our_figure_and_the_best_peers() {
    let mut bench = Command::new(binary("cvault-bench").unwrap());
    bench.args(["dataplane", "--json", "--quick", "--quiet", "0", "--peers", "300", "--handshakes", "50"]);
    bench.args(MEASURES.iter().flat_map(|measure| ["--only", measure]));
    // Debian's wireguard-go alone, whatever this computer has been told for other runs.
    for variable in ["CVAULT_BENCH_WIREGUARD_GO", "CVAULT_BENCH_BORINGTUN_CLI", "CVAULT_BENCH_GOTATUN_CLI"] {
        bench.env_remove(variable);
    }
    for line in measured(bench, &MEASURES) {
        assert!(line["peer"].as_str().is_some_and(|peer| peer.starts_with("wireguard-go ")), "{line}");
    }
}

#[test]
fn the_control_planes_measures_have_such_lines_too() {
    let program = binary("cvault-bench").unwrap();
    let mut bench = Command::new(&program);
    bench.args(["api", "--json", "--quick", "--only", "noise"]);
    bench.env("CVAULT_BIN_DIR", Path::new(&program).parent().unwrap());
    for line in measured(bench, &["fdatasync", "reads_p99_beside_noisy_tenant"]) {
        assert_eq!(line["peer"].is_string(), line["measure"] == "reads_p99_beside_noisy_tenant", "{line}");
    }
}

/// The lines of a run, which measures just these.
fn measured(mut bench: Command, measures: &[&str]) -> Vec<Value> {
    let output = bench.env("CVAULT_BENCH_ROOT", "/nonexistent").output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).expect("JSON");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect();
    let found: BTreeSet<&str> = lines.iter().filter_map(|line| line["measure"].as_str()).collect();
    assert_eq!(found, measures.iter().copied().collect(), "{said}");
    for line in &lines {
        let fields: Vec<&str> = line.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(fields, FIELDS);
        assert!(line["ours"].as_f64().is_some_and(|figure| figure >= 0.0), "{line}");
        assert_eq!(line["met"], Value::Null, "nothing is claimed of a run of this size: {line}");
    }
    lines
}
