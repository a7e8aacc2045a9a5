//! Configuration by environment: one table of every variable, all checked before anything starts, all faults named at
//! once. Secrets come from variables or files, never from arguments, and have no `Debug`.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;

use ipnet::IpNet;
use sqlx::postgres::PgConnectOptions;
use tracing::level_filters::LevelFilter;
use zeroize::Zeroizing;

use crate::auth::passwords::Scheme;
use crate::db::DbConfig;
use crate::http::tls::Files as TlsFiles;
use crate::keys::KeyRing;

mod mail;
mod passwords;
mod retention;
mod tls;

pub use mail::MailConfig;
pub use retention::Retention;

/// One documented variable.
#[derive(Debug)]
pub struct Variable {
    pub name: &'static str,
    /// Empty: required by the commands that use it, or derived as the meaning says.
    pub default: &'static str,
    pub used_by: &'static str,
    pub meaning: &'static str,
}

/// Every variable the program reads.
pub const VARIABLES: &[Variable] = &[
    Variable {
        name: "DATABASE_URL",
        default: "",
        used_by: "serve, admin",
        meaning: "PostgreSQL as role `cvault_app`: `postgres://cvault_app:…@host/cvault`.",
    },
    Variable {
        name: "CVAULT_DATABASE_SYS_URL",
        default: "",
        used_by: "serve, admin",
        meaning: "The same database as role `cvault_sys`.",
    },
    Variable {
        name: "CVAULT_DATABASE_OWNER_URL",
        default: "",
        used_by: "migrate",
        meaning: "The same database as `cvault_owner`; at the first run as a role that may create roles.",
    },
    Variable {
        name: "CVAULT_KEK_FILE",
        default: "",
        used_by: "serve, admin",
        meaning: "File with the key-encryption key: 64 hexadecimal digits (32 bytes), or lines `VERSION:DIGITS` while keys are rotated. Of mode 0600 or 0400.",
    },
    Variable {
        name: "API_ENCRYPTION_KEY",
        default: "",
        used_by: "serve, admin",
        meaning: "The 64 digits themselves, instead of CVAULT_KEK_FILE.",
    },
    Variable {
        name: "CVAULT_LISTEN",
        default: "127.0.0.1:8080",
        used_by: "serve, dev",
        meaning: "Address of the HTTP API.",
    },
    Variable {
        name: "CVAULT_TLS_CERT_FILE",
        default: "",
        used_by: "serve, dev",
        meaning: "PEM certificate of the HTTP API, followed by its chain; read again when it changes and on SIGHUP. Without it the API speaks plain HTTP, for a proxy that speaks TLS.",
    },
    Variable {
        name: "CVAULT_TLS_KEY_FILE",
        default: "",
        used_by: "serve, dev",
        meaning: "Its private key, PEM, of mode 0600 or 0400.",
    },
    Variable {
        name: "CVAULT_NODE_LISTEN",
        default: "0.0.0.0:8443",
        used_by: "serve, dev",
        meaning: "Address of the gateway that server agents connect to.",
    },
    Variable {
        name: "CVAULT_NODE_ENDPOINT",
        default: "",
        used_by: "serve, dev, admin",
        meaning: "`host:port` under which agents reach the gateway. Default: CVAULT_NODE_LISTEN if it names an address, else the host of CVAULT_PUBLIC_URL with the same port.",
    },
    Variable {
        name: "CVAULT_PUBLIC_URL",
        default: "http://127.0.0.1:8080",
        used_by: "serve, dev, admin",
        meaning: "How callers reach the API, without a path. Also the issuer of tokens.",
    },
    Variable {
        name: "CVAULT_CLIENT_DNS",
        default: "1.1.1.1,2606:4700:4700::1111",
        used_by: "serve, dev",
        meaning: "Resolvers written into device configurations, comma-separated.",
    },
    Variable {
        name: "CVAULT_CLIENT_MTU",
        default: "1420",
        used_by: "serve, dev",
        meaning: "MTU written into device configurations, 1280 to 1500.",
    },
    Variable {
        name: "CVAULT_RATE_LIMIT_PER_MINUTE",
        default: "100",
        used_by: "serve, dev",
        meaning: "Requests a tenant may send in a minute, unless it has a limit of its own.",
    },
    Variable {
        name: "CVAULT_ADMIN_STEP_UP",
        default: "on",
        used_by: "serve, dev",
        meaning: "`on`: suspending or deleting a tenant and changing its limits over HTTP needs an approval (`admin approve`) besides the bearer token. `off`: it does not, for a back office that has its own.",
    },
    Variable {
        name: "CVAULT_TRUSTED_PROXIES",
        default: "127.0.0.0/8,::1/128",
        used_by: "serve, dev",
        meaning: "Networks of the proxies in front of the HTTP API, comma-separated. Their `X-Forwarded-For` says who the caller is, which throttles and caps count by; a proxy must set it.",
    },
    Variable {
        name: "CVAULT_QUARANTINE_SECONDS",
        default: "60",
        used_by: "serve, dev, admin",
        meaning: "Time a released address rests before it is used again; taken over by pools when they are created.",
    },
    Variable {
        name: "CVAULT_PASSWORD_HASH",
        default: "bcrypt",
        used_by: "serve, dev",
        meaning: "`bcrypt` or `argon2id`, for new passwords; both are checked. A login replaces a hash of another scheme or cost.",
    },
    Variable {
        name: "CVAULT_BCRYPT_COST",
        default: "12",
        used_by: "serve, dev",
        meaning: "10 to 15; each step doubles the time.",
    },
    Variable {
        name: "CVAULT_ARGON2_MEMORY_KIB",
        default: "7168",
        used_by: "serve, dev",
        meaning: "Memory of one Argon2id hash, 7168 to 262144 KiB; as many run at once as there are cores.",
    },
    Variable {
        name: "CVAULT_ARGON2_PASSES",
        default: "5",
        used_by: "serve, dev",
        meaning: "Passes of Argon2id over its memory, 1 to 10.",
    },
    Variable {
        name: "CVAULT_RETENTION_AUTH_EVENTS_DAYS",
        default: "90",
        used_by: "serve, dev",
        meaning: "Days that login attempts are kept, 7 to 3650.",
    },
    Variable {
        name: "CVAULT_RETENTION_HISTORY_DAYS",
        default: "400",
        used_by: "serve, dev",
        meaning: "Days that closed sessions, revoked devices and keys, and bytes of unknown devices are kept, 62 to 3650. Hours, days and the audit log stay.",
    },
    Variable {
        name: "CVAULT_RETENTION_COUNTERS_DAYS",
        default: "35",
        used_by: "serve, dev",
        meaning: "Days that byte counters are kept which no server will report again, 14 to 3650; then only their sums are.",
    },
    Variable {
        name: "CVAULT_RETENTION_MAIL_DAYS",
        default: "30",
        used_by: "serve, dev",
        meaning: "Days that the records of delivered and given-up mails are kept, 1 to 3650.",
    },
    Variable {
        name: "CVAULT_RETENTION_REQUEST_LOGS_DAYS",
        default: "7",
        used_by: "serve, dev",
        meaning: "Days that tenants see the requests made with their keys, 1 to 3650.",
    },
    Variable {
        name: "CVAULT_SMTP_URL",
        default: "",
        used_by: "serve, dev, admin",
        meaning: "Mail server: `smtps://host[:465]` (TLS), `smtp://host[:587]` (STARTTLS, required) or `smtp+plain://host[:25]` (no TLS; with a password only to this machine). Without it mails wait in the outbox (`dev`: they are written to the log).",
    },
    Variable {
        name: "CVAULT_SMTP_USER",
        default: "",
        used_by: "serve, dev, admin",
        meaning: "Name to log in with at the mail server.",
    },
    Variable {
        name: "CVAULT_SMTP_PASSWORD_FILE",
        default: "",
        used_by: "serve, dev, admin",
        meaning: "File with its password, of mode 0600 or 0400.",
    },
    Variable {
        name: "CVAULT_SMTP_PASSWORD",
        default: "",
        used_by: "serve, dev, admin",
        meaning: "The password itself, instead of CVAULT_SMTP_PASSWORD_FILE.",
    },
    Variable {
        name: "CVAULT_SMTP_CA_FILE",
        default: "",
        used_by: "serve, dev, admin",
        meaning: "PEM certificate of an authority to trust for the mail server, beside the public ones.",
    },
    Variable {
        name: "CVAULT_MAIL_FROM",
        default: "",
        used_by: "serve, dev, admin",
        meaning: "Sender of mails, such as `CVault <no-reply@example.com>`; required with CVAULT_SMTP_URL.",
    },
    Variable {
        name: "CVAULT_MAIL_DIR",
        default: "",
        used_by: "serve, dev, admin",
        meaning: "Directory into which mails are written, a file each, instead of sending them: for development and tests.",
    },
    Variable {
        name: "CVAULT_PG_BIN",
        default: "",
        used_by: "dev",
        meaning: "Folder with `initdb` and `postgres`. Default: the highest version under /usr/lib/postgresql.",
    },
    Variable {
        name: "CVAULT_LOG",
        default: "info",
        used_by: "all",
        meaning: "Level of our log lines: error, warn, info, debug or trace.",
    },
    Variable { name: "CVAULT_LOG_FORMAT", default: "json", used_by: "all", meaning: "`json` or `text`." },
];

