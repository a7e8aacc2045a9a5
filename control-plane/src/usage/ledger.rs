//! The ledger: cumulative counters become billed bytes exactly once.
//!
//! All of it happens in one transaction with the acknowledgement of the windows. A window that was seen before changes
//! nothing; a counter adds what it has grown by since the greatest value known; so loss, repetition, reordering and a
//! database restored to an older point cannot change a total.

use std::collections::BTreeMap;

use cvault_node_protocol::v1::UsageWindow;
use cvault_types::ServerId;
use sqlx::PgConnection;
use time::{Date, OffsetDateTime, UtcOffset};
use uuid::Uuid;

use super::arithmetic::{self, MAX_PLAUSIBLE};
use crate::db::{DbError, Tx};
use crate::sessions::{self, Handshake};

/// What became of a report's windows.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ingested {
    /// Windows that had not been seen before.
    pub new_windows: usize,
    /// Billed bytes, both ways.
    pub bytes: u64,
    /// Bytes of devices that are unknown here: kept, billed to nobody.
    pub orphan_bytes: u64,
    /// Values refused because no counter can have them.
    pub implausible: usize,
}

/// A counter's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct CounterKey {
    epoch: Uuid,
    device: Uuid,
    generation: i64,
}

/// Values of a counter, or sums of them.
#[derive(Clone, Copy, Debug, Default)]
struct Values {
    rx: u64,
    tx: u64,
    rx_packets: u64,
    tx_packets: u64,
}

/// What is known of a counter.
#[derive(Clone, Copy, Debug)]
struct Counter {
    values: Values,
    /// When it was last entered, or could first have counted.
    since: OffsetDateTime,
}

/// Who pays for a device's bytes.
#[derive(Clone, Copy, Debug)]
struct Owner {
    tenant: Uuid,
    user: Uuid,
    registered_at: OffsetDateTime,
}

/// Enters a report's windows. The caller commits, and only then acknowledges.
///
/// # Errors
/// Those of the database; nothing may be acknowledged then.
pub async fn ingest(
    tx: &mut Tx,
    server: ServerId,
    windows: &[UsageWindow],
    received_at: OffsetDateTime,
) -> Result<Ingested, DbError> {
    let mut done = Ingested::default();
    if windows.is_empty() {
        return Ok(done);
    }
    let server = server.uuid();
    // two reports of one server at once (an old and a new session of its agent) take turns
    sqlx::query!("select pg_advisory_xact_lock(731992416, hashtext($1::uuid::text))", server)
        .execute(tx.conn())
        .await?;
    let windows = unseen(tx.conn(), server, windows).await?;
    done.new_windows = windows.len();
    let devices = reported_devices(&windows);
    let owners = lock_owners(tx.conn(), server, &devices).await?;
    let known = known_counters(tx.conn(), server, &windows, &devices).await?;

    let mut entries = Entries { owners, counters: known, ..Entries::empty(received_at) };
    for window in windows {
        entries.add(window, &mut done);
    }
    entries.write(tx.conn(), server).await?;
    Ok(done)
}

/// Records the windows and keeps those that are new.
async fn unseen<'a>(
    conn: &mut PgConnection,
    server: Uuid,
    windows: &'a [UsageWindow],
) -> Result<Vec<&'a UsageWindow>, DbError> {
    let keys: Vec<_> = windows.iter().map(window_key).collect();
    let (epochs, sequences): (Vec<_>, Vec<_>) = keys.iter().copied().unzip();
    let inserted = sqlx::query!(
        "insert into platform.usage_windows (server_id, counter_epoch, sequence)
         select $1, w.epoch, w.sequence from unnest($2::uuid[], $3::bigint[]) as w (epoch, sequence)
         order by w.epoch, w.sequence
         on conflict do nothing
         returning counter_epoch, sequence",
        server,
        &epochs,
        &sequences,
    )
    .fetch_all(conn)
    .await?;
    let mut new: Vec<_> = inserted.into_iter().map(|row| (row.counter_epoch, row.sequence)).collect();
    let mut kept = Vec::with_capacity(new.len());
    for (window, key) in windows.iter().zip(keys) {
        // a window that stands twice in one report is entered once
        if let Some(position) = new.iter().position(|candidate| *candidate == key) {
            new.swap_remove(position);
            kept.push(window);
        }
    }
    Ok(kept)
}

