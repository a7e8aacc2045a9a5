//! The enrolment token: `cvj1.<token id>.<secret>.<pin>.<crc>`.
//!
//! It carries the control plane's pinned key, so that enrolment needs no public certificate authority. Only the
//! SHA-256 of the secret is stored. Parts are hex, so that the token survives shells, mails and chat programs.

use std::fmt;
use zeroize::Zeroizing;

use crate::tls::Pin;

/// A parsed enrolment token. `Debug` never shows the secret.
#[derive(Clone)]
pub struct EnrolToken {
    pub id: uuid::Uuid,
    secret: Zeroizing<[u8; 32]>,
    /// SHA-256 of the control plane's SubjectPublicKeyInfo.
    pub control_plane_pin: Pin,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    #[error("an enrolment token begins with `cvj1.` and has five parts separated by dots")]
    Shape,
    #[error("the enrolment token is damaged (its check sum does not match): copy it again, whole")]
    Checksum,
}

impl EnrolToken {
    #[must_use]
    pub fn new(id: uuid::Uuid, secret: [u8; 32], control_plane_pin: Pin) -> Self {
        Self { id, secret: Zeroizing::new(secret), control_plane_pin }
    }

    /// SHA-256 of the secret: what the database stores and compares.
    #[must_use]
    pub fn secret_hash(&self) -> [u8; 32] {
        use sha2::Digest;
        sha2::Sha256::digest(*self.secret).into()
    }

    /// The token's text. The only place where the secret becomes printable.
    #[must_use]
    pub fn expose(&self) -> Zeroizing<String> {
        let body = format!(
            "cvj1.{}.{}.{}",
            self.id.simple(),
            hex::encode(*self.secret),
            hex::encode(self.control_plane_pin.as_bytes())
        );
        let crc = crc32fast::hash(body.as_bytes());
        Zeroizing::new(format!("{body}.{crc:08x}"))
    }

    /// # Errors
    /// [`TokenError::Shape`] for anything that is not a token, [`TokenError::Checksum`] for a damaged one.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let (body, crc) = text.trim().rsplit_once('.').ok_or(TokenError::Shape)?;
        let mut parts = body.split('.');
        let (Some("cvj1"), Some(id), Some(secret), Some(pin), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Shape);
        };
        if format!("{:08x}", crc32fast::hash(body.as_bytes())) != crc {
            return Err(TokenError::Checksum);
        }
        let mut bytes = Zeroizing::new([0; 32]);
        hex::decode_to_slice(secret, bytes.as_mut()).map_err(|_| TokenError::Shape)?;
        let mut pinned = [0; 32];
        hex::decode_to_slice(pin, &mut pinned).map_err(|_| TokenError::Shape)?;
        Ok(Self {
            id: uuid::Uuid::try_parse(id).map_err(|_| TokenError::Shape)?,
            secret: bytes,
            control_plane_pin: Pin::from_bytes(pinned),
        })
    }
}

impl fmt::Debug for EnrolToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrolToken").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> EnrolToken {
        EnrolToken::new(uuid::Uuid::from_u128(5), [3; 32], Pin::from_bytes([4; 32]))
    }

    #[test]
    fn a_token_survives_its_text_form() {
        let parsed = EnrolToken::parse(&token().expose()).unwrap();
        assert_eq!(parsed.secret_hash(), token().secret_hash());
        assert_eq!((parsed.id, parsed.control_plane_pin), (token().id, token().control_plane_pin));
    }

    #[test]
    fn a_mistyped_token_is_named_as_damaged() {
        let text = token().expose().replace("0303", "0304");
        assert_eq!(EnrolToken::parse(&text).unwrap_err(), TokenError::Checksum);
        assert_eq!(EnrolToken::parse("hello").unwrap_err(), TokenError::Shape);
    }

    #[test]
    fn debug_output_does_not_contain_the_secret() {
        assert!(!format!("{:?}", token()).contains("0303"));
    }
}