/// What the running program needs to know; `Debug` shows no secret.
#[derive(Debug, Clone)]
pub struct Config {
    pub listen: SocketAddr,
    pub node_listen: SocketAddr,
    pub node_endpoint: String,
    /// Without a slash at the end.
    pub public_url: String,
    pub client_dns: Vec<IpAddr>,
    pub client_mtu: u16,
    pub rate_limit_per_minute: u32,
    /// Sensitive operations of staff need a second proof.
    pub admin_step_up: bool,
    /// Their `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
    pub quarantine_seconds: u32,
    pub mail: MailConfig,
    /// How new passwords are hashed.
    pub passwords: Scheme,
    pub retention: Retention,
    /// Of the HTTP API; without it a proxy has to speak TLS.
    pub tls: Option<TlsFiles>,
}

#[derive(Debug, Clone, Copy)]
pub struct LogConfig {
    pub level: LevelFilter,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Text,
}

/// Everything `serve` and `admin` read from the environment.
pub struct ServeConfig {
    pub config: Config,
    pub database: DbConfig,
    pub keys: KeyRing,
}

/// All faults of a configuration, one sentence each.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Faults(pub Vec<String>);

/// Values that arguments put in the place of variables.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    pub listen: Option<SocketAddr>,
    pub node_listen: Option<SocketAddr>,
    pub node_endpoint: Option<String>,
}

