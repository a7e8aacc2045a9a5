//! Every error answer of the API: RFC 9457, `application/problem+json`. The one place that maps errors to HTTP.
//!
//! Two texts: `detail` is what the caller may read; what the operator needs is logged where the problem is made.

use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, RETRY_AFTER, SET_COOKIE, WWW_AUTHENTICATE};
use http::{HeaderName, HeaderValue, StatusCode};
use time::OffsetDateTime;

use cvault_types::portal::Challenge;
use cvault_types::problem::{FieldFault, Limit, ProblemBody};
use cvault_types::{ErrorCode, RequestId};

use super::{browser, context};
use crate::db::DbError;

/// With every `SESSION_TERMINATED`: a client forgets what it knows of the session.
const SESSION_TERMINATED: HeaderName = HeaderName::from_static("x-session-terminated");

/// An error on its way to the caller. Boxed: it travels in every `Result` of the API.
#[derive(Debug, Clone)]
pub struct Problem(Box<Parts>);

#[derive(Debug, Clone)]
struct Parts {
    code: ErrorCode,
    detail: String,
    errors: Vec<FieldFault>,
    limit: Option<Limit>,
    retry_after_seconds: Option<u64>,
    allow: Option<HeaderValue>,
    challenge: Option<Challenge>,
}

impl Problem {
    #[must_use]
    pub fn new(code: ErrorCode) -> Self {
        Self(Box::new(Parts {
            code,
            detail: default_detail(code).to_owned(),
            errors: Vec::new(),
            limit: None,
            retry_after_seconds: None,
            allow: None,
            challenge: None,
        }))
    }

    /// The error of a request whose fields are at fault; add them with [`Problem::field`].
    #[must_use]
    pub fn validation() -> Self {
        Self::new(ErrorCode::ValidationFailed)
    }

    /// Logs what happened and answers with a constant sentence.
    #[must_use]
    pub fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(error = chain(error), "internal error");
        Self::new(ErrorCode::InternalError)
    }

    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = detail.into();
        self
    }

    #[must_use]
    pub fn field(mut self, pointer: impl Into<String>, code: &str, detail: impl Into<String>) -> Self {
        self.0.errors.push(FieldFault { pointer: pointer.into(), code: code.to_owned(), detail: detail.into() });
        self
    }

    #[must_use]
    pub fn limit(mut self, name: &str, max: i64, used: i64) -> Self {
        self.0.limit = Some(Limit { name: name.to_owned(), max, used, resets_at: None });
        self
    }

    #[must_use]
    pub fn resets_at(mut self, at: OffsetDateTime) -> Self {
        if let Some(limit) = &mut self.0.limit {
            limit.resets_at = Some(at);
        }
        self
    }

    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.0.retry_after_seconds = Some(seconds);
        self
    }

    #[must_use]
    pub fn challenge(mut self, challenge: Challenge) -> Self {
        self.0.challenge = Some(challenge);
        self
    }

    pub(super) fn allow(mut self, allow: Option<HeaderValue>) -> Self {
        self.0.allow = allow;
        self
    }

    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.0.code
    }

    /// The faults as text, for a terminal.
    #[must_use]
    pub fn sentences(&self) -> String {
        if self.0.errors.is_empty() {
            return self.0.detail.clone();
        }
        let faults: Vec<String> = self
            .0
            .errors
            .iter()
            .map(|fault| format!("{} {}", fault.pointer.trim_start_matches('/'), fault.detail))
            .collect();
        faults.join("; ")
    }

    /// Faults collected so far, or `value` when there are none.
    ///
    /// # Errors
    /// The problem itself when it names a field.
    pub fn or_ok<T>(self, value: T) -> Result<T, Self> {
        if self.0.errors.is_empty() { Ok(value) } else { Err(self) }
    }

    pub(super) fn body(&self, request_id: RequestId) -> ProblemBody {
        ProblemBody {
            kind: format!("https://docs.cvault.io/errors/{}", self.0.code.as_str()),
            title: self.0.code.title().to_owned(),
            status: self.0.code.status(),
            detail: self.0.detail.clone(),
            code: self.0.code,
            request_id,
            retryable: self.0.code.retryable(),
            errors: self.0.errors.clone(),
            limit: self.0.limit.clone(),
            challenge: self.0.challenge.clone(),
        }
    }
}

