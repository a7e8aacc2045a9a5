//! Random credentials as text: a prefix, hexadecimal digits, and a CRC-32 that tells a mistyped one without a look into
//! the database. `cvk_` API key (160 bits), `cvs_` API secret (256), `cvr_` refresh token (256), `cvb_` portal
//! session of a browser (256), `cvl_` mailed link (256), `cvc_` answered challenge (256).

use cvault_types::Secret;
use rand::CryptoRng;
use zeroize::Zeroizing;

/// A kind of credential.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub prefix: &'static str,
    pub bytes: usize,
}

pub const API_KEY: Kind = Kind { prefix: "cvk_", bytes: 20 };
pub const API_SECRET: Kind = Kind { prefix: "cvs_", bytes: 32 };
pub const REFRESH_TOKEN: Kind = Kind { prefix: "cvr_", bytes: 32 };
pub const SESSION_COOKIE: Kind = Kind { prefix: "cvb_", bytes: 32 };
pub const LINK: Kind = Kind { prefix: "cvl_", bytes: 32 };
pub const CHALLENGE_TOKEN: Kind = Kind { prefix: "cvc_", bytes: 32 };

impl Kind {
    /// Draws a new one.
    pub fn draw(self, rng: &mut impl CryptoRng) -> Secret {
        let mut bytes = Zeroizing::new(vec![0; self.bytes]);
        rng.fill_bytes(&mut bytes);
        let body = Zeroizing::new(hex::encode(&*bytes));
        Secret::new(format!("{}{}{:08x}", self.prefix, *body, crc32fast::hash(body.as_bytes())))
    }

    /// Whether `text` can be one at all.
    #[must_use]
    pub fn is_well_formed(self, text: &str) -> bool {
        let Some(rest) = text.strip_prefix(self.prefix) else { return false };
        rest.len() == self.bytes * 2 + 8
            && rest.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
            && rest
                .split_at_checked(self.bytes * 2)
                .is_some_and(|(body, sum)| format!("{:08x}", crc32fast::hash(body.as_bytes())) == sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_drawn_key_is_well_formed_and_a_mistyped_one_is_not() {
        let key = API_KEY.draw(&mut rand::rng());
        assert!(API_KEY.is_well_formed(key.expose()) && !API_SECRET.is_well_formed(key.expose()));
        let mistyped = key.expose().replacen(|c: char| c.is_ascii_digit(), "x", 1);
        assert!(!API_KEY.is_well_formed(&mistyped));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_check_panic(text in "\\PC{0,80}") {
            let _ = API_KEY.is_well_formed(&format!("cvk_{text}"));
        }
    }
}
