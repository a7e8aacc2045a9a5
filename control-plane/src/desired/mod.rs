//! What a server should run: read as a snapshot, or as a delta from what it has.
//!
//! Everything is read in one REPEATABLE READ transaction. Before anything is sent, what was read must agree with the
//! server's own row (count and digest of a snapshot, gapless changes of a delta); otherwise nothing is sent: a fault that
//! hides rows looks like "no peers", and a server must never act on that.

use cvault_node_protocol::MAX_CHUNK_PEERS;
use cvault_node_protocol::digest::{Digest, PeerRecord};
use cvault_node_protocol::v1::{Cursor, Peer};
use cvault_types::{DeviceId, ServerId, TenantId};
use ipnet::IpNet;
use sha2::{Digest as _, Sha256};
use sqlx::PgConnection;
use sqlx::PgPool;
use uuid::Uuid;

use crate::db::{DbError, Tx};
use crate::devices;
use crate::ipam;
use crate::keys::{KeyError, KeyRing};

/// A position in a server's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub incarnation: Uuid,
    pub revision: u64,
    pub digest: Digest,
}

impl Position {
    #[must_use]
    pub fn to_wire(self) -> Cursor {
        Cursor {
            incarnation: self.incarnation.as_bytes().to_vec().into(),
            revision: self.revision,
            digest: self.digest.to_bytes().to_vec().into(),
        }
    }

    /// `None` for anything that is not a position.
    #[must_use]
    pub fn from_wire(cursor: &Cursor) -> Option<Self> {
        Some(Self {
            incarnation: Uuid::from_slice(&cursor.incarnation).ok()?,
            revision: cursor.revision,
            digest: Digest::from_bytes(&cursor.digest)?,
        })
    }
}

