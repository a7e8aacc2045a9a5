//! Forgetting tracked connections by the address that began them, over ctnetlink
//! (`linux/netfilter/nfnetlink_conntrack.h`).
//!
//! An address is given to another peer one day. A connection that the peer before began and that somebody outside keeps
//! alive would then be delivered to the next owner. So nothing outlives a removal, and one sweep at the start covers
//! what was removed without us; only peers that run can begin connections, so that an added one needs nothing. The
//! kernel cannot delete by address before Linux 6.8, so entries are listed, filtered by the kernel where it can (5.8),
//! and deleted one by one.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

/// From this many addresses on, one list of everything is quicker than a filtered one for each.
const FILTERED: usize = 8;
const RECEIVE_BYTES: usize = 1 << 16;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;

/// `NFNL_SUBSYS_CTNETLINK << 8`, and the messages of that subsystem.
const CTNETLINK: u16 = 1 << 8;
const CT_NEW: u16 = CTNETLINK;
const CT_GET: u16 = CTNETLINK | 1;
const CT_DELETE: u16 = CTNETLINK | 2;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
const CTA_FILTER_IP_SRC: u32 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V6_SRC: u16 = 3;

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const HEADER_BYTES: usize = 16;
const GENERIC_BYTES: usize = 4;

/// Whether the kernel answers at all.
pub(super) fn check() -> anyhow::Result<()> {
    // The address of nobody.
    if let Err(error) = forget(&Forget::Of(HashSet::from([IpAddr::from([0, 0, 0, 0])]))) {
        anyhow::bail!("connection tracking cannot be read ({error}): load the kernel module `nf_conntrack_netlink`");
    }
    Ok(())
}

/// Which connections to forget, by the address that began them.
#[derive(Debug)]
pub(crate) enum Forget {
    Of(HashSet<IpAddr>),
    /// Those from the overlay, but not of these addresses.
    AllBut {
        overlay: Vec<IpNet>,
        kept: HashSet<IpAddr>,
    },
}

impl Forget {
    fn takes(&self, source: &IpAddr) -> bool {
        match self {
            Self::Of(addresses) => addresses.contains(source),
            Self::AllBut { overlay, kept } => {
                overlay.iter().any(|prefix| prefix.contains(source)) && !kept.contains(source)
            }
        }
    }
}

/// Deletes the entries. Answers how many there were.
pub(super) fn forget(which: &Forget) -> io::Result<usize> {
    let mut conntrack = Conntrack::open()?;
    let mut entries = Vec::new();
    match which {
        Forget::Of(addresses) if addresses.len() < FILTERED => {
            for address in
                addresses.iter().filter_map(|address| if let IpAddr::V4(v4) = address { Some(*v4) } else { None })
            {
                entries.extend(conntrack.list(AF_INET, &source_filter(address), which)?);
            }
            // Seen on Linux 6.18: filtered by an IPv6 source, the wanted entries are not in the list.
            if addresses.iter().any(IpAddr::is_ipv6) {
                entries.extend(conntrack.list(AF_INET6, &[], which)?);
            }
        }
        Forget::Of(_) | Forget::AllBut { .. } => entries = conntrack.list(AF_UNSPEC, &[], which)?,
    }
    for entry in &entries {
        conntrack.delete(entry)?;
    }
    Ok(entries.len())
}

/// What names an entry: its family and the attributes that the kernel told.
struct Entry {
    family: u8,
    name: Vec<u8>,
}

struct Conntrack {
    socket: Socket,
    sequence: u32,
}

impl Conntrack {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The entries of a family that `which` takes, of those that the kernel finds by `filter`.
    fn list(&mut self, family: u8, filter: &[u8], which: &Forget) -> io::Result<Vec<Entry>> {
        self.send(CT_GET, NLM_F_REQUEST | NLM_F_DUMP, family, filter)?;
        let mut entries = Vec::new();
        self.receive(|kind, family, body| {
            if kind == CT_NEW && source_of(body).is_some_and(|source| which.takes(&source)) {
                entries.push(Entry { family, name: name_of(body) });
            }
        })?;
        Ok(entries)
    }

