//! What mails say: plain text, and the same in HTML without images, styles or anything to load.

use time::OffsetDateTime;
use time::macros::format_description;

use super::{Data, Kind};

/// A mail's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    pub subject: &'static str,
    pub plain: String,
    pub html: String,
}

/// The words around the link.
struct Words {
    subject: &'static str,
    before: &'static str,
    /// The link carries a single-use token.
    once: bool,
    after: &'static str,
}

fn words(kind: Kind) -> Words {
    match kind {
        Kind::VerifyEmail => Words {
            subject: "Confirm your e-mail address",
            before: "Somebody, probably you, signed up for CVault with this address. To confirm that it is yours, open",
            once: true,
            after: "If it was not you, ignore this mail: without the confirmation nothing happens.",
        },
        Kind::ResetPassword => Words {
            subject: "Reset your password",
            before: "Somebody, probably you, asked for a new password for your CVault account. To choose one, open",
            once: true,
            after: "If it was not you, ignore this mail: your password stays as it is.",
        },
        Kind::PasswordChanged => Words {
            subject: "Your password was changed",
            before: "The password of your CVault account was changed. If it was you, there is nothing to do. If it was not, \
                     take the account back at once: open",
            once: false,
            after: "Nobody will ever ask you for your password by mail.",
        },
        Kind::ChangeEmail => Words {
            subject: "Confirm your new e-mail address",
            before: "Somebody, probably you, wants to log in to CVault with this address from now on. To confirm that it is \
                     yours, open",
            once: true,
            after: "If it was not you, ignore this mail: without the confirmation nothing happens.",
        },
        Kind::EmailChangeAsked => Words {
            subject: "Your e-mail address is about to change",
            before: "Somebody, probably you, asked to give your CVault account another e-mail address. If it was you, there is \
                     nothing to do here: open the link that was mailed to the new address. If it was not you, choose another \
                     password at once, which stops the change: open",
            once: false,
            after: "Nobody will ever ask you for your password by mail.",
        },
        Kind::EmailChanged => Words {
            subject: "Your e-mail address was changed",
            before: "Your CVault account has another e-mail address now: this one does not log in any more, and gets no more \
                     mails about it. If it was you, there is nothing to do. If it was not you, tell another owner of your account, \
                     or whoever runs this service, at once:",
            once: false,
            after: "Nobody will ever ask you for your password by mail.",
        },
    }
}

/// Fills the template.
#[must_use]
pub fn render(kind: Kind, data: &Data) -> Text {
    let Words { subject, before, once, after } = words(kind);
    let link = data.link.expose();
    let (plain_until, html_until) = if once {
        let sentence = format!("The link works once, until {}.", until(data.valid_until));
        (format!("{sentence}\n\n"), format!("<p>{sentence}</p>"))
    } else {
        (String::new(), String::new())
    };
    let escaped = escape(link);
    Text {
        subject,
        plain: format!("Hello,\n\n{before}\n\n{link}\n\n{plain_until}{after}\n"),
        html: format!(
            "<!doctype html><html lang=\"en\"><body><p>Hello,</p><p>{before}</p><p><a href=\"{escaped}\">{escaped}</a></p>\
             {html_until}<p>{after}</p></body></html>\n"
        ),
    }
}

fn until(at: OffsetDateTime) -> String {
    let form = format_description!("[day padding:none] [month repr:long] [year], [hour]:[minute] UTC");
    at.to_offset(time::UtcOffset::UTC).format(form).expect("every part of the form is there")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvault_types::Secret;
    use time::macros::datetime;

    fn data(link: &str) -> Data {
        Data { link: Secret::new(link), valid_until: datetime!(2026-11-02 09:05 UTC) }
    }

    #[test]
    fn the_plain_text_of_a_reset_is_known_to_the_letter() {
        assert_eq!(
            render(Kind::ResetPassword, &data("https://vpn.example.com/reset#cvr_1")).plain,
            "Hello,\n\nSomebody, probably you, asked for a new password for your CVault account. To choose one, open\n\n\
             https://vpn.example.com/reset#cvr_1\n\nThe link works once, until 2 November 2026, 09:05 UTC.\n\n\
             If it was not you, ignore this mail: your password stays as it is.\n"
        );
    }

    #[test]
    fn nothing_in_a_link_becomes_markup() {
        let html = render(Kind::VerifyEmail, &data("https://x/?a=1&b=\"><script>")).html;
        assert!(html.contains("https://x/?a=1&amp;b=&quot;&gt;&lt;script&gt;") && !html.contains("<script"), "{html}");
    }
}
