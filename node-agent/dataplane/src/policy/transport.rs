//! Protocol and destination port of a packet, as far as a rule needs them.
//!
//! A port rule must not be got around by fragments or extension headers. Ports lie in the first eight bytes of the first
//! fragment and no later fragment can overlap them, so only first fragments are looked at; one that does not show its
//! ports (RFC 1858, RFC 7112), or hides them behind more extension headers than anybody needs, is [`Transport::Hidden`].

/// What a rule can compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// A protocol with ports.
    Port { protocol: u8, port: u16 },
    /// A protocol without ports, or a later fragment.
    NoPort { protocol: u8 },
    /// There should be ports, and there are none to be seen.
    Hidden,
}

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
const DCCP: u8 = 33;
pub(crate) const SCTP: u8 = 132;
const UDP_LITE: u8 = 136;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HOST_IDENTITY: u8 = 139;
const SHIM6: u8 = 140;
/// One of each kind, and destination options twice (RFC 8200 section 4.1).
const MAX_EXTENSIONS: usize = 8;

/// Whether the protocol has its destination port in its third and fourth byte.
pub(crate) fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | DCCP | SCTP | UDP_LITE)
}

/// Reads a packet whose header and total length were checked.
#[inline]
pub(crate) fn transport(packet: &[u8]) -> Transport {
    // Nearly all: TCP or UDP in one piece, right behind a header without options.
    let word = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    match packet.first() {
        Some(0x45) => {
            if let Some(head) = packet.first_chunk::<24>()
                && word(head[6], head[7]) & 0x3fff == 0
                && matches!(head[9], TCP | UDP)
                && word(head[2], head[3]) >= 24
            {
                return Transport::Port { protocol: head[9], port: word(head[22], head[23]) };
            }
        }
        Some(0x60..=0x6f) => {
            if let Some(head) = packet.first_chunk::<44>()
                && matches!(head[6], TCP | UDP)
                && word(head[4], head[5]) >= 4
            {
                return Transport::Port { protocol: head[6], port: word(head[42], head[43]) };
            }
        }
        Some(_) | None => {}
    }
    any_transport(packet)
}

/// The same without the shortcut.
pub(crate) fn any_transport(packet: &[u8]) -> Transport {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) => transport4(packet),
        Some(6) => transport6(packet),
        Some(_) | None => Transport::Hidden,
    }
}

fn transport4(packet: &[u8]) -> Transport {
    let Some(header) = packet.first_chunk::<20>() else {
        return Transport::Hidden;
    };
    let protocol = header[9];
    let later = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
    if later || !has_ports(protocol) {
        return Transport::NoPort { protocol };
    }
    let start = usize::from(header[0] & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    port(packet.get(..total).unwrap_or(packet), start, protocol)
}

fn transport6(packet: &[u8]) -> Transport {
    let Some(header) = packet.first_chunk::<40>() else {
        return Transport::Hidden;
    };
    let total = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
    let packet = packet.get(..total).unwrap_or(packet);
    let (mut protocol, mut at) = (header[6], 40);
    for _ in 0..=MAX_EXTENSIONS {
        let length = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | MOBILITY | HOST_IDENTITY | SHIM6 => {
                packet.get(at + 1).map(|units| (usize::from(*units) + 1) * 8)
            }
            AUTHENTICATION => packet.get(at + 1).map(|units| (usize::from(*units) + 2) * 4),
            FRAGMENT => match packet.get(at + 2..at + 4) {
                Some(&[high, low]) if u16::from_be_bytes([high, low]) & 0xfff8 != 0 => {
                    return Transport::NoPort { protocol: packet[at] };
                }
                offset => offset.map(|_| 8),
            },
            _ if has_ports(protocol) => return port(packet, at, protocol),
            _ => return Transport::NoPort { protocol },
        };
        let (Some(length), Some(next)) = (length, packet.get(at)) else {
            return Transport::Hidden;
        };
        protocol = *next;
        at += length;
    }
    Transport::Hidden
}

