//! Typed, prefixed identifiers: UUIDs inside, `dev_01hgw2…` outside.
//!
//! The text is a prefix and 26 digits of Crockford base32 (the alphabet of ULIDs: no i, l, o, u), lower case when
//! written, either case when read. UUIDv7 makes it sort by time of creation.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const DIGITS: usize = 26;
const PREFIX: usize = 3;

/// A text that is not an identifier of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be an id of the form {expected}_ followed by 26 characters of Crockford base32")]
pub struct IdError {
    pub expected: &'static str,
}

/// Prefix, underscore and digits.
struct Text([u8; PREFIX + 1 + DIGITS]);

impl Text {
    fn new(prefix: [u8; PREFIX], value: u128) -> Self {
        let mut text = [b'_'; PREFIX + 1 + DIGITS];
        text[..PREFIX].copy_from_slice(&prefix);
        let mut rest = value;
        for digit in text[PREFIX + 1..].iter_mut().rev() {
            *digit = ALPHABET[(rest & 31) as usize];
            rest >>= 5;
        }
        Self(text)
    }

    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("prefixes and the alphabet are ASCII")
    }
}

fn decode(text: &str) -> Option<u128> {
    if text.len() != DIGITS {
        return None;
    }
    text.bytes().try_fold(0u128, |value, byte| {
        let digit = ALPHABET.iter().position(|letter| *letter == byte.to_ascii_lowercase())?;
        // The first of 26 digits carries 3 bits: 128 = 25 · 5 + 3.
        value.checked_mul(32)?.checked_add(digit as u128)
    })
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal;)+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Uuid);

        impl $name {
            pub const PREFIX: &'static str = $prefix;

            #[must_use]
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            #[must_use]
            pub const fn uuid(self) -> Uuid {
                self.0
            }

            fn text(self) -> Text {
                const LETTERS: [u8; PREFIX] = match $prefix.as_bytes() {
                    [a, b, c] => [*a, *b, *c],
                    _ => panic!("a prefix has three letters"),
                };
                Text::new(LETTERS, self.0.as_u128())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.text().as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                text.strip_prefix(concat!($prefix, "_"))
                    .and_then(decode)
                    .map(|value| Self(Uuid::from_u128(value)))
                    .ok_or(IdError { expected: $prefix })
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.text().as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .pattern(Some(concat!("^", $prefix, "_[0-9a-hjkmnp-tv-z]{26}$")))
                    .examples([concat!($prefix, "_01kaz3r6e8f4s9w2v5m7n0q1tb")])
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {}
    )+};
}

ids! {
    /// A business customer.
    TenantId = "ten";
    /// An end user of a tenant.
    UserId = "usr";
    /// A user's device: one WireGuard peer.
    DeviceId = "dev";
    /// A WireGuard server of the shared pool.
    ServerId = "srv";
    /// One connection of a device, from connect or first handshake to disconnect or silence.
    SessionId = "ses";
    /// An API key of a tenant.
    ApiKeyId = "key";
    /// A person of a tenant who uses the portal.
    TenantAdminId = "adm";
    /// A login of such a person.
    PortalSessionId = "pss";
    /// A step-up challenge.
    ChallengeId = "chl";
    /// An address pool.
    PoolId = "pol";
    /// One entry of the audit log.
    AuditId = "aud";
    /// One HTTP request, as answered in `X-Request-Id`.
    RequestId = "req";
    /// A mail on its way, or given up.
    MailId = "eml";
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_text_of_a_known_id_never_changes() {
        let id = DeviceId::from_uuid(Uuid::from_u128(0x0192_0000_0000_7000_8000_0000_0000_0001));
        assert_eq!(id.to_string(), "dev_01j8000000e008000000000001");
    }

    #[test]
    fn an_id_of_another_kind_is_refused() {
        let user = UserId::from_uuid(Uuid::from_u128(7)).to_string();
        assert_eq!(user.parse::<DeviceId>(), Err(IdError { expected: "dev" }));
    }

    #[test]
    fn a_value_past_128_bits_is_refused() {
        assert!(format!("dev_{}", "z".repeat(26)).parse::<DeviceId>().is_err());
    }

    proptest! {
        #[test]
        fn every_id_survives_its_text(value: u128) {
            let id = DeviceId::from_uuid(Uuid::from_u128(value));
            prop_assert_eq!(id.to_string().parse::<DeviceId>(), Ok(id));
            prop_assert_eq!(id.to_string().to_uppercase().replace("DEV_", "dev_").parse::<DeviceId>(), Ok(id));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,40}") {
            let _ = text.parse::<DeviceId>();
            let _ = format!("dev_{text}").parse::<DeviceId>();
        }
    }
}