fn default_detail(code: ErrorCode) -> &'static str {
    #[expect(clippy::wildcard_enum_match_arm, reason = "a title is enough for every code without a sentence here")]
    match code {
        ErrorCode::InvalidApiKey => "The API key is unknown, revoked or expired, or its secret is missing or wrong.",
        ErrorCode::InvalidCredentials => "The e-mail address or the password is wrong.",
        ErrorCode::InvalidToken => "The token is missing, malformed, or not for this use.",
        ErrorCode::TokenExpired => "The access token has expired. Use the refresh token to get a new one.",
        ErrorCode::TokenReused => {
            "This refresh token was used before. All tokens of this login are revoked; log in again."
        }
        ErrorCode::SessionTerminated => "This session was ended. Log in again.",
        ErrorCode::ChallengeRequired => {
            "Show that it is you: answer the challenge, then send the request again with X-Challenge-Token."
        }
        ErrorCode::InsufficientScope => "Your role does not allow this.",
        ErrorCode::OriginNotAllowed => "A page of another origin sent this request.",
        ErrorCode::TenantSuspended => "This tenant is suspended.",
        ErrorCode::NotFound => "There is nothing here under this address, or it is not yours.",
        ErrorCode::MethodNotAllowed => "This address does not answer this method.",
        ErrorCode::PayloadTooLarge => {
            "The body is larger than 1 MiB, or, of somebody without credentials, than 16 KiB."
        }
        ErrorCode::UnsupportedMediaType => "The body must be application/json.",
        ErrorCode::ValidationFailed => "Some fields are missing, unknown or out of bounds; see errors.",
        ErrorCode::HttpsRequired => {
            "This was sent without TLS, where others may have read it. Use https://, and replace what is secret in it."
        }
        ErrorCode::RequestTimeout => "The request did not arrive whole in time.",
        ErrorCode::RateLimited => "Too many requests. Wait as long as Retry-After says.",
        ErrorCode::InternalError => "Something went wrong on our side. The request id helps us find it.",
        ErrorCode::ServerUnavailable => "No server can take this device now.",
        ErrorCode::PoolExhausted => "All addresses of the pool are in use.",
        ErrorCode::Overloaded => "Too much work is waiting. Try again shortly.",
        ErrorCode::DatabaseUnavailable => "The database does not answer. Try again shortly.",
        _ => code.title(),
    }
}

/// The whole chain of causes in one line, for the log.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl From<DbError> for Problem {
    fn from(error: DbError) -> Self {
        match &error {
            DbError::Unavailable(_) => {
                tracing::warn!(error = chain(&error), "database unavailable");
                Self::new(ErrorCode::DatabaseUnavailable).retry_after(1)
            }
            DbError::CommitUnknown(_) => {
                tracing::warn!(error = chain(&error), "outcome of a commit unknown");
                Self::new(ErrorCode::DatabaseUnavailable)
                    .detail("The database went away while saving. The change may or may not have been made.")
                    .retry_after(1)
            }
            DbError::Constraint { .. } | DbError::Clock { .. } | DbError::Other(_) => Self::internal(&error),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let id = context::request_id();
        let status = StatusCode::from_u16(self.0.code.status()).expect("codes have valid statuses");
        let body = serde_json::to_vec(&self.body(id)).expect("a problem is plain data");
        let mut response = (status, body).into_response();
        response.extensions_mut().insert(self.0.code);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        // a 503 always says when to come back
        let unavailable = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(5);
        if let Some(seconds) = self.0.retry_after_seconds.or(unavailable) {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(allow) = self.0.allow {
            headers.insert(http::header::ALLOW, allow);
        }
        if self.0.code == ErrorCode::SessionTerminated {
            headers.insert(SESSION_TERMINATED, HeaderValue::from_static("true"));
            headers.insert(SET_COOKIE, HeaderValue::from_static(browser::EXPIRED_COOKIE));
        }
        if status == StatusCode::UNAUTHORIZED {
            let scheme = if self.0.code == ErrorCode::InvalidApiKey {
                "ApiKey realm=\"cvault\""
            } else if self.0.code == ErrorCode::TokenExpired {
                "Bearer realm=\"cvault\", error=\"invalid_token\", error_description=\"expired\""
            } else {
                "Bearer realm=\"cvault\""
            };
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(scheme));
        }
        response
    }
}
