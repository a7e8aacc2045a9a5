//! The TUN device: super-packets are split on the way in and merged on the way out when the kernel can offload.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::net::netdevice::name_to_index;
use tun_rs::{DeviceBuilder, GROTable, SyncDevice, VIRTIO_NET_HDR_LEN, VirtioNetHdr};

use super::mailbox::ShellState;
use super::merge::{MAX_PACKET, group, is_merged, merge};
use super::offloads::Offloads;
use super::split::{finish_checksum, split};
use crate::drops::Drop;
use crate::engine::Engine;
use crate::out::{Out, TUN_HEADROOM, TunPacket};

/// What WireGuard uses on Ethernet: 1500 less 80 for IPv6, UDP and its own headers.
const MTU: u16 = 1420;
/// A burst for many peers at once; the kernel's default of 500 drops.
const TX_QUEUE_LEN: u32 = 1000;
/// For how long nothing is merged after the kernel refused what was: long enough to cost nothing if it always does.
const MERGE_PAUSE: Duration = Duration::from_secs(10);

/// How the device is to be opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TunConfig<'a> {
    pub(crate) name: &'a str,
    pub(crate) offloads: Offloads,
    /// Whether several workers are to have a queue each.
    pub(crate) queues: bool,
}

/// What one read brought.
pub(crate) enum Read {
    Packet,
    Nothing,
    /// The interface was deleted.
    Gone,
}

pub(crate) struct Tun {
    device: SyncDevice,
    tso: bool,
    uso: bool,
    merge: bool,
    merge_paused_until: Option<Instant>,
    offloads: Offloads,
    gro: GROTable,
    buffer: Vec<u8>,
}

impl Tun {
    pub(crate) fn open(config: TunConfig<'_>) -> io::Result<Self> {
        let existed = interface_exists(config.name)?;
        let TunConfig { name, offloads, queues } = config;
        let offload = offloads.tun;
        // An interface that outlived an earlier process keeps the kind of queues it was made with.
        let ways = [(offload, queues), (offload, !queues), (false, queues), (false, !queues)];
        let mut device = Err(io::Error::from_raw_os_error(libc::EINVAL));
        for (offload, queues) in ways {
            match &device {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => device = build(name, offload, queues),
                Ok(_) | Err(_) => break,
            }
        }
        let device = device?;
        if !existed {
            device.set_mtu(MTU)?;
            if let Err(error) = device.set_tx_queue_len(TX_QUEUE_LEN) {
                tracing::debug!(%error, "the transmit queue keeps its length");
            }
        }
        if offload && !device.tcp_gso() {
            tracing::info!("the TUN offers no offload");
        }
        Self::new(device, offloads)
    }

    /// Another queue of the same interface; none when it was made without.
    pub(crate) fn queue(&self) -> Option<io::Result<Self>> {
        match self.device.try_clone() {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => None,
            device => Some(device.and_then(|device| Self::new(device, self.offloads))),
        }
    }

    fn new(device: SyncDevice, offloads: Offloads) -> io::Result<Self> {
        device.set_nonblocking(true)?;
        let tso = device.tcp_gso();
        Ok(Self {
            tso,
            uso: device.udp_gso(),
            merge: tso && offloads.tun_merge,
            merge_paused_until: None,
            offloads,
            device,
            gro: GROTable::new(),
            buffer: vec![0; VIRTIO_NET_HDR_LEN + MAX_PACKET],
        })
    }

    /// From now on the interface outlives the process.
    pub(crate) fn persist(&self) -> io::Result<()> {
        self.device.persist()
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// As it is now: the operator may change it while traffic runs.
    pub(crate) fn mtu(&self) -> io::Result<u16> {
        self.device.mtu()
    }

    /// What was configured, for the sockets too.
    pub(crate) fn offloads(&self) -> Offloads {
        self.offloads
    }

    pub(crate) fn describe(&self, shell: &mut ShellState) {
        shell.tun_tso = self.tso;
        shell.tun_uso = self.uso;
        shell.tun_merge = self.merge && self.merge_paused_until.is_none();
    }

    /// Reads once and hands every IP packet in it to `each`.
    pub(crate) fn read(&mut self, shell: &mut ShellState, mut each: impl FnMut(&[u8])) -> io::Result<Read> {
        let len = match self.device.recv(&mut self.buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Read::Nothing),
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Ok(Read::Gone),
            Err(error) => return Err(error),
        };
        if !self.tso {
            shell.tun_read_bytes += len as u64;
            each(&self.buffer[..len]);
            return Ok(Read::Packet);
        }
        if len <= VIRTIO_NET_HDR_LEN {
            return Ok(Read::Packet);
        }
        let (header, packet) = self.buffer[..len].split_at_mut(VIRTIO_NET_HDR_LEN);
        let header = VirtioNetHdr::decode(header)?;
        shell.tun_read_bytes += packet.len() as u64;
        if header.gso_type == 0 {
            finish_checksum(&header, packet);
            each(packet);
            return Ok(Read::Packet);
        }
        let whole = packet.len();
        let total = split(&header, packet, each)?;
        shell.tun_split_bytes += total.saturating_sub(whole) as u64;
        Ok(Read::Packet)
    }

