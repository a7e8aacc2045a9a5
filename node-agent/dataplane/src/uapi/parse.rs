//! `set=1` requests, line by line.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use ipnet::IpNet;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

use crate::change::{DeviceChange, PeerChange, Secret, canonical};
use crate::policy::TenantChange;
use crate::policy::lease::Then;

/// More peers than this are no sensible request: twice the capacity.
const MAX_PEERS: usize = 131_072;
/// Lines of one request that carry prefixes, for all peers together.
const MAX_PREFIXES: usize = 1 << 20;
/// Sections for tenants in one request, and lines of all of them that carry prefixes: they are applied together, in milliseconds.
const MAX_SECTIONS: usize = 1024;
const MAX_SECTION_PREFIXES: usize = 4096;

/// A line that cannot be understood. The answer is `errno=-22` (`EINVAL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid line in the request")]
pub struct Invalid;

/// A whole request.
#[derive(Clone, Debug, Default)]
pub struct SetRequest {
    /// Changes of the device.
    pub device: DeviceChange,
    /// All peers that are not in the request go.
    pub replace_peers: bool,
    /// After the peers of this request, those that an earlier process left and nobody added again go.
    pub end_replace: bool,
    /// Changes of peers, in order.
    pub peers: Vec<PeerChange>,
}

/// Collects the lines between `set=1` and the empty line.
#[derive(Debug, Default)]
pub struct SetParser {
    request: SetRequest,
    prefixes: usize,
    section_prefixes: usize,
    /// Where the section of the last peer begins: what comes behind are more of its prefixes.
    section: usize,
}

impl SetParser {
    /// Takes one line without its end.
    ///
    /// # Errors
    /// [`Invalid`] when key or value are unknown; the request is to be refused as a whole.
    pub fn line(&mut self, line: &str) -> Result<(), Invalid> {
        let (key, value) = line.split_once('=').ok_or(Invalid)?;
        if key == "public_key" {
            let public_key = hex_bytes(value)?;
            self.section = self.request.peers.len();
            return self.begin_peer(PeerChange { public_key, ..PeerChange::default() });
        }
        if matches!(key, "allowed_ip" | "cvault_overlay" | "cvault_host" | "cvault_allow_to" | "cvault_deny_to") {
            self.prefixes += 1;
            if self.prefixes > MAX_PREFIXES {
                return Err(Invalid);
            }
        }
        if matches!(key, "cvault_allow_to" | "cvault_deny_to") {
            self.section_prefixes += 1;
            if self.section_prefixes > MAX_SECTION_PREFIXES {
                return Err(Invalid);
            }
        }
        if let Some(peer) = self.request.peers.last()
            && key == "allowed_ip"
            && value.starts_with('-')
            && !peer.allowed_ips.is_empty()
        {
            // In one change removals are made before additions.
            let public_key = peer.public_key;
            self.begin_peer(PeerChange { public_key, update_only: true, ..PeerChange::default() })?;
        }
        let of_section = match key {
            "allowed_ip" => self.request.peers.last_mut(),
            _ => self.request.peers.get_mut(self.section),
        };
        match of_section {
            Some(peer) => peer_line(peer, key, value),
            None => device_line(&mut self.request, key, value),
        }
    }

    fn begin_peer(&mut self, peer: PeerChange) -> Result<(), Invalid> {
        if self.request.peers.len() == MAX_PEERS {
            return Err(Invalid);
        }
        self.request.peers.push(peer);
        Ok(())
    }

    /// The request, at the empty line.
    #[must_use]
    pub fn finish(self) -> SetRequest {
        self.request
    }
}

fn device_line(request: &mut SetRequest, key: &str, value: &str) -> Result<(), Invalid> {
    let device = &mut request.device;
    match key {
        "private_key" => device.private_key = Some(Secret::private_key(hex_bytes(value)?)),
        "listen_port" => device.listen_port = Some(number(value)?),
        "fwmark" => device.fwmark = Some(if value.is_empty() { 0 } else { number(value)? }),
        "replace_peers" => request.replace_peers = truth(value)?,
        "cvault_end_replace" => request.end_replace = truth(value)?,
        "cvault_overlay" => device.overlay.push(number(value)?),
        "cvault_replace_overlay" => device.replace_overlay = truth(value)?,
        "cvault_journal_ack" => device.journal_ack = Some(number(value)?),
        "cvault_host" => device.policy.hosts.push(number(value)?),
        "cvault_replace_hosts" => device.policy.replace_hosts = truth(value)?,
        "cvault_tenant_settings" => {
            if device.policy.tenants.len() == MAX_SECTIONS {
                return Err(Invalid);
            }
            device.policy.tenants.push(TenantChange { tenant: tenant(value)?, ..TenantChange::default() });
        }
        _ => return device.policy.tenants.last_mut().map_or(Err(Invalid), |tenant| tenant_line(tenant, key, value)),
    }
    Ok(())
}

