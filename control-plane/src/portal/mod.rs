//! The people of a tenant who manage it: their accounts, their logins, and the links that are mailed to them.
//!
//! An account is found by its address before its tenant is known, with role `cvault_sys`, which sees no password; everything
//! else happens inside the tenant's own transaction. Team management and second factors have their place here.

pub mod accounts;
pub mod attempts;
pub mod links;
pub mod recovery;
pub mod sessions;
pub mod signup;

use sqlx::PgPool;

use crate::db::DbError;

/// Forgets sessions, tokens, links and challenges that are past use, and attempts and networks of long ago.
///
/// # Errors
/// Those of the database.
pub async fn trim(sys: &PgPool) -> Result<u64, DbError> {
    // a session takes its tokens and challenges with it
    let sessions = sqlx::query!("delete from cvault.portal_sessions where expires_at < now() - interval '30 days'");
    let tokens = sqlx::query!("delete from cvault.portal_refresh_tokens where expires_at < now() - interval '1 day'");
    let links = sqlx::query!("delete from cvault.portal_links where expires_at < now() - interval '1 day'");
    let challenges = sqlx::query!("delete from cvault.step_up_challenges where expires_at < now() - interval '1 day'");
    let networks = sqlx::query!("delete from cvault.portal_networks where last_seen_at < now() - interval '90 days'");
    let attempts = sqlx::query!("delete from platform.portal_attempts where at < now() - interval '30 days'");
    let mut rows = 0;
    for statement in [sessions, tokens, links, challenges, networks, attempts] {
        rows += statement.execute(sys).await?.rows_affected();
    }
    Ok(rows)
}
