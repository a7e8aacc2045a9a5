//! What is measured, in order: each measure leaves what the next one needs.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use cvault_tests::bench::{Must, Row, median};
use serde_json::json;

use super::Size;
use super::load::{Load, Pace, request, run};
use super::platform::{PASSWORD, Platform, Tenant, User, decode_id, email};

/// So high that the limiter works and nobody meets it.
const UNLIMITED: u32 = 1_000_000;
/// Requests a second that a quiet tenant makes while others make noise.
const QUIET_CLIENTS: usize = 8;
const QUIET_INTERVAL: Duration = Duration::from_millis(40);
const NOISY_LIMIT: u32 = 6_000;
/// A second, of all clients together.
const READS: f64 = 5_000.0;
/// Of the region in which the first run registers.
const SERVERS: u32 = 4;

pub(crate) struct Bench {
    platform: Platform,
    tenant: Tenant,
    people: Vec<User>,
    size: Size,
    rows: Vec<Row>,
    /// Devices that answers have promised.
    promised: u64,
    runs: u64,
}

impl Bench {
    pub(crate) async fn start(size: Size) -> Result<Self> {
        eprintln!("bench: starting a control plane, registering {} users", size.users + size.people);
        let platform = Platform::start().await?;
        platform.pool("wide", "10.64.0.0/10", "fd64::/64")?;
        // a minute's devices are more than one server may have
        for number in 0..SERVERS {
            platform.server_in("one", &format!("one-{number}"), "wide", &format!("203.0.113.{}", 100 + number))?;
        }
        let tenant = platform.tenant("Bench", UNLIMITED).await?;
        platform.users(&tenant, size.users).await?;
        let people = platform.vouched(&tenant, size.people).await?;
        Ok(Self { platform, tenant, people, size, rows: Vec::new(), promised: 0, runs: 0 })
    }

    pub(crate) async fn all(&mut self, only: &[String]) -> Result<Vec<Row>> {
        let wanted = |name: &str| only.is_empty() || only.iter().any(|one| one == name);
        let fsyncs = self.platform.fsyncs_per_second()?;
        self.figure("fdatasync", "1/s", fsyncs, None);
        if wanted("registrations") {
            self.registrations().await?;
        }
        if wanted("pool") {
            self.nearly_full_pool().await?;
        }
        if wanted("reads") {
            self.reads().await?;
        }
        if wanted("isolation") {
            self.isolation().await?;
        }
        if wanted("noise") {
            self.noise().await?;
        }
        if wanted("logins") {
            self.logins().await?;
        }
        Ok(std::mem::take(&mut self.rows))
    }

    fn figure(&mut self, measure: &str, unit: &str, ours: f64, must: Option<Must>) {
        let row = Row { must, judged: self.size.judged, ..Row::figure(measure, unit, ours) };
        eprintln!("bench: {}", super::line(&row));
        self.rows.push(row);
    }

    fn beside(&mut self, measure: &str, unit: &str, ours: f64, beside: (&str, f64), must: Must) {
        let (peer, figure) = beside;
        let row = Row {
            must: Some(must),
            judged: self.size.judged,
            peer: Some(peer.to_owned()),
            peer_figure: Some(figure),
            ..Row::figure(measure, unit, ours)
        };
        eprintln!("bench: {}", super::line(&row));
        self.rows.push(row);
    }

    /// Registers for a while; every answer is a device, and no two have the same address or key.
    async fn register(&mut self, time: Duration, region: &str) -> Result<Load> {
        self.runs += 1;
        let (people, clients, prefix) = (&self.people, self.size.clients, self.runs);
        let per_client = (people.len() / clients).max(1);
        let load = run(self.platform.address, clients, time, Pace::Closed, |client, number| {
            // each client goes through its own people
            let user =
                &people[(client * per_client + usize::try_from(number).unwrap_or(0) % per_client) % people.len()];
            let body = json!({"device_name": format!("{prefix}-{client}-{number}"), "server_region": region});
            request("POST", "/api/v1/devices", &user.headers(), Some(&body.to_string()))
        })
        .await?;
        self.promised += u64::try_from(load.latencies.len())?;
        self.count()?;
        Ok(load)
    }