fn tenant_line(tenant: &mut TenantChange, key: &str, value: &str) -> Result<(), Invalid> {
    match key {
        "cvault_tenant_remove" => tenant.remove = truth(value)?,
        "cvault_tenant_replace" => tenant.replace = truth(value)?,
        "cvault_allow_intra" => tenant.allow_intra = Some(truth(value)?),
        "cvault_tenant_rate_up" => tenant.rate_up = Some(number(value)?),
        "cvault_tenant_rate_down" => tenant.rate_down = Some(number(value)?),
        "cvault_smtp" => tenant.smtp = Some(choice(value, "allow", "deny")?),
        "cvault_allow_to" => tenant.allow_to.push(prefix(value)?),
        "cvault_deny_to" => tenant.deny_to.push(number(value)?),
        _ => return Err(Invalid),
    }
    Ok(())
}

fn peer_line(peer: &mut PeerChange, key: &str, value: &str) -> Result<(), Invalid> {
    match key {
        "remove" => peer.remove = truth(value)?,
        "update_only" => peer.update_only = truth(value)?,
        "preshared_key" => peer.preshared_key = Some(Secret::new(hex_bytes(value)?)),
        "endpoint" => peer.endpoint = Some(canonical(endpoint(value)?)),
        "persistent_keepalive_interval" => peer.persistent_keepalive = Some(number(value)?),
        "replace_allowed_ips" => peer.replace_allowed_ips = truth(value)?,
        "allowed_ip" => match value.strip_prefix('-') {
            Some(value) => peer.removed_ips.push(prefix(value)?),
            None => {
                if peer.allowed_ips.is_empty() {
                    // Most have one; by itself the list would begin with room for four.
                    peer.allowed_ips.reserve_exact(1);
                }
                peer.allowed_ips.push(prefix(value.strip_prefix('+').unwrap_or(value))?);
            }
        },
        "protocol_version" if value == "1" => {}
        "cvault_tenant" => peer.tenant = Some(tenant(value)?),
        "cvault_generation" => peer.generation = Some(number(value)?),
        "cvault_rate_up" => peer.limits.rate_up = Some(number(value)?),
        "cvault_rate_down" => peer.limits.rate_down = Some(number(value)?),
        "cvault_lease" => peer.limits.lease = Some(if value == "none" { None } else { Some(number(value)?) }),
        "cvault_lease_then" => peer.limits.then = Some(then(value)?),
        _ => return Err(Invalid),
    }
    Ok(())
}

fn number<T: FromStr>(value: &str) -> Result<T, Invalid> {
    // The standard library would take it.
    if value.starts_with('+') {
        return Err(Invalid);
    }
    value.parse().map_err(|_| Invalid)
}

/// `wg` writes the zone of a link-local address as the name of an interface; the standard library reads its number.
fn endpoint(value: &str) -> Result<SocketAddr, Invalid> {
    let named = || {
        let (addr, rest) = value.strip_prefix('[')?.split_once('%')?;
        let (zone, port) = rest.split_once("]:")?;
        let any = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
        let scope = name_to_index(any, zone).ok()?;
        Some(SocketAddrV6::new(number(addr).ok()?, number(port).ok()?, 0, scope).into())
    };
    number(value).or_else(|Invalid| named().ok_or(Invalid))
}

fn prefix(value: &str) -> Result<IpNet, Invalid> {
    let (addr, length) = value.split_once('/').ok_or(Invalid)?;
    let net = IpNet::new(number::<IpAddr>(addr)?, number(length)?).map_err(|_| Invalid)?;
    Ok(net.trunc())
}

fn truth(value: &str) -> Result<bool, Invalid> {
    choice(value, "true", "false")
}

fn choice(value: &str, yes: &str, no: &str) -> Result<bool, Invalid> {
    if value != yes && value != no {
        return Err(Invalid);
    }
    Ok(value == yes)
}

