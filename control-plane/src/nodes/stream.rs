//! One `Watch`: the desired state of one server, from what it has onwards, for as long as the stream lives.

use std::sync::Arc;
use std::time::Duration;

use cvault_node_protocol::v1::state_event::Event;
use cvault_node_protocol::v1::{
    Delta, GoAway, Hello, InterfaceConfig, Ping, SnapshotBegin, SnapshotChunk, SnapshotEnd, StateEvent,
};
use cvault_node_protocol::{MAX_CHUNK_PEERS, PROTOCOL};
use cvault_types::ServerId;
use ipnet::IpNet;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use uuid::Uuid;

use super::policies::Told;
use crate::app::App;
use crate::db::DbError;
use crate::desired::{self, DesiredError, Position, Update};
use crate::metrics;

/// How soon a change made by another replica, or a lost wake-up, is noticed.
const POLL: Duration = Duration::from_millis(300);
/// How many polls pass between comparisons of the tenants' policies: a change that another replica made waits so long.
const POLICY_POLLS: u32 = 7;
/// Lets the agent notice a dead control plane, and us a dead agent.
const PING: Duration = Duration::from_secs(15);
/// A reader that has not taken an update after this long is gone; it comes back with its cursor. A snapshot of a full
/// server is 10 MB.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// After a fault of ours, so that it does not spin.
const FAULT_PAUSE: Duration = Duration::from_secs(1);
/// How often an agent should report.
const REPORT_INTERVAL_MS: u32 = 2_000;
/// Agents of a control plane that restarts come back spread over this time.
const GO_AWAY_SPREAD_MS: u32 = 2_000;
/// WireGuard over IPv4 and IPv6 in a path of 1500 bytes.
const INTERFACE_MTU: u32 = 1420;

/// A watch that holds the server's fencing token.
pub(super) struct Session {
    server: ServerId,
    pub(super) epoch: i64,
    /// Another live agent has the identity of this server.
    pub(super) has_twin: bool,
    hello: Hello,
}

/// Takes the fencing token: claims of older sessions of this server are ignored from now on.
pub(super) async fn open(app: &App, server: ServerId, instance: Uuid) -> Result<Session, DbError> {
    let row = sqlx::query!(
        r#"update platform.servers s
           set session_epoch = s.session_epoch + 1, instance_id = $2, last_seen_at = now(),
               replaced_instance_id = case when s.instance_id <> $2 then s.instance_id else s.replaced_instance_id end
           from platform.address_pools p, platform.installation i, platform.servers old
           where s.server_id = $1 and p.pool_id = s.pool_id and old.server_id = s.server_id
           -- an instance id is drawn at each start: one that comes back was never gone
           returning coalesce(old.instance_id <> $2 and old.replaced_instance_id = $2, false) as "twin!",
                     s.session_epoch, s.digest_key, s.endpoint_port, p.ipv4::inet as "ipv4!: IpNet",
                     p.ipv6::inet as "ipv6!: IpNet", i.incarnation"#,
        server.uuid(),
        instance
    )
    .fetch_one(&app.db.sys)
    .await?;
    let own = |prefix: IpNet| {
        let first = prefix.hosts().find(|host| *host != prefix.network()).unwrap_or(prefix.addr());
        format!("{first}/{}", prefix.prefix_len())
    };
    let hello = Hello {
        incarnation: row.incarnation.as_bytes().to_vec().into(),
        session_epoch: u64::try_from(row.session_epoch).unwrap_or_default(),
        protocol: PROTOCOL,
        digest_key: row.digest_key.into(),
        interface: Some(InterfaceConfig {
            listen_port: u32::try_from(row.endpoint_port).expect("servers_endpoint_port"),
            addresses: vec![own(row.ipv4), own(row.ipv6)],
            overlay: vec![row.ipv4.to_string(), row.ipv6.to_string()],
            mtu: INTERFACE_MTU,
        }),
        report_interval_ms: REPORT_INTERVAL_MS,
    };
    Ok(Session { server, epoch: row.session_epoch, has_twin: row.twin, hello })
}

type Events = mpsc::Sender<Result<StateEvent, Status>>;

