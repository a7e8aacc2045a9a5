//! The ledger against a real database: nothing twice, nothing lost, nothing billed to the wrong tenant.

use cvault_node_protocol::v1::{PeerUsage, UsageWindow};
use cvault_types::{DeviceId, ServerId};
use futures::future::join_all;
use rand::seq::SliceRandom as _;
use time::Duration;
use uuid::Uuid;

use super::*;
use crate::db::Tx;
use crate::sessions;
use crate::testing::{Person, World};

const EPOCH: Uuid = Uuid::from_u128(77);

fn window(sequence: u64, device: DeviceId, generation: u64, rx: u64, tx: u64) -> UsageWindow {
    UsageWindow {
        counter_epoch: EPOCH.as_bytes().to_vec().into(),
        sequence,
        age_start_ms: 12_000,
        age_end_ms: 2_000,
        peers: vec![PeerUsage {
            device_id: device.uuid().as_bytes().to_vec().into(),
            generation,
            rx_bytes: rx,
            tx_bytes: tx,
            rx_packets: rx / 100,
            tx_packets: tx / 100,
            handshake_age_ms: 5_000,
        }],
    }
}

async fn enter(world: &World, server: ServerId, windows: &[UsageWindow]) -> Ingested {
    let mut tx = Tx::begin(&world.app.db.sys).await.unwrap();
    let done = ingest(&mut tx, server, windows, world.app.clock.now()).await.unwrap();
    tx.commit().await.unwrap();
    done
}

async fn billed(world: &World, person: Person) -> Totals {
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let period =
        Period { from: world.app.clock.now() - Duration::hours(3), to: world.app.clock.now() + Duration::hours(1) };
    let Report { totals, days, .. } = report(&mut tx, period).await.unwrap();
    assert_eq!(days.iter().map(|day| day.rx_bytes).sum::<i64>(), totals.rx_bytes);
    assert_eq!(days.iter().map(|day| day.tx_bytes).sum::<i64>(), totals.tx_bytes);
    tx.commit().await.unwrap();
    totals
}

#[tokio::test]
async fn windows_in_any_order_and_any_number_of_times_bill_the_greatest_value_once() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    let mut windows: Vec<_> =
        (1..=30u64).map(|n| window(n, device.id, device.revision, n * 1_000, n * 10_000)).collect();
    windows.extend(windows.clone());
    windows.shuffle(&mut rand::rng());
    // some reports are rolled back after they were entered: their acknowledgement never leaves
    let mut lost = Tx::begin(&world.app.db.sys).await.unwrap();
    ingest(&mut lost, server, &windows[..10], world.app.clock.now()).await.unwrap();
    drop(lost);
    for chunk in windows.chunks(7) {
        enter(&world, server, chunk).await;
        enter(&world, server, chunk).await;
    }
    let totals = billed(&world, person).await;
    assert_eq!((totals.rx_bytes, totals.tx_bytes), (30_000, 300_000));
    assert_eq!((totals.active_users, totals.active_devices), (1, 1));
    assert_eq!(verify_ledger(&world.app.db.sys).await.unwrap(), Verified { checked: 1, mismatches: 0 });
    let mut superuser = world.superuser().await;
    sqlx::query("update cvault.usage_hourly set rx_bytes = rx_bytes + 1").execute(&mut superuser).await.unwrap();
    assert_eq!(verify_ledger(&world.app.db.sys).await.unwrap(), Verified { checked: 1, mismatches: 1 });
}

