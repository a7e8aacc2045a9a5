//! The control process killed at the worst moment, and tunnels that it finds at its start.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cvault_node_protocol::tls::Identity;

use crate::gateway::{Gateway, Serving};
use crate::namespaces::{
    CLIENT_KEY, Killed, SECONDS, engine_count, enrol, in_namespaces, kill, peer, ping, public, sh, start_client,
    start_run, stop, tunnel_pid, uapi,
};
use crate::{agent, eventually};

struct World {
    gateway: Gateway,
    identity: Identity,
    serving: Serving,
    dir: PathBuf,
    _root: tempfile::TempDir,
}

async fn world() -> World {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("state");
    let identity = Identity::generate().unwrap();
    let gateway = Gateway::new(identity.pin());
    let serving = gateway.serve(&identity, "127.0.0.1:8443").await;
    enrol(&dir, &serving).await;
    World { gateway, identity, serving, dir, _root: root }
}

async fn acknowledged(gateway: &Gateway) {
    eventually("the state is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;
}

fn runs(key: [u8; 32]) -> bool {
    uapi("get=1\n\n").is_some_and(|text| text.contains(&format!("public_key={}", hex::encode(key))))
}

fn state_bytes(dir: &Path) -> u64 {
    std::fs::metadata(dir.join("state.bin")).unwrap().len()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_while_it_applies_a_change_knows_the_change() {
    in_namespaces("restarts::an_agent_killed_while_it_applies_a_change_knows_the_change", async || {
        let World { gateway, identity, serving, dir, _root } = world().await;
        let mut run = Killed(start_run(&dir));
        gateway.change(&[], vec![peer([5; 32], 5), peer([6; 32], 6)]).await;
        acknowledged(&gateway).await;

        // A tunnel that stands still: the engine does not take the change before the agent dies.
        let tunnel = tunnel_pid(&dir);
        kill("-STOP", tunnel);
        let before = state_bytes(&dir);
        gateway.change(&[&[5; 32]], vec![peer(public(CLIENT_KEY), 2)]).await;
        eventually("the change is written ahead", SECONDS, || state_bytes(&dir) > before).await;
        run.0.kill().unwrap();
        run.0.wait().unwrap();
        drop(serving);
        kill("-CONT", tunnel);

        let run = start_run(&dir);
        eventually("the added peer runs, the removed one does not", SECONDS, || {
            runs(public(CLIENT_KEY)) && !runs([5; 32])
        })
        .await;
        assert!(runs([6; 32]));
        assert_eq!(tunnel_pid(&dir), tunnel);
        let _serving = gateway.serve(&identity, "127.0.0.1:8443").await;
        acknowledged(&gateway).await;
        stop(run);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_the_state_does_not_know_goes_with_the_first_word_of_the_control_plane() {
    in_namespaces(
        "restarts::a_peer_that_the_state_does_not_know_goes_with_the_first_word_of_the_control_plane",
        async || {
            let World { gateway, identity, serving, dir, _root } = world().await;
            let mut run = Killed(start_run(&dir));
            gateway.change(&[], vec![peer([5; 32], 5)]).await;
            acknowledged(&gateway).await;
            run.0.kill().unwrap();
            run.0.wait().unwrap();
            drop(serving);
            let stranger = format!(
                "set=1\npublic_key={}\ncvault_tenant={}\ncvault_generation=9\nallowed_ip=10.8.0.9/32\n\n",
                "09".repeat(32),
                "01".repeat(16)
            );
            uapi(&stranger).unwrap();
            let text = |text: &str| std::fs::read_to_string(dir.join("log")).unwrap_or_default().contains(text);
            let log = std::fs::File::create(dir.join("log")).unwrap();
            let run = Killed(
                agent()
                    .args(["run", "--metrics-listen", "off", "--state-dir"])
                    .arg(&dir)
                    .env("CVAULT_LOG", "info")
                    .stderr(log)
                    .spawn()
                    .unwrap(),
            );
            eventually("the saved state serves", SECONDS, || text("serving the saved state")).await;
            assert!(runs([9; 32]) && runs([5; 32]), "a state file alone removes nobody");
            let _serving = gateway.serve(&identity, "127.0.0.1:8443").await;
            eventually("the stranger is gone", SECONDS, || !runs([9; 32])).await;
            assert!(runs([5; 32]));
            eventually("its final counters are told of", SECONDS, || text("final counters of unknown devices")).await;
            assert!(std::fs::metadata(dir.join("closed.journal")).unwrap().len() > 0, "and kept");
            drop(run);
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_counted_before_a_reboot_is_billed() {
    in_namespaces("restarts::what_was_counted_before_a_reboot_is_billed", async || {
        let World { gateway, identity, serving, dir, _root } = world().await;
        let mut run = Killed(start_run(&dir));
        gateway.change(&[], vec![peer(public(CLIENT_KEY), 2)]).await;
        acknowledged(&gateway).await;
        let server_key = gateway.state().enrolled.as_ref().unwrap().1.wireguard_public_key.as_ref().try_into().unwrap();
        run.0.kill().unwrap();
        run.0.wait().unwrap();
        drop(serving);
        // Only the tunnel sees this traffic; then the host goes down, and the tunnel of the next boot keeps the old file.
        let client = start_client(&server_key);
        eventually("traffic flows", SECONDS, || ping("203.0.113.1", 3)).await;
        let counted = engine_count();
        drop(client);
        kill("-KILL", tunnel_pid(&dir));
        let counters = std::fs::read(dir.join("counters.bin")).unwrap();
        let previous = dir.join(format!("counters.previous.{}.bin", hex::encode(&counters[16..32])));
        std::fs::rename(dir.join("counters.bin"), &previous).unwrap();

        let run = start_run(&dir);
        eventually("the old file was read", SECONDS, || !previous.exists()).await;
        let _serving = gateway.serve(&identity, "127.0.0.1:8443").await;
        let billed = || {
            let state = gateway.state();
            let mut of_client = state.ledger.iter().filter(|((device, _), _)| device == &[2; 16]);
            of_client.any(|(_, usage)| (usage.rx_bytes, usage.tx_bytes) == counted)
        };
        eventually("it is billed", SECONDS, billed).await;
        stop(run);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_divergence_ends_in_the_control_planes_state_and_costs_no_tunnel() {
    in_namespaces("restarts::a_silent_divergence_ends_in_the_control_planes_state_and_costs_no_tunnel", async || {
        let World { gateway, identity: _identity, serving: _serving, dir, _root } = world().await;
        let run = Killed(start_run(&dir));
        gateway.change(&[], vec![peer([5; 32], 5)]).await;
        acknowledged(&gateway).await;
        // At the same revision the control plane suddenly has another peer; and the tunnel dies before it is told.
        let mut other = peer([6; 32], 6);
        other.generation = 1;
        gateway.state().peers.insert(vec![6; 32], other);
        kill("-KILL", tunnel_pid(&dir));
        eventually("the other peer runs too", SECONDS, || runs([6; 32]) && runs([5; 32])).await;
        acknowledged(&gateway).await;
        drop(run);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_changed_by_hand_is_repaired() {
    in_namespaces("restarts::what_somebody_changed_by_hand_is_repaired", async || {
        let World { gateway, identity: _identity, serving: _serving, dir, _root } = world().await;
        let run = Killed(start_run(&dir));
        gateway.change(&[], vec![peer([5; 32], 5)]).await;
        acknowledged(&gateway).await;
        sh("nft delete table inet cvault && ip addr del 10.8.0.1/16 dev cv0");
        uapi(&format!("set=1\npublic_key={}\nremove=true\n\n", "05".repeat(32))).unwrap();
        assert!(!runs([5; 32]));
        kill("-HUP", i32::try_from(run.0.id()).unwrap());
        let repaired = "nft list table inet cvault && ip addr show dev cv0 | grep -q 10.8.0.1/16";
        let check = || {
            Command::new("sh")
                .args(["-c", repaired])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .unwrap()
                .success()
        };
        eventually("table, address and peer are back", SECONDS, || check() && runs([5; 32])).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_hangs_is_replaced_and_a_foreign_one_is_named() {
    in_namespaces("restarts::a_tunnel_that_hangs_is_replaced_and_a_foreign_one_is_named", async || {
        let World { gateway, identity: _identity, serving: _serving, dir, _root } = world().await;
        let mut run = Killed(start_run(&dir));
        gateway.change(&[], vec![peer([5; 32], 5)]).await;
        acknowledged(&gateway).await;
        let hung = tunnel_pid(&dir);
        run.0.kill().unwrap();
        run.0.wait().unwrap();
        kill("-STOP", hung);
        let run = start_run(&dir);
        eventually("another tunnel serves", SECONDS, || tunnel_pid(&dir) != hung && runs([5; 32])).await;
        stop(run);

        // The files it counts into are gone: another tunnel begins with files of its own.
        let blind = tunnel_pid(&dir);
        std::fs::remove_file(dir.join("counters.bin")).unwrap();
        let run = start_run(&dir);
        eventually("another tunnel serves", SECONDS, || tunnel_pid(&dir) != blind && runs([5; 32])).await;
        assert!(dir.join("counters.bin").exists());
        stop(run);

        kill("-TERM", tunnel_pid(&dir));
        eventually("nobody serves", SECONDS, || uapi("get=1\n\n").is_none()).await;
        let link = dir.join("cvault-tunnel");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_cvault-node-agent"), &link).unwrap();
        // Called by that name, as wg-quick calls it, it detaches and returns when it serves.
        assert!(Command::new(&link).arg("cv0").stdin(Stdio::null()).status().unwrap().success());
        let output = agent().args(["run", "--metrics-listen", "off", "--state-dir"]).arg(&dir).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(said.lines().last().unwrap().contains("is served by another program"), "{said}");
        assert!(uapi("get=1\n\n").is_some(), "it was left alone");
    })
    .await;
}
