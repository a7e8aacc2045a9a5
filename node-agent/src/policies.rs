//! What tenants' traffic may do on this server: as it arrives, and as the engine is told.
//!
//! Pure. The control plane tells all policies at the beginning of each stream and then what changes; the digest of the
//! outcome is checked before anything is applied. Before the first set nothing is known of policies and no peer is held up;
//! from then on a peer of an unknown tenant transfers nothing.

use std::collections::BTreeMap;

use cvault_dataplane::policy::MAX_RULES;
use cvault_node_protocol::{MAX_CHUNK_PEERS, digest, v1};
use ipnet::IpNet;

use crate::desired::Refusal;

pub(crate) type TenantId = [u8; 16];

/// No server has peers of more tenants than it has peers.
const MAX_TENANTS: usize = 65_536;

/// A checked policy; `wire` is how it came and how it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    wire: Wire,
    pub(crate) allow_to: Vec<IpNet>,
}

#[derive(Clone, Debug, PartialEq)]
struct Wire(v1::TenantPolicy);

/// It holds no floating-point number.
impl Eq for Wire {}

impl Policy {
    fn parse(wire: v1::TenantPolicy) -> Result<(TenantId, Self), Refusal> {
        let tenant: TenantId = wire.tenant_id.as_ref().try_into().map_err(|_| Refusal::Malformed("tenant_id"))?;
        if tenant == [0; 16] || wire.allow_to.len() > MAX_RULES {
            return Err(Refusal::Malformed("policy"));
        }
        let allow_to = wire.allow_to.iter().map(|text| text.parse()).collect::<Result<_, _>>();
        let allow_to = allow_to.map_err(|_| Refusal::Malformed("allow_to"))?;
        Ok((tenant, Self { wire: Wire(wire), allow_to }))
    }

    pub(crate) fn wire(&self) -> &v1::TenantPolicy {
        &self.wire.0
    }
}

/// All policies, and what of a message has come so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policies {
    /// `None`: the control plane has told none yet.
    tenants: Option<BTreeMap<TenantId, Policy>>,
    pending: Option<BTreeMap<TenantId, Policy>>,
}

/// What a whole message changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PolicyChange {
    pub(crate) upserted: Vec<TenantId>,
    pub(crate) removed: Vec<TenantId>,
}

impl PolicyChange {
    pub(crate) fn is_empty(&self) -> bool {
        self.upserted.is_empty() && self.removed.is_empty()
    }
}

impl Policies {
    /// `None` while more of the message follows. A refused message leaves everything as it was.
    pub(crate) fn take(&mut self, message: v1::Policies) -> Result<Option<PolicyChange>, Refusal> {
        let taken = self.try_take(message);
        if taken.is_err() {
            self.pending = None;
        }
        taken
    }

    fn try_take(&mut self, message: v1::Policies) -> Result<Option<PolicyChange>, Refusal> {
        if message.upserted.len() > MAX_CHUNK_PEERS {
            return Err(Refusal::Chunk(message.upserted.len()));
        }
        let base = if message.replace { Some(BTreeMap::new()) } else { self.pending.take().or(self.tenants.clone()) };
        let mut next = base.ok_or(Refusal::Order("change of policies"))?;
        for wire in message.upserted {
            let (tenant, policy) = Policy::parse(wire)?;
            next.insert(tenant, policy);
        }
        if next.len() > MAX_TENANTS {
            return Err(Refusal::Malformed("policies"));
        }
        if message.digest.is_empty() {
            self.pending = Some(next);
            return Ok(None);
        }
        if digest::of_policies(next.values().map(Policy::wire)) != message.digest.as_ref() {
            return Err(Refusal::Policies);
        }
        let before = self.tenants.replace(next).unwrap_or_default();
        self.pending = None;
        let now = self.tenants.as_ref().expect("just set");
        let changed = |(tenant, policy): &(&TenantId, &Policy)| before.get(*tenant) != Some(*policy);
        Ok(Some(PolicyChange {
            upserted: now.iter().filter(changed).map(|(tenant, _)| *tenant).collect(),
            removed: before.keys().filter(|tenant| !now.contains_key(*tenant)).copied().collect(),
        }))
    }

    pub(crate) fn get(&self, tenant: &TenantId) -> Option<&Policy> {
        self.tenants.as_ref()?.get(tenant)
    }

    pub(crate) fn are_known(&self) -> bool {
        self.tenants.is_some()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (&TenantId, &Policy)> {
        self.tenants.iter().flatten()
    }

    /// Whether the tenant's peers need leases.
    pub(crate) fn is_metered(&self, tenant: &TenantId) -> bool {
        self.tenants.as_ref().is_some_and(|all| all.get(tenant).is_none_or(|policy| policy.wire().metered))
    }

    pub(crate) fn any_metered(&self) -> bool {
        self.all().any(|(_, policy)| policy.wire().metered)
    }

    /// As stored.
    pub(crate) fn restore(&mut self, policies: Vec<v1::TenantPolicy>) -> Result<(), Refusal> {
        self.tenants = Some(policies.into_iter().map(Policy::parse).collect::<Result<_, _>>()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(n: u8, revision: u64) -> v1::TenantPolicy {
        v1::TenantPolicy { tenant_id: vec![n; 16].into(), revision, metered: n == 2, ..v1::TenantPolicy::default() }
    }

    fn message(replace: bool, upserted: &[v1::TenantPolicy], all: &[v1::TenantPolicy]) -> v1::Policies {
        let digest = digest::of_policies(all.iter()).to_vec().into();
        v1::Policies { replace, upserted: upserted.to_vec(), digest }
    }

    #[test]
    fn a_set_in_chunks_replaces_and_a_change_on_another_base_is_refused() {
        let mut policies = Policies::default();
        assert!(!policies.is_metered(&[9; 16]), "nothing is known yet");
        assert_eq!(policies.take(message(false, &[], &[])), Err(Refusal::Order("change of policies")));
        let begin = v1::Policies { replace: true, upserted: vec![policy(1, 1)], ..v1::Policies::default() };
        assert_eq!(policies.take(begin.clone()), Ok(None));
        assert!(policies.get(&[1; 16]).is_none(), "not whole yet");
        let all = [policy(1, 1), policy(2, 1)];
        let change = policies.take(message(false, &all[1..], &all)).unwrap().unwrap();
        assert_eq!(change.upserted, [[1; 16], [2; 16]]);
        assert!(policies.is_metered(&[2; 16]) && !policies.is_metered(&[1; 16]) && policies.is_metered(&[9; 16]));

        let lost = message(false, &[policy(1, 3)], &[policy(1, 3), policy(2, 2)]);
        assert_eq!(policies.take(lost), Err(Refusal::Policies));
        assert_eq!(policies.get(&[1; 16]).unwrap().wire().revision, 1);
        let change = policies.take(message(true, &[policy(1, 3)], &[policy(1, 3)])).unwrap().unwrap();
        assert_eq!(change, PolicyChange { upserted: vec![[1; 16]], removed: vec![[2; 16]] });
        assert!(policies.take(message(true, &[policy(1, 3)], &[policy(1, 3)])).unwrap().unwrap().is_empty());
    }

    #[test]
    fn a_policy_that_cannot_be_read_is_refused() {
        let mut policies = Policies::default();
        let bad = v1::TenantPolicy { allow_to: vec!["10.0.0.0/8\nremove=true".to_owned()], ..policy(1, 1) };
        assert!(policies.take(message(true, std::slice::from_ref(&bad), std::slice::from_ref(&bad))).is_err());
        assert!(!policies.are_known());
    }
}