/// Where variables are looked up: the process environment, or a test's own.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The environment of this process; a variable that is empty counts as absent.
#[must_use]
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

impl ServeConfig {
    /// # Errors
    /// All faults at once.
    pub fn from_env(lookup: Lookup<'_>) -> Result<Self, Faults> {
        let mut reader = Reader::new(lookup);
        let config = reader.config(&Overrides::default());
        let app = reader.database("DATABASE_URL");
        let sys = reader.database("CVAULT_DATABASE_SYS_URL");
        let keys = reader.keys();
        match (reader.faults.is_empty(), app, sys, keys) {
            (true, Some(app), Some(sys), Some(keys)) => Ok(Self { config, database: DbConfig::new(app, sys), keys }),
            _ => Err(Faults(reader.faults)),
        }
    }
}

impl Config {
    /// The part that `dev` reads: it makes its own database and keys.
    ///
    /// # Errors
    /// All faults at once.
    pub fn from_env(lookup: Lookup<'_>, overrides: &Overrides) -> Result<Self, Faults> {
        let mut reader = Reader::new(lookup);
        let config = reader.config(overrides);
        if reader.faults.is_empty() { Ok(config) } else { Err(Faults(reader.faults)) }
    }
}

impl Config {
    /// The same with the ports that the kernel chose where 0 was asked for.
    #[must_use]
    pub fn bound_to(mut self, listen: SocketAddr, node_listen: SocketAddr) -> Self {
        if let Some(host) = self.public_url.strip_suffix(":0") {
            self.public_url = format!("{host}:{}", listen.port());
        }
        if let Some(host) = self.node_endpoint.strip_suffix(":0") {
            self.node_endpoint = format!("{host}:{}", node_listen.port());
        }
        Self { listen, node_listen, ..self }
    }
}

