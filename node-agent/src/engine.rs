//! The engine as the agent needs it: brought up with the host around it, changed by differences, revived when it dies.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context as _;
use cvault_dataplane::counters::{self, CounterReader, Epoch};
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::desired::{Change, Desired, Life, Peer, PublicKey, Refusal, check_mass_removal};
use crate::host::{self, Forget};
use crate::interface::Interface;
use crate::policies::PolicyChange;
use crate::state_dir::StateDir;
use crate::store::Saved;
use crate::tunnel::{Launch, Tunnel};
use crate::uapi::{Uapi, UapiError};

/// A tunnel that dies again at once is started again after this, not in a busy loop.
const RESTART_PAUSE: Duration = Duration::from_millis(500);
/// Restarts in a row without a pause.
const QUICK_RESTARTS: u32 = 3;

pub(crate) struct Engine {
    launch: Launch,
    uapi: Uapi,
    private_key: Zeroizing<[u8; 32]>,
    tunnel: Option<Tunnel>,
    /// This server has served: a tunnel that is missing must be started again, not before this.
    retry_at: Option<Instant>,
    /// The engine holds exactly the committed peers.
    in_sync: bool,
    /// The control plane has confirmed the committed peers: any other may be removed. A state file alone may be behind.
    confirmed: bool,
    /// The host tracks no connection from the overlay but of peers that run.
    swept: bool,
    pub(crate) restarts: u32,
    quick_restarts: u32,
}

impl Engine {
    pub(crate) fn new(launch: Launch, private_key: Zeroizing<[u8; 32]>) -> Self {
        let uapi = Uapi::of_interface(&launch.interface);
        Self {
            launch,
            uapi,
            private_key,
            tunnel: None,
            retry_at: None,
            in_sync: false,
            confirmed: false,
            swept: false,
            restarts: 0,
            quick_restarts: 0,
        }
    }

    pub(crate) fn uapi(&self) -> &Uapi {
        &self.uapi
    }

    pub(crate) fn is_up(&self) -> bool {
        self.tunnel.is_some()
    }

    /// Adopts or starts the tunnel and brings it and the host into the state that `interface` needs. When that fails
    /// and the tunnel was started here, it is stopped and its interface removed again.
    pub(crate) async fn bring_up(&mut self, dir: &StateDir, interface: &Interface) -> anyhow::Result<()> {
        let adopted = Tunnel::adopt(&self.launch, &self.uapi).await?;
        let started = adopted.is_none();
        let tunnel = match adopted {
            Some(tunnel) => tunnel,
            None => Tunnel::start(&self.launch, dir, &self.uapi).await?,
        };
        tracing::info!(pid = tunnel.pid(), started, interface = self.launch.interface, "the tunnel process runs");
        if let Err(error) = self.configure(interface).await {
            if started && self.retry_at.is_none() {
                tunnel.stop().await;
                host::delete_link(&self.launch.interface).await.ok();
            }
            return Err(error);
        }
        self.tunnel = Some(tunnel);
        self.retry_at = Some(Instant::now());
        self.in_sync = false;
        Ok(())
    }

    /// Repairs what somebody changed on the host.
    pub(crate) async fn repair_host(&self, interface: &Interface) -> anyhow::Result<()> {
        if !self.is_up() {
            return Ok(());
        }
        self.protect_host().await;
        host::repair(&self.launch.interface, interface).await
    }

    /// Sets the device and the host around it; changes nothing that is right already.
    pub(crate) async fn configure(&self, interface: &Interface) -> anyhow::Result<()> {
        self.uapi.configure(&self.private_key, interface).await.map_err(|error| {
            if error.is_address_in_use() {
                let port = interface.listen_port;
                anyhow::anyhow!(
                    "UDP port {port} is taken by another program: stop that one, or give this server another port"
                )
            } else {
                anyhow::Error::new(error).context("the tunnel cannot be configured")
            }
        })?;
        self.protect_host().await;
        host::set_up(&self.launch.interface, interface).await
    }

    /// Tells the engine which addresses are the server's own. Without that the firewall still keeps peers from them.
    async fn protect_host(&self) {
        let told = async {
            let addresses = host::own_addresses(&self.launch.interface).await?;
            self.uapi.set_hosts(&addresses).await.context("the tunnel did not take the server's addresses")
        };
        if let Err(error) = told.await {
            tracing::warn!(error = format!("{error:#}"), "the engine does not know this server's own addresses");
        }
    }

