//! Access tokens: JWTs signed with Ed25519 (RFC 8037), so that a tenant can verify one with `/.well-known/jwks.json` and
//! cannot make one. The algorithm is pinned, and a token's header
//! chooses among our keys only.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cvault_types::{ErrorCode, Secret, TenantAdminId, TenantId, UserId};
use jsonwebtoken::{Algorithm, Header, Validation};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::http::Problem;
use crate::keys::{TokenKey, TokenKeys};

/// Seconds a user's access token lives.
pub const ACCESS_SECONDS: u64 = 15 * 60;
/// Seconds an admin token lives.
pub const ADMIN_SECONDS: u64 = 12 * 3600;
/// Seconds by which the clock of another replica, which has signed a token, may be ahead.
const LEEWAY: i64 = 60;
const CLIENT: Audience = Audience { name: "client", seconds: ACCESS_SECONDS };
const PORTAL: Audience = Audience { name: "portal", seconds: ACCESS_SECONDS };
const ADMIN: Audience = Audience { name: "admin", seconds: ADMIN_SECONDS };

/// What a token is for, and how long one lives.
#[derive(Clone, Copy)]
struct Audience {
    name: &'static str,
    seconds: u64,
}

/// When a token counts. None of ours says `nbf`; one that does is taken at its word.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Times {
    iat: i64,
    exp: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nbf: Option<i64>,
}

/// Claims of a user's access token.
#[derive(Debug, Serialize, Deserialize)]
struct ClientClaims {
    iss: String,
    aud: String,
    sub: UserId,
    /// The tenant.
    tid: TenantId,
    /// The refresh family this token was given with.
    sid: Uuid,
    #[serde(flatten)]
    times: Times,
    jti: Uuid,
}

/// Claims of the access token of a portal session.
#[derive(Debug, Serialize, Deserialize)]
struct PortalClaims {
    iss: String,
    aud: String,
    sub: TenantAdminId,
    tid: TenantId,
    /// The session.
    sid: Uuid,
    #[serde(flatten)]
    times: Times,
    jti: Uuid,
}

#[derive(Debug, Serialize, Deserialize)]
struct AdminClaims {
    iss: String,
    aud: String,
    sub: String,
    #[serde(flatten)]
    times: Times,
    jti: Uuid,
}

/// Who a verified access token speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientToken {
    pub tenant: TenantId,
    pub user: UserId,
}

/// A verified access token until its time, or that of its key, is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimedClientToken {
    pub token: ClientToken,
    /// The key that has signed it.
    pub key: [u8; 8],
    /// Seconds since 1970.
    exp: i64,
}

/// The session a verified portal token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortalToken {
    pub tenant: TenantId,
    pub admin: TenantAdminId,
    pub session: Uuid,
}

/// Whose a verified admin token is, and which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminToken {
    pub subject: String,
    pub id: Uuid,
}

/// A token for a tenant's user, valid for [`ACCESS_SECONDS`].
#[must_use]
pub fn mint_client(key: &TokenKey, issuer: &str, who: ClientToken, family: Uuid, now: OffsetDateTime) -> Secret {
    sign(
        key,
        &ClientClaims {
            iss: issuer.to_owned(),
            aud: CLIENT.name.to_owned(),
            sub: who.user,
            tid: who.tenant,
            sid: family,
            times: CLIENT.from(now),
            jti: Uuid::now_v7(),
        },
    )
}

/// A token for a program that uses the portal, valid for [`ACCESS_SECONDS`].
#[must_use]
pub fn mint_portal(key: &TokenKey, issuer: &str, who: PortalToken, now: OffsetDateTime) -> Secret {
    sign(
        key,
        &PortalClaims {
            iss: issuer.to_owned(),
            aud: PORTAL.name.to_owned(),
            sub: who.admin,
            tid: who.tenant,
            sid: who.session,
            times: PORTAL.from(now),
            jti: Uuid::now_v7(),
        },
    )
}

/// A token for platform staff, valid for [`ADMIN_SECONDS`].
#[must_use]
pub fn mint_admin(key: &TokenKey, issuer: &str, subject: &str, now: OffsetDateTime) -> Secret {
    mint_admin_as(key, issuer, subject, Uuid::now_v7(), now)
}

/// As [`mint_admin`], with the id that it can be revoked by.
#[must_use]
pub fn mint_admin_as(key: &TokenKey, issuer: &str, subject: &str, id: Uuid, now: OffsetDateTime) -> Secret {
    sign(
        key,
        &AdminClaims {
            iss: issuer.to_owned(),
            aud: ADMIN.name.to_owned(),
            sub: subject.to_owned(),
            times: ADMIN.from(now),
            jti: id,
        },
    )
}

/// # Errors
/// `INVALID_TOKEN`, or `TOKEN_EXPIRED` for one that was valid once.
pub fn verify_client(
    keys: &TokenKeys,
    issuer: &str,
    token: &str,
    now: OffsetDateTime,
) -> Result<TimedClientToken, Problem> {
    let (claims, key): (ClientClaims, _) = verify(keys, issuer, CLIENT, token)?;
    CLIENT.check(claims.times, now)?;
    let token = ClientToken { tenant: claims.tid, user: claims.sub };
    Ok(TimedClientToken { token, key, exp: claims.times.exp })
}

