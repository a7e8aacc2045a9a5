//! `/api/v1/devices…`: a user's devices.

use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cvault_types::device::{
    Device, DevicePage, DeviceServer, DeviceStatus, RegisterDevice, RegisteredDevice, RotateDeviceKey,
};
use cvault_types::{DeviceId, ErrorCode, Secret, TenantId};
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use http::{HeaderMap, StatusCode};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::Instant;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::db::DbError;
use crate::devices::{
    self, ClientDefaults, ConfigError, ConfigKeys, DeviceName, Fault, KeyRequest, NewDevice, NewDeviceKeys, Platform,
    PublicKey, RegisterError, Registered, Registration, RevokeError, RotateError, ServedDevice, UsedUp, is_region,
    render_config,
};
use crate::http::idempotency::{self, Claim, Replay};
use crate::http::{Caller, Json, Path, Problem, Query, context, cursor};
use crate::ipam::Addresses;
use crate::servers::{self, Server};
use crate::tenancy::TenantTx;
use crate::tenants::{self, ClientSettings};

/// How long `?wait=active` waits when `Prefer` does not say.
const DEFAULT_WAIT: Duration = Duration::from_secs(5);
/// The longest `Prefer: wait=…` that is honoured.
const MAX_WAIT: Duration = Duration::from_secs(30);

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(register, list))
        .routes(routes!(get, delete))
        .routes(routes!(config))
        .routes(routes!(rotate_key))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RegisterQuery {
    wait: Option<Wait>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Wait {
    Active,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigQuery {
    format: Option<Format>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    Qr,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    limit: Option<u32>,
    cursor: Option<String>,
}

/// Register a device.
///
/// Makes a key pair (unless `public_key` is given), takes an address, puts the device on the least loaded server and
/// answers with a configuration file. With `?wait=active` or `Prefer: wait=5` the answer waits until the server has
/// acknowledged the device, as long as five seconds or what `Prefer` says.
#[utoipa::path(post, path = "/api/v1/devices", tag = "devices", security(("api_key" = [], "user_token" = [])),
    params(("wait" = Option<String>, Query, description = "`active`: answer when the server has acknowledged."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer."),
           ("Prefer" = Option<String>, Header, description = "`wait=SECONDS`, at most 30 (RFC 7240).")),
    request_body = RegisterDevice,
    responses((status = 201, body = RegisteredDevice),
              (status = 403, description = "DEVICE_LIMIT_EXCEEDED, BANDWIDTH_LIMIT_EXCEEDED, TENANT_SUSPENDED"),
              (status = 409, description = "PUBLIC_KEY_IN_USE"),
              (status = 503, description = "SERVER_UNAVAILABLE, POOL_EXHAUSTED, DATABASE_UNAVAILABLE")))]
async fn register(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<RegisterQuery>,
    headers: HeaderMap,
    Json(body): Json<RegisterDevice>,
) -> Result<Response, Problem> {
    let arrived = context::arrived();
    let new = parse(body)?;
    let region = new.region.clone();
    let wait = preferred_wait(&headers).or(query.wait.map(|Wait::Active| DEFAULT_WAIT));
    let device = match place(&app, caller, new).await {
        Ok(Once::First(device)) => device,
        Ok(Once::Replay(response)) => return Ok(response),
        Err(problem) => return Err(unless_nowhere(&app, caller.tenant, region.as_deref(), problem).await),
    };
    app.nodes.server_changed(device.server.id);
    let activation_ms = activated(&app, &device, arrived, wait).await;
    Ok((StatusCode::CREATED, Json(registered(&app, &device, activation_ms)?)).into_response())
}

/// Milliseconds until the server had acknowledged the device, if it did in time.
async fn activated(app: &App, device: &Registered, arrived: Instant, wait: Option<Duration>) -> Option<u64> {
    let deadline = arrived + wait?;
    let acked = devices::wait_until_acked(&app.nodes, &app.db.sys, device.server.id, device.revision, deadline).await;
    // the device exists: the answer is what is known of it
    acked.unwrap_or(false).then(|| u64::try_from(arrived.elapsed().as_millis()).unwrap_or(u64::MAX))
}

/// What was done, or the answer of an earlier request with the same `Idempotency-Key`.
pub(super) enum Once<T> {
    First(T),
    Replay(Response),
}

/// Servers that may fill up between being chosen and being locked.
const PLACEMENTS: usize = 4;

/// Why a device was not registered.
enum NotRegistered {
    ServerFull,
    Refused(Problem),
}

impl From<RegisterError> for NotRegistered {
    fn from(error: RegisterError) -> Self {
        if matches!(error, RegisterError::ServerFull) { Self::ServerFull } else { Self::Refused(error.into()) }
    }
}

impl From<Problem> for NotRegistered {
    fn from(problem: Problem) -> Self {
        Self::Refused(problem)
    }
}

impl From<DbError> for NotRegistered {
    fn from(error: DbError) -> Self {
        Self::Refused(error.into())
    }
}

async fn place(app: &App, caller: Caller, new: NewDevice) -> Result<Once<Box<Registered>>, Problem> {
    let data_key = app.data_keys.sealed(&app.db.tenancy, caller.tenant).await?;
    let data_key = data_key.ok_or(RegisterError::TenantClosed)?;
    let registration = || {
        let (tenant, user) = (caller.tenant, caller.user);
        let mut rng = StdRng::from_os_rng();
        Registration::new(tenant, user, new.clone(), &app.keys, &data_key, &mut rng, caller.request_id)
            .map_err(RegisterError::from)
    };
    for _ in 0..PLACEMENTS {
        let done = match context::is_idempotent() {
            true => once(app, caller, registration()?).await,
            false => {
                let device = app.registrations.register(&app.db.tenancy, caller.tenant, registration()?).await;
                device.map(|device| Once::First(Box::new(device))).map_err(NotRegistered::from)
            }
        };
        match done {
            Ok(done) => return Ok(done),
            Err(NotRegistered::Refused(problem)) => return Err(problem),
            Err(NotRegistered::ServerFull) => {}
        }
    }
    Err(RegisterError::ServerUnavailable.into())
}

/// In one transaction with what is kept of the answer.
async fn once(app: &App, caller: Caller, device: Registration) -> Result<Once<Box<Registered>>, NotRegistered> {
    let mut tx = app.db.tenancy.begin(caller.tenant).await?;
    let work = async {
        let place = match idempotency::claim(&mut tx, app, caller.user.to_string()).await? {
            Claim::Proceed(place) => place,
            Claim::Replay(replay) => return Ok(Once::Replay(again(app, &mut tx, caller, &replay).await?)),
        };
        let device = devices::register(&mut tx, device, app.clock.now()).await?;
        idempotency::keep(&mut tx, &app.keys, place, StatusCode::CREATED, &Kept { device_id: device.id }).await?;
        Ok(Once::First(Box::new(device)))
    }
    .await;
    tx.finish(work).await
}

/// What is kept of a registration. Not its answer: that holds the private key, which is destroyed with the device.
#[derive(Serialize, Deserialize)]
struct Kept {
    device_id: DeviceId,
}

/// The answer of an earlier registration, from the device as it is now.
async fn again(app: &App, tx: &mut TenantTx, caller: Caller, replay: &Replay) -> Result<Response, Problem> {
    let Kept { device_id } = replay.kept()?;
    let device = devices::find(tx, caller.user, device_id).await?.ok_or_else(|| {
        Problem::new(ErrorCode::NotFound).detail("The device that was registered with this Idempotency-Key is deleted.")
    })?;
    let keys = devices::config_of(tx, &app.keys, device_id).await?;
    let server = servers::find(tx, device.server).await?.ok_or_else(|| Problem::new(ErrorCode::ServerUnavailable))?;
    let device = Registered {
        id: device_id,
        public_key: device.public_key,
        keys,
        addresses: device.addresses,
        server,
        client: tenants::client_settings(tx).await?,
        revision: device.placed_revision,
    };
    replay.with(&registered(app, &device, None)?)
}

fn registered(app: &App, device: &Registered, activation_ms: Option<u64>) -> Result<RegisteredDevice, Problem> {
    Ok(RegisteredDevice {
        device_id: device.id,
        config: config_text(app, &device.keys, device.addresses, &device.server, &device.client)?,
        assigned_ip: device.addresses.ipv4,
        assigned_ipv6: device.addresses.ipv6,
        status: if activation_ms.is_some() { DeviceStatus::Active } else { DeviceStatus::Pending },
        activation_ms,
        public_key: device.public_key.to_string(),
        server: DeviceServer {
            id: device.server.id,
            region: device.server.region.clone(),
            endpoint: std::net::SocketAddr::new(device.server.public_ip, device.server.endpoint_port).to_string(),
            public_key: device.server.public_key.map(|key| STANDARD.encode(key)).unwrap_or_default(),
        },
    })
}

/// The configuration file of a device, as its tenant wants it, otherwise with the platform's defaults.
pub(super) fn config_text(
    app: &App,
    keys: &ConfigKeys,
    addresses: Addresses,
    server: &Server,
    tenant: &ClientSettings,
) -> Result<Secret, Problem> {
    let defaults = ClientDefaults { dns: &app.config.client_dns, mtu: app.config.client_mtu };
    render_config(keys, addresses, server, tenant, defaults)
        .map(|text| Secret::new(text.as_str()))
        .ok_or_else(|| Problem::new(ErrorCode::ServerUnavailable).retry_after(5))
}

/// All faults of the body at once.
fn parse(body: RegisterDevice) -> Result<NewDevice, Problem> {
    let mut faults: Vec<(&str, Fault)> = Vec::new();
    let name = DeviceName::parse(&body.device_name).map_err(|fault| faults.push(("/device_name", fault))).ok();
    let platform = body
        .platform
        .as_deref()
        .and_then(|text| Platform::parse(text).map_err(|fault| faults.push(("/platform", fault))).ok());
    let public_key = body
        .public_key
        .as_deref()
        .and_then(|text| PublicKey::parse(text).map_err(|fault| faults.push(("/public_key", fault))).ok());
    if let Err(fault) = check_region(body.server_region.as_deref()) {
        faults.push(("/server_region", fault));
    }
    match name {
        Some(name) if faults.is_empty() => {
            let keys = KeyRequest { public_key, preshared: body.preshared_key };
            Ok(NewDevice { name, platform, keys, region: body.server_region })
        }
        Some(_) | None => Err(faults
            .into_iter()
            .fold(Problem::validation(), |problem, (pointer, fault)| problem.field(pointer, fault.code, fault.detail))),
    }
}

/// `problem`, or what is wrong with the request when it asks for a region where no server is, whatever its state: that
/// does not pass by itself.
pub(super) async fn unless_nowhere(app: &App, tenant: TenantId, region: Option<&str>, problem: Problem) -> Problem {
    let Some(region) = region.filter(|_| problem.code() == ErrorCode::ServerUnavailable) else { return problem };
    let known = async {
        let mut tx = app.db.tenancy.begin(tenant).await?;
        let known = servers::list(&mut tx).await?.iter().any(|server| server.region == region);
        tx.commit().await?;
        Ok(known)
    };
    match known.await {
        Ok(true) => problem,
        Ok(false) => Problem::validation().field(
            "/server_region",
            "invalid_value",
            "must be the region of a server; see GET /api/v1/servers",
        ),
        Err(error) => DbError::into(error),
    }
}

pub(super) fn check_region(region: Option<&str>) -> Result<(), Fault> {
    if region.is_none_or(is_region) {
        Ok(())
    } else {
        Err(Fault { code: "invalid_format", detail: "must be 1 to 50 lower-case letters, digits and dashes" })
    }
}

/// `Prefer: wait=5` (RFC 7240 §4.3). Other preferences, and what cannot be understood, are ignored, as it demands.
fn preferred_wait(headers: &HeaderMap) -> Option<Duration> {
    headers
        .get_all("prefer")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|preference| preference.trim().strip_prefix("wait=")?.trim_matches('"').parse().ok())
        .map(|seconds| Duration::from_secs(seconds).min(MAX_WAIT))
}

