//! Configuration that cannot work: one sentence that says what, a status that says so, nothing half-done.

use cvault_tests::lab::{Lab, Machine, Network, binary};

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
    fn names(&self, words: &[&str]) -> bool {
        let failed = self.status.is_some_and(|status| status != 0 && status != 124 && status != 101);
        failed && !self.said.contains("panicked") && words.iter().any(|word| self.said.contains(word))
    }
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
    assert!(no_key.names(&["CVAULT_KEK_FILE"]), "{:?}: {}", no_key.status, no_key.said);

    let short_key =
        refused(&machine, &program, &["serve"], &[database[0], database[1], ("API_ENCRYPTION_KEY", "abcd")]);
    assert!(short_key.names(&["key-encryption key"]), "{:?}: {}", short_key.status, short_key.said);
    assert!(!short_key.said.contains("abcd"), "a key is never repeated");

    let no_database = refused(&machine, &program, &["serve"], &[("API_ENCRYPTION_KEY", KEY)]);
    assert!(no_database.names(&["DATABASE_URL"]), "{:?}: {}", no_database.status, no_database.said);

    let unreachable = refused(&machine, &program, &["serve"], &[database[0], database[1], ("API_ENCRYPTION_KEY", KEY)]);
    assert!(unreachable.names(&["database", "PostgreSQL"]), "{:?}: {}", unreachable.status, unreachable.said);
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
    assert!(taken.names(&["0.0.0.0:80"]), "{:?}: {}", taken.status, taken.said);
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
    assert!(not_enrolled.names(&["enroll"]), "{:?}: {}", not_enrolled.status, not_enrolled.said);

    let bad_token = refused(
        &machine,
        &program,
        &["enroll", "--control-plane", "198.51.100.2:8443", "--token", "cvj1.nonsense", "--state-dir", &state],
        &[],
    );
    assert!(bad_token.names(&["token"]), "{:?}: {}", bad_token.status, bad_token.said);

    let not_root = {
        let mut command = machine.command("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--",
            "timeout",
            "20",
            &program,
            "tunnel",
            "-f",
            "cv9",
        ]);
        command.output().unwrap()
    };
    let said = String::from_utf8_lossy(&not_root.stderr).into_owned();
    assert!(!not_root.status.success() && !said.contains("panicked"), "{said}");
    assert!(said.contains("/dev/net/tun") || said.contains("root") || said.contains("permission"), "{said}");
    assert!(machine.sh("ip link show cv9").is_err());
}
