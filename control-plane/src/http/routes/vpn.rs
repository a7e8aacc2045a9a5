//! `/api/v1/vpn/*`: connections of a user's devices.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use cvault_types::vpn::{
    ConnectRequest, Connected, ConnectionStatus, DeviceConnection, DisconnectRequest, Disconnected, Session, VpnStatus,
};
use cvault_types::{DeviceId, ErrorCode, SessionId};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::devices::{Once, bandwidth_exceeded, check_region, config_text, unless_nowhere};
use crate::app::App;
use crate::audit;
use crate::devices::{self, ServedDevice};
use crate::http::idempotency::{self, Claim};
use crate::http::{Caller, Json, Problem};
use crate::servers;
use crate::sessions::{self, ConnectError, Connection};
use crate::tenancy::TenantTx;
use crate::tenants;

/// A tenant's limit of devices per user is at most 1000.
const MAX_DEVICES: u32 = 1000;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(connect)).routes(routes!(disconnect)).routes(routes!(status))
}

/// Open a session of a device.
///
/// Repeating it returns the open session. A device whose pool takes addresses back when devices disconnect gets another
/// address, and the `config` of the answer is the one to use from then on. A tunnel brought up from the configuration file alone opens a session when its
/// handshake is seen.
#[utoipa::path(post, path = "/api/v1/vpn/connect", tag = "vpn", security(("api_key" = [], "user_token" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = ConnectRequest,
    responses((status = 200, body = Connected),
              (status = 403, description = "BANDWIDTH_LIMIT_EXCEEDED, TENANT_SUSPENDED"),
              (status = 404, description = "NOT_FOUND"),
              (status = 503, description = "SERVER_UNAVAILABLE, POOL_EXHAUSTED, DATABASE_UNAVAILABLE")))]
async fn connect(
    State(app): State<App>,
    caller: Caller,
    Json(body): Json<ConnectRequest>,
) -> Result<Response, Problem> {
    let region = body.server_region.as_deref();
    if let Err(fault) = check_region(region) {
        return Err(Problem::validation().field("/server_region", fault.code, fault.detail));
    }
    let mut tx = app.db.tenancy.begin(caller.tenant).await?;
    let work = connect_once(&app, &mut tx, caller, body.device_id, region).await;
    let (connection, answer) = match tx.finish(work).await {
        Ok(Once::First(opened)) => *opened,
        Ok(Once::Replay(response)) => return Ok(response),
        Err(problem) => return Err(unless_nowhere(&app, caller.tenant, region, problem).await),
    };
    let changed = connection.placed.then_some(connection.server.id);
    changed.into_iter().chain(connection.moved_from).for_each(|server| app.nodes.server_changed(server));
    Ok(Json(answer).into_response())
}

/// What is kept of a connect. Not its answer: that holds the private key, which is destroyed with the device.
#[derive(Serialize, Deserialize)]
struct Kept {
    session_id: SessionId,
}

async fn connect_once(
    app: &App,
    tx: &mut TenantTx,
    caller: Caller,
    device: DeviceId,
    region: Option<&str>,
) -> Result<Once<Box<(Connection, Connected)>>, Problem> {
    let place = match idempotency::claim(tx, app, caller.user.to_string()).await? {
        Claim::Proceed(place) => place,
        Claim::Replay(replay) => {
            let Kept { session_id } = replay.kept()?;
            let gone = || Problem::new(ErrorCode::NotFound);
            let found = devices::find(tx, caller.user, device).await?.ok_or_else(gone)?;
            let server = servers::find(tx, found.server).await?.ok_or_else(gone)?;
            let connection = Connection { session: session_id, device: found, server, placed: false, moved_from: None };
            return Ok(Once::Replay(replay.with(&connected(app, tx, &connection).await?)?));
        }
    };
    let now = app.clock.now();
    let kept = sessions::connect(tx, caller.user, device, region, now, caller.request_id).await?;
    let answer = connected(app, tx, &kept).await?;
    idempotency::keep(tx, &app.keys, place, StatusCode::OK, &Kept { session_id: kept.session }).await?;
    Ok(Once::First(Box::new((kept, answer))))
}

async fn connected(app: &App, tx: &mut TenantTx, connection: &Connection) -> Result<Connected, Problem> {
    let keys = devices::config_of(tx, &app.keys, connection.device.id).await?;
    let client = tenants::client_settings(tx).await?;
    Ok(Connected {
        session_id: connection.session,
        server_ip: connection.server.public_ip.to_string(),
        server_port: connection.server.endpoint_port,
        status: ConnectionStatus::Connected,
        config: config_text(app, &keys, connection.device.addresses, &connection.server, &client)?,
        assigned_ip: connection.device.addresses.ipv4,
        server_id: connection.server.id,
        server_region: connection.server.region.clone(),
    })
}