#[tokio::test]
async fn users_who_ask_together_are_told_their_own_and_nobody_elses() {
    let (world, server) = World::with_server().await;
    let (first, stranger) = (world.person().await, world.person().await);
    let mut people = vec![first];
    for number in 1..5 {
        people.push(world.user(first.tenant, &format!("{number}@example.com")).await);
    }
    // the last one has no device
    for (number, person) in (1..).zip(&people[..4]) {
        let device = world.register(*person, "d").await.unwrap();
        enter(&world, server, &[window(number, device.id, device.revision, number * 1_000, number)]).await;
    }
    let now = world.app.clock.now();
    let long = Period { from: now - Duration::hours(3), to: now + Duration::hours(1) };
    let before = Period { from: now - Duration::hours(9), to: now - Duration::hours(8) };
    let (reports, tenancy) = (Reports::default(), &world.app.db.tenancy);
    let asked = people.iter().flat_map(|person| [(person, long), (person, before)]);
    let asked = asked.map(|(person, period)| reports.of_user(tenancy, person.tenant, person.user, period));
    let told: Vec<Report> = join_all(asked).await.into_iter().map(Result::unwrap).collect();
    for (number, told) in told.chunks(2).enumerate() {
        let rx = if number < 4 { (number as i64 + 1) * 1_000 } else { 0 };
        assert_eq!((told[0].totals.rx_bytes, told[0].days.iter().map(|day| day.rx_bytes).sum()), (rx, rx));
        assert_eq!(told[0].totals.active_devices, i64::from(rx > 0));
        assert_eq!((told[1].totals, told[1].days.as_slice()), (Totals::default(), [].as_slice()));
        assert_eq!(told[0].limits.devices_per_user, 1000);
    }
    assert_eq!(billed(&world, first).await.rx_bytes, 10_000, "all of the tenant's");
    let foreign = reports.of_user(tenancy, stranger.tenant, first.user, long).await.unwrap();
    assert_eq!(foreign.totals, Totals::default());
}

#[tokio::test]
async fn a_restored_database_heals_itself_from_cumulative_values() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    enter(&world, server, &[window(1, device.id, 1, 500, 50), window(2, device.id, 1, 900, 90)]).await;
    // the state of an older backup
    let mut superuser = world.superuser().await;
    sqlx::raw_sql("truncate platform.usage_windows, platform.usage_counters, cvault.usage_hourly")
        .execute(&mut superuser)
        .await
        .unwrap();
    enter(&world, server, &[window(3, device.id, 1, 1_000, 100)]).await;
    let totals = billed(&world, person).await;
    assert_eq!((totals.rx_bytes, totals.tx_bytes), (1_000, 100));
}

#[tokio::test]
async fn a_server_cannot_bill_a_device_that_was_never_placed_on_it() {
    let (world, first) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    assert_eq!(device.server.id, first);
    let other = world.server("s2", "default", "lab-2").await;
    let done = enter(&world, other, &[window(1, device.id, 1, 4_000, 400)]).await;
    assert_eq!((done.bytes, done.orphan_bytes), (0, 4_400));
    let unknown = DeviceId::from_uuid(Uuid::now_v7());
    enter(&world, first, &[window(1, unknown, 1, 7, 7)]).await;
    assert_eq!(billed(&world, person).await, Totals::default());
    assert_eq!(verify_ledger(&world.app.db.sys).await.unwrap(), Verified { checked: 2, mismatches: 0 });
}

#[tokio::test]
async fn impossible_counters_are_refused_and_the_others_are_entered() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    let done = enter(&world, server, &[window(1, device.id, 1, u64::MAX, 1), window(2, device.id, 1, 10, 1)]).await;
    assert_eq!((done.implausible, done.bytes), (1, 11));
}

#[tokio::test]
async fn bytes_counted_before_a_deletion_and_reported_after_it_are_billed() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    enter(&world, server, &[window(1, device.id, 1, 100, 0)]).await;
    world.revoke(person, device.id).await;
    enter(&world, server, &[window(2, device.id, 1, 150, 0)]).await;
    assert_eq!(billed(&world, person).await.rx_bytes, 150);
}

