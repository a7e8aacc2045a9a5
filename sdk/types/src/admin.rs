//! `/admin/servers`, `/admin/pools`, `/admin/audit`: the platform's own infrastructure, for its staff.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::secret::Secret;
use crate::{AuditId, PoolId, RequestId, ServerId, TenantId};

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateServerRequest {
    /// Unique among servers.
    #[schema(min_length = 1, max_length = 64, example = "fra-1")]
    pub name: String,
    /// Lower-case letters, digits and dashes.
    #[schema(min_length = 1, max_length = 50, pattern = "^[a-z0-9][a-z0-9-]*$", example = "eu-central")]
    pub region: String,
    /// Where clients send WireGuard packets: an IPv4 or IPv6 address.
    #[schema(value_type = String, example = "203.0.113.7")]
    pub public_ip: IpAddr,
    /// UDP; absent: 51820.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 65535)]
    pub port: Option<u16>,
    /// Absent: the pool named `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_id: Option<PoolId>,
    /// Devices it takes at most; absent: 65,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 65533)]
    pub capacity: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServerStatus {
    /// Takes devices, once it has enrolled and while it is heard of.
    Active,
    /// Takes no new devices; those it has stay.
    Draining,
    /// As `draining`, said of a server that somebody is working on.
    Maintenance,
    Offline,
}

/// A server as platform staff sees it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AdminServer {
    pub id: ServerId,
    #[schema(example = "fra-1")]
    pub name: String,
    #[schema(example = "eu-central")]
    pub region: String,
    #[schema(value_type = String, example = "203.0.113.7")]
    pub public_ip: IpAddr,
    #[schema(example = 51_820)]
    pub port: u16,
    pub pool_id: PoolId,
    #[schema(example = "default")]
    pub pool: String,
    pub status: ServerStatus,
    /// Whether an agent has used an enrolment token.
    #[schema(example = true)]
    pub enrolled: bool,
    /// Whether a new device could be placed here now.
    #[schema(example = true)]
    pub available: bool,
    #[schema(example = 65_000)]
    pub capacity: u32,
    /// Devices that should be on it.
    #[schema(example = 29_250)]
    pub peers: u32,
    /// Percent of the capacity in use.
    #[schema(example = 45)]
    pub load: u8,
    #[schema(example = 1042)]
    pub revision: u64,
    /// The revision its agent has acknowledged.
    #[schema(example = 1042)]
    pub acked_revision: u64,
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_seen_at: Option<OffsetDateTime>,
    /// What its agent says of itself.
    #[schema(value_type = Object, example = json!({"version": "0.1.0"}))]
    pub health: serde_json::Value,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// The only answer that ever holds the token.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct EnrolmentToken {
    pub server_id: ServerId,
    /// Works once, for an hour.
    #[schema(value_type = String, example = "cvj1.…")]
    pub token: Secret,
    /// Reads the token from its standard input.
    #[schema(example = "cvault-node-agent enroll …")]
    pub command: String,
    #[schema(example = 3600)]
    pub expires_in_seconds: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreatedServer {
    pub server: AdminServer,
    pub enrolment: EnrolmentToken,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AdminServerList {
    pub data: Vec<AdminServer>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreatePoolRequest {
    /// Unique among pools.
    #[schema(min_length = 1, max_length = 64, example = "default")]
    pub name: String,
    /// `/8` to `/29`, without host bits; overlaps no other pool's.
    #[schema(example = "10.8.0.0/16")]
    pub ipv4: String,
    /// `/48` to `/96`, without host bits. Absent: a `/64` drawn from the unique local addresses (RFC 4193).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "fd4c:9a17:30b2::/64")]
    pub ipv6: Option<String>,
    /// How long a released address rests after its servers have acknowledged the removal at the latest; absent: the
    /// platform's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 604_800)]
    pub quarantine_seconds: Option<u32>,
    /// Whether a device that disconnects gives its address back: its next connect answers with another configuration.
    #[serde(default)]
    pub reclaim: bool,
}

/// Absent fields stay as they are.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdatePoolRequest {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 64)]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 604_800)]
    pub quarantine_seconds: Option<u32>,
    /// Holds for the disconnects that come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reclaim: Option<bool>,
}

/// An address pool and how full it is.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AddressPool {
    pub id: PoolId,
    #[schema(example = "default")]
    pub name: String,
    #[schema(example = "10.8.0.0/16")]
    pub ipv4: String,
    #[schema(example = "fd4c:9a17:30b2::/64")]
    pub ipv6: String,
    #[schema(example = 60)]
    pub quarantine_seconds: u32,
    /// Whether a device that disconnects gives its address back.
    pub reclaim: bool,
    /// Servers that share it.
    #[schema(example = 2)]
    pub servers: u32,
    /// Addresses it can hand out in all.
    #[schema(example = 65_533)]
    pub size: u64,
    /// Addresses that devices hold.
    #[schema(example = 50)]
    pub used: u64,
    /// Addresses that rest after a release.
    #[schema(example = 3)]
    pub quarantined: u64,
    /// Addresses that can be had now.
    #[schema(example = 65_480)]
    pub free: u64,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AddressPoolList {
    pub data: Vec<AddressPool>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}

/// Who changed what, when.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AuditRecord {
    pub id: AuditId,
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Null: the platform's own infrastructure.
    pub tenant_id: Option<TenantId>,
    /// `usr_…`, `key_…`, `admin:…`, `cli`, `system`.
    #[schema(example = "usr_01kaz3r6e8f4s9w2v5m7n0q1tb")]
    pub actor: String,
    /// `noun.verb`
    #[schema(example = "device.register")]
    pub action: String,
    #[schema(example = "dev_01kaz3r6e8f4s9w2v5m7n0q1tb")]
    pub target: String,
    #[schema(value_type = Object, example = json!({"device_name": "MacBook Pro"}))]
    pub details: serde_json::Value,
    pub request_id: Option<RequestId>,
    /// Its place in the tenant's hash chain, from a few seconds after it was written.
    #[schema(example = 17)]
    pub chain_sequence: Option<i64>,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AuditRecordList {
    pub data: Vec<AuditRecord>,
    pub has_more: bool,
    /// Goes into `?cursor=` for the next page.
    pub next_cursor: Option<String>,
}
