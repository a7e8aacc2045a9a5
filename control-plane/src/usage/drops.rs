//! Packets of devices that their servers have dropped, by reason: for support, never for the bill.
//!
//! The values are cumulative since the server's tunnel process started; the latest is kept, so that repeating a report
//! changes nothing.

use cvault_node_protocol::v1::PeerDrops;
use cvault_types::ServerId;
use serde_json::{Map, Value};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::db::{DbError, Tx};

/// Reasons by which packets are dropped: the data plane knows about thirty.
const MAX_REASONS: usize = 64;

/// Keeps the values of devices that are or were placed on the server; of others nothing is kept.
///
/// # Errors
/// Those of the database.
pub async fn enter(
    tx: &mut Tx,
    server: ServerId,
    drops: &[PeerDrops],
    received_at: OffsetDateTime,
) -> Result<(), DbError> {
    if drops.is_empty() {
        return Ok(());
    }
    let mut rows: Vec<_> = drops.iter().filter_map(row).collect();
    rows.sort_unstable_by_key(|(device, generation, _)| (*device, std::cmp::Reverse(*generation)));
    // the newest life of a device
    rows.dedup_by_key(|(device, ..)| *device);
    let devices: Vec<_> = rows.iter().map(|(device, ..)| *device).collect();
    let generations: Vec<_> = rows.iter().map(|(_, generation, _)| *generation).collect();
    let reasons: Vec<_> = rows.into_iter().map(|(.., reasons)| reasons).collect();
    sqlx::query!(
        "insert into platform.device_drops (server_id, device_id, generation, drops, reported_at)
         select $1, d.device_id, d.generation, d.drops, $5
         from unnest($2::uuid[], $3::bigint[], $4::jsonb[]) as d (device_id, generation, drops)
         where exists (select from platform.peers p where p.server_id = $1 and p.device_id = d.device_id)
         order by d.device_id
         on conflict on constraint device_drops_pkey do update
         set generation = excluded.generation, drops = excluded.drops, reported_at = excluded.reported_at",
        server.uuid(),
        &devices,
        &generations,
        &reasons,
        received_at
    )
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Bounded, whatever an agent sends.
fn row(drops: &PeerDrops) -> Option<(Uuid, i64, Value)> {
    let clean = |reason: &String| reason.chars().filter(|c| c.is_ascii_graphic()).take(64).collect::<String>();
    let reasons: Map<_, _> =
        drops.packets.iter().take(MAX_REASONS).map(|(reason, count)| (clean(reason), Value::from(*count))).collect();
    let device = Uuid::from_slice(&drops.device_id).ok()?;
    Some((device, i64::try_from(drops.generation).ok()?, Value::Object(reasons)))
}
