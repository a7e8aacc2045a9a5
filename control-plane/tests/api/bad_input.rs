//! Whatever arrives, the answer is a problem with the right status and code.

use serde_json::json;

use crate::platform::{PASSWORD, Platform};

const REGISTER: &str = "/api/v1/auth/register";

#[tokio::test]
async fn an_unknown_route_is_not_found_and_a_wrong_method_names_the_right_ones() {
    let platform = Platform::start().await;
    platform.call("GET", "/nothing/here").refused(404, "NOT_FOUND").await;
    platform.call("GET", "/api/v1/auth/register/").refused(404, "NOT_FOUND").await;
    let answer = platform.call("GET", REGISTER).refused(405, "METHOD_NOT_ALLOWED").await;
    assert_eq!(answer.header("allow"), "POST");
    platform.call("BREW", "/health").refused(405, "METHOD_NOT_ALLOWED").await;
    platform.admin("GET", "/admin/tenants/not-an-id").refused(404, "NOT_FOUND").await;
    platform.admin("GET", "/admin/tenants/usr_00000000000000000000000001").refused(404, "NOT_FOUND").await;
    platform.admin("GET", "/admin/tenants/%ff").refused(404, "NOT_FOUND").await;
}

#[tokio::test]
async fn a_body_that_is_not_json_is_refused_by_kind() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let call = |kind: &str, body: &[u8]| platform.call("POST", REGISTER).backend(&tenant).raw(kind, body);
    for kind in
        ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "application/json; charset=latin1", ""]
    {
        call(kind, b"{}").refused(415, "UNSUPPORTED_MEDIA_TYPE").await;
    }
    platform.call("POST", REGISTER).backend(&tenant).refused(415, "UNSUPPORTED_MEDIA_TYPE").await;
    for body in
        [&b""[..], b"{", b"{]", b"hello", b"{\"email\":\"a\xff\"}", b"{} {}", b"\xef\xbb\xbf{}", &b"[".repeat(100_000)]
    {
        call("application/json", body).refused(400, "MALFORMED_REQUEST").await;
    }
    call("application/json; charset=UTF-8", b"{}").refused(422, "VALIDATION_FAILED").await;
}

#[tokio::test]
async fn a_body_of_one_mebibyte_is_read_and_one_byte_more_is_not() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let body = |length: usize| format!("{{\"email\":\"{}\"}}", "a".repeat(length - 12));
    assert_eq!(body(1 << 20).len(), 1 << 20);
    let call = |length| platform.call("POST", REGISTER).backend(&tenant).raw("application/json", body(length));
    call(1 << 20).refused(422, "VALIDATION_FAILED").await;
    call((1 << 20) + 1).refused(413, "PAYLOAD_TOO_LARGE").await;
}

#[tokio::test]
async fn an_answer_does_not_repeat_a_name_of_any_length() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let body = json!({"email": "a@b.de", "password": PASSWORD, "x".repeat(100_000): true});
    let answer = platform.post(REGISTER, &body).backend(&tenant).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(answer.faults(), [format!("/{}… unknown", "x".repeat(64))]);
    let query = format!("/admin/tenants?{}=1", "y".repeat(5_000));
    let answer = platform.admin("GET", &query).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(answer.faults(), [format!("?{}… unknown", "y".repeat(64))]);
}

#[tokio::test]
async fn each_fault_of_a_body_is_named_with_its_place() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let cases = [
        (json!({}), "/email missing"),
        (json!({"email": "a@b.de"}), "/password missing"),
        (json!({"email": 5, "password": PASSWORD}), "/email invalid_type"),
        (json!({"email": null, "password": PASSWORD}), "/email invalid_type"),
        (json!({"email": "a@b.de", "password": PASSWORD, "admin": true}), "/admin unknown"),
        (json!({"email": "a@b.de", "password": PASSWORD, "a/b~c": true}), "/a~1b~0c unknown"),
        (json!(["a@b.de", PASSWORD]), " invalid_type"),
        (json!("text"), " invalid_type"),
        (json!({"email": "no address", "password": PASSWORD}), "/email invalid_format"),
        (json!({"email": "a@b.de", "password": "1234567"}), "/password too_short"),
        (json!({"email": "a@b.de", "password": "x".repeat(129)}), "/password too_long"),
    ];
    for (body, fault) in cases {
        let answer = platform.post(REGISTER, &body).backend(&tenant).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults(), [fault], "{body}");
    }
    let both = json!({"email": "no address", "password": "short"});
    let answer = platform.post(REGISTER, &both).backend(&tenant).refused(422, "VALIDATION_FAILED").await;
    assert_eq!(answer.faults(), ["/email invalid_format", "/password too_short"], "all faults at once");
    let twice = platform.call("POST", REGISTER).backend(&tenant);
    let twice = twice.raw("application/json", r#"{"email":"a@b.de","email":"c@d.de","password":"longenough"}"#);
    assert_eq!(twice.refused(422, "VALIDATION_FAILED").await.faults(), ["/email duplicate"]);
}

#[tokio::test]
async fn a_query_is_as_strict_as_a_body() {
    let platform = Platform::start().await;
    for (query, fault) in [
        ("limit=0", "?limit out_of_range"),
        ("limit=201", "?limit out_of_range"),
        ("limt=5", "?limt unknown"),
        ("cursor=AAAA", "?cursor invalid_value"),
        ("limit=1&limit=2", "?limit duplicate"),
    ] {
        let answer = platform.admin("GET", &format!("/admin/tenants?{query}")).refused(422, "VALIDATION_FAILED").await;
        assert_eq!(answer.faults(), [fault], "{query}");
    }
    platform.admin("GET", "/admin/tenants?limit=ten").refused(422, "VALIDATION_FAILED").await;
}

#[tokio::test]
async fn every_answer_carries_the_security_headers_and_its_request_id() {
    let platform = Platform::start().await;
    for path in ["/health", "/nothing", "/metrics"] {
        let answer = platform.call("GET", path).header("x-correlation-id", "abc").send().await;
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(answer.header("x-frame-options"), "DENY", "{path}");
        assert_eq!(answer.header("referrer-policy"), "no-referrer", "{path}");
        assert_eq!(answer.header("cache-control"), "no-store", "{path}");
        assert_eq!(answer.header("x-correlation-id"), "abc", "{path}");
        assert!(answer.header("x-request-id").starts_with("req_"), "{path}");
    }
}

#[tokio::test]
async fn the_openapi_document_describes_every_route_and_is_the_same_each_time() {
    let platform = Platform::start().await;
    let answer = platform.call("GET", "/api/v1/openapi.json").send().await;
    let paths = answer.body["paths"].as_object().unwrap();
    for path in [
        "/admin/tenants",
        "/admin/tenants/{tenant_id}",
        "/api/v1/auth/register",
        "/api/v1/auth/login",
        "/api/v1/auth/refresh",
        "/api/v1/auth/logout",
        "/health",
        "/health/ready",
        "/metrics",
        "/.well-known/jwks.json",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    assert_eq!(answer.text, platform.call("GET", "/api/v1/openapi.json").send().await.text);
}