/// The caller's devices, oldest first.
#[utoipa::path(get, path = "/api/v1/devices", tag = "devices", security(("api_key" = [], "user_token" = [])),
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "Default 50."),
           ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before.")),
    responses((status = 200, body = DevicePage)))]
async fn list(
    State(app): State<App>,
    caller: Caller,
    Query(query): Query<ListQuery>,
) -> Result<Json<DevicePage>, Problem> {
    let limit = query.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(Problem::validation().field("?limit", "out_of_range", "must be from 1 to 200"));
    }
    // a cursor is good for the list of the user it was made for
    let name = format!("devices:{}:{}", caller.tenant, caller.user);
    let after = match &query.cursor {
        Some(text) => Some(DeviceId::from_uuid(cursor::decode(&app.secrets, &name, text)?)),
        None => None,
    };
    let now = app.clock.now();
    let page = devices::Page { user: caller.user, after, limit: limit + 1 };
    let mut found = app.device_lists.page(&app.db.tenancy, caller.tenant, page).await?;
    let has_more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let last = found.last().filter(|_| has_more);
    let next_cursor = last.map(|last| cursor::encode(&app.secrets, &name, last.device.id.uuid()));
    let data = found.into_iter().map(|device| shown(device, now)).collect();
    Ok(Json(DevicePage { data, has_more, next_cursor }))
}

