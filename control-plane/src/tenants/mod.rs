//! The platform's business customers: creating, changing, suspending and deleting them.
//!
//! Every change is made inside the tenant's own transaction, also when platform staff makes it; only listing looks across
//! tenants, with role `cvault_sys`.

mod client;
mod delete;
pub mod policy;
mod settings;
mod suspension;

use cvault_types::tenant::{CreateTenantRequest, Tenant, TenantPolicy, TenantStatus, UpdateTenantRequest};
use cvault_types::{RequestId, ServerId, TenantId};
use rand::CryptoRng;
use serde_json::json;
use sqlx::PgPool;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::app::App;
use crate::audit;
use crate::auth::api_keys::{self, NewKey};
use crate::db::DbError;
use crate::http::Problem;
use crate::tenancy::TenantTx;
use crate::text::misleads;

pub use client::{ClientSettings, client_settings};
pub use delete::{delete, finish_deletions};
pub use settings::{SettingsChange, settings, update_settings};
pub use suspension::{enforce as enforce_suspensions, enforce_users, mark_over_limit};

/// Decimal, as bandwidth is sold: 1 GB = 10⁹ bytes.
const GB: i64 = 1_000_000_000;
/// Of a tenant's name.
pub const NAME_RULE: &str = "must have 1 to 255 printable characters, and none that nobody sees";

/// Whether the transaction's tenant is there, and nobody is deleting it; so it stays until the transaction ends, which others
/// that ask this wait for.
///
/// # Errors
/// Those of the database.
pub async fn hold(tx: &mut TenantTx) -> Result<bool, DbError> {
    let tenant = tx.tenant().uuid();
    // "no key": foreign keys of other transactions to this tenant do not wait
    let there = sqlx::query_scalar!(
        r#"select status <> 'deleted' and deleting_since is null as "there!"
           from cvault.tenants where tenant_id = $1 for no key update"#,
        tenant
    )
    .fetch_optional(tx.conn())
    .await?;
    Ok(there.unwrap_or_default())
}

/// Who changes a tenant, for the audit log.
#[derive(Debug, Clone)]
pub struct Actor {
    /// `admin:<subject>` or `cli`.
    pub name: String,
    pub request_id: Option<RequestId>,
}

#[derive(Debug, thiserror::Error)]
pub enum TenantError {
    #[error("there is no such tenant")]
    NotFound,
    #[error("a key of the tenant does not open")]
    Keys(#[from] crate::keys::KeyError),
    /// The `Idempotency-Key` of the request.
    #[error("{}", .0.sentences())]
    Idempotency(Problem),
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Settings that have been checked.
#[derive(Debug, Clone)]
pub struct Settings {
    pub name: String,
    pub status: TenantStatus,
    pub bandwidth_limit_gb: Option<i64>,
    pub user_limit: Option<i32>,
    pub max_devices_per_user: i32,
    pub rate_limit_per_minute: Option<i32>,
    pub user_rate_limit_per_minute: Option<i32>,
    pub whitelabel_config: serde_json::Map<String, serde_json::Value>,
    pub policy: TenantPolicy,
}

impl Settings {
    /// A tenant as the guide's defaults make it.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            status: TenantStatus::Active,
            bandwidth_limit_gb: None,
            user_limit: None,
            max_devices_per_user: 5,
            rate_limit_per_minute: None,
            user_rate_limit_per_minute: None,
            whitelabel_config: serde_json::Map::new(),
            policy: TenantPolicy::default(),
        }
    }

    /// # Errors
    /// All faults at once.
    pub fn for_new(request: CreateTenantRequest) -> Result<Self, Problem> {
        let defaults = Self::named(request.name);
        Self {
            status: request.status.unwrap_or(defaults.status),
            bandwidth_limit_gb: request.bandwidth_limit_gb,
            user_limit: request.user_limit,
            max_devices_per_user: request.max_devices_per_user.unwrap_or(defaults.max_devices_per_user),
            rate_limit_per_minute: request.rate_limit_per_minute,
            user_rate_limit_per_minute: request.user_rate_limit_per_minute,
            whitelabel_config: request.whitelabel_config.unwrap_or_default(),
            policy: policy::changed(defaults.policy, request.policy.unwrap_or_default()),
            name: defaults.name,
        }
        .checked()
    }

