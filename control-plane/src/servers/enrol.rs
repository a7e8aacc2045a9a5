//! Enrolment: a single-use token becomes a server's pinned identity, in one UPDATE. A lost answer may be asked for again
//! with the same key, never with another.

use cvault_node_protocol::tls::Pin;
use cvault_node_protocol::token::EnrolToken;
use cvault_types::ServerId;
use rand::CryptoRng;
use sqlx::{PgExecutor, PgPool};
use uuid::Uuid;

use crate::db::DbError;

/// Long enough to paste it into a terminal of a new machine (design/node.md).
pub const TOKEN_LIFETIME_SECONDS: u32 = 3600;

#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// Unknown, expired, used by another key, or of a removed server: one answer for all.
    #[error("the enrolment token is unknown, expired or used")]
    Refused,
    #[error("this agent's key is the identity of another server already")]
    IdentityInUse,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// The server a token was made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    pub id: ServerId,
    pub name: String,
}

/// Draws a token for a server; its text is shown once and not stored. `None` when there is no such server.
///
/// # Errors
/// Those of the database.
pub async fn issue_token(
    sys: impl PgExecutor<'_>,
    server: ServerId,
    control_plane: Pin,
    rng: &mut (impl CryptoRng + Send),
) -> Result<Option<EnrolToken>, DbError> {
    let mut secret = [0; 32];
    rng.fill_bytes(&mut secret);
    let token = EnrolToken::new(Uuid::now_v7(), secret, control_plane);
    let hash = token.secret_hash();
    let made = sqlx::query!(
        "insert into platform.enrol_tokens (token_id, server_id, secret_hash, expires_at)
         select $1, server_id, $3, now() + make_interval(secs => $4)
         from platform.servers where server_id = $2 and status <> 'removed'",
        token.id,
        server.uuid(),
        hash.as_slice(),
        f64::from(TOKEN_LIFETIME_SECONDS),
    )
    .execute(sys)
    .await?;
    Ok((made.rows_affected() == 1).then_some(token))
}

/// What a new machine runs. It reads the token from its standard input: what stands in an argument, every user of a
/// machine can see.
#[must_use]
pub fn enrol_command(node_endpoint: &str) -> String {
    format!("cvault-node-agent enroll --control-plane {node_endpoint} --token -")
}

/// Consumes a token: the key with `pin` becomes the server's identity, `wireguard_key` its public key.
///
/// # Errors
/// By variant; nothing is changed then.
pub async fn consume_token(
    sys: &PgPool,
    token: &EnrolToken,
    pin: Pin,
    wireguard_key: &[u8; 32],
) -> Result<Enrolled, EnrolError> {
    let hash = token.secret_hash();
    let server = sqlx::query!(
        r#"with used as (
               update platform.enrol_tokens
               set used_at = coalesce(used_at, now()), used_pin = $3
               where token_id = $1 and secret_hash = $2 and expires_at > now() and (used_at is null or used_pin = $3)
               returning server_id
           )
           update platform.servers s
           set identity_pin = $3, public_key = $4
           from used
           where s.server_id = used.server_id and s.status <> 'removed'
           returning s.server_id, s.name"#,
        token.id,
        hash.as_slice(),
        pin.as_bytes().as_slice(),
        wireguard_key.as_slice(),
    )
    .fetch_optional(sys)
    .await
    .map_err(|error| {
        let error = DbError::from(error);
        match error.constraint() {
            Some("servers_identity_pin_unique") => EnrolError::IdentityInUse,
            Some(_) | None => EnrolError::Db(error),
        }
    })?
    .ok_or(EnrolError::Refused)?;
    Ok(Enrolled { id: ServerId::from_uuid(server.server_id), name: server.name })
}
