//! A client machine: Debian's wg-quick and wireguard-go on the configuration exactly as the API returned it.

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::lab::{Addresses, HTTP_V4, HTTP_V6, Lab, Machine, Network, Process, Signal, eventually, promptly};

const INTERFACE: &str = "cvault";
/// Bytes per second, for curl.
const SLOWLY: &str = "1M";

pub struct Client {
    pub addresses: Addresses,
    machine: Machine,
    config: PathBuf,
}

/// How a tunnel came up.
#[derive(Clone, Copy, Debug)]
pub struct Up {
    /// All of `wg-quick up`.
    pub wg_quick: Duration,
    /// From the moment the client was told its peer to the end of the first handshake.
    pub handshake: Duration,
}

/// What the kernel counted on an interface. Of a TUN device, `rx` came from its WireGuard program, `tx` went to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub tx_packets: u64,
}

impl Counters {
    pub fn read(machine: &Machine, interface: &str) -> Result<Self> {
        let folder = machine.path(&format!("/sys/class/net/{interface}/statistics"));
        Ok(Self {
            rx_bytes: number(&folder.join("rx_bytes"))?,
            tx_bytes: number(&folder.join("tx_bytes"))?,
            rx_packets: number(&folder.join("rx_packets"))?,
            tx_packets: number(&folder.join("tx_packets"))?,
        })
    }
}

impl std::ops::Sub for Counters {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            rx_bytes: self.rx_bytes - before.rx_bytes,
            tx_bytes: self.tx_bytes - before.tx_bytes,
            rx_packets: self.rx_packets - before.rx_packets,
            tx_packets: self.tx_packets - before.tx_packets,
        }
    }
}

impl Client {
    /// Boots client machine `number` (1–240).
    pub fn boot(lab: &Lab, number: u8) -> Result<Self> {
        let (machine, addresses) = lab.machine(&format!("client{number}"), Network::Clients, 9 + number)?;
        let config = machine.dir().join(format!("{INTERFACE}.conf"));
        Ok(Self { addresses, machine, config })
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// `wg-quick up` on this configuration, then the first handshake.
    pub fn up(&self, config: &str) -> Result<Up> {
        let _ = std::fs::remove_file(&self.config);
        std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.config)?
            .write_all(config.as_bytes())?;
        let started = Instant::now();
        let mut command = self.machine.command("wg-quick");
        command.arg("up").arg(&self.config).env("WG_QUICK_USERSPACE_IMPLEMENTATION", "wireguard-go");
        let mut wg_quick = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("run wg-quick")?;
        // wireguard-go begins the handshake as soon as it is told its peer.
        let mut without_peer = SystemTime::now();
        promptly("the peer is configured", 15, || {
            if let Some(status) = wg_quick.try_wait()?
                && !status.success()
            {
                return Ok(());
            }
            let now = SystemTime::now();
            if uapi(&self.machine, INTERFACE, "get=1\n\n")?.contains("public_key=") {
                return Ok(());
            }
            without_peer = now;
            bail!("no peer yet")
        })?;
        let output = wg_quick.wait_with_output()?;
        if !output.status.success() {
            bail!("wg-quick up: {}", String::from_utf8_lossy(&output.stderr));
        }
        let wg_quick = started.elapsed();
        self.is_wireguard_go()?;
        let shaken = eventually("the first handshake", 15, || {
            self.last_handshake()?.ok_or_else(|| anyhow!("no handshake yet"))
        })?;
        Ok(Up { wg_quick, handshake: shaken.duration_since(without_peer).unwrap_or_default() })
    }

    /// The tunnel is Debian's program, neither the kernel's WireGuard nor the engine under test.
    fn is_wireguard_go(&self) -> Result<()> {
        self.machine
            .run("pgrep", ["-fx", &format!("wireguard-go {INTERFACE}")])
            .context("wireguard-go does not run")?;
        let answer = uapi(&self.machine, INTERFACE, "get=1\n\n")?;
        ensure!(!answer.contains("\ncvault_"), "the client's tunnel is the engine under test");
        Ok(())
    }

    pub fn down(&self) -> Result<()> {
        let mut command = self.machine.command("wg-quick");
        command.arg("down").arg(&self.config);
        self.machine.finish("wg-quick down", command).map(drop)
    }

