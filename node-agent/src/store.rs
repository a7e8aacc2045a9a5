//! The state file: what this server runs, so that it serves again after a reboot without the control plane.
//!
//! One base record, then one record per change; appended and synced in O(change), rewritten whole (temp, fsync, rename,
//! fsync of the directory) when the changes outgrow the base. A change that was torn by a crash was never reported.

use std::io;

use cvault_node_protocol::digest::Digest;
use cvault_node_protocol::v1;
use prost::Message as _;

use crate::desired::{Change, Cursor, Desired, Life, Peer, PublicKey, Refusal, parse_key};
use crate::frames::{FrameError, FrameFile};
use crate::interface::{Interface, InterfaceError};
use crate::state_dir::StateDir;

pub(crate) const FILE: &str = "state.bin";
const MAGIC: &[u8; 8] = b"CVSTATE\x01";
/// Below this the file is never rewritten for its size.
const MIN_COMPACT_BYTES: u64 = 256 << 10;

/// The open state file.
#[derive(Debug)]
pub(crate) struct Store {
    file: FrameFile,
    server_id: [u8; 16],
    base_bytes: u64,
    behind: bool,
}

/// What was stored.
#[derive(Debug)]
pub(crate) struct Saved {
    pub(crate) interface: Interface,
    pub(crate) desired: Desired,
    hello: v1::Hello,
}

impl Saved {
    /// The state before the first snapshot.
    pub(crate) fn first(interface: Interface, hello: &v1::Hello) -> Result<Self, Refusal> {
        let desired = Desired::new(digest_key(hello)?, interface.overlay.clone(), interface.own());
        Ok(Self { interface, desired, hello: kept(hello) })
    }

    pub(crate) fn report_interval_ms(&self) -> u32 {
        self.hello.report_interval_ms
    }

    /// Takes over what a new Hello says; `true` when something is different.
    pub(crate) fn update(&mut self, interface: Interface, hello: &v1::Hello) -> Result<bool, Refusal> {
        if kept(hello) == self.hello {
            return Ok(false);
        }
        self.desired.reconfigure(digest_key(hello)?, interface.overlay.clone(), interface.own());
        self.interface = interface;
        self.hello = kept(hello);
        Ok(true)
    }
}

fn digest_key(hello: &v1::Hello) -> Result<[u8; 32], Refusal> {
    hello.digest_key.as_ref().try_into().map_err(|_| Refusal::Malformed("digest_key"))
}

