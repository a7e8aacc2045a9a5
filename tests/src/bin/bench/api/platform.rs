//! A control plane with a PostgreSQL of its own (`dev`), and the superuser's door to its database.

use std::cell::Cell;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::load::{Connection, request};

const START: Duration = Duration::from_secs(60);
const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";

pub(crate) struct Platform {
    pub(crate) address: SocketAddr,
    folder: PathBuf,
    program: PathBuf,
    process: Child,
    /// Made so far.
    servers: Cell<u8>,
}

pub(crate) struct Tenant {
    pub(crate) id: String,
    pub(crate) key: String,
    pub(crate) secret: String,
}

/// One who registers devices and reads.
#[derive(Clone)]
pub(crate) struct User {
    pub(crate) key: String,
    pub(crate) bearer: String,
}

impl User {
    pub(crate) fn headers(&self) -> [(&str, &str); 2] {
        [("x-api-key", &self.key), ("authorization", &self.bearer)]
    }
}

impl Platform {
    /// No rate limit is taken away: those of the tenants are raised.
    pub(crate) async fn start() -> Result<Self> {
        Self::begin("first", &[]).await
    }

    /// Another one, with settings of its own.
    pub(crate) async fn second(settings: &[(&str, &str)]) -> Result<Self> {
        Self::begin("second", settings).await
    }

