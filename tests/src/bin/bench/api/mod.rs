//! `cargo xtask bench api`: how quick the control plane is, with its own PostgreSQL on the same machine and durable commits.
//!
//! One control plane (`dev`: fsync on, synchronous_commit on), asked over HTTP/1.1 by a load generator on the same processors.
//! Every run of registrations is followed by a count: as many devices as answers, and no address or key twice.

mod load;
mod measures;
mod platform;

use std::time::Duration;

use anyhow::{Result, bail};
use cvault_tests::bench::Row;

use crate::Options;
use crate::host::Host;
use measures::Bench;

/// How long and how much.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    registering: Duration,
    short: Duration,
    /// Of the guide's load test.
    guides: Duration,
    clients: usize,
    /// With a password.
    users: usize,
    /// Who register devices: as many as have a few each at the end.
    people: usize,
    /// Devices that each server of the second comparison has before.
    present: u64,
    /// Length of the prefix of the pool that is nearly full.
    full_prefix: u8,
    /// Whether demands are made of a run of this size.
    judged: bool,
}

impl Size {
    fn of(options: &Options) -> Self {
        let seconds = |seconds: u64| Duration::from_secs(seconds);
        if options.quick {
            return Self {
                registering: seconds(3),
                short: seconds(2),
                guides: seconds(3),
                clients: 16,
                users: 16,
                people: 64,
                present: 0,
                full_prefix: 16,
                judged: false,
            };
        }
        let registering = options.seconds.map_or(seconds(60), |s| seconds(s.into()));
        let short = registering.min(seconds(20));
        let judged = registering >= seconds(60);
        Self {
            registering,
            short,
            guides: registering * 5,
            clients: 64,
            users: 64,
            people: 8192,
            present: 65_000,
            full_prefix: 10,
            judged,
        }
    }
}

/// What `--only` may name.
const PARTS: [&str; 6] = ["registrations", "pool", "reads", "isolation", "noise", "logins"];

pub(crate) fn run(options: &Options) -> Result<bool> {
    if let Some(name) = options.only.iter().find(|name| !PARTS.contains(&name.as_str())) {
        bail!("{name} is no part of this suite; these are: {}", PARTS.join(", "));
    }
    let size = Size::of(options);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rows = runtime.block_on(async {
        let mut bench = Bench::start(size).await?;
        bench.all(&options.only).await
    })?;
    for row in &rows {
        if options.json {
            println!("{}", row.to_json());
        } else {
            println!("{}", line(row));
        }
    }
    if options.record {
        let host = Host::read(&options.root);
        let name = format!("docs/perf/{}-api.md", time::OffsetDateTime::now_utc().date());
        std::fs::write(options.root.join(&name), markdown(&rows, &host, size))?;
        eprintln!("bench: wrote {name}");
    }
    Ok(true)
}

fn line(row: &Row) -> String {
    cells(row).join("  ")
}

fn cells(row: &Row) -> [String; 7] {
    let figure = |figure: Option<f64>| figure.map_or_else(|| "-".to_owned(), |figure| format!("{figure:.2}"));
    let peer = row.peer.as_ref().map_or_else(|| "-".to_owned(), |peer| format!("{} {peer}", figure(row.peer_figure)));
    let met = match row.met() {
        Some(true) => "yes",
        Some(false) => "NO",
        None => "-",
    };
    let must = row.must.map_or_else(|| "-".to_owned(), |must| must.to_string());
    [row.measure.clone(), row.unit.clone(), figure(row.ours), peer, figure(row.ratio()), must, met.to_owned()]
}

fn markdown(rows: &[Row], host: &Host, size: Size) -> String {
    let mut text = format!(
        "# The control plane under load\n\nCommit `{}`. Machine: {}. PostgreSQL 15 on the same machine, `fsync = on`,\n\
         `synchronous_commit = on`, its cache an eighth of the memory; the load generator shares the processors. {} clients, {} s of registrations.\n\n\
         A registration: API key and token checked, rate limit charged, limits of user and tenant under lock, key pair drawn and\n\
         its private half sealed (AES-256-GCM), address allocated, device and audit entry written, the server's revision and digest\n\
         moved, a durable commit, shared by those of a tenant that arrive together. After each run the devices are counted: as many\n\
         as answers, no address and no key twice.\n\n\
         | measure | unit | ours | beside | ratio | must | met |\n|---|---|---|---|---|---|---|\n",
        host.commit,
        host.machine,
        size.clients,
        size.registering.as_secs(),
    );
    for row in rows {
        text.push_str(&format!("| {} |\n", cells(row).join(" | ")));
    }
    text
}
