//! The Lab proves itself: Debian's wireguard-go at both ends, no CVault program involved.

use cvault_tests::lab::{DNS_V4, HTTP_V4, HTTP_V6, Lab, Network, Signal, eventually};

#[test]
fn a_wireguard_tunnel_between_two_machines_changes_the_clients_address() {
    let lab = Lab::build().unwrap();
    let (server, server_at) = lab.machine("server", Network::Servers, 10).unwrap();
    let (client, client_at) = lab.machine("client", Network::Clients, 10).unwrap();
    assert_eq!(client.sh(&format!("curl -sf http://{HTTP_V4}/ip")).unwrap().trim(), client_at.v4);
    assert_eq!(client.sh(&format!("curl -sf http://[{HTTP_V6}]/ip")).unwrap().trim(), client_at.v6);

    let config = |own: &str| client.dir().join(own).display().to_string();
    let keys =
        client.sh("a=$(wg genkey); b=$(wg genkey); echo $a $(echo $a | wg pubkey) $b $(echo $b | wg pubkey)").unwrap();
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
    let swallowed = client
        .sh(&format!("head -c 1000000 /dev/zero | curl -sf -H Expect: --data-binary @- http://{HTTP_V4}/sink"))
        .unwrap();
    assert_eq!(swallowed.trim(), "1000000");

    client.sh(&format!("wg-quick down {} 2>&1", config("cv0.conf"))).unwrap();
    assert_eq!(client.sh(&format!("curl -sf http://{HTTP_V4}/ip")).unwrap().trim(), client_at.v4);
}

#[test]
fn two_labs_side_by_side_use_the_same_addresses_without_meeting() {
    let labs = [Lab::build().unwrap(), Lab::build().unwrap()];
    let machines = labs.each_ref().map(|lab| lab.machine("server", Network::Servers, 10).unwrap());
    machines[0].0.sh("echo one > /run/wireguard/cv0.sock; ip addr add 203.0.113.99/32 dev lo").unwrap();
    assert_eq!(machines[0].1, machines[1].1);
    assert!(machines[1].0.sh("cat /run/wireguard/cv0.sock").is_err());
    assert!(labs[0].internet().sh("ping -c1 -W1 203.0.113.10").is_ok());
    let [(_, _), (second, _)] = &machines;
    let port = second.spawn("web", &cvault_tests::lab::binary("cvault-lab").unwrap(), ["web"], []).unwrap();
    eventually("the second lab's server is reached in its own lab", 5, || {
        labs[1].internet().sh("curl -sf http://203.0.113.10/ip")
    })
    .unwrap();
    assert!(labs[0].internet().sh("curl -sf -m 1 http://203.0.113.10/ip").is_err());
    port.check_running().unwrap();
}

#[test]
fn what_a_machine_does_to_shared_memory_and_what_the_caller_exports_does_not_pass_its_walls() {
    let lab = Lab::build().unwrap();
    let (machine, _) = lab.machine("server", Network::Servers, 10).unwrap();
    let own = format!("lab-of-{}", std::process::id());
    assert_eq!(machine.sh("ls -A /dev/shm").unwrap(), "");
    machine.sh(&format!("touch /dev/shm/{own}")).unwrap();
    assert!(machine.path(&format!("/dev/shm/{own}")).exists());
    assert!(!std::path::Path::new("/dev/shm").join(&own).exists());
    let environment = machine.sh("env | cut -d= -f1 | grep -vx -e PWD -e _ -e SHLVL -e OLDPWD | sort").unwrap();
    assert_eq!(environment.split_whitespace().collect::<Vec<_>>(), ["HOME", "LANG", "PATH"]);
}

#[test]
fn wg_quick_finds_no_wireguard_in_the_kernel_whatever_the_computer_has() {
    let lab = Lab::build().unwrap();
    let machine = lab.internet();
    assert_eq!(machine.sh("ls -A /sys/module").unwrap(), "");
    assert!(machine.sh("ip link add wg9 type wireguard").unwrap_err().to_string().contains("Unknown device type"));
    machine.sh("ip link add dummy9 type bridge && ip link del dummy9").unwrap();
    assert_eq!(machine.sh("command -v wg-quick").unwrap().trim(), "/run/lab/bin/wg-quick");
}

#[test]
fn a_machine_takes_its_daemons_with_it_and_boots_again_with_its_address_and_another_boot_id() {
    let lab = Lab::build().unwrap();
    let (machine, addresses) = lab.machine("server", Network::Servers, 10).unwrap();
    let marker = lab.dir().join("alive").display().to_string();
    machine.sh(&format!("setsid sh -c 'while :; do date +%s%N > {marker}; done' >/dev/null 2>&1 &")).unwrap();
    eventually("the daemon runs", 5, || Ok(std::fs::read_to_string(&marker)?)).unwrap();
    let boot_id = machine.sh("cat /proc/sys/kernel/random/boot_id").unwrap();
    drop(machine);
    let last = std::fs::read_to_string(&marker).unwrap();

    let (machine, again) = lab.machine("server", Network::Servers, 10).unwrap();
    assert_eq!(again, addresses);
    assert_ne!(machine.sh("cat /proc/sys/kernel/random/boot_id").unwrap(), boot_id);
    assert!(lab.internet().sh("ping -c1 -W1 203.0.113.10").is_ok());
    assert_eq!(std::fs::read_to_string(&marker).unwrap(), last);
}

#[test]
fn a_process_is_killed_by_its_own_machines_process_id() {
    let lab = Lab::build().unwrap();
    let process = lab.internet().spawn("tail", "tail", ["-f", "/dev/null"], []).unwrap();
    process.check_running().unwrap();
    process.end(lab.internet(), Signal::Kill).unwrap();
    assert!(process.check_running().is_err());
}

#[test]
fn a_secret_in_a_log_is_found() {
    let lab = Lab::build().unwrap();
    lab.secret("a token", "correct-horse-battery");
    assert_eq!(lab.check_logs_hold_no_secret().unwrap(), 1);
    let process = lab.internet().spawn("leak", "echo", ["token=correct-horse-battery!"], []).unwrap();
    eventually("the log is written", 5, || {
        if process.last_lines(1).is_empty() {
            anyhow::bail!("empty")
        }
        Ok(())
    })
    .unwrap();
    let error = lab.check_logs_hold_no_secret().unwrap_err().to_string();
    assert!(error.contains("a token in ") && error.contains("leak.log line 1"), "{error}");
    assert!(!error.contains("battery"));

    // a rotated log, and a key in another form than the one that was given out
    std::fs::rename(process.log(), process.log().with_extension("log.old")).unwrap();
    lab.secret("a key", &"fb".repeat(32));
    std::fs::write(process.log(), format!("key={}\n", "-_v7".repeat(10) + "-_s")).unwrap();
    let error = lab.check_logs_hold_no_secret().unwrap_err().to_string();
    assert!(error.contains("a token in ") && error.contains("leak.log.old line 1"), "{error}");
    assert!(error.contains("a key in ") && error.contains("leak.log line 1"), "{error}");
}
