//! The commands and their arguments.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use cvault_types::{MailId, PoolId, ServerId, TenantId};
use ipnet::{Ipv4Net, Ipv6Net};

#[derive(Debug, Args)]
pub struct AdminArgs {
    /// The folder of a running `dev`; without it, the environment of `serve` is used
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Answer with one JSON object
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: AdminCommand,
}

#[derive(Debug, Subcommand)]
pub enum AdminCommand {
    /// Print a bearer token for /admin, valid for 12 hours
    Token,
    /// Business customers
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Address pools
    #[command(subcommand)]
    Pool(PoolCommand),
    /// WireGuard servers
    #[command(subcommand)]
    Server(ServerCommand),
    /// Key-encryption keys
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Mails that wait or were given up
    #[command(subcommand)]
    Mail(MailCommand),
    /// Check that what was billed is what the servers counted; exit status 1 when it is not
    VerifyLedger,
}

#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// Create a tenant and print its API key and secret, once
    Create {
        #[arg(long)]
        name: String,
    },
    List,
    /// Refuse the tenant's API calls
    Suspend {
        id: TenantId,
    },
    /// Take a suspension back
    Resume {
        id: TenantId,
    },
    /// Delete a tenant, its devices and its data key; cannot be undone
    Delete {
        id: TenantId,
    },
}

#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    Create {
        #[arg(long)]
        name: String,
        /// IPv4 prefix, /8 to /29
        #[arg(long, value_name = "CIDR")]
        v4: Ipv4Net,
        /// IPv6 prefix, /48 to /96
        /// Without it, a /64 is drawn from the unique local addresses
        #[arg(long, value_name = "CIDR")]
        v6: Option<Ipv6Net>,
        /// Seconds a released address rests; without it, CVAULT_QUARANTINE_SECONDS
        #[arg(long, value_name = "SECONDS")]
        quarantine: Option<u32>,
        /// Take the address of a device back when it disconnects
        #[arg(long)]
        reclaim: bool,
    },
    List,
    Show {
        id: PoolId,
    },
    /// Change a pool; what is not named stays
    Update {
        id: PoolId,
        #[arg(long)]
        name: Option<String>,
        #[arg(long, value_name = "SECONDS")]
        quarantine: Option<u32>,
        #[arg(long, value_name = "true|false")]
        reclaim: Option<bool>,
    },
    /// Delete a pool that no server and no device uses
    Delete {
        id: PoolId,
    },
}

#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Create a server and print its enrolment token, once
    Create {
        #[arg(long)]
        name: String,
        #[arg(long)]
        region: String,
        /// Where clients send WireGuard packets
        #[arg(long, value_name = "IP")]
        public_ip: IpAddr,
        #[arg(long, default_value_t = 51820)]
        port: u16,
        #[arg(long, default_value = "default")]
        pool: String,
        /// Devices it takes at most
        #[arg(long, default_value_t = 65_000)]
        capacity: u32,
    },
    List,
    /// Print another enrolment token, once: for a token that was lost or has expired, and for a machine that replaces
    /// the server's first
    Token {
        id: ServerId,
    },
    /// Place no new devices on a server; those it has stay
    Drain {
        id: ServerId,
    },
    /// As `drain`, for a server that somebody is working on
    Maintenance {
        id: ServerId,
    },
    /// Place devices on a server again
    Activate {
        id: ServerId,
    },
    /// Remove a server that has no devices
    Remove {
        id: ServerId,
        /// Do not wait for what it still has to tell: for a server that is lost
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum MailCommand {
    /// Mails that wait to be sent, oldest first
    List {
        /// Those that were given up, instead
        #[arg(long)]
        dead: bool,
    },
    /// Try a mail again that was given up
    Retry { id: MailId },
    /// Send a test mail now, past the outbox, with the configuration of this command's environment
    Test {
        #[arg(long, value_name = "ADDRESS")]
        to: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Which key-encryption keys this environment has, and what is wrapped with each
    Status,
    /// Wrap every data key and secret with the newest key-encryption key; may be interrupted and repeated
    Rotate,
}