    /// Writes all packets of `out`, merged where they continue each other, and tells the engine what arrived.
    pub(crate) fn write(&mut self, out: &mut Out, engine: &mut Engine, shell: &mut ShellState) {
        if self.merge_paused_until.is_some_and(|until| until <= Instant::now()) {
            self.merge_paused_until = None;
        }
        if self.merge && self.merge_paused_until.is_none() {
            if let Err(error) = merge(&mut self.gro, out.tun_mut(), self.uso) {
                tracing::debug!(%error, "a batch could not be merged");
            }
        } else {
            for packet in out.tun_mut() {
                packet.buf[..TUN_HEADROOM].fill(0);
            }
        }
        for packet in out.tun_mut().iter_mut().filter(|packet| !is_merged(packet)) {
            let group = group(&packet.buf);
            let bytes = if self.tso { &packet.buf[..] } else { &packet.buf[TUN_HEADROOM..] };
            match self.device.send(bytes) {
                Ok(_) => {
                    let written = (packet.buf.len() - TUN_HEADROOM) as u64;
                    shell.tun_written_bytes += written;
                    shell.tun_merged_bytes += group.bytes - written;
                    engine.delivered(packet.slot, group.packets, group.bytes);
                }
                Err(error) if group.packets > 1 && error.raw_os_error() == Some(libc::EINVAL) => {
                    self.write_apart(packet, engine, shell);
                    if self.merge_paused_until.is_none() {
                        tracing::warn!("the kernel refuses merged packets: nothing is merged for a while");
                    }
                    self.merge_paused_until = Some(Instant::now() + MERGE_PAUSE);
                }
                Err(error) => {
                    tracing::trace!(%error, "a packet for the TUN was refused");
                    engine.lost(Drop::TunWrite, packet.slot, group.packets, group.bytes);
                }
            }
        }
        out.clear_tun();
    }

    /// Writes one by one what was merged into a packet that the kernel refuses.
    fn write_apart(&mut self, packet: &mut TunPacket, engine: &mut Engine, shell: &mut ShellState) {
        let (header, merged) = packet.buf.split_at_mut(TUN_HEADROOM);
        let (device, room) = (&self.device, &mut self.buffer);
        room[..TUN_HEADROOM].fill(0);
        let done = VirtioNetHdr::decode(header).and_then(|header| {
            split(&header, merged, |piece| {
                let end = TUN_HEADROOM + piece.len();
                room[TUN_HEADROOM..end].copy_from_slice(piece);
                if device.send(&room[..end]).is_ok() {
                    shell.tun_written_bytes += piece.len() as u64;
                    engine.delivered(packet.slot, 1, piece.len() as u64);
                } else {
                    engine.lost(Drop::TunWrite, packet.slot, 1, piece.len() as u64);
                }
            })
        });
        if let Err(error) = done {
            tracing::debug!(%error, "what was merged could not be taken apart");
            let group = group(&packet.buf);
            engine.lost(Drop::TunWrite, packet.slot, group.packets, group.bytes);
        }
    }
}

fn build(name: &str, offload: bool, queues: bool) -> io::Result<SyncDevice> {
    DeviceBuilder::new()
        .name(name)
        .inherit_enable_state()
        .with(|builder| {
            builder.offload(offload).multi_queue(queues);
        })
        .build_sync()
}

fn interface_exists(name: &str) -> io::Result<bool> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::DGRAM, None)?;
    Ok(name_to_index(&socket, name).is_ok())
}
