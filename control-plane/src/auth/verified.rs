//! Access tokens that were verified, remembered: verifying a signature is the dearest thing that a read does outside of the
//! database, and a client shows the same token for a quarter of an hour. A token is pure: nothing revokes one before its time but the end of the
//! key that has signed it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

use super::tokens::{self, ClientToken, TimedClientToken};
use crate::http::Problem;
use crate::keys::TokenKeys;

/// About 100 bytes each.
const MAX_TOKENS: usize = 65_536;

/// One for the process.
#[derive(Debug, Default)]
pub struct VerifiedTokens {
    known: Mutex<HashMap<[u8; 32], TimedClientToken>>,
}

impl VerifiedTokens {
    /// Whom a user's access token speaks for.
    ///
    /// # Errors
    /// As [`tokens::verify_client`].
    pub fn client(
        &self,
        keys: &TokenKeys,
        issuer: &str,
        token: &str,
        now: OffsetDateTime,
    ) -> Result<ClientToken, Problem> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).copied();
        if let Some(known) = known.filter(|known| keys.has(known.key)) {
            return Ok(known.at(now)?.token);
        }
        let verified = tokens::verify_client(keys, issuer, token, now)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_TOKENS {
            known.retain(|_, token| token.at(now).is_ok());
            if known.len() >= MAX_TOKENS {
                known.clear();
            }
        }
        known.insert(digest, verified);
        Ok(verified.token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::TokenKey;
    use cvault_types::{ErrorCode, TenantId, UserId};
    use uuid::Uuid;

    #[test]
    fn a_token_that_is_remembered_expires_like_any_other_and_a_changed_one_is_not_it() {
        let (keys, tokens) = (TokenKeys::from(TokenKey::from_seed(&[1; 32])), VerifiedTokens::default());
        let who = ClientToken { tenant: TenantId::from_uuid(Uuid::nil()), user: UserId::from_uuid(Uuid::max()) };
        let at = |unix| OffsetDateTime::from_unix_timestamp(unix).unwrap();
        let token = tokens::mint_client(keys.signing(at(0)), "https://a", who, Uuid::nil(), at(1_000));
        for _ in 0..2 {
            assert_eq!(tokens.client(&keys, "https://a", token.expose(), at(1_899)).unwrap(), who);
        }
        let late = tokens.client(&keys, "https://a", token.expose(), at(1_900)).unwrap_err();
        assert_eq!(late.code(), ErrorCode::TokenExpired);
        let changed = format!("{}A", token.expose());
        assert_eq!(tokens.client(&keys, "https://a", &changed, at(1_001)).unwrap_err().code(), ErrorCode::InvalidToken);
        assert_eq!(tokens.known.lock().unwrap().len(), 1);
        let others = TokenKeys::from(TokenKey::from_seed(&[2; 32]));
        let ended = tokens.client(&others, "https://a", token.expose(), at(1_001)).unwrap_err();
        assert_eq!(ended.code(), ErrorCode::InvalidToken, "its key has ended");
    }
}
