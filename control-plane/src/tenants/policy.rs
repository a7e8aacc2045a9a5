//! What a tenant's traffic may do: the settings as they are checked, stored and told to servers.
//!
//! Deliberately absent: what no tenant may ever reach (the servers' own addresses, metadata services, other tenants). The
//! servers keep those closed whatever stands here.

use cvault_node_protocol::v1;
use cvault_types::TenantId;
use cvault_types::tenant::{OverQuota, TenantPolicy, UpdateTenantPolicy};
use ipnet::IpNet;
use sqlx::PgPool;
use uuid::Uuid;

use crate::db::DbError;
use crate::http::Problem;

pub(super) const MBIT: i64 = 1_000_000;
pub(super) const KBIT: i64 = 1_000;
const MAX_RATE_MBPS: i32 = 100_000;
const THROTTLE_KBPS: std::ops::RangeInclusive<i32> = 64..=100_000_000;
const MAX_DESTINATIONS: usize = 64;
/// What is called private: inside these a prefix may be opened.
const PRIVATE: [&str; 5] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"];

/// The fields that `update` names.
pub(super) fn changed(policy: TenantPolicy, update: UpdateTenantPolicy) -> TenantPolicy {
    TenantPolicy {
        rate_up_mbps: update.rate_up_mbps.unwrap_or(policy.rate_up_mbps),
        rate_down_mbps: update.rate_down_mbps.unwrap_or(policy.rate_down_mbps),
        device_rate_up_mbps: update.device_rate_up_mbps.unwrap_or(policy.device_rate_up_mbps),
        device_rate_down_mbps: update.device_rate_down_mbps.unwrap_or(policy.device_rate_down_mbps),
        allow_intra_tenant: update.allow_intra_tenant.unwrap_or(policy.allow_intra_tenant),
        allow_private_destinations: update.allow_private_destinations.unwrap_or(policy.allow_private_destinations),
        allow_smtp: update.allow_smtp.unwrap_or(policy.allow_smtp),
        over_quota: update.over_quota.unwrap_or(policy.over_quota),
        throttle_kbps: update.throttle_kbps.unwrap_or(policy.throttle_kbps),
    }
}

/// Adds every fault to `problem`. Prefixes come out in their canonical form, each once.
pub(super) fn check(policy: &mut TenantPolicy, mut problem: Problem) -> Problem {
    let rates = [
        ("/policy/rate_up_mbps", policy.rate_up_mbps),
        ("/policy/rate_down_mbps", policy.rate_down_mbps),
        ("/policy/device_rate_up_mbps", policy.device_rate_up_mbps),
        ("/policy/device_rate_down_mbps", policy.device_rate_down_mbps),
    ];
    for (pointer, rate) in rates {
        if rate.is_some_and(|rate| !(1..=MAX_RATE_MBPS).contains(&rate)) {
            problem = problem.field(pointer, "out_of_range", format!("must be from 1 to {MAX_RATE_MBPS}"));
        }
    }
    if !THROTTLE_KBPS.contains(&policy.throttle_kbps) {
        let (min, max) = (THROTTLE_KBPS.start(), THROTTLE_KBPS.end());
        problem = problem.field("/policy/throttle_kbps", "out_of_range", format!("must be from {min} to {max}"));
    }
    let pointer = "/policy/allow_private_destinations";
    if policy.allow_private_destinations.len() > MAX_DESTINATIONS {
        return problem.field(pointer, "too_long", format!("must be at most {MAX_DESTINATIONS} prefixes"));
    }
    let mut prefixes = Vec::new();
    for (at, text) in policy.allow_private_destinations.iter().enumerate() {
        match text.parse::<IpNet>().ok().map(|net| net.trunc()).filter(is_private) {
            Some(net) if prefixes.contains(&net.to_string()) => {}
            Some(net) => prefixes.push(net.to_string()),
            None => {
                let sentence = format!("must be a prefix inside one of {}", PRIVATE.join(", "));
                problem = problem.field(format!("{pointer}/{at}"), "invalid_value", sentence);
            }
        }
    }
    policy.allow_private_destinations = prefixes;
    problem
}

fn is_private(net: &IpNet) -> bool {
    PRIVATE.iter().any(|range| range.parse::<IpNet>().is_ok_and(|range| range.contains(net)))
}

pub(super) fn over_quota_text(over_quota: OverQuota) -> &'static str {
    match over_quota {
        OverQuota::Block => "block",
        OverQuota::Throttle => "throttle",
    }
}

