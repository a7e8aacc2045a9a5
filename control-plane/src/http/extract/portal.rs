//! Somebody of a tenant, logged in to the portal: a browser's cookie, or a program's bearer token.

use axum::extract::FromRequestParts;
use cvault_types::{ErrorCode, PortalSessionId, RequestId, TenantAdminId, TenantId, TenantRole};
use http::Method;
use http::header::AUTHORIZATION;
use http::request::Parts;
use uuid::Uuid;

use super::bearer;
use crate::app::App;
use crate::auth::{opaque, throttle, tokens};
use crate::http::serve::Peer;
use crate::http::{Problem, browser, context};
use crate::metrics;
use crate::portal::sessions::{self, Credential, Found};

/// Whoever calls `/api/v1/tenant/*`. A suspended tenant's people may read, and change nothing.
#[derive(Debug, Clone, Copy)]
pub struct Portal {
    pub tenant: TenantId,
    pub admin: TenantAdminId,
    pub role: TenantRole,
    pub session: Uuid,
    pub request_id: RequestId,
}

impl Portal {
    /// # Errors
    /// `INSUFFICIENT_SCOPE` for a role that does not cover `needed`.
    pub fn require(&self, needed: TenantRole) -> Result<(), Problem> {
        if self.role.covers(needed) {
            return Ok(());
        }
        let (needed, role) = (needed.as_str(), self.role.as_str());
        Err(Problem::new(ErrorCode::InsufficientScope)
            .detail(format!("This needs the role {needed} or a higher one; yours is {role}.")))
    }

    /// How the audit log names the caller.
    #[must_use]
    pub fn actor(&self) -> String {
        self.admin.to_string()
    }

    #[must_use]
    pub fn session_id(&self) -> PortalSessionId {
        PortalSessionId::from_uuid(self.session)
    }

    /// The session behind the request's credentials, also of a suspended tenant.
    pub(crate) async fn find(parts: &Parts, app: &App) -> Result<Found, Problem> {
        let ip = Peer::of(parts).ip();
        // a token that is right is nobody's guess, whoever fails from the same network; a cookie is known when it was right
        let credential = credential(parts, app).await;
        let known = match &credential {
            Ok(Credential::Token(_)) => None,
            Ok(Credential::Cookie(hash)) => {
                let known = throttle::Credential::of(hash, &[]);
                app.throttles.before_credential(ip, known)?;
                Some(known)
            }
            Err(_) => {
                app.throttles.before_credentials(ip)?;
                None
            }
        };
        let found = match credential {
            Ok(credential) => sessions::find(app, credential).await,
            Err(problem) => Err(problem),
        };
        let found = found.inspect_err(|problem| {
            if problem.code() == ErrorCode::InvalidToken {
                app.throttles.credentials_failed(ip);
            }
        })?;
        if let Some(known) = known {
            app.throttles.credential_right(ip, known);
        }
        let decision = app.throttles.portal(found.token.admin);
        context::person_identified(found.token.tenant, decision);
        if !decision.allowed {
            metrics::rate_limited("person");
            let (max, seconds) = (i64::from(decision.quota), decision.retry_after_seconds);
            return Err(Problem::new(ErrorCode::RateLimited)
                .limit("requests_per_minute", max, max)
                .retry_after(seconds));
        }
        sessions::seen(app, &found, ip).await?;
        Ok(found)
    }
}

async fn credential(parts: &Parts, app: &App) -> Result<Credential, Problem> {
    let headers = &parts.headers;
    if headers.contains_key(AUTHORIZATION) {
        let token = bearer(headers)?;
        let (issuer, now) = (&app.config.public_url, app.clock.now());
        let token = app.verified(token, |keys| tokens::verify_portal(keys, issuer, token, now)).await?;
        return Ok(Credential::Token(token));
    }
    let cookie = browser::session_cookie(headers).filter(|text| opaque::SESSION_COOKIE.is_well_formed(text));
    let cookie = cookie.ok_or_else(|| {
        Problem::new(ErrorCode::InvalidToken).detail("A session cookie or an Authorization header is needed.")
    })?;
    browser::same_origin(&parts.method, headers, &app.config.public_url)?;
    Ok(Credential::cookie(&app.secrets, cookie))
}

impl FromRequestParts<App> for Portal {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let found = Self::find(parts, app).await?;
        if found.suspended && !matches!(parts.method, Method::GET | Method::HEAD) {
            return Err(Problem::new(ErrorCode::TenantSuspended));
        }
        Ok(Self {
            tenant: found.token.tenant,
            admin: found.token.admin,
            role: found.role,
            session: found.token.session,
            request_id: context::request_id(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_that_does_not_cover_what_is_needed_is_told_so() {
        let portal = Portal {
            tenant: TenantId::from_uuid(Uuid::nil()),
            admin: TenantAdminId::from_uuid(Uuid::nil()),
            role: TenantRole::Developer,
            session: Uuid::nil(),
            request_id: RequestId::from_uuid(Uuid::nil()),
        };
        assert!(portal.require(TenantRole::Viewer).is_ok() && portal.require(TenantRole::Developer).is_ok());
        let refused = portal.require(TenantRole::Admin).unwrap_err();
        assert_eq!(refused.code(), ErrorCode::InsufficientScope);
        assert_eq!(refused.sentences(), "This needs the role admin or a higher one; yours is developer.");
    }
}
