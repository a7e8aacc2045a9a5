//! What is noted, what is dropped, and what becomes of it when the database is away.

use super::*;
use crate::testing::World;

fn entry(tenant: TenantId, status: u16) -> Entry {
    Entry {
        tenant,
        id: RequestId::from_uuid(Uuid::now_v7()),
        method: Method::GET,
        route: "/api/v1/devices/{device_id}".into(),
        status: StatusCode::from_u16(status).unwrap(),
        code: (status == 429).then_some(ErrorCode::RateLimited),
        took: Duration::from_micros(1_500),
        api_key: ApiKeyId::from_uuid(Uuid::now_v7()),
        user: None,
        client: Some("2001:db8::7".parse().unwrap()),
    }
}

fn waiting(log: &RequestLog) -> usize {
    log.pending.lock().unwrap().entries.len()
}

#[test]
fn a_busy_tenant_leaves_room_for_the_others_and_all_of_them_have_their_bound() {
    let log = RequestLog::default();
    let busy = TenantId::from_uuid(Uuid::now_v7());
    for _ in 0..100 {
        log.note(entry(busy, 429));
    }
    assert_eq!(waiting(&log), 10);
    for _ in 0..1_000 {
        log.note(entry(busy, 200));
    }
    assert_eq!(waiting(&log), 500);
    for _ in 0..10_000 {
        log.note(entry(TenantId::from_uuid(Uuid::now_v7()), 200));
    }
    assert_eq!(waiting(&log), OF_ALL);
}

#[tokio::test]
async fn what_was_noted_is_written_once_and_kept_while_the_database_is_away() {
    let world = World::new().await;
    let person = world.person().await;
    let (log, sys) = (RequestLog::default(), &world.app.db.sys);
    log.note(entry(person.tenant, 200));
    // of a tenant that is not there any more
    log.note(entry(TenantId::from_uuid(Uuid::now_v7()), 200));
    assert_eq!(log.flush(sys).await.unwrap(), 1);
    assert_eq!(log.flush(sys).await.unwrap(), 0);

    log.note(entry(person.tenant, 503));
    let nowhere = sqlx::postgres::PgPoolOptions::new()
        .acquire_timeout(Duration::from_millis(100))
        .connect_lazy("postgres://nobody@127.0.0.1:1/nothing")
        .unwrap();
    let refused = log.flush(&nowhere).await.unwrap_err();
    assert!(matches!(refused, DbError::Unavailable(_)), "{refused:?}");
    log.note(entry(person.tenant, 200));
    assert_eq!(log.flush(sys).await.unwrap(), 2);

    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let found = list(&mut tx, &Wanted::default(), None, 10).await.unwrap();
    tx.commit().await.unwrap();
    let statuses: Vec<_> = found.entries.iter().map(|entry| entry.status).collect();
    assert_eq!((statuses, found.next), (vec![200, 503, 200], None), "newest first");
    let first = &found.entries[2];
    assert!((first.duration_ms - 1.5).abs() < 1e-9 && first.client_ip.as_deref() == Some("2001:db8::7"), "{first:?}");
    assert!((world.app.clock.now() - first.at).whole_seconds() < 60, "{first:?}");
}

#[tokio::test]
async fn a_search_that_finds_nothing_ends_and_says_where_to_go_on() {
    let world = World::new().await;
    let person = world.person().await;
    sqlx::query(
        "insert into cvault.request_logs (tenant_id, request_id, at, method, route, status, duration_us, api_key_id)
         select $1, ('0193510b-d3e8-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, now(), 'GET', '/',
                case n when 1 then 500 else 200 end, 1, gen_random_uuid() from generate_series(1, 20005) n",
    )
    .bind(person.tenant.uuid())
    .execute(&mut world.superuser().await)
    .await
    .unwrap();
    let wanted = Wanted { statuses: Some((500, 599)), ..Wanted::default() };
    let mut tx = world.app.db.tenancy.begin(person.tenant).await.unwrap();
    let first = list(&mut tx, &wanted, None, 10).await.unwrap();
    assert!(first.entries.is_empty() && first.next.is_some());
    let second = list(&mut tx, &wanted, first.next, 10).await.unwrap();
    assert_eq!((second.entries.len(), second.next), (1, None));
    tx.rollback().await.unwrap();
}
