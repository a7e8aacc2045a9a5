//! IP headers, read with every length checked: what comes out of a tunnel may be shorter than it says.

use std::net::IpAddr;

/// The addresses of a well-formed IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
}

/// How long the packet at the beginning of `bytes` says it is, if it is all there.
pub(crate) fn len(bytes: &[u8]) -> Option<usize> {
    let len = match bytes.first()? >> 4 {
        4 => bytes.first_chunk::<20>().map(|header| usize::from(u16::from_be_bytes([header[2], header[3]])))?,
        6 => bytes.first_chunk::<40>().map(|header| 40 + usize::from(u16::from_be_bytes([header[4], header[5]])))?,
        _ => return None,
    };
    (len >= 20 && len <= bytes.len()).then_some(len)
}

/// Reads the addresses if header and total length fit into the packet exactly as far as forwarding needs it.
pub(crate) fn addresses(packet: &[u8]) -> Option<Addresses> {
    match packet.first()? >> 4 {
        4 => {
            let header = packet.first_chunk::<20>()?;
            let header_len = usize::from(header[0] & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
            if header_len < 20 || total < header_len || total > packet.len() {
                return None;
            }
            Some(Addresses { source: v4(&header[12..16]), destination: v4(&header[16..20]) })
        }
        6 => {
            let header = packet.first_chunk::<40>()?;
            let total = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
            if total > packet.len() {
                return None;
            }
            Some(Addresses { source: v6(&header[8..24]), destination: v6(&header[24..40]) })
        }
        _ => None,
    }
}

fn v4(bytes: &[u8]) -> IpAddr {
    let octets: [u8; 4] = bytes.try_into().expect("the callers cut exactly four bytes");
    IpAddr::from(octets)
}

fn v6(bytes: &[u8]) -> IpAddr {
    let octets: [u8; 16] = bytes.try_into().expect("the callers cut exactly sixteen bytes");
    IpAddr::from(octets)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_longer_than_the_packet_is_refused() {
        let mut packet = vec![0_u8; 24];
        packet[0] = 0x45;
        packet[3] = 24;
        assert!(addresses(&packet).is_some());
        packet[0] = 0x47;
        assert_eq!(addresses(&packet), None, "the header says 28 bytes");
        packet[0] = 0x44;
        assert_eq!(addresses(&packet), None, "the header says 16 bytes");
        packet[0] = 0x45;
        packet[3] = 5;
        assert_eq!(addresses(&packet), None, "the total says 5 bytes");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(packet in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = addresses(&packet);
        }
    }
}
