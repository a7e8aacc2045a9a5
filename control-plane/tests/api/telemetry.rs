//! Metrics name routes, never callers.

use crate::platform::Platform;

#[tokio::test]
async fn metrics_count_requests_by_route_template_and_hold_no_id() {
    let platform = Platform::start().await;
    let tenant = platform.tenant().await;
    let path = format!("/admin/tenants/{}", tenant.id);
    platform.admin("GET", &path).send().await;
    platform.call("GET", "/secret-looking/path").send().await;
    platform.call("INVENTED", "/health").send().await;
    cvault_control_plane::metrics::install();
    platform.admin("GET", &path).send().await;
    let text = platform.call("GET", "/metrics").send().await.text;
    assert!(text.contains(r#"route="/admin/tenants/{tenant_id}""#), "{text}");
    assert!(text.contains("cvault_http_request_duration_seconds_bucket"), "{text}");
    assert!(!text.contains(&tenant.id) && !text.contains("secret-looking") && !text.contains("INVENTED"));
}
