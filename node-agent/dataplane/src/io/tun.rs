//! The TUN device: super-packets are split on the way in and merged on the way out when the kernel can offload.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::net::netdevice::name_to_index;
use tun_rs::{DeviceBuilder, SyncDevice, VIRTIO_NET_HDR_LEN, VirtioNetHdr};

use super::mailbox::ShellState;
use super::merge::{Group, MAX_PACKET, Merger};
use super::offloads::Offloads;
use super::split::{finish_checksum, split};
use crate::drops::Drop;
use crate::engine::Engine;
use crate::out::Out;

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
    /// A super-packet of this many bytes that cannot be split; it is gone.
    Unsplittable(usize),
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
    merger: Merger,
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
            merger: Merger::default(),
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
        match split(&header, packet, each) {
            Ok(total) => {
                shell.tun_split_bytes += total.saturating_sub(whole) as u64;
                Ok(Read::Packet)
            }
            Err(error) => {
                tracing::debug!(%error, ?header, "a super-packet could not be split");
                Ok(Read::Unsplittable(whole))
            }
        }
    }

    /// Writes all packets of `out`, merged where they continue each other, and tells the engine what arrived.
    pub(crate) fn write(&mut self, out: &mut Out, engine: &mut Engine, shell: &mut ShellState) {
        if self.merge_paused_until.is_some_and(|until| until <= Instant::now()) {
            self.merge_paused_until = None;
        }
        let (packets, arena) = (out.tun(), out.tun_bytes());
        if self.merge && self.merge_paused_until.is_none() {
            self.merger.merge(packets, arena, self.uso);
        } else {
            self.merger.leave_apart(packets);
        }
        let mut refused = false;
        for group in self.merger.groups() {
            match self.write_group(group, out) {
                Ok(()) => {
                    shell.tun_written_bytes += group.written as u64;
                    shell.tun_merged_bytes += (group.bytes - group.written) as u64;
                    engine.delivered(group.slot, group.packets as u64, group.bytes as u64);
                }
                Err(error) if group.packets > 1 && matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EIO)) => {
                    refused |= self.write_apart(group, out, engine, shell);
                }
                Err(error) => {
                    tracing::trace!(%error, "a packet for the TUN was refused");
                    engine.lost(Drop::TunWrite, group.slot, group.packets as u64, group.bytes as u64);
                }
            }
        }
        if refused {
            if self.merge_paused_until.is_none() {
                tracing::warn!("the kernel refuses merged packets: nothing is merged for a while");
            }
            self.merge_paused_until = Some(Instant::now() + MERGE_PAUSE);
        }
        out.clear_tun();
    }

    fn write_group(&self, group: &Group, out: &Out) -> io::Result<()> {
        let (packets, arena) = (out.tun(), out.tun_bytes());
        if self.tso {
            self.merger.in_one(group, packets, arena, |slices| self.device.send_vectored(slices))?;
        } else {
            self.device.send(packets[group.first].of(arena))?;
        }
        Ok(())
    }

    /// Writes one by one what the kernel refuses together; says whether it took any so.
    fn write_apart(&self, group: &Group, out: &Out, engine: &mut Engine, shell: &mut ShellState) -> bool {
        let mut taken = false;
        for packet in self.merger.members(group).map(|number| out.tun()[number]) {
            let slices = [&[0; VIRTIO_NET_HDR_LEN], packet.of(out.tun_bytes())].map(IoSlice::new);
            let bytes = packet.len as u64;
            if self.device.send_vectored(&slices).is_ok() {
                taken = true;
                shell.tun_written_bytes += bytes;
                engine.delivered(packet.slot, 1, bytes);
            } else {
                engine.lost(Drop::TunWrite, packet.slot, 1, bytes);
            }
        }
        taken
    }
}

/// Counts what cannot be written any more.
pub(crate) fn give_up(out: &mut Out, engine: &mut Engine) {
    for packet in out.tun() {
        engine.lost(Drop::TunWrite, packet.slot, 1, packet.len as u64);
    }
    out.clear_tun();
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
