//! Wake-ups inside this process: "the desired state of this server changed" and "this server has acknowledged".
//!
//! Only an accelerator. Streams poll the revision and waiting requests poll the acknowledgement, so a lost wake-up, or
//! one of another replica, costs a fraction of a second and nothing else.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cvault_types::ServerId;
use tokio::sync::watch;

/// One per process; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Hub {
    // bounded by the number of servers ever seen by this process
    servers: Arc<Mutex<HashMap<ServerId, Channels>>>,
}

#[derive(Debug)]
struct Channels {
    changes: watch::Sender<u64>,
    policies: watch::Sender<u64>,
    acked: watch::Sender<u64>,
}

impl Hub {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Call after COMMIT of anything that raised the server's revision.
    pub fn server_changed(&self, server: ServerId) {
        self.with(server, |channels| channels.changes.send_modify(|count| *count += 1));
    }

    /// Wakes at each [`Hub::server_changed`]; the value itself means nothing.
    #[must_use]
    pub fn changes(&self, server: ServerId) -> watch::Receiver<u64> {
        self.with(server, |channels| channels.changes.subscribe())
    }

    /// Call after COMMIT of a tenant's policy, for every server that has devices of it.
    pub fn policies_changed(&self, server: ServerId) {
        self.with(server, |channels| channels.policies.send_modify(|count| *count += 1));
    }

    /// Wakes at each [`Hub::policies_changed`]; the value itself means nothing.
    #[must_use]
    pub fn policies(&self, server: ServerId) -> watch::Receiver<u64> {
        self.with(server, |channels| channels.policies.subscribe())
    }

    /// The greatest revision this process has seen the server acknowledge; 0 when it has seen none.
    #[must_use]
    pub fn acked(&self, server: ServerId) -> watch::Receiver<u64> {
        self.with(server, |channels| channels.acked.subscribe())
    }

    /// Call after COMMIT of an acknowledgement.
    pub(crate) fn note_acked(&self, server: ServerId, revision: u64) {
        self.with(server, |channels| {
            channels.acked.send_if_modified(|known| {
                let newer = revision > *known;
                *known = revision.max(*known);
                newer
            });
        });
    }

    fn with<T>(&self, server: ServerId, use_channels: impl FnOnce(&Channels) -> T) -> T {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        use_channels(servers.entry(server).or_insert_with(|| Channels {
            changes: watch::channel(0).0,
            policies: watch::channel(0).0,
            acked: watch::channel(0).0,
        }))
    }
}