    async fn begin(name: &str, settings: &[(&str, &str)]) -> Result<Self> {
        let bin = std::env::var_os("CVAULT_BIN_DIR").context("CVAULT_BIN_DIR is set by `cargo xtask bench`")?;
        let program = Path::new(&bin).join("cvault-control-plane");
        let folder = std::env::temp_dir().join(format!("cvault-bench-api-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let [address, nodes] = free_ports()?;
        let log = std::fs::File::create(folder.join("log"))?;
        let process = Command::new(&program)
            .args(["dev", "--data-dir"])
            .arg(folder.join("data"))
            .args(["--listen", &address.to_string(), "--node-listen", &nodes.to_string()])
            .envs(settings.iter().copied())
            .env("CVAULT_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut platform = Self { address, folder, program, process, servers: Cell::new(1) };
        platform.ready().await?;
        Ok(platform)
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            if let Ok(mut connection) = Connection::open(self.address).await
                && connection.send(&request("GET", "/health/ready", &[], None)).await.is_ok_and(|a| a.status == 200)
            {
                return Ok(());
            }
            if let Some(status) = self.process.try_wait()? {
                bail!("the control plane has ended ({status}): {}", std::fs::read_to_string(self.folder.join("log"))?);
            }
            if Instant::now() > deadline {
                bail!("the control plane is not ready after {} s", START.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Statements of the superuser; the rows as psql prints them, fields between `|`.
    pub(crate) fn sql(&self, statements: &str) -> Result<String> {
        let output = Command::new(format!("{PROGRAMS}/psql"))
            .args(["-X", "-q", "-t", "-A", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "cvault", "-h"])
            .arg(self.sockets()?)
            .args(["-c", statements])
            .output()
            .context("start psql")?;
        if !output.status.success() {
            bail!("psql: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// Where this cluster listens: the fifth line of its lock file.
    fn sockets(&self) -> Result<String> {
        let mut folders = vec![self.folder.join("data")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder)?.flatten() {
                let path = entry.path();
                if path.ends_with("postmaster.pid") {
                    let text = std::fs::read_to_string(path)?;
                    return Ok(text.lines().nth(4).context("postmaster.pid is short")?.to_owned());
                }
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        bail!("no postmaster.pid below {}", self.folder.display())
    }

    /// Commits a second that one session could make on this disk (`pg_test_fsync`, fdatasync of 8 kB).
    pub(crate) fn fsyncs_per_second(&self) -> Result<f64> {
        let output = Command::new(format!("{PROGRAMS}/pg_test_fsync"))
            .args(["-s", "1", "-f"])
            .arg(self.folder.join("fsync"))
            .output()
            .context("start pg_test_fsync")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let line =
            text.lines().find(|line| line.trim_start().starts_with("fdatasync")).context("no fdatasync figure")?;
        Ok(line.split_whitespace().nth(1).context("no fdatasync figure")?.parse()?)
    }

    fn admin(&self, arguments: &[&str]) -> Result<Value> {
        let output = Command::new(&self.program)
            .args(["admin", "--data-dir"])
            .arg(self.folder.join("data"))
            .arg("--json")
            .args(arguments)
            .output()?;
        if !output.status.success() {
            bail!("admin {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    pub(crate) fn pool(&self, name: &str, v4: &str, v6: &str) -> Result<()> {
        self.admin(&["pool", "create", "--name", name, "--v4", v4, "--v6", v6]).map(drop)
    }

    /// A region with a server for each of these pools.
    pub(crate) fn region(&self, region: &str, pools: &[&str]) -> Result<()> {
        pools.iter().enumerate().try_for_each(|(number, pool)| self.server(region, &format!("{region}-{number}"), pool))
    }

    /// A server that looks enrolled and alive for a day: there is no agent behind it, so nothing is acknowledged.
    fn server(&self, region: &str, name: &str, pool: &str) -> Result<()> {
        let ip = format!("203.0.113.{}", self.servers.replace(self.servers.get() + 1));
        let made = self.admin(&[
            "server",
            "create",
            "--name",
            name,
            "--region",
            region,
            "--public-ip",
            &ip,
            "--pool",
            pool,
            "--capacity",
            "65533",
        ])?;
        let id = made["server_id"].as_str().context("no server id")?;
        let digits = decode_id(id)?;
        self.sql(&format!(
            "update platform.servers set last_seen_at = now() + interval '1 day',
                 public_key = sha256(convert_to('{name}', 'UTF8')), identity_pin = sha256(convert_to('{name}', 'UTF8'))
             where server_id = '{digits}'"
        ))
        .map(drop)
    }

    pub(crate) async fn tenant(&self, name: &str, per_minute: u32) -> Result<Tenant> {
        let token = self.admin(&["token"])?;
        let bearer = format!("Bearer {}", token["token"].as_str().context("no token")?);
        let body = json!({"name": name, "max_devices_per_user": 1000, "rate_limit_per_minute": per_minute}).to_string();
        let call = request("POST", "/admin/tenants", &[("authorization", &bearer)], Some(&body));
        let made = self.json(&call, 201).await?;
        let text = |name: &str| made[name].as_str().map(str::to_owned).context("no such field");
        Ok(Tenant { id: text("id")?, key: text("api_key")?, secret: text("api_secret")? })
    }

    /// Registered as people are, with a password.
    pub(crate) async fn users(&self, tenant: &Tenant, count: usize) -> Result<Vec<User>> {
        let one = async |number: usize| -> Result<User> {
            let body = json!({"email": email(number), "password": PASSWORD}).to_string();
            let headers = [("x-api-key", tenant.key.as_str()), ("x-api-secret", tenant.secret.as_str())];
            let made = self.json(&request("POST", "/api/v1/auth/register", &headers, Some(&body)), 201).await?;
            let token = made["access_token"].as_str().context("no access token")?;
            Ok(User { key: tenant.key.clone(), bearer: format!("Bearer {token}") })
        };
        let mut users = Vec::new();
        let numbers: Vec<usize> = (0..count).collect();
        for some in numbers.chunks(4) {
            for user in futures::future::join_all(some.iter().map(|number| one(*number))).await {
                users.push(user?);
            }
        }
        Ok(users)
    }

    /// As many more as a backend vouches for, `<name>-0` and so on, or again: without a password, so that thousands are there in
    /// seconds.
    pub(crate) async fn vouched(&self, tenant: &Tenant, name: &str, count: usize) -> Result<Vec<User>> {
        let headers = [("x-api-key", tenant.key.as_str()), ("x-api-secret", tenant.secret.as_str())];
        let mut connection = Connection::open(self.address).await?;
        let mut users = Vec::with_capacity(count);
        for number in 0..count {
            let call = request("POST", &format!("/api/v1/users/{name}-{number}/login-token"), &headers, Some("{}"));
            let answer = connection.send(&call).await?;
            if ![200, 201].contains(&answer.status) {
                bail!("{} instead of 201, or 200: {}", answer.status, String::from_utf8_lossy(&answer.body));
            }
            let made: Value = serde_json::from_slice(&answer.body)?;
            let token = made["access_token"].as_str().context("no access token")?;
            users.push(User { key: tenant.key.clone(), bearer: format!("Bearer {token}") });
        }
        Ok(users)
    }

    pub(crate) async fn json(&self, call: &[u8], status: u16) -> Result<Value> {
        let answer = Connection::open(self.address).await?.send(call).await?;
        if answer.status != status {
            bail!("{} instead of {status}: {}", answer.status, String::from_utf8_lossy(&answer.body));
        }
        Ok(serde_json::from_slice(&answer.body)?)
    }
}

pub(crate) const PASSWORD: &str = "correct horse battery staple";

pub(crate) fn email(number: usize) -> String {
    format!("user-{number}@example.com")
}

impl Drop for Platform {
    fn drop(&mut self) {
        // `dev` stops its PostgreSQL at SIGTERM
        if let Some(pid) = rustix::process::Pid::from_raw(self.process.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Held at the same time, so that they are two.
fn free_ports() -> Result<[SocketAddr; 2]> {
    let [one, other] = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
    Ok([one.local_addr()?, other.local_addr()?])
}

/// The UUID in an id: Crockford base32 after the prefix.
pub(crate) fn decode_id(id: &str) -> Result<String> {
    let (_, digits) = id.split_once('_').context("an id has a prefix")?;
    let value = digits.bytes().try_fold(0_u128, |value, byte| {
        let digit = b"0123456789abcdefghjkmnpqrstvwxyz".iter().position(|letter| *letter == byte)?;
        Some(value * 32 + digit as u128)
    });
    Ok(format!("{:032x}", value.context("no id")?))
}
