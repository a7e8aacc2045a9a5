//! Running a command: open the platform, call the operation, print the answer.

use std::io::{self, Write};

use cvault_node_protocol::token::EnrolToken;
use cvault_types::admin::ServerStatus;
use cvault_types::tenant::{Tenant, TenantStatus, UpdateTenantRequest};
use cvault_types::{ErrorCode, ServerId, TenantId};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

use super::{AdminArgs, AdminCommand, PoolCommand, ServerCommand, TenantCommand, TenantUpdate};
use crate::app::App;
use crate::auth::api_keys::ManageError;
use crate::config::{Config, Faults, Lookup, Overrides, ServeConfig};
use crate::db::{DbError, Tx};
use crate::dev::{self, DevError};
use crate::http::Problem;
use crate::ipam::{self, CreatePoolError, DeletePoolError, NewPool, Pool, PoolChange};
use crate::keys::RotateError;
use crate::mail::{EnqueueError, RetryError, SendError};
use crate::portal::accounts::CreateError;
use crate::serve::{self, StartError};
use crate::servers::{self, CreateServerError, NewServer, Removal, RemoveServerError, ServerDetails, ServerFilter};
use crate::tenants::{self, Actor, Settings, TenantError};
use crate::usage;

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error(transparent)]
    Config(#[from] Faults),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Dev(#[from] DevError),
    #[error(transparent)]
    Tenant(#[from] TenantError),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Pool(#[from] CreatePoolError),
    #[error(transparent)]
    DeletePool(#[from] DeletePoolError),
    #[error(transparent)]
    CreateServer(#[from] CreateServerError),
    #[error(transparent)]
    RemoveServer(#[from] RemoveServerError),
    #[error("there is no such server")]
    NoServer,
    #[error("there is no such pool")]
    NoPool,
    #[error(transparent)]
    Rotate(#[from] RotateError),
    #[error(transparent)]
    RetryMail(#[from] RetryError),
    #[error("the test mail was not taken")]
    TestMail(#[from] SendError),
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("the answer cannot be printed")]
    Print(#[from] io::Error),
    #[error("the audit log was tampered with: see `broken`")]
    Chain(Vec<Value>),
    #[error("nobody has a portal account with this address")]
    NoAccount,
    #[error(transparent)]
    Account(#[from] CreateError),
    #[error(transparent)]
    ApiKey(#[from] ManageError),
    #[error(transparent)]
    Mail(#[from] EnqueueError),
    #[error("{mismatches} of {checked} counters disagree with what was billed")]
    Ledger { checked: u64, mismatches: u64 },
}

/// Runs one command and prints its answer on standard output.
///
/// # Errors
/// What was refused and why; nothing was changed then.
pub async fn run(args: AdminArgs, lookup: Lookup<'_>) -> Result<(), AdminError> {
    let app = match &args.data_dir {
        Some(dir) => dev::open(Config::from_env(lookup, &Overrides::default())?, dir).await?,
        None => {
            let config = ServeConfig::from_env(lookup)?;
            serve::open(config.config, &config.database, config.keys).await?
        }
    };
    let (answer, failure) = match answer(&app, args.command).await {
        // a mismatch is an answer too
        Err(AdminError::Ledger { checked, mismatches }) => {
            (json!({"checked": checked, "mismatches": mismatches}), Some(AdminError::Ledger { checked, mismatches }))
        }
        Err(AdminError::Chain(broken)) => (json!({"broken": broken}), Some(AdminError::Chain(Vec::new()))),
        result => (result?, None),
    };
    app.db.close().await;
    print(&answer, args.json)?;
    failure.map_or(Ok(()), Err)
}

async fn answer(app: &App, command: AdminCommand) -> Result<Value, AdminError> {
    match command {
        AdminCommand::Token(args) => super::token::run(app, args).await,
        AdminCommand::Approve(args) => super::token::approve(app, args).await,
        AdminCommand::Tenant(command) => tenant(app, command).await,
        AdminCommand::Pool(command) => pool(app, command).await,
        AdminCommand::Server(command) => server(app, command).await,
        AdminCommand::ApiKey(command) => super::api_keys::run(app, command).await,
        AdminCommand::Portal(command) => super::portal::run(app, command).await,
        AdminCommand::Audit(command) => super::audit::run(app, command).await,
        AdminCommand::Keys(command) => super::keys::run(app, command).await,
        AdminCommand::Mail(command) => super::mail::run(app, command).await,
        AdminCommand::VerifyLedger => verify_ledger(app).await,
    }
}

pub(super) fn cli() -> Actor {
    Actor { name: "cli".to_owned(), request_id: None }
}

async fn tenant(app: &App, command: TenantCommand) -> Result<Value, AdminError> {
    let actor = cli();
    match command {
        TenantCommand::Create { name } => {
            let settings = Settings::named(name).checked().map_err(refused)?;
            let (tenant, key) = tenants::create(app, settings, &actor, &mut StdRng::from_os_rng()).await?;
            Ok(json!({"tenant_id": tenant.id, "api_key": key.key, "api_secret": key.secret.expose()}))
        }
        TenantCommand::List => {
            let mut all = Vec::new();
            loop {
                let page =
                    tenants::list(&app.db.sys, all.last().map(|tenant: &cvault_types::tenant::Tenant| tenant.id), 200)
                        .await?;
                if page.is_empty() {
                    return Ok(json!({"tenants": all}));
                }
                all.extend(page);
            }
        }
        TenantCommand::Show { id } => Ok(shown_tenant(&tenants::get(app, id).await?)),
        TenantCommand::Update(update) => {
            let id = update.id;
            let tenant = tenants::update(app, id, request(*update), &actor).await.map_err(refused)?;
            Ok(shown_tenant(&tenant))
        }
        TenantCommand::Suspend { id } => set_status(app, id, TenantStatus::Suspended, &actor).await,
        TenantCommand::Resume { id } => set_status(app, id, TenantStatus::Active, &actor).await,
        TenantCommand::Delete { id } => {
            tenants::delete(app, id, &actor).await?;
            Ok(json!({"tenant_id": id, "status": "deleted"}))
        }
    }
}

fn request(update: TenantUpdate) -> UpdateTenantRequest {
    UpdateTenantRequest {
        name: update.name,
        bandwidth_limit_gb: update.bandwidth_limit_gb.map(|limit| limit.0),
        user_limit: update.user_limit.map(|limit| limit.0),
        max_devices_per_user: update.max_devices_per_user,
        rate_limit_per_minute: update.rate_limit_per_minute.map(|limit| limit.0),
        user_rate_limit_per_minute: update.user_rate_limit_per_minute.map(|limit| limit.0),
        policy: update.policy.map(|policy| policy.0),
        ..UpdateTenantRequest::default()
    }
}

fn shown_tenant(tenant: &Tenant) -> Value {
    serde_json::to_value(tenant).expect("a tenant is plain data")
}

async fn set_status(app: &App, id: TenantId, status: TenantStatus, actor: &Actor) -> Result<Value, AdminError> {
    let request = UpdateTenantRequest { status: Some(status), ..UpdateTenantRequest::default() };
    let tenant = tenants::update(app, id, request, actor).await.map_err(refused)?;
    Ok(json!({"tenant_id": tenant.id, "status": tenant.status}))
}

pub(super) fn refused(problem: Problem) -> AdminError {
    if problem.code() == ErrorCode::NotFound {
        AdminError::Tenant(TenantError::NotFound)
    } else {
        AdminError::Refused(problem.sentences())
    }
}

async fn pool(app: &App, command: PoolCommand) -> Result<Value, AdminError> {
    match command {
        PoolCommand::Create { name, v4, v6, quarantine, reclaim } => {
            let v6 = v6.unwrap_or_else(|| ipam::draw_ula(&mut StdRng::from_os_rng()));
            let quarantine_seconds = quarantine.unwrap_or(app.config.quarantine_seconds);
            let pool = NewPool { name, ipv4: v4, ipv6: v6, quarantine_seconds, reclaim };
            let mut tx = Tx::begin(&app.db.sys).await?;
            let made = ipam::create_pool_noted(&mut tx, &pool, &cli()).await;
            Ok(json!({"pool_id": tx.finish(made).await?, "v6": v6}))
        }
        PoolCommand::Show { id } => {
            let found = ipam::list_details(&app.db.sys, Some(id), None, 1).await?.pop();
            Ok(shown_pool(found.ok_or(AdminError::NoPool)?))
        }
        PoolCommand::Update { id, name, quarantine, reclaim } => {
            let change = PoolChange { name, quarantine_seconds: quarantine, reclaim };
            let mut tx = Tx::begin(&app.db.sys).await?;
            let work = match ipam::update_pool(&mut tx, id, change, &cli()).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(AdminError::NoPool),
                Err(error) => Err(error.into()),
            };
            tx.finish(work).await?;
            let found = ipam::list_details(&app.db.sys, Some(id), None, 1).await?.pop();
            Ok(shown_pool(found.ok_or(AdminError::NoPool)?))
        }
        PoolCommand::Delete { id } => {
            let mut tx = Tx::begin(&app.db.sys).await?;
            let work = ipam::delete_pool(&mut tx, id, app.clock.now(), &cli()).await;
            tx.finish(work).await?;
            Ok(json!({"pool_id": id, "status": "deleted"}))
        }
        PoolCommand::List => {
            let pools = ipam::list_pools(&app.db.sys).await?;
            let rows: Vec<Value> = pools.into_iter().map(shown_pool).collect();
            Ok(json!({"pools": rows}))
        }
    }
}

fn shown_pool(pool: Pool) -> Value {
    json!({"id": pool.id, "name": pool.name, "v4": pool.ipv4, "v6": pool.ipv6,
           "quarantine_seconds": pool.quarantine_seconds, "reclaim": pool.reclaim, "servers": pool.servers,
           "allocated": pool.allocated, "quarantined": pool.quarantined, "size": pool.size})
}

async fn server(app: &App, command: ServerCommand) -> Result<Value, AdminError> {
    match command {
        ServerCommand::Create { name, region, public_ip, port, pool, capacity } => {
            let server = NewServer { name, region, public_ip, endpoint_port: port, pool, capacity };
            create_server(app, &server).await
        }
        ServerCommand::List => {
            let rows: Vec<Value> = servers::list_all(&app.db.sys).await?.into_iter().map(shown_server).collect();
            Ok(json!({"servers": rows}))
        }
        ServerCommand::Show { id } => {
            let only = ServerFilter { id: Some(id), ..ServerFilter::default() };
            let found = servers::list_details(&app.db.sys, &only, None, 1).await?.pop();
            Ok(shown_server(found.ok_or(AdminError::NoServer)?))
        }
        ServerCommand::Token { id } => {
            let pin = app.secrets.node_identity.pin();
            let mut tx = Tx::begin(&app.db.sys).await?;
            let work = servers::renew_token(&mut tx, id, pin, &cli(), &mut StdRng::from_os_rng()).await;
            let token = tx.finish(work).await?;
            Ok(enrolment(app, id, &token.ok_or(AdminError::NoServer)?))
        }
        ServerCommand::Drain { id } => set_server(app, id, ServerStatus::Draining).await,
        ServerCommand::Maintenance { id } => set_server(app, id, ServerStatus::Maintenance).await,
        ServerCommand::Activate { id } => set_server(app, id, ServerStatus::Active).await,
        ServerCommand::Remove { id, force } => {
            let removal = if force { Removal::Forced } else { Removal::Settled };
            let mut tx = Tx::begin(&app.db.sys).await?;
            let work = servers::remove_server(&mut tx, id, removal, &cli()).await;
            tx.finish(work).await?;
            Ok(json!({"server_id": id, "status": "removed"}))
        }
    }
}

fn shown_server(server: ServerDetails) -> Value {
    json!({"id": server.id, "name": server.name, "region": server.region, "public_ip": server.public_ip,
           "port": server.endpoint_port, "pool": server.pool, "capacity": server.capacity,
           "status": server.status, "enrolled": server.enrolled, "peers": server.peers,
           "revision": server.revision, "acked_revision": server.acked_revision,
           "last_seen_at": server.last_seen_at.and_then(|at| at.format(&Rfc3339).ok()),
           "health": server.health})
}

/// The server and its token, or neither.
async fn create_server(app: &App, server: &NewServer) -> Result<Value, AdminError> {
    let mut rng = StdRng::from_os_rng();
    let mut tx = Tx::begin(&app.db.sys).await?;
    let pin = app.secrets.node_identity.pin();
    let work = servers::create_with_token(&mut tx, server, pin, &cli(), &mut rng).await;
    let (id, token) = tx.finish(work).await?;
    Ok(enrolment(app, id, &token))
}

async fn set_server(app: &App, id: ServerId, status: ServerStatus) -> Result<Value, AdminError> {
    let mut tx = Tx::begin(&app.db.sys).await?;
    let work = match servers::set_status(&mut tx, id, status, &cli()).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(AdminError::NoServer),
        Err(error) => Err(error.into()),
    };
    tx.finish(work).await?;
    Ok(json!({"server_id": id, "status": status}))
}

fn enrolment(app: &App, id: ServerId, token: &EnrolToken) -> Value {
    let command = servers::enrol_command(&app.config.node_endpoint);
    json!({"server_id": id, "token": token.expose().as_str(), "command": command})
}

async fn verify_ledger(app: &App) -> Result<Value, AdminError> {
    let verified = usage::verify_ledger(&app.db.sys).await?;
    if verified.mismatches > 0 {
        return Err(AdminError::Ledger { checked: verified.checked, mismatches: verified.mismatches });
    }
    Ok(json!({"checked": verified.checked, "mismatches": verified.mismatches}))
}

fn print(answer: &Value, as_json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if as_json {
        writeln!(out, "{answer}")?;
    } else {
        for line in for_people(answer) {
            writeln!(out, "{line}")?;
        }
    }
    out.flush()
}

/// `name: value` lines; a list is one line for each row, one of words a line.
fn for_people(answer: &Value) -> Vec<String> {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let Some(fields) = answer.as_object() else { return vec![plain(answer)] };
    fields
        .iter()
        .flat_map(|(name, value)| match value.as_array() {
            Some(rows) if rows.is_empty() => vec![format!("no {name}")],
            Some(words) if words.iter().all(Value::is_string) => {
                vec![format!("{name}: {}", words.iter().map(plain).collect::<Vec<_>>().join(","))]
            }
            Some(rows) => rows
                .iter()
                .map(|row| {
                    let cells = row.as_object().into_iter().flatten();
                    cells.map(|(name, value)| format!("{name}={}", plain(value))).collect::<Vec<_>>().join("  ")
                })
                .collect(),
            None => vec![format!("{name}: {}", plain(value))],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_a_line_for_each_value_and_each_row() {
        let rows = json!([{"id": "a", "peers": 2}, {"id": "b", "peers": 0}]);
        let answer = json!({"api_key": "k", "none": [], "rows": rows, "scopes": ["users", "usage"]});
        assert_eq!(
            for_people(&answer),
            ["api_key: k", "no none", "id=a  peers=2", "id=b  peers=0", "scopes: users,usage"]
        );
    }
}
