//! The answer to `get=1`.

use std::fmt::Write;

use crate::drops::Drop;
use crate::engine::PeerView;
use crate::io::mailbox::DeviceState;
use crate::policy::lease::Then;
use crate::policy::{PeerDrops, PeerLimits, TenantId, TenantSettings};

pub(crate) fn device(state: &DeviceState) -> String {
    let mut text = String::with_capacity(4096);
    let view = &state.view;
    if let Some(secret) = &view.private_key {
        line(&mut text, "private_key", hex::encode(*secret.0));
    }
    line(&mut text, "listen_port", state.listen_port);
    if state.fwmark != 0 {
        line(&mut text, "fwmark", state.fwmark);
    }
    line(&mut text, "cvault_epoch", hex::encode(view.epoch));
    line(&mut text, "cvault_peers", view.peers);
    line(&mut text, "cvault_live_peers", view.live_peers);
    line(&mut text, "cvault_handshakes", view.handshakes);
    for net in &view.overlay {
        line(&mut text, "cvault_overlay", net);
    }
    for host in &view.hosts {
        line(&mut text, "cvault_host", host);
    }
    for reason in Drop::ALL {
        line(&mut text, &format!("cvault_drop_{}", reason.name()), view.drops.get(reason).packets);
    }
    for reason in Drop::ALL {
        line(&mut text, &format!("cvault_dropped_bytes_{}", reason.name()), view.drops.get(reason).bytes);
    }
    let shell = &state.shell;
    for (name, on) in [
        ("tun_tso", shell.tun_tso),
        ("tun_uso", shell.tun_uso),
        ("tun_merge", shell.tun_merge),
        ("udp_gso", shell.udp_gso),
        ("udp_gro", shell.udp_gro),
    ] {
        line(&mut text, &format!("cvault_offload_{name}"), u8::from(on));
    }
    line(&mut text, "cvault_udp_gso_refused_paths", shell.udp_gso_refused);
    line(&mut text, "cvault_tun_read_bytes", shell.tun_read_bytes);
    line(&mut text, "cvault_tun_split_bytes", shell.tun_split_bytes);
    line(&mut text, "cvault_tun_written_bytes", shell.tun_written_bytes);
    line(&mut text, "cvault_tun_merged_bytes", shell.tun_merged_bytes);
    line(&mut text, "cvault_tun_read_errors", shell.tun_read_errors);
    line(&mut text, "cvault_socket_read_errors", shell.socket_read_errors);
    line(&mut text, "cvault_panics", shell.panics);
    line(&mut text, "cvault_socket_drops", shell.socket_drops);
    line(&mut text, "cvault_hairpin_packets", view.hairpin.packets);
    line(&mut text, "cvault_hairpin_bytes", view.hairpin.bytes);
    line(&mut text, "cvault_workers", state.workers.len());
    for (number, worker) in state.workers.iter().enumerate() {
        line(&mut text, &format!("cvault_worker_{number}_forwarded"), worker.forwarded);
        line(&mut text, &format!("cvault_worker_{number}_ring_drops"), worker.ring_drops);
        line(&mut text, &format!("cvault_worker_{number}_stalled"), u8::from(worker.stalled));
    }
    text
}

/// As a `set` would say it.
pub(crate) fn tenant(text: &mut String, id: &TenantId, settings: &TenantSettings) {
    line(text, "cvault_tenant_settings", hex::encode(id));
    line(text, "cvault_allow_intra", settings.allow_intra);
    line(text, "cvault_tenant_rate_up", settings.rate_up);
    line(text, "cvault_tenant_rate_down", settings.rate_down);
    line(text, "cvault_smtp", if settings.smtp { "allow" } else { "deny" });
    for net in &settings.allow_to {
        line(text, "cvault_allow_to", net);
    }
    for rule in &settings.deny_to {
        line(text, "cvault_deny_to", rule);
    }
}

pub(crate) fn peer(text: &mut String, peer: &PeerView) {
    line(text, "public_key", hex::encode(peer.public_key));
    let psk = peer.preshared_key.as_ref().map_or([0; 32], |psk| *psk.0);
    line(text, "preshared_key", hex::encode(psk));
    line(text, "protocol_version", 1);
    if let Some(endpoint) = peer.endpoint {
        line(text, "endpoint", endpoint);
    }
    let counts = &peer.counts;
    line(text, "last_handshake_time_sec", counts.last_handshake_ms / 1000);
    line(text, "last_handshake_time_nsec", counts.last_handshake_ms % 1000 * 1_000_000);
    line(text, "tx_bytes", counts.tx_wire);
    line(text, "rx_bytes", counts.rx_wire);
    line(text, "persistent_keepalive_interval", peer.persistent_keepalive);
    for net in &peer.allowed_ips {
        line(text, "allowed_ip", net);
    }
    if let Some(tenant) = peer.tenant {
        line(text, "cvault_tenant", hex::encode(tenant));
    }
    line(text, "cvault_generation", peer.generation);
    line(text, "cvault_rx_inner", counts.rx_inner);
    line(text, "cvault_tx_inner", counts.tx_inner);
    line(text, "cvault_rx_packets", counts.rx_packets);
    line(text, "cvault_tx_packets", counts.tx_packets);
    limits(text, &peer.limits);
    for (reason, packets) in peer.drops.iter().flat_map(PeerDrops::reasons) {
        line(text, &format!("cvault_peer_drop_{}", reason.name()), packets);
    }
}

