//! A control plane with a tenant of which there is something to see. Ends with its value.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::digits;
use crate::host::{self, Profile};

const PASSWORD: &str = "correct horse battery staple";
/// A session that is used by another program than it was begun with is odd.
pub(super) const AGENT: &str = "schemathesis";
pub(super) const URL: &str = "http://127.0.0.1:18473";
const ADDRESS: &str = "127.0.0.1:18473";
const NODES: &str = "127.0.0.1:18474";
const START: Duration = Duration::from_secs(60);
const OWNER: &str = "owner@example.com";

pub(super) struct Platform {
    process: Child,
    pub(super) folder: PathBuf,
}

/// Signed up for in the portal.
pub(super) struct Tenant {
    id: String,
    key: String,
    secret: String,
}

/// A tenant's user.
pub(super) struct User {
    pub(super) id: String,
    token: String,
}

/// Somebody of a tenant, logged in to the portal.
pub(super) struct Person {
    email: String,
    token: String,
    network: String,
}

impl Platform {
    pub(super) fn start() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("cvault-schemathesis-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let process = Command::new(host::built(Profile::Debug, "cvault-control-plane"))
            .args(["dev", "--listen", ADDRESS, "--node-listen", NODES, "--data-dir"])
            .arg(folder.join("data"))
            .envs([("CVAULT_LOG", "error"), ("CVAULT_ADMIN_STEP_UP", "off")])
            .envs([("CVAULT_PASSWORD_HASH", "argon2id"), ("CVAULT_ARGON2_PASSES", "1")])
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(folder.join("out"))?)
            .spawn()
            .context("start the control plane")?;
        let mut platform = Self { process, folder };
        let deadline = Instant::now() + START;
        while platform.get("/health/ready").is_err() {
            if platform.process.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("the control plane does not start");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(platform)
    }

    /// As `dev` prints it.
    pub(super) fn admin_token(&self) -> Result<String> {
        let printed = std::fs::read_to_string(self.folder.join("out"))?;
        let token = printed.lines().find_map(|line| line.strip_prefix("admin_token="));
        token.map(str::to_owned).context("no admin_token printed")
    }

    /// One without narrow limits, whose programs need no secret.
    pub(super) fn tenant(&self, staff: &str) -> Result<Tenant> {
        let form = json!({"business_name": "T", "email": OWNER, "password": PASSWORD});
        let made = self.post("/api/v1/tenant/auth/signup", &[], &form)?;
        let tenant =
            Tenant { id: text(&made, "tenant_id")?, key: text(&made, "api_key")?, secret: text(&made, "api_secret")? };
        let limits = json!({"rate_limit_per_minute": 1_000_000, "user_rate_limit_per_minute": 1_000_000,
                            "max_devices_per_user": 1_000});
        text(&self.send("PATCH", &format!("/admin/tenants/{}", tenant.id), &[staff], &limits)?, "id")?;
        self.sql("update cvault.tenants set public_clients = true where name = 'T'")?;
        Ok(tenant)
    }

    pub(super) fn user(&self, tenant: &Tenant, name: &str) -> Result<User> {
        let account = json!({"email": format!("{name}@example.com"), "password": PASSWORD});
        let made = self.post("/api/v1/auth/register", &[&tenant.key(), &tenant.secret()], &account)?;
        Ok(User { id: text(&made, "user_id")?, token: text(&made, "access_token")? })
    }

    /// A new one of the user with these credentials.
    pub(super) fn device(&self, headers: &[String]) -> Result<String> {
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let made = self.post("/api/v1/devices", &headers, &json!({"device_name": "d"}))?;
        text(&made, "device_id")
    }