fn shown(served: ServedDevice, now: OffsetDateTime) -> Device {
    let ServedDevice { device, region, acked } = served;
    Device {
        device_id: device.id,
        tunnel_up: device.tunnel_up(now),
        device_name: device.name,
        platform: device.platform,
        public_key: device.public_key.to_string(),
        assigned_ip: device.addresses.ipv4,
        assigned_ipv6: device.addresses.ipv6,
        status: if acked { DeviceStatus::Active } else { DeviceStatus::Pending },
        server_id: device.server,
        server_region: region,
        last_handshake_at: device.last_handshake_at,
        last_connected_at: device.last_connected_at,
        created_at: device.created_at,
    }
}

/// One device.
#[utoipa::path(get, path = "/api/v1/devices/{device_id}", tag = "devices", security(("api_key" = [], "user_token" = [])),
    params(("device_id" = DeviceId, Path)),
    responses((status = 200, body = Device)))]
async fn get(State(app): State<App>, caller: Caller, Path(id): Path<DeviceId>) -> Result<Json<Device>, Problem> {
    let mut tx = app.db.tenancy.begin(caller.tenant).await?;
    let device = devices::find(&mut tx, caller.user, id).await?;
    let servers = servers::list(&mut tx).await?;
    tx.commit().await?;
    let device = device.ok_or_else(|| Problem::new(ErrorCode::NotFound))?;
    let server = servers.iter().find(|server| server.id == device.server);
    Ok(Json(shown(ServedDevice::new(device, server), app.clock.now())))
}