pub(super) fn parse_over_quota(text: &str) -> OverQuota {
    if text == "throttle" { OverQuota::Throttle } else { OverQuota::Block }
}

/// Of which tenants a server needs the policies.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// All that have a peer on the server.
    OfServer(Uuid),
    /// These.
    Of(&'a [TenantId]),
}

/// The policies as servers get them.
///
/// # Errors
/// Those of the database.
pub async fn read(sys: &PgPool, wanted: Wanted<'_>) -> Result<Vec<v1::TenantPolicy>, DbError> {
    let (server, tenants): (Option<Uuid>, Vec<Uuid>) = match wanted {
        Wanted::OfServer(server) => (Some(server), Vec::new()),
        Wanted::Of(tenants) => (None, tenants.iter().map(|tenant| tenant.uuid()).collect()),
    };
    let rows = sqlx::query!(
        "select t.tenant_id, t.rate_up_bps, t.rate_down_bps, t.device_rate_up_bps, t.device_rate_down_bps,
                t.allow_intra_tenant, t.allow_private_destinations, t.allow_smtp, t.over_quota, t.throttle_bps,
                t.bandwidth_limit_bytes, t.policy_revision
         from cvault.tenants t
         where t.tenant_id = any($2) or t.tenant_id in (
             select p.tenant_id from platform.peers p where p.server_id = $1 and p.removed_revision is null)
         order by t.tenant_id",
        server,
        &tenants
    )
    .fetch_all(sys)
    .await?;
    let bits = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).unwrap_or_default();
    let throttle = |row: &str, bps| if parse_over_quota(row) == OverQuota::Throttle { bits(Some(bps)) } else { 0 };
    Ok(rows
        .into_iter()
        .map(|row| v1::TenantPolicy {
            tenant_id: row.tenant_id.as_bytes().to_vec().into(),
            revision: bits(Some(row.policy_revision)),
            rate_up: bits(row.rate_up_bps),
            rate_down: bits(row.rate_down_bps),
            device_rate_up: bits(row.device_rate_up_bps),
            device_rate_down: bits(row.device_rate_down_bps),
            allow_intra: row.allow_intra_tenant,
            allow_smtp: row.allow_smtp,
            allow_to: row.allow_private_destinations,
            metered: row.bandwidth_limit_bytes.is_some(),
            throttle: throttle(&row.over_quota, row.throttle_bps),
        })
        .collect())
}

/// Those of these tenants whose policy is no longer of this revision.
///
/// # Errors
/// Those of the database.
pub async fn outdated(sys: &PgPool, known: &[(TenantId, u64)]) -> Result<Vec<TenantId>, DbError> {
    let tenants: Vec<_> = known.iter().map(|(tenant, _)| tenant.uuid()).collect();
    let revisions: Vec<_> = known.iter().map(|(_, revision)| i64::try_from(*revision).unwrap_or(-1)).collect();
    let changed = sqlx::query_scalar!(
        "select t.tenant_id from cvault.tenants t
         join unnest($1::uuid[], $2::bigint[]) as k (tenant_id, revision) on t.tenant_id = k.tenant_id
         where t.policy_revision <> k.revision",
        &tenants,
        &revisions
    )
    .fetch_all(sys)
    .await?;
    Ok(changed.into_iter().map(TenantId::from_uuid).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_prefixes_inside_private_ranges_open_and_each_fault_is_told() {
        let mut policy = TenantPolicy::default();
        for good in ["10.20.0.7/16", "10.20.0.0/16", "fd00:1::/48", "192.168.1.1/32"] {
            policy.allow_private_destinations.push(good.to_owned());
        }
        assert!(check(&mut policy, Problem::validation()).or_ok(()).is_ok());
        assert_eq!(policy.allow_private_destinations, ["10.20.0.0/16", "fd00:1::/48", "192.168.1.1/32"]);
        for bad in ["169.254.169.254/32", "0.0.0.0/0", "10.0.0.0/7", "127.0.0.1/32", "1.1.1.1/32", "::/0", "x\n"] {
            let mut policy = TenantPolicy {
                allow_private_destinations: vec![bad.to_owned()],
                throttle_kbps: 1,
                rate_up_mbps: Some(0),
                ..TenantPolicy::default()
            };
            assert!(check(&mut policy, Problem::validation()).or_ok(()).is_err(), "{bad}");
        }
    }
}