    /// Makes the engine hold exactly the committed peers, by difference. An adopted engine loses no tunnel that stays;
    /// before the control plane has confirmed them, peers that the state does not know stay too.
    pub(crate) async fn synchronise(&mut self, desired: &Desired) -> Result<(), Refusal> {
        if self.in_sync || desired.cursor().is_none() {
            return Ok(());
        }
        self.reconcile(desired, u32::MAX, HashSet::new()).await
    }

    /// The control plane knows the committed state for its own.
    pub(crate) fn confirm(&mut self) {
        self.confirmed = true;
    }

    /// What the engine holds is compared anew at the next [`Engine::synchronise`].
    pub(crate) fn doubt(&mut self) {
        self.in_sync = false;
    }

    /// Applies a checked change that `saved` has committed already; `freed` are the addresses that lives lost by it. A
    /// tunnel that died meanwhile is revived and the change tried once more.
    pub(crate) async fn apply(
        &mut self,
        dir: &StateDir,
        saved: &Saved,
        change: &Change,
        freed: &HashSet<IpAddr>,
    ) -> Result<(), Refusal> {
        self.confirmed = true;
        let applied = match self.push(&saved.desired, change, freed).await {
            Err(Refusal::Engine(reason)) => {
                tracing::warn!(reason, "a change could not be applied: trying again with the whole difference");
                self.in_sync = false;
                self.swept = false;
                if self.has_died().await {
                    self.revive(dir, &saved.interface, None).await.map_err(engine_refusal)?;
                }
                self.push(&saved.desired, change, freed).await
            }
            done => done,
        };
        if applied.is_err() {
            self.in_sync = false;
            self.swept = false;
        }
        applied
    }

    async fn push(&mut self, desired: &Desired, change: &Change, freed: &HashSet<IpAddr>) -> Result<(), Refusal> {
        if self.in_sync {
            let forget = Forget::Of(freed.clone());
            return self.replace(desired, &change.removed, &change.upserted, forget).await;
        }
        self.reconcile(desired, change.expected_removed, freed.clone()).await
    }

    async fn reconcile(
        &mut self,
        target: &Desired,
        expected_removed: u32,
        freed: HashSet<IpAddr>,
    ) -> Result<(), Refusal> {
        let running = self.uapi.peers().await.map_err(uapi_refusal)?;
        let removed: Vec<_> = running
            .iter()
            .filter(|peer| target.peer(&peer.public_key).is_none())
            .filter(|peer| self.confirmed || target.retired().contains_key(&peer.life()))
            .map(|peer| peer.public_key)
            .collect();
        check_mass_removal(running.len(), removed.len(), expected_removed)?;
        let tenants: Vec<_> = target.policies.all().map(|(tenant, policy)| (*tenant, Some(policy))).collect();
        self.uapi.set_tenants(&tenants).await.map_err(uapi_refusal)?;
        let lives: HashMap<PublicKey, _> = running.iter().map(|peer| (peer.public_key, peer)).collect();
        let stays = |key: &PublicKey, peer| lives.get(key).is_some_and(|engine| engine.is(peer));
        let upserted: Vec<_> = target.peers().filter(|peer| !stays(&peer.public_key, peer)).cloned().collect();
        tracing::info!(
            running = running.len(),
            removed = removed.len(),
            upserted = upserted.len(),
            "compared the engine's peers"
        );
        let retired: HashSet<_> = removed.iter().collect();
        let (gone, stay): (Vec<_>, Vec<_>) = running.iter().partition(|peer| retired.contains(&peer.public_key));
        let forget = if self.swept {
            Forget::Of(freed.into_iter().chain(gone.iter().flat_map(|peer| peer.addresses())).collect())
        } else {
            // What a life that was counted here began is its own, also after the tunnel died. A new life inherits nothing.
            let counted = self.counted_lives();
            let known = target.peers().filter(|peer| counted.contains(&peer.life())).flat_map(Peer::addresses);
            let strangers = stay.iter().filter(|peer| target.peer(&peer.public_key).is_none());
            let kept = known.chain(strangers.flat_map(|peer| peer.addresses())).collect();
            Forget::AllBut { overlay: target.overlay().to_vec(), kept }
        };
        self.replace(target, &removed, &upserted, forget).await?;
        let epoch = self.epoch_for(target);
        let other = |peer: &&Peer| {
            lives.get(&peer.public_key).is_some_and(|engine| engine.limits != target.limits(epoch, peer))
        };
        let limited: Vec<_> =
            target.peers().filter(other).map(|peer| (peer.public_key, target.limits(epoch, peer))).collect();
        self.uapi.limit(&limited).await.map_err(uapi_refusal)?;
        self.swept = true;
        if self.confirmed {
            self.uapi.end_replace().await.map_err(uapi_refusal)?;
        }
        self.in_sync = self.confirmed;
        Ok(())
    }

