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

/// Forwards a well-formed packet one hop, as the kernel does. False, and nothing is changed, when it may not go further.
pub(crate) fn spend_hop(packet: &mut [u8]) -> bool {
    const TTL: usize = 8;
    const HOP_LIMIT: usize = 7;
    let is_v4 = packet[0] >> 4 == 4;
    let hops = packet[if is_v4 { TTL } else { HOP_LIMIT }];
    if hops <= 1 {
        return false;
    }
    if is_v4 {
        set_v4_byte(packet, TTL, hops - 1);
    } else {
        packet[HOP_LIMIT] = hops - 1;
    }
    true
}

/// Changes a byte of an IPv4 header. Only the difference of one word goes into the checksum (RFC 1624): a wrong one stays
/// wrong.
pub(crate) fn set_v4_byte(packet: &mut [u8], at: usize, value: u8) {
    const CHECKSUM: usize = 10;
    let word = |packet: &[u8], at: usize| u32::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
    let start = at & !1;
    let old = word(packet, start);
    packet[at] = value;
    let mut sum = (!word(packet, CHECKSUM) & 0xffff) + (!old & 0xffff) + word(packet, start);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    packet[CHECKSUM..CHECKSUM + 2].copy_from_slice(&(!sum).to_be_bytes()[2..]);
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

        #[test]
        fn a_hop_is_one_less_and_the_checksum_goes_with_it(mut packet in any::<[u8; 40]>(), is_v4: bool) {
            packet[0] = if is_v4 { 0x45 } else { 0x60 };
            packet[10..12].fill(0);
            let sum = !ones_complement(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            let (mut forwarded, at) = (packet, if is_v4 { 8 } else { 7 });
            prop_assert_eq!(spend_hop(&mut forwarded), packet[at] > 1);
            if packet[at] <= 1 {
                prop_assert_eq!(forwarded, packet);
                return Ok(());
            }
            prop_assert_eq!(forwarded[at], packet[at] - 1);
            if is_v4 {
                prop_assert_eq!(ones_complement(&forwarded[..20]), 0xffff);
                forwarded[10..12].copy_from_slice(&packet[10..12]);
            }
            forwarded[at] = packet[at];
            prop_assert_eq!(forwarded, packet, "nothing else changes");
        }
    }

    /// RFC 1071.
    fn ones_complement(header: &[u8]) -> u16 {
        let mut sum: u32 = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap()
    }
}
