//! A DNS server that knows three names: `whoami.test` (the address the question came from), `www.test` (the web server)
//! and nothing else. One question per message, as every resolver sends it (RFC 1035 §4).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use anyhow::{Context, Result};

use crate::lab::{HTTP_V4, HTTP_V6};

const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const NAME_ERROR: u8 = 3;

/// Answers on port 53 of `address`, on a thread of its own.
pub(super) fn start(address: &str) -> Result<()> {
    let address: IpAddr = address.parse()?;
    let socket =
        UdpSocket::bind(SocketAddr::new(address, 53)).with_context(|| format!("listen on {address} port 53"))?;
    std::thread::spawn(move || {
        let mut message = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut message) {
            if let Some(reply) = reply(&message[..length], from.ip().to_canonical()) {
                eprintln!("dns: question from {}", from.ip());
                let _ = socket.send_to(&reply, from);
            }
        }
    });
    Ok(())
}

/// The answer to one query, or nothing when it is not one.
fn reply(query: &[u8], from: IpAddr) -> Option<Vec<u8>> {
    let (name, end) = question_name(query)?;
    let kind = u16::from_be_bytes([*query.get(end)?, *query.get(end + 1)?]);
    let question = query.get(HEADER..end + 4)?;
    let (known, answer) = lookup(&name, kind, from);

    let mut reply = Vec::with_capacity(64);
    reply.extend_from_slice(&query[..2]);
    reply.extend_from_slice(&[0x85, if known { 0 } else { NAME_ERROR }]);
    reply.extend_from_slice(&[0, 1, 0, u8::from(answer.is_some()), 0, 0, 0, 0]);
    reply.extend_from_slice(question);
    if let Some(address) = answer {
        let data = octets(address);
        reply.extend_from_slice(&[0xc0, 0x0c]);
        reply.extend_from_slice(&question[question.len() - 4..]);
        reply.extend_from_slice(&[0, 0, 0, 0, 0, u8::try_from(data.len()).expect("an address is 4 or 16 octets")]);
        reply.extend_from_slice(&data);
    }
    Some(reply)
}

fn question_name(query: &[u8]) -> Option<(String, usize)> {
    let mut at = HEADER;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join(".").to_ascii_lowercase(), at));
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).into_owned());
        at += length;
    }
}

fn lookup(name: &str, kind: u16, from: IpAddr) -> (bool, Option<IpAddr>) {
    let v4 = || HTTP_V4.parse::<Ipv4Addr>().map(IpAddr::from).ok();
    let v6 = || HTTP_V6.parse::<Ipv6Addr>().map(IpAddr::from).ok();
    match (name, kind) {
        ("www.test", TYPE_A) => (true, v4()),
        ("www.test", TYPE_AAAA) => (true, v6()),
        ("whoami.test", TYPE_A) => (true, from.is_ipv4().then_some(from)),
        ("whoami.test", TYPE_AAAA) => (true, from.is_ipv6().then_some(from)),
        ("www.test" | "whoami.test", _) => (true, None),
        _ => (false, None),
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            query.push(u8::try_from(label.len()).unwrap());
            query.extend_from_slice(label.as_bytes());
        }
        query.push(0);
        query.extend_from_slice(&kind.to_be_bytes());
        query.extend_from_slice(&[0, 1]);
        query
    }

    #[test]
    fn whoami_answers_with_the_address_the_question_came_from() {
        let reply = reply(&query("whoami.test", TYPE_A), "203.0.113.10".parse().unwrap()).unwrap();
        assert_eq!(&reply[..4], &[0xab, 0xcd, 0x85, 0]);
        assert_eq!(&reply[reply.len() - 4..], &[203, 0, 113, 10]);
    }

    #[test]
    fn an_unknown_name_does_not_exist() {
        let reply = reply(&query("example.org", TYPE_A), "192.0.2.1".parse().unwrap()).unwrap();
        assert_eq!(reply[3], NAME_ERROR);
    }

    #[test]
    fn a_truncated_question_gets_no_answer() {
        assert_eq!(reply(&query("www.test", TYPE_A)[..15], "192.0.2.1".parse().unwrap()), None);
    }
}
