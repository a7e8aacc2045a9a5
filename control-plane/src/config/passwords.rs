//! How passwords are hashed: CVAULT_PASSWORD_HASH and its costs.

use super::Reader;
use crate::auth::passwords::{MAX_MEMORY_KIB, MAX_PASSES, Scheme};

impl Reader<'_> {
    pub(super) fn passwords(&mut self) -> Scheme {
        // below 10 a stolen table is cheap to guess in; above 15 a login takes seconds
        let cost = self.number("CVAULT_BCRYPT_COST", 10, 15);
        let memory_kib = self.number("CVAULT_ARGON2_MEMORY_KIB", 7_168, MAX_MEMORY_KIB);
        let passes = self.number("CVAULT_ARGON2_PASSES", 1, MAX_PASSES);
        match self.text("CVAULT_PASSWORD_HASH").as_str() {
            "bcrypt" => Scheme::Bcrypt { cost },
            "argon2id" => Scheme::Argon2id { memory_kib, passes },
            _ => {
                self.fault("CVAULT_PASSWORD_HASH must be `bcrypt` or `argon2id`.");
                Scheme::default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Overrides};

    fn read(pairs: &[(&str, &str)]) -> Result<Scheme, Vec<String>> {
        let lookup = |name: &str| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Config::from_env(&lookup, &Overrides::default()).map(|config| config.passwords).map_err(|faults| faults.0)
    }

    #[test]
    fn bcrypt_at_cost_12_is_what_nobody_has_to_ask_for() {
        assert_eq!(read(&[]).unwrap(), Scheme::Bcrypt { cost: 12 });
        assert_eq!(read(&[]).unwrap(), Scheme::default());
        assert_eq!(
            read(&[("CVAULT_PASSWORD_HASH", "argon2id")]).unwrap(),
            Scheme::Argon2id { memory_kib: 7_168, passes: 5 }
        );
    }

    #[test]
    fn costs_out_of_bounds_are_refused() {
        for (name, value) in [
            ("CVAULT_PASSWORD_HASH", "md5"),
            ("CVAULT_BCRYPT_COST", "4"),
            ("CVAULT_BCRYPT_COST", "31"),
            ("CVAULT_ARGON2_MEMORY_KIB", "64"),
            ("CVAULT_ARGON2_MEMORY_KIB", "4194304"),
            ("CVAULT_ARGON2_PASSES", "0"),
        ] {
            assert!(read(&[(name, value)]).unwrap_err()[0].starts_with(name), "{name}={value}");
        }
    }
}
