//! The people of a tenant who manage it: their accounts, their logins, and the links that are mailed to them.
//!
//! An account is found by its address before its tenant is known, with role `cvault_sys`, which sees no password; everything
//! else happens inside the tenant's own transaction. Team management and second factors have their place here.

pub mod accounts;
pub mod attempts;
pub mod email;
pub mod links;
pub mod recovery;
pub mod sessions;
pub mod signup;

use sqlx::PgConnection;

/// Forgets a batch of each: sessions, tokens, links and challenges that are past use, attempts and networks of long ago.
/// With role `cvault_sys`.
pub(crate) async fn trim(conn: &mut PgConnection, batch: i64) -> Result<u64, sqlx::Error> {
    let statements = [
        // a session takes its tokens and challenges with it
        sqlx::query!(
            "delete from cvault.portal_sessions s
             using (select tenant_id, session_id from cvault.portal_sessions
                    where expires_at < now() - interval '30 days' limit $1) old
             where s.tenant_id = old.tenant_id and s.session_id = old.session_id",
            batch
        ),
        sqlx::query!(
            "delete from cvault.portal_refresh_tokens r
             using (select tenant_id, token_hash from cvault.portal_refresh_tokens
                    where expires_at < now() - interval '1 day' limit $1) old
             where r.tenant_id = old.tenant_id and r.token_hash = old.token_hash",
            batch
        ),
        sqlx::query!(
            "delete from cvault.portal_links l
             using (select tenant_id, token_hash from cvault.portal_links
                    where expires_at < now() - interval '1 day' limit $1) old
             where l.tenant_id = old.tenant_id and l.token_hash = old.token_hash",
            batch
        ),
        sqlx::query!(
            "delete from cvault.step_up_challenges c
             using (select tenant_id, challenge_id from cvault.step_up_challenges
                    where expires_at < now() - interval '1 day' limit $1) old
             where c.tenant_id = old.tenant_id and c.challenge_id = old.challenge_id",
            batch
        ),
        sqlx::query!(
            "delete from cvault.portal_networks n
             using (select tenant_id, admin_id, network from cvault.portal_networks
                    where last_seen_at < now() - interval '90 days' limit $1) old
             where n.tenant_id = old.tenant_id and n.admin_id = old.admin_id and n.network = old.network",
            batch
        ),
        sqlx::query!(
            "delete from platform.portal_attempts p
             using (select attempt_id from platform.portal_attempts where at < now() - interval '30 days' limit $1) old
             where p.attempt_id = old.attempt_id",
            batch
        ),
    ];
    let mut rows = 0;
    for statement in statements {
        rows += statement.execute(&mut *conn).await?.rows_affected();
    }
    Ok(rows)
}
