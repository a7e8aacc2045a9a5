//! Which of the kernel's offloads may be used. What may be used is used only where the kernel has it.

/// All of them, unless the operator says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Offloads {
    /// Super-packets from and to the TUN.
    pub(crate) tun: bool,
    /// Packets for the TUN are merged.
    pub(crate) tun_merge: bool,
    /// Runs of datagrams in one call.
    pub(crate) udp_gso: bool,
    /// Merged datagrams from the sockets.
    pub(crate) udp_gro: bool,
}

impl Offloads {
    pub(crate) const ALL: Self = Self { tun: true, tun_merge: true, udp_gso: true, udp_gro: true };

    /// All except those of a comma-separated list; `Err` is the first name that is none.
    pub(crate) fn without(list: &str) -> Result<Self, String> {
        let mut offloads = Self::ALL;
        for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match name {
                "tun" => offloads.tun = false,
                "tun-merge" => offloads.tun_merge = false,
                "udp-gso" => offloads.udp_gso = false,
                "udp-gro" => offloads.udp_gro = false,
                other => return Err(other.to_owned()),
            }
        }
        Ok(offloads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_offload_is_left_out_by_name() {
        assert_eq!(Offloads::without(""), Ok(Offloads::ALL));
        assert_eq!(Offloads::without("tun"), Ok(Offloads { tun: false, ..Offloads::ALL }));
        let rest = Offloads { tun: true, tun_merge: false, udp_gso: false, udp_gro: false };
        assert_eq!(Offloads::without("udp-gso, udp-gro,tun-merge"), Ok(rest));
        assert_eq!(Offloads::without("udp-gso,gro"), Err("gro".into()));
    }
}