/// A throttle to nothing is a block, and has that name.
fn then(value: &str) -> Result<Then, Invalid> {
    match value.strip_prefix("throttle:").map(number) {
        Some(Ok(bits)) if bits > 0 => Ok(Then::Throttle(bits)),
        None if value == "block" => Ok(Then::Block),
        Some(_) | None => Err(Invalid),
    }
}

/// The nil UUID names nobody: were it taken for "no tenant", the peer would be under no policy.
fn tenant(value: &str) -> Result<[u8; 16], Invalid> {
    let tenant = hex_bytes(value)?;
    if tenant == [0; 16] {
        return Err(Invalid);
    }
    Ok(tenant)
}

fn hex_bytes<const N: usize>(value: &str) -> Result<[u8; N], Invalid> {
    let (digits, rest) = value.as_bytes().as_chunks::<2>();
    if digits.len() != N || !rest.is_empty() {
        return Err(Invalid);
    }
    // All digits first, the verdict last: keys are half of a large request, and a branch for each digit is most of it.
    let mut bytes = [0; N];
    let mut seen = 0;
    for (byte, [high, low]) in bytes.iter_mut().zip(digits) {
        let (high, low) = (DIGITS[usize::from(*high)], DIGITS[usize::from(*low)]);
        seen |= high | low;
        *byte = high << 4 | low & 0xf;
    }
    if seen & NO_DIGIT == 0 { Ok(bytes) } else { Err(Invalid) }
}

