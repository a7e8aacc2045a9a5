//! What one stream has told its server of tenants' policies.
//!
//! All of them after the Hello, whatever the agent may have: so none of an earlier stream survives. Then what changes, and
//! before the first peer of a tenant its policy. The digest of all lets the agent notice a message that is missing.

use std::collections::BTreeMap;

use cvault_node_protocol::v1::state_event::Event;
use cvault_node_protocol::v1::{Peer, Policies, TenantPolicy};
use cvault_node_protocol::{MAX_CHUNK_PEERS, digest};
use cvault_types::{ServerId, TenantId};
use sqlx::PgPool;
use uuid::Uuid;

use crate::db::DbError;
use crate::desired::Update;
use crate::tenants::policy::{self, Wanted};

#[derive(Debug, Default)]
pub(super) struct Told {
    /// `None`: nothing yet.
    policies: Option<BTreeMap<TenantId, TenantPolicy>>,
}

impl Told {
    /// Everything at first; then what has changed since.
    pub(super) async fn refresh(&mut self, sys: &PgPool, server: ServerId) -> Result<Vec<Event>, DbError> {
        let Some(known) = &self.policies else {
            let all = policy::read(sys, Wanted::OfServer(server.uuid())).await?;
            self.policies = Some(BTreeMap::new());
            return Ok(self.tell(all, true));
        };
        let known: Vec<_> = known.iter().map(|(tenant, policy)| (*tenant, policy.revision)).collect();
        let changed = policy::outdated(sys, &known).await?;
        if changed.is_empty() {
            return Ok(Vec::new());
        }
        let changed = policy::read(sys, Wanted::Of(&changed)).await?;
        Ok(self.tell(changed, false))
    }

    /// What must be told before the peers of `update`.
    pub(super) async fn before(&mut self, sys: &PgPool, update: &Update) -> Result<Vec<Event>, DbError> {
        let peers = match update {
            Update::Nothing => return Ok(Vec::new()),
            Update::Snapshot { peers, .. } => peers,
            Update::Delta { upserted, .. } => upserted,
        };
        let unknown = |tenant: &TenantId| !self.policies.as_ref().is_some_and(|known| known.contains_key(tenant));
        let mut new: Vec<_> = peers.iter().filter_map(tenant_of).filter(unknown).collect();
        new.sort_unstable();
        new.dedup();
        if new.is_empty() {
            return Ok(Vec::new());
        }
        let new = policy::read(sys, Wanted::Of(&new)).await?;
        Ok(self.tell(new, false))
    }

    fn tell(&mut self, policies: Vec<TenantPolicy>, replace: bool) -> Vec<Event> {
        let known = self.policies.get_or_insert_default();
        for policy in &policies {
            if let Ok(tenant) = Uuid::from_slice(&policy.tenant_id) {
                known.insert(TenantId::from_uuid(tenant), policy.clone());
            }
        }
        let digest = digest::of_policies(known.values());
        let mut chunks: Vec<_> = policies.chunks(MAX_CHUNK_PEERS).map(<[_]>::to_vec).collect();
        if chunks.is_empty() {
            chunks.push(Vec::new());
        }
        let last = chunks.len() - 1;
        let message = |(at, upserted)| Policies {
            replace: replace && at == 0,
            upserted,
            digest: if at == last { digest.to_vec().into() } else { Vec::new().into() },
        };
        chunks.into_iter().enumerate().map(message).map(Event::Policies).collect()
    }
}

fn tenant_of(peer: &Peer) -> Option<TenantId> {
    Uuid::from_slice(&peer.tenant_id).ok().map(TenantId::from_uuid)
}
