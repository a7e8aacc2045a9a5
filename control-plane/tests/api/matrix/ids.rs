//! Ids in queries and bodies. Those in paths are walked by [`super::rows`].

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::rows::Caller;
use super::scene::{EXTERNAL_ID, Scene};
use super::{document, well_formed};
use crate::platform::Answer;

/// A parameter or a field that takes an id, asked by somebody who has none of what it could name.
struct Place {
    /// As [`places`] writes it.
    name: &'static str,
    by: Caller,
    /// The rest of the body.
    body: &'static str,
    /// Of the tenant under attack; the control is that its own developer finds something by it.
    theirs: fn(&Scene) -> &str,
    /// For an id of theirs, and alike for one of nobody's.
    foreign: Expected,
    /// For an id of theirs of another kind, and one that is no text of ours.
    other_kind: Expected,
    /// For what is no id.
    garbage: Expected,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// 200, and an empty list.
    Nothing,
    Status(u16),
}

use Expected::{Nothing, Status};

const fn place(
    name: &'static str,
    by: Caller,
    body: &'static str,
    theirs: fn(&Scene) -> &str,
    [foreign, other_kind, garbage]: [Expected; 3],
) -> Place {
    Place { name, by, body, theirs, foreign, other_kind, garbage }
}

/// Filters by an id of one kind.
const FILTER: [Expected; 3] = [Nothing, Status(422), Status(422)];
/// Filters by an id of any kind: what is none finds nothing.
const ANY_KIND: [Expected; 3] = [Nothing, Nothing, Nothing];
/// A thing to act upon.
const TARGET: [Expected; 3] = [Status(404), Status(422), Status(422)];
const NEW_SERVER: &str = r#"{"name": "x", "region": "lab-9", "public_ip": "203.0.113.99"}"#;

const PLACES: &[Place] = &[
    place("POST /api/v1/vpn/connect .device_id", Caller::ForeignUser, "{}", |scene| &scene.device, TARGET),
    place("POST /api/v1/vpn/disconnect .device_id", Caller::Neighbour, "{}", |scene| &scene.device, TARGET),
    place(
        "POST /api/v1/tenant/api-keys/regenerate .api_key_id",
        Caller::ForeignOwner,
        "{}",
        |scene| &scene.key_id,
        TARGET,
    ),
    place("GET /api/v1/tenant/audit ?actor", Caller::ForeignOwner, "", |scene| &scene.user, ANY_KIND),
    place("GET /api/v1/tenant/audit ?target", Caller::ForeignOwner, "", |scene| &scene.device, ANY_KIND),
    place("GET /api/v1/tenant/request-logs ?api_key_id", Caller::ForeignOwner, "", |scene| &scene.key_id, FILTER),
    place("GET /api/v1/tenant/request-logs ?user_id", Caller::ForeignOwner, "", |scene| &scene.user, FILTER),
    place("GET /api/v1/tenant/request-logs ?request_id", Caller::ForeignOwner, "", |scene| &scene.request, FILTER),
    // a tenant's own names for its users: any text is one, and another's is nobody's here
    place("GET /api/v1/users ?external_id", Caller::ForeignBackend, "", |_| EXTERNAL_ID, ANY_KIND),
    place("GET /api/v1/tenant/users ?external_id", Caller::ForeignOwner, "", |_| EXTERNAL_ID, ANY_KIND),
    place(
        "PATCH /api/v1/users/{user_id} .external_id",
        Caller::ForeignBackend,
        "{}",
        |_| EXTERNAL_ID,
        [Status(404), Status(404), Status(404)],
    ),
    // to staff nothing is foreign: see `theirs_or_nobodys`
    place("GET /admin/audit ?tenant_id", Caller::PlatformAdmin, "", |scene| &scene.tenant, FILTER),
    place("GET /admin/audit ?actor", Caller::PlatformAdmin, "", |scene| &scene.user, ANY_KIND),
    place("GET /admin/servers ?pool_id", Caller::PlatformAdmin, "", |scene| &scene.pool, FILTER),
    place(
        "POST /admin/servers .pool_id",
        Caller::PlatformAdmin,
        NEW_SERVER,
        |scene| &scene.pool,
        [Status(422), Status(422), Status(422)],
    ),
];

/// `METHOD /path ?name` of every parameter and `METHOD /path .name` of every field of a body that takes an id.
fn places() -> BTreeSet<String> {
    let document = document();
    let mut places = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let operation_name = format!("{} {path}", method.to_uppercase());
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let name = parameter["name"].as_str().expect("parameters are written out");
                if parameter["in"] == "query" && takes_an_id(name) {
                    places.insert(format!("{operation_name} ?{name}"));
                }
            }
            let mut fields = BTreeSet::new();
            collect(&document, &operation["requestBody"]["content"], &mut fields);
            places.extend(fields.into_iter().map(|field| format!("{operation_name} .{field}")));
        }
    }
    places
}

fn takes_an_id(name: &str) -> bool {
    ["id", "ids", "actor", "target"].contains(&name) || name.ends_with("_id") || name.ends_with("_ids")
}

