//! Measurements that tests and `cargo xtask bench` share.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::{Client, Counters, Platform, Server, Tenant, Up, Usage, User};
use crate::lab::{eventually, quiescent};

/// Several report intervals.
const BILLING_SECONDS: u64 = 60;
const DEVICES_PER_USER: usize = 4;

#[derive(Clone, Copy, Debug)]
pub struct Activation {
    pub p50: Duration,
    pub p99: Duration,
}

/// One device's traffic, by three counts.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    pub billed: Usage,
    pub client: Counters,
    pub server: Counters,
}

/// Time of `POST /api/v1/devices?wait=active`, over `count` devices one after the other.
pub fn activation(platform: &Platform, count: usize) -> Result<Activation> {
    let users = users(platform, "Activation", count)?;
    let mut times = Vec::with_capacity(count);
    for number in 0..count {
        let user = &users[number / DEVICES_PER_USER];
        let answer = platform.http.send(&user.device_request(&format!("device {number}")))?;
        let body = answer.expect(201)?;
        if body["status"] != "active" {
            return Err(anyhow!("device {number} is {}", body["status"]));
        }
        times.push(answer.took);
    }
    times.sort_unstable();
    Ok(Activation { p50: times[count / 2], p99: times[(count * 99 / 100).min(count - 1)] })
}

/// Registrations per second with `at_once` callers.
pub fn registrations(platform: &Platform, count: usize, at_once: usize) -> Result<f64> {
    let users = users(platform, "Registrations", count)?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..at_once)
            .map(|caller| {
                let users = &users;
                scope.spawn(move || {
                    (caller..count).step_by(at_once).try_for_each(|number| {
                        let mut request = users[number / DEVICES_PER_USER].device_request(&format!("device {number}"));
                        request.path = "/api/v1/devices".to_owned();
                        platform.http.send(&request)?.expect(201).map(drop)
                    })
                })
            })
            .collect();
        callers.into_iter().try_for_each(|caller| caller.join().map_err(|_| anyhow!("a caller panicked"))?)
    })?;
    #[expect(clippy::cast_precision_loss, reason = "a figure to look at")]
    let count = count as f64;
    Ok(count / started.elapsed().as_secs_f64())
}

/// The traffic of a device that carried it as fast as it could, and how its tunnel came up.
#[derive(Clone, Copy, Debug)]
pub struct Metering {
    pub up: Up,
    pub account: Account,
}

/// Carries `bytes` each way slowly, so that hardly anything is lost, and demands that bill, server's kernel and client's kernel
/// agree to the byte on what that was, but for packets that were lost between the two machines. Nothing else may use the server, and the tenant has no other client.
pub fn exact(platform: &Platform, server: &Server, client: &Client, tenant: &Tenant, bytes: u64) -> Result<Account> {
    client.silence()?;
    let billed_before =
        platform.bill_where(tenant, |billed| billed.check_against(server.counters_on_wire()?, client.counters()?))?;
    let (client_before, server_before) = (client.counters()?, server.tally()?);
    client.carry_slowly(bytes)?;
    let since = |billed: Usage| -> Result<Account> {
        Ok(Account {
            billed: billed - billed_before,
            client: client.counters()? - client_before,
            server: server.tally()?.on_wire_since(server_before),
        })
    };
    let billed = platform.bill_where(tenant, |billed| {
        let account = since(billed)?;
        account.billed.equals(account.server, account.client)
    })?;
    since(billed)
}

/// Carries `bytes` each way for a tenant of its own, and returns the settled counts. Nothing else may use the server.
pub fn metering(platform: &Platform, server: &Server, bytes: u64) -> Result<Metering> {
    let tenant = platform.tenant("Metering")?;
    let user = platform.user(&tenant, "meter@example.com")?;
    let device = platform.device(&user, "meter")?;
    let client = platform.client(240)?;
    let before = server.tally()?;
    let up = client.up(&device.config)?;
    client.download(bytes)?;
    client.upload(bytes)?;
    client.silence()?;
    let billed = platform.bill_where(&tenant, |billed| {
        billed.check_against(server.tally()?.on_wire_since(before), client.counters()?)
    })?;
    let account = Account { billed, client: client.counters()?, server: server.tally()?.on_wire_since(before) };
    client.down()?;
    Ok(Metering { up, account })
}

impl Platform {
    /// What a tenant is billed.
    pub fn usage(&self, tenant: &Tenant) -> Result<Usage> {
        Usage::from_body(&self.http.send(&tenant.usage_request())?.expect(200)?)
    }

    /// What a tenant is billed, once `right` finds nothing wrong with it and it has stayed so for three seconds.
    pub fn bill_where(&self, tenant: &Tenant, right: impl Fn(Usage) -> Result<()>) -> Result<Usage> {
        let read = || -> Result<Usage> {
            let billed = self.usage(tenant)?;
            right(billed).map(|()| billed)
        };
        eventually("the bill is right", BILLING_SECONDS, read)?;
        let billed = quiescent("the bill", Duration::from_secs(3), BILLING_SECONDS, || self.usage(tenant))?;
        right(billed).context("after it had been right")?;
        Ok(billed)
    }
}

fn users(platform: &Platform, name: &str, devices: usize) -> Result<Vec<User>> {
    let tenant = platform.tenant(name)?;
    (0..devices.div_ceil(DEVICES_PER_USER))
        .map(|number| platform.user(&tenant, &format!("user{number}@example.com")))
        .collect()
}
