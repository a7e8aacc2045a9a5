//! Leases of the tenants' limits: asked for before they are used up, told to the engine, given back when idle.
//!
//! A lease that is not renewed ends at its number, whoever of the three (control plane, this process, the network) is away.

use std::collections::HashMap;
use std::time::Duration;

use cvault_dataplane::counters::Epoch;
use cvault_node_protocol::{MAX_LEASES, v1};
use tokio::time::Instant;

use super::Agent;
use crate::desired::{Life, PublicKey};
use crate::engine::Engine;
use crate::leases::{Metered, Place};
use crate::meter::Meter;
use crate::report::Lane;
use crate::store::Saved;

/// How often the counters of metered peers are looked at: half a lease of 64 MiB lasts this long at 2.7 Gbit/s.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Between two slow looks nothing stays under way in the engine.
const SETTLE_EVERY: Duration = Duration::from_millis(1_500);
/// Slow looks between two lists of everything.
const INVENTORY_EVERY: u32 = 5;

/// What the answer under way was asked.
pub(super) struct Asked {
    epoch: Epoch,
    states: Vec<v1::LeaseState>,
    lives: HashMap<([u8; 16], u64), Life>,
}

/// How far the list of everything has been told. Of what is not told, the control plane takes nothing back.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Inventory {
    #[default]
    Told,
    Due(Option<Place>),
}

#[derive(Default)]
pub(super) struct Quota {
    asked: Option<Asked>,
    settled_at: Option<Instant>,
    looks: u32,
    inventory: Inventory,
    /// The last question was a stretch of that list.
    asked_of_all: bool,
    /// The epoch that a whole pass of the meter was over.
    pub(super) metered_epoch: Option<Epoch>,
}

/// Takes over the leases that an adopted engine enforces.
pub(super) async fn adopt_leases(saved: &mut Saved, meter: &mut Meter, engine: &Engine) {
    let desired = &mut saved.desired;
    if !desired.policies.any_metered() {
        return;
    }
    let Some((epoch, _)) = meter.totals(desired) else { return };
    desired.leases.enter(epoch);
    let Ok(running) = engine.uapi().peers().await else { return };
    for peer in running {
        if let (Some(device), Some(until)) = (desired.device_of(&peer.life()), peer.limits.lease) {
            desired.leases.adopt(peer.life(), device, until);
        }
    }
}

impl Agent {
    pub(super) fn any_metered(&self) -> bool {
        self.saved.as_ref().is_some_and(|saved| saved.desired.policies.any_metered())
    }

    /// A slow look: what idle peers do not need is taken back, and those that got nothing ask again.
    pub(super) async fn settle_leases(&mut self) {
        if !self.any_metered() || self.quota.settled_at.is_some_and(|at| at.elapsed() < SETTLE_EVERY) {
            return;
        }
        self.quota.settled_at = Some(Instant::now());
        self.quota.looks += 1;
        if self.quota.looks % INVENTORY_EVERY == 1 && self.quota.inventory == Inventory::Told {
            self.quota.inventory = Inventory::Due(None);
        }
        let Some((_, metered)) = self.look() else { return };
        let Some(saved) = self.saved.as_mut() else { return };
        let lowered = saved.desired.leases.settle(&metered);
        self.enforce(&lowered).await;
    }

    /// Asks for what is needed, if nothing is under way.
    pub(super) async fn ask_leases(&mut self) {
        if !self.any_metered() || self.session.is_none() || self.reports.is_busy(Lane::Lease) {
            return;
        }
        let before = self.saved.as_ref().and_then(|saved| saved.desired.leases.epoch());
        let Some((epoch, metered)) = self.look() else { return };
        if before.is_some_and(|before| before != epoch) {
            tracing::warn!("the tunnel's counters begin anew: leases are asked for anew");
            let all: Vec<_> = metered.iter().map(|peer| peer.life).collect();
            self.enforce(&all).await;
        }
        let (Some(saved), Some(session)) = (self.saved.as_mut(), &self.session) else { return };
        let told = !self.meter.spool.has_unacknowledged() && self.quota.metered_epoch == Some(epoch);
        let urgent = saved.desired.leases.urgent(&metered);
        // in turns, so that a long list does not keep waiting who transfers
        let leases = match self.quota.inventory {
            Inventory::Due(after) if told && (urgent.is_empty() || !self.quota.asked_of_all) => {
                let desired = &mut saved.desired;
                let retired = desired.retired().clone();
                let stretch = desired.leases.inventory(&metered, &retired, after, MAX_LEASES);
                self.quota.inventory = stretch.through.map_or(Inventory::Told, |through| Inventory::Due(Some(through)));
                self.quota.asked_of_all = true;
                stretch.message(epoch)
            }
            Inventory::Due(_) | Inventory::Told if urgent.is_empty() => return,
            Inventory::Due(_) | Inventory::Told => {
                self.quota.asked_of_all = false;
                v1::Leases { counter_epoch: epoch.to_vec().into(), peers: urgent, ..v1::Leases::default() }
            }
        };
        let lives = metered.iter().map(|peer| ((peer.device_id, peer.life.generation), peer.life)).collect();
        self.quota.asked = Some(Asked { epoch, states: leases.peers.clone(), lives });
        let request = v1::ReportRequest { leases: Some(leases), ..v1::ReportRequest::default() };
        self.reports.send(Lane::Lease, session, request);
    }

    pub(super) async fn on_lease_answer(&mut self, answer: Option<&v1::ReportResponse>) {
        let Some(asked) = self.quota.asked.take() else { return };
        let (Some(answer), Some(saved)) = (answer, self.saved.as_mut()) else { return };
        let life_of = |device: &[u8; 16], generation| asked.lives.get(&(*device, generation)).copied();
        let told = saved.desired.leases.take(asked.epoch, &asked.states, &answer.leases, life_of);
        self.enforce(&told).await;
    }

    /// The sums of the metered peers' counters, and of which epoch they are.
    fn look(&mut self) -> Option<(Epoch, Vec<Metered>)> {
        let saved = self.saved.as_mut()?;
        let looked = self.meter.totals(&saved.desired)?;
        saved.desired.leases.enter(looked.0);
        Some(looked)
    }

    async fn enforce(&mut self, lives: &[Life]) {
        let Some(saved) = self.saved.as_ref().filter(|_| !lives.is_empty() && self.engine.is_up()) else { return };
        let alive = |life: &Life| {
            let key: &PublicKey = &life.public_key;
            saved.desired.peer(key).filter(|peer| peer.generation == life.generation)
        };
        if let Err(error) = self.engine.limit(&saved.desired, lives.iter().filter_map(alive)).await {
            tracing::error!(error = crate::chain(&error), "the engine did not take leases; trying again");
            self.engine.doubt();
            self.synchronise().await;
        }
    }
}
