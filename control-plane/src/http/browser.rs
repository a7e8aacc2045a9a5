//! What a browser's requests are told by: the session cookie, and whether a page of another origin sent them.
//!
//! There is no CSRF token: `Sec-Fetch-Site` (or `Origin`, from older browsers) says where a request comes from and no page
//! can change it, bodies are JSON only, and the cookie is SameSite=Lax. A page of a sibling domain is as foreign as any other.

use cvault_types::{ErrorCode, Secret};
use http::header::{COOKIE, ORIGIN};
use http::{HeaderMap, HeaderValue, Method};

use super::Problem;
use super::extract::single;

/// `__Host-`: only this very host can set it, over TLS, for the whole of it.
const NAME: &str = "__Host-cvault_session";
/// Takes the cookie away.
pub const EXPIRED_COOKIE: &str = "__Host-cvault_session=; Path=/; Max-Age=0; Secure; HttpOnly; SameSite=Lax";
const SITE: &str = "sec-fetch-site";

/// Whether a browser sent this.
#[must_use]
pub fn is_browser(headers: &HeaderMap) -> bool {
    headers.contains_key(SITE) || headers.contains_key(ORIGIN)
}

/// Lets a browser's request through only when a page of our own origin sent it, or, to read, a person typed its address.
///
/// # Errors
/// `ORIGIN_NOT_ALLOWED`.
pub fn same_origin(method: &Method, headers: &HeaderMap, public_url: &str) -> Result<(), Problem> {
    let reads = matches!(*method, Method::GET | Method::HEAD);
    let ours = if headers.contains_key(SITE) {
        let site = single(headers, SITE);
        site == Some("same-origin") || reads && site == Some("none")
    } else if headers.contains_key(ORIGIN) {
        single(headers, ORIGIN.as_str()).is_some_and(|origin| origin.eq_ignore_ascii_case(public_url))
    } else {
        reads
    };
    if ours { Ok(()) } else { Err(Problem::new(ErrorCode::OriginNotAllowed)) }
}

/// The session cookie's value. `None` also when it is there twice: one of them is somebody else's.
#[must_use]
pub fn session_cookie(headers: &HeaderMap) -> Option<&str> {
    let mut found = headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .filter(|(name, _)| *name == NAME)
        .map(|(_, value)| value);
    match (found.next(), found.next()) {
        (Some(value), None) => Some(value),
        (Some(_), Some(_)) | (None, _) => None,
    }
}

/// The `Set-Cookie` that gives a browser its session.
#[must_use]
pub fn set_cookie(value: &Secret, max_age_seconds: i64) -> HeaderValue {
    let text = format!("{NAME}={}; Path=/; Max-Age={max_age_seconds}; Secure; HttpOnly; SameSite=Lax", value.expose());
    let mut header = HeaderValue::from_str(&text).expect("a drawn credential is ASCII");
    header.set_sensitive(true);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "https://api.example.com";

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn allowed(method: &Method, pairs: &[(&'static str, &'static str)]) -> bool {
        same_origin(method, &headers(pairs), OURS).is_ok()
    }

    #[test]
    fn only_our_own_pages_may_change_anything() {
        for site in ["same-site", "cross-site", "none", "", "SAME-ORIGIN", "same-origin, cross-site"] {
            assert!(!allowed(&Method::POST, &[(SITE, site), ("origin", OURS)]), "{site}");
        }
        assert!(allowed(&Method::DELETE, &[(SITE, "same-origin")]));
        assert!(!allowed(&Method::POST, &[(SITE, "same-origin"), (SITE, "cross-site")]));
        assert!(allowed(&Method::POST, &[("origin", OURS)]));
        for origin in ["null", "https://evil.example", "http://api.example.com", "https://api.example.com.evil.example"]
        {
            assert!(!allowed(&Method::POST, &[("origin", origin)]), "{origin}");
        }
        assert!(!allowed(&Method::POST, &[]), "a cookie without a word about where it comes from");
    }

    #[test]
    fn a_typed_address_may_read_and_a_foreign_page_may_not() {
        assert!(allowed(&Method::GET, &[(SITE, "none")]) && allowed(&Method::GET, &[]));
        assert!(!allowed(&Method::GET, &[(SITE, "cross-site")]) && !allowed(&Method::GET, &[(SITE, "same-site")]));
    }

    #[test]
    fn the_cookie_is_found_among_others_and_not_when_it_is_there_twice() {
        let line = "a=1; __Host-cvault_session=cvb_x; __host-cvault_session=no";
        assert_eq!(session_cookie(&headers(&[("cookie", line)])), Some("cvb_x"));
        assert_eq!(session_cookie(&headers(&[("cookie", line), ("cookie", "__Host-cvault_session=b")])), None);
        assert_eq!(session_cookie(&headers(&[("cookie", "cvault_session=cvb_x")])), None);
    }

    #[test]
    fn the_cookie_cannot_be_read_by_scripts_nor_sent_in_clear() {
        let cookie = set_cookie(&Secret::new("cvb_x"), 60);
        let text = cookie.to_str().unwrap();
        assert_eq!(text, "__Host-cvault_session=cvb_x; Path=/; Max-Age=60; Secure; HttpOnly; SameSite=Lax");
    }
}
