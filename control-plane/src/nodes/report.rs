//! One `Report`: usage into the ledger, the applied position, health. Answered after COMMIT.

use cvault_node_protocol::digest::Digest;
use cvault_node_protocol::v1::{AckedWindow, Health, ReportRequest, ReportResponse, UsageWindow};
use cvault_node_protocol::{MAX_REPORT_WINDOWS, MAX_WINDOW_PEERS};
use cvault_types::ServerId;
use serde_json::json;
use tonic::Status;

use crate::app::App;
use crate::db::{DbError, Tx};
use crate::desired::Position;
use crate::metrics;
use crate::text::is_misleading;
use crate::usage::{self, leases};

/// Reasons an agent may give in one report; the rest is noise.
const MAX_NACKS: usize = 16;
/// Reasons by which packets are dropped: the data plane knows about a dozen.
const MAX_DROP_REASONS: usize = 64;

/// Refuses what no correct agent sends.
pub(super) fn check(request: &ReportRequest) -> Result<(), Status> {
    let fault = |sentence| Err(Status::invalid_argument(sentence));
    if request.windows.len() > MAX_REPORT_WINDOWS || request.nacks.len() > MAX_NACKS {
        return fault("too many windows or nacks in one report");
    }
    let too_long = |window: &UsageWindow| window.peers.len() > MAX_WINDOW_PEERS;
    if request.windows.iter().any(too_long) || request.drops.len() > MAX_WINDOW_PEERS {
        return fault("too many peers in one window");
    }
    let ids = |bytes: &[u8]| bytes.len() == 16;
    if !request
        .windows
        .iter()
        .all(|window| ids(&window.counter_epoch) && window.peers.iter().all(|peer| ids(&peer.device_id)))
    {
        return fault("an id must have 16 bytes");
    }
    if request.leases.as_ref().is_some_and(|leases| !request.windows.is_empty() || !leases::is_well_formed(leases)) {
        return fault("leases must be well-formed and come without windows");
    }
    Ok(())
}

/// Enters a report in one transaction.
pub(super) async fn enter(app: &App, server: ServerId, request: ReportRequest) -> Result<ReportResponse, DbError> {
    note_nacks(server, &request);
    let received_at = app.clock.now();
    let mut tx = Tx::begin(&app.db.sys).await?;
    let work = async {
        let entered = usage::ingest(&mut tx, server, &request.windows, received_at).await?;
        usage::drops::enter(&mut tx, server, &request.drops, received_at).await?;
        let leases = match &request.leases {
            // another agent's counters are others
            Some(asked) if is_current(&mut tx, server, request.session_epoch).await? => {
                leases::lease(&mut tx, server, asked, received_at).await?
            }
            Some(_) | None => Vec::new(),
        };
        let state = apply_claim(&mut tx, server, &request).await?;
        Ok::<_, DbError>((entered, leases, state))
    }
    .await;
    let (entered, leases, claim) = tx.finish(work).await?;
    if entered.implausible > 0 {
        metrics::node_alarm("implausible_counter");
        tracing::error!(%server, values = entered.implausible, "a server has reported counters no server can have");
    }
    if entered.orphan_bytes > 0 {
        tracing::warn!(%server, bytes = entered.orphan_bytes, "a server has reported bytes of unknown devices");
    }
    metrics::billed(entered.bytes, entered.orphan_bytes);
    match claim {
        Claim::Accepted { revision: Some(revision) } => app.nodes.note_acked(server, revision),
        Claim::Accepted { revision: None } | Claim::Superseded => {}
        Claim::Diverged => {
            metrics::node_alarm("digest_mismatch");
            tracing::error!(%server, "a server runs something else than its revision says; it gets a snapshot");
        }
    }
    let acked = request
        .windows
        .iter()
        .map(|window| AckedWindow { counter_epoch: window.counter_epoch.clone(), sequence: window.sequence });
    Ok(ReportResponse {
        acked: acked.collect(),
        superseded: claim == Claim::Superseded,
        // an agent that has refused a change has not got it: what came after builds on nothing. Whether a snapshot helps
        // or not, the agent asks for it at its own back-off's pace.
        snapshot_wanted: match claim {
            Claim::Diverged => true,
            Claim::Accepted { .. } => !request.nacks.is_empty(),
            Claim::Superseded => false,
        },
        leases,
    })
}

