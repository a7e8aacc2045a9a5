//! `GET /api/v1/servers`: the servers a user may connect to.

use axum::extract::State;
use cvault_types::server::{Server, ServerList};
use time::OffsetDateTime;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::{Caller, Problem, Written};
use crate::servers;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list))
}

/// The servers, by region, with their load.
#[utoipa::path(get, path = "/api/v1/servers", tag = "servers", security(("api_key" = [], "user_token" = [])),
    responses((status = 200, body = ServerList)))]
async fn list(State(app): State<App>, _caller: Caller) -> Result<Written, Problem> {
    app.server_list.servers(&app.db.sys, app.clock.now(), write).await
}

fn write(servers: &[servers::Server], now: OffsetDateTime) -> Result<Written, Problem> {
    let servers = servers
        .iter()
        .map(|server| Server {
            id: server.id,
            load: server.load_percent(),
            available: server.takes_devices(now),
            name: server.name.clone(),
            region: server.region.clone(),
        })
        .collect();
    Written::json(&ServerList { servers })
}