    fn changed(self, request: UpdateTenantRequest) -> Result<Self, Problem> {
        // a name that it has had for long, and that would not be taken any more, keeps nobody from suspending it
        let is_renamed = request.name.is_some();
        Self {
            name: request.name.unwrap_or(self.name),
            status: request.status.unwrap_or(self.status),
            bandwidth_limit_gb: request.bandwidth_limit_gb.unwrap_or(self.bandwidth_limit_gb),
            user_limit: request.user_limit.unwrap_or(self.user_limit),
            max_devices_per_user: request.max_devices_per_user.unwrap_or(self.max_devices_per_user),
            rate_limit_per_minute: request.rate_limit_per_minute.unwrap_or(self.rate_limit_per_minute),
            user_rate_limit_per_minute: request.user_rate_limit_per_minute.unwrap_or(self.user_rate_limit_per_minute),
            whitelabel_config: request.whitelabel_config.unwrap_or(self.whitelabel_config),
            policy: policy::changed(self.policy, request.policy.unwrap_or_default()),
        }
        .check(is_renamed)
    }

    /// The name loses the space around it.
    ///
    /// # Errors
    /// All faults at once.
    pub fn checked(self) -> Result<Self, Problem> {
        self.check(true)
    }

    fn check(mut self, is_named: bool) -> Result<Self, Problem> {
        let misleading = misleads(&self.name);
        self.name = self.name.trim().to_owned();
        let mut problem = Problem::validation();
        let mut bounds = |pointer: &str, value: Option<i64>, min: i64, max: i64| {
            if value.is_some_and(|value| !(min..=max).contains(&value)) {
                let taken = std::mem::replace(&mut problem, Problem::validation());
                problem = taken.field(pointer, "out_of_range", format!("must be from {min} to {max}"));
            }
        };
        bounds("/bandwidth_limit_gb", self.bandwidth_limit_gb, 0, 1_000_000_000);
        bounds("/user_limit", self.user_limit.map(i64::from), 0, i64::from(i32::MAX));
        bounds("/max_devices_per_user", Some(i64::from(self.max_devices_per_user)), 0, 1_000);
        bounds("/rate_limit_per_minute", self.rate_limit_per_minute.map(i64::from), 1, 1_000_000);
        bounds("/user_rate_limit_per_minute", self.user_rate_limit_per_minute.map(i64::from), 1, 1_000_000);
        if is_named && (misleading || !(1..=255).contains(&self.name.chars().count())) {
            problem = problem.field("/name", "invalid_format", NAME_RULE);
        }
        if matches!(self.status, TenantStatus::Deleting | TenantStatus::Deleted) {
            problem =
                problem.field("/status", "invalid_value", "must be active, trial or suspended; delete with DELETE");
        }
        // what is stored is also what is audited and sent to browsers
        if serde_json::to_string(&self.whitelabel_config)
            .map_or(true, |text| text.len() > 16_384 || text.contains("\\u0000"))
        {
            problem = problem.field("/whitelabel_config", "too_long", "must be at most 16 KiB of JSON without NUL");
        }
        problem = policy::check(&mut self.policy, problem);
        problem.or_ok(self)
    }
}

/// Makes a tenant with its data key and its first API key.
///
/// # Errors
/// Those of the database.
pub async fn create(
    app: &App,
    settings: Settings,
    actor: &Actor,
    rng: &mut impl CryptoRng,
) -> Result<(Tenant, NewKey), TenantError> {
    let mut tx = app.db.tenancy.begin(TenantId::from_uuid(Uuid::now_v7())).await?;
    let made = create_in(&mut tx, app, settings, actor, rng).await;
    tx.finish(made).await
}

