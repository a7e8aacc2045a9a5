//! `admin keys …`.

use serde_json::{Value, json};

use super::{AdminError, KeysCommand};
use crate::app::App;
use crate::keys;

pub(super) async fn run(app: &App, command: KeysCommand) -> Result<Value, AdminError> {
    match command {
        KeysCommand::Status => status(app).await,
        KeysCommand::Rotate => {
            let rotated = keys::rotate(app, "cli").await?;
            Ok(json!({"version": app.keys.version(), "data_keys": rotated.data_keys, "secrets": rotated.secrets,
                     "answers": rotated.answers}))
        }
    }
}

async fn status(app: &App) -> Result<Value, AdminError> {
    let used = keys::in_use(&app.db.sys).await?;
    let mut versions: Vec<i16> = app.keys.known().chain(used.iter().map(|used| used.version)).collect();
    versions.sort_unstable();
    versions.dedup();
    let rows: Vec<Value> = versions
        .into_iter()
        .map(|version| {
            let known = app.keys.known().any(|known| known == version);
            let used = used.iter().find(|used| used.version == version);
            let (data_keys, secrets, answers) =
                used.map_or((0, 0, 0), |used| (used.data_keys, used.secrets, used.answers));
            json!({"version": version, "known": known, "newest": version == app.keys.version(), "data_keys": data_keys,
                   "secrets": secrets, "answers": answers,
                   "removable": known && version != app.keys.version() && data_keys + secrets + answers == 0})
        })
        .collect();
    Ok(json!({"keys": rows}))
}
