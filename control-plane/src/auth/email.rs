//! E-mail addresses: lower case, one `@`, a domain with a dot. What a mail server would say is for the mail server.

/// A checked, lower-cased address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // RFC 5321 §4.5.3.1: 64 octets before the @, 254 in all. Beyond ASCII (RFC 6531) is refused, because two
        // spellings of one address would be two users.
        let (local, domain) = text.rsplit_once('@')?;
        let local_ok = (1..=64).contains(&local.len())
            && !local.starts_with('.')
            && !local.ends_with('.')
            && !local.contains("..")
            && local.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~.".contains(&b));
        let label_ok = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        let domain_ok = domain.contains('.') && domain.split('.').all(label_ok);
        (local_ok && domain_ok && text.len() <= 254).then(|| Self(text.to_ascii_lowercase()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn usual_addresses_are_taken_and_lower_cased() {
        assert_eq!(Email::parse("Ada.Lovelace+vpn@Example.CO.uk").unwrap().as_str(), "ada.lovelace+vpn@example.co.uk");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "@",
            "a@",
            "@b.c",
            "a@b",
            "a b@c.de",
            " a@b.de",
            "a@b.de\n",
            "a@b@c.de",
            "a@-b.de",
            "a@b..de",
            ".a@b.de",
            "ü@b.de",
            "a@b.d\u{e9}",
            "a@[127.0.0.1]",
            "\"a\"@b.de",
            "a@b.de\0",
        ] {
            assert!(Email::parse(text).is_none(), "{text:?}");
        }
        assert!(Email::parse(&format!("{}@example.com", "a".repeat(65))).is_none());
        assert!(Email::parse(&format!("a@{}.com", "b.".repeat(130))).is_none());
    }

    #[test]
    fn an_address_has_up_to_254_octets_64_of_them_before_the_at() {
        let local = "l".repeat(64);
        let address = |local: &str, domain: usize| {
            let label = "d".repeat(62);
            format!("{local}@{label}.{label}.{}", "d".repeat(domain - 126))
        };
        for (text, length, taken) in [
            (address(&local, 188), 253, true),
            (address(&local, 189), 254, true),
            // only the whole is too long: no label is
            (format!("{local}@d.{}.{}.{}", "d".repeat(62), "d".repeat(62), "d".repeat(62)), 255, false),
            (address(&local[1..], 189), 253, true),
            (format!("l{}", address(&local, 180)), 246, false),
        ] {
            assert_eq!((text.len(), Email::parse(&text).is_some()), (length, taken), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_parsed_address_parses_to_itself(text in "[A-Za-z0-9.+_@-]{0,40}") {
            if let Some(email) = Email::parse(&text) {
                prop_assert_eq!(Email::parse(email.as_str()), Some(email.clone()));
            }
        }
    }
}
