//! A tenant's policy reaches traffic that flows, and its limit holds to the byte, whatever dies. Another tenant notices nothing.

use anyhow::{Result, anyhow, ensure};
use cvault_tests::lab::{HTTP_V4, eventually};
use cvault_tests::platform::{Client, ControlOptions, Device, Platform, Server, Tenant, uapi};
use cvault_tests::tunnel::Account;
use serde_json::{Value, json};

const INTERFACE: &str = "cv0";
/// A private address behind the server, on the lab's internet.
const PRIVATE: &str = "10.99.0.1";
const METADATA: &str = "169.254.169.254";
/// Less than the smallest limit that the API takes, to be reached in seconds.
const LIMIT_BYTES: u64 = 5_000_000;
const ECHO_BYTES: u64 = 1028;
const IP_AND_ICMP_HEADERS: u64 = 28;

struct Member {
    tenant: Tenant,
    device: Device,
    client: Client,
}

fn member(platform: &Platform, name: &str, number: u8) -> Result<Member> {
    let tenant = platform.tenant(name)?;
    join(platform, tenant, number)
}

fn join(platform: &Platform, tenant: Tenant, number: u8) -> Result<Member> {
    let user = platform.user(&tenant, &format!("user{number}@example.com"))?;
    let device = platform.device(&user, "laptop")?;
    let client = platform.client(number)?;
    client.up(&device.config)?;
    Ok(Member { tenant, device, client })
}

fn patch(platform: &Platform, tenant: &Tenant, changes: &Value) -> Result<Value> {
    platform.http.send(&platform.admin.update_tenant_request(tenant, changes))?.expect(200)
}

/// The sum of a figure of the engine.
fn figure(server: &Server, name: &str) -> Result<u64> {
    let text = uapi(server.machine(), INTERFACE, "get=1\n\n")?;
    Ok(text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')?.parse::<u64>().ok()).sum())
}

/// Nobody takes mail there, and says so.
fn reaches_mail(member: &Member) -> Result<bool> {
    let dial = format!("timeout 2 bash -c 'exec 3<>/dev/tcp/{HTTP_V4}/25' 2>&1 || true");
    Ok(member.client.machine().sh(&dial)?.contains("refused"))
}

fn holds(what: &str, condition: impl Fn() -> bool) -> Result<()> {
    eventually(what, 10, || if condition() { Ok(()) } else { Err(anyhow!("not yet")) })
}

#[test]
fn a_change_of_policy_reaches_traffic_that_flows() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    change_policies(&platform).inspect_err(|_| platform.lab.print_logs()).unwrap();
    platform.check_logs_hold_no_secret().unwrap();
}

fn change_policies(platform: &Platform) -> Result<()> {
    let server = platform.server(1)?;
    platform.lab.internet().sh(&format!("ip addr add {PRIVATE}/32 dev lo && ip addr add {METADATA}/32 dev lo"))?;
    let acme = member(platform, "Acme", 1)?;
    let tenant = acme.tenant.clone();
    let colleague = join(platform, tenant.clone(), 2)?;
    let globex = member(platform, "Globex", 3)?;
    let undisturbed = globex.client.start_pings(HTTP_V4)?;
    undisturbed.wait_for(10)?;
    let [theirs, foreign] = [&colleague, &globex].map(|member| member.device.addresses().remove(0));

    // other devices
    ensure!(!acme.client.pings(&theirs), "devices of a tenant reach each other by default");
    patch(platform, &tenant, &json!({ "policy": { "allow_intra_tenant": true } }))?;
    holds("devices of the tenant reach each other", || acme.client.pings(&theirs))?;
    ensure!(!acme.client.pings(&foreign), "a device of another tenant was reached");
    patch(platform, &tenant, &json!({ "policy": { "allow_intra_tenant": false } }))?;
    holds("they no longer do", || !acme.client.pings(&theirs))?;

    // destinations
    ensure!(!acme.client.pings(PRIVATE) && server.dropped("destination")? > 0, "a private address was reached");
    patch(platform, &tenant, &json!({ "policy": { "allow_private_destinations": ["10.99.0.0/16"] } }))?;
    holds("the private address is reached", || acme.client.pings(PRIVATE))?;
    ensure!(!globex.client.pings(PRIVATE), "another tenant's device reached it too");
    ensure!(!acme.client.pings(METADATA), "the metadata address was reached");
    let refused = json!({ "policy": { "allow_private_destinations": [format!("{METADATA}/32")] } });
    let answer = platform.http.send(&platform.admin.update_tenant_request(&tenant, &refused))?;
    ensure!(answer.status == 422 || answer.status == 400, "{}", answer.text());
    let own = server.machine().sh("ip -o -4 addr show up0 | awk '{ split($4, a, \"/\"); print a[1] }'")?;
    let before = server.dropped("destination")?;
    ensure!(!acme.client.pings(own.trim()), "the server itself was reached at {own}");
    ensure!(server.dropped("destination")? > before, "who else kept {own} from answering?");

    // mail
    let before = server.dropped("port")?;
    ensure!(!reaches_mail(&acme)?, "tenants send no mail by default");
    ensure!(server.dropped("port")? > before, "who else kept the mail back?");
    patch(platform, &tenant, &json!({ "policy": { "allow_smtp": true } }))?;
    eventually("mail is let through", 10, || {
        ensure!(reaches_mail(&acme)?);
        Ok(())
    })?;
    ensure!(!reaches_mail(&globex)?, "another tenant's device sent mail too");

    // rates
    let before = server.dropped("tx_rate_limited")?;
    patch(platform, &tenant, &json!({ "policy": { "device_rate_down_mbps": 20, "rate_up_mbps": 50 } }))?;
    eventually("both devices have a rate", 10, || {
        let sum = figure(&server, "cvault_rate_down")?;
        ensure!(sum == 40_000_000, "{sum}");
        Ok(())
    })?;
    acme.client.download(5_000_000)?;
    ensure!(server.dropped("tx_rate_limited")? > before, "nothing was too fast");
    eventually("the control plane knows what was dropped of the device", 60, || {
        let drops = platform.control.sql("select drops from platform.device_drops where drops ? 'tx_rate_limited'")?;
        ensure!(drops.lines().count() == 1, "{drops}");
        Ok(())
    })?;
    patch(platform, &tenant, &json!({ "policy": { "device_rate_down_mbps": null, "rate_up_mbps": null } }))?;
    eventually("there is no rate any more", 10, || {
        ensure!(figure(&server, "cvault_rate_down")? == 0);
        Ok(())
    })?;
    undisturbed.wait_for(10)?;
    let count = undisturbed.stop(globex.client.machine())?;
    ensure!(count.lost() == 0, "of another tenant's {} echoes {} were lost", count.sent, count.lost());
    Account::settled(server.machine(), INTERFACE)?.agrees()
}