    fn count(&self) -> Result<()> {
        let counts = self.platform.sql(
            "select count(*), count(distinct ipv4), count(distinct ipv6), count(distinct public_key),
                    (select sum(peer_count) from platform.servers),
                    (select count(*) from cvault.audit_log where action = 'device.register')
             from cvault.devices where status = 'active'",
        )?;
        let wanted = vec![self.promised.to_string(); 6].join("|");
        if counts != wanted {
            bail!("{} devices were promised; devices, IPv4, IPv6, keys, peers, audit entries: {counts}", self.promised);
        }
        Ok(())
    }

    async fn registrations(&mut self) -> Result<()> {
        let first = self.register(self.size.registering, "one").await?;
        refuse(&first)?;
        self.figure("registrations", "1/s", first.rate(), Some(Must::AtLeast(1000.0)));
        self.figure("registrations_p50", "ms", first.p50().context("nothing registered")?, None);
        self.figure("registrations_p99", "ms", first.p99().context("nothing registered")?, Some(Must::AtMost(100.0)));
        if self.size.present > 0 {
            // neither past the end of its server
            let time = Duration::from_secs_f64(50_000.0 / first.rate() / 1.5).min(self.size.short);
            self.platform.server("few", "wide", "203.0.113.6")?;
            let few = self.register(time, "few").await?;
            refuse(&few)?;
            self.fill_server()?;
            let full = self.register(time, "two").await?;
            refuse(&full)?;
            let beside = ("with few devices", few.rate());
            self.beside("registrations_65000_present", "1/s", full.rate(), beside, Must::TimesAtLeast(0.9));
        }
        Ok(())
    }

    /// Peers and addresses of devices that nobody registered: what the next registration meets is the same. The server's
    /// own count stays what it runs, so that there is room for those that are measured.
    fn fill_server(&self) -> Result<()> {
        self.platform.pool("crowded", "10.32.0.0/13", "fd32::/64")?;
        self.platform.server("two", "crowded", "203.0.113.2")?;
        let tenant = decode_id(&self.tenant.id)?;
        self.platform
            .sql(&format!(
                "update platform.address_pools set next_host = {present} + 2 where name = 'crowded';
                 delete from platform.addresses a using platform.address_pools p where a.pool_id = p.pool_id and p.name = 'crowded';
                 insert into platform.addresses (pool_id, host, state, tenant_id, device_id)
                     select pool_id, h, 'allocated', '{tenant}', gen_random_uuid()
                     from platform.address_pools, generate_series(2, {present} + 1) h where name = 'crowded';
                 insert into platform.peers (server_id, device_id, tenant_id, user_id, public_key, preshared_key_hash, ipv4, ipv6, generation)
                     select s.server_id, a.device_id, a.tenant_id, gen_random_uuid(), sha256(uuid_send(a.device_id)),
                            decode(repeat('00', 32), 'hex'), host(p.ipv4::inet + a.host)::inet, host(p.ipv6::inet + a.host)::inet, 1
                     from platform.addresses a join platform.address_pools p using (pool_id) join platform.servers s using (pool_id)
                     where p.name = 'crowded';
                 analyze platform.peers; analyze platform.addresses; analyze cvault.devices",
                present = self.size.present
            ))
            .map(drop)
    }

    /// A pool of which one address in a hundred is left.
    async fn nearly_full_pool(&mut self) -> Result<()> {
        self.platform.server("room", "wide", "203.0.113.4")?;
        let base = self.register(self.size.short, "room").await?;
        refuse(&base)?;
        self.platform.pool("full", "10.16.0.0/13", "fd16::/64")?;
        self.platform.server("full", "full", "203.0.113.3")?;
        let last = (1_u32 << 19) - 2;
        let taken = last - last / 100;
        let tenant = decode_id(&self.tenant.id)?;
        self.platform.sql(&format!(
            "select from platform.address_pools where name = 'full' for no key update;
             insert into platform.addresses (pool_id, host, state, tenant_id, device_id)
                 select pool_id, h, 'allocated', '{tenant}', gen_random_uuid()
                 from platform.address_pools, generate_series(2, {taken}) h where name = 'full';
             update platform.address_pools set next_host = {taken} + 1 where name = 'full';
             analyze platform.addresses; checkpoint"
        ))?;
        // not to the last one: what is answered then is no registration
        let time = Duration::from_secs_f64(f64::from(last - taken) * 0.7 / base.rate()).min(self.size.short);
        let load = self.register(time, "full").await?;
        refuse(&load)?;
        let beside = ("a pool with room", base.rate());
        self.beside("registrations_pool_99_percent", "1/s", load.rate(), beside, Must::TimesAtLeast(0.9));
        Ok(())
    }