    /// The time of the latest completed handshake, from the WireGuard program's own socket.
    pub fn last_handshake(&self) -> Result<Option<SystemTime>> {
        let text = uapi(&self.machine, INTERFACE, "get=1\n\n")?;
        let figure = |name: &str| -> u64 {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .and_then(|value| value.parse().ok())
                .unwrap_or(0)
        };
        let since = Duration::from_secs(figure("last_handshake_time_sec"))
            + Duration::from_nanos(figure("last_handshake_time_nsec"));
        Ok((!since.is_zero()).then(|| UNIX_EPOCH + since))
    }

    /// The address the internet sees, by IPv4.
    pub fn address_v4(&self) -> Result<String> {
        self.get(&format!("http://{HTTP_V4}/ip"))
    }

    /// The address the internet sees, by IPv6.
    pub fn address_v6(&self) -> Result<String> {
        self.get(&format!("http://[{HTTP_V6}]/ip"))
    }

    pub fn get(&self, url: &str) -> Result<String> {
        Ok(self.machine.run("curl", ["-sSf", "-m", "10", url])?.trim().to_owned())
    }

    /// The address from which the DNS server was asked, through the resolver of the machine.
    pub fn address_seen_by_dns(&self) -> Result<String> {
        let answer = self.machine.run("getent", ["ahostsv4", "whoami.test"])?;
        answer.split_whitespace().next().map(str::to_owned).context("getent answered nothing")
    }

    /// Fetches `count` bytes from the internet, as fast as it goes.
    pub fn download(&self, count: u64) -> Result<()> {
        self.download_at(count, "0")
    }

    /// Sends `count` bytes to the internet, as fast as it goes.
    pub fn upload(&self, count: u64) -> Result<()> {
        self.upload_at(count, "0")
    }

    /// `count` bytes each way, so slowly that no queue overflows and nothing has to be sent twice.
    pub fn carry_slowly(&self, count: u64) -> Result<()> {
        self.download_at(count, SLOWLY)?;
        self.upload_at(count, SLOWLY)
    }

    /// Datagrams that arrived at the client and were lost because its WireGuard program did not fetch them in time.
    pub fn datagrams_lost(&self) -> Result<u64> {
        let text = self.machine.run("cat", ["/proc/net/snmp"])?;
        let mut lines = text.lines().filter(|line| line.starts_with("Udp:"));
        let (names, values) = lines.next().zip(lines.next()).context("/proc/net/snmp has no Udp lines")?;
        let (_, lost) = names
            .split_whitespace()
            .zip(values.split_whitespace())
            .find(|(name, _)| *name == "RcvbufErrors")
            .context("/proc/net/snmp has no RcvbufErrors")?;
        Ok(lost.parse()?)
    }

    fn download_at(&self, count: u64, rate: &str) -> Result<()> {
        let url = format!("http://{HTTP_V4}/bytes/{count}");
        let got = self.machine.run(
            "curl",
            ["-sSf", "-m", "120", "--limit-rate", rate, "-o", "/dev/null", "-w", "%{size_download}", &url],
        )?;
        same("downloaded", count, &got)
    }

    fn upload_at(&self, count: u64, rate: &str) -> Result<()> {
        let file = self.machine.dir().join("upload");
        std::fs::File::create(&file)?.set_len(count)?;
        let body = format!("@{}", file.display());
        let url = format!("http://{HTTP_V4}/sink");
        let got = self
            .machine
            .run("curl", ["-sSf", "-m", "120", "--limit-rate", rate, "-H", "Expect:", "--data-binary", &body, &url])?;
        std::fs::remove_file(&file)?;
        same("uploaded", count, &got)
    }

    /// Whether one echo is answered within a second.
    pub fn pings(&self, address: &str) -> bool {
        self.machine.run("ping", ["-c1", "-W1", address]).is_ok()
    }