/// Only what is limited: most of 65,000 peers are not.
fn limits(text: &mut String, limits: &PeerLimits) {
    for (key, bits) in [("cvault_rate_up", limits.rate_up), ("cvault_rate_down", limits.rate_down)] {
        if bits > 0 {
            line(text, key, bits);
        }
    }
    if let Some(until) = limits.lease {
        line(text, "cvault_lease", until);
    }
    match limits.then {
        Then::Block if limits.lease.is_none() => {}
        Then::Block => line(text, "cvault_lease_then", "block"),
        Then::Throttle(bits) => line(text, "cvault_lease_then", format_args!("throttle:{bits}")),
    }
}

fn line(text: &mut String, key: &str, value: impl std::fmt::Display) {
    writeln!(text, "{key}={value}").expect("a string takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::Counts;
    use crate::policy::{Clock, PeerPolicy, Tenants};

    fn view() -> PeerView {
        PeerView {
            public_key: [0xab; 32],
            preshared_key: None,
            endpoint: Some("[2001:db8::1]:51820".parse().unwrap()),
            persistent_keepalive: 25,
            allowed_ips: vec!["10.8.0.2/32".parse().unwrap(), "fd00::2/128".parse().unwrap()],
            tenant: Some([1; 16]),
            generation: 7,
            counts: Counts {
                rx_inner: 1,
                tx_inner: 2,
                rx_wire: 3,
                tx_wire: 4,
                rx_packets: 5,
                tx_packets: 6,
                last_handshake_ms: 1_700_000_000_123,
            },
            limits: PeerLimits::default(),
            drops: None,
        }
    }

    #[test]
    fn a_peer_reads_as_the_standard_tools_expect() {
        let mut text = String::new();
        peer(&mut text, &view());
        let expected = format!(
            "public_key={}\npreshared_key={}\nprotocol_version=1\nendpoint=[2001:db8::1]:51820\n\
             last_handshake_time_sec=1700000000\nlast_handshake_time_nsec=123000000\ntx_bytes=4\nrx_bytes=3\n\
             persistent_keepalive_interval=25\nallowed_ip=10.8.0.2/32\nallowed_ip=fd00::2/128\n\
             cvault_tenant={}\ncvault_generation=7\ncvault_rx_inner=1\ncvault_tx_inner=2\n\
             cvault_rx_packets=5\ncvault_tx_packets=6\n",
            "ab".repeat(32),
            "00".repeat(32),
            "01".repeat(16),
        );
        assert_eq!(text, expected);
    }

    #[test]
    fn limits_and_drops_follow_the_counters_of_a_peer() {
        let mut policy = PeerPolicy::default();
        policy.dropped(Drop::RateLimited, 1);
        policy.dropped(Drop::RateLimited, 1);
        policy.dropped(Drop::Port, 1);
        let mut view = PeerView {
            limits: PeerLimits { rate_up: 1_000_000, rate_down: 0, lease: Some(5), then: Then::Throttle(64_000) },
            drops: policy.drops().cloned(),
            ..view()
        };
        let tail = |view: &PeerView| {
            let mut text = String::new();
            peer(&mut text, view);
            text.split_once("cvault_tx_packets=6\n").unwrap().1.to_owned()
        };
        assert_eq!(
            tail(&view),
            "cvault_rate_up=1000000\ncvault_lease=5\ncvault_lease_then=throttle:64000\n\
             cvault_peer_drop_port=1\ncvault_peer_drop_rate_limited=2\n"
        );
        view.limits.then = Then::Block;
        assert!(tail(&view).contains("cvault_lease_then=block\n"));
    }

    #[test]
    fn a_tenant_reads_as_it_is_set() {
        let settings = TenantSettings {
            allow_intra: true,
            rate_up: 1,
            rate_down: 2,
            smtp: true,
            allow_to: vec!["10.0.0.0/8".parse().unwrap()],
            deny_to: vec!["::/0 udp 53".parse().unwrap()],
        };
        let mut text = String::new();
        tenant(&mut text, &[7; 16], &settings);
        let expected = format!(
            "cvault_tenant_settings={}\ncvault_allow_intra=true\ncvault_tenant_rate_up=1\ncvault_tenant_rate_down=2\n\
             cvault_smtp=allow\ncvault_allow_to=10.0.0.0/8\ncvault_deny_to=::/0 udp 53\n",
            "07".repeat(16)
        );
        assert_eq!(text, expected);
        let mut parser = crate::uapi::SetParser::default();
        text.lines().for_each(|line| parser.line(line).unwrap());
        let mut tenants = Tenants::default();
        tenants.change(Clock(0), parser.finish().device.policy.tenants).unwrap();
        assert_eq!(tenants.configured(0).collect::<Vec<_>>(), [(0, [7; 16], &settings)]);
    }
}
