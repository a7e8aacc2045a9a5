//! Devices: what the API takes and gives.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::{DeviceId, Secret, ServerId};

/// `POST /api/v1/devices`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterDevice {
    /// 1 to 255 printable characters.
    #[schema(example = "MacBook Pro", min_length = 1, max_length = 255)]
    pub device_name: String,
    /// A WireGuard public key made by the client (base64 of 32 bytes); then the private key never leaves it and `config`
    /// has a placeholder. Without it the platform makes the key pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=", min_length = 44, max_length = 44)]
    pub public_key: Option<String>,
    /// What the device is, in the client's words: `macos`, `ios`, `linux`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "macos", pattern = "^[a-z0-9][a-z0-9._-]{0,31}$")]
    pub platform: Option<String>,
    /// Only servers of this region. Without it: the least loaded of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "us-east", pattern = "^[a-z0-9][a-z0-9-]{0,49}$")]
    pub server_region: Option<String>,
    /// With a preshared key, mixed into every handshake: a recorded tunnel stays closed even to whoever breaks X25519.
    #[serde(default)]
    pub preshared_key: bool,
}

/// `POST /api/v1/devices/{device_id}/rotate-key`
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RotateDeviceKey {
    /// As at registration; never the one the device has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=", min_length = 44, max_length = 44)]
    pub public_key: Option<String>,
    /// Without it: a new preshared key if the device has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preshared_key: Option<bool>,
}

/// `active`: the server has acknowledged the device; `pending`: it has not yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceStatus {
    Pending,
    Active,
}

/// A newly registered device.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RegisteredDevice {
    pub device_id: DeviceId,
    /// A WireGuard configuration file, ready for `wg-quick`.
    #[schema(value_type = String, example = "[Interface]\nPrivateKey = …\nAddress = 10.8.0.45/32, fd00:cafe::2d/128\nDNS = 1.1.1.1\nMTU = 1420\n\n[Peer]\nPublicKey = …\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = 203.0.113.10:51820\nPersistentKeepalive = 25\n")]
    pub config: Secret,
    #[schema(value_type = String, example = "10.8.0.45", format = "ipv4")]
    pub assigned_ip: Ipv4Addr,
    #[schema(value_type = String, example = "fd00:cafe::2d", format = "ipv6")]
    pub assigned_ipv6: Ipv6Addr,
    pub status: DeviceStatus,
    /// From the arrival of the request to the server's acknowledgement; only with `status: active`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = 38)]
    pub activation_ms: Option<u64>,
    #[schema(example = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=")]
    pub public_key: String,
    pub server: DeviceServer,
}

/// The server a device connects to.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DeviceServer {
    pub id: ServerId,
    #[schema(example = "us-east")]
    pub region: String,
    #[schema(example = "203.0.113.10:51820")]
    pub endpoint: String,
    /// Base64 of 32 bytes.
    #[schema(example = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=")]
    pub public_key: String,
}

/// A device of the caller.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Device {
    pub device_id: DeviceId,
    #[schema(example = "MacBook Pro")]
    pub device_name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "macos")]
    pub platform: Option<String>,
    #[schema(example = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=")]
    pub public_key: String,
    #[schema(value_type = String, example = "10.8.0.45")]
    pub assigned_ip: Ipv4Addr,
    #[schema(value_type = String, example = "fd00:cafe::2d")]
    pub assigned_ipv6: Ipv6Addr,
    pub status: DeviceStatus,
    pub server_id: ServerId,
    #[schema(example = "us-east")]
    pub server_region: String,
    /// Whether the server has seen a handshake within the last three minutes.
    #[schema(example = true)]
    pub tunnel_up: bool,
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_handshake_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_connected_at: Option<OffsetDateTime>,
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
}

/// `GET /api/v1/devices`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DevicePage {
    pub data: Vec<Device>,
    pub has_more: bool,
    /// Give it back as `cursor` for the next page.
    pub next_cursor: Option<String>,
}
