//! `GET /api/v1/servers`: the servers a user may connect to.

use axum::extract::State;
use cvault_types::server::{Server, ServerList};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::{Caller, Json, Problem};
use crate::servers;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list))
}

/// The servers, by region, with their load.
#[utoipa::path(get, path = "/api/v1/servers", tag = "servers", security(("api_key" = [], "user_token" = [])),
    responses((status = 200, body = ServerList)))]
async fn list(State(app): State<App>, caller: Caller) -> Result<Json<ServerList>, Problem> {
    let now = app.clock.now();
    let mut tx = app.db.tenancy.single(caller.tenant).await?;
    let found = servers::list(&mut tx).await;
    let servers = tx.finish(found).await?;
    let servers = servers
        .into_iter()
        .map(|server| Server {
            id: server.id,
            load: server.load_percent(),
            available: server.takes_devices(now),
            name: server.name,
            region: server.region,
        })
        .collect();
    Ok(Json(ServerList { servers }))
}
