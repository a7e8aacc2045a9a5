//! What is past use goes, what is not stays, and nothing is billed twice or lost.

use cvault_node_protocol::v1::{PeerUsage, UsageWindow};
use cvault_types::{DeviceId, ServerId};
use uuid::Uuid;

use super::*;
use crate::testing::World;
use crate::usage;

const EARLIER: u128 = 1;
const NOW: u128 = 2;

async fn enter(
    world: &World,
    server: ServerId,
    epoch: u128,
    sequence: u64,
    device: DeviceId,
    generation: u64,
    bytes: u64,
) {
    let window = UsageWindow {
        counter_epoch: Uuid::from_u128(epoch).as_bytes().to_vec().into(),
        sequence,
        age_start_ms: 12_000,
        age_end_ms: 2_000,
        peers: vec![PeerUsage {
            device_id: device.uuid().as_bytes().to_vec().into(),
            generation,
            rx_bytes: bytes,
            tx_bytes: bytes,
            rx_packets: 1,
            tx_packets: 1,
            handshake_age_ms: u64::MAX,
        }],
    };
    let mut tx = Tx::begin(&world.app.db.sys).await.unwrap();
    usage::ingest(&mut tx, server, &[window], world.app.clock.now()).await.unwrap();
    tx.commit().await.unwrap();
}

async fn sql(world: &World, statement: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned())).execute(&mut world.superuser().await).await.unwrap();
}

async fn count(world: &World, what: &str) -> i64 {
    let statement = format!("select count(*) from {what}");
    sqlx::query_scalar(sqlx::AssertSqlSafe(statement)).fetch_one(&mut world.superuser().await).await.unwrap()
}

async fn ledger_adds_up(world: &World) {
    assert_eq!(usage::verify_ledger(&world.app.db.sys).await.unwrap().mismatches, 0);
}

#[tokio::test]
async fn counters_go_only_when_no_server_can_report_them_again() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let (stays, leaves) = (world.register(person, "a").await.unwrap(), world.register(person, "b").await.unwrap());
    enter(&world, server, EARLIER, 1, stays.id, stays.revision, 100).await;
    enter(&world, server, NOW, 1, stays.id, stays.revision, 1_000).await;
    enter(&world, server, NOW, 2, leaves.id, leaves.revision, 10_000).await;
    sql(&world, "update platform.usage_counters set updated_at = now() - interval '60 days'").await;
    let all = "platform.usage_counters";

    // nothing is known of when the server last spoke
    sql(&world, "create table public.kept as select * from platform.usage_windows; truncate platform.usage_windows")
        .await;
    trim(&world.app).await.unwrap();
    assert_eq!(count(&world, all).await, 3, "the server is silent");

    // it speaks, under the present epoch: the earlier one is over
    sql(&world, "insert into platform.usage_windows select * from public.kept where sequence = 2").await;
    trim(&world.app).await.unwrap();
    assert_eq!(count(&world, all).await, 2);
    ledger_adds_up(&world).await;

    // a device that was removed may still have something told of it, until its server has acknowledged
    world.revoke(person, leaves.id).await;
    trim(&world.app).await.unwrap();
    assert_eq!(count(&world, all).await, 2);
    sql(&world, "update platform.servers set acked_revision = revision").await;
    trim(&world.app).await.unwrap();
    assert_eq!(count(&world, all).await, 1);
    ledger_adds_up(&world).await;

    // what stays is billed from where it was
    enter(&world, server, NOW, 3, stays.id, stays.revision, 1_500).await;
    ledger_adds_up(&world).await;
    let billed: i64 = sqlx::query_scalar("select sum(rx_bytes)::bigint from cvault.usage_hourly")
        .fetch_one(&mut world.superuser().await)
        .await
        .unwrap();
    assert_eq!(billed, 100 + 1_500 + 10_000);
    // a second one of a device adds to the first
    sql(
        &world,
        "update platform.usage_counters set updated_at = now() - interval '60 days', counter_epoch = gen_random_uuid()",
    )
    .await;
    trim(&world.app).await.unwrap();
    assert_eq!((count(&world, all).await, count(&world, "platform.usage_settled").await), (0, 2));
    ledger_adds_up(&world).await;
}