#[test]
fn a_limit_holds_to_the_byte_though_agent_and_control_plane_are_killed() {
    let platform = Platform::start(ControlOptions::default()).unwrap();
    use_up(&platform).inspect_err(|_| platform.lab.print_logs()).unwrap();
    platform.check_logs_hold_no_secret().unwrap();
}

fn use_up(platform: &Platform) -> Result<()> {
    let mut server = platform.server(1)?;
    let acme = member(platform, "Acme", 1)?;
    let globex = member(platform, "Globex", 2)?;
    let undisturbed = globex.client.start_pings(HTTP_V4)?;
    undisturbed.wait_for(10)?;
    platform.control.sql(&format!(
        "update cvault.tenants set bandwidth_limit_bytes = {LIMIT_BYTES}, policy_revision = policy_revision + 1
         where name = 'Acme'"
    ))?;
    eventually("the device has a lease", 20, || {
        ensure!(figure(&server, "cvault_lease")? > 0);
        Ok(())
    })?;
    let size = (ECHO_BYTES - IP_AND_ICMP_HEADERS).to_string();
    let flood = acme.client.machine().spawn("flood", "ping", ["-n", "-i", "0.002", "-s", &size, HTTP_V4], [])?;
    let comes_to_its_end = |server: &Server, what: &str| {
        let before = server.dropped("lease_ended")?;
        eventually(what, 60, || {
            ensure!(server.dropped("lease_ended")? > before + 20);
            Ok(())
        })
    };
    let goes_on = |server: &Server, what: &str| {
        let before = figure(server, "cvault_lease")?;
        eventually(what, 60, || {
            ensure!(figure(server, "cvault_lease")? > before);
            Ok(())
        })
    };
    server.kill_agent()?;
    comes_to_its_end(&server, "without an agent the lease ends at its number")?;
    server.start_agent()?;
    goes_on(&server, "with an agent the traffic goes on")?;
    platform.control.kill()?;
    comes_to_its_end(&server, "without a control plane the lease ends at its number")?;
    ensure!(figure(&server, "cvault_lease")? < LIMIT_BYTES, "the limit was leased before the control plane died");
    platform.control.restart(&platform.http)?;
    goes_on(&server, "with a control plane the traffic goes on")?;
    eventually("the limit is leased", 60, || {
        ensure!(figure(&server, "cvault_lease")? == LIMIT_BYTES, "{}", figure(&server, "cvault_lease")?);
        Ok(())
    })?;
    comes_to_its_end(&server, "the month is used up")?;
    flood.end(acme.client.machine(), cvault_tests::lab::Signal::Interrupt)?;
    acme.client.silence()?;
    let billed = platform.bill_where(&acme.tenant, |billed| {
        ensure!(billed.total() <= LIMIT_BYTES, "{billed:?} is more than the limit");
        ensure!(billed.total() + ECHO_BYTES > LIMIT_BYTES, "another echo would have fitted into {billed:?}");
        Ok(())
    })?;
    // the last bytes: one packet of exactly so many, of which no answer fits
    let left = LIMIT_BYTES - billed.total();
    if left >= IP_AND_ICMP_HEADERS {
        let size = (left - IP_AND_ICMP_HEADERS).to_string();
        acme.client.machine().sh(&format!("ping -n -c1 -W1 -s {size} {HTTP_V4} || true"))?;
        platform.bill_where(&acme.tenant, |billed| {
            ensure!(billed.total() == LIMIT_BYTES, "{billed:?} is not the limit");
            Ok(())
        })?;
    }
    ensure!(!acme.client.pings(HTTP_V4), "an echo beyond the limit was answered");

    let count = undisturbed.stop(globex.client.machine())?;
    ensure!(count.lost() == 0, "of another tenant's {} echoes {} were lost", count.sent, count.lost());
    globex.client.silence()?;
    // the witness: the kernel's counters of the tunnel's interface
    let other = platform.bill_where(&globex.tenant, |_| Ok(()))?;
    let billed = platform.usage(&acme.tenant)?;
    let kernel = server.counters()?;
    let refused = figure(&server, "cvault_dropped_bytes_tx_lease_ended")?;
    ensure!(billed.rx + other.rx == kernel.rx_bytes, "{billed:?}, {other:?}, {kernel:?}");
    let sent = kernel.tx_bytes - refused - figure(&server, "cvault_dropped_bytes_tx_no_route")?;
    ensure!(billed.tx + other.tx == sent, "{billed:?}, {other:?}, {kernel:?}, {refused} refused");
    ensure!(billed.total() <= LIMIT_BYTES);
    Ok(())
}