/// The lasting part of a Hello.
fn kept(hello: &v1::Hello) -> v1::Hello {
    v1::Hello {
        digest_key: hello.digest_key.clone(),
        interface: hello.interface.clone(),
        report_interval_ms: hello.report_interval_ms,
        ..v1::Hello::default()
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("the state file cannot be used")]
    Frames(#[from] FrameError),
    #[error("the state file holds a record that cannot be read")]
    Record(#[from] prost::DecodeError),
    #[error("the state file holds an impossible state")]
    State(#[from] Refusal),
    #[error("the state file holds an impossible interface")]
    Interface(#[from] InterfaceError),
    #[error("the state file belongs to another server")]
    OtherServer,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(message, optional, tag = "1")]
    base: Option<Base>,
    #[prost(message, optional, tag = "2")]
    delta: Option<v1::Delta>,
    /// All of them: they are few.
    #[prost(message, optional, tag = "3")]
    policies: Option<v1::Policies>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Base {
    #[prost(bytes = "bytes", tag = "1")]
    server_id: prost::bytes::Bytes,
    #[prost(message, optional, tag = "2")]
    hello: Option<v1::Hello>,
    #[prost(message, optional, tag = "3")]
    cursor: Option<v1::Cursor>,
    #[prost(message, repeated, tag = "4")]
    peers: Vec<v1::Peer>,
    #[prost(message, repeated, tag = "5")]
    retired: Vec<Retired>,
    /// Of the peers, under the digest key of the Hello beside them.
    #[prost(bytes = "bytes", tag = "6")]
    digest: prost::bytes::Bytes,
    /// Absent: none were told yet.
    #[prost(message, optional, tag = "7")]
    policies: Option<v1::Policies>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Retired {
    #[prost(bytes = "bytes", tag = "1")]
    public_key: prost::bytes::Bytes,
    #[prost(uint64, tag = "2")]
    generation: u64,
    #[prost(bytes = "bytes", tag = "3")]
    device_id: prost::bytes::Bytes,
}

impl Store {
    /// Opens the state file of this server and reads what it holds.
    ///
    /// # Errors
    /// Any [`StoreError`] leaves the file as it is; see [`Store::open_or_set_aside`].
    fn open(dir: &StateDir, server_id: [u8; 16]) -> Result<(Self, Option<Saved>), StoreError> {
        let (file, recovered) = FrameFile::open(&dir.file(FILE), MAGIC)?;
        if recovered.torn_bytes > 0 {
            tracing::warn!(bytes = recovered.torn_bytes, "cut an unfinished change off the state file");
        }
        let mut saved: Option<Saved> = None;
        let mut base_bytes = 0;
        for (location, payload) in recovered.frames {
            let record = Record::decode(payload.as_slice())?;
            if let Some(base) = record.base {
                saved = load_base(&base, server_id)?;
                base_bytes = location.bytes();
            }
            if let (Some(policies), Some(saved)) = (record.policies, saved.as_mut()) {
                saved.desired.policies.restore(policies.upserted)?;
            }
            if let (Some(delta), Some(saved)) = (record.delta, saved.as_mut()) {
                saved.desired.commit(&load_change(&delta)?);
                if !saved.desired.is_whole() {
                    return Err(Refusal::Digest.into());
                }
            }
        }
        Ok((Self { file, server_id, base_bytes, behind: false }, saved))
    }

    /// Opens the state file; one that cannot be used is renamed, so that somebody can look at it, and the server waits
    /// for a snapshot. Peers that an engine still runs stay until then.
    ///
    /// # Errors
    /// When the file can be neither used nor renamed.
    pub(crate) fn open_or_set_aside(
        dir: &StateDir,
        server_id: [u8; 16],
        wall_ms: u64,
    ) -> anyhow::Result<(Self, Option<Saved>)> {
        match Self::open(dir, server_id) {
            Ok(opened) => Ok(opened),
            Err(error) => {
                let aside = dir.set_aside(FILE, "refused", wall_ms)?;
                tracing::error!(
                    error = crate::chain(&error), kept_as = %aside.display(),
                    "refused the state file; no tunnel is set up until the control plane has sent a snapshot"
                );
                Ok(Self::open(dir, server_id)?)
            }
        }
    }

    /// Appends a change that `saved` holds already. On return it survives this process; durable after
    /// [`Store::sync_or_rewrite`].
    pub(crate) fn append(&mut self, change: &Change, saved: &Saved) -> io::Result<()> {
        let appended = self.try_append(change, saved);
        self.behind |= appended.is_err();
        appended
    }

    fn try_append(&mut self, change: &Change, saved: &Saved) -> io::Result<()> {
        if self.base_bytes == 0 || self.behind {
            return self.rewrite(saved);
        }
        let delta = v1::Delta {
            target: Some(change.target.to_wire()),
            removed: change.removed.iter().map(|key| key.0.to_vec().into()).collect(),
            upserted: change.upserted.iter().map(Peer::to_wire).collect(),
            ..v1::Delta::default()
        };
        self.append_record(&Record { delta: Some(delta), ..Record::default() }, saved)
    }

    /// Appends the policies that `saved` holds already, as [`Store::append`] does a change.
    pub(crate) fn append_policies(&mut self, saved: &Saved) -> io::Result<()> {
        let appended = if self.base_bytes == 0 || self.behind {
            self.rewrite(saved)
        } else {
            self.append_record(&Record { policies: policies(&saved.desired), ..Record::default() }, saved)
        };
        self.behind |= appended.is_err();
        appended
    }

    fn append_record(&mut self, record: &Record, saved: &Saved) -> io::Result<()> {
        let record = record.encode_to_vec();
        let grown = self.file.length() + record.len() as u64 - self.base_bytes;
        if grown > self.base_bytes.max(MIN_COMPACT_BYTES) {
            return self.rewrite(saved);
        }
        self.file.append(&record).map(drop)
    }

    /// Makes what was appended durable; the whole state, when an earlier write failed.
    pub(crate) fn sync_or_rewrite(&mut self, saved: &Saved) -> io::Result<()> {
        if self.behind {
            return self.rewrite(saved);
        }
        let synced = self.file.sync();
        // After a failed sync the kernel has dropped the pages: only writing them again helps.
        self.behind = synced.is_err();
        synced
    }

    /// What was appended last no longer holds: writes the whole state, now or at the next sync.
    pub(crate) fn take_back(&mut self, saved: &Saved) -> io::Result<()> {
        self.behind = true;
        self.rewrite(saved)
    }

    /// Writes the whole state; durable on return.
    pub(crate) fn rewrite(&mut self, saved: &Saved) -> io::Result<()> {
        let desired = &saved.desired;
        let base = Base {
            server_id: self.server_id.to_vec().into(),
            hello: Some(saved.hello.clone()),
            cursor: desired.cursor().map(Cursor::to_wire),
            peers: desired.peers().map(Peer::to_wire).collect(),
            retired: desired
                .retired()
                .iter()
                .map(|(life, device_id)| Retired {
                    public_key: life.public_key.0.to_vec().into(),
                    generation: life.generation,
                    device_id: device_id.to_vec().into(),
                })
                .collect(),
            digest: desired.digest().to_bytes().to_vec().into(),
            policies: policies(desired),
        };
        let record = Record { base: Some(base), ..Record::default() }.encode_to_vec();
        let locations = self.file.rewrite(MAGIC, &[record])?;
        self.base_bytes = locations.iter().map(|location| location.bytes()).sum();
        self.behind = false;
        Ok(())
    }
}

fn policies(desired: &Desired) -> Option<v1::Policies> {
    let upserted = desired.policies.all().map(|(_, policy)| policy.wire().clone()).collect();
    desired.policies.are_known().then(|| v1::Policies { upserted, ..v1::Policies::default() })
}

fn load_base(base: &Base, server_id: [u8; 16]) -> Result<Option<Saved>, StoreError> {
    if base.server_id != server_id.as_slice() {
        return Err(StoreError::OtherServer);
    }
    let hello = base.hello.as_ref().ok_or(Refusal::Malformed("hello"))?;
    let interface = Interface::parse(hello.interface.as_ref().ok_or(Refusal::Malformed("interface"))?)?;
    let mut saved = Saved::first(interface, hello)?;
    let cursor = base.cursor.as_ref().map(Cursor::parse).transpose()?;
    let digest = Digest::from_bytes(&base.digest).ok_or(Refusal::Malformed("digest"))?;
    let peers = base.peers.iter().map(Peer::parse).collect::<Result<_, _>>()?;
    saved.desired.restore(cursor, digest, peers)?;
    if let Some(policies) = &base.policies {
        saved.desired.policies.restore(policies.upserted.clone())?;
    }
    for retired in &base.retired {
        let life = Life { public_key: parse_key(&retired.public_key)?, generation: retired.generation };
        let device_id = retired.device_id.as_ref().try_into().map_err(|_| Refusal::Malformed("device_id"))?;
        saved.desired.restore_retired(life, device_id);
    }
    Ok(Some(saved))
}

fn load_change(delta: &v1::Delta) -> Result<Change, Refusal> {
    Ok(Change {
        target: Cursor::parse(delta.target.as_ref().ok_or(Refusal::Malformed("target"))?)?,
        removed: delta.removed.iter().map(|key| parse_key(key)).collect::<Result<Vec<PublicKey>, _>>()?,
        upserted: delta.upserted.iter().map(Peer::parse).collect::<Result<_, _>>()?,
        expected_removed: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::testing::private_directory;

    const SERVER: [u8; 16] = [3; 16];

    fn hello() -> v1::Hello {
        v1::Hello {
            digest_key: vec![9; 32].into(),
            interface: Some(v1::InterfaceConfig {
                listen_port: 51820,
                addresses: vec!["10.8.0.1/16".to_owned(), "fd00:cafe::1/64".to_owned()],
                overlay: vec!["10.8.0.0/16".to_owned(), "fd00:cafe::/64".to_owned()],
                mtu: 1420,
            }),
            ..v1::Hello::default()
        }
    }

    fn first() -> Saved {
        let hello = hello();
        Saved::first(Interface::parse(hello.interface.as_ref().unwrap()).unwrap(), &hello).unwrap()
    }

    fn add_peer(saved: &mut Saved, store: &mut Store, n: u8) {
        let wire = v1::Peer {
            device_id: vec![n; 16].into(),
            tenant_id: vec![1; 16].into(),
            public_key: vec![n; 32].into(),
            ipv4: u32::from_be_bytes([10, 8, 1, n]),
            ipv6: format!("fd00:cafe::{n:x}").parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec().into(),
            generation: 1,
            ..v1::Peer::default()
        };
        // The digest that committing leads to, found by trial: `commit` computes it, `is_whole` compares.
        let mut trial = saved.desired.clone();
        let peer = Peer::parse(&wire).unwrap();
        let target = |digest| Cursor { incarnation: [1; 16], revision: u64::from(n), digest };
        let mut change =
            Change { target: target(Digest::default()), removed: vec![], upserted: vec![peer], expected_removed: 0 };
        trial.commit(&change);
        change.target = target(trial.digest());
        saved.desired.commit(&change);
        store.append(&change, saved).unwrap();
        store.sync_or_rewrite(saved).unwrap();
    }

    #[test]
    fn what_was_saved_is_loaded_again_also_over_rewrites() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let (mut store, none) = Store::open(&dir, SERVER).unwrap();
        assert!(none.is_none());
        let mut saved = first();
        for n in 1..100 {
            add_peer(&mut saved, &mut store, n);
            if n == 50 {
                store.rewrite(&saved).unwrap();
            }
        }
        let (_, loaded) = Store::open(&dir, SERVER).unwrap();
        let loaded = loaded.unwrap();
        assert_eq!(loaded.desired.cursor(), saved.desired.cursor());
        assert_eq!(loaded.desired.peers().len(), 99);
        assert_eq!(loaded.interface, saved.interface);
    }

    #[test]
    fn a_damaged_file_is_refused_and_kept_aside() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let (mut store, _) = Store::open(&dir, SERVER).unwrap();
        let mut saved = first();
        add_peer(&mut saved, &mut store, 1);
        add_peer(&mut saved, &mut store, 2);
        let mut content = std::fs::read(dir.file(FILE)).unwrap();
        content[40] ^= 1;
        std::fs::write(dir.file(FILE), &content).unwrap();
        assert!(matches!(Store::open(&dir, SERVER), Err(StoreError::Frames(FrameError::Damaged { .. }))));
        let (_, loaded) = Store::open_or_set_aside(&dir, SERVER, 77).unwrap();
        assert!(loaded.is_none());
        assert_eq!(std::fs::read(dir.file("state.bin.refused-77")).unwrap(), content);
    }

    #[test]
    fn a_state_under_another_digest_key_and_overlay_is_loaded_and_goes_on() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let (mut store, _) = Store::open(&dir, SERVER).unwrap();
        let mut saved = first();
        add_peer(&mut saved, &mut store, 1);
        let mut other = v1::Hello { digest_key: vec![8; 32].into(), ..hello() };
        let interface = other.interface.as_mut().unwrap();
        interface.addresses = vec!["10.9.0.1/16".to_owned(), "fd00:beef::1/64".to_owned()];
        interface.overlay = vec!["10.9.0.0/16".to_owned(), "fd00:beef::/64".to_owned()];
        let interface = Interface::parse(interface).unwrap();
        assert!(saved.update(interface, &other).unwrap());
        store.rewrite(&saved).unwrap();
        let (mut store, loaded) = Store::open(&dir, SERVER).unwrap();
        let mut loaded = loaded.unwrap();
        assert_eq!((loaded.desired.cursor(), loaded.desired.peers().len()), (saved.desired.cursor(), 1));
        add_peer(&mut loaded, &mut store, 2);
        let (_, again) = Store::open(&dir, SERVER).unwrap();
        assert_eq!(again.unwrap().desired.peers().len(), 2);
    }

    #[test]
    fn a_change_that_was_taken_back_is_not_loaded() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let (mut store, _) = Store::open(&dir, SERVER).unwrap();
        let mut saved = first();
        add_peer(&mut saved, &mut store, 1);
        let mut changed = first();
        changed.desired = saved.desired.clone();
        add_peer(&mut changed, &mut store, 2);
        store.take_back(&saved).unwrap();
        let (_, loaded) = Store::open(&dir, SERVER).unwrap();
        assert_eq!(loaded.unwrap().desired.cursor(), saved.desired.cursor());
    }

    #[test]
    fn policies_are_loaded_again_also_over_rewrites() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let (mut store, _) = Store::open(&dir, SERVER).unwrap();
        let mut saved = first();
        store.rewrite(&saved).unwrap();
        assert!(!Store::open(&dir, SERVER).unwrap().1.unwrap().desired.policies.are_known());
        let tenant = |rate_up| v1::TenantPolicy { tenant_id: vec![1; 16].into(), rate_up, ..Default::default() };
        saved.desired.policies.restore(vec![tenant(5)]).unwrap();
        store.append_policies(&saved).unwrap();
        add_peer(&mut saved, &mut store, 1);
        let rate = |saved: Option<Saved>| saved.unwrap().desired.policies.get(&[1; 16]).unwrap().wire().rate_up;
        assert_eq!(rate(Store::open(&dir, SERVER).unwrap().1), 5);
        saved.desired.policies.restore(vec![tenant(7)]).unwrap();
        store.rewrite(&saved).unwrap();
        assert_eq!(rate(Store::open(&dir, SERVER).unwrap().1), 7);
    }

    #[test]
    fn the_state_of_another_server_is_refused() {
        let root = private_directory();
        let dir = StateDir::open(root.path()).unwrap();
        let (mut store, _) = Store::open(&dir, SERVER).unwrap();
        add_peer(&mut first(), &mut store, 1);
        assert!(matches!(Store::open(&dir, [4; 16]), Err(StoreError::OtherServer)));
    }
}
