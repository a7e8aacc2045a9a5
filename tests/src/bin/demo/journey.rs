//! The demonstration itself: the guide's full flow (§10.3), then the account of what was carried.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cvault_tests::lab::{self, CONTROL_V4, Lab, eventually};
use cvault_tests::platform::{Client, ControlOptions, Device, Platform, Server, Tenant, User, figures};

use crate::show::{Show, thousands, took};
use crate::with_logs;

const EMAIL: &str = "ada@example.com";
const PASSWORD: &str = "Correct-Horse-Battery-9";
const MIB: u64 = 1024 * 1024;
const LOAD: u64 = 50 * MIB;
const SLOW_LOAD: u64 = 2 * MIB;

pub(crate) fn run(show: &mut Show, keep: bool) -> Result<()> {
    show.title(
        "CVault: from nothing to a metered WireGuard tunnel",
        "Real programs in a lab of network namespaces on this computer. Nothing outside it is touched.",
    );
    let lab = show
        .step("Build the lab: an internet with web and DNS servers, and room for machines around it", |_| {
            Lab::build()
        })?;
    let platform =
        show.step("Start the control plane: private PostgreSQL, migrations, HTTP API, agent gateway", |show| {
            let platform =
                Platform::start_in(lab, ControlOptions { log: "info".to_owned(), ..ControlOptions::default() })?;
            show.line(&format!("$ cvault-control-plane dev --data-dir …      → http://{CONTROL_V4}:8080 is ready"));
            Ok(platform)
        })?;
    let done = journey(show, &platform, keep);
    with_logs(&platform, done)
}

fn journey(show: &mut Show, platform: &Platform, keep: bool) -> Result<()> {
    let server = show.step("Create a server, enrol its node agent with a single-use token, start it", |show| {
        let server = platform.server(1)?;
        show.fact("server", &format!("{}  {}, {}", server.id, server.addresses.v4, server.addresses.v6));
        Ok(server)
    })?;
    let tenant = create_tenant(show, platform)?;
    let user = create_user(show, platform, &tenant)?;
    let device = register_device(show, platform, &user)?;
    let client = show.step("Boot a client machine: Debian's wg-quick and wireguard-go, no CVault program", |show| {
        let client = platform.client(1)?;
        show.fact("address before, IPv4", &client.address_v4()?);
        show.fact("address before, IPv6", &client.address_v6()?);
        Ok(client)
    })?;
    connect(show, platform, &server, &client, &user, &device)?;
    meter(show, platform, &server, &client, &tenant)?;
    delete_device(show, platform, &client, &user, &device)?;
    if keep {
        stay(show, platform, &client, &tenant, &user)?;
    }
    Ok(())
}

fn create_tenant(show: &mut Show, platform: &Platform) -> Result<Tenant> {
    show.step("Create a tenant", |show| {
        show.name("ADMIN_TOKEN", &platform.admin.token);
        let answer =
            show.call(&platform.http, &platform.admin.create_tenant_request("Acme"), &["id", "name", "api_key"])?;
        let tenant = Tenant::from_answer(&platform.lab, &answer)?;
        show.name("API_KEY", &tenant.api_key);
        show.name("API_SECRET", &tenant.api_secret);
        Ok(tenant)
    })
}

fn create_user(show: &mut Show, platform: &Platform, tenant: &Tenant) -> Result<User> {
    let fields = ["user_id", "token_type", "expires_in"];
    show.step("Register a user, then log in (bcrypt, EdDSA tokens)", |show| {
        show.call(&platform.http, &User::register_request(tenant, EMAIL, PASSWORD), &fields)?.expect(201)?;
        let answer = show.call(&platform.http, &User::login_request(tenant, EMAIL, PASSWORD), &fields)?;
        let user = User::from_answer(&platform.lab, tenant, EMAIL, PASSWORD, &answer, 200)?;
        show.name("TOKEN", &user.access_token);
        Ok(user)
    })
}

fn register_device(show: &mut Show, platform: &Platform, user: &User) -> Result<Device> {
    show.step("Register a device and wait until its server runs it", |show| {
        let answer = show.call(
            &platform.http,
            &user.device_request("MacBook Pro"),
            &["device_id", "assigned_ip", "status", "activation_ms"],
        )?;
        let device = Device::from_answer(&platform.lab, &answer)?;
        if device.body["status"] != "active" {
            bail!("the device is {} and not active", device.body["status"]);
        }
        show.fact("activation", &format!("{}  (from the request to the answer `active`)", took(answer.took)));
        for line in device.config.lines() {
            let secret = ["PrivateKey", "PresharedKey"].iter().any(|name| line.starts_with(name));
            show.line(&format!("  │ {}", if secret { "PrivateKey = (shown to the client only)" } else { line }));
        }
        Ok(device)
    })
}

fn connect(
    show: &mut Show,
    platform: &Platform,
    server: &Server,
    client: &Client,
    user: &User,
    device: &Device,
) -> Result<()> {
    show.step("Bring the tunnel up with the configuration exactly as the API returned it", |show| {
        show.line("$ WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go wg-quick up cvault.conf");
        let up = client.up(&device.config)?;
        show.fact("first handshake", &format!("{}  (wg-quick itself {})", took(up.handshake), took(up.wg_quick)));
        Ok(())
    })?;
    show.step("Look at the client from the internet's side", |show| {
        let (v4, v6, dns) = (client.address_v4()?, client.address_v6()?, client.address_seen_by_dns()?);
        let named = client.get("http://www.test/ip")?;
        show.fact("address now, IPv4", &v4);
        show.fact("address now, IPv6", &v6);
        show.fact("DNS asked from", &dns);
        show.fact("http://www.test sees", &named);
        if v4 != server.addresses.v4 || v6 != server.addresses.v6 || dns != server.addresses.v4 {
            bail!("not everything goes through the server {:?}", server.addresses);
        }
        Ok(())
    })?;
    show.step("Ask for the session, opened by the handshake", |show| {
        let connected = eventually("the session is open", 20, || {
            let answer = platform.http.send(&user.status_request())?;
            if answer.text().contains("\"connected\"") { Ok(()) } else { bail!("status says {}", answer.text()) }
        });
        show.call(&platform.http, &user.status_request(), &["status", "tunnel_up", "last_handshake_at"])?;
        connected
    })
}