impl LogConfig {
    /// # Errors
    /// All faults at once.
    pub fn from_env(lookup: Lookup<'_>) -> Result<Self, Faults> {
        let mut reader = Reader::new(lookup);
        let level = reader.parsed("CVAULT_LOG", LevelFilter::INFO, "error, warn, info, debug or trace");
        let format = match lookup("CVAULT_LOG_FORMAT").as_deref() {
            None | Some("json") => LogFormat::Json,
            Some("text") => LogFormat::Text,
            Some(_) => {
                reader.fault("CVAULT_LOG_FORMAT must be `json` or `text`.");
                LogFormat::Json
            }
        };
        if reader.faults.is_empty() { Ok(Self { level, format }) } else { Err(Faults(reader.faults)) }
    }
}

/// Where `migrate` connects to.
///
/// # Errors
/// When the variable is missing or is no URL of PostgreSQL.
pub fn owner_database(lookup: Lookup<'_>) -> Result<PgConnectOptions, Faults> {
    let mut reader = Reader::new(lookup);
    reader.database("CVAULT_DATABASE_OWNER_URL").ok_or(Faults(reader.faults))
}

/// docs/operations/configuration.md.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::from(
        "# Configuration of the control plane\n\n\
         By environment only. Every variable is checked at the start, and all faults are named at once.\n\
         This page is printed by `cvault-control-plane config`.\n\n\
         | Variable | Default | Used by | Meaning |\n|---|---|---|---|\n",
    );
    for variable in VARIABLES {
        let default = if variable.default.is_empty() { String::new() } else { format!("`{}`", variable.default) };
        writeln!(text, "| `{}` | {default} | {} | {} |", variable.name, variable.used_by, variable.meaning)
            .expect("writing to a string succeeds");
    }
    text
}

fn default_of(name: &str) -> &'static str {
    VARIABLES.iter().find(|variable| variable.name == name).map_or("", |variable| variable.default)
}

