//! wg-quick with the engine as its userspace implementation, under the name by which it is installed for that.

use anyhow::{Context, Result, ensure};
use cvault_tests::lab::{Lab, Machine, Network, binary, eventually};
use cvault_tests::platform::Client;
use cvault_tests::tunnel::{Account, Keys, Program, Tunnel, preshared_key, secret_file};

const NAME: &str = "cvault-tunnel";

fn install(machine: &Machine) -> Result<()> {
    let program = binary("cvault-node-agent")?;
    machine.sh(&format!("ln -sf {program} /run/lab/bin/{NAME}")).map(drop)
}

fn wg_quick(machine: &Machine, implementation: &str, verb: &str, config: &str) -> Result<String> {
    let mut command = machine.command("wg-quick");
    command.args([verb, config]).env("WG_QUICK_USERSPACE_IMPLEMENTATION", implementation);
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
    wg_quick(machine, NAME, "up", &config).unwrap();
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

    wg_quick(machine, NAME, "down", &config).unwrap();
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
    // Else the kernel gives each interface a link-local address at random.
    machine.sh("sysctl -qw net.ipv6.conf.default.addr_gen_mode=1").unwrap();
    let peers = [Keys::random().unwrap(), Keys::random().unwrap()];
    let config = format!(
        "[Interface]\nAddress = 10.8.0.1/16, fd00:cafe::1/64\nSaveConfig = true\nPostUp = touch /run/was-up\nFwMark = 0x99\n\
         ListenPort = 51820\nPrivateKey = {}\n\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.8.0.2/32\nEndpoint = 192.0.2.1:1\n",
        // Not as `wg genkey` makes them: it has bits that are not used.
        preshared_key().unwrap(),
        peers[0].public
    );
    let ours = session(&machine, NAME, &config, &peers).unwrap();
    let theirs = session(&machine, "wireguard-go", &config, &peers).unwrap();
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours.len(), theirs.len());
    let [stripped, again, shown, saved, saved_on_the_way_down, restored] = &ours[..] else { panic!("{ours:?}") };
    let says = |text: &[String], what: &str| text.iter().any(|line| line.contains(what));
    let names = |text: &[String], keys: &Keys| says(text, &keys.public);
    assert!(says(stripped, "PrivateKey") && !says(stripped, "Address") && !says(stripped, "PostUp"), "{stripped:?}");
    assert!(says(again, "already exists"), "{again:?}");
    assert!(names(shown, &peers[0]) && says(shown, "/run/was-up"), "{shown:?}");
    assert!(names(saved, &peers[1]) && says(saved, "10.77.0.0/24") && says(saved, "PrivateKey"), "{saved:?}");
    assert!(
        says(restored, "10.77.0.0/24 scope link") || says(restored, "10.77.0.0/24 proto"),
        "the route: {restored:?}"
    );
    for text in [saved_on_the_way_down, restored] {
        assert!(!names(text, &peers[0]) && names(text, &peers[1]), "{text:?}");
    }
}

/// What each step of a configuration's life printed and left behind.
fn session(machine: &Machine, implementation: &str, config: &str, peers: &[Keys; 2]) -> Result<Vec<Vec<String>>> {
    let path = secret_file(machine, "wgsave.conf", config)?;
    let quick = |verb: &str| wg_quick(machine, implementation, verb, &path);
    let everything = || -> Result<Vec<String>> {
        let text = machine.sh(
            "wg showconf wgsave; ip -brief address show dev wgsave scope global; ip -6 route show dev wgsave; ip route show dev wgsave
             cat /sys/class/net/wgsave/mtu; ls /run/was-up",
        )?;
        Ok(sorted(&text))
    };
    let mut seen = vec![sorted(&quick("strip")?)];
    machine.sh("rm -f /run/was-up")?;
    quick("up")?;
    let again = quick("up").err().context("it is up already")?.to_string();
    seen.push(sorted(again.split("wg-quick up").last().unwrap_or_default()));
    seen.push(everything()?);
    let [first, second] = peers;
    machine.sh(&format!("wg set wgsave peer {} allowed-ips 10.8.0.3/32,10.77.0.0/24", second.public))?;
    quick("save")?;
    seen.push(sorted(&std::fs::read_to_string(&path)?));
    // What is not saved by hand is saved on the way down.
    machine.sh(&format!("wg set wgsave peer {} remove", first.public))?;
    quick("down")?;
    is_gone(machine, "wgsave")?;
    seen.push(sorted(&std::fs::read_to_string(&path)?));
    quick("up")?;
    seen.push(everything()?);
    quick("down")?;
    is_gone(machine, "wgsave")?;
    Ok(seen)
}

/// Peers and addresses may be told in any order.
fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}
