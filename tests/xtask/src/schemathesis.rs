//! schemathesis against the committed OpenAPI document and a running control plane, as each kind of caller.
//!
//! Every limiter of the product stays in force. Each operation is asked from a network of its own and, in the portal, by a
//! person of its own, so that none is used up by the others; tenants' rates are settings. That every operation was really
//! reached is read from the control plane's metrics afterwards.
//!
//! Left out are three of its checks, which the matrix test makes exactly: what happens without credentials (guesses are
//! throttled, so that it would meet 429), and that every request the schema allows succeeds (ids must exist, an
//! Idempotency-Key may be used once).

mod answers;
mod document;
mod platform;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::host;
use answers::Answers;
use document::Operation;
use platform::{AGENT, Platform};

const VERSION: &str = "schemathesis==4.32.5";
const LEFT_OUT: &str = "ignored_auth,positive_data_acceptance,missing_required_header";
/// 503 is documented, with its codes, and says when to come again: here of a region without servers.
const CONFIGURATION: &str = "\
request-timeout = 60

[auth]
auto-signup = false

[checks]
not_a_server_error.expected-statuses = [\"2xx\", \"3xx\", \"4xx\", 503]
";
/// Fewer than the sensitive requests that end a session of the portal when they come within a minute.
const EXAMPLES: u32 = 40;

/// A kind of caller, and what it asks for.
struct Caller<'c> {
    name: &'static str,
    asks: fn(&str) -> bool,
    /// What it brings to an operation, which is asked for from the network that this header names.
    brings: &'c dyn Fn(&Operation, &str) -> Result<Brought>,
    /// Answers that say nothing of an operation: it was not reached.
    turned_away: &'static [u16],
    /// Requests for each operation, at most.
    examples: u32,
}

/// Credentials; and the id of something of the caller's own, where the path has a place for one.
struct Brought {
    headers: Vec<String>,
    id: Option<String>,
}

pub(crate) fn run() -> Result<()> {
    let program = installed()?;
    let platform = Platform::start()?;
    let staff = format!("authorization: Bearer {}", platform.admin_token()?);
    let tenant = platform.tenant(&staff)?;
    platform.with_server()?;
    let user = platform.user(&tenant, "user")?;
    let callers = [
        Caller {
            name: "a tenant's user",
            asks: |path| ["devices", "vpn", "servers", "usage"].iter().any(|noun| is_of(path, noun)),
            brings: &|operation, _| {
                let headers = vec![tenant.key(), user.bearer()];
                let id = (operation.parameter() == Some("device_id")).then(|| platform.device(&headers)).transpose()?;
                Ok(Brought { headers, id })
            },
            turned_away: &[401, 429],
            examples: EXAMPLES,
        },
        Caller {
            name: "a tenant's backend",
            asks: |path| ["auth", "usage", "users"].iter().any(|noun| is_of(path, noun)),
            brings: &|operation, network| {
                let id = match operation.parameter() {
                    Some("user_id") => Some(platform.user(&tenant, &digits(network))?.id),
                    _ => None,
                };
                Ok(Brought { headers: vec![tenant.key(), tenant.secret()], id })
            },
            turned_away: &[401, 429],
            examples: EXAMPLES,
        },
        Caller {
            name: "a program without a secret",
            asks: |path| is_of(path, "auth"),
            brings: &|_, _| Ok(Brought { headers: vec![tenant.key()], id: None }),
            turned_away: &[401, 429],
            examples: EXAMPLES,
        },
        Caller {
            name: "people of a tenant",
            asks: |path| path.starts_with("/api/v1/tenant/"),
            brings: &|operation, network| {
                let person = tenant.person(&platform, network)?;
                let id = operation.parameter().map(|name| person.thing(&platform, name)).transpose()?;
                Ok(Brought { headers: vec![person.bearer()], id })
            },
            turned_away: &[401, 429],
            examples: EXAMPLES,
        },
        Caller {
            name: "anybody",
            asks: |_| true,
            brings: &|_, _| Ok(Brought { headers: Vec::new(), id: None }),
            turned_away: &[429],
            examples: 10,
        },
        // last: it deletes what it finds
        Caller {
            name: "platform staff",
            asks: |path| path.starts_with("/admin/"),
            brings: &|_, _| Ok(Brought { headers: vec![staff.clone()], id: None }),
            turned_away: &[401, 429],
            examples: EXAMPLES,
        },
    ];
    let operations = document::operations()?;
    for (number, caller) in callers.iter().enumerate() {
        let asked: Vec<&Operation> = operations.iter().filter(|operation| (caller.asks)(&operation.path)).collect();
        let before = platform.answers()?;
        platform.check(&program, number, caller, &asked)?;
        platform.answers()?.since(&before).reached(&asked, caller.turned_away).with_context(|| caller.name)?;
    }
    Ok(())
}

/// A name that only this network's operation has.
fn digits(network: &str) -> String {
    network.chars().filter(char::is_ascii_digit).collect()
}

fn is_of(path: &str, noun: &str) -> bool {
    path.strip_prefix("/api/v1/").and_then(|rest| rest.split('/').next()) == Some(noun)
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
    fn answers(&self) -> Result<Answers> {
        self.get("/metrics").map(|text| Answers::of(&text))
    }

    fn check(&self, program: &Path, run: usize, caller: &Caller<'_>, asked: &[&Operation]) -> Result<()> {
        println!("xtask: schemathesis as {}: {} operations", caller.name, asked.len());
        let mut configuration = CONFIGURATION.to_owned();
        for (number, operation) in asked.iter().enumerate() {
            let network = format!("x-forwarded-for: 10.{run}.{number}.1");
            let Brought { headers, id } = (caller.brings)(operation, &network)?;
            if let Some(id) = &id {
                write!(configuration, "\n[dictionaries.own{number}]\nvalues = [\"{id}\"]\n")?;
            }
            write!(configuration, "\n[[operations]]\ninclude-name = \"{operation}\"\n[operations.headers]\n")?;
            for header in headers.into_iter().chain([network, format!("user-agent: {AGENT}")]) {
                let (name, value) = header.split_once(": ").context("a header is a name and a value")?;
                writeln!(configuration, "{name} = \"{value}\"")?;
            }
            if let (Some(name), Some(_)) = (operation.parameter(), id) {
                let binding = format!("{{ dictionary = \"own{number}\", probability = 0.5 }}");
                write!(configuration, "[operations.parameters]\n\"path.{name}\" = {binding}\n")?;
            }
        }
        std::fs::write(self.folder.join("schemathesis.toml"), configuration)?;
        let mut command = Command::new(program);
        command
            .current_dir(&self.folder)
            .arg("run")
            .arg(document::path())
            .args(["--url", platform::URL])
            .args(["--generation-deterministic", "--generation-with-security-parameters", "false", "--no-color"])
            .args(["--phases", "examples,coverage,fuzzing", "--max-examples", &caller.examples.to_string()])
            .args(["--exclude-checks", LEFT_OUT, "--suppress-health-check", "all", "--continue-on-failure"])
            .args(["--warnings", "off"]);
        for operation in asked {
            command.args(["--include-name", &operation.to_string()]);
        }
        if !command.status().context("start schemathesis")?.success() {
            bail!("schemathesis has found something as {}", caller.name);
        }
        Ok(())
    }
}