fn window_key(window: &UsageWindow) -> (Uuid, i64) {
    (uuid(&window.counter_epoch), i64::from_ne_bytes(window.sequence.to_ne_bytes()))
}

/// The gateway has checked the length of every id.
fn uuid(bytes: &[u8]) -> Uuid {
    Uuid::from_slice(bytes).unwrap_or_default()
}

fn reported_devices(windows: &[&UsageWindow]) -> Vec<Uuid> {
    let mut devices: Vec<_> =
        windows.iter().flat_map(|window| &window.peers).map(|peer| uuid(&peer.device_id)).collect();
    devices.sort_unstable();
    devices.dedup();
    devices
}

/// Locks the devices in id order. A server may only report devices that are or were placed on it; of others nobody is
/// the owner.
async fn lock_owners(
    conn: &mut PgConnection,
    server: Uuid,
    devices: &[Uuid],
) -> Result<BTreeMap<Uuid, Owner>, DbError> {
    let rows = sqlx::query!(
        "select d.device_id, d.tenant_id, d.user_id, d.created_at
         from platform.peers p
         join cvault.devices d on d.tenant_id = p.tenant_id and d.device_id = p.device_id
         where p.server_id = $1 and p.device_id = any($2)
         order by d.device_id
         for no key update of d",
        server,
        devices,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| (row.device_id, Owner { tenant: row.tenant_id, user: row.user_id, registered_at: row.created_at }))
        .collect())
}

async fn known_counters(
    conn: &mut PgConnection,
    server: Uuid,
    windows: &[&UsageWindow],
    devices: &[Uuid],
) -> Result<BTreeMap<CounterKey, Counter>, DbError> {
    // only the epochs reported: a device's earlier ones grow in number for ever
    let mut epochs: Vec<_> = windows.iter().map(|window| uuid(&window.counter_epoch)).collect();
    epochs.sort_unstable();
    epochs.dedup();
    let rows = sqlx::query!(
        "select counter_epoch, device_id, generation, rx_bytes, tx_bytes, rx_packets, tx_packets, updated_at
         from platform.usage_counters
         where server_id = $1 and counter_epoch = any($2) and device_id = any($3)",
        server,
        &epochs,
        devices,
    )
    .fetch_all(conn)
    .await?;
    let value = |value: i64| u64::try_from(value).unwrap_or_default();
    Ok(rows
        .into_iter()
        .map(|row| {
            let key = CounterKey { epoch: row.counter_epoch, device: row.device_id, generation: row.generation };
            let values = Values {
                rx: value(row.rx_bytes),
                tx: value(row.tx_bytes),
                rx_packets: value(row.rx_packets),
                tx_packets: value(row.tx_packets),
            };
            (key, Counter { values, since: row.updated_at })
        })
        .collect())
}

/// What a report adds, collected before it is written in a few bulk statements.
struct Entries {
    received_at: OffsetDateTime,
    owners: BTreeMap<Uuid, Owner>,
    counters: BTreeMap<CounterKey, Counter>,
    touched: BTreeMap<CounterKey, Values>,
    hours: BTreeMap<(Uuid, OffsetDateTime), Values>,
    devices: BTreeMap<Uuid, Values>,
    handshakes: BTreeMap<Uuid, OffsetDateTime>,
}

impl Entries {
    fn empty(received_at: OffsetDateTime) -> Self {
        Self {
            received_at,
            owners: BTreeMap::new(),
            counters: BTreeMap::new(),
            touched: BTreeMap::new(),
            hours: BTreeMap::new(),
            devices: BTreeMap::new(),
            handshakes: BTreeMap::new(),
        }
    }