const NO_DIGIT: u8 = 0x80;
/// The value of each hexadecimal digit.
const DIGITS: [u8; 256] = {
    let mut digits = [NO_DIGIT; 256];
    let mut value = 0;
    while value < 16 {
        digits[b"0123456789abcdef"[value as usize] as usize] = value;
        digits[b"0123456789ABCDEF"[value as usize] as usize] = value;
        value += 1;
    }
    digits
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::journal::JournalAck;

    const KEY: &str = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33";

    fn parse(text: &str) -> Result<SetRequest, Invalid> {
        let mut parser = SetParser::default();
        text.lines().try_for_each(|line| parser.line(line))?;
        Ok(parser.finish())
    }

    #[test]
    fn a_whole_request_is_read_in_order() {
        let request = parse(&format!(
            "private_key={KEY}\nlisten_port=51820\nfwmark=\nreplace_peers=true\ncvault_replace_overlay=true\n\
             cvault_overlay=10.8.0.0/16\ncvault_overlay=fd00:cafe::/64\ncvault_journal_ack=256:0000beef\n\
             public_key={KEY}\nprotocol_version=1\nendpoint=[::ffff:192.0.2.1]:51820\nreplace_allowed_ips=true\n\
             allowed_ip=10.8.0.2/32\nallowed_ip=-10.8.0.9/32\ncvault_tenant=000102030405060708090a0b0c0d0e0f\n\
             cvault_generation=7\npersistent_keepalive_interval=25\npublic_key={KEY}\nremove=true"
        ))
        .unwrap();
        assert_eq!((request.device.listen_port, request.device.fwmark), (Some(51820), Some(0)));
        assert!(request.replace_peers && request.device.replace_overlay && !request.end_replace);
        assert!(parse("cvault_end_replace=true").unwrap().end_replace);
        assert_eq!(
            (request.device.overlay.len(), request.device.journal_ack),
            (2, Some(JournalAck { len: 256, last_crc: 0xbeef }))
        );
        let [first, more, second] = &request.peers[..] else { panic!("two peers, and more prefixes of the first") };
        assert_eq!(first.endpoint, Some("192.0.2.1:51820".parse().unwrap()));
        assert_eq!((first.allowed_ips.len(), more.removed_ips.len()), (1, 1));
        assert!(more.public_key == first.public_key && more.update_only && !first.update_only);
        assert_eq!((first.generation, first.persistent_keepalive), (Some(7), Some(25)));
        assert_eq!(first.tenant.unwrap()[15], 15);
        assert!(second.remove && !first.remove);
    }

    #[test]
    fn prefixes_come_and_go_in_the_order_of_their_lines() {
        let parts = |lines: &[&str]| -> Vec<(bool, Vec<String>, Vec<String>)> {
            let lines: String = lines.iter().map(|net| format!("allowed_ip={net}\n")).collect();
            let peers = parse(&format!("public_key={KEY}\n{lines}persistent_keepalive_interval=7")).unwrap().peers;
            assert!(peers.iter().all(|peer| peer.public_key == peers[0].public_key));
            assert_eq!(peers[0].persistent_keepalive, Some(7), "of the peer, not of its last prefixes");
            let texts = |nets: &mut dyn Iterator<Item = &IpNet>| nets.map(ToString::to_string).collect();
            let part = |peer: &PeerChange| {
                (peer.update_only, texts(&mut peer.removed_ips.iter()), texts(&mut peer.allowed_ips.iter()))
            };
            peers.iter().map(part).collect()
        };
        let list = |nets: &[&str]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
        let (one, two) = ("10.0.0.1/32", "10.0.0.2/32");
        assert_eq!(parts(&["-10.0.0.1/32", one]), [(false, list(&[one]), list(&[one]))]);
        assert_eq!(
            parts(&["+10.0.0.1/32", "-10.0.0.1/32", "-10.0.0.2/32", two]),
            [(false, list(&[]), list(&[one])), (true, list(&[one, two]), list(&[two]))]
        );
    }

    #[test]
    fn a_private_key_is_kept_as_it_is_used() {
        let kept = |hex: &str| parse(&format!("private_key={hex}")).unwrap().device.private_key.unwrap();
        let mut used = [0xff; 32];
        (used[0], used[31]) = (0xf8, 0x7f);
        assert_eq!(kept(&"ff".repeat(32)), Secret::new(used));
        (used[0], used[31]) = (0x08, 0x40);
        used[1..31].fill(0);
        assert_eq!(kept(&format!("0f{}", "00".repeat(31))), Secret::new(used));
        assert!(kept(&"00".repeat(32)).is_zero(), "none");
        let preshared = parse(&format!("public_key={KEY}\npreshared_key={}", "ff".repeat(32))).unwrap();
        assert_eq!(preshared.peers[0].preshared_key, Some(Secret::new([0xff; 32])), "these are no numbers");
    }

    #[test]
    fn settings_of_tenants_are_sections_before_the_peers() {
        let (one, other) = ("01".repeat(16), "02".repeat(16));
        let request = parse(&format!(
            "cvault_replace_hosts=true\ncvault_host=192.0.2.1\ncvault_host=2001:db8::1\n\
             cvault_tenant_settings={one}\ncvault_tenant_replace=true\ncvault_allow_intra=true\n\
             cvault_tenant_rate_up=1000\ncvault_tenant_rate_down=0\ncvault_smtp=allow\ncvault_allow_to=10.0.0.1/8\n\
             cvault_deny_to=::/0 tcp 465-587\ncvault_deny_to=192.0.2.0/24\n\
             cvault_tenant_settings={other}\ncvault_tenant_remove=true\nlisten_port=7\n\
             public_key={KEY}\ncvault_rate_up=1\ncvault_rate_down=0\ncvault_lease=18446744073709551615\n\
             cvault_lease_then=throttle:64000\npublic_key={KEY}\ncvault_lease=none\ncvault_lease_then=block"
        ))
        .unwrap();
        let policy = request.device.policy;
        assert!(policy.replace_hosts && policy.hosts.len() == 2 && request.device.listen_port == Some(7));
        let [first, second] = &policy.tenants[..] else { panic!("two tenants") };
        assert_eq!((first.tenant, first.replace, first.allow_intra), ([1; 16], true, Some(true)));
        assert_eq!((first.rate_up, first.rate_down, first.smtp), (Some(1000), Some(0), Some(true)));
        assert_eq!(first.allow_to, ["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(first.deny_to, ["::/0 tcp 465-587".parse().unwrap(), "192.0.2.0/24".parse().unwrap()]);
        let removed = TenantChange { tenant: [2; 16], remove: true, ..TenantChange::default() };
        assert_eq!(*second, removed);
        let [first, second] = &request.peers[..] else { panic!("two peers") };
        assert_eq!((first.limits.rate_up, first.limits.rate_down), (Some(1), Some(0)));
        assert_eq!((first.limits.lease, first.limits.then), (Some(Some(u64::MAX)), Some(Then::Throttle(64_000))));
        assert_eq!((second.limits.lease, second.limits.then), (Some(None), Some(Then::Block)));
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in [
            "=",
            "listen_port",
            "listen_port=65536",
            "listen_port=-1",
            "listen_port=+1",
            "private_key=00",
            "private_key=zz5996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33",
            "replace_peers=yes",
            "allowed_ip=10.0.0.0/8",
            "unknown=1",
            "cvault_overlay=10.0.0.0/33",
            "cvault_journal_ack=256",
            "cvault_host=192.0.2.1/32",
            "cvault_tenant_settings=00000000000000000000000000000000",
            "cvault_allow_intra=true",
            "cvault_rate_up=1",
        ] {
            assert_eq!(parse(line).err(), Some(Invalid), "{line:?}");
        }
        for line in [
            "endpoint=example.org:51820",
            "endpoint=192.0.2.1",
            "allowed_ip=10.0.0.0",
            "allowed_ip=10.0.0.0/33",
            "allowed_ip=10.0.0.0/+8",
            "allowed_ip=10.0.0.0/",
            "allowed_ip=10.0.0.0/255.0.0.0",
            "allowed_ip=fd00::/129",
            "persistent_keepalive_interval=off",
            "preshared_key=",
            "protocol_version=2",
            "cvault_tenant=00",
            "cvault_tenant=00000000000000000000000000000000",
            "cvault_generation=18446744073709551616",
            "private_key=00",
            "cvault_tenant_settings=01010101010101010101010101010101",
            "cvault_allow_intra=true",
            "cvault_rate_up=-1",
            "cvault_lease=",
            "cvault_lease_then=throttle",
            "cvault_lease_then=throttle:0",
        ] {
            assert_eq!(parse(&format!("public_key={KEY}\n{line}")).err(), Some(Invalid), "{line:?}");
        }
        let section = format!("cvault_tenant_settings={}", "01".repeat(16));
        for line in [
            "cvault_allow_intra=1",
            "cvault_tenant_rate_up=",
            "cvault_tenant_rate_down=1.5",
            "cvault_smtp=true",
            "cvault_allow_to=10.0.0.1",
            "cvault_deny_to=0.0.0.0/0 icmp 7",
            "cvault_tenant_remove=1",
            "cvault_lease=1",
        ] {
            assert_eq!(parse(&format!("{section}\n{line}")).err(), Some(Invalid), "{line:?}");
        }
    }

    #[test]
    fn the_zone_of_an_endpoint_is_a_number_or_the_name_of_an_interface() {
        let endpoint = |text: &str| parse(&format!("public_key={KEY}\nendpoint={text}")).map(|r| r.peers[0].endpoint);
        let on = |scope| Some(SocketAddrV6::new("fe80::1".parse().unwrap(), 51820, 0, scope).into());
        assert_eq!(endpoint("[fe80::1]:51820"), Ok(on(0)));
        assert_eq!(endpoint("[fe80::1%7]:51820"), Ok(on(7)));
        assert_eq!(endpoint("[fe80::1%lo]:51820"), Ok(on(1)), "the loopback is the first interface everywhere");
        for wrong in ["[fe80::1%no-such-one]:1", "[fe80::1%lo]", "[fe80::1%lo]:+1", "[%lo]:1", "fe80::1%lo:1"] {
            assert_eq!(endpoint(wrong), Err(Invalid), "{wrong}");
        }
    }

    #[test]
    fn a_request_of_hostile_size_is_refused() {
        let mut parser = SetParser::default();
        let line = format!("public_key={KEY}");
        assert!((0..MAX_PEERS).all(|_| parser.line(&line).is_ok()));
        assert_eq!(parser.line(&line), Err(Invalid));
        let mut parser = SetParser::default();
        assert!((0..MAX_PREFIXES).all(|_| parser.line("cvault_overlay=10.0.0.0/8").is_ok()));
        assert_eq!(parser.line("cvault_overlay=10.0.0.0/8"), Err(Invalid));
        let mut parser = SetParser::default();
        let section = format!("cvault_tenant_settings={}", "01".repeat(16));
        assert!((0..MAX_SECTIONS).all(|_| parser.line(&section).is_ok()));
        assert_eq!(parser.line(&section), Err(Invalid));
        assert!((0..MAX_SECTION_PREFIXES).all(|_| parser.line("cvault_deny_to=10.0.0.0/8").is_ok()));
        assert_eq!(parser.line("cvault_allow_to=10.0.0.0/8"), Err(Invalid));
    }

    proptest! {
        #[test]
        fn any_line_is_read_without_panic(key in "[a-z_]{0,30}", value in ".{0,100}") {
            let _ = parse(&format!("{key}={value}"));
            let _ = parse(&format!("public_key={KEY}\n{key}={value}"));
            let _ = parse(&format!("cvault_tenant_settings={}\n{key}={value}", "01".repeat(16)));
        }
    }
}
