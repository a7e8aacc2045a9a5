//! What every request and task shares: configuration, database, keys, secrets, wake-ups.

use std::ops::Deref;
use std::sync::Arc;

use crate::auth::api_keys::{Lookups, OverRate, Uses};
use crate::auth::passwords::Passwords;
use crate::auth::throttle::Throttles;
use crate::auth::tokens;
use crate::auth::verified::VerifiedTokens;
use crate::clock::Clock;
use crate::config::Config;
use crate::db::{Db, DbError};
use crate::devices::{self, Registrations};
use crate::http::Problem;
use crate::http::health_cache::HealthCache;
use crate::http::limit::Limiter;
use crate::http::strangers::Strangers;
use crate::keys::{DataKeys, KeyRing, PlatformSecrets, TokenKeyring, TokenKeys};
use crate::nodes::Hub;
use crate::request_logs::RequestLog;
use crate::servers;
use crate::step_up::StaffWatch;
use crate::usage;
use cvault_types::TenantId;

/// Cheap to clone; one per process.
#[derive(Clone)]
pub struct App(Arc<Inner>);

pub struct Inner {
    pub config: Config,
    pub db: Db,
    pub keys: KeyRing,
    pub data_keys: DataKeys,
    pub secrets: PlatformSecrets,
    pub token_keys: TokenKeyring,
    pub clock: Clock,
    pub nodes: Hub,
    pub passwords: Passwords,
    pub limiter: Limiter<TenantId>,
    pub throttles: Throttles,
    pub uses: Uses,
    pub request_log: Arc<RequestLog>,
    pub key_lookups: Lookups,
    pub over_rate: OverRate,
    pub tokens: VerifiedTokens,
    pub registrations: Registrations,
    pub server_list: servers::Listing,
    pub device_lists: devices::Listing,
    pub usage_reports: usage::Reports,
    pub health: HealthCache,
    pub strangers: Strangers,
    pub staff_watch: StaffWatch,
    /// Set once, at the beginning of the shutdown: readiness fails from then on.
    pub draining: tokio_util::sync::CancellationToken,
}

impl App {
    #[must_use]
    pub fn new(config: Config, db: Db, keys: KeyRing, secrets: PlatformSecrets, token_keys: TokenKeyring) -> Self {
        let passwords = Passwords::new(config.passwords);
        Self(Arc::new(Inner {
            config,
            db,
            keys,
            data_keys: DataKeys::default(),
            secrets,
            token_keys,
            clock: Clock,
            nodes: Hub::default(),
            passwords,
            limiter: Limiter::default(),
            throttles: Throttles::default(),
            uses: Uses::default(),
            request_log: Arc::default(),
            key_lookups: Lookups::default(),
            over_rate: OverRate::default(),
            tokens: VerifiedTokens::default(),
            registrations: Registrations::default(),
            server_list: servers::Listing::default(),
            device_lists: devices::Listing::default(),
            usage_reports: usage::Reports::default(),
            health: HealthCache::default(),
            strangers: Strangers::default(),
            staff_watch: StaffWatch::default(),
            draining: tokio_util::sync::CancellationToken::new(),
        }))
    }
}

impl App {
    /// The keys that sign and verify tokens now.
    ///
    /// # Errors
    /// When they have to be read anew and the database does not answer.
    pub async fn token_keys(&self) -> Result<Arc<TokenKeys>, DbError> {
        self.token_keys.now(&self.db.sys, &self.keys).await
    }

    /// What `verify` says of a token: once more when its key is one that this replica has not heard of yet.
    ///
    /// # Errors
    /// That of `verify`, or the database's.
    pub async fn verified<T>(
        &self,
        token: &str,
        verify: impl Fn(&TokenKeys) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let keys = self.token_keys().await?;
        match verify(&keys) {
            Err(problem) if tokens::names_a_key_besides(&keys, token) => {
                match self.token_keys.reload_for_unknown(&self.db.sys, &self.keys).await? {
                    Some(keys) => verify(&keys),
                    None => Err(problem),
                }
            }
            outcome => outcome,
        }
    }
}

impl Deref for App {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}