struct Reader<'a> {
    lookup: Lookup<'a>,
    faults: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(lookup: Lookup<'a>) -> Self {
        Self { lookup, faults: Vec::new() }
    }

    fn fault(&mut self, sentence: impl Into<String>) {
        self.faults.push(sentence.into());
    }

    fn text(&self, name: &str) -> String {
        (self.lookup)(name).unwrap_or_else(|| default_of(name).to_owned())
    }

    fn parsed<T: FromStr>(&mut self, name: &str, fallback: T, form: &str) -> T {
        match self.text(name).trim().parse() {
            Ok(value) => value,
            Err(_) => {
                self.fault(format!("{name} must be {form}."));
                fallback
            }
        }
    }

    fn number(&mut self, name: &str, min: u32, max: u32) -> u32 {
        let form = format!("a whole number from {min} to {max}");
        let value = self.parsed(name, min, &form);
        if !(min..=max).contains(&value) {
            self.fault(format!("{name} must be {form}."));
        }
        value
    }

    fn config(&mut self, overrides: &Overrides) -> Config {
        let unset = SocketAddr::from(([127, 0, 0, 1], 0));
        let address = "an address with a port, such as 127.0.0.1:8080";
        let listen = overrides.listen.unwrap_or_else(|| self.parsed("CVAULT_LISTEN", unset, address));
        let node_listen = overrides.node_listen.unwrap_or_else(|| self.parsed("CVAULT_NODE_LISTEN", unset, address));
        if listen == node_listen && listen.port() != 0 {
            self.fault(format!("CVAULT_LISTEN and CVAULT_NODE_LISTEN are both {listen}; give each its own port."));
        }
        let tls = self.tls();
        let public_url = self.public_url(listen, tls.is_some());
        let node_endpoint = match overrides.node_endpoint.clone().or_else(|| (self.lookup)("CVAULT_NODE_ENDPOINT")) {
            Some(endpoint) => self.endpoint(endpoint),
            None => default_endpoint(node_listen, &public_url),
        };
        let mail = self.mail(host_of(&public_url).as_deref().unwrap_or("localhost"));
        Config {
            mail,
            passwords: self.passwords(),
            retention: self.retention(),
            tls,
            listen,
            node_listen,
            node_endpoint,
            public_url,
            client_dns: self.client_dns(),
            client_mtu: u16::try_from(self.number("CVAULT_CLIENT_MTU", 1280, 1500)).unwrap_or(1420),
            rate_limit_per_minute: self.number("CVAULT_RATE_LIMIT_PER_MINUTE", 1, 1_000_000),
            admin_step_up: self.switch("CVAULT_ADMIN_STEP_UP"),
            trusted_proxies: self.trusted_proxies(),
            quarantine_seconds: self.number("CVAULT_QUARANTINE_SECONDS", 0, 604_800),
        }
    }

    fn switch(&mut self, name: &'static str) -> bool {
        match self.text(name).as_str() {
            "on" => true,
            "off" => false,
            _ => {
                self.fault(format!("{name} must be on or off."));
                true
            }
        }
    }

    /// Without the variable, a listener at another address is reached there.
    fn public_url(&mut self, listen: SocketAddr, tls: bool) -> String {
        let Some(text) = (self.lookup)("CVAULT_PUBLIC_URL") else {
            let host = if listen.ip().is_unspecified() { IpAddr::from([127, 0, 0, 1]) } else { listen.ip() };
            let scheme = if tls { "https" } else { "http" };
            return format!("{scheme}://{}", SocketAddr::new(host, listen.port()));
        };
        let text = text.trim_end_matches('/').to_owned();
        let valid = text.parse::<http::Uri>().is_ok_and(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.host().is_some_and(|host| !host.is_empty())
                && uri.path_and_query().is_none_or(|path| path.as_str() == "/")
                && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
        });
        if !valid {
            self.fault("CVAULT_PUBLIC_URL must be http:// or https:// with a host and no path, such as https://api.example.com.");
        }
        text
    }

    fn endpoint(&mut self, text: String) -> String {
        let valid = text.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && (!host.contains(':') || (host.starts_with('[') && host.ends_with(']')))
                && !host.contains(char::is_whitespace)
                && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        if !valid {
            self.fault("CVAULT_NODE_ENDPOINT must be host:port, such as nodes.example.com:8443 or [2001:db8::1]:8443.");
        }
        text
    }

    fn client_dns(&mut self) -> Vec<IpAddr> {
        let text = self.text("CVAULT_CLIENT_DNS");
        let parsed: Result<Vec<IpAddr>, _> = text.split(',').map(|part| part.trim().parse()).collect();
        match parsed {
            Ok(addresses) => addresses,
            Err(_) => {
                self.fault(
                    "CVAULT_CLIENT_DNS must be IP addresses separated by commas, such as 1.1.1.1,2606:4700:4700::1111.",
                );
                Vec::new()
            }
        }
    }

    fn trusted_proxies(&mut self) -> Vec<IpNet> {
        let text = self.text("CVAULT_TRUSTED_PROXIES");
        let parse = |part: &str| part.parse().or_else(|_| part.parse::<IpAddr>().map(IpNet::from));
        let parsed: Result<Vec<IpNet>, _> = text.split(',').map(|part| parse(part.trim())).collect();
        parsed.unwrap_or_else(|_| {
            self.fault("CVAULT_TRUSTED_PROXIES must be networks separated by commas, such as 127.0.0.0/8,10.1.0.0/16.");
            Vec::new()
        })
    }

    /// Never repeats the URL: it holds a password.
    fn database(&mut self, name: &str) -> Option<PgConnectOptions> {
        let Some(url) = (self.lookup)(name) else {
            self.fault(format!("{name} is not set; give it a URL such as postgres://role:password@host/cvault."));
            return None;
        };
        let options = (url.starts_with("postgres://") || url.starts_with("postgresql://"))
            .then(|| PgConnectOptions::from_str(&url).ok())
            .flatten();
        if options.is_none() {
            self.fault(format!("{name} is not a URL of the form postgres://role:password@host/database."));
        }
        options
    }

    fn keys(&mut self) -> Option<KeyRing> {
        let text = match ((self.lookup)("CVAULT_KEK_FILE"), (self.lookup)("API_ENCRYPTION_KEY")) {
            (Some(_), Some(_)) => {
                self.fault("CVAULT_KEK_FILE and API_ENCRYPTION_KEY are both set; keep one.");
                return None;
            }
            (None, None) => {
                self.fault(
                    "There is no key-encryption key: write one with `openssl rand -hex 32` to a file of mode 0600 and \
                     name the file in CVAULT_KEK_FILE, or put the 64 digits into API_ENCRYPTION_KEY.",
                );
                return None;
            }
            (Some(path), None) => match read_private(&path) {
                Ok(text) => text,
                Err(sentence) => {
                    self.fault(format!("CVAULT_KEK_FILE {sentence}"));
                    return None;
                }
            },
            (None, Some(digits)) => Zeroizing::new(digits),
        };
        let ring = parse_keys(&text);
        if ring.is_none() {
            self.fault(
                "The key-encryption key must be 64 hexadecimal digits, as `openssl rand -hex 32` prints them, or lines \
                 VERSION:DIGITS, each version once.",
            );
        }
        ring
    }
}