fn meter(show: &mut Show, platform: &Platform, server: &Server, client: &Client, tenant: &Tenant) -> Result<()> {
    show.step(
        "Carry 2 MiB each way slowly: the three counts must be the same, but for packets lost on the way",
        |show| {
            let account = figures::exact(platform, server, client, tenant, SLOW_LOAD)?;
            header(show);
            row(show, "billed", account.billed.rx, account.billed.tx);
            row(show, "server's kernel, TUN device", account.server.rx_bytes, account.server.tx_bytes);
            row(show, "client's kernel, TUN device", account.client.tx_bytes, account.client.rx_bytes);
            Ok(())
        },
    )?;
    show.step("Carry 50 MiB each way", |show| {
        let started = Instant::now();
        client.download(LOAD)?;
        show.fact("download", &rate(started.elapsed()));
        let started = Instant::now();
        client.upload(LOAD)?;
        show.fact("upload", &rate(started.elapsed()));
        Ok(())
    })?;
    show.step("Compare what is billed with what the kernels counted", |show| {
        client.silence()?;
        let billed = platform
            .bill_where(tenant, |billed| billed.check_against(server.counters_on_wire()?, client.counters()?))?;
        show.call(
            &platform.http,
            &tenant.usage_request(),
            &["current_period.rx_bytes", "current_period.tx_bytes", "current_period.active_users"],
        )?;
        let kernel = server.counters()?;
        let lost = client.datagrams_lost()?;
        let (server, client) = (server.counters_on_wire()?, client.counters()?);
        header(show);
        row(show, "billed", billed.rx, billed.tx);
        row(show, "server's kernel, TUN device", kernel.rx_bytes, kernel.tx_bytes);
        row(show, "  its aggregates (GSO) split", server.rx_bytes, server.tx_bytes);
        row(show, "client's kernel, TUN device", client.tx_bytes, client.rx_bytes);
        show.line(&format!(
            "The client's kernel dropped {lost} datagrams that wireguard-go did not fetch in time; TCP sent them again."
        ));
        Ok(())
    })
}

fn header(show: &Show) {
    show.line(&format!("{:<34}{:>16}{:>16}", "bytes of IP packets", "from device", "to device"));
}

fn row(show: &Show, name: &str, from: u64, to: u64) {
    show.line(&format!("{name:<34}{:>16}{:>16}", thousands(from), thousands(to)));
}

fn delete_device(show: &mut Show, platform: &Platform, client: &Client, user: &User, device: &Device) -> Result<()> {
    show.step("Delete the device: its traffic stops, its address goes into quarantine", |show| {
        let pings = client.start_pings(lab::HTTP_V4)?;
        pings.wait_for(5)?;
        let answer = show.call(&platform.http, &user.delete_device_request(device), &["status"])?;
        if answer.status != 204 {
            bail!("the deletion was answered {}: {}", answer.status, answer.text());
        }
        let before = pings.answers();
        let after = lab::quiescent("traffic stops", Duration::from_secs(1), 10, || Ok(pings.answers()))? - before;
        pings.stop(client.machine())?;
        show.fact("echoes after that answer", &format!("{after}, of 50 sent in a second"));
        if client.pings(lab::HTTP_V4) {
            bail!("the deleted device still carries traffic");
        }
        let state = platform.address_state(&device.assigned_ip)?;
        show.fact(&format!("address {}", device.assigned_ip), &state);
        if !state.starts_with("quarantine") {
            bail!("the address of the deleted device is {state}");
        }
        client.down()?;
        show.fact("address after wg-quick down", &client.address_v4()?);
        Ok(())
    })
}

fn stay(show: &mut Show, platform: &Platform, client: &Client, tenant: &Tenant, user: &User) -> Result<()> {
    let device = platform.device(user, "kept running")?;
    client.up(&device.config)?;
    let api = platform.control.machine().expose(format!("{CONTROL_V4}:8080").parse()?)?;
    let enter = client.machine().command("bash");
    let enter: Vec<String> = enter.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect();
    show.title(
        "Everything keeps running until Ctrl-C",
        "A second device is connected; all of it is reachable from this computer:",
    );
    show.fact("API", &format!("http://{api}   (within the lab {})", platform.http.base()));
    show.fact("ADMIN_TOKEN", &platform.admin.token);
    show.fact("API_KEY", &tenant.api_key);
    show.fact("API_SECRET", &tenant.api_secret);
    show.fact("user", &format!("{} / {}", user.email, user.password));
    show.fact("TOKEN", &user.access_token);
    show.fact("device", &format!("{}  {}", device.id, device.assigned_ip));
    show.fact("logs and data", &platform.lab.dir().display().to_string());
    show.line(&format!("a shell on the client:     nsenter {}", enter.join(" ")));
    lab::await_interrupt()
}

fn rate(time: Duration) -> String {
    #[expect(clippy::cast_precision_loss, reason = "for show")]
    let mebibits = LOAD as f64 * 8.0 / 1e6 / time.as_secs_f64();
    format!("{} MiB in {}, {mebibits:.0} Mbit/s", LOAD / MIB, took(time))
}
