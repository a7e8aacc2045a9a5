//! The API's description, rendered from the routes themselves and committed as docs/openapi/v1.json.

mod answers;
mod refusals;

use std::sync::OnceLock;

use cvault_types::problem::ProblemBody;
use serde_json::Value;
use utoipa::Modify;
use utoipa::openapi::OpenApi as Document;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityScheme};

use super::router;

/// What surrounds the paths.
#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "CVault API", version = "1", license(name = "Apache-2.0"),
        description = "B2B VPN platform. Errors are RFC 9457 problem details. Unknown request fields are refused; clients must ignore unknown response fields and enum values."),
    modifiers(&Credentials), components(schemas(ProblemBody)),
    tags((name = "auth", description = "A tenant's users log in"), (name = "users", description = "A tenant's users, for its backend"), (name = "devices", description = "Devices and their WireGuard configurations"),
        (name = "vpn", description = "Connections"), (name = "servers", description = "Servers"), (name = "usage", description = "Metering"),
        (name = "portal", description = "The people of a tenant who manage it"),
        (name = "admin", description = "Platform staff"), (name = "platform", description = "Health, metrics, keys"))
)]
pub struct Description;

struct Credentials;

impl Modify for Credentials {
    fn modify(&self, document: &mut Document) {
        let components = document.components.get_or_insert_default();
        let header = |name: &str| SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new(name)));
        components.add_security_scheme("api_key", header("X-API-Key"));
        components.add_security_scheme("api_secret", header("X-API-Secret"));
        components.add_security_scheme("user_token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
        let cookie = ApiKeyValue::with_description(
            "__Host-cvault_session",
            "A browser's session. A page of another origin cannot use it.",
        );
        components.add_security_scheme("portal_cookie", SecurityScheme::ApiKey(ApiKey::Cookie(cookie)));
        components.add_security_scheme("portal", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
        components.add_security_scheme("admin", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

/// The document as text, the same bytes each time: keys are sorted.
#[must_use]
pub fn document_text() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        let (_, document) = router::routes().split_for_parts();
        // through Value: its maps are sorted
        let mut value = serde_json::to_value(document).expect("the document is plain data");
        name_operations(&mut value);
        refusals::complete(&mut value);
        answers::complete(&mut value);
        let mut text = serde_json::to_string_pretty(&value).expect("the document is plain data");
        text.push('\n');
        text
    })
}

/// Operations are named `<tag>_<handler>`: a handler's name alone is not unique, and SDKs are generated from these.
fn name_operations(document: &mut Value) {
    let paths = document["paths"].as_object_mut().into_iter().flatten();
    for (_, methods) in paths {
        for (_, operation) in methods.as_object_mut().into_iter().flatten() {
            if let (Some(tag), Some(id)) = (operation["tags"][0].as_str(), operation["operationId"].as_str()) {
                operation["operationId"] = Value::String(format!("{tag}_{id}"));
            }
        }
    }
}
