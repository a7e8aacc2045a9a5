//! Two machines and nothing between them but one link, for measuring.

use anyhow::Result;

use super::{Machine, folder, interrupt, needs, run_ip};

/// The two ends of the link.
pub const SERVER_V4: &str = "192.0.2.1";
pub const CLIENT_V4: &str = "192.0.2.2";

/// A server and a client joined by a veth, on until dropped.
pub struct Pair {
    pub server: Machine,
    pub client: Machine,
    // Removed last.
    _folder: folder::Folder,
}

impl Pair {
    pub fn build() -> Result<Self> {
        needs::check()?;
        interrupt::watch()?;
        let folder = folder::Folder::create()?;
        let server = Machine::boot("server", folder.path())?;
        let client = Machine::boot("client", folder.path())?;
        let (at_server, at_client) = (server.holder(), client.holder());
        run_ip(&[
            "link", "add", "up0", "netns", &at_server, "type", "veth", "peer", "name", "up0", "netns", &at_client,
        ])?;
        for (machine, address) in [(&server, SERVER_V4), (&client, CLIENT_V4)] {
            machine.sh(&format!("ip addr add {address}/24 dev up0\nip link set up0 up"))?;
        }
        Ok(Self { server, client, _folder: folder })
    }
}