fn note_nacks(server: ServerId, request: &ReportRequest) {
    for nack in &request.nacks {
        metrics::node_alarm("nack");
        let revision = nack.target.as_ref().map_or(0, |target| target.revision);
        let reason: String = nack.reason.chars().filter(|c| !is_misleading(*c)).take(200).collect();
        tracing::error!(%server, revision, reason, "a server has refused a state");
    }
}

async fn is_current(tx: &mut Tx, server: ServerId, session_epoch: u64) -> Result<bool, DbError> {
    let current = sqlx::query_scalar!("select session_epoch from platform.servers where server_id = $1", server.uuid())
        .fetch_one(tx.conn())
        .await?;
    Ok(u64::try_from(current).ok() == Some(session_epoch))
}

/// What became of what the agent says it runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    Accepted {
        revision: Option<u64>,
    },
    /// A newer session exists; facts (usage) were entered, claims were not.
    Superseded,
    /// The same revision with another digest, or a revision that does not exist.
    Diverged,
}

/// Last statements of the transaction: they lock the server's row.
async fn apply_claim(tx: &mut Tx, server: ServerId, request: &ReportRequest) -> Result<Claim, DbError> {
    let row = sqlx::query!(
        r#"select s.session_epoch, s.revision, s.acked_revision, s.acked_session, s.digest::text as "digest!", i.incarnation
           from platform.servers s cross join platform.installation i
           where s.server_id = $1 for no key update of s"#,
        server.uuid()
    )
    .fetch_one(tx.conn())
    .await?;
    if u64::try_from(row.session_epoch).ok() != Some(request.session_epoch) {
        return Ok(Claim::Superseded);
    }
    let applied = request.applied.as_ref().and_then(Position::from_wire);
    // another history says nothing about this one
    let applied = applied.filter(|applied| applied.incarnation == row.incarnation);
    let revision = u64::try_from(row.revision).unwrap_or_default();
    let digest = row.digest.parse::<u128>().ok().and_then(|value| Digest::from_bytes(&value.to_be_bytes()));
    let diverged = applied.is_some_and(|applied| {
        applied.revision > revision || (applied.revision == revision && Some(applied.digest) != digest)
    });
    let known = u64::try_from(row.acked_revision).unwrap_or_default();
    // a report that was overtaken by a later one of its session says nothing new; a new session begins with what it has
    let late = |applied: &Position| row.acked_session == Some(row.session_epoch) && applied.revision < known;
    let accepted = applied.filter(|applied| !diverged && !late(applied));
    sqlx::query!(
        "update platform.servers
         set last_seen_at = now(), health = coalesce($2, health),
             acked_revision = coalesce($3, acked_revision), acked_digest = coalesce($4::text::numeric, acked_digest),
             acked_session = case when $3::bigint is null then acked_session else session_epoch end,
             acked_at = case when $3 <> acked_revision then now() else acked_at end
         where server_id = $1",
        server.uuid(),
        request.health.as_ref().map(health),
        accepted.and_then(|applied| i64::try_from(applied.revision).ok()),
        accepted.map(|applied| u128::from_be_bytes(applied.digest.to_bytes()).to_string()),
    )
    .execute(tx.conn())
    .await?;
    Ok(if diverged { Claim::Diverged } else { Claim::Accepted { revision: accepted.map(|applied| applied.revision) } })
}

/// What administrators see of a server's health; bounded, whatever an agent sends.
fn health(health: &Health) -> serde_json::Value {
    let clean = |text: &str| text.chars().filter(|c| c.is_ascii_graphic()).take(64).collect::<String>();
    let drops: serde_json::Map<_, _> =
        health.drops.iter().take(MAX_DROP_REASONS).map(|(reason, count)| (clean(reason), json!(count))).collect();
    json!({
        "uptime_ms": health.uptime_ms,
        "load_permille": health.load_permille,
        "handshakes": health.handshakes,
        "drops": drops,
        "agent_version": clean(&health.agent_version),
        "tunnel_restarts": health.tunnel_restarts,
        "spool_bytes": health.spool_bytes,
    })
}
