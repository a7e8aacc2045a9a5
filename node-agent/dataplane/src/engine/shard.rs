//! Which worker owns which slots, and what a worker hands to another one.

use super::{Engine, Now, Origin};
use crate::drops::Drop;
use crate::noise::Opened;
use crate::out::Out;
use crate::policy::TenantId;

/// One of several workers: it owns the slots whose low byte, which the kernel can read in every index, leaves `index`
/// when divided by `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) index: u16,
    pub(crate) count: u16,
}

impl Shard {
    /// The only worker.
    pub(crate) const ALONE: Self = Self { index: 0, count: 1 };

    /// The worker that owns a slot.
    pub(crate) fn owner(self, slot: u16) -> u16 {
        if self.count == 1 { 0 } else { (slot & 0xff) % self.count }
    }

    pub(crate) fn owns(self, slot: u16) -> bool {
        self.owner(slot) == self.index
    }

    /// The first own slot from `slot` on; may be beyond the last slot there is.
    pub(super) fn first_from(self, slot: u32) -> u32 {
        (slot..).find(|slot| u16::try_from(slot & 0xff).is_ok_and(|low| self.owns(low))).unwrap_or(slot)
    }
}

/// What reached a worker and belongs to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parcel {
    /// The worker it belongs to.
    pub(crate) to: u16,
    /// The peer it is for.
    pub(crate) slot: u16,
    pub(crate) kind: ParcelKind,
    pub(crate) bytes: Vec<u8>,
}

/// What was for one peer and went astray between two workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Astray {
    packets: u64,
    /// Data messages: anybody can guess the index that names the peer.
    datagrams: u64,
}

impl Astray {
    /// What it means to the peer that this one is lost: nothing if it is of a handshake, as with other losses.
    pub(crate) fn of(parcel: &Parcel) -> Option<Self> {
        match &parcel.kind {
            ParcelKind::Packet | ParcelKind::Neighbour(_) => Some(Self { packets: 1, datagrams: 0 }),
            ParcelKind::Datagram(_) if parcel.bytes.first() == Some(&4) => Some(Self { packets: 0, datagrams: 1 }),
            ParcelKind::Datagram(_) | ParcelKind::Initiation(..) => None,
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.datagrams += other.datagrams;
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ParcelKind {
    /// A packet from the TUN.
    Packet,
    /// A packet from a peer of this tenant to another one of it.
    Neighbour(TenantId),
    /// A datagram addressed by an index.
    Datagram(Origin),
    /// An initiation that passed the gate, opened to the key it claims.
    Initiation(Origin, Opened),
}

impl ParcelKind {
    /// The reason to count when such a one is lost on its way.
    pub(crate) fn loss(&self) -> Drop {
        match self {
            Self::Packet | Self::Neighbour(_) => Drop::TxForward,
            Self::Datagram(_) | Self::Initiation(..) => Drop::Forward,
        }
    }
}

impl Engine {
    /// Which slots this engine owns.
    pub(crate) fn shard(&self) -> Shard {
        self.shard
    }

    pub(crate) fn has_parcels(&self) -> bool {
        !self.parcels.is_empty()
    }

    /// What this engine was given and belongs to others, to be handed on.
    pub(crate) fn take_parcels(&mut self) -> std::vec::Drain<'_, Parcel> {
        self.parcels.drain(..)
    }

    /// Something that another worker received. It is not handed on
    /// again: if its owner changed meanwhile it is lost.
    pub(crate) fn on_parcel(&mut self, now: Now, parcel: &Parcel, out: &mut Out) {
        let before = self.parcels.len();
        match &parcel.kind {
            ParcelKind::Packet => self.on_tun(now, &parcel.bytes, out),
            ParcelKind::Neighbour(tenant) => {
                if let Err(reason) = self.on_neighbour(now, *tenant, &parcel.bytes, out) {
                    self.drops.one(reason, parcel.bytes.len());
                }
            }
            ParcelKind::Datagram(origin) => self.on_udp(now, &parcel.bytes, *origin, out),
            ParcelKind::Initiation(origin, opened) => {
                if let Err(reason) = self.on_opened(opened.clone(), &parcel.bytes, *origin) {
                    self.drops.one(reason, parcel.bytes.len());
                }
            }
        }
        for again in self.parcels.split_off(before) {
            // What came from a peer and goes to a neighbour of it has a second way, and no third.
            if matches!(again.kind, ParcelKind::Neighbour(_)) {
                self.parcels.push(again);
            } else {
                self.drops.one(again.kind.loss(), again.bytes.len());
            }
        }
    }

    /// Shows at one of our peers what others had for it and found no room for. They have counted it among all drops.
    pub(crate) fn went_astray(&mut self, slot: u16, astray: Astray) {
        // As with other messages that only name it, a peer without a tunnel is not blamed.
        let peer = self.peers.get(usize::from(slot)).and_then(Option::as_deref);
        let named = if peer.is_some_and(|peer| peer.tunnel.is_some()) { astray.datagrams } else { 0 };
        for (reason, lost) in [(Drop::TxForward, astray.packets), (Drop::Forward, named)] {
            if lost > 0 {
                self.blame_for(slot, reason, lost);
            }
        }
    }

    /// Hands the message to the owner of the slot.
    pub(super) fn hand_on(&mut self, slot: u16, kind: ParcelKind, bytes: &[u8]) {
        self.parcels.push(Parcel { to: self.shard.owner(slot), slot, kind, bytes: bytes.to_vec() });
    }

    /// Hands on a datagram whose index belongs to another worker; says whether it did.
    pub(super) fn hand_on_datagram(&mut self, index: u32, origin: Origin, bytes: &[u8]) -> bool {
        let slot = self.scramble.place(index >> 8).slot;
        let foreign = self.shard.count > 1 && !self.shard.owns(slot);
        if foreign {
            self.hand_on(slot, ParcelKind::Datagram(origin), bytes);
        }
        foreign
    }
}
