//! What a client may say of its device, parsed once at the edge. None of it ever becomes a line of a configuration.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::text::misleads;

/// 1 to 255 characters that a terminal, a log or a table cannot misread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceName(String);

/// The kind of device in the client's words: `[a-z0-9][a-z0-9._-]{0,31}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform(String);

/// A WireGuard public key that a handshake can be done with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

/// Why a text is not one of these; the sentence is for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub code: &'static str,
    pub detail: &'static str,
}

impl DeviceName {
    /// # Errors
    /// A fault for the caller.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let length = text.chars().count();
        if text.trim().is_empty() {
            Err(Fault { code: "too_short", detail: "must not be empty" })
        } else if length > 255 {
            Err(Fault { code: "too_long", detail: "must have at most 255 characters" })
        } else if misleads(text) {
            Err(Fault {
                code: "invalid_format",
                detail: "must not contain line breaks, control characters or marks that change the direction of text",
            })
        } else {
            Ok(Self(text.trim().to_owned()))
        }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Platform {
    /// # Errors
    /// A fault for the caller.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        let starts = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if starts && text.len() <= 32 && text.bytes().all(inner) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Fault {
                code: "invalid_format",
                detail: "must be 1 to 32 lower-case letters, digits, dots, underscores or dashes",
            })
        }
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a text can be the name of a region.
#[must_use]
pub fn is_region(text: &str) -> bool {
    let starts = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    starts && text.len() <= 50 && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

impl PublicKey {
    /// Base64 of 32 bytes, as `wg pubkey` prints it.
    ///
    /// # Errors
    /// A fault for the caller.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let fault = Fault { code: "invalid_format", detail: "must be a WireGuard public key: base64 of 32 bytes" };
        let bytes: [u8; 32] = STANDARD.decode(text).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(fault)?;
        // points of small order give the same shared secret with every key: no handshake can succeed
        let probe = x25519_dalek::StaticSecret::from([0x42; 32]);
        let shared = probe.diffie_hellman(&x25519_dalek::PublicKey::from(bytes));
        if shared.was_contributory() { Ok(Self(bytes)) } else { Err(fault) }
    }

    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Display for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_script_are_taken_and_misleading_ones_refused() {
        for name in ["MacBook Pro", "Ноутбук", "老师的电脑", "O'Brien <x> \"y\" #1 %s ${z}", "é", "📱"] {
            assert!(DeviceName::parse(name).is_ok(), "{name}");
        }
        for name in ["", "  ", "a\nPostUp = reboot", "a\r", "a\0", "\u{202e}gpj", "a\u{2028}b", "\u{feff}a", "x\u{7}"] {
            assert!(DeviceName::parse(name).is_err(), "{name:?}");
        }
        assert!(DeviceName::parse(&"x".repeat(255)).is_ok());
        assert_eq!(DeviceName::parse(&"x".repeat(256)).unwrap_err().code, "too_long");
    }

    #[test]
    fn a_key_nobody_can_shake_hands_with_is_refused() {
        let zero = STANDARD.encode([0; 32]);
        let one = STANDARD.encode([1u8].into_iter().chain([0; 31]).collect::<Vec<_>>());
        for text in [zero.as_str(), one.as_str(), "short", "", &STANDARD.encode([9; 31])] {
            assert!(PublicKey::parse(text).is_err(), "{text}");
        }
        let text = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        assert_eq!(PublicKey::parse(text).unwrap().to_string(), text);
    }
}
