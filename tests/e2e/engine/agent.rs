//! The tunnel with peers of tenants, as the agent configures it, and in the place of wireguard-go.

use anyhow::{Context, Result, bail};
use cvault_tests::lab::{
    Addresses, DNS_V4, HTTP_V4, Lab, Machine, Network, Process, Signal, binary, eventually, quiescent,
};
use cvault_tests::platform::{Client, Counters, dropped, uapi};
use std::time::Duration;

const TENANT: &str = "0190f5a0000070008000000000000001";
const OTHER_TENANT: &str = "0190f5a0000070008000000000000002";

struct Keys {
    private: String,
    public: String,
    public_hex: String,
}

fn keys(machine: &Machine) -> Result<Keys> {
    let text = machine.sh(
        "k=$(wg genkey); echo $k; echo $k | wg pubkey; echo $k | wg pubkey | base64 -d | od -An -v -tx1 | tr -d ' \\n'",
    )?;
    let mut lines = text.lines().map(str::to_owned);
    let mut next = || lines.next().context("wg genkey");
    Ok(Keys { private: next()?, public: next()?, public_hex: next()? })
}

/// A server machine that forwards and masquerades, as the agent would set it up.
fn server(lab: &Lab) -> Result<(Machine, Addresses)> {
    let (machine, addresses) = lab.machine("server", Network::Servers, 10)?;
    machine.sh(
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
         nft 'add table inet nat; add chain inet nat post { type nat hook postrouting priority 100; }; add rule inet nat post oifname up0 masquerade'",
    )?;
    Ok((machine, addresses))
}

fn client_config(own: &Keys, server: &Keys, host: u8, endpoint: &str) -> String {
    format!(
        "[Interface]\nPrivateKey = {}\nAddress = 10.8.0.{host}/32, fd00:cafe::{host}/128\nDNS = {DNS_V4}\nMTU = 1420\n\n[Peer]\nPublicKey = {}\n\
         AllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = {endpoint}:51820\nPersistentKeepalive = 25\n",
        own.private, server.public
    )
}

#[test]
fn wg_quick_runs_the_engine_in_place_of_wireguard_go() {
    let lab = Lab::build().unwrap();
    let (server, at) = server(&lab).unwrap();
    let client = Client::boot(&lab, 1).unwrap();
    let (server_keys, client_keys) = (keys(&server).unwrap(), keys(&server).unwrap());
    let conf = server.dir().join("cv0.conf").display().to_string();
    std::fs::write(
        &conf,
        format!(
            "[Interface]\nPrivateKey = {}\nListenPort = 51820\nAddress = 10.8.0.1/16, fd00:cafe::1/64\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.8.0.2/32, fd00:cafe::2/128\n",
            server_keys.private, client_keys.public
        ),
    )
    .unwrap();
    let program = binary("cvault-node-agent").unwrap();
    server
        .sh(&format!(
            "printf '#!/bin/sh\\nexec {program} tunnel \"$@\"\\n' > /run/lab/bin/engine; chmod 755 /run/lab/bin/engine; chmod 600 {conf}
             WG_QUICK_USERSPACE_IMPLEMENTATION=engine wg-quick up {conf} 2>&1"
        ))
        .unwrap();

    let answer = uapi(&server, "cv0", "get=1\n\n").unwrap();
    assert!(answer.contains("\ncvault_epoch="), "the server's tunnel is not the engine: {answer}");

    let up = client.up(&client_config(&client_keys, &server_keys, 2, &at.v4)).unwrap();
    assert!(up.handshake < Duration::from_secs(2), "{up:?}");
    assert_eq!(client.address_v4().unwrap(), at.v4);
    assert_eq!(client.address_v6().unwrap(), at.v6);
    client.download(20_000_000).unwrap();
    client.upload(20_000_000).unwrap();
    let shown = server.run("wg", ["show", "cv0", "transfer"]).unwrap();
    assert!(shown.starts_with(&client_keys.public), "{shown}");
    server.sh(&format!("wg-quick down {conf} 2>&1")).unwrap();
    eventually("the interface is gone", 5, || {
        if server.sh("ip link show cv0").is_err() { Ok(()) } else { bail!("still there") }
    })
    .unwrap();
}

