//! How mails leave: CVAULT_SMTP_*, CVAULT_MAIL_*.

use std::path::PathBuf;

use cvault_types::Secret;
use lettre::message::Mailbox;
use zeroize::Zeroizing;

use super::{Reader, read_private};
use crate::mail::{Sink, Smtp, SmtpTls};

/// Where mails go, and whom they are from.
#[derive(Debug, Clone)]
pub struct MailConfig {
    pub from: Mailbox,
    pub sink: Sink,
}

impl Reader<'_> {
    /// `public_host` greets mail servers, unless something else is told.
    pub(super) fn mail(&mut self, public_host: &str) -> MailConfig {
        let from = self.mail_from(public_host);
        let directory = (self.lookup)("CVAULT_MAIL_DIR").map(PathBuf::from);
        let sink = match ((self.lookup)("CVAULT_SMTP_URL"), directory) {
            (Some(_), Some(_)) => {
                self.fault("CVAULT_SMTP_URL and CVAULT_MAIL_DIR are both set; keep one.");
                Sink::Unset
            }
            (Some(url), None) => self.smtp(&url, public_host).map_or(Sink::Unset, Sink::Smtp),
            (None, Some(directory)) if directory.is_dir() => Sink::Directory(directory),
            (None, Some(directory)) => {
                self.fault(format!("CVAULT_MAIL_DIR names {}, which is no directory.", directory.display()));
                Sink::Unset
            }
            (None, None) => Sink::Unset,
        };
        MailConfig { from, sink }
    }

    fn mail_from(&mut self, public_host: &str) -> Mailbox {
        let fallback: Mailbox = "CVault <no-reply@localhost.localdomain>".parse().expect("a constant mailbox");
        let told = (self.lookup)("CVAULT_MAIL_FROM");
        if told.is_none() && (self.lookup)("CVAULT_SMTP_URL").is_some() {
            self.fault(
                "CVAULT_MAIL_FROM is not set; mail servers want a sender, such as CVault <no-reply@example.com>.",
            );
        }
        match told {
            None => format!("CVault <no-reply@{public_host}>").parse().unwrap_or(fallback),
            Some(text) => text.parse().unwrap_or_else(|_| {
                self.fault("CVAULT_MAIL_FROM must be an address, such as CVault <no-reply@example.com>.");
                fallback
            }),
        }
    }

    fn smtp(&mut self, url: &str, public_host: &str) -> Option<Smtp> {
        let Some((tls, host, port)) = parse_url(url) else {
            self.fault(
                "CVAULT_SMTP_URL must be smtps://host[:465] (TLS), smtp://host[:587] (STARTTLS) or \
                 smtp+plain://host[:25] (no TLS), without a name or password in it.",
            );
            return None;
        };
        let credentials = self.smtp_credentials()?;
        if tls == SmtpTls::None && credentials.is_some() && !is_loopback(&host) {
            self.fault("CVAULT_SMTP_URL: smtp+plain:// would send the password in clear; use smtps:// or smtp://.");
            return None;
        }
        let ca = match (self.lookup)("CVAULT_SMTP_CA_FILE").map(|path| (std::fs::read(&path), path)) {
            None => None,
            Some((Ok(pem), _)) => Some(pem),
            Some((Err(error), path)) => {
                self.fault(format!("CVAULT_SMTP_CA_FILE names {path}, which cannot be read ({error})."));
                return None;
            }
        };
        let smtp = Smtp { host, port, tls, credentials, ca, hello: public_host.to_owned() };
        if let Err(error) = smtp.transport() {
            self.fault(format!("CVAULT_SMTP_CA_FILE or the host of CVAULT_SMTP_URL cannot be used for TLS ({error})."));
            return None;
        }
        Some(smtp)
    }

    /// `None` after a fault; `Some(None)` without any.
    #[expect(clippy::option_option, reason = "a fault has been noted, or there are none: nobody else sees it")]
    fn smtp_credentials(&mut self) -> Option<Option<(String, Secret)>> {
        let password = match ((self.lookup)("CVAULT_SMTP_PASSWORD_FILE"), (self.lookup)("CVAULT_SMTP_PASSWORD")) {
            (Some(_), Some(_)) => {
                self.fault("CVAULT_SMTP_PASSWORD_FILE and CVAULT_SMTP_PASSWORD are both set; keep one.");
                return None;
            }
            (Some(path), None) => match read_private(&path) {
                Ok(text) => Some(Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned())),
                Err(sentence) => {
                    self.fault(format!("CVAULT_SMTP_PASSWORD_FILE {sentence}"));
                    return None;
                }
            },
            (None, Some(text)) => Some(Zeroizing::new(text)),
            (None, None) => None,
        };
        match ((self.lookup)("CVAULT_SMTP_USER"), password) {
            (Some(user), Some(password)) => Some(Some((user, Secret::new(password.as_str())))),
            (None, None) => Some(None),
            _ => {
                self.fault("CVAULT_SMTP_USER and its password (CVAULT_SMTP_PASSWORD_FILE or CVAULT_SMTP_PASSWORD) go together.");
                None
            }
        }
    }
}

