//! Two tenants on one server, five users each, all at the same time: nobody sees, reaches or pays for another.

use anyhow::{Result, anyhow, ensure};
use cvault_tests::lab::{HTTP_V4, HTTP_V6, Signal, binary, eventually};
use cvault_tests::platform::{Client, ControlOptions, Counters, Device, Platform, Request, Server, Tenant, User};
use serde_json::json;

const USERS: u8 = 5;
const ECHOES: u64 = 100;
const IP_AND_ICMP_HEADERS: u64 = 28;

struct Member {
    user: User,
    device: Device,
    client: Client,
}

struct Party {
    tenant: Tenant,
    members: Vec<Member>,
}

#[test]
fn two_tenants_on_one_server_cannot_see_reach_or_be_billed_for_each_other() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    let server = platform.server(1).unwrap();
    let parties = [party(&platform, "Acme", 1).unwrap(), party(&platform, "Globex", 101).unwrap()];
    let before = server.counters().unwrap();

    everybody_is_online(&parties).unwrap();
    let [acme, globex] = &parties;
    nobody_sees(&platform, acme, globex).unwrap();
    nobody_sees(&platform, globex, acme).unwrap();
    nobody_reaches(&server, acme, globex).unwrap();
    nobody_reaches(&server, globex, acme).unwrap();
    nobody_speaks_for(&server, acme, globex).unwrap();

    let mut received_by_all = 0;
    for (party, size) in parties.iter().zip([500, 900]) {
        let echoed = u64::from(USERS) * ECHOES * (size + IP_AND_ICMP_HEADERS);
        let counters: Vec<Counters> = party.members.iter().map(|member| member.client.counters().unwrap()).collect();
        let received: u64 = counters.iter().map(|counters| counters.rx_bytes).sum();
        let sent: u64 = counters.iter().map(|counters| counters.tx_bytes).sum();
        let bill = platform
            .bill_where(&party.tenant, |billed| {
                ensure!(billed.tx == received, "billed {billed:?}, its own clients received {received}");
                ensure!((echoed..=sent).contains(&billed.rx), "billed {billed:?}, echoed {echoed}, sent {sent}");
                Ok(())
            })
            .unwrap();
        received_by_all += bill.rx;
    }
    let counted = server.counters().unwrap() - before;
    assert_eq!(
        received_by_all, counted.rx_bytes,
        "both bills together are what the server's kernel took from the tunnel"
    );
    platform.check_logs_hold_no_secret().unwrap();
}

fn party(platform: &Platform, name: &str, first_client: u8) -> Result<Party> {
    let tenant = platform.tenant(name)?;
    let mut members = Vec::new();
    for number in 0..USERS {
        // the same e-mail addresses in both tenants: they are different people
        let user = platform.user(&tenant, &format!("user{number}@example.com"))?;
        let device = platform.device(&user, "laptop")?;
        let client = platform.client(first_client + number)?;
        client.up(&device.config)?;
        members.push(Member { user, device, client });
    }
    Ok(Party { tenant, members })
}

/// All ten at once, each tenant with packets of its own size.
fn everybody_is_online(parties: &[Party; 2]) -> Result<()> {
    std::thread::scope(|scope| {
        let mut echoes = Vec::new();
        for (party, size) in parties.iter().zip([500, 900]) {
            for member in &party.members {
                echoes.push(scope.spawn(move || member.client.echo(HTTP_V4, ECHOES, size)));
            }
        }
        echoes.into_iter().try_for_each(|echo| echo.join().map_err(|_| anyhow!("an echo thread panicked"))?)
    })
}

/// Every call of `curious` on what `other` owns is answered as if it did not exist.
fn nobody_sees(platform: &Platform, curious: &Party, other: &Party) -> Result<()> {
    let http = &platform.http;
    let user = &curious.members[0].user;
    for theirs in &other.members {
        let path = format!("/api/v1/devices/{}", theirs.device.id);
        for request in [
            user.get_request(&path),
            user.get_request(&format!("{path}/config")),
            user.delete_device_request(&theirs.device),
            user.connect_request(&theirs.device),
            user.disconnect_request(&theirs.device),
        ] {
            let answer = http.send(&request)?;
            assert_eq!(
                (answer.status, answer.code().as_str()),
                (404, "NOT_FOUND"),
                "{} {}",
                request.method,
                request.path
            );
        }
    }
    let list = http.send(&user.get_request("/api/v1/devices"))?;
    assert_eq!(list.status, 200);
    assert!(list.text().contains(&curious.members[0].device.id));
    for theirs in other.members.iter().chain(&curious.members[1..]) {
        assert!(!list.text().contains(&theirs.device.id), "a user lists only its own devices");
    }
    // the other tenant's key with our token, and a made-up device
    let mixed = Request::get("/api/v1/devices")
        .header("X-API-Key", &other.tenant.api_key)
        .header("Authorization", &format!("Bearer {}", user.access_token));
    assert_eq!(http.send(&mixed)?.status, 401);
    let made_up =
        user.sign(Request::post("/api/v1/vpn/connect", &json!({ "device_id": "dev_00000000000000000000000000" })));
    assert_eq!(http.send(&made_up)?.status, 404);
    Ok(())
}

/// No packet passes from `curious` to an inner address of `other`, nor between users of one tenant: it is the server that
/// drops them, every one.
fn nobody_reaches(server: &Server, curious: &Party, other: &Party) -> Result<()> {
    let dropped = server.dropped("isolation")?;
    let mut tried = 0;
    let target = &other.members[0];
    let web = target.client.machine().spawn("web", &binary("cvault-lab")?, ["web"], [])?;
    eventually("the target listens", 5, || target.client.get("http://127.0.0.1/ip"))?;
    let from = &curious.members[1].client;
    std::thread::scope(|scope| {
        for member in other.members.iter().chain(&curious.members[2..]) {
            for address in member.device.addresses() {
                tried += 1;
                scope.spawn(move || assert!(!from.pings(&address), "an echo came back from {address}"));
            }
        }
    });
    for address in target.device.addresses() {
        tried += 1;
        let host = if address.contains(':') { format!("[{address}]") } else { address };
        assert!(
            from.machine().run("curl", ["-s", "-m", "1", &format!("http://{host}/ip")]).is_err(),
            "connected to {host}"
        );
    }
    let dropped = server.dropped("isolation")? - dropped;
    assert!(dropped >= tried, "the server dropped {dropped} packets of {tried} attempts");
    web.end(target.client.machine(), Signal::Kill)
}

/// Packets with another's source address go nowhere: the server drops them, every one.
fn nobody_speaks_for(server: &Server, liar: &Party, victim: &Party) -> Result<()> {
    let client = &liar.members[2].client;
    for address in victim.members[3].device.addresses() {
        let (target, bits) = if address.contains(':') { (HTTP_V6, 128) } else { (HTTP_V4, 32) };
        client.machine().sh(&format!("ip addr add {address}/{bits} dev cvault"))?;
        let dropped = server.dropped("spoofed")?;
        let echo = client.machine().run("ping", ["-c3", "-i", "0.1", "-W1", "-I", &address, target]);
        assert!(echo.is_err(), "an echo from {address} was answered");
        let dropped = server.dropped("spoofed")? - dropped;
        assert!(dropped >= 3, "of three packets from {address} the server dropped {dropped}");
        client.machine().sh(&format!("ip addr del {address}/{bits} dev cvault"))?;
    }
    assert!(client.pings(HTTP_V4), "its own address still works");
    Ok(())
}
