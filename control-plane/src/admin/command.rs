//! The commands and their arguments.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand, value_parser};
use cvault_types::api_key::Scope;
use cvault_types::tenant::UpdateTenantPolicy;
use cvault_types::{ApiKeyId, MailId, PoolId, ServerId, TenantId};
use ipnet::{Ipv4Net, Ipv6Net};
use uuid::Uuid;

use crate::auth::approvals::Action;

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
    Token(TokenArgs),
    /// Approve one operation on one tenant over HTTP: print a token for `X-Challenge-Token`, good once, for 5 minutes
    Approve(ApproveArgs),
    /// Business customers
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Address pools
    #[command(subcommand)]
    Pool(PoolCommand),
    /// WireGuard servers
    #[command(subcommand)]
    Server(ServerCommand),
    /// A tenant's API keys
    #[command(subcommand)]
    ApiKey(ApiKeyCommand),
    /// The people of tenants who use the portal
    #[command(subcommand)]
    Portal(PortalCommand),
    /// The log of what was changed, by whom
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Key-encryption keys, and the keys that sign tokens and tenant contexts
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
    Show {
        id: TenantId,
    },
    /// Change a tenant's name, limits and policy; what is not named stays
    Update(Box<TenantUpdate>),
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

/// What changes of a tenant.
#[derive(Debug, Args)]
pub struct TenantUpdate {
    pub id: TenantId,
    #[arg(long)]
    pub name: Option<String>,
    /// Per calendar month, UTC; or `none`
    #[arg(long, value_name = "GB")]
    pub bandwidth_limit_gb: Option<Limit<i64>>,
    /// Or `none`
    #[arg(long, value_name = "USERS")]
    pub user_limit: Option<Limit<i32>>,
    #[arg(long, value_name = "DEVICES")]
    pub max_devices_per_user: Option<i32>,
    /// Or `none`: the platform's
    #[arg(long, value_name = "REQUESTS")]
    pub rate_limit_per_minute: Option<Limit<i32>>,
    /// Or `none`: half of the tenant's
    #[arg(long, value_name = "REQUESTS")]
    pub user_rate_limit_per_minute: Option<Limit<i32>>,
    /// As `policy` of PATCH /admin/tenants/{id}, such as '{"allow_smtp":true}'
    #[arg(long, value_name = "JSON")]
    pub policy: Option<PolicyChange>,
}

/// A number, or `none`.
#[derive(Debug, Clone, Copy)]
pub struct Limit<T>(pub Option<T>);

impl<T: FromStr> FromStr for Limit<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text == "none" { Ok(Self(None)) } else { text.parse().map(|number| Self(Some(number))) }
    }
}

/// A change of a tenant's policy, in JSON.
#[derive(Debug, Clone)]
pub struct PolicyChange(pub UpdateTenantPolicy);

impl FromStr for PolicyChange {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text).map(Self)
    }
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct TokenArgs {
    /// Who will use it, as the audit log will say: `admin:NAME`
    #[arg(long, default_value = "cli")]
    pub name: String,
    #[command(subcommand)]
    pub command: Option<TokenCommand>,
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token worthless at once, by its `token_id`
    Revoke { id: Uuid },
}

#[derive(Debug, Args)]
pub struct ApproveArgs {
    #[arg(long, value_enum)]
    pub action: Action,
    /// The tenant
    #[arg(long, value_name = "TENANT")]
    pub target: TenantId,
}

#[derive(Debug, Subcommand)]
pub enum ApiKeyCommand {
    List {
        #[arg(long)]
        tenant: TenantId,
    },
    /// Add a key and print it with its secret, once
    Create {
        #[arg(long)]
        tenant: TenantId,
        #[arg(long)]
        name: String,
        /// auth, users, usage, devices; all of them when not named
        #[arg(long, value_name = "SCOPE", value_delimiter = ',', value_parser = scope)]
        scopes: Option<Vec<Scope>>,
        /// RFC 3339; never when not named
        #[arg(long, value_name = "TIME")]
        expires_at: Option<String>,
    },
    /// Give a key another secret and print it, once
    Regenerate {
        #[arg(long)]
        tenant: TenantId,
        id: ApiKeyId,
        /// For which the old secret works too; at most a week
        #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = value_parser!(u32).range(..=604_800))]
        grace: u32,
    },
    /// End a key at once
    Revoke {
        #[arg(long)]
        tenant: TenantId,
        id: ApiKeyId,
    },
}

fn scope(text: &str) -> Result<Scope, &'static str> {
    Scope::parse(text).ok_or("must be auth, users, usage or devices")
}

#[derive(Debug, Subcommand)]
pub enum PortalCommand {
    /// The accounts of a tenant
    List {
        #[arg(long)]
        tenant: TenantId,
    },
    /// Add an owner to a tenant, and mail them a link to choose their password, good for an hour (then `portal reset`)
    Create {
        #[arg(long)]
        tenant: TenantId,
        email: String,
    },
    /// End somebody's sessions and let them log in no more
    Disable { email: String },
    /// Let somebody log in again
    Enable { email: String },
    /// Mail somebody a link to choose a new password
    Reset { email: String },
    /// End somebody's sessions
    EndSessions { email: String },
}

#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Entries of all tenants and of the platform, newest first
    List {
        #[arg(long)]
        tenant: Option<TenantId>,
        /// `device.register`, or its noun
        #[arg(long)]
        action: Option<String>,
        #[arg(long)]
        actor: Option<String>,
        /// RFC 3339; included
        #[arg(long, value_name = "TIME")]
        from: Option<String>,
        /// RFC 3339; excluded
        #[arg(long, value_name = "TIME")]
        to: Option<String>,
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Recompute the chains of hashes; exit status 1 when one does not hold. They hold without the
    /// newest entries, and for whoever can write to the table and makes them anew: keep what `audit list` says elsewhere
    Verify {
        /// Only this tenant's
        #[arg(long)]
        tenant: Option<TenantId>,
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
    Show {
        id: ServerId,
    },
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
    /// Which key-encryption keys this environment has, what is wrapped with each, and which keys sign
    Status,
    /// Wrap every data key and secret with the newest key-encryption key; may be interrupted and repeated
    Rotate,
    /// Begin to sign tokens with a new key; nobody is logged out
    RotateTokens(SigningArgs),
    /// Begin to sign tenant contexts with a new key; no request is refused
    RotateContexts(SigningArgs),
}

#[derive(Debug, Args)]
pub struct SigningArgs {
    /// End all earlier keys at once, because somebody may have seen one: what they have signed is worthless from then on
    #[arg(long)]
    pub now: bool,
}
