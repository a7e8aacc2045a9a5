//! A server and a client that are each other's peers, on machines of one lab, each run by the program a test wants.

use anyhow::{Context, Result, bail, ensure};

use super::{Account, Keys, Program, Tunnel, preshared_key};
use crate::internet::Noise;
use crate::lab::{Addresses, Lab, Machine, Network, Process, binary, eventually};

/// Which family the datagrams between the two have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outer {
    V4,
    V6,
}

/// Which family the packets inside the tunnel have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inner {
    V4,
    V6,
}

/// One of the two.
pub struct End {
    pub machine: Machine,
    pub at: Addresses,
    pub keys: Keys,
    pub tunnel: Tunnel,
    program: Program,
    host: u8,
}

impl End {
    /// Address inside the tunnel, as URLs and `ping` want it.
    #[must_use]
    pub fn inner(&self, family: Inner) -> String {
        match family {
            Inner::V4 => format!("10.8.0.{}", self.host),
            Inner::V6 => format!("fd00:cafe::{}", self.host),
        }
    }

    fn prepare(&self) -> Result<()> {
        self.machine
            .sh(&format!(
                "ip addr add 10.8.0.{host}/16 dev wg0; ip -6 addr add fd00:cafe::{host}/64 dev wg0 nodad; ip link set wg0 mtu 1420 up",
                host = self.host
            ))
            .map(drop)
    }

    /// A `[Peer]` section for somebody to whom this end is one host.
    #[must_use]
    pub fn as_peer(&self, more: &str) -> String {
        format!(
            "[Peer]\nPublicKey = {}\nAllowedIPs = 10.8.0.{host}/32, fd00:cafe::{host}/128\n{more}\n",
            self.keys.public,
            host = self.host
        )
    }

    /// Whether one echo is answered within a second.
    #[must_use]
    pub fn pings(&self, address: &str) -> bool {
        self.machine.run("ping", ["-c1", "-W1", address]).is_ok()
    }

    /// Waits for an answered echo.
    pub fn reaches(&self, address: &str, seconds: u64) -> Result<()> {
        eventually(&format!("{address} answers {}", self.machine.name()), seconds, || {
            ensure!(self.pings(address), "no echo");
            Ok(())
        })
    }
}

/// The server serves the web inside the tunnel. Its port is 51820.
pub struct Both {
    pub server: End,
    pub client: End,
    pub preshared_key: String,
    pub web: Process,
    // last: its folder goes when no machine writes to it any more
    pub lab: Lab,
}

impl Both {
    /// Both tunnels are configured, and neither has an endpoint: nothing is sent.
    pub fn start(server: Program, client: Program) -> Result<Self> {
        let lab = Lab::build()?;
        match Self::start_in(&lab, server, client) {
            Ok((server, client, preshared_key, web)) => Ok(Self { server, client, preshared_key, web, lab }),
            Err(error) => {
                lab.print_logs();
                Err(error)
            }
        }
    }

    fn start_in(lab: &Lab, server: Program, client: Program) -> Result<(End, End, String, Process)> {
        let server = Self::end(lab, "server", Network::Servers, 1, server)?;
        let client = Self::end(lab, "client", Network::Clients, 2, client)?;
        let preshared_key = preshared_key()?;
        let secret = format!("PresharedKey = {preshared_key}");
        for (own, other) in [(&server, &client), (&client, &server)] {
            let port = if own.host == 1 { 51820 } else { 40000 };
            let text = format!(
                "[Interface]\nPrivateKey = {}\nListenPort = {port}\n{}",
                own.keys.private,
                other.as_peer(&secret)
            );
            own.tunnel.load(&own.machine, "setconf", &text)?;
            own.prepare()?;
        }
        let web = server.machine.spawn("web", &binary("cvault-lab")?, ["web"], [])?;
        eventually("the web server listens", 20, || {
            server.machine.run("curl", ["-sSf", "-m", "2", "-o", "/dev/null", "http://10.8.0.1/noise/1"]).map(drop)
        })?;
        Ok((server, client, preshared_key, web))
    }

    fn end(lab: &Lab, name: &str, network: Network, host: u8, program: Program) -> Result<End> {
        let (machine, at) = lab.machine(name, network, 9 + host)?;
        let tunnel = Tunnel::start_counting(&machine, program, "wg0")?;
        Ok(End { machine, at, keys: Keys::random()?, tunnel, program, host })
    }

