//! `run` for real, in namespaces: a client far away, an "internet" behind the server, and every process killed once.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cvault_node_protocol::tls::Identity;
use cvault_node_protocol::v1;

use crate::gateway::{Gateway, Serving};
use crate::{agent, eventually};

const INSIDE: &str = "CVAULT_TEST_NAMESPACE";
const SECONDS: Duration = Duration::from_secs(10);
/// 192.0.2.0/24 lies between client and server, 203.0.113.0/24 and 2001:db8:9::/64 between server and internet.
const NETWORK: &str = "
    set -e
    mount -t tmpfs tmpfs /run
    ip link set lo up
    ip netns add client && ip netns add internet
    ip link add to-client type veth peer name eth0 netns client
    ip link add to-net type veth peer name eth0 netns internet
    ip addr add 192.0.2.1/24 dev to-client && ip link set to-client up
    ip addr add 203.0.113.254/24 dev to-net && ip addr add 2001:db8:9::fe/64 dev to-net nodad && ip link set to-net up
    ip -n client link set lo up && ip -n client addr add 192.0.2.2/24 dev eth0 && ip -n client link set eth0 up
    ip -n internet addr add 203.0.113.1/24 dev eth0 && ip -n internet addr add 2001:db8:9::1/64 dev eth0 nodad
    ip -n internet link set lo up && ip -n internet link set eth0 up
";
const CLIENT_KEY: [u8; 32] = [0x77; 32];