#[tokio::test]
async fn devices_and_sessions_go_in_time_and_leave_their_bytes() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let mut devices = Vec::new();
    for name in ["active", "lately", "long-ago", "not-acknowledged"] {
        devices.push(world.register(person, name).await.unwrap());
    }
    enter(&world, server, NOW, 1, devices[2].id, devices[2].revision, 500).await;
    for device in &devices {
        sql(
            &world,
            &format!(
                "insert into cvault.sessions (tenant_id, session_id, device_id, user_id, server_id, opened_by, status,
                                              connected_at, disconnected_at)
                 values ('{0}', gen_random_uuid(), '{1}', '{2}', '{3}', 'connect', 'disconnected',
                         now() - interval '500 days', now() - interval '450 days'),
                        ('{0}', gen_random_uuid(), '{1}', '{2}', '{3}', 'connect', 'disconnected',
                         now() - interval '500 days', now() - interval '300 days')",
                person.tenant.uuid(),
                device.id.uuid(),
                person.user.uuid(),
                server.uuid()
            ),
        )
        .await;
    }
    for device in &devices[1..3] {
        world.revoke(person, device.id).await;
    }
    sql(&world, "update platform.servers set acked_revision = revision").await;
    world.revoke(person, devices[3].id).await;
    sql(
        &world,
        &format!(
            "update cvault.devices set revoked_at = now() - interval '500 days' where device_id in ('{}', '{}');
         update platform.addresses set state = 'free', released_device_id = null where state = 'quarantine'",
            devices[2].id.uuid(),
            devices[3].id.uuid()
        ),
    )
    .await;
    trim(&world.app).await.unwrap();
    assert_eq!(count(&world, "cvault.sessions").await, 4, "half of them is younger");
    assert_eq!(count(&world, "cvault.devices").await, 4, "sessions and counters refer to them");
    sql(
        &world,
        "update cvault.sessions set disconnected_at = now() - interval '450 days', status = 'disconnected';
                 update platform.usage_counters set updated_at = now() - interval '60 days'",
    )
    .await;
    trim(&world.app).await.unwrap();
    assert_eq!(count(&world, "cvault.sessions").await, 0);
    assert_eq!(count(&world, "cvault.devices where status = 'revoked'").await, 2);
    assert_eq!(count(&world, "cvault.devices").await, 3);
    assert_eq!(count(&world, &format!("platform.peers where device_id = '{}'", devices[2].id.uuid())).await, 0);
    assert_eq!(count(&world, "platform.peers").await, 3);
    assert_eq!(count(&world, "cvault.usage_hourly").await, 1);
    assert_eq!(count(&world, "cvault.audit_log where action = 'device.register'").await, 4);
    ledger_adds_up(&world).await;
}

#[tokio::test]
async fn what_is_in_use_cannot_be_deleted_even_by_a_faulty_statement() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let device = world.register(person, "d").await.unwrap();
    sql(
        &world,
        &format!(
            "insert into cvault.sessions (tenant_id, session_id, device_id, user_id, server_id, opened_by)
             values ('{}', gen_random_uuid(), '{}', '{}', '{}', 'connect')",
            person.tenant.uuid(),
            device.id.uuid(),
            person.user.uuid(),
            server.uuid()
        ),
    )
    .await;
    for statement in ["delete from cvault.sessions", "delete from cvault.devices"] {
        let done = sqlx::query(statement).execute(&world.app.db.sys).await.unwrap();
        assert_eq!(done.rows_affected(), 0, "{statement}");
    }
    let forgotten: i32 = sqlx::query_scalar("select platform.forget_peers(array[$1::uuid])")
        .bind(device.id.uuid())
        .fetch_one(&world.app.db.sys)
        .await
        .unwrap();
    assert_eq!(forgotten, 0);
    assert!(sqlx::query("delete from platform.peers").execute(&world.app.db.sys).await.is_err());
}

#[tokio::test]
async fn more_than_a_batch_of_old_events_and_mails_goes_and_one_replica_does_it() {
    let world = World::new().await;
    let person = world.person().await;
    let tenant = person.tenant.uuid();
    sql(
        &world,
        &format!(
            "insert into cvault.auth_events (tenant_id, event_id, at, kind, outcome)
             select '{tenant}', gen_random_uuid(), now() - make_interval(days => 89 + n % 2 * 2), 'login', 'failure'
             from generate_series(1, 5000) as n;
             insert into cvault.outbox (tenant_id, mail_id, kind, created_at, expires_at, delivered_at, dead_at)
             values ('{tenant}', gen_random_uuid(), 'verify_email', now() - interval '40 days', now(), now(), null),
                    ('{tenant}', gen_random_uuid(), 'verify_email', now() - interval '40 days', now(), null, now()),
                    ('{tenant}', gen_random_uuid(), 'verify_email', now() - interval '40 days', now(), null, null),
                    ('{tenant}', gen_random_uuid(), 'verify_email', now() - interval '20 days', now(), now(), null);
             insert into cvault.idempotency_keys (tenant_id, principal, key, fingerprint, created_at)
             values ('{tenant}', 'p', 'old', '', now() - interval '25 hours'), ('{tenant}', 'p', 'new', '', now())"
        ),
    )
    .await;
    let mut other = world.superuser().await;
    sqlx::raw_sql("select pg_advisory_lock(731992416)").execute(&mut other).await.unwrap();
    assert_eq!(trim(&world.app).await.unwrap(), 0, "another replica trims");
    sqlx::raw_sql("select pg_advisory_unlock(731992416)").execute(&mut other).await.unwrap();
    assert_eq!(trim(&world.app).await.unwrap(), 2_500 + 2 + 1);
    assert_eq!(count(&world, "cvault.auth_events").await, 2_500);
    assert_eq!((count(&world, "cvault.outbox").await, count(&world, "cvault.idempotency_keys").await), (2, 1));
}

