//! Client of the tunnel's control socket: the WireGuard cross-platform protocol with CVault's extension keys.
//!
//! One connection per operation, every wait bounded. Text that holds keys is wiped after use and never logged.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use cvault_dataplane::counters::Epoch;
use cvault_dataplane::journal::JournalAck;
use cvault_dataplane::policy::MAX_RULES;
use ipnet::IpNet;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use zeroize::Zeroizing;

use crate::desired::{Life, Limits, Peer, PresharedKey, PublicKey};
use crate::interface::Interface;
use crate::policies::{Policy, TenantId};

/// Peers in one `set`: about 700 KiB of text.
const BATCH_PEERS: usize = 2_000;
/// One `set` of a full batch takes milliseconds; a tunnel that needs longer than this is stuck.
const SET_TIMEOUT: Duration = Duration::from_secs(10);
/// A full `get` of 65,535 peers.
const GET_TIMEOUT: Duration = Duration::from_secs(20);
/// The device part alone is answered at once.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Tenants in one `set`, and prefixes of all of them: half of what the tunnel takes at once.
const BATCH_TENANTS: usize = 500;
const BATCH_TENANT_PREFIXES: usize = 2_048;
/// What answers there gives a machine's secrets to whoever asks: closed to every tenant, also inside a prefix it may reach.
const METADATA: [&str; 4] = ["169.254.0.0/16", "100.100.100.200/32", "192.0.0.192/32", "fd00:ec2::254/128"];

#[derive(Clone, Debug)]
pub(crate) struct Uapi {
    path: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum UapiError {
    #[error("the tunnel's control socket does not answer")]
    Connect(#[source] io::Error),
    #[error("the connection to the tunnel's control socket broke")]
    Io(#[from] io::Error),
    #[error("the tunnel took too long to answer")]
    Timeout,
    #[error("the tunnel refused with {}", io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    #[error("the tunnel answered with a line that cannot be read")]
    Malformed,
}

impl UapiError {
    pub(crate) fn is_address_in_use(&self) -> bool {
        matches!(self, Self::Errno(errno) if *errno == rustix::io::Errno::ADDRINUSE.raw_os_error())
    }
}

/// The device part of a `get`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceStatus {
    pub(crate) listen_port: u16,
    /// Which life of the counters the tunnel writes; none for a foreign implementation.
    pub(crate) epoch: Option<Epoch>,
    pub(crate) handshakes: u64,
    pub(crate) drops: BTreeMap<String, u64>,
    pub(crate) offloads: BTreeMap<String, u64>,
    /// Paths to which datagrams leave singly though the sockets take runs.
    pub(crate) udp_gso_refused_paths: u64,
    /// Datagrams that the kernel dropped before the tunnel received them.
    pub(crate) socket_drops: u64,
}

/// A peer as the engine has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EnginePeer {
    pub(crate) public_key: PublicKey,
    preshared_key: Option<PresharedKey>,
    allowed_ips: Vec<IpNet>,
    tenant: Option<[u8; 16]>,
    generation: u64,
    pub(crate) limits: Limits,
    /// Packets dropped, by reason.
    pub(crate) drops: BTreeMap<String, u64>,
}

impl EnginePeer {
    fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            preshared_key: None,
            allowed_ips: Vec::new(),
            tenant: None,
            generation: 0,
            limits: Limits::default(),
            drops: BTreeMap::new(),
        }
    }

    pub(crate) fn life(&self) -> Life {
        Life { public_key: self.public_key, generation: self.generation }
    }

    /// The addresses it may use, if they are whole ones.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.allowed_ips.iter().filter(|net| net.prefix_len() == net.max_prefix_len()).map(IpNet::addr)
    }

    /// Whether the engine already runs exactly this peer.
    pub(crate) fn is(&self, peer: &Peer) -> bool {
        let wanted: [IpNet; 2] = [IpNet::from(IpAddr::from(peer.ipv4)), IpNet::from(IpAddr::from(peer.ipv6))];
        self.public_key == peer.public_key
            && self.generation == peer.generation
            && self.tenant == Some(peer.tenant_id)
            && self.preshared_key == peer.preshared_key
            && self.allowed_ips.len() == wanted.len()
            && wanted.iter().all(|net| self.allowed_ips.contains(net))
    }
}

