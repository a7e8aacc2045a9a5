//! `admin keys …`.

use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{AdminError, KeysCommand, SigningArgs};
use crate::app::App;
use crate::keys::{self, KeyState, Replaced, Replacement};

pub(super) async fn run(app: &App, command: KeysCommand) -> Result<Value, AdminError> {
    match command {
        KeysCommand::Status => status(app).await,
        KeysCommand::Rotate => {
            let rotated = keys::rotate(app, "cli").await?;
            Ok(json!({"version": app.keys.version(), "data_keys": rotated.data_keys, "secrets": rotated.secrets,
                     "answers": rotated.answers}))
        }
        KeysCommand::RotateTokens(args) => {
            let replaced = keys::replace_token_key(app, args.replacement(), "cli", &mut StdRng::from_os_rng()).await?;
            let states = keys::token_key_states(app).await?;
            let meaning = match args.replacement() {
                Replacement::Overlapping => {
                    "the next key signs from its `signs_from`; tokens stay valid until they expire"
                }
                Replacement::AtOnce => {
                    "every token signed before is refused: users and portal programs refresh theirs, staff needs new ones"
                }
            };
            Ok(shown(args.replacement(), replaced, meaning, "token_keys", &states))
        }
        KeysCommand::RotateContexts(args) => {
            let replaced =
                keys::replace_context_key(app, args.replacement(), "cli", &mut StdRng::from_os_rng()).await?;
            let states = keys::context_key_states(app).await?;
            let meaning = match args.replacement() {
                Replacement::Overlapping => "every replica signs with the newest key within 15 s",
                Replacement::AtOnce => {
                    "transactions of earlier keys have failed; every replica signs with the new key within 15 s"
                }
            };
            Ok(shown(args.replacement(), replaced, meaning, "context_keys", &states))
        }
    }
}

impl SigningArgs {
    fn replacement(&self) -> Replacement {
        if self.now { Replacement::AtOnce } else { Replacement::Overlapping }
    }
}

/// An earlier call that has not taken effect yet is what this one is for, too.
fn shown(how: Replacement, replaced: Replaced, meaning: &str, list: &str, states: &[KeyState]) -> Value {
    let status = match (how, replaced) {
        (Replacement::AtOnce, _) => "replaced",
        (Replacement::Overlapping, Replaced::Begun) => "begun",
        (Replacement::Overlapping, Replaced::UnderWay) => "under_way",
    };
    json!({"status": status, "meaning": meaning, list: rows(states)})
}

fn rows(states: &[KeyState]) -> Vec<Value> {
    let time = |at: OffsetDateTime| at.format(&Rfc3339).ok();
    states
        .iter()
        .map(|state| {
            json!({"name": state.name, "stage": state.stage.as_str(), "signs_from": time(state.signs_from),
                   "removed_after": state.until.and_then(time)})
        })
        .collect()
}

async fn status(app: &App) -> Result<Value, AdminError> {
    let used = keys::in_use(&app.db.sys).await?;
    let mut versions: Vec<i16> = app.keys.known().chain(used.iter().map(|used| used.version)).collect();
    versions.sort_unstable();
    versions.dedup();
    let wrapping: Vec<Value> = versions
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
    let (tokens, contexts) = (keys::token_key_states(app).await?, keys::context_key_states(app).await?);
    Ok(json!({"keys": wrapping, "token_keys": rows(&tokens), "context_keys": rows(&contexts)}))
}
