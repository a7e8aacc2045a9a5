//! Throttles of those who have proven nothing yet. Only failures count (calls without a secret count all), so that nobody who knows the right password or
//! key waits for somebody who does not, except at the account under attack itself.
//!
//! By network: attempts with API keys, secrets and user tokens. A network that waits is refused before anything is looked up;
//! only its neighbours pass who were right from there within a day, or whose token's signature is. By account: guesses at one password. By tenant and
//! network: guesses at many; a tenant's backend usually calls from one address for all of its users, and another tenant
//! must not feel it. An account is counted whether it exists or not. Each replica counts for itself.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use cvault_types::{ErrorCode, TenantAdminId, TenantId, UserId};
use sha2::{Digest, Sha256};

use crate::http::Problem;
use crate::http::limit::{Allowance, Decision, Limiter};
use crate::metrics;
use crate::network::Network;

/// Calls with a wrong key, secret or token from one network.
const CREDENTIALS: Allowance = Allowance::per_minute(100);
/// Failed logins and registrations at one tenant from one network.
const LOGINS: Allowance = Allowance::per_minute(100);
/// Failed logins at one account.
const ACCOUNT: Allowance = Allowance::new(20, Duration::from_secs(300));

/// Calls without a secret to one tenant from one network, whatever their outcome: everybody has the key.
const PUBLIC_CALLS: Allowance = Allowance::per_minute(30);
/// Users registered so.
const PUBLIC_REGISTRATIONS: Allowance = Allowance::new(10, Duration::from_secs(600));
/// Mails that strangers can have sent to one account.
const MAILS: Allowance = Allowance::new(5, Duration::from_secs(3600));
/// Accounts made from one network.
const SIGNUPS: Allowance = Allowance::new(10, Duration::from_secs(3600));
/// Requests of one person in the portal. Not the tenant's own allowance: a busy API must not lock its people out.
const PORTAL: Allowance = Allowance::per_minute(300);
/// Requests of one of the platform's staff, or of its back office.
const STAFF: Allowance = Allowance::per_minute(3_000);

/// A secret that was right is remembered for so long where it came from.
const KNOWN: Allowance = Allowance::new(1, Duration::from_secs(24 * 3600));

/// One for the process.
#[derive(Debug, Default)]
pub struct Throttles {
    public: Limiter<(TenantId, Network)>,
    public_registrations: Limiter<(TenantId, Network)>,
    public_tenants: Limiter<TenantId>,
    credentials: Limiter<Network>,
    known: Limiter<(Network, Credential)>,
    keys_of_users: Limiter<UserId>,
    logins: Limiter<(TenantId, Network)>,
    accounts: Limiter<Account>,
    users: Limiter<UserId>,
    staff: Limiter<Account>,
    staff_credentials: Limiter<Network>,
    portal: Limiter<TenantAdminId>,
    portal_logins: Limiter<Network>,
    signups: Limiter<Network>,
    mails: Limiter<Account>,
}

/// A digest: the table holds no addresses, and each key has one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Account([u8; 16]);

impl Account {
    #[must_use]
    pub fn of(tenant: TenantId, email: &str) -> Self {
        let text = email.to_ascii_lowercase();
        let digest = Sha256::new().chain_update(tenant.uuid().as_bytes()).chain_update(text).finalize();
        Self(std::array::from_fn(|index| digest[index]))
    }

    fn of_staff(subject: &str) -> Self {
        let digest = Sha256::new().chain_update("staff\0").chain_update(subject).finalize();
        Self(std::array::from_fn(|index| digest[index]))
    }
}

/// A key with its secret, or a cookie, as a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Credential([u8; 16]);

impl Credential {
    #[must_use]
    pub fn of(name: &[u8], secret: &[u8]) -> Self {
        let digest = Sha256::new().chain_update(name).chain_update([0]).chain_update(secret).finalize();
        Self(std::array::from_fn(|index| digest[index]))
    }
}