impl Uapi {
    pub(crate) fn of_interface(interface: &str) -> Self {
        Self { path: PathBuf::from(format!("/var/run/wireguard/{interface}.sock")) }
    }

    #[cfg(test)]
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    async fn connect(&self) -> Result<UnixStream, UapiError> {
        match tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(&self.path)).await {
            Ok(connected) => connected.map_err(UapiError::Connect),
            Err(_) => Err(UapiError::Timeout),
        }
    }

    /// The process behind the socket.
    pub(crate) async fn pid(&self) -> Result<i32, UapiError> {
        self.connect().await?.peer_cred()?.pid().ok_or(UapiError::Malformed)
    }

    pub(crate) async fn configure(&self, private_key: &[u8; 32], interface: &Interface) -> Result<(), UapiError> {
        self.set(&device_text(private_key, interface)).await
    }

    /// Peers of tenants reach none of these; the first 256 are told.
    pub(crate) async fn set_hosts(&self, addresses: &[IpAddr]) -> Result<(), UapiError> {
        self.set(&hosts_text(addresses)).await
    }

    /// In batches: after an error a part of them may be gone.
    pub(crate) async fn remove(&self, keys: &[PublicKey]) -> Result<(), UapiError> {
        for keys in keys.chunks(BATCH_PEERS) {
            self.set(&removal_text(keys)).await?;
        }
        Ok(())
    }

    /// In batches: after an error a part of them may be there.
    pub(crate) async fn add(&self, peers: &[Peer], limits: impl Fn(&Peer) -> Limits) -> Result<(), UapiError> {
        for batch in peers.chunks(BATCH_PEERS) {
            self.set(&peers_text(batch, &limits)).await?;
        }
        Ok(())
    }

    /// Peers that are not there stay away.
    pub(crate) async fn limit(&self, peers: &[(PublicKey, Limits)]) -> Result<(), UapiError> {
        for batch in peers.chunks(BATCH_PEERS) {
            let mut text = String::from("set=1\n");
            for (key, limits) in batch {
                writeln!(text, "public_key={}\nupdate_only=true", hex::encode(key.0)).expect(TO_STRING);
                limits_text(&mut text, limits);
            }
            text.push('\n');
            self.set(&text).await?;
        }
        Ok(())
    }

    /// What tenants may do; one without a policy has the defaults.
    pub(crate) async fn set_tenants(&self, tenants: &[(TenantId, Option<&Policy>)]) -> Result<(), UapiError> {
        let mut rest = tenants;
        while !rest.is_empty() {
            let (batch, others) = rest.split_at(tenant_batch(rest));
            self.set(&tenants_text(batch)).await?;
            rest = others;
        }
        Ok(())
    }

    /// Everything was added: lives of before that were not added again are closed.
    pub(crate) async fn end_replace(&self) -> Result<(), UapiError> {
        self.set("set=1\ncvault_end_replace=true\n\n").await
    }

    /// Lets the tunnel drop what was taken over of its journal.
    pub(crate) async fn acknowledge_journal(&self, taken: JournalAck) -> Result<(), UapiError> {
        self.set(&format!("set=1\ncvault_journal_ack={taken}\n\n")).await
    }

    async fn set(&self, text: &str) -> Result<(), UapiError> {
        let exchange = async {
            let mut stream = self.connect().await?;
            stream.write_all(text.as_bytes()).await?;
            let mut lines = BufReader::new(stream).lines();
            while let Some(line) = lines.next_line().await? {
                if let Some(errno) = line.strip_prefix("errno=") {
                    return match errno.parse().map_err(|_| UapiError::Malformed)? {
                        0 => Ok(()),
                        errno => Err(UapiError::Errno(i32::abs(errno))),
                    };
                }
            }
            Err(UapiError::Io(io::ErrorKind::UnexpectedEof.into()))
        };
        tokio::time::timeout(SET_TIMEOUT, exchange).await.unwrap_or(Err(UapiError::Timeout))
    }

    /// The device's own values; the connection is closed where those of tenants and peers begin, which may be very many.
    pub(crate) async fn device(&self) -> Result<DeviceStatus, UapiError> {
        let mut status = DeviceStatus::default();
        self.get(DEVICE_TIMEOUT, |key, value| {
            if matches!(key, "cvault_tenant_settings" | "public_key") {
                return Ok(Next::Stop);
            }
            device_line(&mut status, key, value).map(|()| Next::More)
        })
        .await?;
        Ok(status)
    }

    pub(crate) async fn peers(&self) -> Result<Vec<EnginePeer>, UapiError> {
        let mut peers: Vec<EnginePeer> = Vec::new();
        self.get(GET_TIMEOUT, |key, value| peer_line(&mut peers, key, value).map(|()| Next::More)).await?;
        Ok(peers)
    }

    async fn get(
        &self,
        timeout: Duration,
        mut take: impl FnMut(&str, &str) -> Result<Next, UapiError>,
    ) -> Result<(), UapiError> {
        let exchange = async {
            let mut stream = self.connect().await?;
            stream.write_all(b"get=1\n\n").await?;
            let mut reader = BufReader::with_capacity(1 << 16, stream);
            let mut line = Zeroizing::new(String::new());
            loop {
                line.clear();
                if reader.read_line(&mut line).await? == 0 {
                    return Err(UapiError::Io(io::ErrorKind::UnexpectedEof.into()));
                }
                let (key, value) = line.trim_end().split_once('=').ok_or(UapiError::Malformed)?;
                if key == "errno" {
                    return match value.parse().map_err(|_| UapiError::Malformed)? {
                        0 => Ok(()),
                        errno => Err(UapiError::Errno(i32::abs(errno))),
                    };
                }
                if take(key, value)? == Next::Stop {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or(Err(UapiError::Timeout))
    }
}

#[derive(PartialEq, Eq)]
enum Next {
    More,
    Stop,
}

const TO_STRING: &str = "writing to a string cannot fail";

fn device_text(private_key: &[u8; 32], interface: &Interface) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(1024));
    let key = Zeroizing::new(hex::encode(private_key));
    write!(text, "set=1\nprivate_key={}\nlisten_port={}\ncvault_replace_overlay=true\n", *key, interface.listen_port)
        .expect(TO_STRING);
    for prefix in &interface.overlay {
        writeln!(text, "cvault_overlay={prefix}").expect(TO_STRING);
    }
    text.push('\n');
    text
}