/// The tunnel as the agent starts it, with peers of tenants.
struct Engine {
    process: Process,
    state_dir: String,
}

impl Engine {
    fn start(server: &Machine) -> Result<Self> {
        let state_dir = server.dir().join("state").display().to_string();
        std::fs::create_dir_all(&state_dir)?;
        let process = server.spawn(
            "tunnel",
            &binary("cvault-node-agent")?,
            ["tunnel", "--foreground", "--persist", "--state-dir", &state_dir, "cv0"],
            [("CVAULT_LOG", "trace"), ("CVAULT_LOG_FORMAT", "text")],
        )?;
        eventually("the engine answers", 10, || {
            process.check_running()?;
            uapi(server, "cv0", "get=1\n\n")
        })?;
        Ok(Self { process, state_dir })
    }

    fn configure(&self, server: &Machine, own: &Keys, peers: &[(&Keys, u8, &str)]) -> Result<()> {
        let private_hex = server.sh(&format!("echo {} | base64 -d | od -An -v -tx1 | tr -d ' \\n'", own.private))?;
        let mut request = format!(
            "set=1\nprivate_key={private_hex}\nlisten_port=51820\ncvault_replace_overlay=true\ncvault_overlay=10.8.0.0/16\ncvault_overlay=fd00:cafe::/64\n"
        );
        for (keys, host, tenant) in peers {
            request.push_str(&format!(
                "public_key={}\nreplace_allowed_ips=true\nallowed_ip=10.8.0.{host}/32\nallowed_ip=fd00:cafe::{host}/128\ncvault_tenant={tenant}\ncvault_generation=7\n",
                keys.public_hex
            ));
        }
        request.push('\n');
        let answer = uapi(server, "cv0", &request)?;
        if answer.trim() != "errno=0" {
            bail!("the engine refused: {answer}");
        }
        server.sh("ip addr show dev cv0 | grep -q 10.8.0.1 || ip addr add 10.8.0.1/16 dev cv0; ip -6 addr replace fd00:cafe::1/64 dev cv0 nodad; ip link set cv0 mtu 1420 up")?;
        Ok(())
    }

    /// `cvault_<name>` of one peer.
    fn figure(&self, server: &Machine, keys: &Keys, name: &str) -> Result<u64> {
        let text = uapi(server, "cv0", "get=1\n\n")?;
        let peer = text.split("public_key=").find(|part| part.starts_with(&keys.public_hex)).context("no such peer")?;
        let line = peer
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .with_context(|| format!("no {name}"))?;
        Ok(line.parse()?)
    }
}

#[test]
fn the_engine_counts_what_the_kernels_count_and_goes_on_counting_after_being_killed() {
    let lab = Lab::build().unwrap();
    let (server, at) = server(&lab).unwrap();
    let client = Client::boot(&lab, 1).unwrap();
    let (server_keys, client_keys) = (keys(&server).unwrap(), keys(&server).unwrap());
    let engine = Engine::start(&server).unwrap();
    engine.configure(&server, &server_keys, &[(&client_keys, 2, TENANT)]).unwrap();
    client.up(&client_config(&client_keys, &server_keys, 2, &at.v4)).unwrap();
    client.echo(HTTP_V4, 500, 1000).unwrap();
    client.silence().unwrap();

    let rx = engine.figure(&server, &client_keys, "cvault_rx_inner").unwrap();
    let tx = engine.figure(&server, &client_keys, "cvault_tx_inner").unwrap();
    let (theirs, ours) = (Counters::read(&server, "cv0").unwrap(), client.counters().unwrap());
    assert_eq!(rx, theirs.rx_bytes, "from the client: engine and server's kernel ({ours:?})");
    assert_eq!(tx, ours.rx_bytes, "to the client: engine and client's kernel ({theirs:?})");

    client.download(10_000_000).unwrap();
    client.upload(10_000_000).unwrap();
    let rx = quiescent("counters", Duration::from_millis(500), 10, || {
        engine.figure(&server, &client_keys, "cvault_rx_inner")
    })
    .unwrap();
    let ours = client.counters().unwrap();
    assert!(rx <= ours.tx_bytes && rx > 10_000_000, "{rx} of {ours:?}");

    engine.process.end(&server, Signal::Kill).unwrap();
    assert!(server.sh("ip link show cv0").is_ok(), "the interface stays");
    let engine = Engine::start(&server).unwrap();
    engine.configure(&server, &server_keys, &[(&client_keys, 2, TENANT)]).unwrap();
    assert_eq!(
        engine.figure(&server, &client_keys, "cvault_rx_inner").unwrap(),
        rx,
        "the counters are where they were"
    );
    eventually("the client's traffic passes again without the client doing anything", 10, || {
        if client.pings(HTTP_V4) { Ok(()) } else { bail!("no echo") }
    })
    .unwrap();
    assert!(std::path::Path::new(&engine.state_dir).join("counters.bin").exists());
}

