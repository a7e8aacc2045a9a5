//! The Lab proves itself: Debian's wireguard-go at both ends, no CVault program involved.

use cvault_tests::lab::{DNS_V4, HTTP_V4, HTTP_V6, Lab, Network, eventually};

#[test]
fn a_wireguard_tunnel_between_two_machines_changes_the_clients_address() {
    let lab = Lab::build().unwrap();
    let (server, server_at) = lab.machine("server", Network::Servers, 10).unwrap();
    let (client, client_at) = lab.machine("client", Network::Clients, 10).unwrap();
    assert_eq!(client.sh(&format!("curl -sf http://{HTTP_V4}/ip")).unwrap().trim(), client_at.v4);
    assert_eq!(client.sh(&format!("curl -sf http://[{HTTP_V6}]/ip")).unwrap().trim(), client_at.v6);

    let config = |own: &str| client.dir().join(own).display().to_string();
    let keys = client.sh("a=$(wg genkey); b=$(wg genkey); echo $a $(echo $a | wg pubkey) $b $(echo $b | wg pubkey)").unwrap();
    let keys: Vec<&str> = keys.split_whitespace().collect();
    std::fs::write(
        config("cv0.conf"),
        format!(
            "[Interface]\nPrivateKey = {}\nAddress = 10.8.0.2/32, fd00:cafe::2/128\nDNS = {DNS_V4}\n[Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = {}:51820\n",
            keys[0], keys[3], server_at.v4
        ),
    )
    .unwrap();
    std::fs::create_dir(client.dir().join("s")).unwrap();
    std::fs::write(
        config("s/cv0.conf"),
        format!(
            "[Interface]\nPrivateKey = {}\nListenPort = 51820\nAddress = 10.8.0.1/16, fd00:cafe::1/64\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.8.0.2/32, fd00:cafe::2/128\n",
            keys[2], keys[1]
        ),
    )
    .unwrap();
    server
        .sh(&format!(
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
             export WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go
             nft 'add table inet nat; add chain inet nat post {{ type nat hook postrouting priority 100; }}; add rule inet nat post oifname up0 masquerade'
             chmod 600 {conf}; wg-quick up {conf} 2>&1",
            conf = config("s/cv0.conf")
        ))
        .unwrap();
    client
        .sh(&format!(
            "chmod 600 {conf}; WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go wg-quick up {conf} 2>&1",
            conf = config("cv0.conf")
        ))
        .unwrap();

    eventually("the tunnel carries", 10, || client.sh("ping -c1 -W1 10.8.0.1")).unwrap();
    assert_eq!(client.sh(&format!("curl -sf http://{HTTP_V4}/ip")).unwrap().trim(), server_at.v4);
    assert_eq!(client.sh(&format!("curl -sf http://[{HTTP_V6}]/ip")).unwrap().trim(), server_at.v6);
    assert!(client.sh("getent ahostsv4 whoami.test").unwrap().starts_with(&server_at.v4));
    let megabyte = client.sh(&format!("curl -sf http://{HTTP_V4}/bytes/1000000 | wc -c")).unwrap();
    assert_eq!(megabyte.trim(), "1000000");
    let swallowed = client.sh(&format!("head -c 1000000 /dev/zero | curl -sf -H Expect: --data-binary @- http://{HTTP_V4}/sink")).unwrap();
    assert_eq!(swallowed.trim(), "1000000");

    client.sh(&format!("wg-quick down {} 2>&1", config("cv0.conf"))).unwrap();
    assert_eq!(client.sh(&format!("curl -sf http://{HTTP_V4}/ip")).unwrap().trim(), client_at.v4);
}