fn hosts_text(addresses: &[IpAddr]) -> String {
    let mut text = String::from("set=1\ncvault_replace_hosts=true\n");
    for address in addresses.iter().take(MAX_RULES) {
        writeln!(text, "cvault_host={address}").expect(TO_STRING);
    }
    text.push('\n');
    text
}

fn removal_text(keys: &[PublicKey]) -> String {
    let mut text = String::from("set=1\n");
    for key in keys {
        writeln!(text, "public_key={}\nremove=true", hex::encode(key.0)).expect(TO_STRING);
    }
    text.push('\n');
    text
}

/// How many of the first tenants go into one `set`; no policy alone is too large.
fn tenant_batch(tenants: &[(TenantId, Option<&Policy>)]) -> usize {
    let mut prefixes = 0;
    let fits = |(_, policy): &&(TenantId, Option<&Policy>)| {
        prefixes += policy.map_or(0, |policy| policy.allow_to.len() + METADATA.len());
        prefixes <= BATCH_TENANT_PREFIXES
    };
    tenants.iter().take(BATCH_TENANTS).take_while(fits).count().max(1)
}

fn tenants_text(tenants: &[(TenantId, Option<&Policy>)]) -> String {
    let mut text = String::from("set=1\n");
    for (tenant, policy) in tenants {
        writeln!(text, "cvault_tenant_settings={}", hex::encode(tenant)).expect(TO_STRING);
        let Some(policy) = policy else {
            text.push_str("cvault_tenant_remove=true\n");
            continue;
        };
        let wire = policy.wire();
        let smtp = if wire.allow_smtp { "allow" } else { "deny" };
        write!(
            text,
            "cvault_tenant_replace=true\ncvault_allow_intra={}\ncvault_tenant_rate_up={}\ncvault_tenant_rate_down={}\n\
             cvault_smtp={smtp}\n",
            wire.allow_intra, wire.rate_up, wire.rate_down
        )
        .expect(TO_STRING);
        for prefix in &policy.allow_to {
            writeln!(text, "cvault_allow_to={prefix}").expect(TO_STRING);
        }
        // without an opened prefix they are closed already
        for prefix in METADATA.iter().filter(|_| !policy.allow_to.is_empty()) {
            writeln!(text, "cvault_deny_to={prefix}").expect(TO_STRING);
        }
    }
    text.push('\n');
    text
}