    /// Exactly `count` echoes of `size` payload bytes; an error when one is lost. Datagrams are counted alike by everybody.
    pub fn echo(&self, address: &str, count: u64, size: u64) -> Result<()> {
        // Not ping, which waits two round trips for the last answer: on a busy machine that comes later.
        let script = format!("fping -q -i 1 -p 2 -t 2000 -C {count} -b {size} {address} 2>&1 || true");
        let output = self.machine.sh(&script)?;
        let (_, times) = output.split_once(" : ").with_context(|| format!("fping said: {output}"))?;
        let times: Vec<_> = times.split_whitespace().collect();
        ensure!(times.len() as u64 == count, "on {}: fping said: {output}", self.machine.name());
        let lost: Vec<u64> = (1..).zip(times).filter(|(_, time)| *time == "-").map(|(number, _)| number).collect();
        ensure!(lost.is_empty(), "on {}: of {count} echoes these were lost: {lost:?}", self.machine.name());
        Ok(())
    }

    /// Echo requests every 20 ms until they are stopped.
    pub fn start_pings(&self, address: &str) -> Result<Pings> {
        Pings::start(&self.machine, address)
    }

    /// Stops the keepalives (which carry no bytes) and lets nothing but them leave, so that counts can be compared.
    pub fn silence(&self) -> Result<()> {
        self.machine
            .sh(&format!("wg set {INTERFACE} peer \"$(wg show {INTERFACE} peers)\" persistent-keepalive off"))
            .map(drop)
    }

    /// What the kernel counted on the client's tunnel.
    pub fn counters(&self) -> Result<Counters> {
        Counters::read(&self.machine, INTERFACE)
    }
}

/// A running series of echo requests.
pub struct Pings {
    process: Process,
}

/// Echo requests up to the last one that was answered: what came after it may still have been on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PingCount {
    pub sent: u64,
    pub answered: u64,
}

impl PingCount {
    pub fn lost(self) -> u64 {
        self.sent - self.answered
    }
}

impl Pings {
    /// An echo request every 20 ms.
    pub fn start(machine: &Machine, address: &str) -> Result<Self> {
        Ok(Self { process: machine.spawn("ping", "ping", ["-i", "0.02", "-n", address], [])? })
    }

    /// How many answers there are so far.
    pub fn answers(&self) -> u64 {
        answered(&self.log()).count() as u64
    }

    /// Waits for `count` more answers.
    pub fn wait_for(&self, count: u64) -> Result<()> {
        let goal = self.answers() + count;
        eventually("echoes are answered", 60, || {
            self.process.check_running()?;
            if self.answers() < goal { Err(anyhow!("{} of {goal}", self.answers())) } else { Ok(()) }
        })
    }

    pub fn stop(self, machine: &Machine) -> Result<PingCount> {
        self.process.end(machine, Signal::Interrupt)?;
        let log = self.log();
        std::fs::remove_file(self.process.log())?;
        Ok(PingCount {
            sent: answered(&log).max().context("no echo was ever answered")?,
            answered: answered(&log).count() as u64,
        })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.process.log()).unwrap_or_default()
    }
}

/// The sequence numbers of answers, each once.
fn answered(log: &str) -> impl Iterator<Item = u64> {
    let numbers: std::collections::BTreeSet<u64> =
        log.lines().filter_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok()).collect();
    numbers.into_iter()
}

/// How many packets the engine behind `interface` has dropped for `reason`.
pub fn dropped(machine: &Machine, interface: &str, reason: &str) -> Result<u64> {
    let text = uapi(machine, interface, "get=1\n\n")?;
    let key = format!("cvault_drop_{reason}=");
    let value = text.lines().find_map(|line| line.strip_prefix(&key)).with_context(|| format!("no {key}"))?;
    Ok(value.parse()?)
}

/// One exchange on a WireGuard program's own socket (https://www.wireguard.com/xplatform/), from outside its machine.
pub fn uapi(machine: &Machine, interface: &str, request: &str) -> Result<String> {
    let mut socket = UnixStream::connect(machine.path(&format!("/run/wireguard/{interface}.sock")))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.write_all(request.as_bytes())?;
    let mut text = String::new();
    let mut block = [0; 4096];
    while !text.ends_with("\n\n") {
        let length = socket.read(&mut block)?;
        if length == 0 {
            break;
        }
        text.push_str(&String::from_utf8_lossy(&block[..length]));
    }
    Ok(text)
}

fn same(what: &str, wanted: u64, got: &str) -> Result<()> {
    if got.trim().parse() != Ok(wanted) {
        bail!("{what} {} bytes of {wanted}", got.trim());
    }
    Ok(())
}

fn number(file: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    text.trim().parse().with_context(|| format!("{} is no number", file.display()))
}