/// The configuration file of a device, ready for `wg-quick`; or as a QR code, for the camera of a telephone.
#[utoipa::path(get, path = "/api/v1/devices/{device_id}/config", tag = "devices", security(("api_key" = [], "user_token" = [])),
    params(("device_id" = DeviceId, Path),
           ("format" = Option<String>, Query, description = "`qr`: an SVG picture instead of the text.")),
    responses((status = 200, content(
                  (String = "text/plain", example = "[Interface]\nPrivateKey = …\nAddress = 10.8.0.45/32, fd00:cafe::2d/128\nDNS = 1.1.1.1\nMTU = 1420\n\n[Peer]\nPublicKey = …\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = 203.0.113.10:51820\nPersistentKeepalive = 25\n"),
                  (String = "image/svg+xml", example = "<svg xmlns=\"http://www.w3.org/2000/svg\">…</svg>"))),
              (status = 409, description = "CONFLICT: its pool took the address back when it disconnected"),
              (status = 503, description = "SERVER_UNAVAILABLE")))]
async fn config(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<DeviceId>,
    Query(query): Query<ConfigQuery>,
) -> Result<Response, Problem> {
    let mut tx = app.db.tenancy.begin(caller.tenant).await?;
    let Some(device) = devices::find(&mut tx, caller.user, id).await? else {
        tx.rollback().await?;
        return Err(Problem::new(ErrorCode::NotFound));
    };
    if device.reclaimed {
        tx.rollback().await?;
        return Err(Problem::new(ErrorCode::Conflict).detail(
            "The device has no address since it disconnected. Connect it: the answer holds its configuration.",
        ));
    }
    let keys = devices::config_of(&mut tx, &app.keys, id).await?;
    let server = servers::find(&mut tx, device.server).await?;
    let client = tenants::client_settings(&mut tx).await?;
    tx.commit().await?;
    let server = server.ok_or_else(|| Problem::new(ErrorCode::ServerUnavailable))?;
    let text = config_text(&app, &keys, device.addresses, &server, &client)?;
    if let Some(Format::Qr) = query.format {
        let picture = devices::qr(text.expose()).map_err(|error| Problem::internal(&error))?;
        return Ok(([(CONTENT_TYPE, "image/svg+xml")], picture.to_string()).into_response());
    }
    let headers = [
        (CONTENT_TYPE, "text/plain; charset=utf-8"),
        // a fixed name, short enough for an interface: nothing typed by a user gets into a header
        (CONTENT_DISPOSITION, "attachment; filename=\"cvault.conf\""),
    ];
    Ok((headers, text.expose().to_owned()).into_response())
}