fn limits_text(text: &mut String, limits: &Limits) {
    let Limits { rate_up, rate_down, lease, throttle } = limits;
    writeln!(text, "cvault_rate_up={rate_up}\ncvault_rate_down={rate_down}").expect(TO_STRING);
    match lease {
        Some(until) => writeln!(text, "cvault_lease={until}").expect(TO_STRING),
        None => text.push_str("cvault_lease=none\n"),
    }
    match throttle {
        0 => text.push_str("cvault_lease_then=block\n"),
        bits => writeln!(text, "cvault_lease_then=throttle:{bits}").expect(TO_STRING),
    }
}

fn peers_text(peers: &[Peer], limits: impl Fn(&Peer) -> Limits) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(512 * peers.len() + 16));
    text.push_str("set=1\n");
    for peer in peers {
        let preshared_key = peer.preshared_key.as_ref().map_or([0; 32], |key| *key.0);
        let preshared_key = Zeroizing::new(hex::encode(Zeroizing::new(preshared_key).as_slice()));
        write!(
            text,
            "public_key={}\npreshared_key={}\ncvault_tenant={}\ncvault_generation={}\nreplace_allowed_ips=true\n\
             allowed_ip={}/32\nallowed_ip={}/128\n",
            hex::encode(peer.public_key.0),
            *preshared_key,
            hex::encode(peer.tenant_id),
            peer.generation,
            peer.ipv4,
            peer.ipv6
        )
        .expect(TO_STRING);
        // most of 65,000 have none, and those of another life ended with it
        let limits = limits(peer);
        if limits != Limits::default() {
            limits_text(&mut text, &limits);
        }
    }
    text.push('\n');
    text
}

fn device_line(status: &mut DeviceStatus, key: &str, value: &str) -> Result<(), UapiError> {
    let number = || value.parse::<u64>().map_err(|_| UapiError::Malformed);
    if let Some(reason) = key.strip_prefix("cvault_drop_") {
        status.drops.insert(reason.to_owned(), number()?);
    } else if let Some(name) = key.strip_prefix("cvault_offload_") {
        status.offloads.insert(name.to_owned(), number()?);
    } else if key == "cvault_udp_gso_refused_paths" {
        status.udp_gso_refused_paths = number()?;
    } else if key == "cvault_socket_drops" {
        status.socket_drops = number()?;
    } else if key == "cvault_epoch" {
        status.epoch = Some(bytes(value)?);
    } else if key == "cvault_handshakes" {
        status.handshakes = number()?;
    } else if key == "listen_port" {
        status.listen_port = value.parse().map_err(|_| UapiError::Malformed)?;
    }
    Ok(())
}