/// Close the session of a device. Closing one that is not open changes nothing.
///
/// Where the pool of the device's address takes addresses back (`reclaim`), the device leaves its server, open session or
/// not, and has no address until it connects again.
#[utoipa::path(post, path = "/api/v1/vpn/disconnect", tag = "vpn", security(("api_key" = [], "user_token" = [])),
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "A retry with the same key gets the first answer.")),
    request_body = DisconnectRequest,
    responses((status = 200, body = Disconnected),
              (status = 404, description = "NOT_FOUND")))]
async fn disconnect(
    State(app): State<App>,
    caller: Caller,
    Json(body): Json<DisconnectRequest>,
) -> Result<Response, Problem> {
    let mut tx = app.db.tenancy.begin(caller.tenant).await?;
    let work = async {
        let place = match idempotency::claim(&mut tx, &app, caller.user.to_string()).await? {
            Claim::Proceed(place) => place,
            Claim::Replay(replay) => return Ok((None, replay.into_response())),
        };
        let held = sessions::hold(&mut tx, caller.user, body.device_id).await?;
        let held = held.ok_or_else(|| Problem::new(ErrorCode::NotFound))?;
        let closed = sessions::close(&mut tx, body.device_id, app.clock.now()).await?;
        if closed.is_some() || held.reclaims {
            let entry = audit::Entry {
                actor: &caller.user.to_string(),
                action: "vpn.disconnect",
                target: &body.device_id.to_string(),
                details: serde_json::json!({"session": closed, "address_reclaimed": held.reclaims}),
                request_id: Some(caller.request_id),
            };
            audit::record(&mut tx, entry).await?;
        }
        let answer =
            Disconnected { status: ConnectionStatus::Disconnected, device_id: body.device_id, session_id: closed };
        idempotency::keep(&mut tx, &app.keys, place, StatusCode::OK, &answer).await?;
        if held.reclaims {
            sessions::reclaim(&mut tx, body.device_id).await?;
        }
        Ok::<_, Problem>((held.reclaims.then_some(held.server), Json(answer).into_response()))
    }
    .await;
    let (left, response) = tx.finish(work).await?;
    if let Some(server) = left {
        app.nodes.server_changed(server);
    }
    Ok(response)
}

/// Sessions and tunnels of the caller's devices.
#[utoipa::path(get, path = "/api/v1/vpn/status", tag = "vpn", security(("api_key" = [], "user_token" = [])),
    responses((status = 200, body = VpnStatus)))]
async fn status(State(app): State<App>, caller: Caller) -> Result<Json<VpnStatus>, Problem> {
    let now = app.clock.now();
    let mut tx = app.db.tenancy.begin(caller.tenant).await?;
    let all = devices::Page { user: caller.user, after: None, limit: MAX_DEVICES };
    let devices = devices::list(&mut tx, all).await?;
    let open = sessions::open_sessions(&mut tx, caller.user).await?;
    tx.commit().await?;
    let devices: Vec<_> = devices
        .into_iter()
        .map(|ServedDevice { device, region, .. }| {
            let session = open.iter().find(|session| session.device == device.id);
            DeviceConnection {
                device_id: device.id,
                tunnel_up: device.tunnel_up(now),
                device_name: device.name,
                status: status_of(session.is_some()),
                last_handshake_at: device.last_handshake_at,
                assigned_ip: device.addresses.ipv4,
                server_id: device.server,
                server_region: region,
                session: session.map(|session| Session {
                    session_id: session.id,
                    connected_at: session.connected_at,
                    rx_bytes: session.rx_bytes,
                    tx_bytes: session.tx_bytes,
                }),
            }
        })
        .collect();
    Ok(Json(VpnStatus {
        status: status_of(devices.iter().any(|device| device.session.is_some())),
        tunnel_up: devices.iter().any(|device| device.tunnel_up),
        last_handshake_at: devices.iter().filter_map(|device| device.last_handshake_at).max(),
        devices,
    }))
}

fn status_of(open: bool) -> ConnectionStatus {
    if open { ConnectionStatus::Connected } else { ConnectionStatus::Disconnected }
}

impl From<ConnectError> for Problem {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::NotFound => Self::new(ErrorCode::NotFound),
            ConnectError::TenantClosed => Self::new(ErrorCode::TenantSuspended),
            ConnectError::ServerUnavailable => Self::new(ErrorCode::ServerUnavailable).retry_after(5),
            ConnectError::PoolExhausted => Self::new(ErrorCode::PoolExhausted).retry_after(30),
            ConnectError::BandwidthLimit(used_up) => bandwidth_exceeded(used_up),
            ConnectError::Db(error) => error.into(),
        }
    }
}