/// Names of the fields that take an id, at any depth.
fn collect(document: &Value, schema: &Value, names: &mut BTreeSet<String>) {
    match schema {
        Value::Object(fields) => {
            if let Some(pointer) = fields.get("$ref").and_then(Value::as_str) {
                collect(document, document.pointer(&pointer[1..]).unwrap(), names);
            }
            let properties = fields.get("properties").and_then(Value::as_object);
            names.extend(properties.into_iter().flat_map(|all| all.keys()).filter(|name| takes_an_id(name)).cloned());
            fields.values().for_each(|inner| collect(document, inner, names));
        }
        Value::Array(all) => all.iter().for_each(|inner| collect(document, inner, names)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_id_in_a_query_or_a_body_has_its_place_in_the_table() {
    let listed: BTreeSet<String> = PLACES.iter().map(|place| place.name.to_owned()).collect();
    assert_eq!(places(), listed);
    assert_eq!(listed.len(), PLACES.len(), "a place is there twice");
}

/// Of ids, and one of none.
const PREFIXES: [&str; 14] =
    ["ten", "usr", "dev", "srv", "ses", "key", "adm", "pss", "chl", "pol", "aud", "req", "eml", "zzz"];

/// What every path and place that wants another kind is given, made of an id that exists.
pub(super) fn of_other_kinds<'a>(scene: &'a Scene, own: &'a str) -> impl Iterator<Item = String> + 'a {
    let (prefix, digits) = own.split_once('_').unwrap_or(("", "01kaz3r6e8f4s9w2v5m7n0q1tb"));
    let digits = if digits.len() == 26 { digits } else { "01kaz3r6e8f4s9w2v5m7n0q1tb" };
    let renamed = PREFIXES.iter().filter(move |other| **other != prefix).map(move |other| format!("{other}_{digits}"));
    let existing =
        [&scene.user, &scene.device, &scene.key_id, &scene.session, &scene.server, &scene.tenant, &scene.pool];
    let existing = existing.into_iter().filter(move |id| id.split('_').next() != Some(prefix)).cloned();
    renamed.chain(existing)
}

fn garbage() -> Vec<String> {
    let texts = ["x", "dev_", "usr", "_", "*", "%", "' or '1'='1", "../admin", "null", "0", "-1", "[]", "\u{1f600}"];
    texts.into_iter().map(str::to_owned).chain(["x".repeat(250)]).collect()
}

fn percent(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

async fn ask(scene: &Scene, place: &Place, by: Caller, id: &str) -> Answer {
    let (method, rest) = place.name.split_once(' ').unwrap();
    let (template, field) = rest.split_once(' ').unwrap();
    let path = scene.path(template);
    let call = match field.split_at(1) {
        ("?", name) => scene.platform.call(method, &format!("{path}?{name}={}", percent(id))),
        (_, name) => {
            let mut body: Value = serde_json::from_str(place.body).unwrap();
            body[name] = json!(id);
            scene.platform.call(method, &path).json(&body)
        }
    };
    scene.sign(by, call).send().await
}

/// Another tenant's; what staff asks for by such an id is theirs to see, so it is given one of nobody's.
fn theirs_or_nobodys(scene: &Scene, place: &Place) -> Vec<String> {
    let theirs = (place.theirs)(scene);
    let nobodys = match theirs.split_once('_') {
        Some((prefix, digits)) if digits.len() == 26 => format!("{prefix}_00000000000000000000000001"),
        Some(_) | None => "nobodys-name".to_owned(),
    };
    if place.by == Caller::PlatformAdmin { vec![nobodys] } else { vec![theirs.to_owned(), nobodys] }
}

#[tokio::test]
async fn no_id_in_a_query_or_a_body_reaches_what_is_anothers() {
    let scene = Scene::new().await;
    scene.platform.app.request_log.flush(&scene.platform.app.db.sys).await.unwrap();
    for place in PLACES {
        let check = async |expected: Expected, id: &str| {
            let what = format!("{} {id:?} as {:?}", place.name, place.by);
            let answer = ask(&scene, place, place.by, id).await;
            well_formed(&what, &answer);
            let got = match answer.status.as_u16() {
                200 if answer.body["data"] == json!([]) => Nothing,
                status => Status(status),
            };
            assert_eq!(got, expected, "{what}: {}", answer.text);
        };
        for id in theirs_or_nobodys(&scene, place) {
            check(place.foreign, &id).await;
        }
        let theirs = (place.theirs)(&scene);
        for id in of_other_kinds(&scene, theirs) {
            check(place.other_kind, &id).await;
        }
        for id in garbage() {
            check(place.garbage, &id).await;
        }
        // PostgreSQL takes no NUL in a text
        let nul = ask(&scene, place, place.by, "\0").await;
        nul.is_problem(place.name, 422, "VALIDATION_FAILED");

        // nobody of the victim's tenant that could be asked has its key
        if place.foreign == Nothing && place.by != Caller::ForeignBackend {
            let own = if place.by == Caller::ForeignOwner { Caller::Admin } else { place.by };
            let found = ask(&scene, place, own, theirs).await;
            let count = found.body["data"].as_array().map_or(0, Vec::len);
            assert!(count > 0, "{}: whose it is finds it: {}", place.name, found.text);
        }
    }
    let device = scene.victim.call(&scene.platform, "GET", &format!("/api/v1/devices/{}", scene.device)).send().await;
    assert_eq!(device.status, 200, "nothing has happened to it");
}