#[tokio::test]
async fn a_handshake_opens_a_session_silence_and_disconnect_close_it() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    enter(&world, server, &[window(1, device.id, 1, 1_000, 10)]).await;
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let open = sessions::open_sessions(&mut tx, person.user).await.unwrap();
    assert_eq!(open.len(), 1);
    assert_eq!((open[0].device, open[0].rx_bytes, open[0].tx_bytes), (device.id, 1_000, 10));
    let found = crate::devices::find(&mut tx, person.user, device.id).await.unwrap().unwrap();
    assert!(found.tunnel_up(world.app.clock.now()));
    // hanging up: the old handshake must not open the next session
    assert_eq!(sessions::close(&mut tx, device.id, world.app.clock.now()).await.unwrap(), Some(open[0].id));
    tx.commit().await.unwrap();
    enter(&world, server, &[window(2, device.id, 1, 1_100, 10)]).await;
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    assert!(sessions::open_sessions(&mut tx, person.user).await.unwrap().is_empty());
    tx.commit().await.unwrap();

    let mut superuser = world.superuser().await;
    let age =
        "update cvault.sessions set status = 'active', disconnected_at = null, connected_at = now() - interval '5 min',
                      last_handshake_at = now() - interval '4 min'";
    sqlx::query(age).execute(&mut superuser).await.unwrap();
    assert_eq!(sessions::close_silent(&world.app.db.sys).await.unwrap(), 1);
    let seconds: i32 = sqlx::query_scalar(
        "select extract(epoch from disconnected_at - last_handshake_at)::integer from cvault.sessions",
    )
    .fetch_one(&mut superuser)
    .await
    .unwrap();
    assert_eq!(seconds, 180);
}

#[tokio::test]
async fn the_daily_table_says_what_the_hours_say() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    enter(&world, server, &[window(1, device.id, 1, 1_000, 10)]).await;
    refresh_daily(&world.app.db.sys).await.unwrap();
    refresh_daily(&world.app.db.sys).await.unwrap();
    let mut superuser = world.superuser().await;
    let (rx, tx): (i64, i64) =
        sqlx::query_as("select sum(rx_bytes)::bigint, sum(tx_bytes)::bigint from cvault.usage_daily")
            .fetch_one(&mut superuser)
            .await
            .unwrap();
    assert_eq!((rx, tx), (1_000, 10));
}

#[tokio::test]
async fn the_audit_chain_holds_until_a_row_is_changed() {
    let (world, _) = World::with_server().await;
    let person = world.person().await;
    for number in 0..5 {
        world.register(person, &format!("d{number}")).await.unwrap();
    }
    let mut superuser = world.superuser().await;
    sqlx::query("update cvault.audit_log set at = at - interval '1 minute'").execute(&mut superuser).await.unwrap();
    assert_eq!(crate::audit::chain_new(&world.app.db.sys).await.unwrap(), 5);
    assert_eq!(crate::audit::chain_new(&world.app.db.sys).await.unwrap(), 0);
    let tenant = person.tenant.uuid();
    assert_eq!(crate::audit::verify_chain(&world.app.db.sys, tenant).await.unwrap(), None);
    sqlx::query("update cvault.audit_log set actor = 'somebody else' where chain_sequence = 3")
        .execute(&mut superuser)
        .await
        .unwrap();
    let broken = crate::audit::verify_chain(&world.app.db.sys, tenant).await.unwrap();
    assert_eq!(broken, Some(crate::audit::Broken { sequence: 3 }));
}