/// Give a device new keys.
///
/// The old ones are of no use from the moment the server has the new ones; addresses stay. With `?wait=active` or
/// `Prefer: wait=5` the answer waits for that moment, as at registration.
#[utoipa::path(post, path = "/api/v1/devices/{device_id}/rotate-key", tag = "devices", security(("api_key" = [], "user_token" = [])),
    params(("device_id" = DeviceId, Path),
           ("wait" = Option<String>, Query, description = "`active`: answer when the server has acknowledged."),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer."),
           ("Prefer" = Option<String>, Header, description = "`wait=SECONDS`, at most 30 (RFC 7240).")),
    request_body = RotateDeviceKey,
    responses((status = 200, body = RegisteredDevice),
              (status = 403, description = "TENANT_SUSPENDED, BANDWIDTH_LIMIT_EXCEEDED"),
              (status = 409, description = "PUBLIC_KEY_IN_USE"),
              (status = 503, description = "SERVER_UNAVAILABLE, DATABASE_UNAVAILABLE")))]
async fn rotate_key(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<DeviceId>,
    Query(query): Query<RegisterQuery>,
    headers: HeaderMap,
    Json(body): Json<RotateDeviceKey>,
) -> Result<Response, Problem> {
    let arrived = context::arrived();
    let public_key = body.public_key.as_deref().map(PublicKey::parse).transpose();
    let public_key =
        public_key.map_err(|fault| Problem::validation().field("/public_key", fault.code, fault.detail))?;
    let new = NewDeviceKeys { device: id, public_key, preshared: body.preshared_key };
    let wait = preferred_wait(&headers).or(query.wait.map(|Wait::Active| DEFAULT_WAIT));
    let mut tx = app.db.tenancy.begin(caller.tenant).await?;
    let work = rotate_once(&app, &mut tx, caller, new).await;
    let rotated = match tx.finish(work).await? {
        Once::First(rotated) => rotated,
        Once::Replay(response) => return Ok(response),
    };
    let device = &rotated.device;
    rotated.moved_from.into_iter().chain([device.server.id]).for_each(|server| app.nodes.server_changed(server));
    let activation_ms = activated(&app, device, arrived, wait).await;
    Ok(Json(registered(&app, device, activation_ms)?).into_response())
}

async fn rotate_once(
    app: &App,
    tx: &mut TenantTx,
    caller: Caller,
    new: NewDeviceKeys,
) -> Result<Once<Box<devices::Rotated>>, Problem> {
    let place = match idempotency::claim(tx, app, caller.user.to_string()).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => return again(app, tx, caller, &replay).await.map(Once::Replay),
    };
    let mut rng = StdRng::from_os_rng();
    let now = app.clock.now();
    let kept = Kept { device_id: new.device };
    let rotated = devices::rotate(tx, &app.keys, caller.user, new, now, &mut rng, caller.request_id).await?;
    idempotency::keep(tx, &app.keys, place, StatusCode::OK, &kept).await?;
    Ok(Once::First(Box::new(rotated)))
}