impl TimedClientToken {
    /// # Errors
    /// `TOKEN_EXPIRED`.
    pub fn at(self, now: OffsetDateTime) -> Result<Self, Problem> {
        not_expired(self.exp, now)?;
        Ok(self)
    }
}

/// Whether the session still lives is for the database to say.
///
/// # Errors
/// As [`verify_client`].
pub fn verify_portal(keys: &TokenKeys, issuer: &str, token: &str, now: OffsetDateTime) -> Result<PortalToken, Problem> {
    let (claims, _): (PortalClaims, _) = verify(keys, issuer, PORTAL, token)?;
    PORTAL.check(claims.times, now)?;
    Ok(PortalToken { tenant: claims.tid, admin: claims.sub, session: claims.sid })
}

/// Whether it was revoked is for the database to say.
///
/// # Errors
/// As [`verify_client`].
pub fn verify_admin(keys: &TokenKeys, issuer: &str, token: &str, now: OffsetDateTime) -> Result<AdminToken, Problem> {
    let (claims, _): (AdminClaims, _) = verify(keys, issuer, ADMIN, token)?;
    ADMIN.check(claims.times, now)?;
    Ok(AdminToken { subject: claims.sub, id: claims.jti })
}

/// A token of any claims; what is no claim of ours is not taken back.
#[must_use]
pub fn sign(key: &TokenKey, claims: &impl Serialize) -> Secret {
    let mut header = Header::new(Algorithm::EdDSA);
    header.kid = Some(key.kid().to_owned());
    Secret::new(jsonwebtoken::encode(&header, claims, key.encoding()).expect("an Ed25519 key signs plain claims"))
}

fn verify<T: DeserializeOwned>(
    keys: &TokenKeys,
    issuer: &str,
    audience: Audience,
    token: &str,
) -> Result<(T, [u8; 8]), Problem> {
    let invalid = || Problem::new(ErrorCode::InvalidToken);
    let kid = named_key(token).ok_or_else(invalid)?;
    let key = keys.named(&kid).ok_or_else(invalid)?;
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.set_issuer(&[issuer]);
    validation.set_audience(&[audience.name]);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    // compared by the caller, with its clock and no leeway
    validation.validate_exp = false;
    let data = jsonwebtoken::decode(token, key.decoding(), &validation).map_err(|_| invalid())?;
    Ok((data.claims, key.id()))
}

/// Which key a token says it was signed with. Its header chooses among ours, and nothing else.
fn named_key(token: &str) -> Option<String> {
    let header = jsonwebtoken::decode_header(token).ok()?;
    header.kid.filter(|_| header.alg == Algorithm::EdDSA)
}

/// Whether a token names a key that looks like one of ours and is not among `keys`.
#[must_use]
pub fn names_a_key_besides(keys: &TokenKeys, token: &str) -> bool {
    let ours = |kid: &String| kid.len() == 16 && kid.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    named_key(token).filter(ours).is_some_and(|kid| keys.named(&kid).is_none())
}

impl Audience {
    fn from(self, now: OffsetDateTime) -> Times {
        let iat = now.unix_timestamp();
        Times { iat, exp: iat + self.seconds.cast_signed(), nbf: None }
    }

    /// Times that no token of ours has are no times.
    fn check(self, times: Times, now: OffsetDateTime) -> Result<(), Problem> {
        let latest = now.unix_timestamp() + LEEWAY;
        let begun = times.iat <= latest && times.nbf.is_none_or(|nbf| nbf <= latest);
        if !begun || times.exp.saturating_sub(times.iat) > self.seconds.cast_signed() {
            return Err(Problem::new(ErrorCode::InvalidToken));
        }
        not_expired(times.exp, now)
    }
}

fn not_expired(exp: i64, now: OffsetDateTime) -> Result<(), Problem> {
    if now.unix_timestamp() < exp { Ok(()) } else { Err(Problem::new(ErrorCode::TokenExpired)) }
}