fn parse_url(url: &str) -> Option<(SmtpTls, String, u16)> {
    let (scheme, rest) = url.split_once("://")?;
    let (tls, default_port) = match scheme {
        "smtps" => (SmtpTls::Wrapped, 465),
        "smtp" => (SmtpTls::StartTls, 587),
        "smtp+plain" => (SmtpTls::None, 25),
        _ => return None,
    };
    let authority: http::uri::Authority = rest.trim_end_matches('/').parse().ok()?;
    if authority.as_str().contains('@') || authority.host().is_empty() {
        return None;
    }
    let port = match authority.port_u16() {
        Some(port) => port,
        None if authority.as_str() == authority.host() => default_port,
        None => return None,
    };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    Some((tls, host, port))
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Faults, Overrides};

    fn read(pairs: &[(&str, &str)]) -> Result<MailConfig, Vec<String>> {
        let lookup = |name: &str| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Config::from_env(&lookup, &Overrides::default()).map(|config| config.mail).map_err(|Faults(faults)| faults)
    }

    #[test]
    fn the_scheme_says_how_the_way_is_protected() {
        assert_eq!(parse_url("smtps://mx.example.com"), Some((SmtpTls::Wrapped, "mx.example.com".to_owned(), 465)));
        assert_eq!(
            parse_url("smtp://mx.example.com:2525"),
            Some((SmtpTls::StartTls, "mx.example.com".to_owned(), 2525))
        );
        assert_eq!(parse_url("smtp+plain://[::1]:25/"), Some((SmtpTls::None, "::1".to_owned(), 25)));
        for wrong in
            ["mx", "http://mx", "smtp://", "smtp://u:p@mx", "smtp://mx:99999", "smtp://mx/path?x", "smtp://mx:"]
        {
            assert_eq!(parse_url(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn without_anything_no_mail_leaves_and_every_half_configuration_is_named() {
        assert!(matches!(read(&[]).unwrap().sink, Sink::Unset));
        let from = ("CVAULT_MAIL_FROM", "CVault <no-reply@example.com>");
        let url = ("CVAULT_SMTP_URL", "smtp://mx.example.com");
        assert!(matches!(read(&[from, url]).unwrap().sink, Sink::Smtp(_)));
        for (pairs, named) in [
            (vec![url], "CVAULT_MAIL_FROM"),
            (vec![url, ("CVAULT_MAIL_FROM", "a\r\nBcc: b@example.com")], "CVAULT_MAIL_FROM"),
            (vec![from, url, ("CVAULT_SMTP_USER", "u")], "CVAULT_SMTP_PASSWORD"),
            (vec![from, url, ("CVAULT_MAIL_DIR", "/tmp")], "CVAULT_MAIL_DIR"),
            (vec![from, url, ("CVAULT_SMTP_CA_FILE", "/dev/null/no")], "CVAULT_SMTP_CA_FILE"),
            (vec![("CVAULT_MAIL_DIR", "/dev/null")], "CVAULT_MAIL_DIR"),
            (
                vec![
                    from,
                    ("CVAULT_SMTP_URL", "smtp+plain://mx"),
                    ("CVAULT_SMTP_USER", "u"),
                    ("CVAULT_SMTP_PASSWORD", "hunter2"),
                ],
                "in clear",
            ),
        ] {
            let faults = read(&pairs).expect_err(named).join(" ");
            assert!(faults.contains(named) && !faults.contains("hunter2"), "{faults}");
        }
    }

    #[test]
    fn a_password_is_not_in_the_debug_form() {
        let mail = read(&[
            ("CVAULT_MAIL_FROM", "no-reply@example.com"),
            ("CVAULT_SMTP_URL", "smtps://mx.example.com"),
            ("CVAULT_SMTP_USER", "u@example.com"),
            ("CVAULT_SMTP_PASSWORD", "hunter2"),
        ])
        .unwrap();
        assert!(!format!("{mail:?}").contains("hunter2"));
    }
}