/// Makes the tenant of the transaction, which was begun for a fresh id.
///
/// # Errors
/// Those of the database.
pub async fn create_in(
    tx: &mut TenantTx,
    app: &App,
    settings: Settings,
    actor: &Actor,
    rng: &mut impl CryptoRng,
) -> Result<(Tenant, NewKey), TenantError> {
    let (id, now) = (tx.tenant(), app.clock.now());
    let data_key = app.keys.new_data_key(id, rng);
    sqlx::query!(
        "insert into cvault.tenants (tenant_id, name, status, bandwidth_limit_bytes, user_limit, max_devices_per_user,
             whitelabel_config, rate_limit_per_minute, data_key_version, data_key_sealed, created_at, updated_at,
             rate_up_bps, rate_down_bps, device_rate_up_bps, device_rate_down_bps, allow_intra_tenant,
             allow_private_destinations, allow_smtp, over_quota, throttle_bps, user_rate_limit_per_minute)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)",
        id.uuid(),
        settings.name,
        status_text(settings.status),
        settings.bandwidth_limit_gb.map(|gb| gb * GB),
        settings.user_limit,
        settings.max_devices_per_user,
        serde_json::Value::Object(settings.whitelabel_config.clone()),
        settings.rate_limit_per_minute,
        data_key.kek_version,
        data_key.sealed,
        now,
        bps(settings.policy.rate_up_mbps),
        bps(settings.policy.rate_down_mbps),
        bps(settings.policy.device_rate_up_mbps),
        bps(settings.policy.device_rate_down_mbps),
        settings.policy.allow_intra_tenant,
        &settings.policy.allow_private_destinations,
        settings.policy.allow_smtp,
        policy::over_quota_text(settings.policy.over_quota),
        i64::from(settings.policy.throttle_kbps) * policy::KBIT,
        settings.user_rate_limit_per_minute,
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    let key = api_keys::create(tx, &app.secrets, now, rng).await?;
    note(tx, actor, "tenant.create", json!({"name": settings.name})).await?;
    Ok((tenant(id, settings, now), key))
}

/// # Errors
/// [`TenantError::NotFound`] also for a deleted tenant.
pub async fn get(app: &App, id: TenantId) -> Result<Tenant, TenantError> {
    let mut tx = app.db.tenancy.begin(id).await?;
    let found = load(&mut tx).await;
    tx.finish(found).await
}

/// How far a tenant that was made is from its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    There,
    Deleting,
    Deleted,
}

/// `None` for a tenant that never was.
///
/// # Errors
/// Those of the database.
pub async fn stage(sys: &PgPool, id: TenantId) -> Result<Option<Stage>, DbError> {
    let row = sqlx::query!(
        r#"select status = 'deleted' as "deleted!", deleting_since is not null as "deleting!"
           from cvault.tenants where tenant_id = $1"#,
        id.uuid()
    )
    .fetch_optional(sys)
    .await?;
    Ok(row.map(|row| match (row.deleted, row.deleting) {
        (true, _) => Stage::Deleted,
        (false, true) => Stage::Deleting,
        (false, false) => Stage::There,
    }))
}

/// Up to `limit` tenants after `after`, oldest first; deleted ones are left out.
///
/// # Errors
/// Those of the database.
pub async fn list(sys: &PgPool, after: Option<TenantId>, limit: i64) -> Result<Vec<Tenant>, DbError> {
    let rows = sqlx::query_as!(
        Row,
        r#"select tenant_id, name, case when deleting_since is null then status else 'deleting' end as "status!", bandwidth_limit_bytes, user_limit, max_devices_per_user, rate_limit_per_minute,
                whitelabel_config, created_at, rate_up_bps, rate_down_bps, device_rate_up_bps, device_rate_down_bps,
                allow_intra_tenant, allow_private_destinations, allow_smtp, over_quota, throttle_bps,
                user_rate_limit_per_minute
         from cvault.tenants where status <> 'deleted' and tenant_id > $1 order by tenant_id limit $2"#,
        after.map_or(Uuid::nil(), TenantId::uuid),
        limit
    )
    .fetch_all(sys)
    .await?;
    Ok(rows.into_iter().map(Row::into_tenant).collect())
}

/// Changes the fields that `request` names.
///
/// # Errors
/// Field faults as a problem; otherwise as [`get`].
pub async fn update(app: &App, id: TenantId, request: UpdateTenantRequest, actor: &Actor) -> Result<Tenant, Problem> {
    let mut tx = app.db.tenancy.begin(id).await?;
    let work = update_in(&mut tx, request, actor, app.clock.now()).await;
    let (tenant, servers) = tx.finish(work).await?;
    servers.into_iter().for_each(|server| app.nodes.policies_changed(server));
    Ok(tenant)
}