fn default_endpoint(node_listen: SocketAddr, public_url: &str) -> String {
    if !node_listen.ip().is_unspecified() {
        return node_listen.to_string();
    }
    let host = host_of(public_url);
    format!("{}:{}", host.as_deref().unwrap_or("127.0.0.1"), node_listen.port())
}

fn host_of(url: &str) -> Option<String> {
    url.parse::<http::Uri>().ok()?.host().map(str::to_owned)
}

fn read_private(path: &str) -> Result<Zeroizing<String>, String> {
    let metadata = std::fs::metadata(path).map_err(|error| format!("names {path}, which cannot be read ({error})."))?;
    if metadata.mode() & 0o077 != 0 {
        return Err(format!("names {path}, which others than its owner may open; run `chmod 600 {path}`."));
    }
    std::fs::read_to_string(path)
        .map(Zeroizing::new)
        .map_err(|error| format!("names {path}, which cannot be read ({error})."))
}

/// One line of 64 digits (version 1), or lines `VERSION:DIGITS`.
#[must_use]
pub fn parse_keys(text: &str) -> Option<KeyRing> {
    let key = |line: &str| {
        let (version, digits) = line.split_once(':').unwrap_or(("1", line));
        let mut key = Zeroizing::new([0; 32]);
        hex::decode_to_slice(digits.trim(), key.as_mut()).ok()?;
        let version: i16 = version.trim().parse().ok().filter(|version| *version > 0)?;
        Some((version, key))
    };
    let keys: Option<Vec<_>> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(key).collect();
    KeyRing::versions(keys?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &'static [(&'static str, &'static str)]) -> Result<ServeConfig, Faults> {
        ServeConfig::from_env(&move |name| {
            pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    #[test]
    fn an_empty_environment_names_every_missing_variable_at_once() {
        let Err(Faults(faults)) = read(&[]) else { panic!("accepted nothing at all") };
        assert_eq!(faults.len(), 3, "{faults:?}");
        assert!(faults[0].starts_with("DATABASE_URL") && faults[1].starts_with("CVAULT_DATABASE_SYS_URL"));
        assert!(faults[2].contains("openssl rand -hex 32"));
    }

    #[test]
    fn every_malformed_value_is_named_and_no_secret_is_repeated() {
        let Err(Faults(faults)) = read(&[
            ("DATABASE_URL", "mysql://root:hunter2@db/cvault"),
            ("CVAULT_DATABASE_SYS_URL", "postgres://cvault_sys:hunter2@db:port/cvault"),
            ("API_ENCRYPTION_KEY", "0badhunter2"),
            ("CVAULT_LISTEN", "8080"),
            ("CVAULT_NODE_ENDPOINT", "nodes.example.com"),
            ("CVAULT_PUBLIC_URL", "api.example.com/v1"),
            ("CVAULT_CLIENT_DNS", "one.one.one.one"),
            ("CVAULT_CLIENT_MTU", "9000"),
            ("CVAULT_RATE_LIMIT_PER_MINUTE", "0"),
            ("CVAULT_TRUSTED_PROXIES", "a proxy"),
            ("CVAULT_QUARANTINE_SECONDS", "-1"),
        ]) else {
            panic!("accepted")
        };
        for name in [
            "DATABASE_URL",
            "CVAULT_DATABASE_SYS_URL",
            "key-encryption key",
            "CVAULT_LISTEN",
            "CVAULT_NODE_ENDPOINT",
            "CVAULT_PUBLIC_URL",
            "CVAULT_CLIENT_DNS",
            "CVAULT_CLIENT_MTU",
            "CVAULT_RATE_LIMIT_PER_MINUTE",
            "CVAULT_TRUSTED_PROXIES",
            "CVAULT_QUARANTINE_SECONDS",
        ] {
            assert!(faults.iter().any(|fault| fault.contains(name)), "{name} is not named in {faults:?}");
        }
        assert!(!faults.join(" ").contains("hunter2"));
    }

    #[test]
    fn defaults_fill_what_is_not_set() {
        let Ok(read) = read(&[
            ("DATABASE_URL", "postgres://cvault_app@db/cvault"),
            ("CVAULT_DATABASE_SYS_URL", "postgres://cvault_sys@db/cvault"),
            ("API_ENCRYPTION_KEY", KEY),
            ("CVAULT_PUBLIC_URL", "https://api.example.com/"),
        ]) else {
            panic!("refused")
        };
        assert_eq!(read.config.public_url, "https://api.example.com");
        assert_eq!(read.config.node_endpoint, "api.example.com:8443");
        assert_eq!(read.config.client_dns.len(), 2);
        assert_eq!((read.config.client_mtu, read.config.rate_limit_per_minute), (1420, 100));
    }

    #[test]
    fn a_key_file_may_hold_several_versions() {
        assert_eq!(parse_keys(&format!("{KEY}\n")).unwrap().version(), 1);
        assert_eq!(parse_keys(&format!("1:{KEY}\n3:{KEY}\n")).unwrap().version(), 3);
        assert!(
            parse_keys(&format!("2:{KEY}\n2:{KEY}")).is_none()
                && parse_keys("").is_none()
                && parse_keys(&KEY[1..]).is_none()
                && parse_keys(&format!("x:{KEY}")).is_none()
        );
    }
}
