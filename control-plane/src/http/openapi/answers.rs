//! An example for every successful answer in JSON, put together from those of its fields. What a field's type says by itself
//! (a time, an id, one of several words, a list) needs no example of its own; a text or a number does.

use http::StatusCode;
use serde_json::{Map, Value, json};

const JSON: &str = "application/json";
const TIME: &str = "2026-11-21T09:30:00Z";
/// Schemas inside each other; none of ours holds itself.
const DEPTH: u8 = 12;

/// Gives every answer with status 2xx its example. Returns the fields that have none.
pub(super) fn complete(document: &mut Value) -> Vec<String> {
    let schemas = document["components"]["schemas"].clone();
    let mut examples = Examples { schemas, missing: Vec::new() };
    let operations = document["paths"].as_object_mut().into_iter().flatten();
    for (_, operation) in operations.flat_map(|(_, methods)| methods.as_object_mut().into_iter().flatten()) {
        for (status, response) in operation["responses"].as_object_mut().into_iter().flatten() {
            describe(status, response);
            // not by index: that would give an answer without a body one that is null
            let content = response.get_mut("content").and_then(|content| content.get_mut(JSON));
            let Some(content) = content.filter(|_| status.starts_with('2')) else { continue };
            if content.get("example").is_none() {
                let example = examples.of(&content["schema"], "", DEPTH);
                content["example"] = example;
            }
        }
    }
    examples.missing.sort();
    examples.missing.dedup();
    examples.missing
}

/// OpenAPI 3.1 demands a description of every answer; where there is nothing to say, HTTP's own words for the status.
fn describe(status: &str, response: &mut Value) {
    let reason = status.parse().ok().and_then(|status: StatusCode| status.canonical_reason());
    if let (Some(response), Some(reason)) = (response.as_object_mut(), reason) {
        response.entry("description").or_insert_with(|| json!(reason));
    }
}

struct Examples {
    schemas: Value,
    missing: Vec<String>,
}

impl Examples {
    /// `place` names the field, for those who look for the one that has no example.
    fn of(&mut self, schema: &Value, place: &str, depth: u8) -> Value {
        let own = schema.get("example").or_else(|| schema["examples"].get(0));
        if let Some(own) = own {
            return own.clone();
        }
        if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next())
            && depth > 0
        {
            let referred = self.schemas[name].clone();
            return self.of(&referred, name, depth - 1);
        }
        if let Some(parts) = schema["allOf"].as_array() {
            let parts = parts.iter().filter_map(|part| self.of(part, place, depth).as_object().cloned());
            return Value::Object(parts.flatten().collect());
        }
        let choices = schema["oneOf"].as_array().or_else(|| schema["anyOf"].as_array());
        if let Some(choice) = choices.and_then(|choices| choices.iter().find(|choice| choice["type"] != "null")) {
            return self.of(choice, place, depth);
        }
        if let Some(word) = schema["enum"].get(0) {
            return word.clone();
        }
        self.by_type(schema, place, depth)
    }

    fn by_type(&mut self, schema: &Value, place: &str, depth: u8) -> Value {
        let kinds = &schema["type"];
        let several = kinds.as_array().into_iter().flatten().filter_map(Value::as_str);
        let types: Vec<&str> = kinds.as_str().into_iter().chain(several).collect();
        let kind = types.iter().find(|kind| **kind != "null").copied().unwrap_or_default();
        match (kind, schema["format"].as_str()) {
            ("object", _) => {
                let fields: Map<String, Value> = schema["properties"].as_object().cloned().unwrap_or_default();
                let example = |(name, field): (String, Value)| {
                    let example = self.of(&field, &format!("{place}.{name}"), depth);
                    (name, example)
                };
                Value::Object(fields.into_iter().map(example).collect())
            }
            ("array", _) => json!([self.of(&schema["items"], place, depth)]),
            ("boolean", _) => json!(false),
            ("string", Some("date-time")) => json!(TIME),
            _ if types.contains(&"null") => Value::Null,
            _ => {
                self.missing.push(place.to_owned());
                Value::Null
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::router;

    #[test]
    fn every_answer_has_an_example_without_holes() {
        let (_, document) = router::routes().split_for_parts();
        let mut document = serde_json::to_value(document).unwrap();
        assert_eq!(complete(&mut document), Vec::<String>::new(), "give these fields `#[schema(example = …)]`");
        let device = &document["paths"]["/api/v1/devices"]["post"]["responses"]["201"]["content"][JSON]["example"];
        assert_eq!((&device["assigned_ip"], &device["server"]["region"]), (&json!("10.8.0.45"), &json!("us-east")));
        // an answer without a body has no `content`
        assert!(!crate::http::openapi::document_text().replace(' ', "").contains("\"content\":null"));
    }

    #[test]
    fn what_is_known_of_a_field_is_shown() {
        let id = json!({"type": "string", "examples": ["dev_1"]});
        let page = json!({"type": "object", "properties": {
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Device"}},
            "has_more": {"type": "boolean"},
            "next_cursor": {"type": ["string", "null"]}}});
        let device = json!({"allOf": [
            {"type": "object", "properties": {"id": {"$ref": "#/components/schemas/Id"}, "at": {"type": ["string", "null"], "format": "date-time"}}},
            {"type": "object", "properties": {"status": {"enum": ["active"]}, "name": {"type": "string", "example": "d"}, "load": {"type": "integer"}}}]});
        let mut examples = Examples { schemas: json!({"Device": device, "Id": id}), missing: Vec::new() };
        let example = examples.of(&page, "", DEPTH);
        let shown = json!({"at": TIME, "id": "dev_1", "load": null, "name": "d", "status": "active"});
        assert_eq!(example, json!({"data": [shown], "has_more": false, "next_cursor": null}));
        assert_eq!(examples.missing, ["Device.load"]);
    }
}