    /// Removes, makes the host forget what was begun from addresses that are free now, then adds: nothing that an earlier
    /// owner began is delivered to the next.
    async fn replace(
        &self,
        desired: &Desired,
        removed: &[PublicKey],
        upserted: &[Peer],
        forget: Forget,
    ) -> Result<(), Refusal> {
        self.uapi.remove(removed).await.map_err(uapi_refusal)?;
        host::forget_connections(forget).await.map_err(engine_refusal)?;
        let epoch = self.epoch_for(desired);
        self.uapi.add(upserted, |peer| desired.limits(epoch, peer)).await.map_err(uapi_refusal)
    }

    /// Tells the engine policies that `desired` holds already, and the limits of the peers concerned.
    pub(crate) async fn police(&mut self, desired: &Desired, change: &PolicyChange) -> Result<(), UapiError> {
        if !self.is_up() {
            return Ok(());
        }
        let changed = change.upserted.iter().chain(&change.removed);
        let tenants: Vec<_> = changed.map(|tenant| (*tenant, desired.policies.get(tenant))).collect();
        self.uapi.set_tenants(&tenants).await?;
        let concerned: HashSet<_> = tenants.iter().map(|(tenant, _)| *tenant).collect();
        self.limit(desired, desired.peers().filter(|peer| concerned.contains(&peer.tenant_id))).await
    }

    /// Tells the engine the limits of peers as they are now.
    pub(crate) async fn limit(&self, desired: &Desired, peers: impl Iterator<Item = &Peer>) -> Result<(), UapiError> {
        let epoch = self.epoch_for(desired);
        let limited: Vec<_> = peers.map(|peer| (peer.public_key, desired.limits(epoch, peer))).collect();
        self.uapi.limit(&limited).await
    }

    /// Of the counters that the engine writes now; only looked up where leases depend on it.
    fn epoch_for(&self, desired: &Desired) -> Option<Epoch> {
        if !desired.policies.any_metered() {
            return None;
        }
        let reader = CounterReader::open(&self.launch.state_dir.join(counters::FILE_NAME));
        reader.ok().map(|reader| reader.epoch())
    }

    fn counted_lives(&self) -> HashSet<Life> {
        let reader = CounterReader::open(&self.launch.state_dir.join(counters::FILE_NAME));
        let lives = |reader: &CounterReader| {
            let life = |peer: counters::PeerCounters| Life {
                public_key: PublicKey(peer.public_key),
                generation: peer.generation,
            };
            reader.peers().map(life).collect()
        };
        reader.as_ref().map(lives).unwrap_or_default()
    }

    /// Returns when the tunnel process has ended, or when it is time to try again to start it. Cancel-safe.
    pub(crate) async fn ended(&self) {
        match (&self.tunnel, self.retry_at) {
            (Some(tunnel), _) => tunnel.ended().await,
            (None, Some(at)) => tokio::time::sleep_until(at).await,
            (None, None) => std::future::pending().await,
        }
    }

    async fn has_died(&self) -> bool {
        tokio::time::timeout(Duration::from_millis(100), self.ended()).await.is_ok()
    }

    /// Starts a dead tunnel again and gives it everything. The counter file makes its counters continue.
    pub(crate) async fn revive(
        &mut self,
        dir: &StateDir,
        interface: &Interface,
        desired: Option<&Desired>,
    ) -> anyhow::Result<()> {
        self.tunnel = None;
        self.restarts += 1;
        self.quick_restarts += 1;
        self.retry_at = Some(Instant::now() + RESTART_PAUSE);
        if self.quick_restarts > QUICK_RESTARTS {
            tokio::time::sleep(RESTART_PAUSE).await;
        }
        self.bring_up(dir, interface).await.context("the tunnel died and cannot be started again")?;
        if let Some(desired) = desired {
            self.synchronise(desired).await?;
        }
        Ok(())
    }

    /// The tunnel answered: it may be restarted at once again when it dies.
    pub(crate) fn is_healthy(&mut self) {
        self.quick_restarts = 0;
    }

    /// Kills a tunnel that no longer answers; its end is then noticed like any other.
    pub(crate) fn kill(&self) {
        if let Some(tunnel) = &self.tunnel {
            tunnel.kill();
        }
    }

    pub(crate) async fn stop(&mut self) {
        if let Some(tunnel) = self.tunnel.take() {
            tunnel.stop().await;
        }
    }
}

fn uapi_refusal(error: UapiError) -> Refusal {
    Refusal::Engine(crate::chain(&error))
}

fn engine_refusal(error: anyhow::Error) -> Refusal {
    Refusal::Engine(format!("{error:#}"))
}
