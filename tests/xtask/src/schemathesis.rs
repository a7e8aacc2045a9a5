//! schemathesis against the committed OpenAPI document and a running control plane, as each kind of caller.
//!
//! Left out are three of its checks, which the matrix test makes exactly: what happens without credentials (guesses are
//! throttled, so that it would meet 429), and that every request the schema allows succeeds (ids must exist, an
//! Idempotency-Key may be used once).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::host::{self, Profile};

const VERSION: &str = "schemathesis==4.32.5";
const LEFT_OUT: &str = "ignored_auth,positive_data_acceptance,missing_required_header";
/// 503 is documented, with its codes, and says when to come again: here of a region without servers.
const CONFIGURATION: &str = "[checks]\nnot_a_server_error.expected-statuses = [\"2xx\", \"3xx\", \"4xx\", 503]\n";
const EXAMPLES: &str = "40";
/// Of each caller's run, at most.
const SECONDS: &str = "40";
const START: Duration = Duration::from_secs(60);
const ADDRESS: &str = "127.0.0.1:18473";
const NODES: &str = "127.0.0.1:18474";

/// Ends with this value.
struct Platform {
    process: Child,
    folder: PathBuf,
}

pub(crate) fn run() -> Result<()> {
    let program = installed()?;
    let platform = Platform::start()?;
    let printed = std::fs::read_to_string(platform.folder.join("out"))?;
    let staff = format!("authorization: Bearer {}", setting(&printed, "admin_token")?);
    let made = call(
        "/admin/tenants",
        &[&staff],
        r#"{"name":"T","rate_limit_per_minute":1000000,"max_devices_per_user":1000}"#,
    )?;
    let key = format!("x-api-key: {}", field(&made, "api_key")?);
    let secret = format!("x-api-secret: {}", field(&made, "api_secret")?);
    let account = r#"{"email":"schemathesis@example.com","password":"correct horse battery staple"}"#;
    let user = call("/api/v1/auth/register", &[&key, &secret], account)?;
    let user = format!("authorization: Bearer {}", field(&user, "access_token")?);
    platform.with_server()?;
    platform.check(&program, "^/api/v1/(devices|vpn|servers)", &[&key, &user])?;
    platform.check(&program, "^/api/v1/(auth|usage|users)", &[&key, &secret])?;
    let form = r#"{"business_name":"T","email":"owner@example.com","password":"correct horse battery staple"}"#;
    let owner = call("/api/v1/tenant/auth/signup", &[], form)?;
    let owner = format!("authorization: Bearer {}", field(&owner, "access_token")?);
    // but logging out: nothing would be left to see
    platform.check(&program, "^/api/v1/tenant/(?!auth/logout)", &[&owner])?;
    // last: it deletes what it finds
    platform.check(&program, "^/admin", &[&staff])
}

/// In a virtual environment below `target/`, made the first time.
fn installed() -> Result<PathBuf> {
    let folder = host::root().join("target/schemathesis");
    let program = folder.join("bin/st");
    if !program.exists() {
        host::install_python()?;
        host::run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
        host::run(Command::new(folder.join("bin/pip")).args(["install", "--quiet", VERSION]))?;
    }
    Ok(program)
}

impl Platform {
    fn start() -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("cvault-schemathesis-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("schemathesis.toml"), CONFIGURATION)?;
        let process = Command::new(host::built(Profile::Debug, "cvault-control-plane"))
            .args(["dev", "--listen", ADDRESS, "--node-listen", NODES, "--data-dir"])
            .arg(folder.join("data"))
            .env("CVAULT_LOG", "error")
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(folder.join("out"))?)
            .spawn()
            .context("start the control plane")?;
        let mut platform = Self { process, folder };
        let deadline = Instant::now() + START;
        let ready = || {
            let url = format!("http://{ADDRESS}/health/ready");
            Command::new("curl").args(["--silent", "--fail", "--max-time", "2", &url]).output()
        };
        while !ready()?.status.success() {
            if platform.process.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("the control plane does not start");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(platform)
    }

    /// One that looks alive, so that devices can be registered.
    fn with_server(&self) -> Result<()> {
        let create = ["server", "create", "--name", "s", "--region", "lab-1", "--public-ip", "203.0.113.10"];
        host::read(
            Command::new(host::built(Profile::Debug, "cvault-control-plane"))
                .args(["admin", "--data-dir"])
                .arg(self.folder.join("data"))
                .args(create),
        )?;
        let alive = "update platform.servers set last_seen_at = now() + interval '1 day',
                         public_key = sha256('s'), identity_pin = sha256('s')";
        let sockets = self.folder.join("data/run").canonicalize()?;
        let mut psql = Command::new("/usr/lib/postgresql/15/bin/psql");
        host::read(psql.args(["-X", "-q", "-U", "postgres", "-d", "cvault", "-c", alive, "-h"]).arg(sockets)).map(drop)
    }

    fn check(&self, program: &Path, paths: &str, headers: &[&str]) -> Result<()> {
        println!("xtask: schemathesis as the caller of {paths}");
        let mut command = Command::new(program);
        command
            .current_dir(&self.folder)
            .arg("run")
            .arg(host::root().join("docs/openapi/v1.json"))
            .args(["--url", &format!("http://{ADDRESS}"), "--include-path-regex", paths])
            .args(["--generation-deterministic", "--generation-with-security-parameters", "false", "--no-color"])
            .args(["--phases", "examples,fuzzing", "--max-examples", EXAMPLES, "--max-time", SECONDS])
            .args(["--exclude-checks", LEFT_OUT, "--suppress-health-check", "all", "--continue-on-failure"])
            .args(["--warnings", "off"]);
        for header in headers {
            command.args(["-H", header]);
        }
        // not host::run: what was run holds credentials
        if !command.status().context("start schemathesis")?.success() {
            bail!("schemathesis has found something in {paths}");
        }
        Ok(())
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

fn call(path: &str, headers: &[&str], body: &str) -> Result<String> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "20", "-H", "content-type: application/json", "--data", body]);
    for header in headers {
        curl.args(["-H", header]);
    }
    let output = curl.arg(format!("http://{ADDRESS}{path}")).output().context("start curl")?;
    Ok(String::from_utf8(output.stdout)?)
}

/// The text of a field of a flat JSON object whose texts have nothing to escape.
fn field<'j>(json: &'j str, name: &str) -> Result<&'j str> {
    let (_, rest) = json.split_once(&format!("\"{name}\":\"")).with_context(|| format!("no {name} in the answer"))?;
    rest.split('"').next().context("a text ends")
}

/// `name=value` as `dev` prints it.
fn setting<'t>(text: &'t str, name: &str) -> Result<&'t str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .with_context(|| format!("no {name} printed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_settings_are_found() {
        assert_eq!(field(r#"{"a":"x","api_key":"cvk_1","n":1}"#, "api_key").unwrap(), "cvk_1");
        assert!(field("{}", "api_key").is_err());
        assert_eq!(setting("# x\nurl=http://h\nadmin_token=a.b=\n", "admin_token").unwrap(), "a.b=");
    }
}
