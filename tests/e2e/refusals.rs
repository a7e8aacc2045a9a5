//! Configuration that cannot work: one sentence that says what, a status that says so, nothing half-done.

use cvault_tests::lab::{Lab, Machine, Network, binary};
use cvault_tests::platform::{ControlOptions, Platform};

struct Refusal {
    status: Option<i32>,
    said: String,
}

/// Runs a program that should refuse; `environment` is all it knows.
fn refused(machine: &Machine, program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Refusal {
    let mut command = machine.command("timeout");
    command.args(["20", program]).args(arguments).envs(environment.iter().copied());
    let output = command.output().expect("nsenter can be started");
    Refusal {
        status: output.status.code(),
        said: format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
    }
}

impl Refusal {
    /// Status 1 and nothing but these sentences, one on each line.
    fn says(&self, sentences: &[&str]) {
        let lines: Vec<&str> = self.said.lines().collect();
        let same = lines.len() == sentences.len()
            && lines.iter().zip(sentences).all(|(line, sentence)| line.starts_with(&format!("error: {sentence}")));
        assert!(same && self.status == Some(1), "{:?}, wanted {sentences:?}, said: {}", self.status, self.said);
    }
}

fn is_absent(path: &str) -> bool {
    !std::path::Path::new(path).exists()
}

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

#[test]
fn the_control_plane_refuses_what_cannot_work_and_says_why() {
    let lab = Lab::build().unwrap();
    let (machine, _) = lab.machine("control", Network::Services, 2).unwrap();
    let program = binary("cvault-control-plane").unwrap();
    let nowhere = "postgres://cvault_app@127.0.0.1:1/cvault";
    let database = [("DATABASE_URL", nowhere), ("CVAULT_DATABASE_SYS_URL", nowhere)];

    let no_key = refused(&machine, &program, &["serve"], &database);
    no_key.says(&["There is no key-encryption key: write one with `openssl rand -hex 32`"]);

    let short_key =
        refused(&machine, &program, &["serve"], &[database[0], database[1], ("API_ENCRYPTION_KEY", "abcd")]);
    short_key.says(&["The key-encryption key must be 64 hexadecimal digits"]);
    assert!(!short_key.said.contains("abcd"), "a key is never repeated");

    let no_database = refused(&machine, &program, &["serve"], &[("API_ENCRYPTION_KEY", KEY)]);
    no_database.says(&["DATABASE_URL is not set", "CVAULT_DATABASE_SYS_URL is not set"]);

    let unreachable = refused(&machine, &program, &["serve"], &[database[0], database[1], ("API_ENCRYPTION_KEY", KEY)]);
    unreachable.says(&["the database cannot be reached with CVAULT_DATABASE_SYS_URL"]);
    assert!(!unreachable.said.contains(KEY));
}

#[test]
fn a_port_that_is_taken_is_named() {
    let lab = Lab::build().unwrap();
    let (machine, _) = lab.machine("control", Network::Services, 2).unwrap();
    let program = binary("cvault-control-plane").unwrap();
    let web = machine.spawn("web", &binary("cvault-lab").unwrap(), ["web"], []).unwrap();
    cvault_tests::lab::eventually("port 80 is taken", 5, || machine.sh("curl -sf http://127.0.0.1/ip")).unwrap();
    let data = machine.dir().join("data").display().to_string();
    let taken = refused(&machine, &program, &["dev", "--data-dir", &data, "--listen", "0.0.0.0:80"], &[]);
    let sentence = taken.said.lines().last().unwrap_or_default();
    assert_eq!(taken.status, Some(1), "{}", taken.said);
    assert!(sentence.starts_with("error: ") && sentence.contains("0.0.0.0:80"), "{}", taken.said);
    web.check_running().unwrap();
    assert!(machine.sh("pgrep postgres").is_err(), "PostgreSQL does not stay behind");
}

#[test]
fn the_node_agent_refuses_what_cannot_work_and_says_why() {
    let lab = Lab::build().unwrap();
    let (machine, _) = lab.machine("server", Network::Servers, 10).unwrap();
    let program = binary("cvault-node-agent").unwrap();
    let state = machine.dir().join("state").display().to_string();

    let not_enrolled = refused(&machine, &program, &["run", "--state-dir", &state], &[]);
    not_enrolled.says(&["this server is not enrolled: run `cvault-node-agent enroll` first"]);
    assert!(machine.sh("ip link show cv0").is_err());

    let elsewhere = machine.dir().join("elsewhere").display().to_string();
    let bad_token = refused(
        &machine,
        &program,
        &["enroll", "--control-plane", "198.51.100.2:8443", "--token", "cvj1.nonsense", "--state-dir", &elsewhere],
        &[],
    );
    bad_token.says(&["an enrolment token begins with `cvj1.` and has five parts separated by dots"]);
    assert!(is_absent(&elsewhere), "a refused enrolment leaves nothing");

    // a copy that everybody may read, wherever the program was built
    let copy = "/run/lab/bin/node-agent";
    machine.sh(&format!("install -m 755 {program} {copy}")).unwrap();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--", copy];
    let as_nobody = |arguments: &[&str]| refused(&machine, "setpriv", &[&nobody[..], arguments].concat(), &[]);
    as_nobody(&["tunnel", "-f", "cv9"])
        .says(&["interface `cv9` may not be created: run as root or with CAP_NET_ADMIN"]);
    as_nobody(&["run", "--state-dir", &elsewhere]).says(&["a server agent sets up network interfaces: run it as root"]);
    assert!(machine.sh("ip link show cv9").is_err());
    assert!(is_absent(&elsewhere));
}

#[test]
fn the_node_agent_refuses_a_machine_without_tun() {
    let lab = Lab::build().unwrap();
    let (machine, _) = lab.machine("server", Network::Servers, 10).unwrap();
    // read-only, because a missing device node would be made
    machine.sh("mount -t tmpfs -o ro tmpfs /dev/net").unwrap();
    let program = binary("cvault-node-agent").unwrap();
    let state = machine.dir().join("state").display().to_string();
    refused(&machine, &program, &["run", "--state-dir", &state], &[]).says(&["/dev/net/tun cannot be opened"]);
    refused(&machine, &program, &["tunnel", "-f", "cv9"], &[]).says(&["there is no /dev/net/tun: run `modprobe tun`"]);
    assert!(is_absent(&state) && machine.sh("ip link show cv9").is_err());
}

#[test]
fn a_pool_that_overlaps_another_is_refused() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    let pools = || platform.control.sql("select count(*) from platform.address_pools").unwrap();
    let before = pools();
    for (v4, v6) in [("10.8.128.0/17", "fd00:beef::/64"), ("10.9.0.0/16", "fd00:cafe::/64")] {
        let refused = platform.control.admin(["pool", "create", "--name", "second", "--v4", v4, "--v6", v6]);
        let said = refused.unwrap_err().to_string();
        assert!(
            said.contains("error: ") && said.contains("overlap") && !said.contains("panicked"),
            "{v4} {v6}: {said}"
        );
        assert_eq!(pools(), before);
    }
}
