//! Private namespaces for a test: a client, the server, an "internet"; and what a test does with the programs in them.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cvault_node_protocol::v1;

use crate::agent;
use crate::gateway::Serving;

const INSIDE: &str = "CVAULT_TEST_NAMESPACE";
pub(crate) const SECONDS: Duration = Duration::from_secs(10);
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
pub(crate) const CLIENT_KEY: [u8; 32] = [0x77; 32];

/// Runs the named test again in namespaces of its own, where it tells its story. All its processes end with it.
pub(crate) async fn in_namespaces(test: &str, story: impl AsyncFnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return story().await;
    }
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--", "sh", "-c"])
        .arg("eval \"$NETWORK\"; exec \"$0\" --exact \"$1\" --nocapture")
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(INSIDE, "1")
        .env("NETWORK", NETWORK)
        .status();
    let hint = "this test needs root (unshare), /dev/net/tun, and the packages iproute2, iputils-ping, nftables";
    assert!(status.is_ok_and(|status| status.success()), "{hint}");
}

/// Does something as a program in the named namespace would; sockets made there stay there.
pub(crate) fn inside<T: Send + 'static>(namespace: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let file = std::fs::File::open(Path::new("/run/netns").join(namespace)).unwrap();
    let thread = std::thread::spawn(move || {
        let network = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), network).unwrap();
        work()
    });
    thread.join().unwrap()
}

/// What the engine counted for the client: inner bytes from and to it.
pub(crate) fn engine_count() -> (u64, u64) {
    let text = uapi("get=1\n\n").unwrap();
    let key = format!("public_key={}", hex::encode(public(CLIENT_KEY)));
    let part = text.split(&key).nth(1).unwrap().split("public_key=").next().unwrap();
    let value = |name: &str| part.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap();
    (value("cvault_rx_inner="), value("cvault_tx_inner="))
}

pub(crate) fn public(private_key: [u8; 32]) -> [u8; 32] {
    x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(private_key)).to_bytes()
}

pub(crate) fn peer(public_key: [u8; 32], n: u8) -> v1::Peer {
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

pub(crate) async fn enrol(dir: &Path, serving: &Serving) {
    let token = serving.gateway.state().token.expose().to_string();
    let mut command = agent();
    command.args(["enroll", "--control-plane", "127.0.0.1:8443", "--token", &token, "--state-dir"]).arg(dir);
    assert!(tokio::task::spawn_blocking(move || command.status().unwrap()).await.unwrap().success());
}

pub(crate) fn start_run(dir: &Path) -> Child {
    agent().args(["run", "--metrics-listen", "off", "--state-dir"]).arg(dir).env("CVAULT_LOG", "info").spawn().unwrap()
}

/// SIGTERM, and its promise: the end within five seconds and status 0.
pub(crate) fn stop(mut run: Child) {
    let began = Instant::now();
    kill("-TERM", i32::try_from(run.id()).unwrap());
    assert!(run.wait().unwrap().success());
    assert!(began.elapsed() < Duration::from_secs(6));
}

/// The client is our own tunnel, standing alone, as wg-quick would use it.
pub(crate) fn start_client(server_key: &[u8; 32]) -> Killed {
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

pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Whether `count` echoes come back.
pub(crate) fn ping(target: &str, count: u32) -> bool {
    let count = count.to_string();
    Command::new("ip")
        .args(["netns", "exec", "client", "ping", "-n", "-q", "-i", "0.1", "-W", "1", "-c", &count])
        .arg(target)
        .stdout(Stdio::null())
        .status()
        .unwrap()
        .success()
}

pub(crate) fn tunnel_pid(dir: &Path) -> i32 {
    std::fs::read_to_string(dir.join("tunnel.pid")).unwrap().trim().parse().unwrap()
}

pub(crate) fn kill(signal: &str, pid: i32) {
    sh(&format!("kill {signal} {pid}"));
}

pub(crate) fn sh(script: &str) {
    assert!(Command::new("sh").args(["-c", script]).status().unwrap().success(), "{script}");
}

pub(crate) fn uapi(text: &str) -> Option<String> {
    ask("cv0", text)
}

pub(crate) fn ask(interface: &str, text: &str) -> Option<String> {
    let mut stream = UnixStream::connect(format!("/var/run/wireguard/{interface}.sock")).ok()?;
    stream.set_read_timeout(Some(SECONDS)).unwrap();
    stream.write_all(text.as_bytes()).ok()?;
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains("errno=0").then_some(answer)
}
