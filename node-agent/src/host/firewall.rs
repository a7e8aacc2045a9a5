//! The nftables table `inet cvault`: masquerading, MSS clamping, and what peers must not reach. The engine checks the
//! same and more per packet; this is the second wall.
//!
//! The table is ours alone and is replaced whole in one transaction: add, delete, add. Connection tracking is kept, so
//! running connections do not notice.

use std::time::Duration;

use anyhow::Context as _;
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::interface::Interface;

const TABLE: &str = "cvault";
const TIMEOUT: Duration = Duration::from_secs(10);
/// Link-local ranges and the metadata services of clouds.
const FORBIDDEN: [&str; 3] = ["169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128"];

/// Whether `nft` can be run at all.
pub(crate) fn check() -> anyhow::Result<()> {
    let answer = std::process::Command::new("nft").arg("--version").output();
    anyhow::ensure!(
        answer.is_ok_and(|output| output.status.success()),
        "the program `nft` cannot be run: install the package nftables"
    );
    Ok(())
}

/// Whether our table is there.
pub(crate) async fn is_present() -> bool {
    let list = tokio::process::Command::new("nft").args(["list", "table", "inet", TABLE]).output();
    matches!(tokio::time::timeout(TIMEOUT, list).await, Ok(Ok(output)) if output.status.success())
}

pub(crate) async fn set_up(tunnel: &str, interface: &Interface) -> anyhow::Result<()> {
    let payload = ruleset(tunnel, interface).to_string();
    let apply = tokio::task::spawn_blocking(move || {
        nftables::helper::apply_ruleset_raw(&payload, None::<&str>, [] as [&str; 0])
    });
    let applied = tokio::time::timeout(TIMEOUT, apply).await.context("nft took too long")?;
    match applied.context("applying the firewall was interrupted")? {
        Ok(_) => Ok(()),
        Err(nftables::helper::NftablesError::NftFailed { stderr, .. }) => {
            let reason = stderr.lines().next().unwrap_or_default().to_owned();
            anyhow::bail!("nft refused the firewall ({reason}): does the kernel have nf_tables and NAT?")
        }
        Err(error) => Err(error).context("the firewall cannot be set"),
    }
}

fn ruleset(tunnel: &str, interface: &Interface) -> Value {
    let table = json!({"table": {"family": "inet", "name": TABLE}});
    let mut commands = vec![json!({"add": table}), json!({"delete": table}), json!({"add": table})];
    for (name, kind, hook, priority) in [
        ("forward", "filter", "forward", 0),
        ("input", "filter", "input", 0),
        ("postrouting", "nat", "postrouting", 100),
    ] {
        commands.push(json!({"add": {"chain": {
            "family": "inet", "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
        }}}));
    }
    let rules = forward_rules(tunnel, &interface.overlay)
        .into_iter()
        .map(|rule| ("forward", rule))
        .chain(input_rules(tunnel, interface).into_iter().map(|rule| ("input", rule)))
        .chain(nat_rules(tunnel, &interface.overlay).into_iter().map(|rule| ("postrouting", rule)));
    for (chain, expr) in rules {
        commands.push(json!({"add": {"rule": {"family": "inet", "table": TABLE, "chain": chain, "expr": expr}}}));
    }
    json!({ "nftables": commands })
}

