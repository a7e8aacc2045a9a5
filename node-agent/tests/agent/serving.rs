//! `run` for real, in namespaces: a client far away, an "internet" behind the server, and every process killed once.

use std::path::Path;
use std::time::Instant;

use cvault_node_protocol::tls::Identity;

use crate::gateway::Gateway;
use crate::namespaces::{
    CLIENT_KEY, SECONDS, engine_count, enrol, in_namespaces, kill, peer, ping, public, sh, start_client, start_run,
    stop, tunnel_pid, uapi,
};
use crate::{agent, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_serves_meters_and_survives() {
    in_namespaces("serving::a_server_serves_meters_and_survives", story).await;
}

async fn story() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("state");
    let identity = Identity::generate().unwrap();
    let gateway = Gateway::new(identity.pin());
    let serving = gateway.serve(&identity, "127.0.0.1:8443").await;
    enrol(&dir, &serving).await;

    a_taken_port_is_said_and_nothing_stays(&dir);
    let mut run = start_run(&dir);
    let took = eventually("the empty snapshot is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;
    println!("first acknowledgement after start: {took:?}");

    let server_key: [u8; 32] =
        gateway.state().enrolled.as_ref().unwrap().1.wireguard_public_key.as_ref().try_into().unwrap();
    let mut activations = Vec::new();
    for n in 0..50 {
        let began = Instant::now();
        gateway.change(&[], vec![peer([n + 100; 32], n + 100)]).await;
        eventually("a change is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;
        activations.push(began.elapsed());
    }
    activations.sort();
    println!("activation p50 {:?} max {:?}", activations[25], activations[49]);
    gateway.change(&[], vec![peer(public(CLIENT_KEY), 2)]).await;
    eventually("the client is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;

    let _client = start_client(&server_key);
    assert!(ping("203.0.113.1", 3) && ping("2001:db8:9::1", 3), "both families go through the tunnel");
    assert!(!ping("10.8.0.102", 1) && !ping("203.0.113.254", 1), "peers and the host are out of reach");
    // Three echoes of each family are 3 × (84 + 104) each way. The echoes to another peer and to the server's own address
    // were not carried.
    let billed = |rx: u64, tx: u64| {
        let state = gateway.state();
        state
            .ledger
            .iter()
            .any(|((device, _), usage)| device == &[2; 16] && (usage.rx_bytes, usage.tx_bytes) == (rx, tx))
    };
    eventually("the exact bytes are billed", SECONDS, || billed(564, 564)).await;

    // A wrong change is refused with its reason, and the state goes on.
    let mut wrong = peer([9; 32], 9);
    wrong.ipv4 = u32::from_be_bytes([192, 168, 0, 9]);
    gateway.change(&[], vec![wrong]).await;
    let refused =
        || gateway.state().reports.iter().any(|report| report.nacks.iter().any(|nack| nack.reason.contains("overlay")));
    eventually("the wrong change is refused", SECONDS, refused).await;
    gateway.change(&[&[9; 32]], vec![]).await;
    eventually("the repaired state is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;

    // The control plane wants a snapshot, or finds another session: both end in the same state.
    let watches = || gateway.state().watches.len();
    let before = watches();
    gateway.state().snapshot_wanted = true;
    let forgot = || gateway.state().watches.get(before).is_some_and(|watch| watch.have.is_none());
    eventually("the agent asks for everything", SECONDS, forgot).await;
    gateway.state().superseded = true;
    eventually("the agent watches again", SECONDS, || watches() > before + 1).await;
    eventually("the state is acknowledged again", SECONDS, || gateway.state().is_acknowledged()).await;
    assert!(ping("203.0.113.1", 1), "no tunnel was lost by it");

    // The tunnel process is killed: it comes back with its peers and goes on counting.
    let pid = tunnel_pid(&dir);
    kill("-KILL", pid);
    let took = eventually("another tunnel process runs", SECONDS, || {
        let now = tunnel_pid(&dir);
        now != pid && uapi("get=1\n\n").is_some_and(|text| text.contains(&hex::encode(public(CLIENT_KEY))))
    })
    .await;
    println!("tunnel back with all peers after {took:?}");
    eventually("traffic flows again", SECONDS, || ping("203.0.113.1", 1)).await;

    // The control process is killed: the tunnel does not notice. Then it starts without a control plane.
    let pid = tunnel_pid(&dir);
    run.kill().unwrap();
    run.wait().unwrap();
    drop(serving);
    assert!(ping("203.0.113.1", 1));
    let mut run = start_run(&dir);
    assert!(ping("203.0.113.1", 2));
    assert_eq!(tunnel_pid(&dir), pid, "the running tunnel was adopted");

    // As after a reboot: both processes and the interface gone, and still no control plane.
    run.kill().unwrap();
    run.wait().unwrap();
    kill("-KILL", pid);
    sh("ip link del cv0");
    let run = start_run(&dir);
    eventually("the saved state serves", SECONDS, || ping("203.0.113.1", 1)).await;

    // The control plane is back: nothing was lost, nothing counted twice.
    let serving = gateway.serve(&identity, "127.0.0.1:8443").await;
    eventually("the server is back", SECONDS, || {
        gateway.state().watches.last().is_some_and(|w| w.have.is_some()) && gateway.state().is_acknowledged()
    })
    .await;
    let before = engine_count();
    eventually("all bytes are billed", SECONDS, || billed(before.0, before.1)).await;

    // Removal: traffic stops, the final counters are those that were billed.
    gateway.change(&[&public(CLIENT_KEY)], vec![]).await;
    eventually("the removal is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;
    assert!(!ping("203.0.113.1", 1), "a removed peer has no tunnel");
    assert!(billed(before.0, before.1));
    eventually("the journal is taken over", SECONDS, || {
        std::fs::metadata(dir.join("closed.journal")).unwrap().len() == 0
    })
    .await;

    stop(run);
    assert!(uapi("get=1\n\n").is_some(), "the tunnel stays after SIGTERM");
    kill("-TERM", tunnel_pid(&dir));
    drop(serving);
}

/// The server's port belongs to somebody else: one sentence, and neither process nor interface is left.
fn a_taken_port_is_said_and_nothing_stays(dir: &Path) {
    let _taken = std::net::UdpSocket::bind("0.0.0.0:51820").unwrap();
    let output = agent().args(["run", "--metrics-listen", "off", "--state-dir"]).arg(dir).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(said.lines().last().unwrap().contains("UDP port 51820 is taken"), "{said}");
    assert!(
        uapi("get=1\n\n").is_none()
            && !Path::new("/sys/class/net/cv0").exists()
            && !Path::new("/proc/sys/net/ipv4/conf/cv0").exists()
    );
}
