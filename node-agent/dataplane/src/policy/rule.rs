//! A destination that a tenant denies, and how it is written.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;

use super::transport;

/// A destination that a tenant denies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenyRule {
    /// The addresses.
    pub net: IpNet,
    /// Only this protocol.
    pub protocol: Option<u8>,
    /// Only these ports of it; never without a protocol that has ports.
    pub ports: Option<RangeInclusive<u16>>,
}

/// The text is no rule. `192.0.2.0/24`, `192.0.2.0/24 icmp` and `::/0 tcp 465-587` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a rule: <prefix>[ <protocol>[ <port>[-<port>]]]")]
pub struct NotARule;

const PROTOCOLS: [(&str, u8); 5] =
    [("icmp", 1), ("tcp", transport::TCP), ("udp", transport::UDP), ("icmpv6", 58), ("sctp", transport::SCTP)];

impl FromStr for DenyRule {
    type Err = NotARule;

    fn from_str(text: &str) -> Result<Self, NotARule> {
        let mut words = text.split(' ');
        let net = words.next().and_then(|word| word.parse::<IpNet>().ok()).ok_or(NotARule)?.trunc();
        let named = |word: &str| PROTOCOLS.iter().find(|(name, _)| *name == word).map(|(_, number)| *number);
        let protocol =
            words.next().map(|word| named(word).or_else(|| word.parse().ok()).ok_or(NotARule)).transpose()?;
        let ports = words.next().map(ports).transpose()?;
        if words.next().is_some() || (ports.is_some() && !protocol.is_some_and(transport::has_ports)) {
            return Err(NotARule);
        }
        Ok(Self { net, protocol, ports })
    }
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, NotARule> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (low, high): (u16, u16) = (low.parse().map_err(|_| NotARule)?, high.parse().map_err(|_| NotARule)?);
    if low <= high { Ok(low..=high) } else { Err(NotARule) }
}

impl fmt::Display for DenyRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.net)?;
        let Some(protocol) = self.protocol else { return Ok(()) };
        match PROTOCOLS.iter().find(|(_, number)| *number == protocol) {
            Some((name, _)) => write!(f, " {name}")?,
            None => write!(f, " {protocol}")?,
        }
        match self.ports.as_ref().map(|ports| (ports.start(), ports.end())) {
            Some((low, high)) if low == high => write!(f, " {low}"),
            Some((low, high)) => write!(f, " {low}-{high}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_written() {
        for text in ["192.0.2.0/24", "::/0 tcp 25", "0.0.0.0/0 udp 1-65535", "192.0.2.1/32 icmp", "0.0.0.0/0 47"] {
            assert_eq!(text.parse::<DenyRule>().unwrap().to_string(), text);
        }
        for text in
            ["", "192.0.2.1", "192.0.2.0/24 ", "192.0.2.0/24 icmp 1", "::/0 tcp 2-1", "::/0 tcp 1 2", "::/0 256"]
        {
            assert_eq!(text.parse::<DenyRule>(), Err(NotARule), "{text:?}");
        }
    }
}