    /// An entry that has ended meanwhile is as good as deleted.
    fn delete(&mut self, entry: &Entry) -> io::Result<()> {
        self.send(CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, entry.family, &entry.name)?;
        match self.receive(|_, _, _| {}) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn send(&mut self, kind: u16, flags: u16, family: u8, attributes: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let length = u32::try_from(HEADER_BYTES + GENERIC_BYTES + attributes.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER_BYTES + GENERIC_BYTES + attributes.len());
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(&[family, 0, 0, 0]);
        message.extend_from_slice(attributes);
        self.socket.send(&message, 0).map(drop)
    }

    /// Everything up to the end of a list or the acknowledgement of a command.
    fn receive(&mut self, mut take: impl FnMut(u16, u8, &[u8])) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        loop {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            let mut rest = buffer.as_slice();
            while let Some((header, body, behind)) = split_message(rest) {
                rest = behind;
                if header.sequence != self.sequence {
                    continue;
                }
                match header.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let errno = body.first_chunk().map_or(-libc::EBADMSG, |bytes| i32::from_ne_bytes(*bytes));
                        return if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-errno)) };
                    }
                    kind => {
                        if let Some((generic, attributes)) = body.split_at_checked(GENERIC_BYTES) {
                            take(kind, generic[0], attributes);
                        }
                    }
                }
            }
        }
    }
}

struct Header {
    kind: u16,
    sequence: u32,
}

/// The first message, its body, and what follows.
fn split_message(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let sequence = u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    let body = bytes.get(HEADER_BYTES..length)?;
    let behind = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((Header { kind, sequence }, body, behind))
}

/// The attributes: their type, and their content.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & NLA_TYPE_MASK;
        let content = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + content.len()).expect("attributes here have some dozen bytes");
    let mut bytes = Vec::with_capacity(usize::from(length).next_multiple_of(4));
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, content: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, content)
}

fn source_filter(address: Ipv4Addr) -> Vec<u8> {
    let source = attribute(CTA_IP_V4_SRC, &address.octets());
    let mut bytes = nested(CTA_TUPLE_ORIG, &nested(CTA_TUPLE_IP, &source));
    let flags = attribute(CTA_FILTER_ORIG_FLAGS, &CTA_FILTER_IP_SRC.to_ne_bytes());
    let reply_flags = attribute(CTA_FILTER_REPLY_FLAGS, &0_u32.to_ne_bytes());
    bytes.extend(nested(CTA_FILTER, &[flags, reply_flags].concat()));
    bytes
}

/// Who began the connection.
fn source_of(entry: &[u8]) -> Option<IpAddr> {
    let find = |bytes, wanted| attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, content)| content);
    let addresses = find(find(entry, CTA_TUPLE_ORIG)?, CTA_TUPLE_IP)?;
    attributes(addresses).find_map(|(kind, content)| match kind {
        CTA_IP_V4_SRC => <[u8; 4]>::try_from(content).ok().map(IpAddr::from),
        CTA_IP_V6_SRC => <[u8; 16]>::try_from(content).ok().map(IpAddr::from),
        _ => None,
    })
}

/// The attributes that name exactly this entry and no later one of the same tuple.
fn name_of(entry: &[u8]) -> Vec<u8> {
    let mut name = Vec::new();
    for (kind, content) in attributes(entry) {
        match kind {
            CTA_TUPLE_ORIG => name.extend(nested(kind, content)),
            CTA_ZONE | CTA_ID => name.extend(attribute(kind, content)),
            _ => {}
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_and_the_name_of_an_entry_are_read() {
        let filter = source_filter(Ipv4Addr::new(10, 8, 0, 2));
        assert_eq!(source_of(&filter), Some(IpAddr::from([10, 8, 0, 2])));
        assert_eq!(attributes(&name_of(&filter)).map(|(kind, _)| kind).collect::<Vec<_>>(), [CTA_TUPLE_ORIG]);
        let source = [[0xfd; 8], [2; 8]].concat();
        let entry = nested(CTA_TUPLE_ORIG, &nested(CTA_TUPLE_IP, &attribute(CTA_IP_V6_SRC, &source)));
        assert_eq!(source_of(&entry), Some(IpAddr::from(<[u8; 16]>::try_from(source).unwrap())));
    }

    #[test]
    fn a_sweep_takes_the_overlay_but_not_who_stays() {
        let overlay = vec!["10.8.0.0/16".parse().unwrap()];
        let sweep = Forget::AllBut { overlay, kept: HashSet::from(["10.8.0.2".parse().unwrap()]) };
        let taken = ["10.8.0.2", "10.8.0.3", "192.0.2.1"].map(|address| sweep.takes(&address.parse().unwrap()));
        assert_eq!(taken, [false, true, false]);
    }

    #[test]
    fn a_message_cut_anywhere_is_no_message() {
        let mut message = vec![0; HEADER_BYTES];
        message.extend(source_filter(Ipv4Addr::new(10, 8, 0, 2)));
        let length = u32::try_from(message.len()).unwrap();
        message[..4].copy_from_slice(&length.to_ne_bytes());
        assert!(split_message(&message).is_some());
        let tuple = 16;
        for end in 0..message.len() {
            assert!(split_message(&message[..end]).is_none());
            let attributes = message[..end].get(HEADER_BYTES..).unwrap_or_default();
            assert_eq!(source_of(attributes).is_some(), attributes.len() >= tuple);
        }
    }
}