    /// One that looks alive, so that devices can be registered.
    pub(super) fn with_server(&self) -> Result<()> {
        let create = ["server", "create", "--name", "s", "--region", "lab-1", "--public-ip", "203.0.113.10"];
        host::read(
            Command::new(host::built(Profile::Debug, "cvault-control-plane"))
                .args(["admin", "--data-dir"])
                .arg(self.folder.join("data"))
                .args(create),
        )?;
        self.sql(
            "update platform.servers set last_seen_at = now() + interval '1 day',
                 public_key = sha256('s'), identity_pin = sha256('s')",
        )
    }

    fn sql(&self, statement: &str) -> Result<()> {
        let sockets = self.folder.join("data/run").canonicalize()?;
        let mut psql = Command::new("/usr/lib/postgresql/15/bin/psql");
        host::read(psql.args(["-X", "-q", "-U", "postgres", "-d", "cvault", "-c", statement, "-h"]).arg(sockets))
            .map(drop)
    }

    pub(super) fn get(&self, path: &str) -> Result<String> {
        let output = curl().args(["--fail", &format!("{URL}{path}")]).output().context("start curl")?;
        if !output.status.success() {
            bail!("GET {path} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    fn post(&self, path: &str, headers: &[&str], body: &Value) -> Result<Value> {
        self.send("POST", path, headers, body)
    }

    fn log_in(&self, email: &str, network: &str) -> Result<Value> {
        self.post("/api/v1/tenant/auth/login", &[network], &json!({"email": email, "password": PASSWORD}))
    }

    fn send(&self, method: &str, path: &str, headers: &[&str], body: &Value) -> Result<Value> {
        let mut curl = curl();
        curl.args(["-X", method, "-A", AGENT, "-H", "content-type: application/json", "--data", &body.to_string()]);
        for header in headers {
            curl.args(["-H", header]);
        }
        let output = curl.arg(format!("{URL}{path}")).output().context("start curl")?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("{method} {path} answered no JSON"))
    }
}

impl Tenant {
    pub(super) fn key(&self) -> String {
        format!("x-api-key: {}", self.key)
    }

    pub(super) fn secret(&self) -> String {
        format!("x-api-secret: {}", self.secret)
    }

    /// One more, like the owner in everything, who calls from the network that this header names.
    pub(super) fn person(&self, platform: &Platform, network: &str) -> Result<Person> {
        let email = format!("person-{}@example.com", digits(network));
        platform.sql(&format!(
            "insert into cvault.tenant_admins (tenant_id, admin_id, email, password_hash, role)
             select tenant_id, gen_random_uuid(), '{email}', password_hash, role from cvault.tenant_admins
             where email = '{OWNER}'"
        ))?;
        let network = network.to_owned();
        let login = platform.log_in(&email, &network)?;
        Ok(Person { email, token: text(&login["tokens"], "access_token")?, network })
    }
}

impl User {
    pub(super) fn bearer(&self) -> String {
        format!("authorization: Bearer {}", self.token)
    }
}

impl Person {
    pub(super) fn bearer(&self) -> String {
        format!("authorization: Bearer {}", self.token)
    }

    /// The id of something of theirs that stands for this name in a path.
    pub(super) fn thing(&self, platform: &Platform, name: &str) -> Result<String> {
        let (bearer, network) = (self.bearer(), self.network.as_str());
        match name {
            "session_id" => text(&platform.log_in(&self.email, network)?, "session_id"),
            "challenge_id" => {
                let password = json!({"password": "another fine password"});
                let refused = platform.post("/api/v1/tenant/auth/password", &[&bearer, network], &password)?;
                text(&refused["challenge"], "id")
            }
            "api_key_id" => {
                let keys = platform.send("GET", "/api/v1/tenant/api-keys", &[&bearer, network], &json!({}))?;
                text(&keys["data"][0], "id")
            }
            _ => bail!("nobody has a {name}"),
        }
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.process.id().cast_signed()) {
            // `dev` stops its PostgreSQL then
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn curl() -> Command {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "20"]);
    curl
}

fn text(answer: &Value, name: &str) -> Result<String> {
    answer[name].as_str().map(str::to_owned).with_context(|| format!("no {name} in the answer {}", answer["code"]))
}
