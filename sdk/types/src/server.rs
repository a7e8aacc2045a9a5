//! Servers as tenants see them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ServerId;

/// `GET /api/v1/servers`
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ServerList {
    pub servers: Vec<Server>,
}

/// A WireGuard server of the shared pool.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Server {
    pub id: ServerId,
    #[schema(example = "vps-1")]
    pub name: String,
    #[schema(example = "us-east")]
    pub region: String,
    /// Percent of the capacity in use.
    #[schema(example = 45, minimum = 0, maximum = 100)]
    pub load: u8,
    /// Whether it takes new devices now.
    #[schema(example = true)]
    pub available: bool,
}