#[test]
fn the_engine_lets_no_packet_pass_between_peers_nor_from_a_borrowed_address() {
    let lab = Lab::build().unwrap();
    let (server, at) = server(&lab).unwrap();
    let server_keys = keys(&server).unwrap();
    let peers: Vec<(Keys, u8, &str)> = [(2, TENANT), (3, TENANT), (4, OTHER_TENANT)]
        .into_iter()
        .map(|(host, tenant)| (keys(&server).unwrap(), host, tenant))
        .collect();
    let engine = Engine::start(&server).unwrap();
    let set: Vec<(&Keys, u8, &str)> = peers.iter().map(|(keys, host, tenant)| (keys, *host, *tenant)).collect();
    engine.configure(&server, &server_keys, &set).unwrap();
    let clients: Vec<Client> = (1..=3).map(|number| Client::boot(&lab, number).unwrap()).collect();
    for (client, (keys, host, _)) in clients.iter().zip(&peers) {
        client.up(&client_config(keys, &server_keys, *host, &at.v4)).unwrap();
        client.echo(HTTP_V4, 10, 100).unwrap();
    }
    for address in ["10.8.0.3", "10.8.0.4", "10.8.0.1", "fd00:cafe::3", "fd00:cafe::4"] {
        let before = dropped(&server, "cv0", "isolation").unwrap();
        assert!(!clients[0].pings(address), "an echo came back from {address}");
        let after = dropped(&server, "cv0", "isolation").unwrap();
        assert_eq!(after - before, 1, "the one packet to {address} was not dropped by the engine");
    }
    let before = dropped(&server, "cv0", "spoofed").unwrap();
    clients[0].machine().sh("ip addr add 10.8.0.4/32 dev cvault").unwrap();
    assert!(clients[0].machine().run("ping", ["-c2", "-i", "0.1", "-W1", "-I", "10.8.0.4", HTTP_V4]).is_err());
    clients[0].machine().sh("ip addr del 10.8.0.4/32 dev cvault").unwrap();
    let after = dropped(&server, "cv0", "spoofed").unwrap();
    assert!(after - before >= 2, "of two packets from a borrowed address the engine dropped {}", after - before);
    assert!(clients[0].pings(HTTP_V4));

    // revoking one leaves the others
    let removal = format!("set=1\npublic_key={}\nremove=true\n\n", peers[2].0.public_hex);
    assert_eq!(uapi(&server, "cv0", &removal).unwrap().trim(), "errno=0");
    eventually("the removed peer is cut off", 5, || {
        if clients[2].pings(HTTP_V4) { bail!("still answered") } else { Ok(()) }
    })
    .unwrap();
    assert!(clients[1].pings(HTTP_V4));
    let journal = std::fs::metadata(std::path::Path::new(&engine.state_dir).join("closed.journal")).unwrap();
    assert!(journal.len() > 0, "the final counters are in the journal");
}
