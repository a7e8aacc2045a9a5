//! `traceparent`: the trace that a request belongs to at its caller (W3C Trace Context, level 2), for the log line. Nothing
//! is sent on, and nothing is believed: whoever calls chooses it.

use http::HeaderMap;

use super::extract::single;

const HEADER: &str = "traceparent";

/// 16 bytes in lower-case hex, not all zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceId(String);

impl TraceId {
    /// `None` without the header, with several, and with one that is not well-formed.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        parse(single(headers, HEADER)?)
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn parse(text: &str) -> Option<TraceId> {
    let mut parts = text.split('-');
    let version = parts.next().filter(|part| is_hex(part, 2) && *part != "ff")?;
    let trace = parts.next().filter(|part| is_hex(part, 32) && !is_zero(part))?;
    parts.next().filter(|part| is_hex(part, 16) && !is_zero(part))?;
    parts.next().filter(|part| is_hex(part, 2))?;
    // later versions may have more parts
    (version != "00" || parts.next().is_none()).then(|| TraceId(trace.to_owned()))
}

fn is_hex(part: &str, digits: usize) -> bool {
    part.len() == digits && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_zero(part: &str) -> bool {
    part.bytes().all(|byte| byte == b'0')
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    #[test]
    fn a_trace_is_known_by_a_whole_header_alone() {
        let parent = "00f067aa0ba902b7";
        for good in [
            format!("00-{TRACE}-{parent}-01"),
            format!("00-{TRACE}-{parent}-00"),
            format!("01-{TRACE}-{parent}-01"),
            format!("cc-{TRACE}-{parent}-01-what-comes-later"),
        ] {
            assert_eq!(parse(&good).unwrap().as_str(), TRACE, "{good}");
        }
        for bad in [
            String::new(),
            TRACE.to_owned(),
            format!("ff-{TRACE}-{parent}-01"),
            format!("00-{TRACE}-{parent}-01-more"),
            format!("00-{TRACE}-{parent}-01-"),
            format!("00-{TRACE}-{parent}"),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{parent}-01", "0".repeat(32)),
            format!("00-{}-{parent}-01", TRACE.to_uppercase()),
            format!("00-{}-{parent}-01", &TRACE[1..]),
            format!("00-{TRACE}x-{parent}-01"),
            format!(" 00-{TRACE}-{parent}-01"),
            format!("0-{TRACE}-{parent}-01"),
        ] {
            assert_eq!(parse(&bad), None, "{bad}");
        }
    }

    #[test]
    fn two_headers_are_none() {
        let mut headers = HeaderMap::new();
        let value = format!("00-{TRACE}-00f067aa0ba902b7-01");
        headers.append(HEADER, value.parse().unwrap());
        assert!(TraceId::of(&headers).is_some());
        headers.append(HEADER, value.parse().unwrap());
        assert_eq!(TraceId::of(&headers), None);
    }
}