    fn add(&mut self, window: &UsageWindow, done: &mut Ingested) {
        let (start, end) = arithmetic::window(self.received_at, window.age_start_ms, window.age_end_ms);
        for peer in &window.peers {
            let device = uuid(&peer.device_id);
            let reported = Values {
                rx: peer.rx_bytes,
                tx: peer.tx_bytes,
                rx_packets: peer.rx_packets,
                tx_packets: peer.tx_packets,
            };
            let plausible = [reported.rx, reported.tx, reported.rx_packets, reported.tx_packets, peer.generation]
                .iter()
                .all(|value| *value <= MAX_PLAUSIBLE);
            let Some(generation) = i64::try_from(peer.generation).ok().filter(|_| plausible) else {
                done.implausible += 1;
                continue;
            };
            let key = CounterKey { epoch: uuid(&window.counter_epoch), device, generation };
            let Some(grown) = self.grow(key, reported, window) else {
                done.implausible += 1;
                continue;
            };
            let sum = if self.owners.contains_key(&device) { &mut done.bytes } else { &mut done.orphan_bytes };
            *sum = sum.saturating_add(grown.rx).saturating_add(grown.tx);
            self.attribute(device, grown, start, end);
            if peer.handshake_age_ms != u64::MAX {
                // ages are taken at the end of the window
                let (_, at) = arithmetic::window(end, peer.handshake_age_ms, peer.handshake_age_ms);
                self.handshakes.entry(device).and_modify(|known| *known = at.max(*known)).or_insert(at);
            }
        }
    }

    /// `None` when no line could have carried so much in the time.
    fn grow(&mut self, key: CounterKey, reported: Values, window: &UsageWindow) -> Option<Values> {
        // of a device nobody knows, nothing is billed: any time will do
        let begun = self.owners.get(&key.device).map_or(OffsetDateTime::UNIX_EPOCH, |owner| owner.registered_at);
        let unknown = Counter { values: Values::default(), since: begun };
        let Counter { values: known, since } = self.counters.get(&key).copied().unwrap_or(unknown);
        let grown = Values {
            rx: arithmetic::growth(known.rx, reported.rx),
            tx: arithmetic::growth(known.tx, reported.tx),
            ..Values::default()
        };
        let measured_ms = window.age_start_ms.saturating_sub(window.age_end_ms);
        let limit = arithmetic::most_bytes(measured_ms, self.received_at - since);
        if grown.rx > limit || grown.tx > limit {
            return None;
        }
        let values = Values {
            rx: known.rx.max(reported.rx),
            tx: known.tx.max(reported.tx),
            rx_packets: known.rx_packets.max(reported.rx_packets),
            tx_packets: known.tx_packets.max(reported.tx_packets),
        };
        self.counters.insert(key, Counter { values, since });
        self.touched.insert(key, values);
        Some(grown)
    }

    fn attribute(&mut self, device: Uuid, grown: Values, start: OffsetDateTime, end: OffsetDateTime) {
        if grown.rx == 0 && grown.tx == 0 {
            return;
        }
        let total = self.devices.entry(device).or_default();
        total.rx = total.rx.saturating_add(grown.rx);
        total.tx = total.tx.saturating_add(grown.tx);
        for share in arithmetic::split(grown.rx, start, end) {
            let rx = &mut self.hours.entry((device, share.hour)).or_default().rx;
            *rx = rx.saturating_add(share.bytes);
        }
        for share in arithmetic::split(grown.tx, start, end) {
            let tx = &mut self.hours.entry((device, share.hour)).or_default().tx;
            *tx = tx.saturating_add(share.bytes);
        }
    }

