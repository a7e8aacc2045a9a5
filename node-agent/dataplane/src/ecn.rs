//! Congestion marks through the tunnel: RFC 6040, normal mode.
//!
//! The inner field is copied outside; a mark set on the way is carried over to the inner packet. Of the outer DSCP
//! nothing comes in, and of the inner one nothing goes out: it would tell the path what kind of traffic this is.
//! Linux' WireGuard differs in two cells: it sends ECT(0) outside of CE, and lets a marked packet through whose sender
//! does not know ECN.

use crate::drops::Drop;
use crate::packet::set_v4_byte;

/// The last two bits of the traffic class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ecn {
    /// The sender does not know ECN.
    #[default]
    NotEct,
    /// ECN-capable, with a scalable congestion control.
    Ect1,
    /// ECN-capable.
    Ect0,
    /// Congestion experienced.
    Ce,
}

impl Ecn {
    /// The field of an IP packet; `NotEct` if this is none.
    #[must_use]
    pub fn of(packet: &[u8]) -> Self {
        match packet {
            [first, second, ..] if first >> 4 == 4 => Self::from_bits(*second),
            [first, second, ..] if first >> 4 == 6 => Self::from_bits(second >> 4),
            _ => Self::NotEct,
        }
    }

    fn from_bits(bits: u8) -> Self {
        match bits & 0b11 {
            0b01 => Self::Ect1,
            0b10 => Self::Ect0,
            0b11 => Self::Ce,
            _ => Self::NotEct,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::NotEct => 0b00,
            Self::Ect1 => 0b01,
            Self::Ect0 => 0b10,
            Self::Ce => 0b11,
        }
    }

    /// What the inner field becomes, RFC 6040 figure 4; `None` where the packet is to be dropped.
    fn decapsulated(inner: Self, outer: Self) -> Option<Self> {
        match (inner, outer) {
            (Self::NotEct, Self::Ce) => None,
            (Self::NotEct, _) => Some(Self::NotEct),
            (Self::Ect0 | Self::Ect1, Self::Ce) => Some(Self::Ce),
            (Self::Ect0, Self::Ect1) => Some(Self::Ect1),
            (inner, _) => Some(inner),
        }
    }
}

/// Carries the mark of the datagram over to the well-formed IP packet that was in it.
pub(crate) fn decapsulate(outer: Ecn, packet: &mut [u8]) -> Result<(), Drop> {
    let inner = Ecn::of(packet);
    let combined = Ecn::decapsulated(inner, outer).ok_or(Drop::Congestion)?;
    if combined != inner {
        set(packet, combined);
    }
    Ok(())
}

fn set(packet: &mut [u8], ecn: Ecn) {
    if packet[0] >> 4 == 6 {
        packet[1] = packet[1] & !0b11_0000 | ecn.bits() << 4;
        return;
    }
    set_v4_byte(packet, 1, packet[1] & !0b11 | ecn.bits());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Ecn; 4] = [Ecn::NotEct, Ecn::Ect1, Ecn::Ect0, Ecn::Ce];

    fn checksum(header: &[u8]) -> u16 {
        let sum: u32 = header.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        u16::try_from(sum & 0xffff).unwrap().wrapping_add(u16::try_from(sum >> 16).unwrap())
    }

    fn v4(dscp: u8, ecn: Ecn, id: u16) -> Vec<u8> {
        let mut packet = vec![0x45, dscp << 2 | ecn.bits(), 0, 24, 0, 0, 0, 0, 64, 17, 0, 0];
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet.extend([10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 3, 4]);
        let sum = !checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    fn v6(dscp: u8, ecn: Ecn) -> Vec<u8> {
        let class = dscp << 2 | ecn.bits();
        let mut packet = vec![0x60 | class >> 4, class << 4 | 0x0b, 0xad, 0xee, 0, 0, 59, 64];
        packet.resize(40, 7);
        packet
    }

    #[test]
    fn every_cell_of_the_table_of_rfc_6040() {
        use Ecn::{Ce, Ect0, Ect1, NotEct};
        let table = [
            // Columns: outer Not-ECT, ECT(0), ECT(1), CE.
            (NotEct, [Some(NotEct), Some(NotEct), Some(NotEct), None]),
            (Ect0, [Some(Ect0), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect1, [Some(Ect1), Some(Ect1), Some(Ect1), Some(Ce)]),
            (Ce, [Some(Ce), Some(Ce), Some(Ce), Some(Ce)]),
        ];
        for (inner, row) in table {
            for (outer, expected) in [NotEct, Ect0, Ect1, Ce].into_iter().zip(row) {
                for before in [v4(0b10_1110, inner, 7), v6(0b10_1110, inner)] {
                    let mut packet = before.clone();
                    match expected {
                        None => assert_eq!(decapsulate(outer, &mut packet), Err(Drop::Congestion)),
                        Some(ecn) => {
                            assert_eq!(decapsulate(outer, &mut packet), Ok(()), "{inner:?} in {outer:?}");
                            let same =
                                |ecn| if before[0] >> 4 == 4 { v4(0b10_1110, ecn, 7) } else { v6(0b10_1110, ecn) };
                            assert_eq!(packet, same(ecn), "{inner:?} in {outer:?}: nothing else changes");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_ip_packet_has_no_field() {
        for packet in [&[][..], &[0x45], &[0x15, 0xff], &[0xff; 4]] {
            assert_eq!(Ecn::of(packet), Ecn::NotEct);
        }
    }

    proptest! {
        #[test]
        fn the_header_checksum_stays_right(dscp in 0_u8..64, id in any::<u16>(), inner in 1_usize..4, outer in 0_usize..4) {
            let mut packet = v4(dscp, ALL[inner], id);
            prop_assert_eq!(decapsulate(ALL[outer], &mut packet), Ok(()));
            prop_assert_eq!(checksum(&packet[..20]), 0xffff);
            prop_assert_eq!(packet[1] >> 2, dscp);
        }
    }
}
