//! The WireGuard configuration file of a device (design/api.md, wg-quick(8)). Made of parsed values only: keys,
//! addresses, numbers. Nothing a user typed can become a line of it.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use zeroize::Zeroizing;

use crate::ipam::Addresses;
use crate::servers::Server;
use crate::tenants::ClientSettings;

/// What stands in a configuration whose private key only the client knows.
const PLACEHOLDER: &str = "REPLACE_WITH_YOUR_PRIVATE_KEY";
/// Keeps NAT mappings open (WireGuard's own recommendation).
const PERSISTENT_KEEPALIVE_SECONDS: u16 = 25;

/// Everything goes through the tunnel.
const FULL_TUNNEL: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)),
];

/// Platform-wide values of every configuration.
#[derive(Clone, Copy, Debug)]
pub struct ClientDefaults<'a> {
    pub dns: &'a [IpAddr],
    pub mtu: u16,
}

/// The keys of a configuration.
#[derive(Clone)]
pub struct ConfigKeys {
    pub private: ConfigKey,
    /// Mixed into every handshake besides the key pairs (whitepaper §5.2).
    pub preshared: Option<Zeroizing<[u8; 32]>>,
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
    keys: &ConfigKeys,
    addresses: Addresses,
    server: &Server,
    tenant: &ClientSettings,
    defaults: ClientDefaults<'_>,
) -> Option<Zeroizing<String>> {
    let private_key = match &keys.private {
        ConfigKey::Known(key) => Zeroizing::new(STANDARD.encode(**key)),
        ConfigKey::OnlyAtTheClient => Zeroizing::new(PLACEHOLDER.to_owned()),
    };
    let preshared_key = Zeroizing::new(match &keys.preshared {
        Some(key) => format!("PresharedKey = {}\n", *Zeroizing::new(STANDARD.encode(**key))),
        None => String::new(),
    });
    let dns: Vec<_> = tenant.dns.as_deref().unwrap_or(defaults.dns).iter().map(ToString::to_string).collect();
    let allowed_ips = tenant.allowed_ips.as_deref().unwrap_or(&FULL_TUNNEL);
    let allowed_ips: Vec<_> = allowed_ips.iter().map(ToString::to_string).collect();
    // the whole file fits: no reallocation leaves a copy of the key behind
    let mut text = Zeroizing::new(String::with_capacity(4096));
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
         {}\
         AllowedIPs = {}\n\
         Endpoint = {}\n\
         PersistentKeepalive = {PERSISTENT_KEEPALIVE_SECONDS}\n",
        *private_key,
        addresses.ipv4,
        addresses.ipv6,
        dns.join(", "),
        tenant.mtu.unwrap_or(defaults.mtu),
        STANDARD.encode(server.public_key?),
        *preshared_key,
        allowed_ips.join(", "),
        SocketAddr::new(server.public_ip, server.endpoint_port),
    )
    .expect("writing to a string succeeds");
    Some(text)
}

/// The file as a QR code, an SVG picture.
///
/// # Errors
/// When it is longer than a code can hold (2,331 bytes at this level); files are about 400 bytes.
pub fn qr(file: &str) -> Result<Zeroizing<String>, qrcode::types::QrError> {
    let code = qrcode::QrCode::with_error_correction_level(file, qrcode::EcLevel::M)?;
    Ok(Zeroizing::new(code.render::<qrcode::render::svg::Color<'_>>().min_dimensions(320, 320).build()))
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
        let mut keys = ConfigKeys { private: ConfigKey::Known(Zeroizing::new([1; 32])), preshared: None };
        let defaults = ClientDefaults { dns: &dns, mtu: 1420 };
        let text =
            render_config(&keys, addresses, &server("2001:db8::1"), &ClientSettings::default(), defaults).unwrap();
        assert_eq!(
            *text,
            "[Interface]\nPrivateKey = AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\nAddress = 10.8.0.45/32, \
             fd00:cafe::2d/128\nDNS = 1.1.1.1, 2606:4700:4700::1111\nMTU = 1420\n\n[Peer]\nPublicKey = \
             AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = \
             [2001:db8::1]:51820\nPersistentKeepalive = 25\n"
        );
        keys.preshared = Some(Zeroizing::new([3; 32]));
        let with_preshared =
            render_config(&keys, addresses, &server("2001:db8::1"), &ClientSettings::default(), defaults).unwrap();
        let line = "PresharedKey = AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=\n";
        assert_eq!(*with_preshared, text.replace("AllowedIPs", &format!("{line}AllowedIPs")));
        keys.preshared = None;
        let tenant = ClientSettings {
            dns: Some(vec!["10.0.0.53".parse().unwrap()]),
            allowed_ips: Some(vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()]),
            mtu: Some(1280),
        };
        let of_tenant = render_config(&keys, addresses, &server("2001:db8::1"), &tenant, defaults).unwrap();
        let expected = text
            .replace("DNS = 1.1.1.1, 2606:4700:4700::1111", "DNS = 10.0.0.53")
            .replace("MTU = 1420", "MTU = 1280")
            .replace("AllowedIPs = 0.0.0.0/0, ::/0", "AllowedIPs = 10.0.0.0/8, fd00::/8");
        assert_eq!(*of_tenant, expected);
    }
}