/// The public keys as a JSON Web Key Set (RFC 7517).
#[must_use]
pub fn jwks(keys: &TokenKeys) -> serde_json::Value {
    let keys = keys.iter().map(|key| {
        serde_json::json!({
            "kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA",
            "kid": key.kid(), "x": URL_SAFE_NO_PAD.encode(key.public()),
        })
    });
    serde_json::json!({"keys": keys.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISSUER: &str = "https://api.example.com";

    fn who() -> ClientToken {
        ClientToken { tenant: TenantId::from_uuid(Uuid::from_u128(1)), user: UserId::from_uuid(Uuid::from_u128(2)) }
    }

    fn at(unix: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(unix).unwrap()
    }

    fn code<T: std::fmt::Debug>(result: Result<T, Problem>) -> ErrorCode {
        result.unwrap_err().code()
    }

    #[test]
    fn a_token_is_valid_for_exactly_its_lifetime() {
        let keys = TokenKeys::from(TokenKey::from_seed(&[1; 32]));
        let key = keys.signing(at(0));
        let token = mint_client(key, ISSUER, who(), Uuid::nil(), at(1_000));
        assert_eq!(verify_client(&keys, ISSUER, token.expose(), at(1_899)).unwrap().token, who());
        assert_eq!(code(verify_client(&keys, ISSUER, token.expose(), at(1_900))), ErrorCode::TokenExpired);
    }

    #[test]
    fn a_token_from_the_future_or_for_longer_than_ours_live_is_refused() {
        let keys = TokenKeys::from(TokenKey::from_seed(&[1; 32]));
        let key = keys.signing(at(0));
        let genuine = serde_json::json!({"iss": ISSUER, "aud": "client", "sub": who().user, "tid": who().tenant,
                                         "sid": Uuid::nil(), "iat": 1_000, "exp": 1_900, "jti": Uuid::nil()});
        let with = |changes: &[(&str, i64)]| {
            let mut claims = genuine.clone();
            for (name, value) in changes {
                claims[*name] = (*value).into();
            }
            verify_client(&keys, ISSUER, sign(key, &claims).expose(), at(1_000)).map_err(|problem| problem.code())
        };
        for good in [&[][..], &[("iat", 1_060)], &[("nbf", 1_060)], &[("nbf", 0)], &[("iat", 1_060), ("exp", 1_960)]] {
            assert_eq!(with(good).unwrap().token, who(), "{good:?}");
        }
        for bad in [
            &[("iat", 1_061)][..],
            &[("nbf", 1_061)],
            &[("exp", 1_901)],
            &[("exp", i64::MAX)],
            &[("iat", i64::MIN)],
            &[("iat", i64::MIN), ("exp", i64::MIN)],
            &[("iat", i64::MAX), ("exp", i64::MAX)],
            &[("iat", 2_000), ("exp", 900)],
        ] {
            assert_eq!(with(bad), Err(ErrorCode::InvalidToken), "{bad:?}");
        }
        assert_eq!(with(&[("exp", 1_000)]), Err(ErrorCode::TokenExpired));
    }

    #[test]
    fn another_key_issuer_or_audience_is_refused() {
        let keys = TokenKeys::from(TokenKey::from_seed(&[1; 32]));
        let key = keys.signing(at(0));
        let token = mint_client(key, ISSUER, who(), Uuid::nil(), at(1_000));
        let other = TokenKeys::from(TokenKey::from_seed(&[2; 32]));
        assert_eq!(code(verify_client(&other, ISSUER, token.expose(), at(1_001))), ErrorCode::InvalidToken);
        assert_eq!(code(verify_client(&keys, "https://evil", token.expose(), at(1_001))), ErrorCode::InvalidToken);
        assert_eq!(code(verify_admin(&keys, ISSUER, token.expose(), at(1_001))), ErrorCode::InvalidToken);
        let admin = mint_admin(key, ISSUER, "ops", at(1_000));
        assert_eq!(code(verify_client(&keys, ISSUER, admin.expose(), at(1_001))), ErrorCode::InvalidToken);
        assert_eq!(verify_admin(&keys, ISSUER, admin.expose(), at(1_001)).unwrap().subject, "ops");
    }

    #[test]
    fn a_token_that_chooses_its_own_algorithm_is_refused() {
        let keys = TokenKeys::from(TokenKey::from_seed(&[1; 32]));
        let key = keys.signing(at(0));
        let token = mint_client(key, ISSUER, who(), Uuid::nil(), at(1_000));
        let (_, rest) = token.expose().split_once('.').unwrap();
        for alg in ["none", "HS256", "EdDSA"] {
            let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{alg}","kid":"{}"}}"#, key.kid()));
            let forged = format!("{header}.{rest}");
            assert_eq!(code(verify_client(&keys, ISSUER, &forged, at(1_001))), ErrorCode::InvalidToken, "{alg}");
        }
        // the public key as an HMAC secret
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some(key.kid().to_owned());
        let claims = serde_json::json!({"iss": ISSUER, "aud": "admin", "sub": "x", "iat": 1, "exp": 9_999_999_999_i64, "jti": Uuid::nil()});
        let forged =
            jsonwebtoken::encode(&header, &claims, &jsonwebtoken::EncodingKey::from_secret(key.public())).unwrap();
        assert_eq!(code(verify_admin(&keys, ISSUER, &forged, at(1_001))), ErrorCode::InvalidToken);
    }

    #[test]
    fn damaged_tokens_are_refused() {
        let keys = TokenKeys::from(TokenKey::from_seed(&[1; 32]));
        let key = keys.signing(at(0));
        let token = mint_client(key, ISSUER, who(), Uuid::nil(), at(1_000));
        for text in ["", ".", "..", "a.b.c", "ey", &token.expose()[1..], &token.expose()[..token.expose().len() - 1]] {
            assert_eq!(code(verify_client(&keys, ISSUER, text, at(1_001))), ErrorCode::InvalidToken, "{text}");
        }
    }
}