fn port(packet: &[u8], at: usize, protocol: u8) -> Transport {
    match packet.get(at + 2..at + 4) {
        Some(&[high, low]) => Transport::Port { protocol, port: u16::from_be_bytes([high, low]) },
        Some(_) | None => Transport::Hidden,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMTP: [u8; 8] = [0x9c, 0x40, 0, 25, 0, 0, 0, 0];
    const TO_SMTP: Transport = Transport::Port { protocol: TCP, port: 25 };

    fn v4(fragment: u16, options: usize, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20 + options];
        packet[0] = 0x45 + u8::try_from(options / 4).unwrap();
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = TCP;
        packet.extend_from_slice(payload);
        let total = u16::try_from(packet.len()).unwrap();
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet
    }

    /// `chain` is (kind, bytes) of each header after the fixed one.
    fn v6(chain: &[(u8, &[u8])]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        let mut next = 6;
        for (kind, bytes) in chain {
            packet[next] = *kind;
            next = packet.len();
            packet.extend_from_slice(bytes);
        }
        let payload = u16::try_from(packet.len() - 40).unwrap();
        packet[4..6].copy_from_slice(&payload.to_be_bytes());
        packet
    }

    #[test]
    fn ports_are_found_behind_options_and_extension_headers() {
        assert_eq!(transport(&v4(0, 0, &SMTP)), TO_SMTP);
        assert_eq!(transport(&v4(0, 40, &SMTP)), TO_SMTP);
        assert_eq!(transport(&v6(&[(TCP, &SMTP)])), TO_SMTP);
        let long: [u8; 24] = std::array::from_fn(|at| if at == 1 { 2 } else { 0 });
        let authentication: [u8; 16] = std::array::from_fn(|at| if at == 1 { 2 } else { 0 });
        let chain: &[(u8, &[u8])] = &[
            (HOP_BY_HOP, &[0; 8]),
            (DESTINATION_OPTIONS, &long),
            (ROUTING, &[0; 8]),
            (FRAGMENT, &[0, 0, 0, 1, 0, 0, 0, 0]),
            (AUTHENTICATION, &authentication),
            (TCP, &SMTP),
        ];
        assert_eq!(transport(&v6(chain)), TO_SMTP);
    }

    #[test]
    fn first_fragments_must_show_their_ports_and_later_ones_have_none() {
        const MORE: u16 = 0x2000;
        assert_eq!(transport(&v4(MORE, 0, &SMTP)), TO_SMTP);
        assert_eq!(transport(&v4(MORE, 0, &SMTP[..3])), Transport::Hidden);
        assert_eq!(transport(&v4(0, 0, &[])), Transport::Hidden);
        assert_eq!(transport(&v4(MORE | 1, 0, &SMTP)), Transport::NoPort { protocol: TCP });
        assert_eq!(
            transport(&v6(&[(FRAGMENT, &[0, 0, 0, 9, 0, 0, 0, 0]), (TCP, &SMTP)])),
            Transport::NoPort { protocol: TCP }
        );
        let split = v6(&[(FRAGMENT, &[0, 0, 0, 1, 0, 0, 0, 0]), (DESTINATION_OPTIONS, &[TCP, 0, 0, 0, 0, 0, 0, 0])]);
        assert_eq!(transport(&split), Transport::Hidden, "the options say TCP follows, in the next fragment");
    }

    #[test]
    fn bytes_behind_the_total_length_are_not_read() {
        let mut packet = v4(0, 0, &SMTP);
        packet[3] = 22;
        assert_eq!(transport(&packet), Transport::Hidden);
        let mut packet = v6(&[(TCP, &SMTP)]);
        packet[5] = 3;
        assert_eq!(transport(&packet), Transport::Hidden);
    }

    #[test]
    fn endless_extension_headers_hide_the_ports() {
        let many = [(DESTINATION_OPTIONS, &[0_u8; 8][..]); 8];
        assert_eq!(transport(&v6(&[&many[..], &[(TCP, &SMTP[..])]].concat())), TO_SMTP);
        let more = [(DESTINATION_OPTIONS, &[0_u8; 8][..]); 9];
        assert_eq!(transport(&v6(&[&more[..], &[(TCP, &SMTP[..])]].concat())), Transport::Hidden);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(mut packet in proptest::collection::vec(any::<u8>(), 1..200), plain: bool) {
            if plain {
                packet[0] = if packet[0] & 1 == 0 { 0x45 } else { 0x60 };
                packet.iter_mut().take(9).skip(2).for_each(|byte| *byte &= 6);
            }
            prop_assert_eq!(transport(&packet), any_transport(&packet), "the short way and the long one");
        }

        #[test]
        fn any_chain_of_headers_is_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 160), kind: u8) {
            let _ = transport(&v6(&[(kind, &bytes)]));
        }
    }
}