    async fn write(self, conn: &mut PgConnection, server: Uuid) -> Result<(), DbError> {
        write_counters(conn, server, &self.touched).await?;
        write_hours(conn, server, &self.owners, &self.hours).await?;
        let handshakes: Vec<_> = self
            .handshakes
            .iter()
            .filter_map(|(device, at)| {
                let owner = self.owners.get(device)?;
                Some(Handshake { tenant: owner.tenant, device: *device, at: *at })
            })
            .collect();
        // before the bytes: they belong to the session that this handshake opens
        sessions::note_handshakes(conn, server, &handshakes, self.received_at).await?;
        write_sessions(conn, &self.owners, &self.devices).await?;
        write_months(conn, &self.owners, &self.hours).await
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

async fn write_counters(
    conn: &mut PgConnection,
    server: Uuid,
    counters: &BTreeMap<CounterKey, Values>,
) -> Result<(), DbError> {
    let epochs: Vec<_> = counters.keys().map(|key| key.epoch).collect();
    let devices: Vec<_> = counters.keys().map(|key| key.device).collect();
    let generations: Vec<_> = counters.keys().map(|key| key.generation).collect();
    let column = |of: fn(&Values) -> u64| counters.values().map(|values| signed(of(values))).collect::<Vec<_>>();
    sqlx::query!(
        "insert into platform.usage_counters (server_id, counter_epoch, device_id, generation, rx_bytes, tx_bytes,
                                              rx_packets, tx_packets)
         select $1, c.* from unnest($2::uuid[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
                                    $8::bigint[]) as c
         on conflict on constraint usage_counters_pkey do update
         set rx_bytes = greatest(usage_counters.rx_bytes, excluded.rx_bytes),
             tx_bytes = greatest(usage_counters.tx_bytes, excluded.tx_bytes),
             rx_packets = greatest(usage_counters.rx_packets, excluded.rx_packets),
             tx_packets = greatest(usage_counters.tx_packets, excluded.tx_packets),
             updated_at = now()",
        server,
        &epochs,
        &devices,
        &generations,
        &column(|values| values.rx),
        &column(|values| values.tx),
        &column(|values| values.rx_packets),
        &column(|values| values.tx_packets),
    )
    .execute(conn)
    .await?;
    Ok(())
}

async fn write_hours(
    conn: &mut PgConnection,
    server: Uuid,
    owners: &BTreeMap<Uuid, Owner>,
    hours: &BTreeMap<(Uuid, OffsetDateTime), Values>,
) -> Result<(), DbError> {
    let (mut tenants, mut users, mut devices, mut times, mut rx, mut tx) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut orphans, mut orphan_times, mut orphan_rx, mut orphan_tx) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for ((device, hour), values) in hours {
        if let Some(owner) = owners.get(device) {
            tenants.push(owner.tenant);
            users.push(owner.user);
            devices.push(*device);
            times.push(*hour);
            rx.push(signed(values.rx));
            tx.push(signed(values.tx));
        } else {
            orphans.push(*device);
            orphan_times.push(*hour);
            orphan_rx.push(signed(values.rx));
            orphan_tx.push(signed(values.tx));
        }
    }
    sqlx::query!(
        "insert into cvault.usage_hourly (tenant_id, hour, device_id, user_id, server_id, rx_bytes, tx_bytes)
         select h.tenant_id, h.hour, h.device_id, h.user_id, $1, h.rx, h.tx
         from unnest($2::uuid[], $3::timestamptz[], $4::uuid[], $5::uuid[], $6::bigint[], $7::bigint[])
              as h (tenant_id, hour, device_id, user_id, rx, tx)
         on conflict (tenant_id, hour, device_id, server_id) do update
         -- a damaged counter must not make every later report fail
         set rx_bytes = least(usage_hourly.rx_bytes::numeric + excluded.rx_bytes, 9223372036854775807)::bigint,
             tx_bytes = least(usage_hourly.tx_bytes::numeric + excluded.tx_bytes, 9223372036854775807)::bigint",
        server,
        &tenants,
        &times,
        &devices,
        &users,
        &rx,
        &tx,
    )
    .execute(&mut *conn)
    .await?;
    if orphans.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "insert into platform.usage_orphans (server_id, device_id, hour, rx_bytes, tx_bytes)
         select $1, o.* from unnest($2::uuid[], $3::timestamptz[], $4::bigint[], $5::bigint[]) as o
         on conflict on constraint usage_orphans_pkey do update
         set rx_bytes = least(usage_orphans.rx_bytes::numeric + excluded.rx_bytes, 9223372036854775807)::bigint,
             tx_bytes = least(usage_orphans.tx_bytes::numeric + excluded.tx_bytes, 9223372036854775807)::bigint",
        server,
        &orphans,
        &orphan_times,
        &orphan_rx,
        &orphan_tx,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What the limits are compared with; in the order of the tenants, as the leases lock them.
async fn write_months(
    conn: &mut PgConnection,
    owners: &BTreeMap<Uuid, Owner>,
    hours: &BTreeMap<(Uuid, OffsetDateTime), Values>,
) -> Result<(), DbError> {
    let mut sums: BTreeMap<(Uuid, Date), u64> = BTreeMap::new();
    for ((device, hour), values) in hours {
        let Some(owner) = owners.get(device) else { continue };
        let month = hour.to_offset(UtcOffset::UTC).date().replace_day(1).expect("every month has a first day");
        let sum = sums.entry((owner.tenant, month)).or_default();
        *sum = sum.saturating_add(values.rx).saturating_add(values.tx);
    }
    if sums.is_empty() {
        return Ok(());
    }
    let (tenants, months): (Vec<_>, Vec<_>) = sums.keys().copied().unzip();
    let bytes: Vec<_> = sums.values().map(|sum| signed(*sum)).collect();
    sqlx::query!(
        "insert into platform.quota_months (tenant_id, month, bytes)
         select * from unnest($1::uuid[], $2::date[], $3::bigint[])
         on conflict on constraint quota_months_pkey do update
         set bytes = least(quota_months.bytes::numeric + excluded.bytes, 9223372036854775807)::bigint",
        &tenants,
        &months,
        &bytes,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// Bytes without an open session belong to none: they are billed by the hours all the same.
async fn write_sessions(
    conn: &mut PgConnection,
    owners: &BTreeMap<Uuid, Owner>,
    bytes: &BTreeMap<Uuid, Values>,
) -> Result<(), DbError> {
    let owned: Vec<_> =
        bytes.iter().filter_map(|(device, values)| Some((owners.get(device)?.tenant, *device, *values))).collect();
    let tenants: Vec<_> = owned.iter().map(|(tenant, ..)| *tenant).collect();
    let devices: Vec<_> = owned.iter().map(|(_, device, _)| *device).collect();
    let rx: Vec<_> = owned.iter().map(|(.., values)| signed(values.rx)).collect();
    let tx: Vec<_> = owned.iter().map(|(.., values)| signed(values.tx)).collect();
    sqlx::query!(
        "update cvault.sessions s
         set rx_bytes = least(s.rx_bytes::numeric + b.rx, 9223372036854775807)::bigint,
             tx_bytes = least(s.tx_bytes::numeric + b.tx, 9223372036854775807)::bigint
         from unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::bigint[]) as b (tenant_id, device_id, rx, tx)
         where s.tenant_id = b.tenant_id and s.device_id = b.device_id and s.status = 'active'",
        &tenants,
        &devices,
        &rx,
        &tx,
    )
    .execute(conn)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use cvault_node_protocol::v1::PeerUsage;

    use super::*;
    use crate::testing::World;

    #[tokio::test]
    async fn only_counters_of_the_epochs_reported_are_read() {
        let (world, server) = World::with_server().await;
        let device = Uuid::now_v7();
        let window = |epoch: u128| UsageWindow {
            counter_epoch: epoch.to_be_bytes().to_vec().into(),
            peers: vec![PeerUsage { device_id: device.as_bytes().to_vec().into(), ..PeerUsage::default() }],
            ..UsageWindow::default()
        };
        let windows: Vec<_> = (0..50).map(window).collect();
        let mut tx = Tx::begin(&world.app.db.sys).await.unwrap();
        ingest(&mut tx, server, &windows, OffsetDateTime::now_utc()).await.unwrap();
        let known = known_counters(tx.conn(), server.uuid(), &[&windows[7], &windows[8]], &[device]).await.unwrap();
        assert_eq!(known.len(), 2);
        tx.rollback().await.unwrap();
    }
}
