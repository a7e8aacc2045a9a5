//! What reaches a peer from outside: only what it began itself, and nothing of an earlier owner of its address.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use cvault_node_protocol::tls::Identity;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto};

use crate::eventually;
use crate::gateway::{Gateway, Serving};
use crate::namespaces::{
    CLIENT_KEY, Killed, SECONDS, ask, engine_count, enrol, in_namespaces, inside, peer, ping, public, sh, start_client,
    start_run, uapi,
};

const NEXT_KEY: [u8; 32] = [0x78; 32];

/// A server with a connected client, 10.8.0.2.
struct World {
    gateway: Gateway,
    _serving: Serving,
    _run: Killed,
    _client: Killed,
    _root: tempfile::TempDir,
}

async fn world() -> World {
    let root = tempfile::tempdir().unwrap();
    let dir: PathBuf = root.path().join("state");
    let identity = Identity::generate().unwrap();
    let gateway = Gateway::new(identity.pin());
    let serving = gateway.serve(&identity, "127.0.0.1:8443").await;
    enrol(&dir, &serving).await;
    let run = Killed(start_run(&dir));
    gateway.change(&[], vec![peer(public(CLIENT_KEY), 2)]).await;
    acknowledged(&gateway).await;
    let server_key = gateway.state().enrolled.as_ref().unwrap().1.wireguard_public_key.as_ref().try_into().unwrap();
    let client = start_client(&server_key);
    assert!(ping("203.0.113.1", 1));
    World { gateway, _serving: serving, _run: run, _client: client, _root: root }
}

async fn acknowledged(gateway: &Gateway) {
    eventually("the state is acknowledged", SECONDS, || gateway.state().is_acknowledged()).await;
}

/// UDP between the client and somebody outside, begun by the client.
struct Stream {
    client: UdpSocket,
    internet: UdpSocket,
    server: &'static str,
    mapped: SocketAddr,
}

impl Stream {
    fn begin(client: &'static str, server: &'static str) -> Self {
        let (client, internet) = (socket("client", client), socket("internet", server));
        let mut stream = Self { mapped: client.local_addr().unwrap(), client, internet, server };
        stream.ask();
        stream
    }

    fn ask(&mut self) {
        self.client.send_to(b"ask", self.server).unwrap();
        self.mapped = self.internet.recv_from(&mut [0; 64]).unwrap().1;
    }

    fn answer(&self, words: &[u8]) {
        self.internet.send_to(words, self.mapped).unwrap();
    }

    fn heard(&self) -> Option<Vec<u8>> {
        let mut buffer = [0; 64];
        let bytes = self.client.recv(&mut buffer).ok()?;
        Some(buffer[..bytes].to_vec())
    }
}

fn socket(namespace: &str, address: &'static str) -> UdpSocket {
    let socket = inside(namespace, move || UdpSocket::bind(address).unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_an_earlier_owner_does_not_reach_the_next_owner_of_its_address() {
    in_namespaces("isolation::a_stream_of_an_earlier_owner_does_not_reach_the_next_owner_of_its_address", async || {
        let world = world().await;
        let mut streams = [
            Stream::begin("10.8.0.2:5000", "203.0.113.1:6000"),
            Stream::begin("[fd00:cafe::2]:5000", "[2001:db8:9::1]:6000"),
        ];
        for stream in &streams {
            stream.answer(b"stream");
            assert_eq!(stream.heard(), Some(b"stream".to_vec()));
        }
        world.gateway.change(&[&public(CLIENT_KEY)], vec![]).await;
        acknowledged(&world.gateway).await;
        world.gateway.change(&[], vec![peer(public(NEXT_KEY), 2)]).await;
        acknowledged(&world.gateway).await;
        ask("wgc", &format!("set=1\nprivate_key={}\n\n", hex::encode(NEXT_KEY))).unwrap();
        eventually("the next owner's tunnel works", SECONDS, || ping("203.0.113.1", 1)).await;

        for stream in &mut streams {
            for _ in 0..10 {
                stream.answer(b"old stream");
            }
            assert!(ping("203.0.113.1", 1) && ping("2001:db8:9::1", 1), "answers that were sent after it have arrived");
            stream.client.set_nonblocking(true).unwrap();
            assert_eq!(stream.heard(), None, "{}", stream.server);
            stream.client.set_nonblocking(false).unwrap();
            stream.ask();
            stream.answer(b"own");
            assert_eq!(stream.heard(), Some(b"own".to_vec()), "its own stream works");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_of_no_connection_neither_reach_a_peer_nor_are_billed() {
    in_namespaces("isolation::segments_of_no_connection_neither_reach_a_peer_nor_are_billed", async || {
        let _world = world().await;
        sh("ip -n internet route add 10.8.0.0/16 via 203.0.113.254");
        let raw = |namespace: &str| {
            inside(namespace, || rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::TCP)).unwrap())
        };
        let (client, internet) = (raw("client"), raw("internet"));
        let before = engine_count();
        // FIN, RST, SYN-ACK, ACK, and no flag at all.
        for flags in [0x01, 0x04, 0x12, 0x10, 0x00] {
            let segment = segment(flags);
            let to: SocketAddr = "10.8.0.2:0".parse().unwrap();
            rustix::net::sendto(&internet, &segment, SendFlags::empty(), &to).unwrap();
        }
        assert!(ping("203.0.113.1", 1), "an answer that was sent after them has arrived");
        let after = engine_count();
        assert_eq!((after.0 - before.0, after.1 - before.1), (84, 84), "only the echo and its answer");
        let heard = rustix::net::recv(&client, &mut [0; 128], RecvFlags::DONTWAIT);
        assert_eq!(heard.map(|(bytes, _)| bytes), Err(rustix::io::Errno::AGAIN));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_keeps_peers_from_the_servers_own_addresses() {
    in_namespaces("isolation::the_engine_keeps_peers_from_the_servers_own_addresses", async || {
        let _world = world().await;
        for own in ["203.0.113.254", "2001:db8:9::fe", "192.0.2.1"] {
            assert!(uapi("get=1\n\n").unwrap().contains(&format!("\ncvault_host={own}\n")), "{own}");
        }
        assert!(!uapi("get=1\n\n").unwrap().contains("cvault_host=10.8.0.1"), "the tunnel's own is in the overlay");
        assert!(!ping("203.0.113.254", 1) && !ping("2001:db8:9::fe", 1));
        // The firewall would keep the client from them too: the engine was first.
        let drops = uapi("get=1\n\n").unwrap();
        assert!(drops.contains("\ncvault_peer_drop_destination="), "{drops}");
        assert!(ping("203.0.113.1", 1) && ping("2001:db8:9::1", 1));
    })
    .await;
}

/// A TCP header from 203.0.113.1:443 to 10.8.0.2:5000 with a valid checksum.
fn segment(flags: u8) -> [u8; 20] {
    let mut header = [0; 20];
    header[..2].copy_from_slice(&443_u16.to_be_bytes());
    header[2..4].copy_from_slice(&5000_u16.to_be_bytes());
    header[12] = 5 << 4;
    header[13] = flags;
    let pseudo = [203, 0, 113, 1, 10, 8, 0, 2, 0, 6, 0, 20];
    let words = pseudo.chunks(2).chain(header.chunks(2)).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum = words.sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[16..18].copy_from_slice(&(!u16::try_from(folded).unwrap()).to_be_bytes());
    header
}