fn peer_line(peers: &mut Vec<EnginePeer>, key: &str, value: &str) -> Result<(), UapiError> {
    if key == "public_key" {
        peers.push(EnginePeer::new(PublicKey(bytes(value)?)));
        return Ok(());
    }
    let Some(peer) = peers.last_mut() else { return Ok(()) };
    match key {
        "preshared_key" => {
            let secret = Zeroizing::new(bytes::<32>(value)?);
            peer.preshared_key = (*secret != [0; 32]).then_some(PresharedKey(secret));
        }
        "allowed_ip" => peer.allowed_ips.push(value.parse().map_err(|_| UapiError::Malformed)?),
        "cvault_tenant" => peer.tenant = Some(bytes(value)?),
        "cvault_generation" => peer.generation = number(value)?,
        "cvault_rate_up" => peer.limits.rate_up = number(value)?,
        "cvault_rate_down" => peer.limits.rate_down = number(value)?,
        "cvault_lease" => peer.limits.lease = Some(number(value)?),
        "cvault_lease_then" => peer.limits.throttle = value.strip_prefix("throttle:").map_or(Ok(0), number)?,
        _ => {
            if let Some(reason) = key.strip_prefix("cvault_peer_drop_") {
                peer.drops.insert(reason.to_owned(), number(value)?);
            }
        }
    }
    Ok(())
}

fn number(value: &str) -> Result<u64, UapiError> {
    value.parse().map_err(|_| UapiError::Malformed)
}