/// As [`update`], of the transaction's tenant; with the servers that are to be told once it is committed.
///
/// # Errors
/// As [`update`].
pub async fn update_in(
    tx: &mut TenantTx,
    request: UpdateTenantRequest,
    actor: &Actor,
    now: OffsetDateTime,
) -> Result<(Tenant, Vec<ServerId>), Problem> {
    let id = tx.tenant();
    let details = serde_json::to_value(&request).unwrap_or_default();
    let before = load_to_change(tx).await?;
    let told = (before.policy.clone(), before.bandwidth_limit_gb);
    let settings = Settings {
        name: before.name,
        status: before.status,
        bandwidth_limit_gb: before.bandwidth_limit_gb,
        user_limit: before.user_limit,
        max_devices_per_user: before.max_devices_per_user,
        rate_limit_per_minute: before.rate_limit_per_minute,
        user_rate_limit_per_minute: before.user_rate_limit_per_minute,
        whitelabel_config: before.whitelabel_config,
        policy: before.policy,
    }
    .changed(request)?;
    let concerns_servers = told != (settings.policy.clone(), settings.bandwidth_limit_gb);
    sqlx::query!(
        "update cvault.tenants set name = $2, status = $3, bandwidth_limit_bytes = $4, user_limit = $5,
             max_devices_per_user = $6, whitelabel_config = $7, rate_limit_per_minute = $8, updated_at = $9,
             rate_up_bps = $10, rate_down_bps = $11, device_rate_up_bps = $12, device_rate_down_bps = $13,
             allow_intra_tenant = $14, allow_private_destinations = $15, allow_smtp = $16, over_quota = $17,
             throttle_bps = $18, policy_revision = policy_revision + case when $19 then 1 else 0 end,
             user_rate_limit_per_minute = $20
         where tenant_id = $1",
        id.uuid(),
        settings.name,
        status_text(settings.status),
        settings.bandwidth_limit_gb.map(|gb| gb * GB),
        settings.user_limit,
        settings.max_devices_per_user,
        serde_json::Value::Object(settings.whitelabel_config.clone()),
        settings.rate_limit_per_minute,
        now,
        bps(settings.policy.rate_up_mbps),
        bps(settings.policy.rate_down_mbps),
        bps(settings.policy.device_rate_up_mbps),
        bps(settings.policy.device_rate_down_mbps),
        settings.policy.allow_intra_tenant,
        &settings.policy.allow_private_destinations,
        settings.policy.allow_smtp,
        policy::over_quota_text(settings.policy.over_quota),
        i64::from(settings.policy.throttle_kbps) * policy::KBIT,
        concerns_servers,
        settings.user_rate_limit_per_minute
    )
    .execute(tx.conn())
    .await
    .map_err(DbError::from)?;
    note(tx, actor, "tenant.update", details).await?;
    let servers = if concerns_servers { servers_of(tx).await? } else { Vec::new() };
    Ok((tenant(id, settings, before.created_at), servers))
}

async fn servers_of(tx: &mut TenantTx) -> Result<Vec<ServerId>, DbError> {
    let tenant = tx.tenant().uuid();
    let servers = sqlx::query_scalar!(
        "select distinct server_id from cvault.devices where tenant_id = $1 and status = 'active'",
        tenant
    )
    .fetch_all(tx.conn())
    .await?;
    Ok(servers.into_iter().map(ServerId::from_uuid).collect())
}

