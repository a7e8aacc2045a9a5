//! The guide's full flow (§10.3), steps 1 to 8, with a real WireGuard client.

use cvault_tests::lab::eventually;
use cvault_tests::platform::{ControlOptions, Device, Platform, Request, Tenant, User};
use serde_json::{Value, json};

const EMAIL: &str = "test@example.com";
const PASSWORD: &str = "TestPass123!";

#[test]
fn a_device_goes_from_registration_through_a_tunnel_to_its_removal() {
    let platform = Platform::start(ControlOptions { quarantine_seconds: 2, ..ControlOptions::default() }).unwrap();
    let http = &platform.http;
    let server = platform.server(1).unwrap();

    // 1. Tenant setup
    let answer = http.send(&platform.admin.create_tenant_request("Acme")).unwrap();
    let tenant = Tenant::from_answer(&platform.lab, &answer).unwrap();
    assert!(tenant.api_key.starts_with("cvk_"), "{}", tenant.api_key);
    assert!(tenant.api_secret.starts_with("cvs_"));

    // 2. User registration
    let answer = http.send(&User::register_request(&tenant, EMAIL, PASSWORD)).unwrap();
    let registered = User::from_answer(&platform.lab, &tenant, EMAIL, PASSWORD, &answer, 201).unwrap();
    let stored = platform
        .control
        .sql(&format!("select password_hash like '$2%$12$%' from cvault.users where email = '{EMAIL}'"))
        .unwrap();
    assert_eq!(stored, "t", "the password is stored as bcrypt, cost 12");
    let again = http.send(&User::register_request(&tenant, EMAIL, PASSWORD)).unwrap();
    assert_eq!((again.status, again.code().as_str()), (409, "EMAIL_TAKEN"));

    // 3. User login
    let wrong = http.send(&User::login_request(&tenant, EMAIL, "not the password")).unwrap();
    assert_eq!((wrong.status, wrong.code().as_str()), (401, "INVALID_CREDENTIALS"));
    let answer = http.send(&User::login_request(&tenant, EMAIL, PASSWORD)).unwrap();
    let user = User::from_answer(&platform.lab, &tenant, EMAIL, PASSWORD, &answer, 200).unwrap();
    assert_eq!(user.id, registered.id);

    // 4. Device registration
    let answer = http.send(&user.device_request("Test Device")).unwrap();
    let device = Device::from_answer(&platform.lab, &answer).unwrap();
    assert_eq!(device.body["status"], "active", "{}", answer.text());
    assert!(device.assigned_ip.starts_with("10.8."), "{}", device.assigned_ip);
    assert_eq!(server.peers().unwrap().len(), 1);
    assert!(platform.address_state(&device.assigned_ip).unwrap().starts_with("allocated"));
    let sealed = platform.control.sql("select octet_length(private_key_sealed) > 32 from cvault.devices").unwrap();
    assert_eq!(sealed, "t", "the private key is stored sealed");

    // 5. VPN connection
    let client = platform.client(1).unwrap();
    assert_eq!(client.address_v4().unwrap(), client.addresses.v4);
    client.up(&device.config).unwrap();
    assert_eq!(client.address_v4().unwrap(), server.addresses.v4);
    assert_eq!(client.address_v6().unwrap(), server.addresses.v6);
    assert_eq!(client.address_seen_by_dns().unwrap(), server.addresses.v4);
    assert_eq!(client.get("http://www.test/ip").unwrap(), server.addresses.v4);
    client.download(2_000_000).unwrap();
    client.upload(2_000_000).unwrap();

    // 6. Connection tracking
    eventually("the handshake has opened a session", 30, || {
        let body = http.send(&user.status_request())?.expect(200)?;
        if words(&body).contains(&"connected".to_owned()) { Ok(()) } else { anyhow::bail!("{body}") }
    })
    .unwrap();
    let connected = http.send(&user.connect_request(&device)).unwrap().expect(200).unwrap();
    assert_eq!(connected["status"], "connected");
    assert_eq!(connected["server_ip"], json!(server.addresses.v4));
    assert_eq!(connected["server_port"], 51820);

    // 7. Disconnect
    client.silence().unwrap();
    platform
        .bill_where(&tenant, |billed| billed.check_against(server.counters_on_wire()?, client.counters()?))
        .unwrap();
    client.down().unwrap();
    assert_eq!(client.address_v4().unwrap(), client.addresses.v4);
    http.send(&user.disconnect_request(&device)).unwrap().expect(200).unwrap();
    let open = platform.control.sql("select count(*) from cvault.sessions where status <> 'disconnected'").unwrap();
    assert_eq!(open, "0", "no session is left open");

    // 8. Cleanup
    let deleted = http.send(&user.delete_device_request(&device)).unwrap();
    assert_eq!(deleted.status, 204, "{}", deleted.text());
    eventually("the peer is off the server", 5, || {
        let peers = server.peers()?;
        if peers.is_empty() { Ok(()) } else { anyhow::bail!("{peers:?}") }
    })
    .unwrap();
    let gone = http.send(&user.get_request(&format!("/api/v1/devices/{}", device.id))).unwrap();
    assert_eq!((gone.status, gone.code().as_str()), (404, "NOT_FOUND"));
    eventually("the address is free again", 30, || {
        let state = platform.address_state(&device.assigned_ip)?;
        if state.starts_with("free") { Ok(()) } else { anyhow::bail!("{state}") }
    })
    .unwrap();

    let metrics = http.send(&Request::get("/metrics")).unwrap();
    assert_eq!(metrics.status, 200);
    assert!(platform.check_logs_hold_no_secret().unwrap() > 5);
}

/// Every string in a document.
fn words(value: &Value) -> Vec<String> {
    match value {
        Value::String(word) => vec![word.clone()],
        Value::Array(values) => values.iter().flat_map(words).collect(),
        Value::Object(fields) => fields.values().flat_map(words).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => Vec::new(),
    }
}