    /// Tells the client where the server is, and waits until echoes pass in both families.
    pub fn meet(&self, outer: Outer) -> Result<()> {
        let at = match outer {
            Outer::V4 => format!("{}:51820", self.server.at.v4),
            Outer::V6 => format!("[{}]:51820", self.server.at.v6),
        };
        let server = &self.server.keys.public;
        self.client.tunnel.wg_set(&self.client.machine, &format!("peer {server} endpoint '{at}'"))?;
        for family in [Inner::V4, Inner::V6] {
            self.client.reaches(&self.server.inner(family), 20)?;
        }
        Ok(())
    }

    /// `count` bytes each way; every byte is checked.
    pub fn transfer(&self, inner: Inner, count: u64) -> Result<()> {
        self.download(inner, count)?;
        self.upload(inner, count)
    }

    pub fn download(&self, inner: Inner, count: u64) -> Result<()> {
        let url = self.url(inner, &format!("noise/{count}"));
        let file = self.client.machine.dir().join("download").display().to_string();
        self.client.machine.run("curl", ["-sSf", "-m", "100", "-o", &file, &url])?;
        let got = self.client.machine.run("sha256sum", [file.as_str()])?;
        same("downloaded", count, &got)
    }

    pub fn upload(&self, inner: Inner, count: u64) -> Result<()> {
        let file = self.client.machine.dir().join("upload");
        std::io::copy(&mut Noise::of(count), &mut std::fs::File::create(&file)?)?;
        let url = self.url(inner, "digest");
        let body = format!("@{}", file.display());
        let arguments = ["-sSf", "-m", "100", "-H", "Expect:", "--data-binary", &body, &url];
        same("uploaded", count, &self.client.machine.run("curl", arguments)?)
    }

    /// Fails unless each engine has counted, to the byte, what the kernel counted at its interface. Not after a restart.
    pub fn agree(&self) -> Result<()> {
        let engines = [&self.server, &self.client].into_iter().filter(|end| end.program != Program::WireguardGo);
        engines.into_iter().try_for_each(|end| Account::settled(&end.machine, "wg0")?.agrees())
    }

    /// Begins a download that takes some seconds, and waits until a part of it has arrived.
    pub fn begin_download(&self, count: u64, bytes_per_second: &str) -> Result<Download> {
        let url = self.url(Inner::V4, &format!("noise/{count}"));
        let file = self.client.machine.dir().join("slow");
        // One of an earlier download would look like this one's.
        let _earlier = std::fs::remove_file(&file);
        let path = file.display().to_string();
        let arguments = ["-sSf", "-m", "100", "--limit-rate", bytes_per_second, "-o", &path, &url];
        let process = self.client.machine.spawn("download", "curl", arguments, [])?;
        let download = Download { process, file, count };
        download.progress()?;
        Ok(download)
    }

    fn url(&self, inner: Inner, path: &str) -> String {
        let host = self.server.inner(inner);
        match inner {
            Inner::V4 => format!("http://{host}/{path}"),
            Inner::V6 => format!("http://[{host}]/{path}"),
        }
    }
}

/// A transfer under way.
pub struct Download {
    process: Process,
    file: std::path::PathBuf,
    count: u64,
}

impl Download {
    /// How much has arrived.
    #[must_use]
    pub fn arrived(&self) -> u64 {
        std::fs::metadata(&self.file).map_or(0, |found| found.len())
    }

    /// Waits until more has arrived than now, or all of it has.
    pub fn progress(&self) -> Result<()> {
        let before = self.arrived();
        eventually("the download goes on", 40, || {
            let now = self.arrived();
            ensure!(now > before || now == self.count, "still at {before}: {}", self.process.last_lines(2));
            Ok(())
        })
    }

    #[must_use]
    pub fn is_under_way(&self) -> bool {
        matches!(self.process.exit_status(), Ok(None))
    }

    /// Waits for its end and checks every byte.
    pub fn finish(self) -> Result<()> {
        let status = eventually("the download ends", 100, || self.process.exit_status()?.context("still going on"))?;
        if !status.success() {
            bail!("the download failed at {} of {}: {}", self.arrived(), self.count, self.process.last_lines(2));
        }
        let digest = crate::internet::digest_of(&mut std::fs::File::open(&self.file)?)?;
        same("downloaded", self.count, &digest)
    }
}

fn same(what: &str, count: u64, got: &str) -> Result<()> {
    let wanted = Noise::digest(count)?;
    ensure!(got.starts_with(&wanted), "{what} other bytes than were sent: {got}");
    Ok(())
}