/// The row, locked until the transaction ends. [`TenantError::NotFound`] also for a tenant that is being deleted.
async fn load_to_change(tx: &mut TenantTx) -> Result<Tenant, TenantError> {
    let tenant = tx.tenant().uuid();
    sqlx::query!(
        "select tenant_id from cvault.tenants where tenant_id = $1 and deleting_since is null for no key update",
        tenant
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(TenantError::NotFound)?;
    // a statement of its own: it sees what was committed while the lock was waited for
    load(tx).await
}

async fn load(tx: &mut TenantTx) -> Result<Tenant, TenantError> {
    let id = tx.tenant();
    let row = sqlx::query_as!(
        Row,
        r#"select tenant_id, name, case when deleting_since is null then status else 'deleting' end as "status!",
                bandwidth_limit_bytes, user_limit, max_devices_per_user, rate_limit_per_minute,
                whitelabel_config, created_at, rate_up_bps, rate_down_bps, device_rate_up_bps, device_rate_down_bps,
                allow_intra_tenant, allow_private_destinations, allow_smtp, over_quota, throttle_bps,
                user_rate_limit_per_minute
         from cvault.tenants where tenant_id = $1 and status <> 'deleted'"#,
        id.uuid()
    )
    .fetch_optional(tx.conn())
    .await
    .map_err(DbError::from)?
    .ok_or(TenantError::NotFound)?;
    Ok(row.into_tenant())
}

struct Row {
    tenant_id: Uuid,
    name: String,
    status: String,
    bandwidth_limit_bytes: Option<i64>,
    user_limit: Option<i32>,
    max_devices_per_user: i32,
    rate_limit_per_minute: Option<i32>,
    user_rate_limit_per_minute: Option<i32>,
    whitelabel_config: serde_json::Value,
    created_at: OffsetDateTime,
    rate_up_bps: Option<i64>,
    rate_down_bps: Option<i64>,
    device_rate_up_bps: Option<i64>,
    device_rate_down_bps: Option<i64>,
    allow_intra_tenant: bool,
    allow_private_destinations: Vec<String>,
    allow_smtp: bool,
    over_quota: String,
    throttle_bps: i64,
}

impl Row {
    fn into_tenant(self) -> Tenant {
        let mbps = |bps: Option<i64>| bps.and_then(|bps| i32::try_from(bps / policy::MBIT).ok());
        let settings = Settings {
            name: self.name,
            status: parse_status(&self.status),
            bandwidth_limit_gb: self.bandwidth_limit_bytes.map(|bytes| bytes / GB),
            user_limit: self.user_limit,
            max_devices_per_user: self.max_devices_per_user,
            rate_limit_per_minute: self.rate_limit_per_minute,
            user_rate_limit_per_minute: self.user_rate_limit_per_minute,
            whitelabel_config: object(self.whitelabel_config),
            policy: TenantPolicy {
                rate_up_mbps: mbps(self.rate_up_bps),
                rate_down_mbps: mbps(self.rate_down_bps),
                device_rate_up_mbps: mbps(self.device_rate_up_bps),
                device_rate_down_mbps: mbps(self.device_rate_down_bps),
                allow_intra_tenant: self.allow_intra_tenant,
                allow_private_destinations: self.allow_private_destinations,
                allow_smtp: self.allow_smtp,
                over_quota: policy::parse_over_quota(&self.over_quota),
                throttle_kbps: i32::try_from(self.throttle_bps / policy::KBIT).unwrap_or(i32::MAX),
            },
        };
        tenant(TenantId::from_uuid(self.tenant_id), settings, self.created_at)
    }
}

fn bps(mbps: Option<i32>) -> Option<i64> {
    mbps.map(|mbps| i64::from(mbps) * policy::MBIT)
}

async fn note(
    tx: &mut TenantTx,
    actor: &Actor,
    action: &'static str,
    details: serde_json::Value,
) -> Result<(), DbError> {
    let target = tx.tenant().to_string();
    let entry = audit::Entry { actor: &actor.name, action, target: &target, details, request_id: actor.request_id };
    audit::record(tx, entry).await
}

fn tenant(id: TenantId, settings: Settings, created_at: OffsetDateTime) -> Tenant {
    Tenant {
        id,
        name: settings.name,
        status: settings.status,
        bandwidth_limit_gb: settings.bandwidth_limit_gb,
        user_limit: settings.user_limit,
        max_devices_per_user: settings.max_devices_per_user,
        rate_limit_per_minute: settings.rate_limit_per_minute,
        user_rate_limit_per_minute: settings.user_rate_limit_per_minute,
        whitelabel_config: settings.whitelabel_config,
        policy: settings.policy,
        created_at,
    }
}

fn object(value: serde_json::Value) -> serde_json::Map<String, serde_json::Value> {
    if let serde_json::Value::Object(map) = value { map } else { serde_json::Map::new() }
}

fn status_text(status: TenantStatus) -> &'static str {
    match status {
        TenantStatus::Active => "active",
        TenantStatus::Trial => "trial",
        TenantStatus::Suspended => "suspended",
        TenantStatus::Deleting => "deleting",
        TenantStatus::Deleted => "deleted",
    }
}

fn parse_status(text: &str) -> TenantStatus {
    match text {
        "trial" => TenantStatus::Trial,
        "suspended" => TenantStatus::Suspended,
        "deleting" => TenantStatus::Deleting,
        "deleted" => TenantStatus::Deleted,
        _ => TenantStatus::Active,
    }
}

impl From<TenantError> for Problem {
    fn from(error: TenantError) -> Self {
        match error {
            TenantError::NotFound => Self::new(cvault_types::ErrorCode::NotFound),
            TenantError::Idempotency(problem) => problem,
            TenantError::Db(error) => error.into(),
            TenantError::Keys(error) => Self::internal(&error),
        }
    }
}
