//! `GET /api/v1/servers`: the servers a user may connect to.

use axum::extract::State;
use cvault_types::server::{Server, ServerList};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::{Caller, Json, Problem};

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list))
}

/// The servers, by region, with their load.
#[utoipa::path(get, path = "/api/v1/servers", tag = "servers", security(("api_key" = [], "user_token" = [])),
    responses((status = 200, body = ServerList)))]
async fn list(State(app): State<App>, _caller: Caller) -> Result<Json<ServerList>, Problem> {
    let now = app.clock.now();
    let servers = app.server_list.servers(&app.db.sys).await?;
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
    Ok(Json(ServerList { servers }))
}