#[tokio::test]
async fn growth_that_no_line_could_have_carried_is_refused_and_what_follows_is_entered() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    enter(&world, server, &[window(1, device.id, 1, 100, 10)]).await;
    // a flipped bit: 2^50 bytes within ten seconds
    let done = enter(&world, server, &[window(2, device.id, 1, 1 << 50, 10)]).await;
    assert_eq!((done.implausible, done.bytes), (1, 0));
    let done = enter(&world, server, &[window(3, device.id, 1, 200, 10)]).await;
    assert_eq!((done.implausible, done.bytes), (0, 100));
    // as many of the greatest that are believed as a report can hold: the sum is no fault
    let mut superuser = world.superuser().await;
    sqlx::query("update cvault.devices set created_at = '1990-01-01'").execute(&mut superuser).await.unwrap();
    let mut greatest = window(4, device.id, 1, 1 << 60, 1 << 60);
    greatest.peers = (2..40).map(|generation| PeerUsage { generation, ..greatest.peers[0].clone() }).collect();
    let mut tx = Tx::begin(&world.app.db.sys).await.unwrap();
    let done = ingest(&mut tx, server, &[greatest], world.app.clock.now()).await.unwrap();
    assert_eq!((done.implausible, done.bytes), (0, u64::MAX));
    drop(tx);
    // two months of a quick line while the control plane was away
    sqlx::query("update platform.usage_counters set updated_at = now() - interval '60 days'")
        .execute(&mut superuser)
        .await
        .unwrap();
    let done = enter(&world, server, &[window(5, device.id, 1, 1 << 50, 10)]).await;
    assert_eq!(done.implausible, 0);
}

#[tokio::test]
async fn the_daily_sums_count_sessions_that_are_open_and_not_those_of_other_days() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let (one, other) = (world.register(person, "a").await.unwrap(), world.register(person, "b").await.unwrap());
    let mut superuser = world.superuser().await;
    for (device, connected, disconnected) in [
        (one.id, "- interval '1 hour'", None),
        (other.id, "- interval '1 hour'", Some("- interval '10 minutes'")),
        (other.id, "- interval '40 days'", Some("- interval '39 days'")),
    ] {
        let ended = disconnected.map_or("null".to_owned(), |ended| format!("now() {ended}"));
        let status = if disconnected.is_some() { "disconnected" } else { "active" };
        let sql = format!(
            "insert into cvault.sessions (tenant_id, session_id, device_id, user_id, server_id, opened_by, status,
                                          connected_at, disconnected_at)
             values ('{}', gen_random_uuid(), '{}', '{}', '{}', 'connect', '{status}', now() {connected}, {ended})",
            person.tenant.uuid(),
            device.uuid(),
            person.user.uuid(),
            server.uuid()
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut superuser).await.unwrap();
    }
    refresh_week(&world.app.db.sys).await.unwrap();
    refresh_daily(&world.app.db.sys).await.unwrap();
    let seconds: i64 = sqlx::query_scalar("select sum(connection_seconds)::bigint from cvault.usage_daily")
        .fetch_one(&mut superuser)
        .await
        .unwrap();
    assert!((6_590..6_700).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn the_daily_sums_do_not_read_the_whole_past() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap().id;
    let mut superuser = world.superuser().await;
    let (t, d, u, s) = (person.tenant.uuid(), device.uuid(), person.user.uuid(), server.uuid());
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "insert into cvault.sessions (tenant_id, session_id, device_id, user_id, server_id, opened_by, status,
                                      connected_at, disconnected_at)
         select '{t}', gen_random_uuid(), '{d}', '{u}', '{s}', 'connect', 'disconnected',
                now() - interval '1 hour' * n, now() - interval '1 hour' * n
         from generate_series(100, 20000) as n;
         insert into cvault.usage_hourly
         select '{t}', date_trunc('hour', now()) - interval '1 hour' * n, '{d}', '{u}', '{s}', 1, 1
         from generate_series(100, 20000) as n;
         analyze cvault.sessions, cvault.usage_hourly"
    )))
    .execute(&mut superuser)
    .await
    .unwrap();
    let statement = format!("explain\n{}", include_str!("refresh_daily.sql").replace("$1", "1"));
    let plan: Vec<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(statement)).fetch_all(&mut superuser).await.unwrap();
    let plan = plan.join("\n");
    assert!(plan.contains("sessions_closed_at") && plan.contains("_hour_idx"), "{plan}");
    assert!(!plan.contains("Seq Scan on sessions") && !plan.contains("Seq Scan on usage_hourly"), "{plan}");
}
