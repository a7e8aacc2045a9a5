//! What the WireGuard interface must look like, parsed once from the control plane's message.

use std::net::IpAddr;

use cvault_node_protocol::v1;
use ipnet::IpNet;

/// The smallest MTU that IPv6 allows.
const MIN_MTU: u32 = 1280;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) listen_port: u16,
    /// The server's own inner addresses with the pool's prefix: `10.8.0.1/16`.
    pub(crate) addresses: Vec<IpNet>,
    /// The prefixes in which peers live: `10.8.0.0/16`.
    pub(crate) overlay: Vec<IpNet>,
    pub(crate) mtu: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InterfaceError {
    #[error("the listen port {0} is not a port")]
    Port(u32),
    #[error("the MTU {0} is not between 1280 and 65535")]
    Mtu(u32),
    #[error("`{0}` is not an address with a prefix length")]
    Address(String),
    #[error("the interface has no address or no overlay")]
    Empty,
    #[error("the interface's address {0} is outside the overlay")]
    Outside(IpNet),
}

impl Interface {
    pub(crate) fn parse(config: &v1::InterfaceConfig) -> Result<Self, InterfaceError> {
        let listen_port = u16::try_from(config.listen_port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or(InterfaceError::Port(config.listen_port))?;
        if !(MIN_MTU..=65_535).contains(&config.mtu) {
            return Err(InterfaceError::Mtu(config.mtu));
        }
        let addresses = parse_all(&config.addresses)?;
        let overlay: Vec<_> = parse_all(&config.overlay)?.iter().map(IpNet::trunc).collect();
        if addresses.is_empty() || overlay.is_empty() {
            return Err(InterfaceError::Empty);
        }
        let outside = |address: &&IpNet| !overlay.iter().any(|prefix| prefix.contains(&address.addr()));
        if let Some(address) = addresses.iter().find(outside) {
            return Err(InterfaceError::Outside(*address));
        }
        Ok(Self { listen_port, addresses, overlay, mtu: config.mtu })
    }

    /// The server's own inner addresses.
    pub(crate) fn own(&self) -> Vec<IpAddr> {
        self.addresses.iter().map(IpNet::addr).collect()
    }
}

fn parse_all(texts: &[String]) -> Result<Vec<IpNet>, InterfaceError> {
    texts.iter().map(|text| text.parse().map_err(|_| InterfaceError::Address(text.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> v1::InterfaceConfig {
        v1::InterfaceConfig {
            listen_port: 51820,
            addresses: vec!["10.8.0.1/16".to_owned()],
            overlay: vec!["10.8.0.0/16".to_owned()],
            mtu: 1420,
        }
    }

    #[test]
    fn impossible_interfaces_are_refused_by_name() {
        assert!(Interface::parse(&config()).is_ok());
        let port = v1::InterfaceConfig { listen_port: 70_000, ..config() };
        assert_eq!(Interface::parse(&port), Err(InterfaceError::Port(70_000)));
        let mtu = v1::InterfaceConfig { mtu: 0, ..config() };
        assert_eq!(Interface::parse(&mtu), Err(InterfaceError::Mtu(0)));
        let outside = v1::InterfaceConfig { addresses: vec!["192.0.2.1/24".to_owned()], ..config() };
        assert!(matches!(Interface::parse(&outside), Err(InterfaceError::Outside(_))));
        let text = v1::InterfaceConfig { overlay: vec!["; drop table".to_owned()], ..config() };
        assert!(matches!(Interface::parse(&text), Err(InterfaceError::Address(_))));
    }
}
