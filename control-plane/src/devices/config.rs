//! The WireGuard configuration file of a device (design/api.md, wg-quick(8)). Made of parsed values only: keys,
//! addresses, numbers. Nothing a user typed can become a line of it.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::ipam::Addresses;
use crate::servers::Server;

/// What stands in a configuration whose private key only the client knows.
const PLACEHOLDER: &str = "REPLACE_WITH_YOUR_PRIVATE_KEY";
/// Keeps NAT mappings open (WireGuard's own recommendation).
const PERSISTENT_KEEPALIVE_SECONDS: u16 = 25;

/// Platform-wide values of every configuration.
#[derive(Clone, Copy, Debug)]
pub struct ClientDefaults<'a> {
    pub dns: &'a [IpAddr],
    pub mtu: u16,
}

/// The private key of a configuration.
#[derive(Clone)]
pub enum ConfigKey {
    /// Made by the platform.
    Known(Zeroizing<[u8; 32]>),
    /// Made by the client.
    OnlyAtTheClient,
}

/// Renders the file. `None` when the server has not enrolled, so that its key is not known.
#[must_use]
pub fn render_config(
    key: &ConfigKey,
    addresses: Addresses,
    server: &Server,
    defaults: ClientDefaults<'_>,
) -> Option<Zeroizing<String>> {
    let private_key = match key {
        ConfigKey::Known(key) => Zeroizing::new(STANDARD.encode(**key)),
        ConfigKey::OnlyAtTheClient => Zeroizing::new(PLACEHOLDER.to_owned()),
    };
    let dns: Vec<_> = defaults.dns.iter().map(ToString::to_string).collect();
    // the whole file fits: no reallocation leaves a copy of the key behind
    let mut text = Zeroizing::new(String::with_capacity(1024));
    write!(
        text,
        "[Interface]\n\
         PrivateKey = {}\n\
         Address = {}/32, {}/128\n\
         DNS = {}\n\
         MTU = {}\n\
         \n\
         [Peer]\n\
         PublicKey = {}\n\
         AllowedIPs = 0.0.0.0/0, ::/0\n\
         Endpoint = {}\n\
         PersistentKeepalive = {PERSISTENT_KEEPALIVE_SECONDS}\n",
        *private_key,
        addresses.ipv4,
        addresses.ipv6,
        dns.join(", "),
        defaults.mtu,
        STANDARD.encode(server.public_key?),
        SocketAddr::new(server.public_ip, server.endpoint_port),
    )
    .expect("writing to a string succeeds");
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvault_types::{PoolId, ServerId};
    use uuid::Uuid;

    fn server(public_ip: &str) -> Server {
        Server {
            id: ServerId::from_uuid(Uuid::nil()),
            name: "s".into(),
            region: "r".into(),
            public_ip: public_ip.parse().unwrap(),
            endpoint_port: 51820,
            public_key: Some([2; 32]),
            pool: PoolId::from_uuid(Uuid::nil()),
            capacity: 10,
            peers: 0,
            active: true,
            last_seen_at: None,
            acked_revision: 0,
        }
    }

    #[test]
    fn the_file_is_exactly_what_wg_quick_reads() {
        let addresses = Addresses { ipv4: "10.8.0.45".parse().unwrap(), ipv6: "fd00:cafe::2d".parse().unwrap() };
        let dns = ["1.1.1.1".parse().unwrap(), "2606:4700:4700::1111".parse().unwrap()];
        let key = ConfigKey::Known(Zeroizing::new([1; 32]));
        let defaults = ClientDefaults { dns: &dns, mtu: 1420 };
        let text = render_config(&key, addresses, &server("2001:db8::1"), defaults).unwrap();
        assert_eq!(
            *text,
            "[Interface]\nPrivateKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\nAddress = 10.8.0.45/32, \
             fd00:cafe::2d/128\nDNS = 1.1.1.1, 2606:4700:4700::1111\nMTU = 1420\n\n[Peer]\nPublicKey = \
             AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = \
             [2001:db8::1]:51820\nPersistentKeepalive = 25\n"
        );
    }
}
