//! Connections of devices: what the API takes and gives.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;

use crate::{DeviceId, Secret, ServerId, SessionId};

/// `POST /api/v1/vpn/connect`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConnectRequest {
    pub device_id: DeviceId,
    /// Another region than the device's moves it to a server there; use the `config` of the answer then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "us-east", pattern = "^[a-z0-9][a-z0-9-]{0,49}$")]
    pub server_region: Option<String>,
}

/// `POST /api/v1/vpn/disconnect`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DisconnectRequest {
    pub device_id: DeviceId,
}

/// Whether a session is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionStatus {
    Connected,
    Disconnected,
}

/// An open session and what the client needs for its tunnel.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Connected {
    pub session_id: SessionId,
    #[schema(example = "203.0.113.10")]
    pub server_ip: String,
    #[schema(example = 51820)]
    pub server_port: u16,
    pub status: ConnectionStatus,
    /// A WireGuard configuration file, ready for `wg-quick`.
    #[schema(value_type = String, example = "[Interface]\nPrivateKey = …\nAddress = 10.8.0.45/32, fd00:cafe::2d/128\nDNS = 1.1.1.1\nMTU = 1420\n\n[Peer]\nPublicKey = …\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = 203.0.113.10:51820\nPersistentKeepalive = 25\n")]
    pub config: Secret,
    #[schema(value_type = String, example = "10.8.0.45", format = "ipv4")]
    pub assigned_ip: Ipv4Addr,
    pub server_id: ServerId,
    #[schema(example = "us-east")]
    pub server_region: String,
}

/// A session that is closed, or was not open.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Disconnected {
    pub status: ConnectionStatus,
    pub device_id: DeviceId,
    /// The session that was closed; absent when none was open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<SessionId>,
}

/// `GET /api/v1/vpn/status`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VpnStatus {
    /// `connected` when at least one session of the user is open.
    pub status: ConnectionStatus,
    /// Whether a server has seen a handshake of one of the devices within the last three minutes.
    #[schema(example = true)]
    pub tunnel_up: bool,
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_handshake_at: Option<OffsetDateTime>,
    /// One entry for each device.
    pub devices: Vec<DeviceConnection>,
}

/// The connection of one device.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DeviceConnection {
    pub device_id: DeviceId,
    #[schema(example = "MacBook Pro")]
    pub device_name: String,
    pub status: ConnectionStatus,
    #[schema(example = true)]
    pub tunnel_up: bool,
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_handshake_at: Option<OffsetDateTime>,
    #[schema(value_type = String, example = "10.8.0.45")]
    pub assigned_ip: Ipv4Addr,
    pub server_id: ServerId,
    #[schema(example = "us-east")]
    pub server_region: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Session>,
}

/// An open session.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Session {
    pub session_id: SessionId,
    #[serde(with = "time::serde::rfc3339")]
    pub connected_at: OffsetDateTime,
    /// Billed bytes from the device in this session.
    #[schema(example = 5_000_000)]
    pub rx_bytes: i64,
    /// Billed bytes to the device in this session.
    #[schema(example = 20_000_000)]
    pub tx_bytes: i64,
}