fn bytes<const N: usize>(text: &str) -> Result<[u8; N], UapiError> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes).map_err(|_| UapiError::Malformed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    fn peer() -> Peer {
        Peer {
            public_key: PublicKey([1; 32]),
            device_id: [2; 16],
            tenant_id: [3; 16],
            preshared_key: None,
            ipv4: [10, 8, 0, 2].into(),
            ipv6: "fd00:cafe::2".parse().unwrap(),
            generation: 7,
        }
    }

    #[test]
    fn the_text_of_a_peer_is_literally_this() {
        let expected = format!(
            "set=1\npublic_key={}\npreshared_key={}\ncvault_tenant={}\ncvault_generation=7\nreplace_allowed_ips=true\n\
             allowed_ip=10.8.0.2/32\nallowed_ip=fd00:cafe::2/128\n\n",
            "01".repeat(32),
            "00".repeat(32),
            "03".repeat(16)
        );
        assert_eq!(*peers_text(&[peer()], |_| Limits::default()), expected);
        let limits = Limits { rate_up: 1_000, rate_down: 0, lease: Some(5), throttle: 64_000 };
        let limited = expected.trim_end().to_owned()
            + "\ncvault_rate_up=1000\ncvault_rate_down=0\ncvault_lease=5\ncvault_lease_then=throttle:64000\n\n";
        assert_eq!(*peers_text(&[peer()], |_| limits), limited);
        assert_eq!(
            removal_text(&[PublicKey([1; 32])]),
            format!("set=1\npublic_key={}\nremove=true\n\n", "01".repeat(32))
        );
    }

    #[test]
    fn the_text_of_a_tenant_is_literally_this() {
        let mut policies = crate::policies::Policies::default();
        let wire = cvault_node_protocol::v1::TenantPolicy {
            tenant_id: vec![3; 16].into(),
            rate_up: 1_000,
            allow_intra: true,
            allow_to: vec!["10.20.0.0/16".to_owned()],
            ..Default::default()
        };
        policies.restore(vec![wire]).unwrap();
        let expected = format!(
            "set=1\ncvault_tenant_settings={}\ncvault_tenant_replace=true\ncvault_allow_intra=true\n\
             cvault_tenant_rate_up=1000\ncvault_tenant_rate_down=0\ncvault_smtp=deny\ncvault_allow_to=10.20.0.0/16\n\
             cvault_deny_to=169.254.0.0/16\ncvault_deny_to=100.100.100.200/32\ncvault_deny_to=192.0.0.192/32\n\
             cvault_deny_to=fd00:ec2::254/128\ncvault_tenant_settings={}\ncvault_tenant_remove=true\n\n",
            "03".repeat(16),
            "04".repeat(16)
        );
        assert_eq!(tenants_text(&[([3; 16], policies.get(&[3; 16])), ([4; 16], None)]), expected);
    }

    #[test]
    fn tenants_go_in_batches_that_the_tunnel_takes() {
        let mut policies = crate::policies::Policies::default();
        let allow_to: Vec<_> = (0..=255).map(|n| format!("10.20.{n}.0/24")).collect();
        let wire =
            cvault_node_protocol::v1::TenantPolicy { tenant_id: vec![3; 16].into(), allow_to, ..Default::default() };
        policies.restore(vec![wire]).unwrap();
        let wide = policies.get(&[3; 16]);
        assert_eq!(tenant_batch(&[([3; 16], wide); 100]), 7, "7 of 260 prefixes each");
        assert_eq!(tenant_batch(&[([3; 16], None); 600]), BATCH_TENANTS);
        assert_eq!(tenant_batch(&[([3; 16], None), ([3; 16], wide)]), 2);
    }

    #[test]
    fn the_text_of_the_servers_addresses_is_literally_this() {
        let addresses = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let expected = "set=1\ncvault_replace_hosts=true\ncvault_host=192.0.2.1\ncvault_host=2001:db8::1\n\n";
        assert_eq!(hosts_text(&addresses), expected);
        let many = vec![addresses[0]; 300];
        assert_eq!(hosts_text(&many).matches("cvault_host=").count(), 256, "more would be refused as a whole");
    }

    /// A tunnel that answers one connection with fixed text.
    fn answering(text: &'static str) -> (tempfile::TempDir, Uapi, tokio::task::JoinHandle<String>) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("wg.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = String::new();
            while !asked.ends_with("\n\n") {
                let mut buffer = [0; 4096];
                let n = stream.read(&mut buffer).await.unwrap();
                asked.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
            }
            stream.write_all(text.as_bytes()).await.unwrap();
            asked
        });
        (root, Uapi::at(path), server)
    }

    #[tokio::test]
    async fn a_get_is_read_into_peers_that_compare_with_the_desired_ones() {
        let text = "private_key=00\nlisten_port=51820\ncvault_epoch=09090909090909090909090909090909\ncvault_handshakes=3\ncvault_drop_spoofed=9\n\
            public_key=0101010101010101010101010101010101010101010101010101010101010101\n\
            preshared_key=0000000000000000000000000000000000000000000000000000000000000000\n\
            allowed_ip=10.8.0.2/32\nallowed_ip=fd00:cafe::2/128\ntx_bytes=1\ncvault_generation=7\n\
            cvault_tenant=03030303030303030303030303030303\nprotocol_version=1\nerrno=0\n\n";
        let (_root, uapi, server) = answering(text);
        let peers = uapi.peers().await.unwrap();
        assert_eq!(server.await.unwrap(), "get=1\n\n");
        assert!(peers.len() == 1 && peers[0].is(&peer()));
        assert!(!peers[0].is(&Peer { generation: 8, ..peer() }));
        let (_root, uapi, _server) = answering(text);
        let device = uapi.device().await.unwrap();
        assert_eq!(device.epoch, Some([9; 16]));
        assert_eq!((device.listen_port, device.handshakes, device.drops["spoofed"]), (51820, 3, 9));
    }

    #[tokio::test]
    async fn a_refused_set_tells_its_errno() {
        let (_root, uapi, _server) = answering("errno=-98\n\n");
        let taken = JournalAck { len: 128, last_crc: 0xbeef };
        let error = uapi.acknowledge_journal(taken).await.unwrap_err();
        assert!(error.is_address_in_use(), "{error}");
        let (_root, uapi, server) = answering("errno=0\n\n");
        uapi.acknowledge_journal(taken).await.unwrap();
        assert_eq!(server.await.unwrap(), "set=1\ncvault_journal_ack=128:0000beef\n\n");
        let (_root, uapi, server) = answering("errno=0\n\n");
        uapi.end_replace().await.unwrap();
        assert_eq!(server.await.unwrap(), "set=1\ncvault_end_replace=true\n\n");
    }
}