impl Account {
    #[must_use]
    pub fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl Throttles {
    /// Asked before credentials are looked at.
    ///
    /// # Errors
    /// `RATE_LIMITED` for a network that has failed too often.
    pub fn before_credentials(&self, ip: Option<IpAddr>) -> Result<(), Problem> {
        let Some(network) = ip.map(Network::of) else { return Ok(()) };
        refuse(self.credentials.ask(network, CREDENTIALS, Instant::now()))
    }

    /// As [`Throttles::before_credentials`], where one that was right from there lately passes.
    ///
    /// # Errors
    /// As there.
    pub fn before_credential(&self, ip: Option<IpAddr>, credential: Credential) -> Result<(), Problem> {
        let Some(network) = ip.map(Network::of) else { return Ok(()) };
        if !self.known.ask((network, credential), KNOWN, Instant::now()).allowed {
            return Ok(());
        }
        self.before_credentials(ip)
    }

    /// Notes one that was right.
    pub fn credential_right(&self, ip: Option<IpAddr>, credential: Credential) {
        if let Some(network) = ip.map(Network::of) {
            self.known.charge((network, credential), KNOWN, Instant::now());
        }
    }

    /// Asked before the key is looked up that came with the right token of a user.
    ///
    /// # Errors
    /// `RATE_LIMITED` for a user whose keys were wrong too often.
    pub fn before_key_of(&self, user: UserId) -> Result<(), Problem> {
        refuse(self.keys_of_users.ask(user, CREDENTIALS, Instant::now()))
    }

    /// Notes a key that was wrong.
    pub fn key_failed_of(&self, user: UserId) {
        self.keys_of_users.charge(user, CREDENTIALS, Instant::now());
    }

    /// Notes credentials that were wrong.
    pub fn credentials_failed(&self, ip: Option<IpAddr>) {
        if let Some(network) = ip.map(Network::of) {
            self.credentials.charge(network, CREDENTIALS, Instant::now());
        }
    }

    /// Counts a call with nothing but a tenant's key.
    ///
    /// # Errors
    /// `RATE_LIMITED` for a network that calls too often.
    pub fn public_call(&self, tenant: TenantId, ip: Option<IpAddr>) -> Result<(), Problem> {
        let Some(network) = ip.map(Network::of) else { return Ok(()) };
        refuse(self.public.charge((tenant, network), PUBLIC_CALLS, Instant::now()))
    }

    /// Counts it for the tenant too, apart from what its backend sends.
    pub fn public_calls(&self, tenant: TenantId, allowance: Allowance) -> Decision {
        self.public_tenants.charge(tenant, allowance, Instant::now())
    }

    /// Counts a registration with nothing but a tenant's key.
    ///
    /// # Errors
    /// `RATE_LIMITED` for a network that registers too many users.
    pub fn public_registration(&self, tenant: TenantId, ip: Option<IpAddr>) -> Result<(), Problem> {
        let Some(network) = ip.map(Network::of) else { return Ok(()) };
        refuse(self.public_registrations.charge((tenant, network), PUBLIC_REGISTRATIONS, Instant::now()))
    }

    /// Counts a request of a tenant's user.
    pub fn user(&self, user: UserId, allowance: Allowance) -> Decision {
        self.users.charge(user, allowance, Instant::now())
    }

    /// What [`Throttles::user`] would say, without counting.
    pub fn ask_user(&self, user: UserId, allowance: Allowance) -> Decision {
        self.users.ask(user, allowance, Instant::now())
    }

    /// Counts a request of platform staff.
    pub fn staff(&self, subject: &str) -> Decision {
        self.staff.charge(Account::of_staff(subject), STAFF, Instant::now())
    }

    /// Asked before an admin token is looked at. Apart from [`Throttles::before_credentials`]: a tenant's broken backend must not lock
    /// out staff of the same network.
    ///
    /// # Errors
    /// `RATE_LIMITED` for a network that has failed too often.
    pub fn before_staff(&self, ip: Option<IpAddr>) -> Result<(), Problem> {
        let Some(network) = ip.map(Network::of) else { return Ok(()) };
        refuse(self.staff_credentials.ask(network, CREDENTIALS, Instant::now()))
    }

    /// Notes an admin token that was wrong.
    pub fn staff_failed(&self, ip: Option<IpAddr>) {
        if let Some(network) = ip.map(Network::of) {
            self.staff_credentials.charge(network, CREDENTIALS, Instant::now());
        }
    }

    /// Counts a request of somebody who is logged in to the portal.
    pub fn portal(&self, admin: TenantAdminId) -> Decision {
        self.portal.charge(admin, PORTAL, Instant::now())
    }

    /// Asked before a login to the portal, or a request to reset a password.
    ///
    /// # Errors
    /// `RATE_LIMITED` for a network that has failed too often.
    pub fn before_portal_login(&self, ip: Option<IpAddr>) -> Result<(), Problem> {
        let Some(network) = ip.map(Network::of) else { return Ok(()) };
        refuse(self.portal_logins.ask(network, LOGINS, Instant::now()))
    }

    /// Notes a login to the portal that was refused, or a request to reset a password.
    pub fn portal_login_failed(&self, ip: Option<IpAddr>) {
        if let Some(network) = ip.map(Network::of) {
            self.portal_logins.charge(network, LOGINS, Instant::now());
        }
    }

    /// Counts a mail that is asked for, whether the account exists or not.
    ///
    /// # Errors
    /// `RATE_LIMITED` for an account that was asked for too often.
    pub fn mail(&self, account: Account) -> Result<(), Problem> {
        refuse(self.mails.charge(account, MAILS, Instant::now()))
    }

    /// Counts an account before it is made, so that simultaneous ones count too; see [`Throttles::not_signed_up`].
    /// Addresses can be tried out here, too.
    ///
    /// # Errors
    /// `RATE_LIMITED` for a network that has made too many, or failed too often.
    pub fn before_signup(&self, ip: Option<IpAddr>) -> Result<(), Problem> {
        let Some(network) = ip.map(Network::of) else { return Ok(()) };
        refuse(self.portal_logins.ask(network, LOGINS, Instant::now()))?;
        refuse(self.signups.charge(network, SIGNUPS, Instant::now()))
    }

    /// No account was made.
    pub fn not_signed_up(&self, ip: Option<IpAddr>) {
        if let Some(network) = ip.map(Network::of) {
            self.signups.give_back(network, SIGNUPS);
        }
    }

    /// Asked before a login or a registration.
    ///
    /// # Errors
    /// `RATE_LIMITED` for a network that has failed too often at this tenant.
    pub fn before_login(&self, tenant: TenantId, ip: Option<IpAddr>) -> Result<(), Problem> {
        let Some(network) = ip.map(Network::of) else { return Ok(()) };
        refuse(self.logins.ask((tenant, network), LOGINS, Instant::now()))
    }

    /// Notes a login or a registration that was refused.
    pub fn login_failed(&self, tenant: TenantId, ip: Option<IpAddr>) {
        if let Some(network) = ip.map(Network::of) {
            self.logins.charge((tenant, network), LOGINS, Instant::now());
        }
    }

    /// Counts a guess at an account's password before it is checked, so that simultaneous guesses count too; see
    /// [`Throttles::no_guess`].
    ///
    /// # Errors
    /// `RATE_LIMITED` for an account that was guessed at too often.
    pub fn guess(&self, account: Account) -> Result<(), Problem> {
        refuse(self.accounts.charge(account, ACCOUNT, Instant::now()))
    }

    /// The password was right, or was not checked.
    pub fn no_guess(&self, account: Account) {
        self.accounts.give_back(account, ACCOUNT);
    }
}

fn refuse(decision: Decision) -> Result<(), Problem> {
    if decision.allowed {
        return Ok(());
    }
    metrics::rate_limited("throttle");
    Err(Problem::new(ErrorCode::RateLimited)
        .detail("Too many attempts. Wait as long as Retry-After says.")
        .retry_after(decision.retry_after_seconds))
}
