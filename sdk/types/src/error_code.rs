//! The error codes of the API. One enum is the source of the server's answers, the OpenAPI document and the SDKs.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = ($text:literal, $status:literal, $title:literal, $retryable:literal);)+) => {
        /// What went wrong, as a word a program can act on.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $text)] $name,)+
        }

        impl ErrorCode {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The HTTP status this code is answered with.
            #[must_use]
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)+ }
            }

            /// A short human-readable summary, constant per code.
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)+ }
            }

            /// Whether the same request may succeed later without being changed.
            #[must_use]
            pub const fn retryable(self) -> bool {
                match self { $(Self::$name => $retryable,)+ }
            }
        }
    };
}

codes! {
    /// The request is not valid HTTP or JSON.
    MalformedRequest = ("MALFORMED_REQUEST", 400, "Malformed request", false);
    /// API key unknown, revoked or expired, or its secret wrong: one answer for all.
    InvalidApiKey = ("INVALID_API_KEY", 401, "Invalid API key", false);
    /// Unknown user or wrong password: one answer for both.
    InvalidCredentials = ("INVALID_CREDENTIALS", 401, "Invalid credentials", false);
    TokenExpired = ("TOKEN_EXPIRED", 401, "Token expired", false);
    InvalidToken = ("INVALID_TOKEN", 401, "Invalid token", false);
    /// A refresh token was used twice; the whole family is revoked.
    TokenReused = ("TOKEN_REUSED", 401, "Refresh token reused", false);
    SessionTerminated = ("SESSION_TERMINATED", 401, "Session terminated", false);
    TenantSuspended = ("TENANT_SUSPENDED", 403, "Tenant suspended", false);
    BandwidthLimitExceeded = ("BANDWIDTH_LIMIT_EXCEEDED", 403, "Bandwidth limit exceeded", false);
    UserLimitExceeded = ("USER_LIMIT_EXCEEDED", 403, "User limit exceeded", false);
    DeviceLimitExceeded = ("DEVICE_LIMIT_EXCEEDED", 403, "Device limit exceeded", false);
    InsufficientScope = ("INSUFFICIENT_SCOPE", 403, "Insufficient scope", false);
    OriginNotAllowed = ("ORIGIN_NOT_ALLOWED", 403, "Origin not allowed", false);
    SecretKeyInBrowser = ("SECRET_KEY_IN_BROWSER", 403, "Secret key sent by a browser", false);
    /// The request has come without TLS to a service that is only for it.
    HttpsRequired = ("HTTPS_REQUIRED", 403, "HTTPS required", false);
    /// The tenant has disabled this user.
    UserDisabled = ("USER_DISABLED", 403, "User disabled", false);
    NotFound = ("NOT_FOUND", 404, "Not found", false);
    MethodNotAllowed = ("METHOD_NOT_ALLOWED", 405, "Method not allowed", false);
    /// The body did not arrive in time.
    RequestTimeout = ("REQUEST_TIMEOUT", 408, "Request timeout", true);
    EmailTaken = ("EMAIL_TAKEN", 409, "E-mail address taken", false);
    ExternalIdTaken = ("EXTERNAL_ID_TAKEN", 409, "External id taken", false);
    PublicKeyInUse = ("PUBLIC_KEY_IN_USE", 409, "Public key in use", false);
    IdempotencyKeyInUse = ("IDEMPOTENCY_KEY_IN_USE", 409, "Idempotency key in use", true);
    /// The state of something else stands in the way; `errors` names the field at fault, if one is.
    Conflict = ("CONFLICT", 409, "Conflict", false);
    PayloadTooLarge = ("PAYLOAD_TOO_LARGE", 413, "Payload too large", false);
    UnsupportedMediaType = ("UNSUPPORTED_MEDIA_TYPE", 415, "Unsupported media type", false);
    /// The request is well-formed, but fields are missing, unknown or out of bounds; all faults are listed.
    ValidationFailed = ("VALIDATION_FAILED", 422, "Validation failed", false);
    IdempotencyKeyReused = ("IDEMPOTENCY_KEY_REUSED", 422, "Idempotency key reused", false);
    ChallengeRequired = ("CHALLENGE_REQUIRED", 428, "Challenge required", false);
    RateLimited = ("RATE_LIMITED", 429, "Rate limited", true);
    InternalError = ("INTERNAL_ERROR", 500, "Internal error", true);
    ServerUnavailable = ("SERVER_UNAVAILABLE", 503, "No server available", true);
    PoolExhausted = ("POOL_EXHAUSTED", 503, "Address pool exhausted", true);
    Overloaded = ("OVERLOADED", 503, "Overloaded", true);
    DatabaseUnavailable = ("DATABASE_UNAVAILABLE", 503, "Database unavailable", true);
}

impl utoipa::PartialSchema for ErrorCode {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .description(Some("What went wrong, as a word a program can act on."))
            .enum_values(Some(Self::ALL.iter().map(|code| code.as_str())))
            .into()
    }
}

impl utoipa::ToSchema for ErrorCode {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_form_of_every_code_is_its_text() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_string(code).unwrap(), format!("\"{}\"", code.as_str()));
        }
    }

    #[test]
    fn the_schema_names_the_codes_as_answers_do() {
        let schema = serde_json::to_value(<ErrorCode as utoipa::PartialSchema>::schema()).unwrap();
        let codes: Vec<&str> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(schema["enum"], serde_json::json!(codes));
    }

    #[test]
    fn every_code_has_a_page_that_says_the_same() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/errors");
        let list = std::fs::read_to_string(format!("{folder}/README.md")).unwrap();
        for code in ErrorCode::ALL {
            let text = code.as_str();
            let page = std::fs::read_to_string(format!("{folder}/{text}.md")).unwrap_or_default();
            let retry = if code.retryable() { "yes, unchanged" } else { "no" };
            let head = format!("# {text}\n\n{}. HTTP status {}; retry: {retry}.\n", code.title(), code.status());
            assert!(page.starts_with(&head), "docs/errors/{text}.md must begin with:\n{head}");
            let line = format!("| [{text}]({text}.md) | {} | {retry} |", code.status());
            assert!(list.contains(&line), "docs/errors/README.md must list {text}");
        }
        let pages = std::fs::read_dir(folder).unwrap().count() - 1;
        assert_eq!(pages, ErrorCode::ALL.len(), "a page of a code that is no more");
    }
}
