//! What a tenant sets for the configurations of its devices. Kept and rendered as addresses and numbers, never as text.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::db::DbError;
use crate::tenancy::TenantTx;

/// `None`: the platform's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientSettings {
    pub dns: Option<Vec<IpAddr>>,
    /// What goes through the tunnel.
    pub allowed_ips: Option<Vec<IpNet>>,
    pub mtu: Option<u16>,
}

impl ClientSettings {
    pub(crate) fn from_row(dns: Option<Vec<IpNet>>, allowed_ips: Option<Vec<IpNet>>, mtu: Option<i32>) -> Self {
        Self {
            dns: dns.map(|all| all.iter().map(IpNet::addr).collect()),
            allowed_ips,
            mtu: mtu.and_then(|mtu| u16::try_from(mtu).ok()),
        }
    }
}

/// The current tenant's.
///
/// # Errors
/// Those of the database.
pub async fn client_settings(tx: &mut TenantTx) -> Result<ClientSettings, DbError> {
    let tenant = tx.tenant().uuid();
    let row = sqlx::query!(
        r#"select client_dns as "dns: Vec<IpNet>", client_allowed_ips as "allowed_ips: Vec<IpNet>", client_mtu
           from cvault.tenants where tenant_id = $1"#,
        tenant
    )
    .fetch_one(tx.conn())
    .await?;
    Ok(ClientSettings::from_row(row.dns, row.allowed_ips, row.client_mtu))
}