/// Why a stream has ended.
enum End {
    /// The agent is gone, or takes nothing.
    Reader,
    /// A newer session, a removed server, or our own shutdown.
    Superseded(&'static str),
}

/// Feeds the stream until its reader is gone, a newer session exists, or the process stops.
pub(super) async fn run(
    app: App,
    session: Session,
    have: Option<Position>,
    events: Events,
    snapshots: Arc<Semaphore>,
    shutdown: CancellationToken,
) {
    let server = session.server;
    let _watching = metrics::node_stream();
    let feed = feed(&app, session, have, &events, &snapshots);
    let end = tokio::select! {
        end = feed => end,
        () = shutdown.cancelled() => End::Superseded("the control plane is restarting"),
        () = events.closed() => End::Reader,
    };
    match end {
        End::Reader => tracing::debug!(%server, "an agent has left"),
        End::Superseded(reason) => {
            tracing::debug!(%server, reason, "a watch ends");
            let farewell = GoAway { spread_ms: GO_AWAY_SPREAD_MS, reason: reason.to_owned() };
            // whether it arrives or not, the stream ends
            let _ = events.try_send(Ok(StateEvent { event: Some(Event::GoAway(farewell)) }));
        }
    }
}

async fn feed(app: &App, session: Session, have: Option<Position>, events: &Events, snapshots: &Semaphore) -> End {
    let Session { server, epoch, hello, .. } = session;
    // subscribed before the first read: no change falls between
    let mut changes = app.nodes.changes(server);
    let mut policies = app.nodes.policies(server);
    let (mut told, mut policies_due, mut polls) = (Told::default(), true, 0_u32);
    let mut poll = interval(POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_sent = Instant::now();
    if send(events, Event::Hello(hello)).await.is_err() {
        return End::Reader;
    }
    let mut have = have;
    let mut stale = true;
    loop {
        if policies_due {
            policies.mark_unchanged();
            match tell_policies(app, server, &mut told, events).await {
                Ok(()) => policies_due = false,
                Err(Fault::Reader) => return End::Reader,
                Err(Fault::Desired(error)) => {
                    alarm(server, &error);
                    tokio::time::sleep(FAULT_PAUSE).await;
                    // peers come after their policies
                    continue;
                }
            }
        }
        if stale {
            changes.mark_unchanged();
            match bring_up_to_date(app, server, have, &mut told, events, snapshots).await {
                Ok(Some(now_has)) => {
                    (have, last_sent) = (Some(now_has), Instant::now());
                }
                Ok(None) => {}
                Err(Fault::Reader) => return End::Reader,
                Err(Fault::Desired(error)) => {
                    alarm(server, &error);
                    tokio::time::sleep(FAULT_PAUSE).await;
                }
            }
        }
        stale = tokio::select! {
            changed = changes.changed() => changed.is_ok(),
            changed = policies.changed() => {
                policies_due = changed.is_ok();
                false
            }
            _ = poll.tick() => match revision(app, server, epoch).await {
                Ok(Some(revision)) => {
                    polls = (polls + 1) % POLICY_POLLS;
                    policies_due = polls == 0;
                    have.is_none_or(|have| have.revision != revision)
                }
                Ok(None) => return End::Superseded("a newer session of this server exists, or it was removed"),
                // the poll after the next one may succeed
                Err(_) => false,
            },
        };
        if !stale && last_sent.elapsed() >= PING {
            if send(events, Event::Ping(Ping {})).await.is_err() {
                return End::Reader;
            }
            last_sent = Instant::now();
        }
    }
}

enum Fault {
    Reader,
    Desired(DesiredError),
}

impl From<DbError> for Fault {
    fn from(error: DbError) -> Self {
        Self::Desired(error.into())
    }
}

async fn tell_policies(app: &App, server: ServerId, told: &mut Told, events: &Events) -> Result<(), Fault> {
    for event in told.refresh(&app.db.sys, server).await? {
        send(events, event).await?;
    }
    Ok(())
}

fn alarm(server: ServerId, error: &DesiredError) {
    match error {
        DesiredError::Inconsistent { .. } | DesiredError::Unreadable(_) | DesiredError::NoSuchServer => {
            metrics::node_alarm("desired_inconsistent");
            tracing::error!(%server, error = crate::http::problem::chain(error), "nothing was sent to a server");
        }
        DesiredError::Db(_) => {
            tracing::warn!(%server, error = crate::http::problem::chain(error), "desired state cannot be read");
        }
    }
}

/// The revision, if the session still holds the token.
async fn revision(app: &App, server: ServerId, epoch: i64) -> Result<Option<u64>, DbError> {
    let revision = sqlx::query_scalar!(
        "select revision from platform.servers where server_id = $1 and session_epoch = $2 and status <> 'removed'",
        server.uuid(),
        epoch
    )
    .fetch_optional(&app.db.sys)
    .await?;
    Ok(revision.map(|revision| u64::try_from(revision).unwrap_or_default()))
}

/// Sends what is missing; returns the position the agent has after it, `None` when nothing was missing.
async fn bring_up_to_date(
    app: &App,
    server: ServerId,
    have: Option<Position>,
    told: &mut Told,
    events: &Events,
    snapshots: &Semaphore,
) -> Result<Option<Position>, Fault> {
    let (sys, keys) = (&app.db.sys, &app.keys);
    if let Some(update) = desired::read_changes(sys, keys, server, have).await.map_err(Fault::Desired)? {
        for event in told.before(sys, &update).await? {
            send(events, event).await?;
        }
        return send_update(events, update, SEND_TIMEOUT).await;
    }
    // whatever the reason, after a restored database that of every agent at once: snapshots take turns
    let _turn = snapshots.acquire().await.expect("the semaphore is never closed");
    let update = desired::read_snapshot(sys, keys, server, have).await.map_err(Fault::Desired)?;
    for event in told.before(sys, &update).await? {
        send(events, event).await?;
    }
    send_update(events, update, SEND_TIMEOUT).await
}

/// Returns the position the agent has after it, `None` when nothing was missing.
async fn send_update(events: &Events, update: Update, within: Duration) -> Result<Option<Position>, Fault> {
    let all = send_messages(events, update);
    // for all of it: a reader that sips must not hold a snapshot, and the turn of the others, for an hour
    tokio::time::timeout(within, all).await.unwrap_or(Err(Fault::Reader))
}

async fn send_messages(events: &Events, update: Update) -> Result<Option<Position>, Fault> {
    match update {
        Update::Nothing => Ok(None),
        Update::Delta { from_revision, target, peer_count, removed, upserted } => {
            let expected_removed = u32::try_from(removed.len()).unwrap_or(u32::MAX);
            let delta = Delta {
                from_revision,
                target: Some(target.to_wire()),
                peer_count,
                removed: removed.into_iter().map(Into::into).collect(),
                upserted,
                expected_removed,
            };
            send(events, Event::Delta(delta)).await?;
            Ok(Some(target))
        }
        Update::Snapshot { target, mut peers, expected_removed } => {
            let peer_count = u32::try_from(peers.len()).unwrap_or(u32::MAX);
            let begin = SnapshotBegin { target: Some(target.to_wire()), peer_count };
            send(events, Event::SnapshotBegin(begin)).await?;
            while !peers.is_empty() {
                let rest = peers.split_off(peers.len().min(MAX_CHUNK_PEERS));
                send(events, Event::SnapshotChunk(SnapshotChunk { peers })).await?;
                peers = rest;
            }
            send(events, Event::SnapshotEnd(SnapshotEnd { expected_removed })).await?;
            Ok(Some(target))
        }
    }
}

async fn send(events: &Events, event: Event) -> Result<(), Fault> {
    match tokio::time::timeout(SEND_TIMEOUT, events.send(Ok(StateEvent { event: Some(event) }))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Fault::Reader),
    }
}

#[cfg(test)]
mod tests {
    use cvault_node_protocol::digest::Digest;
    use cvault_node_protocol::v1::Peer;

    use super::*;

    #[tokio::test]
    async fn a_reader_that_sips_has_as_long_for_a_snapshot_as_for_a_message() {
        let (events, mut reader) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut sips = interval(Duration::from_millis(50));
            loop {
                sips.tick().await;
                if reader.recv().await.is_none() {
                    return;
                }
            }
        });
        let target = Position { incarnation: Uuid::nil(), revision: 1, digest: Digest::default() };
        let peers = vec![Peer::default(); 50 * MAX_CHUNK_PEERS];
        let update = Update::Snapshot { target, peers, expected_removed: 0 };
        let sent = send_update(&events, update, Duration::from_millis(300)).await;
        assert!(matches!(sent, Err(Fault::Reader)));
    }
}