#[tokio::test(flavor = "multi_thread")]
async fn a_server_serves_meters_and_survives() {
    if std::env::var_os(INSIDE).is_some() {
        return story().await;
    }
    let itself = std::env::current_exe().unwrap();
    let inside = "eval \"$NETWORK\"; exec \"$0\" --exact serving::a_server_serves_meters_and_survives --nocapture";
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--", "sh", "-c", inside])
        .arg(itself)
        .env(INSIDE, "1")
        .env("NETWORK", NETWORK)
        .status();
    let hint = "this test needs root (unshare), /dev/net/tun, and the packages iproute2, iputils-ping, nftables";
    assert!(status.is_ok_and(|status| status.success()), "{hint}");
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

    let server_key: [u8; 32] = gateway.state().enrolled.as_ref().unwrap().1.wireguard_public_key.as_ref().try_into().unwrap();
    let mut activations = Vec::new();
    for n in 0..50 {
        let began = Instant::now();
        gateway.change(&[], vec![peer([n + 100; 32], n + 100)]).await;
        eventually("a change is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;
        activations.push(began.elapsed());
    }
    activations.sort();
    println!("activation p50 {:?} max {:?}", activations[25], activations[49]);
    gateway.change(&[], vec![peer(client_public(), 2)]).await;
    eventually("the client is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;

    let _client = start_client(&server_key);
    assert!(ping("203.0.113.1", 3) && ping("2001:db8:9::1", 3), "both families go through the tunnel");
    assert!(!ping("10.8.0.102", 1) && !ping("203.0.113.254", 1), "peers and the host are out of reach");
    // Three echoes of each family are 3 × (84 + 104) each way. The echo to the server's own address is a packet that the
    // engine carried (84 more) and the firewall dropped; the one to another peer was not carried.
    let billed = |rx: u64, tx: u64| {
        let state = gateway.state();
        state.ledger.iter().any(|((device, _), usage)| device == &[2; 16] && (usage.rx_bytes, usage.tx_bytes) == (rx, tx))
    };
    eventually("the exact bytes are billed", SECONDS, || billed(648, 564)).await;

    // A wrong change is refused with its reason, and the state goes on.
    let mut wrong = peer([9; 32], 9);
    wrong.ipv4 = u32::from_be_bytes([192, 168, 0, 9]);
    gateway.change(&[], vec![wrong]).await;
    let refused = || gateway.state().reports.iter().any(|report| report.nacks.iter().any(|nack| nack.reason.contains("overlay")));
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
        now != pid && uapi("get=1\n\n").is_some_and(|text| text.contains(&hex::encode(client_public())))
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
    eventually("the server is back", SECONDS, || gateway.state().watches.last().is_some_and(|w| w.have.is_some()) && gateway.state().is_acknowledged()).await;
    let before = engine_count();
    eventually("all bytes are billed", SECONDS, || billed(before.0, before.1)).await;

    // Removal: traffic stops, the final counters are those that were billed.
    gateway.change(&[&client_public()], vec![]).await;
    eventually("the removal is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;
    assert!(!ping("203.0.113.1", 1), "a removed peer has no tunnel");
    assert!(billed(before.0, before.1));
    eventually("the journal is taken over", SECONDS, || std::fs::metadata(dir.join("closed.journal")).unwrap().len() == 0).await;

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
    assert!(uapi("get=1\n\n").is_none() && !Path::new("/sys/class/net/cv0").exists() && !Path::new("/proc/sys/net/ipv4/conf/cv0").exists());
}

/// What the engine counted for the client: inner bytes from and to it.
fn engine_count() -> (u64, u64) {
    let text = uapi("get=1\n\n").unwrap();
    let key = format!("public_key={}", hex::encode(client_public()));
    let part = text.split(&key).nth(1).unwrap().split("public_key=").next().unwrap();
    let value = |name: &str| part.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap();
    (value("cvault_rx_inner="), value("cvault_tx_inner="))
}

fn client_public() -> [u8; 32] {
    x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(CLIENT_KEY)).to_bytes()
}

fn peer(public_key: [u8; 32], n: u8) -> v1::Peer {
    let mut ipv6 = [0; 16];
    ipv6[..4].copy_from_slice(&[0xfd, 0, 0xca, 0xfe]);
    ipv6[15] = n;
    v1::Peer {
        device_id: vec![n; 16].into(),
        tenant_id: vec![1; 16].into(),
        public_key: public_key.to_vec().into(),
        ipv4: u32::from_be_bytes([10, 8, 0, n]),
        ipv6: ipv6.to_vec().into(),
        ..v1::Peer::default()
    }
}

async fn enrol(dir: &Path, serving: &Serving) {
    let token = serving.gateway.state().token.expose().to_string();
    let mut command = agent();
    command.args(["enroll", "--control-plane", "127.0.0.1:8443", "--token", &token, "--state-dir"]).arg(dir);
    assert!(tokio::task::spawn_blocking(move || command.status().unwrap()).await.unwrap().success());
}

fn start_run(dir: &Path) -> Child {
    agent().args(["run", "--metrics-listen", "off", "--state-dir"]).arg(dir).env("CVAULT_LOG", "info").spawn().unwrap()
}

/// SIGTERM, and its promise: the end within five seconds and status 0.
fn stop(mut run: Child) {
    let began = Instant::now();
    kill("-TERM", i32::try_from(run.id()).unwrap());
    assert!(run.wait().unwrap().success());
    assert!(began.elapsed() < Duration::from_secs(6));
}

/// The client is our own tunnel, standing alone, as wg-quick would use it.
fn start_client(server_key: &[u8; 32]) -> Killed {
    let child = Command::new("ip")
        .args(["netns", "exec", "client", env!("CARGO_BIN_EXE_cvault-node-agent"), "tunnel", "-f", "wgc"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let child = Killed(child);
    let began = Instant::now();
    let configuration = format!(
        "set=1\nprivate_key={}\npublic_key={}\nendpoint=192.0.2.1:51820\nallowed_ip=0.0.0.0/0\nallowed_ip=::/0\n\n",
        hex::encode(CLIENT_KEY),
        hex::encode(server_key)
    );
    while ask("wgc", &configuration).is_none() {
        assert!(began.elapsed() < SECONDS, "the client's tunnel did not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    sh("ip -n client addr add 10.8.0.2/32 dev wgc && ip -n client addr add fd00:cafe::2/128 dev wgc nodad \
        && ip -n client link set wgc mtu 1420 up && ip -n client route add default dev wgc \
        && ip -n client -6 route add default dev wgc");
    child
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Whether `count` echoes come back.
fn ping(target: &str, count: u32) -> bool {
    let count = count.to_string();
    Command::new("ip")
        .args(["netns", "exec", "client", "ping", "-n", "-q", "-i", "0.1", "-W", "1", "-c", &count])
        .arg(target)
        .stdout(Stdio::null())
        .status()
        .unwrap()
        .success()
}

fn tunnel_pid(dir: &Path) -> i32 {
    std::fs::read_to_string(dir.join("tunnel.pid")).unwrap().trim().parse().unwrap()
}

fn kill(signal: &str, pid: i32) {
    sh(&format!("kill {signal} {pid}"));
}

fn sh(script: &str) {
    assert!(Command::new("sh").args(["-c", script]).status().unwrap().success(), "{script}");
}

fn uapi(text: &str) -> Option<String> {
    ask("cv0", text)
}

fn ask(interface: &str, text: &str) -> Option<String> {
    let mut stream = UnixStream::connect(format!("/var/run/wireguard/{interface}.sock")).ok()?;
    stream.set_read_timeout(Some(SECONDS)).unwrap();
    stream.write_all(text.as_bytes()).ok()?;
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains("errno=0").then_some(answer)
}
