//! Where a registration has put a device, as the two statements tell it that register devices.

use cvault_types::{PoolId, ServerId};
use ipnet::IpNet;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::DbError;
use crate::ipam::{self, Addresses};
use crate::servers::Server;
use crate::tenants::ClientSettings;

/// Null but for the outcome when the device was not registered.
pub(super) struct PlacedRow {
    pub(super) device_id: Uuid,
    pub(super) outcome: String,
    pub(super) max_devices: Option<i32>,
    pub(super) devices: Option<i64>,
    pub(super) client_dns: Option<Vec<IpNet>>,
    pub(super) client_allowed_ips: Option<Vec<IpNet>>,
    pub(super) client_mtu: Option<i32>,
    pub(super) server_id: Option<Uuid>,
    pub(super) server_name: Option<String>,
    pub(super) region: Option<String>,
    pub(super) public_ip: Option<IpNet>,
    pub(super) endpoint_port: Option<i32>,
    pub(super) server_public_key: Option<Vec<u8>>,
    pub(super) pool_id: Option<Uuid>,
    pub(super) capacity: Option<i32>,
    pub(super) peer_count: Option<i64>,
    pub(super) last_seen_at: Option<OffsetDateTime>,
    pub(super) acked_revision: Option<i64>,
    pub(super) ipv4: Option<IpNet>,
    pub(super) ipv6: Option<IpNet>,
    pub(super) revision: Option<i64>,
}

/// All of it.
pub(super) struct Placed {
    pub(super) server: Server,
    pub(super) addresses: Addresses,
    pub(super) client: ClientSettings,
    pub(super) revision: u64,
}

impl TryFrom<PlacedRow> for Placed {
    type Error = DbError;

    fn try_from(row: PlacedRow) -> Result<Self, DbError> {
        let missing = || DbError::Other(sqlx::Error::ColumnNotFound("a column of a registered device".to_owned()));
        let server = Server {
            id: ServerId::from_uuid(row.server_id.ok_or_else(missing)?),
            name: row.server_name.ok_or_else(missing)?,
            region: row.region.ok_or_else(missing)?,
            public_ip: row.public_ip.ok_or_else(missing)?.addr(),
            endpoint_port: u16::try_from(row.endpoint_port.ok_or_else(missing)?).expect("servers_endpoint_port"),
            public_key: row.server_public_key.and_then(|key| key.try_into().ok()),
            pool: PoolId::from_uuid(row.pool_id.ok_or_else(missing)?),
            capacity: u32::try_from(row.capacity.ok_or_else(missing)?).expect("servers_capacity"),
            peers: u32::try_from(row.peer_count.ok_or_else(missing)?).unwrap_or_default(),
            active: true,
            last_seen_at: row.last_seen_at,
            acked_revision: u64::try_from(row.acked_revision.ok_or_else(missing)?).unwrap_or_default(),
        };
        Ok(Self {
            server,
            addresses: ipam::addresses(row.ipv4.ok_or_else(missing)?, row.ipv6.ok_or_else(missing)?)?,
            client: ClientSettings::from_row(row.client_dns, row.client_allowed_ips, row.client_mtu),
            revision: u64::try_from(row.revision.ok_or_else(missing)?).expect("revisions count from 1"),
        })
    }
}