/// What brings a server up to date.
#[derive(Debug)]
pub enum Update {
    /// It is.
    Nothing,
    Snapshot {
        target: Position,
        peers: Vec<Peer>,
        /// How many peers the server must expect to lose, as far as that is known.
        expected_removed: u32,
    },
    Delta {
        from_revision: u64,
        target: Position,
        peer_count: u32,
        removed: Vec<Vec<u8>>,
        upserted: Vec<Peer>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum DesiredError {
    #[error("there is no such server")]
    NoSuchServer,
    /// An alarm: the rows that can be read are not the state the server's row speaks of.
    #[error("the peers that can be read are not revision {revision}: {what}")]
    Inconsistent { revision: u64, what: String },
    /// Preshared keys that do not open, or are not the ones their hashes tell.
    #[error("{} devices have no readable preshared key", .0.len())]
    Unreadable(Vec<Unreadable>),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// A device that no server can be told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable {
    device: Uuid,
    tenant: Uuid,
}

/// Reads what `server` needs, given what it has. A position of another history, of the future, or with another digest
/// gets a snapshot.
///
/// # Errors
/// [`DesiredError::Inconsistent`] must be alarmed; nothing may be sent then.
pub async fn read(
    sys: &PgPool,
    keys: &KeyRing,
    server: ServerId,
    have: Option<Position>,
) -> Result<Update, DesiredError> {
    match read_changes(sys, keys, server, have).await? {
        Some(update) => Ok(update),
        None => read_snapshot(sys, keys, server, have).await,
    }
}

/// What [`read`] gives when that is no snapshot, so no more than a message; `None` when only a snapshot helps.
///
/// # Errors
/// As [`read`].
pub async fn read_changes(
    sys: &PgPool,
    keys: &KeyRing,
    server: ServerId,
    have: Option<Position>,
) -> Result<Option<Update>, DesiredError> {
    let Some(have) = have else { return Ok(None) };
    let mut tx = Tx::snapshot(sys).await?;
    let update = changes(tx.conn(), keys, server.uuid(), have).await;
    match tx.finish(update).await {
        Err(DesiredError::Unreadable(devices)) => {
            withdraw(sys, devices).await?;
            Ok(None)
        }
        other => other,
    }
}

/// Everything the server should run: about 10 MB for a full one.
///
/// # Errors
/// As [`read`].
pub async fn read_snapshot(
    sys: &PgPool,
    keys: &KeyRing,
    server: ServerId,
    have: Option<Position>,
) -> Result<Update, DesiredError> {
    let read = async || {
        let mut tx = Tx::snapshot(sys).await?;
        let update = snapshot(tx.conn(), keys, server.uuid(), have).await;
        tx.finish(update).await
    };
    match read().await {
        Err(DesiredError::Unreadable(devices)) => {
            withdraw(sys, devices).await?;
            read().await
        }
        other => other,
    }
}

/// Takes devices off their servers, so that they do not keep everybody else's changes from them.
async fn withdraw(sys: &PgPool, devices: Vec<Unreadable>) -> Result<(), DesiredError> {
    for Unreadable { device, tenant } in devices {
        tracing::error!(%device, %tenant, "a preshared key does not open: the device is taken off its server");
        sqlx::query_scalar!("select platform.withdraw_unreadable_peer($1, $2)", device, tenant)
            .fetch_one(sys)
            .await
            .map_err(DbError::from)?;
    }
    Ok(())
}

async fn changes(
    conn: &mut PgConnection,
    keys: &KeyRing,
    server: Uuid,
    have: Position,
) -> Result<Option<Update>, DesiredError> {
    let state = state(conn, server).await?;
    if have == state.target {
        Ok(Some(Update::Nothing))
    } else if have.incarnation == state.target.incarnation && have.revision < state.target.revision {
        delta(conn, keys, server, have, &state).await
    } else {
        Ok(None)
    }
}

struct State {
    target: Position,
    peer_count: u32,
    digest_key: [u8; 32],
}

async fn state(conn: &mut PgConnection, server: Uuid) -> Result<State, DesiredError> {
    let row = sqlx::query!(
        r#"select s.revision, s.peer_count, s.digest::text as "digest!", s.digest_key, i.incarnation
           from platform.servers s cross join platform.installation i
           where s.server_id = $1"#,
        server
    )
    .fetch_optional(conn)
    .await
    .map_err(DbError::from)?
    .ok_or(DesiredError::NoSuchServer)?;
    let revision = u64::try_from(row.revision).unwrap_or_default();
    let damaged = |what: &str| DesiredError::Inconsistent { revision, what: what.to_owned() };
    let digest: u128 = row.digest.parse().map_err(|_| damaged("the digest is no number"))?;
    Ok(State {
        target: Position {
            incarnation: row.incarnation,
            revision,
            digest: Digest::from_bytes(&digest.to_be_bytes()).expect("16 bytes"),
        },
        peer_count: u32::try_from(row.peer_count).map_err(|_| damaged("the count of peers is out of bounds"))?,
        digest_key: row.digest_key.try_into().map_err(|_| damaged("the digest key is damaged"))?,
    })
}

async fn snapshot(
    conn: &mut PgConnection,
    keys: &KeyRing,
    server: Uuid,
    have: Option<Position>,
) -> Result<Update, DesiredError> {
    let state = state(conn, server).await?;
    let have = have.filter(|have| have.incarnation == state.target.incarnation);
    let expected_removed = removed_since(conn, server, have).await?;
    let peers = peers(conn, keys, server, 0).await?;
    let mut digest = Digest::default();
    for peer in &peers {
        digest.add(&state.digest_key, &peer.record);
    }
    let revision = state.target.revision;
    if peers.len() != state.peer_count as usize {
        let what = format!("{} peers instead of {}", peers.len(), state.peer_count);
        return Err(DesiredError::Inconsistent { revision, what });
    }
    if digest != state.target.digest {
        return Err(DesiredError::Inconsistent { revision, what: "another digest".to_owned() });
    }
    Ok(Update::Snapshot {
        target: state.target,
        peers: peers.into_iter().map(|peer| peer.wire).collect(),
        expected_removed,
    })
}

/// How many peers were removed on purpose since the older of what the server has acknowledged and what it says it has.
/// Their rows stay longer than the log of changes (`trim.rs`). Index `peers_removed`.
async fn removed_since(conn: &mut PgConnection, server: Uuid, have: Option<Position>) -> Result<u32, DesiredError> {
    let removed = sqlx::query_scalar!(
        r#"select count(*) as "removed!" from platform.peers p join platform.servers s using (server_id)
           where p.server_id = $1 and p.removed_revision > least(s.acked_revision, $2::bigint)"#,
        server,
        have.and_then(|have| i64::try_from(have.revision).ok()),
    )
    .fetch_one(conn)
    .await
    .map_err(DbError::from)?;
    Ok(u32::try_from(removed).unwrap_or(u32::MAX))
}

/// `None` when the log does not cover the way, or the way is too long for one message.
async fn delta(
    conn: &mut PgConnection,
    keys: &KeyRing,
    server: Uuid,
    have: Position,
    state: &State,
) -> Result<Option<Update>, DesiredError> {
    let from = i64::try_from(have.revision).unwrap_or(i64::MAX);
    let to = i64::try_from(state.target.revision).unwrap_or(i64::MAX);
    // more changes than this are read faster as a snapshot
    const MAX_CHANGES: usize = 4 * MAX_CHUNK_PEERS;
    if to - from > MAX_CHANGES as i64 {
        return Ok(None);
    }
    // the first change of a key tells whether the server has it: added and removed again needs no message
    let changes = sqlx::query!(
        r#"select public_key as "public_key!", (array_agg(op order by revision))[1] as "first_op!", count(*) as "count!"
           from platform.node_changes
           where server_id = $1 and revision > $2 and revision <= $3
           group by public_key order by min(revision)"#,
        server,
        from,
        to,
    )
    .fetch_all(&mut *conn)
    .await
    .map_err(DbError::from)?;
    if changes.iter().map(|change| change.count).sum::<i64>() != to - from {
        // trimmed; a gap in the middle is repaired by the snapshot just as well
        return Ok(None);
    }
    let removed: Vec<_> =
        changes.into_iter().filter(|change| change.first_op == "remove").map(|change| change.public_key).collect();
    let upserted = peers(conn, keys, server, from).await?;
    if removed.len() > MAX_CHUNK_PEERS || upserted.len() > MAX_CHUNK_PEERS {
        return Ok(None);
    }
    Ok(Some(Update::Delta {
        from_revision: have.revision,
        target: state.target,
        peer_count: state.peer_count,
        removed,
        upserted: upserted.into_iter().map(|peer| peer.wire).collect(),
    }))
}

struct ReadPeer {
    record: PeerRecord,
    wire: Peer,
}

/// The server's peers that were added after a revision. Index `peers_generation`.
async fn peers(
    conn: &mut PgConnection,
    keys: &KeyRing,
    server: Uuid,
    after: i64,
) -> Result<Vec<ReadPeer>, DesiredError> {
    let rows = sqlx::query!(
        r#"select p.device_id, p.tenant_id, p.public_key, p.preshared_key_sealed, p.preshared_key_hash,
                  p.ipv4 as "ipv4!: IpNet", p.ipv6 as "ipv6!: IpNet", p.generation, t.data_key_sealed as "data_key_sealed?"
           from platform.peers p
           left join cvault.tenants t on t.tenant_id = p.tenant_id and p.preshared_key_sealed is not null
           where p.server_id = $1 and p.removed_revision is null and p.generation > $2
           order by p.generation"#,
        server,
        after
    )
    .fetch_all(conn)
    .await
    .map_err(DbError::from)?;
    let mut unreadable = Vec::new();
    let mut peers = Vec::with_capacity(rows.len());
    for row in rows {
        let addresses = ipam::addresses(row.ipv4, row.ipv6)?;
        let record = PeerRecord {
            device_id: row.device_id.into_bytes(),
            tenant_id: row.tenant_id.into_bytes(),
            public_key: row.public_key.try_into().expect("peers_public_key_length"),
            preshared_key_hash: row.preshared_key_hash.try_into().expect("devices_preshared_key_hash_length"),
            ipv4: addresses.ipv4.octets(),
            ipv6: addresses.ipv6.octets(),
            generation: u64::try_from(row.generation).unwrap_or_default(),
        };
        let opened = preshared_key(keys, row.data_key_sealed, row.preshared_key_sealed, &record);
        let Ok(preshared_key) = opened else {
            unreadable.push(Unreadable { device: row.device_id, tenant: row.tenant_id });
            continue;
        };
        let wire = Peer {
            device_id: record.device_id.to_vec().into(),
            tenant_id: record.tenant_id.to_vec().into(),
            public_key: record.public_key.to_vec().into(),
            preshared_key: preshared_key.into(),
            ipv4: u32::from(addresses.ipv4),
            ipv6: record.ipv6.to_vec().into(),
            generation: record.generation,
        };
        peers.push(ReadPeer { record, wire });
    }
    if unreadable.is_empty() { Ok(peers) } else { Err(DesiredError::Unreadable(unreadable)) }
}

/// The bytes of the preshared key, none without one; they must be the ones the record's hash tells.
fn preshared_key(
    keys: &KeyRing,
    data_key: Option<Vec<u8>>,
    sealed: Option<Vec<u8>>,
    record: &PeerRecord,
) -> Result<Vec<u8>, KeyError> {
    let Some(sealed) = sealed else {
        return if record.preshared_key_hash == [0; 32] { Ok(Vec::new()) } else { Err(KeyError::DoesNotOpen) };
    };
    let aad = devices::preshared_key_aad(
        TenantId::from_uuid(Uuid::from_bytes(record.tenant_id)),
        DeviceId::from_uuid(Uuid::from_bytes(record.device_id)),
    );
    let opened = keys.open(&data_key.ok_or(KeyError::DoesNotOpen)?, aad, &sealed)?;
    if opened.len() != 32 || <[u8; 32]>::from(Sha256::digest(&*opened)) != record.preshared_key_hash {
        return Err(KeyError::DoesNotOpen);
    }
    Ok(opened.to_vec())
}

#[cfg(test)]
mod tests;
