//! Pools that take addresses back, over HTTP.

use serde_json::json;

use crate::platform::Platform;
use crate::scene::{Person, with_server};

#[tokio::test]
async fn a_disconnected_device_has_no_address_until_it_connects_and_gets_another_configuration() {
    let platform = Platform::start().await;
    with_server(&platform).await;
    let pools = platform.admin("GET", "/admin/pools").send().await;
    assert_eq!(pools.body["data"][0]["reclaim"], false);
    let path = format!("/admin/pools/{}", pools.body["data"][0]["id"].as_str().unwrap());
    let changed = platform.admin("PATCH", &path).json(&json!({"reclaim": true})).send().await;
    assert_eq!(changed.body["reclaim"], true, "{}", changed.text);
    let tenant = platform.tenant().await;
    let person = Person::of(&platform, &tenant, "a@example.com").await;
    let device = person.device(&platform, "laptop").await;
    let body = json!({"device_id": device["device_id"]});
    let post = |what: &str| person.call(&platform, "POST", &format!("/api/v1/vpn/{what}")).json(&body).send();
    let first = post("connect").await;
    assert_eq!(first.body["assigned_ip"], device["assigned_ip"]);
    assert_eq!(platform.admin("GET", &path).send().await.body["used"], 1);

    assert_eq!(post("disconnect").await.status, 200);
    let pool = platform.admin("GET", &path).send().await.body;
    assert_eq!((&pool["used"], &pool["quarantined"]), (&json!(0), &json!(1)));
    let own = format!("/api/v1/devices/{}", device["device_id"].as_str().unwrap());
    person.call(&platform, "GET", &format!("{own}/config")).refused(409, "CONFLICT").await;
    assert_eq!(person.call(&platform, "GET", &own).send().await.body["status"], "pending");

    let second = post("connect").await;
    assert_eq!(second.status, 200, "{}", second.text);
    let address = second.text("assigned_ip");
    assert_ne!(address, first.text("assigned_ip"));
    assert!(second.text("config").contains(&format!("{address}/32")));
    let config = person.call(&platform, "GET", &format!("{own}/config")).send().await;
    assert_eq!((config.status.as_u16(), config.text), (200, second.text("config")));
    let log = platform.admin("GET", "/admin/audit?action=vpn.disconnect").send().await;
    assert_eq!(log.body["data"][0]["details"]["address_reclaimed"], true);
}
