//! The tunnel with peers of tenants, as the agent configures it, and in the place of wireguard-go.

use std::time::Duration;

use anyhow::{Result, bail};
use cvault_tests::lab::{Addresses, DNS_V4, HTTP_V4, Lab, Machine, Network, Signal, binary, eventually};
use cvault_tests::platform::{Client, dropped, uapi};
use cvault_tests::tunnel::{Account, Keys, Tunnel};

const TENANT: &str = "0190f5a0000070008000000000000001";
const OTHER_TENANT: &str = "0190f5a0000070008000000000000002";

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
    let (server_keys, client_keys) = (Keys::random().unwrap(), Keys::random().unwrap());
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
    client.silence().unwrap();
    Account::settled(&server, "cv0").unwrap().agrees().unwrap();
    server.sh(&format!("wg-quick down {conf} 2>&1")).unwrap();
    eventually("the interface is gone", 5, || {
        if server.sh("ip link show cv0").is_err() { Ok(()) } else { bail!("still there") }
    })
    .unwrap();
}

/// What the agent says to a tunnel it has started.
fn configure(tunnel: &Tunnel, server: &Machine, own: &Keys, peers: &[(&Keys, u8, &str)]) -> Result<()> {
    let mut lines = format!(
        "private_key={}\nlisten_port=51820\ncvault_replace_overlay=true\ncvault_overlay=10.8.0.0/16\ncvault_overlay=fd00:cafe::/64\n",
        own.private_hex
    );
    for (keys, host, tenant) in peers {
        lines.push_str(&format!(
            "public_key={}\nreplace_allowed_ips=true\nallowed_ip=10.8.0.{host}/32\nallowed_ip=fd00:cafe::{host}/128\ncvault_tenant={tenant}\ncvault_generation=7\n",
            keys.public_hex
        ));
    }
    tunnel.set(server, &lines)?;
    server.sh("ip addr show dev cv0 | grep -q 10.8.0.1 || ip addr add 10.8.0.1/16 dev cv0; ip -6 addr replace fd00:cafe::1/64 dev cv0 nodad; ip link set cv0 mtu 1420 up")?;
    Ok(())
}

#[test]
fn the_engine_counts_what_the_kernels_count_and_goes_on_counting_after_being_killed() {
    let lab = Lab::build().unwrap();
    let (server, at) = server(&lab).unwrap();
    let client = Client::boot(&lab, 1).unwrap();
    let (server_keys, client_keys) = (Keys::random().unwrap(), Keys::random().unwrap());
    let tunnel = Tunnel::start_persistent(&server, "cv0").unwrap();
    configure(&tunnel, &server, &server_keys, &[(&client_keys, 2, TENANT)]).unwrap();
    client.up(&client_config(&client_keys, &server_keys, 2, &at.v4)).unwrap();
    client.echo(HTTP_V4, 500, 1000).unwrap();
    client.silence().unwrap();

    let account = Account::settled(&server, "cv0").unwrap();
    account.agrees().unwrap();
    let ours = client.counters().unwrap();
    assert_eq!(account.tx_inner, ours.rx_bytes, "to the client: engine and client's kernel ({account:?})");

    client.download(10_000_000).unwrap();
    client.upload(10_000_000).unwrap();
    let before = Account::settled(&server, "cv0").unwrap();
    before.agrees().unwrap();
    let ours = client.counters().unwrap();
    assert!(before.rx_inner <= ours.tx_bytes && before.rx_inner > 10_000_000, "{before:?} of {ours:?}");

    tunnel.process().end(&server, Signal::Kill).unwrap();
    assert!(server.sh("ip link show cv0").is_ok(), "the interface stays");
    let tunnel = Tunnel::start_persistent(&server, "cv0").unwrap();
    configure(&tunnel, &server, &server_keys, &[(&client_keys, 2, TENANT)]).unwrap();
    eventually("the client's traffic passes again without the client doing anything", 10, || {
        if client.pings(HTTP_V4) { Ok(()) } else { bail!("no echo") }
    })
    .unwrap();
    client.download(5_000_000).unwrap();
    let after = Account::settled(&server, "cv0").unwrap();
    assert!(after.rx_inner > before.rx_inner && after.tx_inner > before.tx_inner + 5_000_000, "{before:?}, {after:?}");
    after.agrees_since(&before).unwrap();
    assert!(Tunnel::state(&server, "cv0").join("counters.bin").exists());
}

#[test]
fn the_engine_lets_no_packet_pass_between_peers_nor_from_a_borrowed_address() {
    let lab = Lab::build().unwrap();
    let (server, at) = server(&lab).unwrap();
    let server_keys = Keys::random().unwrap();
    let peers: Vec<(Keys, u8, &str)> = [(2, TENANT), (3, TENANT), (4, OTHER_TENANT)]
        .into_iter()
        .map(|(host, tenant)| (Keys::random().unwrap(), host, tenant))
        .collect();
    let tunnel = Tunnel::start_persistent(&server, "cv0").unwrap();
    let set: Vec<(&Keys, u8, &str)> = peers.iter().map(|(keys, host, tenant)| (keys, *host, *tenant)).collect();
    configure(&tunnel, &server, &server_keys, &set).unwrap();
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
    tunnel.set(&server, &format!("public_key={}\nremove=true\n", peers[2].0.public_hex)).unwrap();
    eventually("the removed peer is cut off", 5, || {
        if clients[2].pings(HTTP_V4) { bail!("still answered") } else { Ok(()) }
    })
    .unwrap();
    assert!(clients[1].pings(HTTP_V4));
    let closed = cvault_tests::tunnel::closed(&server, "cv0").unwrap();
    assert_eq!(closed.len(), 1, "the final counters are in the journal");
    Account::settled(&server, "cv0").unwrap().agrees().unwrap();
}
