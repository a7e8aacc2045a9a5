//! wg-quick with the engine as its userspace implementation, under the name by which it is installed for that.

use anyhow::{Result, ensure};
use cvault_tests::lab::{Lab, Machine, Network, binary, eventually};
use cvault_tests::platform::Client;
use cvault_tests::tunnel::{Account, Keys, Program, Tunnel, secret_file};

const NAME: &str = "cvault-tunnel";

fn install(machine: &Machine) -> Result<()> {
    let program = binary("cvault-node-agent")?;
    machine.sh(&format!("ln -sf {program} /run/lab/bin/{NAME}")).map(drop)
}

fn wg_quick(machine: &Machine, verb: &str, config: &str) -> Result<String> {
    let mut command = machine.command("wg-quick");
    command.args([verb, config]).env("WG_QUICK_USERSPACE_IMPLEMENTATION", NAME);
    machine.finish(&format!("wg-quick {verb}"), command)
}

fn is_gone(machine: &Machine, interface: &str) -> Result<()> {
    eventually("nothing is left of the tunnel", 10, || {
        ensure!(machine.run("ip", ["link", "show", interface]).is_err(), "the interface is there");
        ensure!(machine.run("pgrep", ["-f", "node-agent tunnel"]).is_err(), "the process is there");
        let left = machine.run("ls", ["/run/wireguard"])?;
        ensure!(left.trim().is_empty(), "in /run/wireguard: {left}");
        Ok(())
    })
}

/// A server run by wireguard-go that lets a client out into the internet.
fn gateway(lab: &Lab, client: &Keys) -> Result<(Machine, Tunnel, Keys, String)> {
    let (machine, at) = lab.machine("gateway", Network::Servers, 10)?;
    let tunnel = Tunnel::start(&machine, Program::WireguardGo, "wg0")?;
    let keys = Keys::random()?;
    let text = format!(
        "[Interface]\nPrivateKey = {}\nListenPort = 51820\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.8.0.2/32, fd00:cafe::2/128\n",
        keys.private, client.public
    );
    tunnel.load(&machine, "setconf", &text)?;
    machine.sh(
        "ip addr add 10.8.0.1/16 dev wg0; ip -6 addr add fd00:cafe::1/64 dev wg0 nodad; ip link set wg0 up
         sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
         nft 'add table inet nat; add chain inet nat post { type nat hook postrouting priority 100; }; add rule inet nat post oifname up0 masquerade'",
    )?;
    Ok((machine, tunnel, keys, at.v4))
}

#[test]
fn as_a_client_it_takes_the_default_route_by_mark_and_gives_it_back() {
    let lab = Lab::build().unwrap();
    let keys = Keys::random().unwrap();
    let (gateway, _tunnel, gateway_keys, at) = gateway(&lab, &keys).unwrap();
    let client = Client::boot(&lab, 1).unwrap();
    let machine = client.machine();
    install(machine).unwrap();
    let before = machine.sh("ip rule; ip -6 rule; ip route show table all; cat /etc/resolv.conf").unwrap();
    let config = secret_file(
        machine,
        "wgdef.conf",
        &format!(
            "[Interface]\nPrivateKey = {}\nAddress = 10.8.0.2/32, fd00:cafe::2/128\n\
             [Peer]\nPublicKey = {}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = {at}:51820\n",
            keys.private, gateway_keys.public
        ),
    )
    .unwrap();
    assert_eq!(client.address_v4().unwrap(), client.addresses.v4);
    wg_quick(machine, "up", &config).unwrap();
    assert!(machine.run("pgrep", ["-f", "node-agent tunnel wgdef"]).is_ok(), "the engine runs it");
    let mark = machine.run("wg", ["show", "wgdef", "fwmark"]).unwrap();
    assert!(mark.trim().starts_with("0x"), "{mark}");
    assert!(machine.run("ip", ["rule"]).unwrap().contains("not from all fwmark"));

    eventually("the internet sees the gateway", 15, || {
        ensure!(client.address_v4()? == at, "it does not");
        Ok(())
    })
    .unwrap();
    assert!(client.address_v6().unwrap().starts_with("2001:db8:2:"));
    client.download(5_000_000).unwrap();
    client.upload(5_000_000).unwrap();
    let shown = gateway.run("wg", ["show", "wg0", "endpoints"]).unwrap();
    assert!(shown.contains(&client.addresses.v4), "outside it still comes from its own address: {shown}");
    Account::settled(machine, "wgdef").unwrap().agrees().unwrap();

    wg_quick(machine, "down", &config).unwrap();
    is_gone(machine, "wgdef").unwrap();
    let after = machine.sh("ip rule; ip -6 rule; ip route show table all; cat /etc/resolv.conf").unwrap();
    assert_eq!(after, before, "routing is as it was");
    assert_eq!(client.address_v4().unwrap(), client.addresses.v4);
}

#[test]
fn up_save_strip_and_down_do_what_they_do_with_wireguard_go() {
    let lab = Lab::build().unwrap();
    let (machine, _) = lab.machine("server", Network::Servers, 10).unwrap();
    install(&machine).unwrap();
    let (own, first, second) = (Keys::random().unwrap(), Keys::random().unwrap(), Keys::random().unwrap());
    let text = format!(
        "[Interface]\nAddress = 10.8.0.1/16\nSaveConfig = true\nPostUp = touch /run/was-up\nListenPort = 51820\nPrivateKey = {}\n\n\
         [Peer]\nPublicKey = {}\nAllowedIPs = 10.8.0.2/32\n",
        own.private, first.public
    );
    let config = secret_file(&machine, "wgsave.conf", &text).unwrap();
    let stripped = wg_quick(&machine, "strip", &config).unwrap();
    assert!(
        stripped.contains(&own.private) && !stripped.contains("Address") && !stripped.contains("PostUp"),
        "stripped"
    );

    wg_quick(&machine, "up", &config).unwrap();
    assert!(machine.run("test", ["-e", "/run/was-up"]).is_ok());
    let again = wg_quick(&machine, "up", &config).unwrap_err().to_string();
    assert!(again.contains("already exists"), "{again}");
    assert!(machine.run("wg", ["show", "wgsave", "peers"]).unwrap().contains(&first.public));

    machine.sh(&format!("wg set wgsave peer {} allowed-ips 10.8.0.3/32,10.77.0.0/24", second.public)).unwrap();
    wg_quick(&machine, "save", &config).unwrap();
    let saved = std::fs::read_to_string(&config).unwrap();
    assert!(saved.contains(&second.public) && saved.contains("10.77.0.0/24") && saved.contains(&own.private), "saved");

    // What is not saved by hand is saved on the way down.
    machine.sh(&format!("wg set wgsave peer {} remove", first.public)).unwrap();
    wg_quick(&machine, "down", &config).unwrap();
    is_gone(&machine, "wgsave").unwrap();
    assert!(!std::fs::read_to_string(&config).unwrap().contains(&first.public));
    wg_quick(&machine, "up", &config).unwrap();
    assert_eq!(machine.run("wg", ["show", "wgsave", "peers"]).unwrap().trim(), second.public);
    assert!(machine.run("ip", ["route"]).unwrap().contains("10.77.0.0/24 dev wgsave"));
    wg_quick(&machine, "down", &config).unwrap();
    is_gone(&machine, "wgsave").unwrap();
}