fn forward_rules(tunnel: &str, overlay: &[IpNet]) -> Vec<Value> {
    let (from, to) = (matches("==", meta("iifname"), json!(tunnel)), matches("==", meta("oifname"), json!(tunnel)));
    let mut rules = vec![json!([from, to, counter(), drop_it()])];
    rules.extend(forged_rules(tunnel, overlay));
    for ipv6 in [false, true] {
        let family = matches("==", meta("nfproto"), json!(if ipv6 { "ipv6" } else { "ipv4" }));
        rules.push(match prefixes(overlay, ipv6) {
            Some(own) => json!([from, matches("!=", field(ipv6, "saddr"), own), counter(), drop_it()]),
            None => json!([from, family, counter(), drop_it()]),
        });
    }
    for prefix in FORBIDDEN {
        let prefix: IpNet = prefix.parse().expect("the constants are prefixes");
        let ipv6 = prefix.addr().is_ipv6();
        let target = prefixes(&[prefix], ipv6).expect("one prefix of its own family");
        rules.push(json!([from, matches("==", field(ipv6, "daddr"), target), counter(), drop_it()]));
    }
    // Nothing reaches a peer, and nothing is billed to it, but what belongs to a connection that it began.
    let state = json!({"ct": {"key": "state"}});
    rules.push(json!([to, matches("!=", state, json!({"set": ["established", "related"]})), counter(), drop_it()]));
    for direction in [from, to] {
        let flags = json!({"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, ["syn", "rst"]]});
        let clamp = json!({"mangle": {
            "key": {"tcp option": {"name": "maxseg", "field": "size"}}, "value": {"rt": {"key": "mtu"}},
        }});
        rules.push(json!([direction, matches("==", flags, json!("syn")), clamp]));
    }
    rules
}

/// A peer's address that comes in anywhere but through the tunnel.
fn forged_rules(tunnel: &str, overlay: &[IpNet]) -> Vec<Value> {
    let elsewhere = matches("!=", meta("iifname"), json!({"set": [tunnel, "lo"]}));
    [false, true]
        .into_iter()
        .filter_map(|ipv6| {
            let source = matches("==", field(ipv6, "saddr"), prefixes(overlay, ipv6)?);
            Some(json!([elsewhere, source, counter(), drop_it()]))
        })
        .collect()
}

fn input_rules(tunnel: &str, interface: &Interface) -> Vec<Value> {
    let from = matches("==", meta("iifname"), json!(tunnel));
    let mut rules: Vec<_> = interface
        .addresses
        .iter()
        .map(|address| {
            let ipv6 = address.addr().is_ipv6();
            let protocol = if ipv6 { "icmpv6" } else { "icmp" };
            let echo = json!({"payload": {"protocol": protocol, "field": "type"}});
            let gateway = matches("==", field(ipv6, "daddr"), json!(address.addr().to_string()));
            json!([from, gateway, matches("==", echo, json!("echo-request")), {"accept": null}])
        })
        .collect();
    rules.push(json!([from, counter(), drop_it()]));
    rules.extend(forged_rules(tunnel, &interface.overlay));
    rules
}

fn nat_rules(tunnel: &str, overlay: &[IpNet]) -> Vec<Value> {
    [false, true]
        .into_iter()
        .filter_map(|ipv6| {
            let own = matches("==", field(ipv6, "saddr"), prefixes(overlay, ipv6)?);
            Some(json!([matches("!=", meta("oifname"), json!(tunnel)), own, {"masquerade": null}]))
        })
        .collect()
}

fn matches(op: &str, left: Value, right: Value) -> Value {
    json!({"match": {"op": op, "left": left, "right": right}})
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

fn field(ipv6: bool, name: &str) -> Value {
    json!({"payload": {"protocol": if ipv6 { "ip6" } else { "ip" }, "field": name}})
}

/// The prefixes of one family as a set.
fn prefixes(all: &[IpNet], ipv6: bool) -> Option<Value> {
    let set: Vec<_> = all
        .iter()
        .filter(|prefix| prefix.addr().is_ipv6() == ipv6)
        .map(|prefix| json!({"prefix": {"addr": prefix.network().to_string(), "len": prefix.prefix_len()}}))
        .collect();
    (!set.is_empty()).then(|| json!({ "set": set }))
}

fn counter() -> Value {
    json!({"counter": null})
}

fn drop_it() -> Value {
    json!({"drop": null})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(overlay: &[&str]) -> Interface {
        Interface {
            listen_port: 51820,
            addresses: vec!["10.8.0.1/16".parse().unwrap(), "fd00:cafe::1/64".parse().unwrap()],
            overlay: overlay.iter().map(|prefix| prefix.parse().unwrap()).collect(),
            mtu: 1420,
        }
    }

    #[test]
    fn the_ruleset_is_one_whole_table_replaced_at_once() {
        let rules = ruleset("cv0", &interface(&["10.8.0.0/16", "fd00:cafe::/64"]));
        let commands = rules["nftables"].as_array().unwrap();
        let table = json!({"table": {"family": "inet", "name": "cvault"}});
        assert_eq!(commands[..3], [json!({"add": table}), json!({"delete": table}), json!({"add": table})]);
        let masquerades = commands.iter().filter(|command| command.to_string().contains("masquerade")).count();
        assert_eq!(masquerades, 2);
        // The crate's schema knows every statement we use.
        serde_json::from_value::<nftables::schema::Nftables<'_>>(rules).unwrap();
    }

    #[test]
    fn a_family_without_overlay_is_not_forwarded_and_not_masqueraded() {
        let rules = ruleset("cv0", &interface(&["10.8.0.0/16"])).to_string();
        assert!(rules.contains("nfproto") && rules.matches("masquerade").count() == 1, "{rules}");
    }
}