    async fn reads(&mut self) -> Result<()> {
        let load = self.read(Pace::Closed).await?;
        self.figure("reads", "1/s", load.rate(), Some(Must::AtLeast(READS)));
        self.figure("reads_p99", "ms", p99(&load)?, Some(Must::AtMost(20.0)));
        // not as many as there can be, but as many as there must be
        let clients = u32::try_from(self.size.clients)?;
        let paced = self.read(Pace::Every(Duration::from_secs_f64(f64::from(clients) / READS))).await?;
        self.figure("reads_p99_at_5000", "ms", p99(&paced)?, Some(Must::AtMost(20.0)));
        Ok(())
    }

    async fn read(&self, pace: Pace) -> Result<Load> {
        let people = &self.people;
        let load = run(self.platform.address, self.size.clients, self.size.short, pace, |client, number| {
            reading(&people[client % people.len()], number)
        })
        .await?;
        refuse(&load)?;
        Ok(load)
    }

    /// The same path with the policies of the tenant tables off and the context believed as it stands, interleaved.
    async fn isolation(&mut self) -> Result<()> {
        for number in 0..SERVERS {
            let (name, ip) = (format!("isolation-{number}"), format!("203.0.113.{}", 120 + number));
            self.platform.server_in("isolation", &name, "wide", &ip)?;
        }
        let tables = "select format('alter table cvault.%I %s row level security', c.relname, '{}')
                      from pg_class c join pg_namespace n on n.oid = c.relnamespace
                      where n.nspname = 'cvault' and c.relkind in ('r', 'p')";
        let signed = self.platform.sql("select pg_get_functiondef('cvault.tenant_id'::regproc)")?;
        let believed = "create or replace function cvault.tenant_id() returns uuid language sql stable security definer
             set search_path = pg_catalog, pg_temp
             as $$ select nullif(split_part(current_setting('app.ctx', true), '.', 1), '')::uuid $$";
        let switch = |platform: &Platform, on: bool| -> Result<()> {
            let statements = platform.sql(&tables.replace("{}", if on { "enable" } else { "disable" }))?;
            let statements: Vec<&str> = statements.lines().collect();
            let function = if on { signed.as_str() } else { believed };
            platform.sql(&format!("{}; {function}", statements.join("; "))).map(drop)
        };
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            switch(&self.platform, false)?;
            let run = self.register_for_isolation().await;
            switch(&self.platform, true)?;
            without.push(run?);
            with.push(self.register_for_isolation().await?);
        }
        let milliseconds = |rates: &[f64]| median(rates).map(|rate| 1e3 / rate).context("nothing registered");
        let (ours, bare) = (milliseconds(&with)?, milliseconds(&without)?);
        self.beside(
            "registration_with_isolation",
            "ms each",
            ours,
            ("without policies and signature", bare),
            Must::TimesAtMost(1.15),
        );
        Ok(())
    }

    async fn register_for_isolation(&mut self) -> Result<f64> {
        let load = self.register(self.size.short.min(Duration::from_secs(5)), "isolation").await?;
        refuse(&load)?;
        Ok(load.rate())
    }

    /// A steady trickle of reads of one tenant, alone and beside one that asks ten times what it may.
    async fn noise(&mut self) -> Result<()> {
        let noisy = self.platform.tenant("Noisy", NOISY_LIMIT).await?;
        let noisy = self.platform.users(&noisy, 1).await?;
        let alone = self.trickle().await?;
        let interval = Duration::from_secs_f64(64.0 / (f64::from(NOISY_LIMIT) / 60.0 * 10.0));
        let noise = run(self.platform.address, 64, self.size.short, Pace::Every(interval), |_, number| {
            reading(&noisy[0], number)
        });
        let (noise, beside) = tokio::join!(noise, self.trickle());
        if noise?.refused.iter().any(|status| *status != 429) {
            bail!("the noisy tenant was refused with something else than 429");
        }
        let (alone, beside) = (p99(&alone)?, p99(&beside?)?);
        self.beside("reads_p99_beside_noisy_tenant", "ms", beside, ("alone", alone), Must::TimesAtMost(1.3));
        Ok(())
    }

    /// Passwords checked as fast as they can be, and what everybody else feels of it.
    async fn logins(&mut self) -> Result<()> {
        let alone = self.trickle().await?;
        let tenant = &self.tenant;
        let users = self.size.users;
        let flood =
            run(self.platform.address, 32, self.size.short, Pace::Closed, |client, _| login(tenant, client % users));
        let (flood, beside) = tokio::join!(flood, self.trickle());
        let flood = flood?;
        if flood.refused.iter().any(|status| *status != 503) {
            bail!("logins were refused with something else than 503: {:?}", flood.refused);
        }
        let (alone, beside) = (p99(&alone)?, p99(&beside?)?);
        self.figure("logins_bcrypt", "1/s", flood.rate(), None);
        self.beside("reads_p99_beside_bcrypt_logins", "ms", beside, ("alone", alone), Must::TimesAtMost(2.0));
        self.guides_load_test().await
    }

    /// The guide's: a hundred users log in once a second.
    async fn guides_load_test(&mut self) -> Result<()> {
        const USERS: usize = 100;
        let platform = Platform::second(&[("CVAULT_PASSWORD_HASH", "argon2id")]).await?;
        let tenant = platform.tenant("Guide", UNLIMITED).await?;
        platform.users(&tenant, USERS).await?;
        let hashed = platform.sql("select left(password_hash, 9) from cvault.users limit 1")?;
        if hashed != "$argon2id" {
            bail!("CVAULT_PASSWORD_HASH=argon2id made hashes of another kind");
        }
        let load = run(platform.address, USERS, self.size.short, Pace::Every(Duration::from_secs(1)), |client, _| {
            login(&tenant, client)
        })
        .await?;
        self.figure("logins_100_users_argon2id_p99", "ms", p99(&load)?, Some(Must::AtMost(500.0)));
        let failed = f64::from(u32::try_from(load.refused.len())?);
        self.figure("logins_100_users_argon2id_failed", "answers", failed, Some(Must::AtMost(0.0)));
        Ok(())
    }

    async fn trickle(&self) -> Result<Load> {
        let people = &self.people;
        let load = run(
            self.platform.address,
            QUIET_CLIENTS,
            self.size.short,
            Pace::Every(QUIET_INTERVAL),
            |client, number| reading(&people[client], number),
        )
        .await?;
        refuse(&load)?;
        Ok(load)
    }
}

/// Devices, servers and usage in turn.
fn reading(user: &User, number: u64) -> Vec<u8> {
    let path =
        ["/api/v1/devices?limit=20", "/api/v1/servers", "/api/v1/usage"][usize::try_from(number % 3).unwrap_or(0)];
    request("GET", path, &user.headers(), None)
}

fn login(tenant: &Tenant, number: usize) -> Vec<u8> {
    let body = json!({"email": email(number), "password": PASSWORD}).to_string();
    let headers = [("x-api-key", tenant.key.as_str()), ("x-api-secret", tenant.secret.as_str())];
    request("POST", "/api/v1/auth/login", &headers, Some(&body))
}

fn p99(load: &Load) -> Result<f64> {
    load.p99().context("nothing was answered")
}

fn refuse(load: &Load) -> Result<()> {
    match load.refused.first() {
        None => Ok(()),
        Some(status) => bail!("{} requests were refused, the first with {status}", load.refused.len()),
    }
}