#[tokio::test]
async fn what_no_longer_means_anything_goes_and_the_ledger_still_adds_up() {
    let (world, server) = World::with_server().await;
    let person = world.person().await;
    let (stays, leaves) = (world.register(person, "a").await.unwrap(), world.register(person, "b").await.unwrap());
    let nobody = DeviceId::from_uuid(Uuid::now_v7());
    enter(&world, server, NOW, 1, stays.id, stays.revision, 100).await;
    enter(&world, server, EARLIER, 1, nobody, 1, 1_000).await;
    ledger_adds_up(&world).await;
    world.revoke(person, leaves.id).await;
    let (tenant, server) = (person.tenant.uuid(), server.uuid());
    let drops = |device: DeviceId, days: u32| {
        format!("('{server}', '{}', 1, '{{}}', now() - interval '{days} days')", device.uuid())
    };
    sql(
        &world,
        &format!(
            "insert into platform.device_drops (server_id, device_id, generation, drops, reported_at)
             values {}, {}, {};
             insert into platform.enrol_tokens (token_id, server_id, secret_hash, expires_at)
             select gen_random_uuid(), '{server}', decode(repeat('00', 32), 'hex'), now() - make_interval(days => age)
             from unnest(array[-1, 29, 31]) as age;
             insert into cvault.api_keys (tenant_id, api_key_id, key_text, secret_hash, created_at, revoked_at)
             values ('{tenant}', gen_random_uuid(), 'cvk_1', decode(repeat('00', 32), 'hex'), now(), null),
                    ('{tenant}', gen_random_uuid(), 'cvk_2', decode(repeat('00', 32), 'hex'), now(), now() - interval '300 days'),
                    ('{tenant}', gen_random_uuid(), 'cvk_3', decode(repeat('00', 32), 'hex'), now(), now() - interval '500 days');
             update platform.usage_orphans set hour = hour - interval '500 days'",
            drops(stays.id, 300),
            drops(leaves.id, 300),
            drops(nobody, 1)
        ),
    )
    .await;
    trim(&world.app).await.unwrap();
    assert_eq!(count(&world, "platform.device_drops").await, 2);
    assert_eq!(count(&world, "platform.enrol_tokens").await, 2);
    assert_eq!(count(&world, "cvault.api_keys").await, 2);
    assert_eq!(count(&world, "platform.usage_orphans").await, 1, "its counters may be reported again");
    sql(&world, "update platform.usage_counters set updated_at = now() - interval '60 days'").await;
    trim(&world.app).await.unwrap();
    trim(&world.app).await.unwrap();
    assert_eq!(count(&world, "platform.usage_orphans").await, 0);
    assert_eq!(count(&world, "platform.usage_settled").await, 0);
    ledger_adds_up(&world).await;
    let spared = sqlx::query("delete from cvault.api_keys where revoked_at is null").execute(&world.app.db.sys).await;
    assert_eq!(spared.unwrap().rows_affected(), 0, "a key in use stays, whatever a statement says");
}

#[tokio::test]
async fn what_was_asked_is_forgotten_in_time_and_at_once_of_a_tenant_that_is_deleted() {
    let world = World::new().await;
    let (person, gone) = (world.person().await, world.person().await);
    for tenant in [person.tenant.uuid(), gone.tenant.uuid()] {
        sql(
            &world,
            &format!(
                "insert into cvault.request_logs (tenant_id, request_id, at, method, route, status, duration_us, api_key_id)
                 select '{tenant}', rpad(lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0'), 32, '7')::uuid, at,
                        'GET', '/', 200, 1, gen_random_uuid()
                 from generate_series(now() - interval '9.5 days', now(), interval '1 day') at"
            ),
        )
        .await;
    }
    assert_eq!(trim(&world.app).await.unwrap(), 2 * 3);
    assert_eq!(count(&world, "cvault.request_logs where at < now() - interval '7 days'").await, 0);
    sql(
        &world,
        &format!(
            "update cvault.tenants set status = 'deleted', data_key_sealed = null where tenant_id = '{}'",
            gone.tenant.uuid()
        ),
    )
    .await;
    assert_eq!(trim(&world.app).await.unwrap(), 7);
    assert_eq!(count(&world, "cvault.request_logs").await, 7);
}
