//! What the engines are told: the standard's own keys only, so that every engine takes it.

use std::fmt::Write as _;

use cvault_tests::bench::{GeneratedPeer, endpoint_address, idle_peer_key, inner_address, server_secret};
use cvault_tests::lab::SERVER_V4;

/// The two ends inside the tunnel.
pub(crate) const INNER_SERVER: &str = "10.99.0.1";
pub(crate) const INNER_CLIENT: &str = "10.99.0.2";
pub(crate) const PORT: u16 = 51820;
/// The number of the one peer that carries traffic, beyond those that only shake hands.
const LIVE: u32 = 1_000_000;

/// The server with its one live peer.
pub(crate) fn server() -> String {
    let client = GeneratedPeer::numbered(LIVE);
    let mut text = server_alone();
    peer(&mut text, client.public.as_bytes(), INNER_CLIENT);
    text.push('\n');
    text
}

/// That live peer.
pub(crate) fn client() -> String {
    let key = hex::encode(GeneratedPeer::numbered(LIVE).secret.to_bytes());
    let server = hex::encode(server_secret().public.as_bytes());
    format!(
        "set=1\nprivate_key={key}\npublic_key={server}\nendpoint={SERVER_V4}:{PORT}\nreplace_allowed_ips=true\nallowed_ip={INNER_SERVER}/32\n\n"
    )
}

/// The server with `count` peers that will shake hands.
pub(crate) fn server_of_initiators(count: u32) -> String {
    let mut text = server_alone();
    for number in 0..count {
        peer(&mut text, GeneratedPeer::numbered(number).public.as_bytes(), &inner_address(number).to_string());
    }
    text.push('\n');
    text
}

/// The server's own keys, as the head of its first change.
pub(crate) fn server_alone() -> String {
    format!("set=1\nprivate_key={}\nlisten_port={PORT}\n", hex::encode(server_secret().secret.to_bytes()))
}

/// The head of a change that leaves the server's own keys as they are.
pub(crate) const CHANGE: &str = "set=1\n";

/// `head` and idle peers of these numbers, each with an endpoint.
pub(crate) fn idle_peers(head: &str, numbers: std::ops::Range<u32>) -> String {
    let mut text = head.to_owned();
    for number in numbers {
        let (endpoint, inner) = (endpoint_address(number), inner_address(number));
        writeln!(
            text,
            "public_key={}\nendpoint={endpoint}:{PORT}\nreplace_allowed_ips=true\nallowed_ip={inner}/32",
            hex::encode(idle_peer_key(number))
        )
        .expect("a string takes what is written");
    }
    text.push('\n');
    text
}

/// A change that removes one idle peer.
pub(crate) fn removal(number: u32) -> String {
    format!("set=1\npublic_key={}\nremove=true\n\n", hex::encode(idle_peer_key(number)))
}

fn peer(text: &mut String, public: &[u8; 32], inner: &str) {
    writeln!(text, "public_key={}\nreplace_allowed_ips=true\nallowed_ip={inner}/32", hex::encode(public))
        .expect("a string takes what is written");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_peers_is_one_change_in_the_standards_words() {
        let text = idle_peers(CHANGE, 0..2);
        assert_eq!(text.matches("public_key=").count(), 2);
        assert!(text.starts_with("set=1\npublic_key="), "{text}");
        assert!(text.contains("\nendpoint=198.18.0.2:51820\nreplace_allowed_ips=true\nallowed_ip=10.128.0.2/32\n"));
        assert!(text.ends_with("/32\n\n") && text.matches("\n\n").count() == 1);
        assert!(server_of_initiators(1).starts_with("set=1\nprivate_key="));
    }
}