/// Delete a device: its keys are destroyed, its server drops it, its address rests before it is used again.
#[utoipa::path(delete, path = "/api/v1/devices/{device_id}", tag = "devices", security(("api_key" = [], "user_token" = [])),
    params(("device_id" = DeviceId, Path),
           ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    responses((status = 204, description = "Deleted, now or before.")))]
async fn delete(State(app): State<App>, caller: Caller, Path(id): Path<DeviceId>) -> Result<Response, Problem> {
    let mut tx = app.db.tenancy.begin(caller.tenant).await?;
    let work = delete_once(&app, &mut tx, caller, id).await;
    match tx.finish(work).await? {
        Once::First(Some(revoked)) => app.nodes.server_changed(revoked.server),
        Once::First(None) => {}
        Once::Replay(response) => return Ok(response),
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn delete_once(
    app: &App,
    tx: &mut TenantTx,
    caller: Caller,
    id: DeviceId,
) -> Result<Once<Option<devices::Revoked>>, Problem> {
    let place = match idempotency::claim(tx, app, caller.user.to_string()).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => return Ok(Once::Replay(replay.into_response())),
    };
    let revoked = match devices::revoke(tx, caller.user, id, app.clock.now(), caller.request_id).await {
        Ok(revoked) => Some(revoked),
        Err(RevokeError::NotFound) if devices::is_revoked(tx, caller.user, id).await? => None,
        Err(error) => return Err(error.into()),
    };
    idempotency::keep(tx, &app.keys, place, StatusCode::NO_CONTENT, &()).await?;
    Ok(Once::First(revoked))
}

pub(super) fn bandwidth_exceeded(UsedUp { max, used, resets_at }: UsedUp) -> Problem {
    Problem::new(ErrorCode::BandwidthLimitExceeded)
        .detail("The tenant has used up what it may carry this month (UTC).")
        .limit("bandwidth_bytes", max, used)
        .resets_at(resets_at)
}

impl From<RegisterError> for Problem {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::DeviceLimit { max, used } => Self::new(ErrorCode::DeviceLimitExceeded)
                .detail(format!("This user has {used} of {max} devices. Remove one or raise the limit."))
                .limit("devices_per_user", max.into(), used),
            RegisterError::UserGone => Self::new(ErrorCode::InvalidToken),
            RegisterError::TenantClosed => Self::new(ErrorCode::TenantSuspended),
            RegisterError::BandwidthLimit(used_up) => bandwidth_exceeded(used_up),
            RegisterError::PublicKeyInUse => {
                Self::new(ErrorCode::PublicKeyInUse).detail("Another device has this public key. Make a new pair.")
            }
            RegisterError::ServerUnavailable | RegisterError::ServerFull => {
                Self::new(ErrorCode::ServerUnavailable).retry_after(5)
            }
            RegisterError::PoolExhausted => Self::new(ErrorCode::PoolExhausted).retry_after(30),
            RegisterError::Key(error) => Self::internal(&error),
            RegisterError::Db(error) => error.into(),
        }
    }
}

impl From<RotateError> for Problem {
    fn from(error: RotateError) -> Self {
        match error {
            RotateError::NotFound => Self::new(ErrorCode::NotFound),
            RotateError::Refused(error) => error.into(),
        }
    }
}

impl From<RevokeError> for Problem {
    fn from(error: RevokeError) -> Self {
        match error {
            RevokeError::NotFound => Self::new(ErrorCode::NotFound),
            RevokeError::Db(error) => error.into(),
        }
    }
}

impl From<ConfigError> for Problem {
    fn from(error: ConfigError) -> Self {
        match error {
            ConfigError::Key(error) => Self::internal(&error),
            ConfigError::Db(error) => error.into(),
        }
    }
}
