//! Usage as CSV.

use crate::platform::{Call, Platform, Tenant};
use crate::scene::{Person, with_server};
use cvault_types::{DeviceId, TenantId, UserId};
use serde_json::Value;

const HEAD: &str = "date,user_id,email,external_user_id,device_id,device_name,rx_bytes,tx_bytes,connection_seconds";

/// As the ledger writes it.
async fn carried(platform: &Platform, tenant: &Tenant, device: DeviceId, user: UserId, hour: &str) {
    let tenant: TenantId = tenant.id.parse().unwrap();
    sqlx::query(
        "insert into cvault.usage_hourly (tenant_id, hour, user_id, device_id, server_id, rx_bytes, tx_bytes)
         select $1, $2::timestamptz, $3, $4, server_id, 10, 20 from platform.servers limit 1",
    )
    .bind(tenant.uuid())
    .bind(time::OffsetDateTime::parse(hour, &time::format_description::well_known::Rfc3339).unwrap())
    .bind(user.uuid())
    .bind(device.uuid())
    .execute(&platform.app.db.sys)
    .await
    .unwrap();
}

fn export<'a>(call: Call<'a>) -> Call<'a> {
    call.header("accept", "text/csv")
}

#[tokio::test]
async fn usage_is_exported_by_day_and_device_and_no_cell_is_a_formula() {
    let platform = Platform::start().await;
    with_server(&platform).await;
    let (tenant, foreign) = (platform.tenant().await, platform.tenant().await);
    let (ann, bob) = (
        Person::of(&platform, &tenant, "ann@example.com").await,
        Person::of(&platform, &tenant, "bob@example.com").await,
    );
    let id = |device: &Value| device["device_id"].as_str().unwrap().parse::<DeviceId>().unwrap();
    let (first, second) =
        (id(&ann.device(&platform, "=HYPERLINK(\"x\",1)").await), id(&bob.device(&platform, "+1").await));
    let user: Vec<uuid::Uuid> = sqlx::query_scalar("select user_id from cvault.devices order by device_id")
        .fetch_all(&platform.app.db.sys)
        .await
        .unwrap();
    let (ann_id, bob_id) = (UserId::from_uuid(user[0]), UserId::from_uuid(user[1]));
    for hour in ["2026-02-01T10:00:00Z", "2026-02-01T11:00:00Z", "2026-02-03T00:00:00Z"] {
        carried(&platform, &tenant, first, ann_id, hour).await;
    }
    carried(&platform, &tenant, second, bob_id, "2026-02-01T23:00:00Z").await;
    let path = "/api/v1/usage?from=2026-02-01&to=2026-02-04";
    let answer = export(platform.call("GET", path)).backend(&tenant).send().await;
    assert_eq!(answer.header("content-type"), "text/csv; charset=utf-8; header=present");
    assert_eq!(answer.header("vary"), "accept");
    let ann_line = |date: &str, rx: i64, tx: i64| {
        format!("{date},{ann_id},ann@example.com,,{first},\"'=HYPERLINK(\"\"x\"\",1)\",{rx},{tx},0\r\n")
    };
    let bob_line = format!("2026-02-01,{bob_id},bob@example.com,,{second},'+1,10,20,0\r\n");
    let whole = format!("{HEAD}\r\n{}{bob_line}{}", ann_line("2026-02-01", 20, 40), ann_line("2026-02-03", 10, 20));
    assert_eq!(answer.text, whole);
    let own = export(bob.call(&platform, "GET", path)).send().await;
    assert_eq!(own.text, format!("{HEAD}\r\n{bob_line}"));
    let other = export(platform.call("GET", path)).backend(&foreign).send().await;
    assert_eq!(other.text, format!("{HEAD}\r\n"));
    let json =
        platform.call("GET", path).backend(&tenant).header("accept", "text/csv;q=0.1, application/json").send().await;
    assert_eq!(json.body["current_period"]["rx_bytes"], 40);
    export(platform.call("GET", "/api/v1/usage?from=x")).backend(&tenant).refused(422, "VALIDATION_FAILED").await;
    export(platform.call("GET", path)).refused(401, "INVALID_API_KEY").await;
}

#[tokio::test]
async fn an_export_of_many_devices_goes_on_over_pages() {
    let platform = Platform::start().await;
    with_server(&platform).await;
    let tenant = platform.tenant().await;
    let user = UserId::from_uuid(uuid::Uuid::now_v7());
    let id: TenantId = tenant.id.parse().unwrap();
    sqlx::query(
        "insert into cvault.usage_hourly (tenant_id, hour, user_id, device_id, server_id, rx_bytes, tx_bytes)
         select $1, '2026-02-01T10:00:00Z', $2, gen_random_uuid(), server_id, 1, 0
         from platform.servers, generate_series(1, 2500)",
    )
    .bind(id.uuid())
    .bind(user.uuid())
    .execute(&platform.app.db.sys)
    .await
    .unwrap();
    let call = platform.call("GET", "/api/v1/usage?from=2026-01-20&to=2026-02-04");
    let answer = export(call).backend(&tenant).send().await;
    let lines: Vec<&str> = answer.text.split_terminator("\r\n").collect();
    assert_eq!(lines.len(), 2501);
    let mut devices: Vec<&str> = lines[1..].iter().map(|line| line.split(',').nth(4).unwrap()).collect();
    devices.sort_unstable();
    devices.dedup();
    assert_eq!(devices.len(), 2500, "each once");
}
